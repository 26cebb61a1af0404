"""A vhost-user front-end and a virtio driver for tests: QEMU and the guest's kernel, as far as a back-end sees them.

The guest's memory is a memfd, which the tests and the back-end both map. Guest-physical addresses begin at GUEST and
the front-end's own at USER, so that taking one for the other is noticed. Whatever a test wants to say wrongly it can
write: each ring's parts are plain memory here.

It is written from the specifications (virtio 1.2 section 2.7, QEMU docs/interop/vhost-user.rst) and shares no code with
the back-end but the names of the requests.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from netstack.vde.vhost_user_messages import Request

if TYPE_CHECKING:
    from netstack.core.ports import Handler, Link

GUEST = 0x10_0000
USER = 0x7F00_0000_0000
MEMORY = 4 << 20

NEXT, WRITE, INDIRECT = 1, 2, 4

NEED_REPLY = 8


class Poller:
    """Readiness of real descriptors, handed out when the test says so."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.handlers: dict[int, Handler] = {}

    def register(self, fd: int, handler: Handler, events: int) -> None:
        self._epoll.register(fd, events)
        self.handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        del self.handlers[fd]
        self._epoll.unregister(fd)

    def step(self, now: float = 1.0) -> int:
        """One round; how many handlers were called."""
        ready = self._epoll.poll(0)
        for fd, events in ready:
            handler = self.handlers.get(fd)
            if handler is not None:
                handler.on_ready(events, now)
        return len(ready)

    def run(self, flush: Callable[[], None], rounds: int = 200) -> None:
        """Until nothing is ready any more."""
        for _ in range(rounds):
            if not self.step():
                flush()
                if not self.step():
                    return
            flush()
        raise AssertionError(f"still busy after {rounds} rounds")

    def close(self) -> None:
        self._epoll.close()


