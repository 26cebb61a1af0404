"""A virtio network card of which QEMU shows the front and we are the back: features, memory and two rings.

Theory of operation
-------------------
`Device.handle` takes one message of the front-end at a time and answers it; it owns all that is negotiated. QEMU first
asks what we can do (features, protocol features), and then, each time a driver in the guest starts the card:

    SET_FEATURES, memory (SET_MEM_TABLE, or ADD_MEM_REG for each region), and for each of the two rings
    SET_VRING_NUM, _BASE, _ADDR, _KICK, _CALL; SET_VRING_ENABLE at any time

A ring runs from SET_VRING_KICK (what back-ends do, and what the specification says since 2026) to GET_VRING_BASE, which
QEMU sends when the driver lets go: at a reboot, when its module is unloaded, before QEMU ends. Then all begins again,
maybe with other features. Ring 0 is what the guest receives with, ring 1 what it sends with.

A ring whose memory is taken away (REM_MEM_REG) rests until memory is added in which it lies: QEMU replaces regions one
by one when a guest gets more memory. A descriptor that points to where there is none is a violation, as always.

Eventfds are made not to block, but that is a property of the open file, which the front-end shares: it can undo that
at any time, and have us wait in eventfd_write() or eventfd_read() for as long as it likes. As with memory that becomes
shorter (`vde.vhost_user_memory`), guests have no part in that, and whoever may connect to the socket is trusted so far.

What is not offered: LOG_ALL (QEMU then refuses to migrate the guest, rather than to lose what we write meanwhile),
more than one pair of queues (we have one thread), packed rings, the control queue, which is QEMU's own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

from netstack.core.ports import Offload
from netstack.vde import vhost_user_messages as wire
from netstack.vde.vhost_user_buffers import GuestBuffers
from netstack.vde.vhost_user_memory import MAX_REGIONS, GuestMemory, Region
from netstack.vde.vhost_user_messages import RegionTable, Request, ViolationError, VringAddress
from netstack.vde.vhost_user_ring import Ring

RECEIVE, SEND = 0, 1  # as the guest sees it

FEATURES = (
    wire.VERSION_1
    | wire.PROTOCOL_FEATURES
    | wire.MRG_RXBUF
    | wire.INDIRECT_DESC
    | wire.EVENT_IDX
    | wire.MTU
    | wire.CSUM
    | wire.HOST_TSO4
    | wire.HOST_TSO6
    | wire.HOST_USO
    | wire.GUEST_CSUM
    | wire.GUEST_TSO4
    | wire.GUEST_TSO6
    | wire.GUEST_USO4
    | wire.GUEST_USO6
)
PROTOCOL = (
    wire.PROTOCOL_MQ
    | wire.PROTOCOL_REPLY_ACK
    | wire.PROTOCOL_MTU
    | wire.PROTOCOL_RESET_DEVICE
    | wire.PROTOCOL_MEM_SLOTS
)
_QUEUE_PAIRS = 1

# These get an answer of their own; others one only if it is wanted (REPLY_ACK).
_ANSWERED = frozenset(
    (
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_VRING_BASE,
        Request.GET_MAX_MEM_SLOTS,
    )
)

_EVENTFD = "anon_inode:[eventfd]"


class Owner(Protocol):
    """Who is told what becomes of the rings."""

    def on_started(self, index: int) -> None: ...
    def on_stopping(self, index: int) -> None: ...
    def on_call(self, index: int) -> None: ...


class Queue:
    """One of the card's two rings, and what is known of it before it runs."""

    __slots__ = ("base", "call", "enabled", "kick", "ring", "size", "where")

    def __init__(self) -> None:
        self.size = 0
        self.where: VringAddress | None = None
        self.base = 0
        self.kick = self.call = -1  # eventfds, ours to close
        self.enabled = False
        self.ring: Ring | None = None  # while it runs


