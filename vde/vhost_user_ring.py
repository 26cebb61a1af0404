"""One split virtqueue in a guest's memory, from the device's side (virtio 1.2 section 2.7).

Theory of operation
-------------------
The driver writes buffers into the descriptor table and the number of their first descriptor into the available ring,
and moves `avail.idx`. We take them in that order, and give them back in the used ring, and move `used.idx`. All three
parts are memory that the guest changes whenever it likes, so each thing is read once, into Python's own objects, and
checked there: an index is below the ring's size, a chain is no longer than the ring and has no empty descriptors, an
address is in the guest's memory. What does not hold raises ViolationError, which ends the link.

    available:  u16 flags | u16 idx | u16 ring[size] | u16 used_event
    used:       u16 flags | u16 idx | (u32 id, u32 length)[size] | u16 avail_event
    descriptor: u64 address | u32 length | u16 flags | u16 next

Waking each other costs more than all of this, so each side says when it wants to be woken: with EVENT_IDX the driver
wants to hear of the used entry `used_event`, and we of the available one `avail_event`; without, by a flag of each.

Memory order. Neither NumPy nor memoryview has atomics, but one access of theirs to an item of 2 or 4 bytes is one load
or one store, and it is the order among them that matters:

 1. avail.idx is read before the entries that it covers, and these before the buffers;
 2. used entries are written before used.idx;
 3. used.idx is written before used_event (or the flag) is read, or both sides could miss each other's news: the driver
    asks to be woken just after we looked. Likewise avail_event is written before avail.idx is read once more.

x86 keeps loads in order with loads and stores with stores, so 1 and 2 need nothing there; a load may overtake an
earlier store to another place, so 3 needs a full fence. ARM promises none of them. No system call that we make anyway
is documented to be a fence everywhere (writing to an eventfd is not, nor is every exit from the kernel), and
membarrier(2) is out of Python's reach, and does nothing for a process of one thread. What Python has is a lock.
Releasing one that is held and taking it again is, on CPython for Linux, sem_post() and sem_trywait(): an atomic
read-modify-write with release semantics, then one with acquire semantics, of the same word. On x86 either is a locked
instruction, and that is a full fence. On ARMv8 what stands before a store-release is seen before it, a store-release is
seen before a later load-acquire, and a load-acquire comes before all that stands behind it (Arm ARM B2.3,
barrier-ordered-before): the pair is a full fence as well. Newer versions of CPython have locks of their own, which take
the same two steps. The compiler cannot move accesses over the calls. It costs 0.1 us, a fifth of a system call;
`_order` stands where only processors like ARM need it.
"""

from __future__ import annotations

import platform
import threading
from array import array
from struct import Struct

import numpy as np

from netstack.vde.vhost_user_memory import GuestMemory
from netstack.vde.vhost_user_messages import ViolationError, VringAddress

_DESCRIPTOR = Struct("<QIHH")
_DESCRIPTORS = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])
_NEXT = 1
_WRITE = 2
_INDIRECT = 4

_NO_INTERRUPT = 1  # of avail.flags
_NO_NOTIFY = 1  # of used.flags

# virtio 1.2 section 2.7: at most 32,768, and a power of 2.
MAX_SIZE = 32768
# Linux puts up to 19 pieces into an indirect table, whatever the ring's size; QEMU takes 1,024 (VIRTQUEUE_MAX_SIZE),
# and none of no bytes. Without these rules a frame of 60 bytes could cost as much as tens of thousands of descriptors.
_CHAIN_LIMIT = 1024
_EMPTY = "a descriptor of no bytes"

# Processors that keep loads in order with loads and stores with stores.
_STRONG = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

M16 = 0xFFFF


