"""Whatever pieces a guest sends, in whatever order, reassembly gives back the bytes that were cut up, or nothing.

And it never raises, never holds more than its limit, and holds nothing any more when time is over.
"""

from __future__ import annotations

import itertools
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from netstack.core.reassembly import MAX_PIECES, Reassembly, fragment
from netstack.wire.ipv4 import PROTOCOL_UDP, Ipv4, parse_ipv4, write_ipv4
from netstack.wire.ipv6 import FRAGMENT, Ipv6, parse_ipv6, write_fragment_header, write_ipv6
from tests.core.ip_fakes import GUEST4, GUEST6, MAC, WORLD4, WORLD6, FakeLink, FakeStack

LIMIT = 1 << 18
LINK = FakeLink()


def parse(packet: bytes) -> Ipv4 | Ipv6 | None:
    view = memoryview(packet)
    if packet[0] >> 4 == 4:
        return parse_ipv4(view, 0, len(view))
    return parse_ipv6(view, 0, len(view))


def piece(ipv6: bool, offset: int, data: bytes, more: bool, ident: int) -> bytes:
    if ipv6:
        extension = write_fragment_header(PROTOCOL_UDP, offset, more, ident)
        return write_ipv6(GUEST6, WORLD6, FRAGMENT, 8 + len(data)) + extension + data
    header = write_ipv4(
        GUEST4,
        WORLD4,
        PROTOCOL_UDP,
        len(data),
        ident=ident,
        dont_fragment=False,
        more_fragments=more,
        fragment_offset=offset,
    )
    return header + data


@st.composite
def datagrams(draw: st.DrawFn) -> tuple[bool, bytes, list[tuple[int, bytes, bool]]]:
    """A payload and the pieces of it, in order."""
    ipv6 = draw(st.booleans())
    payload = draw(st.binary(min_size=9, max_size=600))
    last = (len(payload) - 1) // 8
    cuts = sorted(draw(st.sets(st.integers(1, last), min_size=1, max_size=12)))
    bounds = [0, *(cut * 8 for cut in cuts), len(payload)]
    pieces = [(start, payload[start:end], end < len(payload)) for start, end in itertools.pairwise(bounds)]
    return ipv6, payload, pieces


@given(
    st.lists(datagrams(), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.integers(0, 3),
)
def test_any_split_in_any_order_gives_the_bytes_back(
    wanted: list[tuple[bool, bytes, list[tuple[int, bytes, bool]]]], random: Random, repeats: int
) -> None:
    stack = FakeStack()
    reassembly = Reassembly(stack)
    link = FakeLink()
    packets: list[tuple[int, bytes]] = []
    for number, (ipv6, _, pieces) in enumerate(wanted):
        packets += [(number, piece(ipv6, offset, data, more, number)) for offset, data, more in pieces]
    random.shuffle(packets)
    # Some come twice, the second copy before their datagram is whole: the last piece of each is never repeated.
    missing = [len(pieces) for _, _, pieces in wanted]
    complete: dict[int, bytes] = {}
    for number, packet in packets:
        missing[number] -= 1
        for _ in range(1 + (repeats if missing[number] else 0)):
            parsed = parse(packet)
            if parsed is None or not (parsed.more_fragments or parsed.fragment_offset):
                continue
            if len(parsed.src) == 16 and parsed.fragment_offset == 0 and len(packet) < 56:
                # The first piece has no room for a UDP header (RFC 7112): this datagram is refused, rightly.
                complete.setdefault(number, b"")
            whole = reassembly.add(link, MAC, parsed, memoryview(packet), 0.0)
            if whole is not None:
                assert number not in complete
                complete[number] = whole
    for number, (ipv6, payload, _) in enumerate(wanted):
        whole = complete[number]
        if whole:
            again = parse(whole)
            assert again is not None
            assert not again.more_fragments
            assert again.fragment_offset == 0
            assert again.protocol == PROTOCOL_UDP
            assert whole[again.payload_start :] == payload
            assert (again.src, again.dst) == ((GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4))
    stack.advance(1000.0)
    assert len(reassembly) == reassembly.cost == 0


@given(st.booleans(), st.binary(min_size=1, max_size=4000), st.integers(68, 2000), st.integers(0, 1 << 32))
def test_what_fragment_cuts_reassembly_joins(ipv6: bool, payload: bytes, mtu: int, ident: int) -> None:
    # Of protocol 253 (RFC 3692), of which no header is known that the first fragment would have to hold.
    head = write_ipv6(GUEST6, WORLD6, 253, len(payload)) if ipv6 else write_ipv4(GUEST4, WORLD4, 253, len(payload))
    packets = fragment(head + payload, mtu, ident)
    if len(packets) == 1:
        assert packets == [head + payload]
        return
    assert all(len(packet) <= max(mtu, 56) for packet in packets)
    reassembly = Reassembly(FakeStack())
    whole = None
    for packet in packets:
        assert whole is None
        parsed = parse(packet)
        assert parsed is not None
        whole = reassembly.add(LINK, MAC, parsed, memoryview(packet), 0.0)
    assert whole is not None
    assert whole[len(head) :] == payload


# Pieces as only an attacker makes them: few datagrams, few places, so that they meet.
HOSTILE = st.tuples(
    st.booleans(),  # family
    st.integers(0, 12).map(lambda unit: unit * 8) | st.integers(0, 8191).map(lambda unit: unit * 8),  # offset
    st.sampled_from((0, 1, 7, 8, 16, 24, 40, 1400)),  # length
    st.booleans(),  # more
    st.integers(0, 3),  # ident
    st.integers(0, 2),  # link
    st.sampled_from((0.0, 0.0, 0.0, 5.0, 40.0)),  # time passes
)


@given(st.lists(HOSTILE, max_size=150), st.sampled_from((0, 1500, 6000, 20_000, LIMIT)))
def test_hostile_pieces_never_raise_and_stay_within_the_bound(
    pieces: list[tuple[bool, int, int, bool, int, int, float]], limit: int
) -> None:
    stack = FakeStack()
    stack.limits.reassembly_bytes = limit
    reassembly = Reassembly(stack)
    links = [FakeLink(str(number)) for number in range(3)]
    now = 0.0
    for ipv6, offset, length, more, ident, number, passed in pieces:
        now += passed
        stack.advance(now)
        packet = piece(ipv6, offset, bytes(length), more, ident)
        parsed = parse(packet)
        if parsed is None or not (parsed.more_fragments or parsed.fragment_offset):
            continue
        whole = reassembly.add(links[number], MAC, parsed, memoryview(packet), now)
        assert whole is None or len(whole) <= 65535 + 40
        assert 0 <= reassembly.cost <= limit
        held = [d for share in reassembly._shares.values() for d in share.datagrams.values()]
        assert reassembly.cost == sum(datagram.cost for datagram in held)
        assert all(len(datagram.pieces) <= MAX_PIECES for datagram in held)
    stack.advance(now + 61)
    assert len(reassembly) == reassembly.cost == 0


@given(st.lists(st.binary(min_size=1, max_size=120), max_size=30))
def test_garbage_never_raises(packets: list[bytes]) -> None:
    reassembly = Reassembly(FakeStack())
    for packet in packets:
        for version in (b"\x45", b"\x46", b"\x60"):
            garbage = version + packet
            parsed = parse(garbage)
            if parsed is not None and (parsed.more_fragments or parsed.fragment_offset):
                reassembly.add(LINK, MAC, parsed, memoryview(garbage), 0.0)
