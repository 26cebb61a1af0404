"""The rim, faked: host sockets, the poller and links that do what a test says and are strict about how they are used.

A FakeSocket behaves as a Linux TCP socket does, as far as flows can see it: level-triggered readiness, an error that is
raised once, ENOTCONN for a shutdown() of a socket that has ended, the lowest free number as its descriptor.
"""

from __future__ import annotations

import errno
import heapq
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from netstack.core.ports import (
    FAILED,
    HUNG_UP,
    PEER_CLOSED,
    READABLE,
    WRITABLE,
    Buffer,
    Capture,
    DatagramListener,
    DrainWaiter,
    Handler,
    HostSocket,
    Offload,
)
from netstack.wire import virtio_net
from netstack.wire.virtio_net import VirtioNet, parse_virtio_net
from tests.core.ip_fakes import FakeDatagramSocket

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

_FIRST_FD = 10
MSG_PEEK = 2  # socket.MSG_PEEK, as core.tcp has it


def oserror(number: int) -> OSError:
    """The exception that the socket module raises for an errno."""
    return OSError(number, os.strerror(number))


class FakeSocket:
    """A non-blocking TCP socket of the host; the test is its peer."""

    def __init__(self, host: FakeHost, fd: int, address: bytes, port: int) -> None:
        self._host = host
        self.fd = fd
        self.address = address
        self.port = port
        self.connected = False
        self.connect_result = 0
        self.inbox = bytearray()  # sent by the peer, not read yet
        self.eof = False  # the peer sent FIN, behind the inbox
        self.error = 0  # SO_ERROR: raised by the next call, once
        self.dead = False  # there was such an error
        self.room: int | None = None  # what the send buffer still takes; None: anything
        self.taken = bytearray()  # what the guest's side wrote
        self.shut = False
        self.closed = False
        self.was_reset = False
        self.calls = 0

    # ---- the peer

    def sends(self, data: bytes) -> None:
        assert not self.eof
        self.inbox += data

    def closes(self) -> None:
        """FIN from the peer."""
        self.eof = True

    def breaks(self, number: int = errno.ECONNRESET) -> None:
        """RST from the peer, or another error; what is not read yet is lost (Linux: tcp_reset, tcp_done)."""
        self.error = number
        self.dead = True
        self.inbox.clear()

    def takes(self, data: bytes) -> None:
        """Assert that the guest's side wrote exactly this since the last time."""
        assert bytes(self.taken) == data, f"{bytes(self.taken)[:64]!r} ({len(self.taken)})"
        self.taken.clear()

    # ---- what epoll sees

    @property
    def ended(self) -> bool:
        """TCP_CLOSE: both directions have ended, whatever is left to be read."""
        return self.dead or (self.eof and self.shut)

    def readiness(self) -> int:
        if not self.connected:
            return READABLE | WRITABLE | FAILED | HUNG_UP if self.connect_result else 0
        bits = 0
        if self.inbox or self.eof or self.dead:
            bits |= READABLE
        if self.room is None or self.room > 0 or self.shut or self.dead:
            bits |= WRITABLE
        if self.error:
            bits |= FAILED
        if self.ended:
            bits |= HUNG_UP
        return bits

    # ---- HostSocket

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self._host.release(self)

    def shutdown(self, how: int, /) -> None:
        self._use()
        assert how == 1
        if self.ended:
            raise oserror(errno.ENOTCONN)
        self.shut = True

    def send(self, data: Any, /) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[Any], /) -> int:
        self._use()
        if self.shut or self.dead:
            raise oserror(errno.EPIPE)
        data = b"".join(bytes(each) for each in buffers)
        assert data, "an empty send"
        assert len(buffers) <= 1024, "more than IOV_MAX"
        if self.room is not None:
            if self.room <= 0:
                raise BlockingIOError(errno.EAGAIN, "full")
            data = data[: self.room]
            self.room -= len(data)
        self.taken += data
        return len(data)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self._use()
        assert nbytes > 0
        assert flags in (0, MSG_PEEK)
        view = memoryview(buffer).cast("B")
        assert nbytes <= len(view)
        if not self.inbox:
            if self.eof or self.dead:
                return 0
            raise BlockingIOError(errno.EAGAIN, "empty")
        n = min(nbytes, len(self.inbox))
        view[:n] = self.inbox[:n]
        if flags != MSG_PEEK:
            del self.inbox[:n]
        return n

    def recvmsg_into(self, buffers: list[memoryview], /) -> tuple[int, Any, int, Any]:
        data = bytearray(sum(map(len, buffers)))
        n = self.recv_into(data, len(data))
        at = 0
        for each in buffers:
            part = data[at : min(at + len(each), n)]
            each[: len(part)] = part
            at += len(part)
        return n, [], 0, None

    def _use(self) -> None:
        assert not self.closed, "used after close()"
        assert self.connected, "used before it was connected"
        self.calls += 1
        if self.error:
            number, self.error = self.error, 0
            raise oserror(number)


