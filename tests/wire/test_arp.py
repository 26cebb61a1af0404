"""wire.arp: one table both ways, every prefix, scapy as the oracle."""

from __future__ import annotations

import pytest
from scapy.layers.l2 import ARP

from netstack.wire import arp
from netstack.wire.arp import Arp

GUEST_MAC, GATEWAY_MAC = bytes.fromhex("525400123456"), bytes.fromhex("5255c0a80502")
GUEST, GATEWAY = bytes((192, 168, 5, 15)), bytes((192, 168, 5, 2))

SAMPLES = [
    (
        Arp(arp.REQUEST, GUEST_MAC, GUEST, bytes(6), GATEWAY),
        "0001 0800 06 04 0001 525400123456 c0a8050f 000000000000 c0a80502",
    ),
    (
        Arp(arp.REPLY, GATEWAY_MAC, GATEWAY, GUEST_MAC, GUEST),
        "0001 0800 06 04 0002 5255c0a80502 c0a80502 525400123456 c0a8050f",
    ),
    # RFC 5227 1.1: a probe asks without giving away an address.
    (
        Arp(arp.REQUEST, GUEST_MAC, bytes(4), bytes(6), GUEST),
        "0001 0800 06 04 0001 525400123456 00000000 000000000000 c0a8050f",
    ),
]


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: Arp, data: str) -> None:
    packet = bytes.fromhex(data)
    assert arp.write_arp(*fields) == packet
    assert arp.parse_arp(packet, 0, len(packet)) == fields
    # In a frame it comes behind 14 bytes, and padded to 60 (IEEE 802.3).
    assert arp.parse_arp(bytes(14) + packet + bytes(18), 14, 60) == fields
    for length in range(len(packet)):
        assert arp.parse_arp(packet[:length], 0, length) is None
        assert arp.parse_arp(bytes(14) + packet, 14, 14 + length) is None


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_scapy_reads_what_we_write(fields: Arp, data: str) -> None:
    packet = ARP(arp.write_arp(*fields))
    assert packet.op == fields.operation
    assert packet.hwsrc == fields.sender_mac.hex(":")
    assert packet.hwdst == fields.target_mac.hex(":")
    assert packet.psrc == ".".join(map(str, fields.sender_address))
    assert packet.pdst == ".".join(map(str, fields.target_address))


@pytest.mark.parametrize(
    ("at", "value", "what"),
    (
        (1, 6, "hardware that is not Ethernet"),
        (2, 0x86, "a protocol that is not IPv4"),
        (4, 8, "hardware addresses of 8 bytes"),
        (5, 16, "protocol addresses of 16 bytes"),
        (7, 0, "operation 0"),
        (7, 3, "a reverse ARP request"),
        (6, 1, "operation 257"),
    ),
)
def test_other_kinds_are_refused(at: int, value: int, what: str) -> None:
    packet = bytearray.fromhex(SAMPLES[0][1])
    packet[at] = value
    assert arp.parse_arp(packet, 0, len(packet)) is None, what
