"""`vhost-user://PATH`: the guest's memory shared with us, and frames in it, with offload.

Theory of operation
-------------------
QEMU connects to our unix socket and negotiates over it (`vde.vhost_user_device`); after that frames pass through two
rings in the guest's memory (`vde.vhost_user_ring`), and eventfds say that there is something to do.

Guest to host: a kick wakes us, and frames are taken from the ring of the sending side, up to a bound a wakeup. Small
ones are copied, as a batch, into a buffer: what is read twice, as the slow road does, must not lie where the guest can
change it in between. Of large ones, which with TSO have up to 64 KiB, only the headers are copied; their payload goes
from the guest's memory into the host's socket (Stack.receive_scattered). When the batch is over, all its buffers are
given back at once.

Host to guest: frames are written into the guest's buffers at once (`vde.vhost_user_buffers`), or payload is received
straight into them (reserve, commit), and flush() makes them visible. When the guest has no buffers left, frames wait
in `_out`, which is bounded as every link's queue, and flows that would receive straight into buffers wait for a kick.

Until a driver has started the card, and after it let go of it, frames for the guest are dropped, as by any card.

What the front-end or the guest does wrong raises ViolationError somewhere below; here it is caught, and ends the link
with one line in the log. While the stack is calling us it only marks the link as broken, and the next flush() closes.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from netstack.core.ports import FAILED, HUNG_UP, READABLE, Buffer, Link, Offload, Poller
from netstack.vde import vhost_user_messages as wire
from netstack.vde.link import READ_BUFFER, VIOLATION, BaseLink, LinkPart, ReceiveFrames
from netstack.vde.vhost_user_buffers import PREFIX
from netstack.vde.vhost_user_device import RECEIVE, SEND, Device
from netstack.vde.vhost_user_messages import ViolationError
from netstack.wire.ethernet import MAX_FRAME

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

_SMALLEST = 14

# Work of one wakeup: messages of the front-end; frames, their pieces and bytes from the guest. Pieces of few bytes cost
# as much as others: frames of 1,024 each would take a second and more.
_MESSAGES = 32
_FRAMES = 256
_PIECES = 4096
_BYTES = READ_BUFFER - MAX_FRAME - PREFIX

# Up to here a frame is copied: the memory of a few pages costs less than the pieces it would be given on in.
_COPIED = 8192

_DESCRIPTORS = socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * array.array("i").itemsize) if sys.platform == "linux" else 0


class Receiver(Protocol):
    """The stack, as this link needs it."""

    @property
    def receive_frames(self) -> ReceiveFrames: ...
    def receive_scattered(self, link: Link, header: bytes, pieces: list[memoryview], now: float) -> None: ...
    def end_batch(self, now: float) -> None: ...


class _Kick(LinkPart):
    """What the poller wakes when the guest has done something to a ring."""

    def __init__(self, link: VhostUserLink, work: Callable[[float], None]) -> None:
        super().__init__(link)
        self._work = work

    def on_ready(self, events: int, now: float) -> None:
        try:
            self._work(now)
        except ViolationError as error:
            self.link.close(f"{VIOLATION}{error}")


class VhostUserLink(BaseLink):
    """One guest's card."""

    prefix = PREFIX
    direct = True

    def __init__(self, name: str, sock: socket.socket, mtu: int, poller: Poller, stack: Receiver) -> None:
        super().__init__(name, mtu, poller, stack.receive_frames)
        sock.setblocking(False)
        self.on_up: Callable[[float], None] | None = None  # told when a driver has started the card
        self.on_unsealed: Callable[[], None] | None = None  # told when the guest's memory may become shorter
        self._stack = stack
        self._sock = sock
        self._fd = sock.fileno()
        self._device = Device(self, mtu)
        self.offload: Offload | None = self._device.offload
        self._kicks = (_Kick(self, self._on_buffers), _Kick(self, self._on_frames))
        self._watched: dict[int, int] = {}  # which eventfd the poller watches for which ring
        self._header = b""  # of a message that has not come whole
        self._payload = b""
        self._fds: list[int] = []
        self._buffer = memoryview(bytearray(READ_BUFFER))
        self._out: deque[tuple[Buffer, Buffer | None]] = deque()
        self._reserved: list[memoryview] = []
        self._was_up = False
        self._broken = ""
        self._now = 0.0
        poller.register(self._fd, self, READABLE)

    @property
    def up(self) -> bool:
        """Whether a driver receives."""
        return self._device.buffers is not None and self._device.queues[RECEIVE].enabled

    # ---- the front-end ---------------------------------------------------------------------------------------------

    def on_ready(self, events: int, now: float) -> None:
        """Obey what the front-end says. Untrusted."""
        if not events & (READABLE | FAILED | HUNG_UP):
            return
        self._now = now
        try:
            for _ in range(_MESSAGES):
                if self.closed or not self._read_message():
                    break
        except ViolationError as error:
            self.close(f"{VIOLATION}{error}")
        except OSError as error:
            self.close(f"link: {error.strerror}")

    def _read_message(self) -> bool:
        """One message, or as much of it as has come; False: there is no more now."""
        while len(self._header) < wire.HEADER.size:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    wire.HEADER.size - len(self._header), _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return False
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                    self._fds += numbers
            if flags & socket.MSG_CTRUNC or len(self._fds) > wire.MAX_DESCRIPTORS:
                raise ViolationError(f"more than {wire.MAX_DESCRIPTORS} descriptors with one message")
            if not data:
                self.close("front-end closed the connection")
                return False
            self._header += data
        request, flags, size = wire.parse_header(self._header)
        while len(self._payload) < size:
            try:
                data = self._sock.recv(size - len(self._payload))
            except BlockingIOError:
                return False
            if not data:
                self.close("front-end closed the connection")
                return False
            self._payload += data
        payload, fds = self._payload, self._fds
        self._header = self._payload = b""
        self._fds = []
        self._obey(request, flags, payload, fds)
        return True

    def _obey(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        device = self._device
        answer = device.handle(request, flags, payload, fds)
        self.offload = device.offload
        if answer:
            try:
                sent = self._sock.send(answer)
            except BlockingIOError:
                sent = 0
            if sent != len(answer):
                raise ViolationError("the front-end does not read our answers")
        if request in (wire.Request.SET_MEM_TABLE, wire.Request.ADD_MEM_REG) and not device.memory.sealed:
            told, self.on_unsealed = self.on_unsealed, None
            if told is not None:
                told()

    # ---- the device's rings (vhost_user_device.Owner) ----------------------------------------------------------------

    def on_started(self, index: int) -> None:
        """A ring runs, or runs in other memory, or may be used now or no more."""
        queue = self._device.queues[index]
        if index not in self._watched:
            self._poller.register(queue.kick, self._kicks[index], READABLE)
            self._watched[index] = queue.kick
        _signal(queue.kick)  # look at it soon: whatever is in it may have been there before us
        was_up, self._was_up = self._was_up, self.up
        if self._was_up and not was_up and self.on_up is not None:
            self.on_up(self._now)

    def on_stopping(self, index: int) -> None:
        """What was done so far becomes visible; then the ring is no longer ours."""
        ring = self._device.queues[index].ring
        if ring is not None and ring.publish():
            self.on_call(index)
        kick = self._watched.pop(index, -1)
        if kick >= 0:
            self._poller.unregister(kick)
        if index == RECEIVE:
            self._was_up = False
            self._forget_out()

    def on_call(self, index: int) -> None:
        """Interrupt the guest."""
        _signal(self._device.queues[index].call)

    # ---- from the guest --------------------------------------------------------------------------------------------

    def _on_frames(self, now: float) -> None:
        """The guest has sent. Untrusted; raises ViolationError."""
        queue = self._device.queues[SEND]
        ring = queue.ring
        if ring is None:
            return
        ring.spare_kicks()
        count = ring.waiting()
        if count <= _FRAMES and self._take_frames(count, now):
            # That was all. Have the next one wake us, unless it has come in the meantime.
            _clear(queue.kick)
            if queue.ring is ring and ring.want_kick():
                _signal(queue.kick)
        elif count > _FRAMES:
            self._take_frames(_FRAMES, now)
        # Not all yet: the eventfd stays readable, and when others have had their turn we come back.

    def _take_frames(self, count: int, now: float) -> bool:
        """Take so many frames, or as many as one wakeup may; whether that was all of them."""
        queue = self._device.queues[SEND]
        ring = queue.ring
        assert ring is not None
        enabled = queue.enabled
        short = 0 if self._device.features & (wire.VERSION_1 | wire.MRG_RXBUF) else 2
        smallest = PREFIX - short + _SMALLEST
        buffer = self._buffer
        done: list[int] = []
        spans: list[int] = []
        at = total = taken = 0
        scattered = False
        violation = ""
        try:
            for _ in range(count):
                if taken >= _PIECES:
                    break
                chain, pieces = ring.take()
                done.append(chain)
                taken += len(pieces)
                size = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))
                if not smallest <= size <= MAX_FRAME + PREFIX:
                    raise ViolationError(f"a frame of {size} bytes: must be {smallest} to {MAX_FRAME + PREFIX}")
                if not enabled:
                    continue
                total += size
                if size <= _COPIED:
                    start = at + PREFIX
                    at += short
                    for piece in pieces:
                        end = at + len(piece)
                        buffer[at:end] = piece
                        at = end
                    if short:  # its last field, num_buffers, is not there
                        buffer[start - PREFIX : start] = bytes(buffer[start - PREFIX + short : start]) + bytes(short)
                    spans += (start, at)
                else:
                    if spans:
                        self._receive(self, buffer, spans, now)
                        spans = []
                        at = 0
                    scattered = True
                    header, pieces = _split(pieces, PREFIX - short)
                    self._stack.receive_scattered(self, header + bytes(short), pieces, now)
                if total >= _BYTES or self.closed:
                    break
        except ViolationError as error:
            violation = str(error)  # what came before it stands, and its batch has to end
        if spans:
            self._receive(self, buffer, spans, now)
        elif scattered:
            self._stack.end_batch(now)
        if violation:
            raise ViolationError(violation)
        if enabled:
            self.frames_from_guest += len(done)
            self.bytes_from_guest += total - len(done) * (PREFIX - short)
        if self.closed:  # something that we did for the stack met a violation
            return False
        for chain in done:
            ring.push(chain, 0)
        if ring.publish():
            self.on_call(SEND)
        return len(done) == count

    # ---- toward the guest ------------------------------------------------------------------------------------------

    def _on_buffers(self, now: float) -> None:
        """The guest has made buffers available. Untrusted; raises ViolationError."""
        _clear(self._device.queues[RECEIVE].kick)
        if self._device.buffers is not None:
            self._device.buffers.refill()
        self._write_out()
        self.note_backlog(now)
        self.wake_waiters(now)
        self.flush()

    def wake_waiters(self, now: float) -> None:
        """As long as there are buffers for what they have; the others keep their turn."""
        waiters, self._waiters = self._waiters, []
        for i, waiter in enumerate(waiters):
            buffers = self._device.buffers
            if self.congested or self._out or buffers is None or buffers.waits:
                self._waiters[:0] = waiters[i:]
                return
            waiter.on_drained(now)

    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None:
        self._out.append((head, payload))
        if len(self._out) == 1:
            self._try_write_out()

    def _put_burst(self, frames: NDArray[uint8]) -> None:
        idle = not self._out
        self._out.extend((memoryview(row), None) for row in frames)
        if idle:
            self._try_write_out()

    def _try_write_out(self) -> None:
        """Write; the stack is calling, so a violation only marks this link, and flush() ends it."""
        try:
            self._write_out()
        except ViolationError as error:
            self._broken = str(error)
            self._forget_out()

    def _write_out(self) -> None:
        """Write what is queued into the guest's buffers, as far as they last. Untrusted; raises ViolationError."""
        buffers = self._device.buffers
        if buffers is None or not self.up or self._broken:
            self.drops_to_guest += len(self._out)
            self._forget_out()
            return
        out = self._out
        while out:
            head, payload = out[0]
            if not buffers.write(head, payload):
                break
            out.popleft()
            self.backlog -= len(head) if payload is None else len(head) + len(payload)
        if buffers.misfits:
            self.drops_to_guest += buffers.misfits
            buffers.misfits = 0

    def _forget_out(self) -> None:
        self._out.clear()
        self.backlog = 0

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        """Where payload may be received, behind `header` bytes. Empty: wait_drained() tells when to ask again."""
        buffers = self._device.buffers
        if buffers is None or self._out or not self.up or self._broken:
            return []
        try:
            self._reserved = buffers.reserve(header, limit)
        except ViolationError as error:
            self._broken = str(error)
            return []
        return self._reserved

    def commit(self, head: Buffer, length: int) -> None:
        """`head`, and `length` bytes in what was reserved, are a frame."""
        pieces, self._reserved = self._reserved, []
        buffers = self._device.buffers
        if buffers is None:
            return
        buffers.commit(head, length)
        if length:
            self.frames_to_guest += 1
            self.bytes_to_guest += len(head) - PREFIX + length
            if self.capture is not None:
                # A copy: before it is written the guest may use its memory for something else.
                self._captured.append((memoryview(head)[PREFIX:], memoryview(b"".join(pieces))[:length]))

    def flush(self) -> None:
        """Let the guest see what was written."""
        if self._broken:
            self.close(f"{VIOLATION}{self._broken}")
            return
        if self._captured:
            self.write_capture()
        if self._out:
            self.note_backlog()
        ring = self._device.queues[RECEIVE].ring
        if ring is not None and ring.publish():
            self.on_call(RECEIVE)

    def _close(self) -> None:
        self._out.clear()
        self._reserved = []
        for kick in self._watched.values():
            self._poller.unregister(kick)
        self._watched.clear()
        self._device.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._poller.unregister(self._fd)
        self._sock.close()


def _split(pieces: list[memoryview], length: int) -> tuple[bytes, list[memoryview]]:
    """The first `length` bytes, copied, and the pieces without them."""
    first = pieces[0]
    if len(first) >= length:
        rest = [first[length:], *pieces[1:]] if len(first) > length else pieces[1:]
        return bytes(first[:length]), rest
    head, rest = _split(pieces[1:], length - len(first))
    return bytes(first) + head, rest


def _signal(fd: int) -> None:
    """Write to an eventfd. One that is full says all there is to say already; one that is not there says nothing."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.eventfd_write(fd, 1)


def _clear(fd: int) -> None:
    """Read an eventfd, so that it is not readable any more."""
    with contextlib.suppress(OSError):
        os.eventfd_read(fd)