class FakeHost:
    """Opens fake sockets: connected at the next poll, unless told otherwise."""

    def __init__(self) -> None:
        self.sockets: list[FakeSocket] = []  # all that were ever opened
        self.datagrams: list[FakeDatagramSocket] = []
        self.opened: list[tuple[str, bytes, int]] = []
        self.connects = True  # False: connect() stays pending
        self.refusal = 0  # an errno: connect() fails at once
        self.result = 0  # an errno: connect() fails at the next poll
        self._free: list[int] = []
        self._next_fd = _FIRST_FD

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        self.opened.append(("tcp", address, port))
        if self.refusal:
            raise oserror(self.refusal)
        sock = FakeSocket(self, self._lowest(), address, port)
        self.sockets.append(sock)
        if self.result:
            sock.connect_result = self.result
        else:
            sock.connected = self.connects
        return sock

    def accepted(self) -> FakeSocket:
        """A socket that a listener of the host's accepted, for a forward."""
        sock = FakeSocket(self, self._lowest(), b"", 0)
        sock.connected = True
        self.sockets.append(sock)
        return sock

    def is_connected(self, sock: HostSocket) -> bool:
        assert isinstance(sock, FakeSocket)
        return sock.connected

    def connect_error(self, sock: HostSocket) -> int:
        assert isinstance(sock, FakeSocket)
        assert not sock.closed
        return sock.connect_result

    def reset(self, sock: HostSocket) -> None:
        assert isinstance(sock, FakeSocket)
        sock.was_reset = True
        sock.close()

    def open_udp(self, address: bytes, port: int) -> FakeDatagramSocket:
        self.opened.append(("udp", address, port))
        return self._datagram()

    def listen_udp(self, host: str, port: int) -> Sequence[DatagramListener]:
        raise NotImplementedError

    def open_ping(self, address: bytes) -> FakeDatagramSocket:
        self.opened.append(("ping", address, 0))
        return self._datagram()

    def _datagram(self) -> FakeDatagramSocket:
        sock = FakeDatagramSocket(1_000_000 + len(self.datagrams))
        self.datagrams.append(sock)
        return sock

    def _lowest(self) -> int:
        """As the kernel does it: the lowest number that is free (POSIX, open())."""
        if self._free:
            return heapq.heappop(self._free)
        self._next_fd += 1
        return self._next_fd - 1

    def release(self, sock: FakeSocket) -> None:
        heapq.heappush(self._free, sock.fd)

    def open_sockets(self) -> Iterator[FakeSocket]:
        return (sock for sock in self.sockets if not sock.closed)


