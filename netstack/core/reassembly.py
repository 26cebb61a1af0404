"""IP fragments: put together what guests send in pieces, and cut up what is too large for them.

Theory of operation
-------------------
`Reassembly.add` keeps the pieces of each datagram, in order, until they are whole, and gives back one packet that the
ordinary path parses like any other. Pieces may come in any order. They must not overlap: a datagram of which two pieces
overlap, or contradict each other about where it ends, is thrown away, and so is what comes of it later, until its time
is over (RFC 5722; the same for IPv4, where overlaps serve nothing but to get past filters). A piece that comes twice,
byte for byte, is let pass (RFC 8200 4.5).

Everything is bounded: bytes, bookkeeping included, over all (`Limits.reassembly_bytes`) and for each link (a quarter),
pieces of one datagram, and time. Who needs room takes it from the oldest datagrams of its own link; only when all is
used up, from the link that holds most. So no guest can push out another's fragments.

Datagrams that do not become whole in time are answered with Time Exceeded when their first piece is there.

Counted as dropped: fragment_empty, fragment_length (not the last and not a multiple of 8 bytes), fragment_header_chain
(RFC 7112: the first piece must hold all headers), reassembly_overlap, reassembly_contradiction (about the end),
reassembly_duplicate, reassembly_too_many (pieces), reassembly_too_long, reassembly_poisoned (a later piece of what was
thrown away), reassembly_evicted, reassembly_no_room, reassembly_timeout.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

from netstack.core.datagrams import Counters
from netstack.core.ports import Buffer, Link
from netstack.core.timers import NEVER, Timers
from netstack.wire.checksum import finish, sum_words
from netstack.wire.icmp import REASSEMBLY_TIMEOUT, Problem
from netstack.wire.ipv4 import MAX_PACKET, PROTOCOL_TCP, PROTOCOL_UDP, Ipv4
from netstack.wire.ipv6 import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    EXTENSION_HEADERS,
    FRAGMENT,
    FRAGMENT_HEADER_LENGTH,
    HOP_BY_HOP,
    MAX_EXTENSION_HEADERS,
    MAX_PAYLOAD,
    PROTOCOL_ICMPV6,
    ROUTING,
    Ipv6,
    write_fragment_header,
)
from netstack.wire.ipv6 import HEADER_LENGTH as IPV6_HEADER_LENGTH

# Seconds from the first piece. Linux' net.ipv4.ipfrag_time (RFC 1122 3.3.2 wants 60 to 120, which only serves those who
# send half datagrams), and RFC 8200 4.5.
LIFETIME4 = 30.0
LIFETIME6 = 60.0

# Pieces of one datagram: 64 KiB in pieces of 128 bytes. A guest with an MTU of 256 needs 283.
MAX_PIECES = 512

# What a datagram and a piece cost besides their bytes: objects, keys, dict and heap entries in CPython, rounded up.
_DATAGRAM_COST = 1024
_PIECE_COST = 160

_MORE_FRAGMENTS = 0x2000

# The smallest upper-layer header that tells what a packet is (RFC 9293, RFC 768, RFC 4443).
_UPPER_HEADERS = {PROTOCOL_TCP: 20, PROTOCOL_UDP: 8, PROTOCOL_ICMPV6: 8}

# Link, source, destination, identification, and of IPv4 the protocol.
_Key = tuple[Link, bytes, bytes, int, int]


class Limits(Protocol):
    """The cap that reassembly obeys."""

    @property
    def reassembly_bytes(self) -> int: ...


class Stack(Protocol):
    """What reassembly asks of the stack."""

    @property
    def counters(self) -> Counters: ...
    @property
    def timers(self) -> Timers: ...
    @property
    def limits(self) -> Limits: ...

    def send_error(
        self, link: Link, mac: bytes, src: bytes | None, packet: Buffer, problem: Problem, parameter: int = 0
    ) -> None:
        """An ICMP error about this packet of the guest's, from `src`; None: from the gateway."""


