"""Runs of frames that differ in little, taken as one by array arithmetic (design law 4, toward the host).

Theory of operation
-------------------
A guest that sends in bulk at MTU 1500 gives, in one read of a stream link, some 90 frames of one size one behind the
other, and most of them are the next segment of the same flow. Frame by frame each costs 1.5 us; here all their headers
are compared at once, and their payloads copied together at once: 12 us for 90.

The link says where such frames may be: a `Run` is (first, count, stride): frames first to first + count - 1 of the
batch have one size, and begin `stride` bytes apart. What they hold is found out here:

    data    TCP segments with payload: all alike but for SEG.SEQ, which goes up by the payload, PSH and SEG.WND
    acks    TCP segments without: all alike but for SEG.ACK, which goes up, and SEG.WND; the last one says it all
    UDP     datagrams from one endpoint to another, of one size

Neighbouring rows are compared, so one pass finds where a stretch ends and another begins. A stretch that is too short,
or is not what the flow expects next (out of order, no room in its window, not ESTABLISHED), is left to the fast path,
frame by frame, which is where all the rules are: this only takes what needs none of them.

Payloads are gathered in one buffer that lives as long as the batch. Segments that differ in SEG.ACK are not a run: data
that goes both ways at once is not where the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from netstack.core.headers import FRAME4, FRAME6, SMALLEST4, SMALLEST6
from netstack.wire.ipv4 import PROTOCOL_TCP, PROTOCOL_UDP
from netstack.wire.tcp import ACK, PSH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from netstack.core.ports import Link
    from netstack.core.stack import Stack

Run = tuple[int, int, int]

# From how many frames on a stretch is worth its 10 us; the comparison costs another 14 us for a whole run, whose first
# frame says whether there is anything to compare.
MINIMUM = 8
RUN_MINIMUM = 16

# A pure ACK costs less, 0.8 us.
ACKS_MINIMUM = 32

# What one read of a stream link holds (vde.link.READ_BUFFER): all payloads of a batch fit.
_GATHERED = 1 << 20

_BYTE = np.dtype(np.uint8)
_WORD = np.dtype(np.uint64)
_BIG32 = np.dtype(">u4")
_NATIVE32 = np.dtype(np.uint32)
_ONE = np.uint32(1)
_ASCENDS = np.uint32(0x7FFFFFFF)

M = 0xFFFFFFFF


class _Kind:
    """What rows of one kind have in common, and the number in which they differ."""

    __slots__ = ("mask", "number_at")

    def __init__(self, mask: NDArray[np.uint64], number_at: int) -> None:
        """`number_at`: where SEG.SEQ or SEG.ACK is; 0: there is none."""
        self.mask = mask
        self.number_at = number_at


def _mask(size: int, different: Sequence[tuple[int, int]], psh_at: int | None = None) -> NDArray[np.uint64]:
    mask = bytearray(b"\xff" * size + bytes(-size % 8))
    for start, end in different:
        mask[start:end] = bytes(end - start)
    if psh_at is not None:
        mask[psh_at] &= ~PSH
    return np.frombuffer(bytes(mask), _WORD)


# IPv4: identification at 18, checksum at 24. TCP, from 34 or 54 on: SEG.SEQ at 4, SEG.ACK at 8, flags at 13, SEG.WND,
# checksum and urgent pointer at 14 to 20. UDP: checksum at 6.
_IPV4_OWN = [(18, 20), (24, 26)]
_DATA4 = _Kind(_mask(54, [*_IPV4_OWN, (38, 42), (48, 54)], 47), 38)
_ACKS4 = _Kind(_mask(54, [*_IPV4_OWN, (42, 46), (48, 54)]), 42)
_UDP4 = _Kind(_mask(40, _IPV4_OWN), 0)
_DATA6 = _Kind(_mask(74, [(58, 62), (68, 74)], 67), 58)
_ACKS6 = _Kind(_mask(74, [(62, 66), (68, 74)]), 62)
_UDP6 = _Kind(_mask(60, []), 0)


class Runs:
    """Takes batches in which the link found runs."""

    def __init__(self, stack: Stack, receive_each: Callable[[Link, memoryview, Sequence[int], float], None]) -> None:
        """`receive_each(link, buffer, spans, now)` takes frames one by one."""
        self._stack = stack
        self._receive_each = receive_each
        self._gathered: NDArray[np.uint8] | None = None
        self._used = 0

    def receive(self, link: Link, buffer: memoryview, spans: Sequence[int], runs: Sequence[Run], now: float) -> None:
        """Take a batch, in order. Untrusted."""
        self._used = 0  # whatever was gathered in an earlier batch has been delivered
        done = 0
        for first, count, stride in runs:
            at, end = spans[2 * first : 2 * first + 2]
            kind, payload = _classify(buffer, at, end - at)
            if kind is None or (count < ACKS_MINIMUM and not payload):
                continue
            for begin, stop in _find_stretches(kind, payload, buffer, at, count, stride):
                # What the rows were compared by must be what this one is, too.
                if begin and _classify(buffer, at + begin * stride, end - at) != (kind, payload):
                    continue
                before = first + begin
                if done < before:
                    self._receive_each(link, buffer, spans[2 * done : 2 * before], now)
                    done = before
                start = at + begin * stride
                if buffer[start + 12] == 0x08:
                    taken = self._take4(link, buffer, start, stop - begin, stride, now)
                else:
                    taken = self._take6(link, buffer, start, stop - begin, stride, now)
                if taken:
                    done = first + stop
                    self._stack.counters.frames_in_runs += stop - begin
        if 2 * done < len(spans):
            self._receive_each(link, buffer, spans[2 * done :] if done else spans, now)

    def _take4(self, link: Link, buffer: memoryview, at: int, count: int, stride: int, now: float) -> bool:
        """Take rows that are alike, of IPv4; False: not as one. Untrusted."""
        high, low, _, _, total, offset, protocol, addresses, ports, seq, ack, data, flags, _ = FRAME4.unpack_from(
            buffer, at
        )
        if offset & 0x3FFF or (high, low) not in link.known_macs:
            return False
        key = (addresses, ports)
        if protocol == PROTOCOL_TCP:
            start = at + 34 + (data >> 4 << 2)
            return self._take_tcp(
                link, low, key, seq, ack, flags, buffer, start, at + 14 + total - start, at + 42, count, stride, now
            )
        return self._take_udp(
            link, low, key, buffer, at + 42, (seq >> 16) - 8, buffer[at + 22], bool(offset & 0x4000), count, stride, now
        )

    def _take6(self, link: Link, buffer: memoryview, at: int, count: int, stride: int, now: float) -> bool:
        """Take rows that are alike, of IPv6; False: not as one. Untrusted."""
        high, low, _, _, length, protocol, addresses, ports, seq, ack, data, flags, _ = FRAME6.unpack_from(buffer, at)
        if (high, low) not in link.known_macs:
            return False
        key = (addresses, ports)
        if protocol == PROTOCOL_TCP:
            start = at + 54 + (data >> 4 << 2)
            return self._take_tcp(
                link, low, key, seq, ack, flags, buffer, start, at + 54 + length - start, at + 62, count, stride, now
            )
        return self._take_udp(
            link, low, key, buffer, at + 62, (seq >> 16) - 8, buffer[at + 21], True, count, stride, now
        )

    def _take_tcp(
        self,
        link: Link,
        mac_low: int,
        key: tuple[int | bytes, int],
        seq: int,
        ack: int,
        flags: int,
        buffer: memoryview,
        start: int,
        size: int,
        ack_at: int,
        count: int,
        stride: int,
        now: float,
    ) -> bool:
        """Segments of one flow, `size` bytes of payload each from `start` on. Untrusted."""
        flow = self._stack.flows.tcp.get(key)
        if (
            flow is None
            or flow.link is not link
            or flow.mac_low != mac_low
            or not flow.fast
            or seq != flow.rcv_nxt
            or flags & ~PSH != ACK
        ):
            return False
        last = ack_at + (count - 1) * stride  # SEG.ACK of the last one; SEG.WND is 6 bytes behind it
        window = buffer[last + 6] << 8 | buffer[last + 7]
        if not size:
            ack = int.from_bytes(buffer[last : last + 4], "big")
            if (ack - flow.snd_una) & M > (flow.snd_nxt - flow.snd_una) & M:
                return False
            flow.on_segment(seq, ack, ACK, window, buffer, start, start, now)
            return True
        if flow.guest_fin or size * count > (flow.rcv_adv - seq) & M:
            return False
        payload = self._gather(buffer, start, size, count, stride)
        flow.on_segment(seq, ack, flags, window, payload, 0, size * count, now)
        return True

    def _take_udp(
        self,
        link: Link,
        mac_low: int,
        key: tuple[int | bytes, int],
        buffer: memoryview,
        start: int,
        size: int,
        ttl: int,
        dont_fragment: bool,
        count: int,
        stride: int,
        now: float,
    ) -> bool:
        """Datagrams of one path, `size` bytes of payload each from `start` on. Untrusted."""
        path = self._stack.udp.paths.get(key)
        if path is None or path.flow.link is not link or path.mac_low != mac_low or ttl < 2:
            return False
        path.send_run(self._gather(buffer, start, size, count, stride), size, ttl, dont_fragment, now)
        return True

    def _gather(self, buffer: memoryview, start: int, size: int, count: int, stride: int) -> memoryview:
        """The payloads of all rows, one behind the other; good until the batch ends."""
        total = size * count
        gathered = self._gathered
        if gathered is None:
            gathered = self._gathered = np.empty(_GATHERED, dtype=_BYTE)
        if self._used + total > _GATHERED:
            gathered, used = np.empty(total, dtype=_BYTE), 0
        else:
            used = self._used
            self._used += total
        taken = gathered[used : used + total]
        taken.reshape(count, size)[:] = np.ndarray((count, size), _BYTE, buffer, start, (stride, 1))
        return taken.data


def _find_stretches(
    kind: _Kind, payload: int, buffer: memoryview, at: int, count: int, stride: int
) -> Sequence[tuple[int, int]]:
    """Which of the rows from `at` on are alike: [begin, end), MINIMUM rows or more. Untrusted."""
    width = len(kind.mask) << 3
    if at + (count - 1) * stride + width > len(buffer):
        return ()
    rows = np.ndarray((count, width), _BYTE, buffer, at, (stride, 1)).copy().view(_WORD)
    breaks = ((rows[1:] ^ rows[:-1]) & kind.mask).any(axis=1)
    if kind.number_at:
        numbers = np.ndarray((count,), _BIG32, buffer, at + kind.number_at, (stride,)).astype(_NATIVE32)
        steps = numbers[1:] - numbers[:-1]
        breaks |= steps != payload if payload else steps - _ONE >= _ASCENDS
    if not breaks.any():
        return ((0, count),)
    edges = (np.flatnonzero(breaks) + 1).tolist()
    return [(begin, end) for begin, end in pairwise((0, *edges, count)) if end - begin >= MINIMUM]


def _classify(buffer: memoryview, at: int, size: int) -> tuple[_Kind | None, int]:
    """What the rows of a run are, going by the first, and how long its payload is. Untrusted."""
    ethertype = buffer[at + 12] << 8 | buffer[at + 13] if size >= SMALLEST4 else 0
    if ethertype == 0x0800:
        if buffer[at + 14] != 0x45:
            return None, 0
        protocol = buffer[at + 23]
        body = 34
        end = 14 + (buffer[at + 16] << 8 | buffer[at + 17])
    elif ethertype == 0x86DD and size >= SMALLEST6:
        if buffer[at + 14] >> 4 != 6:
            return None, 0
        protocol = buffer[at + 20]
        body = 54
        end = 54 + (buffer[at + 18] << 8 | buffer[at + 19])
    else:
        return None, 0
    if end > size:
        return None, 0
    if protocol == PROTOCOL_TCP:
        header = buffer[at + body + 12] >> 4 << 2
        payload = end - body - header
        if header < 20 or payload < 0:
            return None, 0
        if payload:
            return (_DATA4 if body == 34 else _DATA6), payload
        return (_ACKS4 if body == 34 else _ACKS6), 0
    if protocol == PROTOCOL_UDP:
        payload = (buffer[at + body + 4] << 8 | buffer[at + body + 5]) - 8
        if payload <= 0 or body + 8 + payload > end:
            return None, 0
        return (_UDP4 if body == 34 else _UDP6), payload
    return None, 0