class FakePoller:
    """Level-triggered, and strict: nothing is registered twice, changed or taken out without being there."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self.events: dict[int, int] = {}

    def register(self, fd: int, handler: Handler, events: int) -> None:
        assert fd not in self.handlers, f"fd {fd} is registered twice"
        self.handlers[fd] = handler
        self.events[fd] = events

    def modify(self, fd: int, events: int) -> None:
        assert fd in self.handlers, f"fd {fd} is not registered"
        self.events[fd] = events

    def unregister(self, fd: int) -> None:
        assert fd in self.handlers, f"fd {fd} is not registered"
        del self.handlers[fd]
        del self.events[fd]

    def ready(self, sockets: Sequence[FakeSocket]) -> list[tuple[int, Handler, int]]:
        """Whom one epoll_wait() would report."""
        found = []
        for sock in sockets:
            if not sock.closed and sock.fd in self.handlers:
                events = sock.readiness() & (self.events[sock.fd] | FAILED | HUNG_UP)
                if events & READABLE and sock.eof:
                    events |= PEER_CLOSED
                if events:
                    found.append((sock.fd, self.handlers[sock.fd], events))
        return found


class OffloadFrame(bytes):
    """A frame with the virtio-net header that stood before it."""

    header: VirtioNet


class FakeLink:
    """A link that keeps what is flushed; `stuck`: the guest does not read, and everything stays queued.

    With `offload` the prefix is a virtio-net header, and the frames are OffloadFrames.
    """

    def __init__(self, name: str = "link", mtu: int = 1500, prefix: int = 4, offload: Offload | None = None) -> None:
        self.name = name
        self.mtu = mtu
        self.offload = offload
        self.prefix = prefix if offload is None else virtio_net.HEADER_LENGTH
        self.direct = False
        self.backlog = 0
        self.congested = False
        self.macs_high = self.macs_low = -1
        self.known_macs: set[tuple[int, int]] = set()
        self.interface = 0
        self.capture: Capture | None = None
        self.stuck = False
        self.closed = False
        self.frames: list[bytes] = []  # what the guest has received
        self.waiters: list[DrainWaiter] = []
        self.on_flush: Callable[[], None] | None = None
        self._queue: list[tuple[Buffer, Buffer | None] | NDArray[uint8]] = []

    def forget_macs(self) -> None:
        self.macs_high = self.macs_low = -1
        self.known_macs.clear()

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        if self.prefix and self.offload is None:
            buffer[: self.prefix] = frame_length.to_bytes(self.prefix, "big")

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        if self.closed:
            return
        self._queue.append((head, payload))
        self.backlog += len(head) + (0 if payload is None else len(payload))

    def queue_burst(self, frames: NDArray[uint8]) -> None:
        if self.closed:
            return
        self._queue.append(frames)
        self.backlog += frames.size

    def flush(self) -> None:
        if self.on_flush is not None:
            self.on_flush()
        if self.stuck:
            return
        # Only now are payloads read that were queued by reference: what was done to them meanwhile shows.
        queue, self._queue = self._queue, []
        self.backlog = 0
        for entry in queue:
            if isinstance(entry, tuple):
                head, payload = entry
                self._put(bytes(head) + (b"" if payload is None else bytes(payload)))
            else:
                for row in entry:
                    self._put(row.tobytes())

    def _put(self, whole: bytes) -> None:
        frame = whole[self.prefix :]
        if self.offload is not None:
            offload_frame = OffloadFrame(frame)
            offload_frame.header = parse_virtio_net(whole, 0)
            frame = offload_frame
        elif self.prefix:
            assert int.from_bytes(whole[: self.prefix], "big") == len(frame), "the prefix lies"
        self.frames.append(frame)

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        raise NotImplementedError

    def commit(self, head: Buffer, length: int) -> None:
        raise NotImplementedError

    def wait_drained(self, waiter: DrainWaiter) -> None:
        assert waiter not in self.waiters, "waits twice"
        self.waiters.append(waiter)

    def drain(self, now: float) -> None:
        """The kernel took all that was queued."""
        self.stuck = self.congested = False
        self.flush()
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.on_drained(now)

    def close(self) -> None:
        self.closed = True
        self.backlog = 0
        self._queue.clear()
        self.waiters.clear()


class FakeEvents:
    """Remembers what it was told."""

    debug = True

    def __init__(self) -> None:
        self.opened: list[tuple[str, str, str]] = []
        self.closed: deque[tuple[str, str]] = deque(maxlen=1000)

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None:
        self.opened.append((protocol, guest, peer))

    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None:
        self.closed.append((protocol, why))

    def warning(self, key: str, message: str, **fields: object) -> None: ...
    def info(self, message: str, **fields: object) -> None: ...
