"""The buffers into which a guest receives: a ring's chains, taken early, and frames written into them.

Theory of operation
-------------------
The driver fills its ring with empty buffers, of 1,500 bytes as a rule. With MRG_RXBUF a frame fills as many as it
needs, and the first one's header says how many (num_buffers); without, it must fit into one. Buffers are taken from the
ring in bulk, in order, and wait in `_free`; what is not used when the ring stops was never taken, as far as the
driver is told (`base`).

A frame comes in one of two ways:

    write(head, payload)          it is copied
    reserve(...), commit(...)     its payload is received by the kernel where it is to be; its headers go in front

Neither makes anything visible to the guest; that is the ring's publish().
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from netstack.core.ports import Buffer
from netstack.vde.vhost_user_messages import ViolationError
from netstack.vde.vhost_user_ring import M16, Ring

if TYPE_CHECKING:
    from collections.abc import Sequence

# The virtio-net header in the frames we are given, and where num_buffers is in it.
PREFIX = 12
_NUM_BUFFERS = 10

# Drivers that know neither VERSION_1 nor MRG_RXBUF have a header without num_buffers (virtio 1.2 section 5.1.6.1).
_SHORT = 10

# So many are taken at once, if there are; more where a large frame waits. From _BULK on by array arithmetic, which
# costs 15 us and 0.3 us a buffer, in place of 1 us.
_PLENTY = 64
_BULK = 24

# What the kernel takes in one call (UIO_MAXIOV); of more it says EMSGSIZE, which looks like the connection's fault.
_MOST_PIECES = 1024


class GuestBuffers:
    """The receiving side of a guest's card."""

    __slots__ = ("_free", "_mergeable", "_reserved", "_short", "misfits", "ring", "waits")

    def __init__(self, ring: Ring, *, mergeable: bool, short: bool) -> None:
        """`short`: the guest's headers have 10 bytes."""
        self.ring = ring
        self.waits = False  # we asked to be woken when there are more buffers
        self.misfits = 0  # frames that were dropped because they fit into no buffers of this guest
        self._mergeable = mergeable
        self._short = short
        # Of each: its chain, its first piece, how many bytes all have together, and its other pieces.
        self._free: deque[tuple[int, memoryview, int, tuple[memoryview, ...]]] = deque()
        self._reserved = (0, 0)  # how many buffers, and how many bytes they have
        ring.spare_kicks()

    @property
    def base(self) -> int:
        """The next entry of the available ring, for whoever goes on with it after us."""
        return (self.ring.taken - len(self._free)) & M16

    # ---- frames ----------------------------------------------------------------------------------------------------

    def write(self, head: Buffer, payload: Buffer | None) -> bool:
        """Copy one frame, `head` with its prefix. False: no room now. Untrusted; raises ViolationError.

        One that there will never be room for is dropped (`misfits`), or it would hold up all others.
        """
        size = len(head) if payload is None else len(head) + len(payload)
        free = self._free
        if not free and not self._take(size):
            return False
        chain, piece, room, rest = free[0]
        if room >= size and not rest and not self._short:
            # The usual case, in as few steps as it takes.
            end = len(head)
            piece[:end] = head
            piece[_NUM_BUFFERS] = 1
            if payload is not None:
                piece[end:size] = payload
            free.popleft()
            self.ring.push(chain, size)
            return True
        if self._short:
            size -= PREFIX - _SHORT
        count = self._covering(size)
        if not count:
            return False
        if count < 0:
            self.misfits += 1
            return True
        head = self._complete(head, count)
        _scatter(self._pieces(count), (head,) if payload is None else (head, payload))
        self._use(count, size)
        return True

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        """Where up to `limit` bytes can be received, `header` bytes behind the beginning of the next free buffer.

        Empty: no room now. Untrusted; raises ViolationError.
        """
        if self._short:
            header -= PREFIX - _SHORT
        wanted = header + limit
        free = self._free
        while True:
            found: list[memoryview] = []
            have = count = 0
            for _, piece, room, rest in free:
                found.append(piece)
                if rest:
                    found += rest
                have += room
                count += 1
                if have >= wanted or not self._mergeable:
                    break
            if have >= wanted or (count and not self._mergeable) or not self._take(wanted - have):
                break
        if have <= header and (count >= self.ring.size or (count and not self._mergeable)):
            # Whoever waits for room would wait for ever: what is there now stays where it is until it is used.
            raise ViolationError(f"receive buffers of {have} bytes, too small for any frame")
        self._reserved = (count, have)
        return _cut(found, header, limit)[:_MOST_PIECES]

    def commit(self, head: Buffer, length: int) -> None:
        """`head` belongs before the first `length` bytes that were reserved; 0: nothing came. Never fails."""
        if not length:
            return
        size = len(head) + length
        if self._short:
            size -= PREFIX - _SHORT
        count, have = self._reserved
        free = self._free
        while have - free[count - 1][2] >= size:  # the last of them are not needed
            count -= 1
            have -= free[count][2]
        head = self._complete(head, count)
        first = free[0][1]
        if len(head) <= len(first):
            first[: len(head)] = head
        else:
            _scatter(self._pieces(count), (head,))
        self._use(count, size)

    # ---- buffers ---------------------------------------------------------------------------------------------------

    def refill(self) -> None:
        """We were woken: see what there is. Untrusted; raises ViolationError."""
        if self.waits:
            self._take(0)

    def _take(self, wanted: int) -> bool:
        """Take what the driver has made available; False when it has not, and it will wake us."""
        ring = self.ring
        count = ring.waiting()
        if not count:
            if self.waits:
                return False
            self.waits = True
            if not ring.want_kick():
                return False
            count = ring.waiting()
        if self.waits:
            self.waits = False
            ring.spare_kicks()
        free = self._free
        # A driver that gives a buffer twice would have us keep more and more of them.
        if len(free) + count > ring.size:
            raise ViolationError(f"more buffers than the ring of {ring.size} has entries")
        count = min(count, _PLENTY + (wanted >> 10))
        if count >= _BULK:
            simple = ring.take_many(count)
            if simple is not None:
                free.extend([(chain, piece, room, ()) for chain, piece, room in simple])
                return True
        take = ring.take
        for _ in range(count):
            chain, pieces = take()
            if len(pieces) == 1:
                free.append((chain, pieces[0], len(pieces[0]), ()))
            else:
                free.append((chain, pieces[0], sum(map(len, pieces)), tuple(pieces[1:])))
        return True

    def _covering(self, size: int) -> int:
        """How many buffers a frame fills; 0: there are too few now; -1: it fits into none, ever."""
        free = self._free
        if not self._mergeable:
            return 1 if free[0][2] >= size else -1
        have = count = 0
        while have < size:
            if count == len(free):
                if count >= self.ring.size:
                    return -1  # all that the guest has is too little
                if not self._take(size - have):
                    return 0
            have += free[count][2]
            count += 1
        return count

    def _pieces(self, count: int) -> list[memoryview]:
        found = []
        for _, piece, _, rest in islice(self._free, count):
            found.append(piece)
            found += rest
        return found

    def _complete(self, head: Buffer, count: int) -> bytes:
        """The head as the guest is to have it, with num_buffers."""
        number = b"" if self._short else count.to_bytes(2, "little")
        return b"".join((head[:_NUM_BUFFERS], number, head[PREFIX:]))

    def _use(self, count: int, size: int) -> None:
        """Give the first `count` buffers back, with a frame of `size` bytes in them."""
        take = self._free.popleft
        entries = []
        for _ in range(count):
            chain, _, room, _ = take()
            entries.append(chain)
            entries.append(room)
            size -= room
        entries[-1] += size  # the last one need not be full
        self.ring.push_many(entries)


def _cut(pieces: list[memoryview], skip: int, limit: int) -> list[memoryview]:
    """At most `limit` bytes of the pieces, without the first `skip` bytes; the list is changed."""
    while pieces and len(pieces[0]) <= skip:
        skip -= len(pieces.pop(0))
    if not pieces:
        return pieces
    pieces[0] = pieces[0][skip:]
    over = sum(map(len, pieces)) - limit
    while over > 0:
        last = pieces[-1]
        if len(last) > over:
            pieces[-1] = last[:-over]
            break
        over -= len(last)
        pieces.pop()
    return pieces


def _scatter(pieces: list[memoryview], data: Sequence[Buffer]) -> None:
    """Copy `data` over the pieces, which have room for it."""
    at = used = 0
    for source in data:
        view = memoryview(source)
        done = 0
        left = len(view)
        while left:
            piece = pieces[at]
            room = len(piece) - used
            if room > left:
                piece[used : used + left] = view[done:]
                used += left
                break
            piece[used:] = view[done : done + room]
            done += room
            left -= room
            at += 1
            used = 0
