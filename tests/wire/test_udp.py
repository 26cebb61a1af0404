"""wire.udp: one table both ways, every prefix, lying lengths, scapy as the oracle."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from netstack.wire import udp
from netstack.wire.udp import Udp

GUEST, GATEWAY = bytes((192, 168, 5, 15)), bytes((192, 168, 5, 2))
GUEST6, GATEWAY6 = ip_address("fd00:5::15").packed, ip_address("fd00:5::2").packed

# Addresses, ports, payload; the datagram.
SAMPLES = [
    ((GUEST, GATEWAY, 68, 67, b"hello"), "0044 0043 000d 3019 68656c6c6f"),
    ((GUEST6, GATEWAY6, 53, 65535, b""), "0035 ffff 0008 0587"),
]


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: tuple[bytes, bytes, int, int, bytes], data: str) -> None:
    datagram = bytes.fromhex(data)
    assert udp.write_udp(*fields) == datagram
    sum_of_it = int.from_bytes(datagram[6:8], "big")
    assert udp.parse_udp(datagram, 0, len(datagram)) == Udp(fields[2], fields[3], sum_of_it, 8, len(datagram))
    # Within a larger buffer; what follows the length by the header is not payload.
    parsed = udp.parse_udp(memoryview(b"...." + datagram + b"rest"), 4, 8 + len(datagram))
    assert parsed == Udp(fields[2], fields[3], sum_of_it, 12, 4 + len(datagram))
    for length in range(len(datagram)):
        assert udp.parse_udp(datagram[:length], 0, length) is None
        assert udp.parse_udp(b"...." + datagram, 4, 4 + length) is None


@pytest.mark.parametrize("length", (0, 1, 7, 14, 0x0D00, 0xFFFF))
def test_a_lying_length_is_refused(length: int) -> None:
    datagram = bytearray.fromhex(SAMPLES[0][1])
    datagram[4:6] = length.to_bytes(2, "big")
    assert udp.parse_udp(datagram, 0, len(datagram)) is None


def test_a_short_length_cuts_the_payload() -> None:
    datagram = bytearray.fromhex(SAMPLES[0][1])
    datagram[5] = 10
    parsed = udp.parse_udp(datagram, 0, len(datagram))
    assert parsed is not None
    assert datagram[parsed.payload_start : parsed.payload_end] == b"he"


@given(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=40), st.integers(0, 60), st.booleans())
def test_scapy_agrees(src_port: int, dst_port: int, payload: bytes, repeat: int, six: bool) -> None:
    payload *= repeat
    src, dst = (GUEST6, GATEWAY6) if six else (GUEST, GATEWAY)
    ip = IPv6 if six else IP
    theirs = ip(src=str(ip_address(src)), dst=str(ip_address(dst))) / UDP(sport=src_port, dport=dst_port) / Raw(payload)
    assert bytes(theirs)[40 if six else 20 :] == udp.write_udp(src, dst, src_port, dst_port, payload)


def test_a_checksum_of_zero_is_sent_as_all_ones() -> None:
    datagram = udp.write_udp(GUEST, GATEWAY, 1, 2, b"\0\0")
    short = int.from_bytes(datagram[6:8], "big")
    # This payload takes the sum to zero (RFC 768).
    assert udp.write_udp(GUEST, GATEWAY, 1, 2, short.to_bytes(2, "big"))[6:8] == b"\xff\xff"
