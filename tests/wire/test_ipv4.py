"""wire.ipv4: one table both ways, every prefix, lying lengths, scapy as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP

from netstack.wire import ipv4
from netstack.wire.checksum import sum_words
from netstack.wire.ipv4 import Ipv4

GUEST, GATEWAY = bytes((192, 168, 5, 15)), bytes((192, 168, 5, 2))

# Keyword arguments of write_ipv4, the header that they make.
SAMPLES: list[tuple[dict[str, Any], str]] = [
    (
        {"src": GUEST, "dst": GATEWAY, "protocol": 17, "payload_length": 8},
        "4500001c 00004000 4011af6f c0a8050f c0a80502",
    ),
    (
        {
            "src": GUEST,
            "dst": GATEWAY,
            "protocol": 6,
            "payload_length": 1480,
            "ttl": 1,
            "tos": 0xB8,
            "ident": 0xBEEF,
            "dont_fragment": False,
            "more_fragments": True,
            "fragment_offset": 1480,
        },
        "45b805dc beef20b9 0106485a c0a8050f c0a80502",
    ),
]


def sample(payload: bytes) -> bytes:
    return ipv4.write_ipv4(GUEST, GATEWAY, 17, len(payload)) + payload


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: dict[str, Any], data: str) -> None:
    header = bytes.fromhex(data)
    assert ipv4.write_ipv4(**fields) == header
    assert sum_words(header) == 0  # which is how a receiver verifies it
    packet = header + bytes(fields["payload_length"])
    expected = Ipv4(
        fields["src"],
        fields["dst"],
        fields["protocol"],
        fields.get("ttl", 64),
        fields.get("tos", 0),
        fields.get("ident", 0),
        fields.get("dont_fragment", True),
        fields.get("more_fragments", False),
        fields.get("fragment_offset", 0),
        20,
        len(packet),
        0,
    )
    assert ipv4.parse_ipv4(packet, 0, len(packet)) == expected
    # Behind an Ethernet header, with padding behind it that does not belong to the packet.
    shifted = expected._replace(payload_start=34, payload_end=14 + len(packet), header_start=14)
    frame = bytes(14) + packet + bytes(30)
    assert ipv4.parse_ipv4(memoryview(frame), 14, len(frame)) == shifted
    for length in range(len(packet)):
        assert ipv4.parse_ipv4(packet[:length], 0, length) is None
        assert ipv4.parse_ipv4(frame, 14, 14 + length) is None


@given(
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=4, max_size=4),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.integers(0, 0x1FFF),
    st.booleans(),
    st.booleans(),
    st.integers(0, 64),
)
def test_scapy_agrees(
    src: bytes, dst: bytes, protocol: int, ttl: int, tos: int, ident: int, offset: int, df: bool, mf: bool, length: int
) -> None:
    written = ipv4.write_ipv4(
        src,
        dst,
        protocol,
        length,
        ttl=ttl,
        tos=tos,
        ident=ident,
        dont_fragment=df,
        more_fragments=mf,
        fragment_offset=8 * offset,
    )
    theirs = IP(
        src=".".join(map(str, src)),
        dst=".".join(map(str, dst)),
        proto=protocol,
        ttl=ttl,
        tos=tos,
        id=ident,
        flags=df * 2 + mf,
        frag=offset,
        len=20 + length,
    )
    # The checksum may be the other zero.
    assert bytes(theirs)[:10] == written[:10]
    assert bytes(theirs)[12:20] == written[12:]
    assert sum_words(written) == 0
    parsed = ipv4.parse_ipv4(written + bytes(length), 0, 20 + length)
    if 8 * offset + 20 + length > 65535:
        assert parsed is None
    else:
        assert parsed == Ipv4(src, dst, protocol, ttl, tos, ident, df, mf, 8 * offset, 20, 20 + length, 0)


def test_options_are_skipped() -> None:
    packet = bytes(IP(src="192.168.5.15", dst="192.168.5.2", proto=17, options=b"\x94\x04\0\0" + b"\x01" * 8) / b"data")
    parsed = ipv4.parse_ipv4(packet, 0, len(packet))
    assert parsed is not None
    assert packet[parsed.payload_start : parsed.payload_end] == b"data"
    assert parsed.payload_start == 32


@pytest.mark.parametrize(
    ("changes", "what"),
    (
        ({0: 0x65}, "version 6"),
        ({0: 0x05}, "version 0"),
        ({0: 0x44}, "a header of 16 bytes"),
        ({0: 0x40}, "a header of 0 bytes"),
        ({0: 0x4F}, "a header of 60 bytes in a packet of 28"),
        ({3: 29}, "a total length beyond the frame"),
        ({2: 0xFF}, "a total length far beyond the frame"),
        ({3: 19}, "a total length below the header"),
        ({3: 0}, "a total length of 0, as segmentation offload leaves it in captures"),
        ({0: 0x46, 3: 23}, "a total length that ends within the options"),
        ({6: 0x1F, 7: 0xFF}, "a fragment that ends beyond 65535"),
    ),
)
def test_lies_are_refused(changes: dict[int, int], what: str) -> None:
    packet = bytearray(sample(b"payload!"))
    for at, value in changes.items():
        packet[at] = value
    assert ipv4.parse_ipv4(packet, 0, len(packet)) is None, what


def test_the_last_fragment_of_the_largest_packet_is_no_lie() -> None:
    header = ipv4.write_ipv4(GUEST, GATEWAY, 17, 3, dont_fragment=False, fragment_offset=65512)
    parsed = ipv4.parse_ipv4(header + b"abc", 0, 23)
    assert parsed is not None
    assert parsed.fragment_offset == 65512
    header = ipv4.write_ipv4(GUEST, GATEWAY, 17, 4, dont_fragment=False, fragment_offset=65512)
    assert ipv4.parse_ipv4(header + b"abcd", 0, 24) is None


def test_a_quoted_packet_may_be_cut_short() -> None:
    packet = sample(b"x" * 1000)
    for length in range(20, len(packet) + 1):
        parsed = ipv4.parse_ipv4(packet[:length], 0, length, quoted=True)
        assert parsed is not None
        assert parsed.payload_end == length
    assert ipv4.parse_ipv4(packet[:19], 0, 19, quoted=True) is None
