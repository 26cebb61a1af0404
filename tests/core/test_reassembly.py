"""Reassembly and fragmentation, case by case; tests/property/test_reassembly.py has the random ones.

scapy is the oracle: it cuts up and puts together by its own lights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from scapy.layers.inet import IP, UDP, defragment
from scapy.layers.inet import fragment as scapy_fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    defragment6,
    fragment6,
)
from scapy.packet import Raw

from netstack.core.reassembly import MAX_PIECES, Reassembly, fragment
from netstack.core.udp import write_packet
from netstack.wire.icmp import REASSEMBLY_TIMEOUT
from netstack.wire.ipv4 import PROTOCOL_UDP, Ipv4, parse_ipv4, write_ipv4
from netstack.wire.ipv6 import FRAGMENT, HOP_BY_HOP, Ipv6, parse_ipv6, write_fragment_header, write_ipv6
from tests.core.ip_fakes import GUEST4, GUEST6, MAC, WORLD4, WORLD6, FakeLink, FakeStack, in_buffer

FAMILIES = pytest.mark.parametrize(("guest", "world"), ((GUEST4, WORLD4), (GUEST6, WORLD6)), ids=("ipv4", "ipv6"))
PAYLOAD = bytes(range(256)) * 16


class Bench:
    """One stack with its fragments."""

    def __init__(self) -> None:
        self.stack = FakeStack()
        self.reassembly = Reassembly(self.stack)
        self.link = FakeLink()
        self.now = 1000.0

    def add(self, packet: bytes, link: FakeLink | None = None) -> bytes | None:
        buffer, start, end = in_buffer(packet, before=18)
        parsed: Ipv4 | Ipv6 | None
        parsed = parse_ipv4(buffer, start, end) if packet[0] >> 4 == 4 else parse_ipv6(buffer, start, end)
        assert parsed is not None
        assert parsed.more_fragments or parsed.fragment_offset
        return self.reassembly.add(link or self.link, MAC, parsed, buffer, self.now)

    def add_all(self, packets: Iterable[bytes]) -> bytes | None:
        """The last answer; all others must be None."""
        *early, last = [self.add(packet) for packet in packets]
        assert early == [None] * len(early)
        return last

    def is_empty(self) -> bool:
        return len(self.reassembly) == self.reassembly.cost == 0


@pytest.fixture
def bench() -> Bench:
    return Bench()


def piece(guest: bytes, world: bytes, offset: int, data: bytes, *, more: bool, ident: int = 1) -> bytes:
    """One fragment, as a guest that means harm may make it."""
    if len(guest) == 4:
        header = write_ipv4(
            guest,
            world,
            PROTOCOL_UDP,
            len(data),
            ident=ident,
            dont_fragment=False,
            more_fragments=more,
            fragment_offset=offset,
        )
        return header + data
    extension = write_fragment_header(PROTOCOL_UDP, offset, more, ident)
    return write_ipv6(guest, world, FRAGMENT, 8 + len(data)) + extension + data


def expected(guest: bytes, world: bytes, data: bytes, ident: int = 1) -> bytes:
    if len(guest) == 4:
        return write_ipv4(guest, world, PROTOCOL_UDP, len(data), ident=ident, dont_fragment=False) + data
    return write_ipv6(guest, world, PROTOCOL_UDP, len(data)) + data


class TestWhole:
    @FAMILIES
    @pytest.mark.parametrize("mtu", (1280, 1500, 4000))
    def test_what_we_cut_up_comes_back(self, bench: Bench, guest: bytes, world: bytes, mtu: int) -> None:
        packet = write_packet(guest, 1000, world, 2000, PAYLOAD, 64)
        if len(guest) == 4:
            packet = bytes(IP(packet[:4] + b"\0\x07" + b"\0\0" + packet[8:10] + b"\0\0" + packet[12:]))
            anew = IP(packet)
            del anew.chksum
            packet = bytes(anew)
        fragments = fragment(packet, mtu, 7)
        assert len(fragments) > 1
        assert max(map(len, fragments)) <= mtu
        assert bench.add_all(fragments) == packet
        assert bench.is_empty()

    @FAMILIES
    def test_in_any_order(self, guest: bytes, world: bytes) -> None:
        pieces = [
            piece(guest, world, 0, PAYLOAD[:800], more=True),
            piece(guest, world, 800, PAYLOAD[800:1600], more=True),
            piece(guest, world, 1600, PAYLOAD[1600:2400], more=True),
            piece(guest, world, 2400, PAYLOAD[2400:2411], more=False),
        ]
        for order in itertools.permutations(pieces):
            bench = Bench()
            assert bench.add_all(order) == expected(guest, world, PAYLOAD[:2411])
            assert bench.is_empty()

    def test_scapys_fragments(self, bench: Bench) -> None:
        whole = IP(src="192.168.5.15", dst="198.51.100.7", id=9) / UDP(sport=1, dport=2) / Raw(PAYLOAD)
        result = bench.add_all(bytes(part) for part in reversed(scapy_fragment(whole, fragsize=512)))
        assert result is not None
        anew = IP(result)
        del anew.chksum
        assert bytes(anew) == result
        assert result == bytes(whole)

    def test_scapys_fragments_of_ipv6_with_extension_headers(self, bench: Bench) -> None:
        base = IPv6(src="fd00:c0a8:5::15", dst="2001:db8::7") / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)])
        inner = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]) / UDP(sport=1, dport=2) / Raw(PAYLOAD)
        whole = base / inner
        parts = fragment6(base / IPv6ExtHdrFragment(id=5) / inner, 1280)
        assert len(parts) > 1
        assert bench.add_all(bytes(part) for part in parts) == bytes(whole)

    def test_two_datagrams_at_once_are_kept_apart(self, bench: Bench) -> None:
        for ident in (1, 2):
            bench.add(piece(GUEST4, WORLD4, 0, bytes((ident,)) * 80, more=True, ident=ident))
        for ident in (1, 2):
            whole = bench.add(piece(GUEST4, WORLD4, 80, bytes((ident,)) * 9, more=False, ident=ident))
            assert whole == expected(GUEST4, WORLD4, bytes((ident,)) * 89, ident)

    def test_two_links_are_kept_apart(self, bench: Bench) -> None:
        bench.add(piece(GUEST4, WORLD4, 0, bytes(80), more=True))
        assert bench.add(piece(GUEST4, WORLD4, 80, bytes(9), more=False), FakeLink("other")) is None
        assert bench.add(piece(GUEST4, WORLD4, 80, bytes(9), more=False)) is not None

    @FAMILIES
    def test_an_exact_duplicate_is_let_pass(self, bench: Bench, guest: bytes, world: bytes) -> None:
        first = piece(guest, world, 0, PAYLOAD[:80], more=True)
        last = piece(guest, world, 160, PAYLOAD[160:169], more=False)
        assert bench.add_all((last, first, first, last)) is None
        assert bench.add(piece(guest, world, 80, PAYLOAD[80:160], more=True)) == expected(guest, world, PAYLOAD[:169])
        assert bench.stack.drops == {"reassembly_duplicate": 2}

    @FAMILIES
    def test_the_largest(self, bench: Bench, guest: bytes, world: bytes) -> None:
        room = 65535 - 20 if len(guest) == 4 else 65535
        data = (PAYLOAD * 17)[:room]
        cuts = range(0, room, 1400)
        pieces = [piece(guest, world, at, data[at : at + 1400], more=at + 1400 < room) for at in cuts]
        assert bench.add_all(pieces) == expected(guest, world, data)


class TestRefused:
    @FAMILIES
    @pytest.mark.parametrize(
        ("offset", "length"),
        ((0, 16), (0, 88), (8, 8), (72, 16), (80, 80), (152, 16), (40, 80)),
    )
    def test_overlaps_lose_the_whole_datagram(
        self, bench: Bench, guest: bytes, world: bytes, offset: int, length: int
    ) -> None:
        """RFC 5722."""
        bench.add(piece(guest, world, 0, PAYLOAD[:80], more=True))
        bench.add(piece(guest, world, 160, PAYLOAD[160:240], more=True))
        if offset == 80:
            bench.add(piece(guest, world, 80, PAYLOAD[80:96], more=True))
        assert bench.add(piece(guest, world, offset, PAYLOAD[offset : offset + length], more=True)) is None
        assert bench.stack.drops == {"reassembly_overlap": 1}
        # The rest would have made it whole.
        assert bench.add(piece(guest, world, 80, PAYLOAD[80:160], more=True)) is None
        assert bench.add(piece(guest, world, 240, b"end", more=False)) is None
        assert bench.stack.drops == {"reassembly_overlap": 1, "reassembly_poisoned": 2}
        bench.stack.advance(2000.0)
        assert bench.is_empty()
        assert not bench.stack.errors

    @FAMILIES
    def test_a_duplicate_with_other_bytes_is_an_overlap(self, bench: Bench, guest: bytes, world: bytes) -> None:
        bench.add(piece(guest, world, 0, bytes(80), more=True))
        bench.add(piece(guest, world, 0, b"\1" * 80, more=True))
        assert bench.stack.drops == {"reassembly_overlap": 1}

    @pytest.mark.parametrize(
        "ends",
        (
            ((80, 16, False), (160, 8, False)),  # two ends
            ((160, 8, False), (240, 8, True)),  # a piece behind the end
            ((240, 8, True), (160, 8, False)),
            ((160, 8, False), (152, 8, True), (168, 8, False)),
            ((80, 8, True), (80, 8, False)),  # the same bytes, the last one or not
            ((80, 8, False), (80, 8, True)),
            ((160, 16, False), (168, 8, True)),
        ),
    )
    @FAMILIES
    def test_contradictions_about_the_end(
        self, bench: Bench, guest: bytes, world: bytes, ends: tuple[tuple[int, int, bool], ...]
    ) -> None:
        for offset, length, more in ends:
            assert bench.add(piece(guest, world, offset, bytes(length), more=more)) is None
        [reason] = bench.stack.drops
        assert reason in ("reassembly_contradiction", "reassembly_overlap")
        assert bench.reassembly.cost < 1100  # nothing but the memory of it

    @FAMILIES
    def test_lengths(self, bench: Bench, guest: bytes, world: bytes) -> None:
        assert bench.add(piece(guest, world, 0, bytes(81), more=True)) is None
        assert bench.add(piece(guest, world, 0, b"", more=True)) is None
        assert bench.add(piece(guest, world, 80, b"", more=False)) is None
        assert bench.stack.drops == {"fragment_length": 1, "fragment_empty": 2}
        assert bench.is_empty()

    def test_longer_than_a_packet_for_its_options(self, bench: Bench) -> None:
        """The offsets allow it, the first piece's own header does not."""
        options = bytearray(piece(GUEST4, WORLD4, 0, bytes(80), more=True))
        options[0] = 0x46
        options[2:4] = (104).to_bytes(2, "big")
        options[20:20] = b"\1\1\1\1"
        bench.add(bytes(options))
        for at in range(80, 65440, 1360):
            bench.add(piece(GUEST4, WORLD4, at, bytes(min(1360, 65440 - at)), more=True))
        assert bench.add(piece(GUEST4, WORLD4, 65440, bytes(72), more=False)) is None
        assert bench.stack.drops == {"reassembly_too_long": 1}
        assert bench.is_empty()

    @FAMILIES
    def test_endless_tiny_pieces(self, bench: Bench, guest: bytes, world: bytes) -> None:
        for number in range(1, 5000):
            assert bench.add(piece(guest, world, number * 8, bytes(8), more=True)) is None
        assert bench.stack.drops["reassembly_too_many"] == 1
        assert bench.stack.drops["reassembly_poisoned"] == 4999 - MAX_PIECES - 1

    @pytest.mark.parametrize(
        ("protocol", "data", "fits"),
        (
            (17, bytes(8), True),
            (6, bytes(16), False),  # a TCP header has 20
            (6, bytes(24), True),
            (58, bytes(8), True),
            (60, b"\x11\0\1\4\0\0\0\0" + bytes(8), True),  # destination options, then UDP
            (60, b"\x11\0\1\4\0\0\0\0", False),  # UDP in the next piece
            (60, b"\x11\1\1\4\0\0\0\0", False),  # the options themselves go on in the next piece
            (44, b"\x11" + bytes(15), False),  # a fragment in a fragment
            (60, b"\x3c\0\1\4\0\0\0\0" * 9, False),
            (132, bytes(8), True),
        ),
    )
    def test_the_first_piece_holds_all_headers(self, bench: Bench, protocol: int, data: bytes, fits: bool) -> None:
        """RFC 7112."""
        head = write_ipv6(GUEST6, WORLD6, FRAGMENT, 8 + len(data))
        bench.add(head + write_fragment_header(protocol, 0, True, 1) + data)
        assert bench.stack.drops == ({} if fits else {"fragment_header_chain": 1})


