"""Links of one frame a datagram: no prefix, no framing; the socket keeps the borders.

Used by the VDE switch's ports. A full receiver (Linux: net.unix.max_dgram_qlen datagrams, or its buffer) makes a
connected AF_UNIX socket not writable, so the queue waits here for writability. An empty datagram means nothing and is
ignored (libvdeplug sends one when it closes).
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from typing import TYPE_CHECKING

from netstack.core.ports import FAILED, HUNG_UP, READABLE, WRITABLE, Buffer, Poller
from netstack.vde.link import READ_BUFFER, BaseLink, ReceiveFrames
from netstack.vde.stream import set_buffers
from netstack.wire.ethernet import MAX_FRAME

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

_SMALLEST = 14

# Frames of one wakeup; each costs a system call.
_BATCH = 256

# What says that the peer is gone, and not that this frame could not be sent.
_GONE = frozenset((errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET, errno.ENOENT, errno.EBADF))


class DatagramLink(BaseLink):
    """One guest on one connected datagram socket."""

    def __init__(self, name: str, sock: socket.socket, mtu: int, poller: Poller, receive: ReceiveFrames) -> None:
        super().__init__(name, mtu, poller, receive)
        sock.setblocking(False)
        set_buffers(sock)
        self._sock = sock
        self._fd = sock.fileno()
        self._buffer = memoryview(bytearray(READ_BUFFER))
        self._out: deque[tuple[Buffer, ...]] = deque()
        poller.register(self._fd, self, READABLE)

    def on_ready(self, events: int, now: float) -> None:
        """Read a batch of frames, one after the other into one buffer."""
        if events & WRITABLE and self._waits_writable:
            self.flush()
            self.note_backlog(now)
            self._watch_writability(self._fd, bool(self._out) or self.congested)
        if not events & (READABLE | FAILED | HUNG_UP) or self.closed:
            return
        buffer = self._buffer
        receive = self._sock.recv_into
        spans: list[int] = []
        at = 0
        why = ""
        for _ in range(_BATCH):
            if at + MAX_FRAME > READ_BUFFER:
                break
            try:
                n = receive(buffer[at : at + MAX_FRAME])
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _GONE:
                    why = f"link: {error.strerror}"
                break
            if n >= _SMALLEST:
                spans += (at, at + n)
                at += n
        if spans:
            self.frames_from_guest += len(spans) >> 1
            self.bytes_from_guest += at
            self._receive(self, buffer, spans, now)
        if why:
            self.close(why)

    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None:
        self._out.append((head,) if payload is None else (head, payload))

    def _put_burst(self, frames: NDArray[uint8]) -> None:
        self._out.extend((memoryview(row),) for row in frames)

    def flush(self) -> None:
        out = self._out
        if not out:
            return
        if self._captured:
            self.write_capture()
        send = self._sock.sendmsg
        while out:
            frame = out[0]
            try:
                send(frame)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _GONE:
                    self.close(f"link: {error.strerror}")
                    return
                self.drops_to_guest += 1  # this one frame: too long for the receiver, or no memory for it now
            out.popleft()
            self.backlog -= sum(map(len, frame))
        self.note_backlog()
        self._watch_writability(self._fd, bool(self._out) or self.congested)

    def _close(self) -> None:
        self._out.clear()
        self._poller.unregister(self._fd)
        self._sock.close()