class Ring:
    """A running virtqueue."""

    __slots__ = (
        "_acquire",
        "_array",
        "_avail_event",
        "_available",
        "_descriptors",
        "_entries",
        "_event_idx",
        "_indirect",
        "_mask",
        "_memory",
        "_order",
        "_published",
        "_release",
        "_signalled",
        "_used16",
        "_used32",
        "_writable",
        "size",
        "taken",
        "used",
    )

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        where: VringAddress,
        base: int,
        *,
        writable: bool,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        """`writable`: the guest's buffers are for us to write. Untrusted; raises ViolationError."""
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise ViolationError(f"a ring of {size} entries: must be a power of 2, up to {MAX_SIZE}")
        # virtio 1.2 section 2.7. It also makes each access below one access of the processor.
        if where.descriptors & 15 or where.available & 1 or where.used & 3:
            raise ViolationError("a ring that is not aligned")
        tail = 2 if event_idx else 0
        self.size = size
        self.taken = base & M16  # how many entries of the available ring were taken, modulo 2**16
        self._mask = size - 1
        self._memory = memory
        self._writable = _WRITE if writable else 0
        self._event_idx = event_idx
        self._indirect = indirect
        self._descriptors = memory.at_user(where.descriptors, 16 * size)
        self._array = np.frombuffer(self._descriptors, dtype=_DESCRIPTORS)
        available = memory.at_user(where.available, 4 + 2 * size + tail)
        self._available = available.cast("H")
        self._entries = np.frombuffer(available, dtype="<u2", count=size, offset=4)
        used = memory.at_user(where.used, 4 + 8 * size + tail)
        self._used16 = used.cast("H")
        self._used32 = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = 2 + 4 * size
        # A back-end that was here before us, and died, has left it where the guest believes it to be.
        self.used = self._published = self._used16[1]
        self._signalled = False
        lock = threading.Lock()
        lock.acquire()
        self._release = lock.release
        self._acquire = lock.acquire
        self._order = _nothing if _STRONG else self._fence

    def _fence(self) -> None:
        """A full memory barrier; see above."""
        self._release()
        self._acquire(False)

    # ---- from the driver -------------------------------------------------------------------------------------------

    def waiting(self) -> int:
        """How many chains can be taken. Untrusted; raises ViolationError."""
        count = (self._available[1] - self.taken) & M16
        if count:
            if count > self.size:
                raise ViolationError(f"{count} buffers available in a ring of {self.size}")
            self._order()
        return count

    def take(self) -> tuple[int, list[memoryview]]:
        """The next chain: what push() needs to give it back, and its memory in pieces. Only when waiting() says so.

        Untrusted; raises ViolationError.
        """
        head = self._available[2 + (self.taken & self._mask)]
        if head >= self.size:
            raise ViolationError(f"descriptor {head} in a ring of {self.size}")
        self.taken = (self.taken + 1) & M16
        address, length, flags, following = _DESCRIPTOR.unpack_from(self._descriptors, head << 4)
        if flags & (_NEXT | _INDIRECT):
            return head, self._take_chain(address, length, flags, following)
        if flags & _WRITE != self._writable:
            raise ViolationError("a buffer of the wrong direction")
        if not length:
            raise ViolationError(_EMPTY)
        region = self._memory.region_of(address)
        start = address - region.guest
        end = start + length
        if end <= region.size:
            return head, [region.view[start:end]]
        return head, self._memory.pieces(address, length)

    def take_many(self, count: int) -> list[tuple[int, memoryview, int]] | None:
        """The next `count` chains at once, where each is one piece of memory, by array arithmetic.

        Of each: chain, piece, length. None: they are not that simple, or not right, and take() will tell. Untrusted.
        """
        at = self.taken & self._mask
        heads = self._entries[at : at + count].copy()
        if len(heads) < count:
            heads = np.concatenate((heads, self._entries[: count - len(heads)]))
        if int(heads.max()) >= self.size:
            return None
        found = self._array[heads]  # a copy: what is checked is what is used
        if (found["flags"] & (_NEXT | _INDIRECT | _WRITE) != self._writable).any():
            return None
        addresses = found["address"]
        lengths = found["length"]
        if not lengths.all():
            return None
        region = self._memory.region_of(int(addresses[0]))
        first, last = int(addresses.min()), int(addresses.max())
        # Stricter than need be, so that nothing can overflow: no piece may begin where the longest would not fit.
        if first < region.guest or last + int(lengths.max()) > region.end:
            return None
        starts = addresses - np.uint64(region.guest)
        ends = (starts + lengths).tolist()
        view = region.view
        self.taken = (self.taken + count) & M16
        return [
            (head, view[start:end], end - start)
            for head, start, end in zip(heads.tolist(), starts.tolist(), ends, strict=True)
        ]

    def _take_chain(self, address: int, length: int, flags: int, following: int) -> list[memoryview]:
        """A chain of several descriptors, in the ring or in a table of their own."""
        table: bytes | memoryview = self._descriptors
        size = self.size
        left = most = min(size, _CHAIN_LIMIT)
        if flags & _INDIRECT:
            # 2.7.5.3.1: no NEXT with it, a whole number of descriptors; whether it has WRITE does not matter.
            if not self._indirect or flags & _NEXT or not length or length & 15 or length >> 4 > _CHAIN_LIMIT:
                raise ViolationError(f"an indirect table of {length} bytes with flags {flags:#x}")
            table = b"".join(self._memory.pieces(address, length))
            size = left = most = length >> 4
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 0)
        found: list[memoryview] = []
        unpack = _DESCRIPTOR.unpack_from
        while True:
            if flags & _INDIRECT:
                raise ViolationError("an indirect table within a chain")
            if flags & _WRITE != self._writable:
                raise ViolationError("a buffer of the wrong direction")
            if not length:
                raise ViolationError(_EMPTY)
            found += self._memory.pieces(address, length)
            if not flags & _NEXT:
                return found
            left -= 1
            if not left:
                raise ViolationError(f"a chain of more than {most} descriptors")
            if following >= size:
                raise ViolationError(f"descriptor {following} in a table of {size}")
            address, length, flags, following = unpack(table, following << 4)

    # ---- to the driver ---------------------------------------------------------------------------------------------

    def push(self, head: int, length: int) -> None:
        """Give a chain back, `length` bytes of it written. The driver sees it after publish()."""
        used = self.used
        at = (used & self._mask) << 1
        entries = self._used32
        entries[at] = head
        entries[at + 1] = length
        self.used = (used + 1) & M16

    def push_many(self, entries: list[int]) -> None:
        """push(), for several: chain, length, chain, length..."""
        count = len(entries) >> 1
        at = (self.used & self._mask) << 1
        room = (self.size << 1) - at
        values = memoryview(array("I", entries))
        self._used32[at : at + 2 * count] = values[:room]
        if count << 1 > room:
            self._used32[: (count << 1) - room] = values[room:]
        self.used = (self.used + count) & M16

    def publish(self) -> bool:
        """Let the driver see what was pushed; whether it wants to be woken. Untrusted."""
        used = self.used
        before = self._published
        if used == before:
            return False
        self._order()
        self._used16[1] = used
        self._published = used
        self._release()  # a fence, in line: see _fence()
        self._acquire(False)
        if not self._event_idx:
            return not self._available[0] & _NO_INTERRUPT
        event: int = self._available[2 + self.size]
        # The driver's last word may be about a back-end that was here before us.
        first, self._signalled = not self._signalled, True
        return first or (used - event - 1) & M16 < (used - before) & M16

    def want_kick(self) -> bool:
        """Ask to be woken by the next buffer; whether there is one already. Untrusted; raises ViolationError."""
        if self._event_idx:
            self._used16[self._avail_event] = self.taken
        else:
            self._used16[0] = 0
        self._fence()
        return self.waiting() > 0

    def spare_kicks(self) -> None:
        """Not to be woken for a while. With EVENT_IDX an avail_event that was passed says so already."""
        if not self._event_idx:
            self._used16[0] = _NO_NOTIFY


def _nothing() -> None:
    """The order that x86 keeps by itself."""
