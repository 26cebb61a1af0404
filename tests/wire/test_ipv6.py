"""wire.ipv6: one table both ways, every prefix, extension headers, lying lengths, scapy as the oracle."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment

from netstack.wire import ipv6
from netstack.wire.ipv6 import Ipv6

GUEST, GATEWAY = IPv6Address("fd00:5::15").packed, IPv6Address("fd00:5::2").packed

SAMPLES: list[tuple[dict[str, Any], str]] = [
    (
        {"src": GUEST, "dst": GATEWAY, "protocol": 17, "payload_length": 8},
        "60000000 0008 11 40 fd000005000000000000000000000015 fd000005000000000000000000000002",
    ),
    (
        {
            "src": GUEST,
            "dst": GATEWAY,
            "protocol": 58,
            "payload_length": 1000,
            "ttl": 255,
            "tos": 0xB8,
            "flow_label": 0x12345,
        },
        "6b812345 03e8 3a ff fd000005000000000000000000000015 fd000005000000000000000000000002",
    ),
]

# Extension headers, with the protocol that they begin with and their bytes less the first, which names what follows.
HOP_BY_HOP = (0, bytes.fromhex("00 0502 0000 0100"))  # Router Alert, PadN: what MLD sends (RFC 2710 3)
DESTINATION = (60, bytes.fromhex("01 010c 000000000000000000000000"))  # PadN of 14 bytes
ROUTING_DONE = (43, bytes.fromhex("02 04 00 00000000" + "00" * 16))  # segment routing, no segments left
AUTHENTICATION = (51, bytes.fromhex("04 0000 00000001 00000001" + "00" * 12))
ATOMIC = (44, bytes.fromhex("00 0000 deadbeef"))
FIRST = (44, bytes.fromhex("00 0001 deadbeef"))
SECOND = (44, bytes.fromhex("00 05a9 deadbeef"))
LAST = (44, bytes.fromhex("00 0b50 deadbeef"))


def packet(*headers: tuple[int, bytes], protocol: int = 17, payload: bytes = b"payload!") -> bytes:
    body = payload
    for kind, rest in reversed(headers):
        body = bytes([protocol]) + rest + body
        protocol = kind
    return ipv6.write_ipv6(GUEST, GATEWAY, protocol, len(body)) + body


def parse(data: bytes) -> Ipv6 | None:
    return ipv6.parse_ipv6(data, 0, len(data))


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: dict[str, Any], data: str) -> None:
    header = bytes.fromhex(data)
    assert ipv6.write_ipv6(**fields) == header
    whole = header + bytes(fields["payload_length"])
    expected = Ipv6(
        fields["src"],
        fields["dst"],
        fields["protocol"],
        fields.get("ttl", 64),
        fields.get("tos", 0),
        0,
        True,
        False,
        0,
        40,
        len(whole),
        0,
        6,
    )
    assert parse(whole) == expected
    frame = bytes(14) + whole + bytes(30)
    assert ipv6.parse_ipv6(memoryview(frame), 14, len(frame)) == expected._replace(
        payload_start=54, payload_end=14 + len(whole), header_start=14, protocol_at=20
    )
    for length in range(len(whole)):
        assert parse(whole[:length]) is None
        assert ipv6.parse_ipv6(frame, 14, 14 + length) is None


@given(
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.integers(61, 255),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 0xFFFFF),
    st.integers(1, 64),
)
def test_scapy_agrees(src: bytes, dst: bytes, protocol: int, ttl: int, tos: int, label: int, length: int) -> None:
    written = ipv6.write_ipv6(src, dst, protocol, length, ttl=ttl, tos=tos, flow_label=label)
    theirs = IPv6(
        src=str(IPv6Address(src)), dst=str(IPv6Address(dst)), nh=protocol, hlim=ttl, tc=tos, fl=label, plen=length
    )
    assert written == bytes(theirs)
    parsed = parse(written + bytes(length))
    assert parsed is not None
    assert parsed == Ipv6(src, dst, protocol, ttl, tos, 0, True, False, 0, 40, 40 + length, 0, 6)


@pytest.mark.parametrize(
    "headers",
    (
        (HOP_BY_HOP,),
        (DESTINATION,),
        (ROUTING_DONE,),
        (AUTHENTICATION,),
        (ATOMIC,),
        (HOP_BY_HOP, DESTINATION, ROUTING_DONE, ATOMIC, AUTHENTICATION, DESTINATION),  # the order of RFC 8200 4.1
    ),
)
def test_extension_headers_are_walked(headers: tuple[tuple[int, bytes], ...]) -> None:
    data = packet(*headers)
    parsed = parse(data)
    assert parsed is not None
    assert parsed.protocol == 17
    assert data[parsed.protocol_at] == 17
    assert data[parsed.payload_start : parsed.payload_end] == b"payload!"
    assert (parsed.fragment_offset, parsed.more_fragments) == (0, False)
    # Cut anywhere, or with a payload length that ends anywhere, it is refused or ends where it says.
    for length in range(len(data)):
        assert parse(data[:length]) is None
    shorter = bytearray(data)
    for length in range(1, len(data) - 40):
        shorter[4:6] = length.to_bytes(2, "big")
        cut = parse(bytes(shorter))
        assert cut is None or cut.payload_end == 40 + length >= cut.payload_start


@pytest.mark.parametrize("header", (HOP_BY_HOP, DESTINATION, ATOMIC))
def test_no_next_header(header: tuple[int, bytes]) -> None:
    parsed = parse(packet(header, protocol=ipv6.NO_NEXT_HEADER, payload=b""))
    assert parsed is not None
    assert parsed.protocol == ipv6.NO_NEXT_HEADER
    assert parsed.payload_start == parsed.payload_end


def test_fragments_are_reported_and_not_looked_into() -> None:
    for header, offset, more in ((FIRST, 0, True), (SECOND, 1448, True), (LAST, 2896, False)):
        # What looks like a malformed extension header behind the fragment header is not read.
        data = packet(HOP_BY_HOP, header, protocol=60, payload=b"\xff" * 8)
        parsed = parse(data)
        assert parsed is not None
        assert (parsed.protocol, parsed.ident) == (60, 0xDEADBEEF)
        assert (parsed.fragment_offset, parsed.more_fragments) == (offset, more)
        assert (parsed.payload_start, parsed.payload_end) == (56, 64)
        assert parsed.protocol_at == 48


@pytest.mark.parametrize(
    ("offset", "more", "data"),
    ((0, True, "11000001deadbeef"), (1448, True, "110005a9deadbeef"), (65528, False, "1100fff8deadbeef")),
)
def test_fragment_header_both_ways(offset: int, more: bool, data: str) -> None:
    header = ipv6.write_fragment_header(17, offset, more, 0xDEADBEEF)
    assert header.hex() == data
    assert bytes(IPv6ExtHdrFragment(nh=17, offset=offset >> 3, m=more, id=0xDEADBEEF)) == header
    parsed = parse(ipv6.write_ipv6(GUEST, GATEWAY, ipv6.FRAGMENT, 15) + header + b"payload")
    assert parsed is not None
    assert (parsed.protocol, parsed.fragment_offset, parsed.more_fragments) == (17, offset, more)


def test_a_fragment_cannot_end_beyond_the_largest_payload() -> None:
    header = ipv6.write_fragment_header(17, 65528, False, 1)
    assert parse(ipv6.write_ipv6(GUEST, GATEWAY, ipv6.FRAGMENT, 16) + header + b"8 bytes!") is None


@pytest.mark.parametrize(
    ("data", "what"),
    (
        (b"\x40" + packet()[1:], "version 4"),
        (ipv6.write_ipv6(GUEST, GATEWAY, 17, 0), "no payload length (RFC 2675)"),
        (ipv6.write_ipv6(GUEST, GATEWAY, 17, 9) + b"payload!", "a payload length beyond the frame"),
        (packet((43, bytes.fromhex("02 00 00 00000000" + "00" * 16))), "routing type 0 (RFC 5095)"),
        (packet((43, bytes.fromhex("02 00 01 00000000" + "00" * 16))), "routing type 0 with segments left"),
        (packet((43, bytes.fromhex("02 04 01 00000000" + "00" * 16))), "segments left (RFC 8200 4.4)"),
        (packet(DESTINATION, HOP_BY_HOP), "hop-by-hop options that do not come first"),
        (packet(HOP_BY_HOP, HOP_BY_HOP), "hop-by-hop options twice"),
        (packet((0, bytes.fromhex("00 c204 00010000"))), "a jumbo payload option"),
        (packet((60, bytes.fromhex("00 4004 00000000"))), "an unknown option that asks to be discarded"),
        (packet((60, bytes.fromhex("00 8004 00000000"))), "an unknown option that asks for an error as well"),
        (packet((60, bytes.fromhex("00 0105 00000000"))), "an option that ends beyond its header"),
        (packet((60, bytes.fromhex("00 0102 0000 0001"))), "an option without a length"),
        (packet((60, bytes.fromhex("00 0102 0000 0001")), protocol=59, payload=b""), "such at the packet's end"),
        (packet((60, bytes.fromhex("02 0104 00000000"))), "an extension header beyond the packet"),
        (packet((51, bytes.fromhex("ff 0000 00000001"))), "an authentication header beyond the packet"),
        (packet(*[DESTINATION] * 9), "nine extension headers"),
        (packet(*[ATOMIC] * 2000), "two thousand extension headers"),
    ),
)
def test_what_is_refused(data: bytes, what: str) -> None:
    assert parse(data) is None, what


def test_eight_extension_headers_are_read() -> None:
    parsed = parse(packet(*[DESTINATION] * 8))
    assert parsed is not None
    assert parsed.protocol == 17


def test_a_lone_pad_and_an_unknown_option_to_skip() -> None:
    parsed = parse(packet((60, bytes.fromhex("00 00 1e02 0000 00"))))
    assert parsed is not None
    assert parsed.protocol == 17


def test_a_quoted_packet_may_be_cut_short() -> None:
    data = packet(DESTINATION, payload=b"x" * 1000)
    for length in range(56, len(data) + 1):
        parsed = ipv6.parse_ipv6(data[:length], 0, length, quoted=True)
        assert parsed is not None
        assert (parsed.protocol, parsed.payload_end) == (17, length)
    for length in range(56):
        assert ipv6.parse_ipv6(data[:length], 0, length, quoted=True) is None