class TestBounds:
    def test_one_link_has_a_quarter(self, bench: Bench) -> None:
        bench.stack.limits.reassembly_bytes = 1 << 20
        for ident in range(3000):
            bench.add(piece(GUEST4, WORLD4, 8, bytes(1400), more=True, ident=ident))
            assert bench.reassembly.cost <= 1 << 18
        assert bench.stack.drops["reassembly_evicted"] > 2000
        newest = piece(GUEST4, WORLD4, 0, bytes(8), more=True, ident=2999)
        bench.add(newest)
        assert bench.add(piece(GUEST4, WORLD4, 1408, b"x", more=False, ident=2999)) is not None

    def test_no_link_pushes_out_anothers(self, bench: Bench) -> None:
        bench.stack.limits.reassembly_bytes = 1 << 20
        bench.add(piece(GUEST4, WORLD4, 0, bytes(8), more=True), FakeLink("victim"))
        victim = next(iter(bench.reassembly._shares))
        for link in [FakeLink(str(number)) for number in range(10)]:
            for ident in range(300):
                bench.add(piece(GUEST4, WORLD4, 8, bytes(1400), more=True, ident=ident), link)
                assert bench.reassembly.cost <= 1 << 20
        assert isinstance(victim, FakeLink)
        assert bench.add(piece(GUEST4, WORLD4, 8, b"x", more=False), victim) is not None

    def test_a_late_link_gets_its_part_of_what_others_filled(self, bench: Bench) -> None:
        bench.stack.limits.reassembly_bytes = 1 << 20
        for link in [FakeLink(str(number)) for number in range(4)]:
            for ident in range(150):
                bench.add(piece(GUEST4, WORLD4, 8, bytes(1400), more=True, ident=ident), link)
        late = FakeLink("late")
        for ident in range(50):
            bench.add(piece(GUEST4, WORLD4, 8, bytes(1400), more=True, ident=ident), late)
        for ident in range(50):
            bench.add(piece(GUEST4, WORLD4, 0, bytes(8), more=True, ident=ident), late)
            assert bench.add(piece(GUEST4, WORLD4, 1408, b"x", more=False, ident=ident), late) is not None

    def test_one_large_datagram_fits_even_a_small_share(self, bench: Bench) -> None:
        bench.stack.limits.reassembly_bytes = 1 << 19
        pieces = [piece(GUEST4, WORLD4, at, bytes(1400), more=True) for at in range(0, 64400, 1400)]
        assert bench.add_all([*pieces, piece(GUEST4, WORLD4, 64400, b"x", more=False)]) is not None

    def test_no_room_at_all(self, bench: Bench) -> None:
        bench.stack.limits.reassembly_bytes = 4100
        assert bench.add(piece(GUEST4, WORLD4, 8, bytes(1400), more=True)) is None
        assert bench.is_empty()
        bench.stack.limits.reassembly_bytes = 0
        assert bench.add(piece(GUEST4, WORLD4, 8, bytes(8), more=True)) is None
        assert bench.stack.drops == {"reassembly_evicted": 1, "reassembly_no_room": 1}
        assert bench.is_empty()

    def test_a_link_that_is_gone_holds_nothing(self, bench: Bench) -> None:
        bench.add(piece(GUEST4, WORLD4, 8, bytes(8), more=True))
        bench.reassembly.forget_link(bench.link)
        bench.reassembly.forget_link(bench.link)
        assert bench.is_empty()


