"""wire.ethernet: one table both ways, MAC addresses, scapy as the oracle."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from scapy.layers.l2 import Ether
from scapy.utils6 import in6_getnsmac

from netstack.wire import ethernet
from netstack.wire.ethernet import Ethernet

GUEST = bytes.fromhex("525400123456")
GATEWAY = bytes.fromhex("5255c0a80502")

SAMPLES = [
    ((GATEWAY, GUEST, ethernet.ETHERTYPE_IPV4), "5255c0a80502 525400123456 0800"),
    ((ethernet.BROADCAST, GUEST, ethernet.ETHERTYPE_ARP), "ffffffffffff 525400123456 0806"),
    ((GUEST, GATEWAY, ethernet.ETHERTYPE_IPV6), "525400123456 5255c0a80502 86dd"),
]


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: tuple[bytes, bytes, int], data: str) -> None:
    header = bytes.fromhex(data)
    assert ethernet.write_ethernet(*fields) == header
    assert ethernet.parse_ethernet(header + b"payload", 0, 21) == Ethernet(*fields, 14)
    assert ethernet.parse_ethernet(b"xyz" + header, 3, 17) == Ethernet(*fields, 17)
    for length in range(14):
        assert ethernet.parse_ethernet(header[:length], 0, length) is None
        assert ethernet.parse_ethernet(b"xyz" + header, 3, 3 + length) is None
    frame = Ether(header)
    assert (frame.dst, frame.src, frame.type) == (
        ethernet.format_mac(fields[0]),
        ethernet.format_mac(fields[1]),
        fields[2],
    )


def test_group_bit() -> None:
    assert ethernet.is_multicast(ethernet.BROADCAST)
    assert ethernet.is_multicast(bytes.fromhex("01005e0000fb"))
    assert ethernet.is_multicast(bytes.fromhex("3333ff123456"))
    assert not ethernet.is_multicast(GUEST)
    assert not ethernet.is_multicast(bytes(6))


@pytest.mark.parametrize(
    ("address", "mac"),
    (
        ("224.0.0.251", "01:00:5e:00:00:fb"),
        ("225.1.2.3", "01:00:5e:01:02:03"),
        ("239.255.255.250", "01:00:5e:7f:ff:fa"),  # the high bit of the second byte is lost (RFC 1112 6.4)
        ("ff02::1", "33:33:00:00:00:01"),
        ("ff02::1:ff12:3456", "33:33:ff:12:34:56"),
    ),
)
def test_multicast_mac(address: str, mac: str) -> None:
    packed = ip_address(address).packed
    assert ethernet.format_mac(ethernet.multicast_mac(packed)) == mac
    if len(packed) == 16:
        assert in6_getnsmac(packed) == mac


@pytest.mark.parametrize("text", ("52:54:00:12:34:56", "52-54-00-12-34-56", " 52:54:0:12:34:56 "))
def test_macs_as_people_write_them(text: str) -> None:
    assert ethernet.parse_mac(text) == GUEST
    assert ethernet.format_mac(GUEST) == "52:54:00:12:34:56"


@pytest.mark.parametrize("text", ("", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5g", "525400123456"))
@pytest.mark.parametrize("suffix", ("", ":"))
def test_what_is_no_mac(text: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="is not a MAC address"):
        ethernet.parse_mac(text + suffix)


def test_a_sign_or_a_space_is_no_digit() -> None:
    for text in ("52:54:00:12:34:+6", "52:54:00:12:34: 6", "52:54:00:12:34:", "52:54:00:12:34:0x6"):
        with pytest.raises(ValueError, match="is not a MAC address"):
            ethernet.parse_mac(text)


def test_the_largest_ip_packet_fits_a_frame() -> None:
    assert ethernet.MAX_FRAME == 14 + 65535
    assert ethernet.MIN_FRAME + 4 == 64