class _Datagram:
    """The pieces of one packet."""

    __slots__ = (
        "cost",
        "end",
        "head",
        "heap_at",
        "key",
        "mac",
        "owner",
        "pieces",
        "poisoned",
        "size",
        "starts",
        "timer_at",
    )

    def __init__(self, owner: Reassembly, key: _Key, mac: bytes) -> None:
        self.owner = owner
        self.key = key
        self.mac = mac
        self.head = b""  # of the first piece: all in front of its payload, the IPv6 fragment header included
        self.starts: list[int] = []  # ascending; pieces[i] begins at starts[i]
        self.pieces: list[bytes] = []
        self.size = 0  # the bytes in all pieces
        self.end = -1  # where the payload ends, once the last piece is there
        self.cost = 0  # what it is charged for, of its link's share
        self.poisoned = False
        self.timer_at = self.heap_at = NEVER

    def on_timer(self, now: float) -> None:
        self.owner.on_timeout(self)


class _Share:
    """What one link holds."""

    __slots__ = ("cost", "datagrams")

    def __init__(self) -> None:
        self.cost = 0
        self.datagrams: dict[_Key, _Datagram] = {}  # the oldest first


class Reassembly:
    """All datagrams of which some pieces are there."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._shares: dict[Link, _Share] = {}
        self.cost = 0  # bytes held, bookkeeping included; never above Limits.reassembly_bytes

    def __len__(self) -> int:
        return sum(len(share.datagrams) for share in self._shares.values())

    def add(self, link: Link, mac: bytes, packet: Ipv4 | Ipv6, buffer: Buffer, now: float) -> bytes | None:
        """Take one fragment in. The whole packet when this was the last one missing, without a trace of fragments.

        Untrusted. An IPv6 packet in one fragment (RFC 6946) does not come here: wire.ipv6 walks through it.
        """
        drop = self._stack.counters.drop
        start, end = packet.payload_start, packet.payload_end
        offset = packet.fragment_offset
        length = end - start
        if length == 0:
            drop("fragment_empty")
            return None
        if packet.more_fragments and length & 7:
            drop("fragment_length")
            return None
        ipv4 = len(packet.src) == 4
        key = (link, packet.src, packet.dst, packet.ident, packet.protocol if ipv4 else 0)
        share = self._shares.get(link)
        datagram = share.datagrams.get(key) if share is not None else None
        if datagram is None:
            datagram = self._begin(key, mac, LIFETIME4 if ipv4 else LIFETIME6, now)
            if datagram is None:
                return None
        elif datagram.poisoned:
            drop("reassembly_poisoned")
            return None
        reason = self._misfit(datagram, packet, buffer)
        if reason is not None:
            drop(reason)
            if reason != "reassembly_duplicate":
                self._poison(datagram)
            return None
        if not self._charge(datagram, _PIECE_COST + length):
            return None
        if offset == 0:
            datagram.head = bytes(buffer[packet.header_start : start])
            datagram.mac = mac
        if not packet.more_fragments:
            datagram.end = offset + length
        at = bisect_left(datagram.starts, offset)
        datagram.starts.insert(at, offset)
        datagram.pieces.insert(at, bytes(buffer[start:end]))
        datagram.size += length
        # No two of them overlap and none lies beyond the end, so as many bytes as there should be are all of them.
        if datagram.size != datagram.end:
            return None
        self._forget(datagram)
        whole = _join4(datagram) if ipv4 else _join6(datagram)
        if whole is None:
            drop("reassembly_too_long")
        return whole

    def on_timeout(self, datagram: _Datagram) -> None:
        """RFC 792, RFC 4443 3.3."""
        self._forget(datagram)
        if datagram.poisoned:
            return
        self._stack.counters.drop("reassembly_timeout")
        if datagram.head:
            first = datagram.head + datagram.pieces[0]
            self._stack.send_error(datagram.key[0], datagram.mac, None, first, REASSEMBLY_TIMEOUT)

    def forget_link(self, link: Link) -> None:
        """The link is gone."""
        share = self._shares.get(link)
        if share is not None:
            for datagram in list(share.datagrams.values()):
                self._forget(datagram)

    def _misfit(self, datagram: _Datagram, packet: Ipv4 | Ipv6, buffer: Buffer) -> str | None:
        """Why this fragment cannot be a part of the datagram; None when it can. Untrusted."""
        start, end = packet.payload_start, packet.payload_end
        offset = packet.fragment_offset
        stop = offset + end - start
        last = not packet.more_fragments
        starts, pieces = datagram.starts, datagram.pieces
        at = bisect_left(starts, offset)
        if at < len(starts) and starts[at] == offset and pieces[at] == buffer[start:end]:
            return "reassembly_duplicate" if last == (stop == datagram.end) else "reassembly_contradiction"
        if at < len(starts) and stop > starts[at]:
            return "reassembly_overlap"
        if at > 0 and starts[at - 1] + len(pieces[at - 1]) > offset:
            return "reassembly_overlap"
        if datagram.end >= 0 and (last or stop >= datagram.end):
            return "reassembly_contradiction"
        if last and starts and starts[-1] >= stop:
            return "reassembly_contradiction"
        if len(starts) >= MAX_PIECES:
            return "reassembly_too_many"
        if offset == 0 and isinstance(packet, Ipv6) and not _holds_all_headers(packet, buffer):
            return "fragment_header_chain"
        return None

    def _begin(self, key: _Key, mac: bytes, lifetime: float, now: float) -> _Datagram | None:
        datagram = _Datagram(self, key, mac)
        if not self._charge(datagram, _DATAGRAM_COST):
            return None
        self._shares[key[0]].datagrams[key] = datagram
        self._stack.timers.arm(datagram, now + lifetime)
        return datagram

    def _charge(self, datagram: _Datagram, cost: int) -> bool:
        """Make room for `cost` more bytes. False when there is none, or when the datagram itself had to go."""
        link = datagram.key[0]
        limit = self._stack.limits.reassembly_bytes
        share = self._shares.setdefault(link, _Share())
        while share.cost + cost > limit >> 2 and share.datagrams:
            self._evict(share)
        while self.cost + cost > limit and self.cost:
            most = max(self._shares.values(), key=lambda each: each.cost)
            self._evict(share if share.cost >= most.cost else most)
        evicted = datagram.cost > 0 and share.datagrams.get(datagram.key) is not datagram
        if evicted or share.cost + cost > limit >> 2:
            if not evicted:
                self._stack.counters.drop("reassembly_no_room")
            if not share.datagrams:
                self._shares.pop(link, None)
            return False
        self._shares[link] = share  # evicting its last datagram took it out
        datagram.cost += cost
        share.cost += cost
        self.cost += cost
        return True

    def _evict(self, share: _Share) -> None:
        self._stack.counters.drop("reassembly_evicted")
        self._forget(next(iter(share.datagrams.values())))

    def _poison(self, datagram: _Datagram) -> None:
        """Throw the pieces away, and remember that what follows of them belongs to nothing."""
        datagram.poisoned = True
        datagram.pieces.clear()
        datagram.starts.clear()
        freed = datagram.cost - _DATAGRAM_COST
        datagram.cost -= freed
        self._shares[datagram.key[0]].cost -= freed
        self.cost -= freed

    def _forget(self, datagram: _Datagram) -> None:
        self._stack.timers.cancel(datagram)
        link = datagram.key[0]
        share = self._shares[link]
        del share.datagrams[datagram.key]
        share.cost -= datagram.cost
        self.cost -= datagram.cost
        if not share.datagrams:
            del self._shares[link]


def _holds_all_headers(packet: Ipv6, buffer: Buffer) -> bool:
    """Whether the first fragment holds every extension header and the upper-layer header (RFC 7112 5). Untrusted."""
    protocol = packet.protocol
    at, end = packet.payload_start, packet.payload_end
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol not in EXTENSION_HEADERS:
            return end - at >= _UPPER_HEADERS.get(protocol, 0)
        if end - at < 8 or protocol == FRAGMENT:
            return False
        size = _extension_size(protocol, buffer[at + 1])
        protocol = buffer[at]
        at += size
        if at > end:
            return False
    return False


def _extension_size(protocol: int, length: int) -> int:
    """Bytes of an extension header by its length field: units of 8 (RFC 8200 4.3), of AH units of 4 (RFC 4302 2.2)."""
    return (length + 2) << 2 if protocol == AUTHENTICATION else (length + 1) << 3


def _join4(datagram: _Datagram) -> bytes | None:
    """The first piece's header, with the length of all, and all payload. None when it is too long for a packet."""
    total = len(datagram.head) + datagram.size
    if total > MAX_PACKET:
        return None
    head = bytearray(datagram.head)
    head[2:4] = total.to_bytes(2, "big")
    head[6:8] = b"\0\0"
    head[10:12] = b"\0\0"
    head[10:12] = finish(sum_words(head)).to_bytes(2, "big")
    return b"".join((head, *datagram.pieces))