class TestTime:
    @pytest.mark.parametrize(
        ("guest", "world", "lifetime"), ((GUEST4, WORLD4, 30), (GUEST6, WORLD6, 60)), ids=("ipv4", "ipv6")
    )
    def test_time_exceeded_when_the_first_piece_is_known(
        self, bench: Bench, guest: bytes, world: bytes, lifetime: float
    ) -> None:
        first = piece(guest, world, 0, PAYLOAD[:80], more=True)
        bench.add(piece(guest, world, 160, PAYLOAD[:80], more=True))
        bench.now += 1
        bench.add(first)
        bench.stack.advance(999 + lifetime)
        assert not bench.is_empty()
        bench.stack.advance(1000 + lifetime)
        assert bench.is_empty()
        [error] = bench.stack.taken_errors()
        assert (error.src, error.problem, error.packet) == (None, REASSEMBLY_TIMEOUT, first)
        assert error.written is not None
        at = 20 if len(guest) == 4 else 40
        assert tuple(error.written[at : at + 2]) == ((11, 1) if len(guest) == 4 else (3, 1))
        assert bench.stack.drops == {"reassembly_timeout": 1}

    @FAMILIES
    def test_silence_when_it_is_not(self, bench: Bench, guest: bytes, world: bytes) -> None:
        bench.add(piece(guest, world, 8, bytes(8), more=True))
        bench.stack.advance(1100.0)
        assert bench.is_empty()
        assert not bench.stack.errors


