"""QEMU's stream framing: `-netdev stream` and `-netdev socket` over a connected stream socket.

Each frame is a big-endian u32 length and the Ethernet frame, without handshake, in both directions (QEMU
net/stream_data.c, net/socket.c). QEMU drops the connection at 69,633 bytes and more; passt takes 14 to 65,535, and we
take up to a whole IP packet of 65,535 behind an Ethernet header. After a wrong length nothing can be found again in a
stream, so it ends the link.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np

from netstack.core.ports import FAILED, HUNG_UP, READABLE, WRITABLE, Buffer, Poller
from netstack.core.runs import ACKS_MINIMUM, RUN_MINIMUM, Run
from netstack.vde.link import READ_BUFFER, BaseLink, ReceiveFrames
from netstack.wire.ethernet import MAX_FRAME

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

_LENGTH = struct.Struct("!I")
_SMALLEST = 14

# After so many frames of one length the next ones are looked at all at once: a guest that sends in bulk (`core.runs`).
_ALIKE = 4
_BIG32 = np.dtype(">u4")
_LITTLE = 100  # more than a TCP segment without payload

# IOV_MAX of Linux and macOS (limits.h): sendmsg() takes no more pieces.
_PIECES = 1024

# What the kernel may hold for a guest, where it lets us: half a millisecond at 10 Gbit/s would do, but a guest under
# emulation sleeps for longer.
_SOCKET_BUFFER = 4 << 20

# One frame's worth of 65,535 bytes must always fit behind what is left of another.
assert READ_BUFFER > 2 * (MAX_FRAME + 4)


def set_buffers(sock: socket.socket) -> None:
    """Ask for large socket buffers; beyond net.core.wmem_max only root gets them (SO_SNDBUFFORCE)."""
    force = {socket.SO_SNDBUF: 32, socket.SO_RCVBUF: 33}  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: not in Python's module
    for option, forced in force.items():
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BUFFER)
        except OSError:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)


def _count_alike(buffer: memoryview, at: int, length: int, have: int) -> int:
    """How many whole frames of this length follow at buffer[at:have], one behind the other. Untrusted."""
    room = (have - at) // (length + 4)
    if room < (RUN_MINIMUM if length > _LITTLE else ACKS_MINIMUM) - _ALIKE:
        return 0
    same = np.ndarray((room,), _BIG32, buffer, at, (length + 4,)) == length
    return room if same.all() else int(same.argmin())


class StreamLink(BaseLink):
    """One guest (or one segment of guests) on one connected stream socket."""

    prefix = 4

    def __init__(self, name: str, sock: socket.socket, mtu: int, poller: Poller, receive: ReceiveFrames) -> None:
        super().__init__(name, mtu, poller, receive)
        sock.setblocking(False)
        set_buffers(sock)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._fd = sock.fileno()
        self._buffer = memoryview(bytearray(READ_BUFFER))
        self._have = 0
        self._out: list[Buffer] = []
        poller.register(self._fd, self, READABLE)

    def on_ready(self, events: int, now: float) -> None:
        """Read once, and hand the whole frames on."""
        if events & WRITABLE and self._waits_writable:
            self.flush()
            self.note_backlog(now)
            self._watch_writability(self._fd, bool(self._out) or self.congested)
        if not events & (READABLE | FAILED | HUNG_UP) or self.closed:
            return
        try:
            n = self._sock.recv_into(self._buffer[self._have :])
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"link: {error.strerror}")
            return
        if n == 0:
            self.close("guest closed the connection" if not self._have else "guest closed the connection amid a frame")
            return
        self._split(self._have + n, now)

    def _split(self, have: int, now: float) -> None:
        """Find the frames in the buffer. Untrusted."""
        buffer = self._buffer
        unpack = _LENGTH.unpack_from
        spans: list[int] = []
        runs: list[Run] = []
        append = spans.append
        previous = alike = 0
        at = 0
        bad = -1
        last = have - 4
        while at <= last:
            (length,) = unpack(buffer, at)
            if not _SMALLEST <= length <= MAX_FRAME:
                bad = length
                break
            end = at + 4 + length
            if end > have:
                break
            append(at + 4)
            append(end)
            at = end
            if length != previous:
                previous = length
                alike = 1
            else:
                alike += 1
                if alike == _ALIKE:
                    more = _count_alike(buffer, at, length, have)
                    alike += more
                    if alike >= RUN_MINIMUM:
                        runs.append(((len(spans) >> 1) - _ALIKE, alike, length + 4))
                    if more:
                        size = (length + 4) * more
                        block = [0] * (2 * more)
                        block[::2] = range(at + 4, at + 4 + size, length + 4)
                        block[1::2] = range(at + 4 + length, at + 4 + length + size, length + 4)
                        spans += block
                        at += size
        if spans:
            frames = len(spans) >> 1
            self.frames_from_guest += frames
            self.bytes_from_guest += at - 4 * frames
            if runs:
                self._receive(self, buffer, spans, now, runs)
            else:
                self._receive(self, buffer, spans, now)
        if bad >= 0:
            self.close(f"bad frame length {bad}: must be {_SMALLEST} to {MAX_FRAME}")
            return
        rest = have - at
        if rest and at:
            buffer[:rest] = bytes(buffer[at:have])  # through a copy: the two may overlap
        self._have = rest

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        _LENGTH.pack_into(buffer, 0, frame_length)

    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None:
        self._out.append(head)
        if payload is not None:
            self._out.append(payload)

    def _put_burst(self, frames: NDArray[uint8]) -> None:
        self._out.append(frames.reshape(-1).data)

    def flush(self) -> None:
        out = self._out
        if not out:
            return
        if self._captured:
            self.write_capture()
        send = self._sock.sendmsg
        first = 0
        count = len(out)
        while first < count:
            try:
                sent = send(out[first : first + _PIECES])
            except BlockingIOError:
                break
            except OSError as error:
                self._out = []
                self.close(f"link: {error.strerror}")
                return
            self.backlog -= sent
            while first < count and sent >= len(out[first]):
                sent -= len(out[first])
                first += 1
            if sent:
                out[first] = memoryview(out[first])[sent:]
        del out[:first]
        self.note_backlog()
        self._watch_writability(self._fd, bool(self._out) or self.congested)

    def _close(self) -> None:
        self._out = []
        self._poller.unregister(self._fd)
        self._sock.close()