class Device:
    """The card."""

    def __init__(self, owner: Owner, mtu: int) -> None:
        """`mtu`: the largest that the front-end may set."""
        self.features = 0
        self.protocol = 0
        self.memory = GuestMemory()
        self.queues = (Queue(), Queue())
        self.buffers: GuestBuffers | None = None  # of ring 0, while it runs
        self.offload = Offload(checksum=False, tso4=False, tso6=False, uso=False)
        self._owner = owner
        self._mtu = mtu

    def handle(self, request: int, flags: int, payload: bytes, fds: list[int]) -> bytes:
        """Obey one message; the answer to it, b"" when it has none. Untrusted; raises ViolationError.

        The descriptors are ours to close.
        """
        try:
            answer = self._handle(request, payload, fds)
        finally:
            for fd in fds:  # those that were not taken out of the list
                os.close(fd)
        if request in _ANSWERED:
            return wire.write_reply(request, answer)
        if flags & wire.NEED_REPLY and self.protocol & wire.PROTOCOL_REPLY_ACK:
            return wire.write_reply(request, answer or wire.U64.pack(0))
        return b""

    def close(self) -> None:
        """Let go of everything."""
        for index, queue in enumerate(self.queues):
            queue.ring = None
            self._set_kick(index, -1)
            self._set_call(queue, -1)
        self.buffers = None
        self.memory.clear()

    # ---- messages --------------------------------------------------------------------------------------------------

    def _handle(self, request: int, payload: bytes, fds: list[int]) -> bytes:
        match request:
            case Request.GET_FEATURES:
                return wire.U64.pack(FEATURES)
            case Request.SET_FEATURES:
                self._set_features(wire.parse_u64(payload))
            case Request.GET_PROTOCOL_FEATURES:
                return wire.U64.pack(PROTOCOL)
            case Request.SET_PROTOCOL_FEATURES:
                self.protocol = _known(wire.parse_u64(payload), PROTOCOL)
            case Request.GET_QUEUE_NUM:
                return wire.U64.pack(_QUEUE_PAIRS)
            case Request.SET_OWNER:
                pass
            case Request.RESET_OWNER | Request.RESET_DEVICE:
                self._reset()
            case Request.SET_MEM_TABLE:
                self._set_memory(wire.parse_region_table(payload), fds)
            case Request.GET_MAX_MEM_SLOTS:
                return wire.U64.pack(MAX_REGIONS)
            case Request.ADD_MEM_REG:
                if len(fds) != 1:
                    raise ViolationError(f"a memory region with {len(fds)} descriptors")
                self.memory.add(Region(wire.parse_region(payload), fds[0]))
                self._remap(strict=False)
            case Request.REM_MEM_REG:
                self.memory.remove(wire.parse_region(payload))
                self._remap(strict=False)
            case Request.NET_SET_MTU:
                # REPLY_ACK: not 0 says that the MTU will not do.
                return wire.U64.pack(0 if 68 <= wire.parse_u64(payload) <= self._mtu else 1)
            case _:
                return self._handle_vring(request, payload, fds)
        return b""

    def _handle_vring(self, request: int, payload: bytes, fds: list[int]) -> bytes:
        match request:
            case Request.SET_VRING_NUM:
                index, size = wire.parse_vring_state(payload)
                queue = self._queue(index)
                if queue.ring is not None:
                    raise ViolationError(f"SET_VRING_NUM while ring {index} runs")
                queue.size = size
            case Request.SET_VRING_BASE:
                index, base = wire.parse_vring_state(payload)
                queue = self._queue(index)
                if queue.ring is not None:
                    raise ViolationError(f"SET_VRING_BASE while ring {index} runs")
                queue.base = base & 0xFFFF
            case Request.SET_VRING_ADDR:
                where = wire.parse_vring_addr(payload)
                queue = self._queue(where.ring)
                runs = queue.ring is not None
                if runs:
                    self._stop(where.ring)  # what was done so far becomes visible in the old place
                queue.where = where
                if runs:
                    self._run(where.ring)
            case Request.SET_VRING_KICK:
                index, with_fd = wire.parse_vring_file(payload)
                queue = self._queue(index)
                if not with_fd:
                    raise ViolationError("a ring without a descriptor to kick: it would have to be polled")
                if queue.ring is not None:
                    self._stop(index)
                self._set_kick(index, _take_eventfd(fds))
                if queue.where is None:
                    raise ViolationError(f"SET_VRING_KICK before ring {index} has an address")
                self._run(index)
            case Request.SET_VRING_CALL:
                index, with_fd = wire.parse_vring_file(payload)
                queue = self._queue(index)
                self._set_call(queue, _take_eventfd(fds) if with_fd else -1)
                if queue.ring is not None:
                    self._owner.on_call(index)  # what was said on the last one may not have been heard
            case Request.SET_VRING_ERR:
                self._queue(wire.parse_vring_file(payload)[0])  # we close the connection, which says more
            case Request.SET_VRING_ENABLE:
                index, enabled = wire.parse_vring_state(payload)
                queue = self._queue(index)
                queue.enabled = bool(enabled)
                if queue.ring is not None:
                    self._owner.on_started(index)
            case Request.GET_VRING_BASE:
                index, _ = wire.parse_vring_state(payload)
                queue = self._queue(index)
                if queue.ring is not None:
                    self._stop(index)
                self._set_kick(index, -1)
                queue.where = None
                return wire.VRING_STATE.pack(index, queue.base)
            case _:
                raise ViolationError(f"message {request} is none that was agreed upon")
        return b""

    # ---- features and memory ---------------------------------------------------------------------------------------

    def _set_features(self, features: int) -> None:
        if any(queue.ring is not None for queue in self.queues) and features != self.features:
            raise ViolationError("SET_FEATURES while a ring runs")
        self.features = _known(features, FEATURES)
        if not features & wire.PROTOCOL_FEATURES:
            for queue in self.queues:  # nobody will say SET_VRING_ENABLE
                queue.enabled = True
        checksum = bool(features & wire.GUEST_CSUM)
        uso = wire.GUEST_USO4 | wire.GUEST_USO6
        # virtio 1.2 section 5.1.3.1: all of them need GUEST_CSUM.
        self.offload = Offload(
            checksum=checksum,
            tso4=checksum and bool(features & wire.GUEST_TSO4),
            tso6=checksum and bool(features & wire.GUEST_TSO6),
            uso=checksum and features & uso == uso,
        )

    def _reset(self) -> None:
        """All rings stop, and nothing is agreed upon any more; the memory stays."""
        for index, queue in enumerate(self.queues):
            if queue.ring is not None:
                self._stop(index)
            self._set_kick(index, -1)
            queue.where = None
            queue.base = 0
            queue.enabled = False
        self._set_features(wire.PROTOCOL_FEATURES)

    def _set_memory(self, tables: list[RegionTable], fds: list[int]) -> None:
        if len(tables) != len(fds):
            raise ViolationError(f"a memory table of {len(tables)} regions with {len(fds)} descriptors")
        self.memory.replace([Region(table, fd) for table, fd in zip(tables, fds, strict=True)])
        self._remap(strict=True)

    # ---- rings -----------------------------------------------------------------------------------------------------

    def _queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise ViolationError(f"ring {index}: there are {len(self.queues)}")
        return self.queues[index]

    def _base(self, index: int) -> int:
        if index == RECEIVE:
            assert self.buffers is not None
            return self.buffers.base
        ring = self.queues[index].ring
        assert ring is not None
        return ring.taken

    def _run(self, index: int) -> None:
        """Begin with a ring, or go on with it in other memory."""
        queue = self.queues[index]
        assert queue.where is not None
        queue.ring = ring = Ring(
            self.memory,
            queue.size,
            queue.where,
            queue.base,
            writable=index == RECEIVE,
            event_idx=bool(self.features & wire.EVENT_IDX),
            indirect=bool(self.features & wire.INDIRECT_DESC),
        )
        if index == RECEIVE:
            mergeable = bool(self.features & wire.MRG_RXBUF)
            short = not self.features & (wire.MRG_RXBUF | wire.VERSION_1)
            self.buffers = GuestBuffers(ring, mergeable=mergeable, short=short)
        self._owner.on_started(index)

    def _stop(self, index: int) -> None:
        self._owner.on_stopping(index)
        queue = self.queues[index]
        queue.base = self._base(index)
        queue.ring = None
        if index == RECEIVE:
            self.buffers = None

    def _remap(self, *, strict: bool) -> None:
        """The memory has changed: look for the rings in it. Unless `strict`, one that is in none of it rests."""
        for index, queue in enumerate(self.queues):
            if queue.kick < 0 or queue.where is None:
                continue
            if queue.ring is not None:
                self._stop(index)
            try:
                self._run(index)
            except ViolationError:
                if strict:
                    raise

    def _set_kick(self, index: int, fd: int) -> None:
        queue = self.queues[index]
        if queue.kick >= 0:
            os.close(queue.kick)
        queue.kick = fd

    def _set_call(self, queue: Queue, fd: int) -> None:
        if queue.call >= 0:
            os.close(queue.call)
        queue.call = fd


def _known(features: int, offered: int) -> int:
    if features & ~offered:
        raise ViolationError(f"features {features & ~offered:#x} were not offered")
    return features


def _take_eventfd(fds: list[int]) -> int:
    """Take the one descriptor, which must be what it is to be: writing to anything else might block."""
    if len(fds) != 1:
        raise ViolationError(f"{len(fds)} descriptors in place of an eventfd")
    with contextlib.suppress(OSError):  # no /proc: then it is only made not to block
        if str(Path(f"/proc/self/fd/{fds[0]}").readlink()) != _EVENTFD:
            raise ViolationError("a descriptor that is no eventfd")
    os.set_blocking(fds[0], False)
    return fds.pop()