class Receiver:
    """Stands for the stack: keeps the frames, and the views of scattered ones until the batch ends."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.headers: list[bytes] = []
        self.scattered = 0
        self.views: list[list[memoryview]] = []
        self.on_frame: Callable[[], None] | None = None

    def receive_frames(
        self,
        link: Link,
        buffer: memoryview,
        spans: Sequence[int],
        now: float,
        runs: Sequence[tuple[int, int, int]] = (),
        /,
    ) -> None:
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            self._keep(bytes(buffer[start - 12 : start]), bytes(buffer[start:end]))
        self.end_batch(now)

    def receive_scattered(self, link: Link, header: bytes, pieces: list[memoryview], now: float) -> None:
        self.scattered += 1
        self.views.append(pieces)
        self._keep(header, b"".join(pieces))

    def end_batch(self, now: float) -> None:
        self.views.clear()

    def _keep(self, header: bytes, frame: bytes) -> None:
        self.headers.append(header)
        self.frames.append(frame)
        if self.on_frame is not None:
            self.on_frame()


class GuestRing:
    """The driver's half of a split virtqueue, in the guest's memory."""

    def __init__(self, front: FrontEnd, index: int, size: int, at: int) -> None:
        self.front = front
        self.index = index
        self.size = size
        self.descriptors = at
        self.available = at + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.free = list(range(size))
        self.next = 0  # our avail.idx
        self.seen = 0  # what we have taken out of the used ring

    def _u16(self, at: int) -> int:
        value: int = struct.unpack_from("<H", self.front.memory, at)[0]
        return value

    def put16(self, at: int, value: int) -> None:
        struct.pack_into("<H", self.front.memory, at, value & 0xFFFF)

    @property
    def used_index(self) -> int:
        return self._u16(self.used + 2)

    @property
    def wants_kick(self) -> int:
        """used.flags: not 0 when the back-end does not want to be kicked."""
        return self._u16(self.used)

    @property
    def avail_event(self) -> int:
        return self._u16(self.used + 4 + 8 * self.size)

    def set_used_event(self, value: int) -> None:
        self.put16(self.available + 4 + 2 * self.size, value)

    def set_flags(self, value: int) -> None:
        self.put16(self.available, value)

    def describe(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        struct.pack_into(
            "<QIHH", self.front.memory, self.descriptors + 16 * index, address, length, flags, following & 0xFFFF
        )

    def offer(self, head: int) -> None:
        """Make a chain available, without a kick."""
        self.put16(self.available + 4 + 2 * (self.next % self.size), head)
        self.next += 1
        self.put16(self.available + 2, self.next)

    def add(self, pieces: Sequence[tuple[int, int]], flags: int = 0, *, indirect: int = 0) -> int:
        """Make a chain of (offset in memory, length) pieces available; `indirect`: where to put a table for it."""
        if indirect:
            for i, (at, length) in enumerate(pieces):
                more = NEXT if i + 1 < len(pieces) else 0
                struct.pack_into(
                    "<QIHH", self.front.memory, indirect + 16 * i, GUEST + at, length, flags | more, (i + 1) & 0xFFFF
                )
            head = self.free.pop(0)
            self.describe(head, GUEST + indirect, 16 * len(pieces), INDIRECT)
        else:
            taken = [self.free.pop(0) for _ in pieces]
            for i, (at, length) in enumerate(pieces):
                more = NEXT if i + 1 < len(pieces) else 0
                self.describe(taken[i], GUEST + at, length, flags | more, taken[i + 1] if more else 0)
            head = taken[0]
        self.offer(head)
        return head

    def take_used(self) -> list[tuple[int, int]]:
        """The chains that came back since the last time: (head, bytes written)."""
        found = []
        while self.seen & 0xFFFF != self.used_index:
            at = self.used + 4 + 8 * (self.seen % self.size)
            head, length = struct.unpack_from("<II", self.front.memory, at)
            found.append((head, length))
            self.seen += 1
        return found

    def notify(self) -> None:
        os.eventfd_write(self.kick, 1)

    def interrupts(self) -> int:
        """How often the back-end has called since the last time."""
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)


class FrontEnd:
    """One virtual machine: its memory, its two rings, and the socket to the back-end."""

    def __init__(self, sock: socket.socket, *, size: int = 16, memory: int = MEMORY, sealed: bool = True) -> None:
        self.sock = sock
        sock.settimeout(5)
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, memory)
        if sealed:
            fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.memory = mmap.mmap(self.memfd, memory)
        self.size = memory
        self.rx = GuestRing(self, 0, size, 0x1000)
        self.tx = GuestRing(self, 1, size, (self.rx.end + 0xFFF) & ~0xFFF)
        self.data = (self.tx.end + 0xFFF) & ~0xFFF  # from here on memory is free

    # ---- messages

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        message = struct.pack("=III", request, 1 | flags, len(payload)) + payload
        socket.send_fds(self.sock, [message], list(fds))

    def send_u64(self, request: int, value: int, fds: Sequence[int] = (), flags: int = 0) -> None:
        self.send(request, struct.pack("=Q", value), fds, flags)

    def send_state(self, request: int, index: int, value: int) -> None:
        self.send(request, struct.pack("=II", index, value))

    def reply(self, request: int) -> bytes:
        """The payload of the answer to this request."""
        answered, flags, size = struct.unpack("=III", self._read(12))
        assert (answered, flags) == (request, 5), (answered, flags)
        return self._read(size)

    def reply_u64(self, request: int) -> int:
        value: int = struct.unpack("=Q", self.reply(request))[0]
        return value

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, "the back-end closed the connection"
            data += piece
        return data

    @property
    def is_closed(self) -> bool:
        """Whether the back-end has closed the connection."""
        try:
            return self.sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    # ---- as QEMU does it

    def set_memory(self) -> None:
        table = struct.pack("=II", 1, 0) + struct.pack("=QQQQ", GUEST, self.size, USER, 0)
        self.send(Request.SET_MEM_TABLE, table, [self.memfd])

    def region(self, *, guest: int = GUEST, size: int = 0, user: int = USER, offset: int = 0) -> bytes:
        return struct.pack("=QQQQQ", 0, guest, size or self.size, user, offset)

    def set_ring(self, ring: GuestRing, base: int = 0) -> None:
        """Size, base, addresses and descriptors of a ring: it runs after that, if it is enabled."""
        self.send_state(Request.SET_VRING_NUM, ring.index, ring.size)
        self.send_state(Request.SET_VRING_BASE, ring.index, base)
        self.set_address(ring)
        self.send_u64(Request.SET_VRING_CALL, ring.index, [ring.call])
        self.send_u64(Request.SET_VRING_KICK, ring.index, [ring.kick])

    def set_address(self, ring: GuestRing) -> None:
        self.send(
            Request.SET_VRING_ADDR,
            struct.pack("=IIQQQQ", ring.index, 0, USER + ring.descriptors, USER + ring.used, USER + ring.available, 0),
        )

    def enable(self, enabled: int = 1) -> None:
        for index in (0, 1):
            self.send_state(Request.SET_VRING_ENABLE, index, enabled)

    def start(self, features: int, *, base: int = 0) -> None:
        """Everything from the first message to running rings."""
        self.send(Request.SET_OWNER)
        self.send_u64(Request.SET_FEATURES, features)
        self.set_memory()
        for ring in (self.rx, self.tx):
            self.set_ring(ring, base)
        self.enable()

    # ---- the driver

    def post(self, count: int, length: int = 1526) -> None:
        """Give the card buffers to receive into, side by side in memory."""
        for _ in range(count):
            self.rx.add([(self.data, length)], WRITE)
            self.data += length

    def transmit(self, *pieces: bytes, indirect: bool = False) -> int:
        """Have the card send a frame that lies in these pieces, its header included."""
        places = []
        for piece in pieces:
            self.memory[self.data : self.data + len(piece)] = piece
            places.append((self.data, len(piece)))
            self.data += len(piece)
        table = 0
        if indirect:
            table = (self.data + 15) & ~15
            self.data = table + 16 * len(pieces)
        return self.tx.add(places, indirect=table)

    def received(self) -> list[bytes]:
        """What is in the receive buffers that came back, in their order."""
        found = []
        for head, length in self.rx.take_used():
            address, room, _, _ = struct.unpack_from("<QIHH", self.memory, self.rx.descriptors + 16 * head)
            assert length <= room
            found.append(self.memory[address - GUEST : address - GUEST + length])
            self.rx.free.append(head)
        return found

    def frames(self) -> list[tuple[bytes, bytes]]:
        """The frames in what came back, put together by num_buffers: (virtio-net header, frame)."""
        buffers = self.received()
        found = []
        while buffers:
            (count,) = struct.unpack_from("<H", buffers[0], 10)
            assert 1 <= count <= len(buffers), count
            whole = b"".join(buffers[:count])
            del buffers[:count]
            found.append((whole[:12], whole[12:]))
        return found

    def close(self) -> None:
        self.sock.close()
        os.close(self.memfd)
        self.memory.close()
        self.rx.close()
        self.tx.close()