class TestFragment:
    @FAMILIES
    def test_what_fits_stays_whole(self, guest: bytes, world: bytes) -> None:
        packet = write_packet(guest, 1, world, 2, bytes(1000), 64)
        assert fragment(packet, len(packet), 1) == [packet]
        assert len(fragment(packet, len(packet) - 1, 1)) == 2

    def test_scapy_puts_ours_together(self) -> None:
        packet = write_packet(WORLD4, 1, GUEST4, 2, PAYLOAD, 64)
        parts = [IP(part) for part in fragment(packet, 576, 0x12345)]
        for part in parts:
            anew = part.copy()
            del anew.chksum
            assert bytes(anew) == bytes(part)
            assert "DF" not in part.flags
        assert {part.id for part in parts} == {0x2345}
        [whole] = defragment(parts)
        assert bytes(whole[UDP]) == packet[20:]

    def test_scapy_puts_ours_together_over_ipv6(self) -> None:
        packet = write_packet(WORLD6, 1, GUEST6, 2, PAYLOAD, 64)
        parts = [IPv6(part) for part in fragment(packet, 1280, 0x12345678)]
        assert {part[IPv6ExtHdrFragment].id for part in parts} == {0x12345678}
        assert bytes(defragment6(parts)) == packet

    def test_headers_for_routers_stay_in_front(self) -> None:
        head = (
            IPv6(src="fd00::1", dst="fd00::2")
            / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)])
            / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
            / IPv6ExtHdrRouting(type=253, segleft=0)
        )
        tail = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]) / UDP(sport=1, dport=2) / Raw(PAYLOAD)
        packet = bytes(head / tail)
        parts = fragment(packet, 1280, 3)
        assert all(part[6] == HOP_BY_HOP for part in parts)
        assert all(IPv6(part)[IPv6ExtHdrRouting].nh == FRAGMENT for part in parts)
        assert all(IPv6(part)[IPv6ExtHdrFragment].nh == 60 for part in parts)
        bench = Bench()
        assert bench.add_all(parts) == packet

    @FAMILIES
    @pytest.mark.parametrize("mtu", (-5, 0, 30, 68))
    def test_an_absurd_mtu_still_ends(self, guest: bytes, world: bytes, mtu: int) -> None:
        packet = write_packet(guest, 1, world, 2, bytes(200), 64)
        parts = fragment(packet, mtu, 1)
        assert len(parts) >= 200 // 48
        assert Bench().add_all(parts) is not None