def _join6(datagram: _Datagram) -> bytes | None:
    """RFC 8200 4.5: the headers in front of the first piece's fragment header, which names what follows them."""
    head = bytearray(datagram.head[:-FRAGMENT_HEADER_LENGTH])
    length = len(head) - IPV6_HEADER_LENGTH + datagram.size
    if length > MAX_PAYLOAD:
        return None
    # Find the byte that says "fragment header"; the headers before it have been parsed once already.
    named_at = 6
    at = IPV6_HEADER_LENGTH
    while at < len(head):
        kind = head[named_at]
        named_at = at
        at += _extension_size(kind, head[at + 1])
    head[named_at] = datagram.head[-FRAGMENT_HEADER_LENGTH]
    head[4:6] = length.to_bytes(2, "big")
    return b"".join((head, *datagram.pieces))


def fragment(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """Cut a packet of ours into fragments of at most `mtu` bytes; `ident` must not repeat within a minute.

    The packet itself where it fits. An MTU that leaves no room for 8 bytes of payload is taken as one that does.
    """
    if len(packet) <= mtu:
        return [packet]
    return _fragment4(packet, mtu, ident) if packet[0] >> 4 == 4 else _fragment6(packet, mtu, ident)


def _fragment4(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """RFC 791 3.2. Options are copied into each fragment; ours have none."""
    header_length = (packet[0] & 0x0F) << 2
    step = max(mtu - header_length & ~7, 8)
    header = bytearray(packet[:header_length])
    header[4:6] = (ident & 0xFFFF).to_bytes(2, "big")
    fragments = []
    for at in range(header_length, len(packet), step):
        piece = packet[at : at + step]
        header[2:4] = (header_length + len(piece)).to_bytes(2, "big")
        more = _MORE_FRAGMENTS if at + step < len(packet) else 0
        header[6:8] = (at - header_length >> 3 | more).to_bytes(2, "big")
        header[10:12] = b"\0\0"
        header[10:12] = finish(sum_words(header)).to_bytes(2, "big")
        fragments.append(bytes(header) + piece)
    return fragments


def _fragment6(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """RFC 8200 4.5."""
    split, named_at = _unfragmentable(packet)
    header = bytearray(packet[:split])
    protocol = header[named_at]
    header[named_at] = FRAGMENT
    overhead = split + FRAGMENT_HEADER_LENGTH
    step = max(mtu - overhead & ~7, 8)
    fragments = []
    for at in range(split, len(packet), step):
        piece = packet[at : at + step]
        header[4:6] = (overhead - IPV6_HEADER_LENGTH + len(piece)).to_bytes(2, "big")
        extension = write_fragment_header(protocol, at - split, at + step < len(packet), ident & 0xFFFFFFFF)
        fragments.append(bytes(header) + extension + piece)
    return fragments


def _unfragmentable(packet: bytes) -> tuple[int, int]:
    """Where the headers end that every router must see (RFC 8200 4.5); where the byte is that names what follows."""
    end, named_at = IPV6_HEADER_LENGTH, 6
    at, at_named = end, named_at
    while packet[at_named] in (HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING) and at + 2 <= len(packet):
        kind = packet[at_named]
        at_named, at = at, at + _extension_size(kind, packet[at + 1])
        if kind != DESTINATION_OPTIONS:  # these are for routers only where a routing header follows
            end, named_at = at, at_named
    return end, named_at
