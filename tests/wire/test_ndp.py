"""Neighbor discovery messages: scapy writes what we read and reads what we write."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6NDOptUnknown,
    IPv6,
)

from netstack.wire.ipv6 import write_ipv6
from netstack.wire.ndp import (
    Prefix,
    parse_neighbor_advertisement,
    parse_neighbor_solicitation,
    parse_router_solicitation,
    solicited_node,
    write_neighbor_advertisement,
    write_neighbor_solicitation,
    write_router_advertisement,
)

MAC = bytes.fromhex("525400123456")
GATEWAY_MAC = bytes.fromhex("5255c0a80502")
GUEST = bytes.fromhex("fe80000000000000505400fffe123456")
GATEWAY = bytes.fromhex("fe800000000000005055c0fffea80502")
TARGET = bytes.fromhex("fd00c0a8000500000000000000000002")
ALL_NODES = bytes.fromhex("ff02") + bytes(13) + b"\x01"
UNSPECIFIED = bytes(16)
MAC_TEXT = "52:54:00:12:34:56"


def dissect(src: bytes, dst: bytes, body: bytes) -> Any:
    """Have scapy read a body as a whole packet, and check that it finds the checksum right."""
    whole = IPv6(write_ipv6(src, dst, 58, len(body), ttl=255) + body)
    again = IPv6(bytes(whole))
    del again.payload.cksum
    assert IPv6(bytes(again)).payload.cksum == whole.payload.cksum
    return whole.payload


def test_a_router_advertisement_with_everything() -> None:
    body = write_router_advertisement(
        GATEWAY,
        ALL_NODES,
        source_mac=GATEWAY_MAC,
        lifetime=1800,
        managed=True,
        other=True,
        mtu=65520,
        prefixes=(Prefix(TARGET[:8] + bytes(8), 64, 86400, 14400),),
        dns=(TARGET, TARGET[:15] + b"\x03"),
        search=("netstack.internal", "corp.example"),
        dns_lifetime=1800,
    )
    packet = dissect(GATEWAY, ALL_NODES, body)
    assert isinstance(packet, ICMPv6ND_RA)
    assert (packet.M, packet.O, packet.routerlifetime, packet.chlim) == (1, 1, 1800, 64)
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == "52:55:c0:a8:05:02"
    assert packet[ICMPv6NDOptMTU].mtu == 65520
    prefix = packet[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00:c0a8:5::", 64, 1, 1)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (86400, 14400)
    assert packet[ICMPv6NDOptRDNSS].dns == ["fd00:c0a8:5::2", "fd00:c0a8:5::3"]
    assert packet[ICMPv6NDOptDNSSL].searchlist == ["netstack.internal.", "corp.example."]
    assert packet[ICMPv6NDOptDNSSL].lifetime == packet[ICMPv6NDOptRDNSS].lifetime == 1800
    assert len(body) % 8 == 0


def test_a_router_advertisement_with_nothing() -> None:
    packet = dissect(GATEWAY, GUEST, write_router_advertisement(GATEWAY, GUEST, source_mac=GATEWAY_MAC, lifetime=0))
    assert (packet.M, packet.O, packet.routerlifetime) == (0, 0, 0)
    assert ICMPv6NDOptMTU not in packet
    assert ICMPv6NDOptPrefixInfo not in packet
    assert ICMPv6NDOptRDNSS not in packet
    assert ICMPv6NDOptDNSSL not in packet


def test_a_search_list_that_no_option_can_hold_is_left_out() -> None:
    body = write_router_advertisement(
        GATEWAY, GUEST, source_mac=GATEWAY_MAC, lifetime=0, search=[f"{'a' * 60}.zone{n}.test" for n in range(40)]
    )
    assert ICMPv6NDOptDNSSL not in dissect(GATEWAY, GUEST, body)


@pytest.mark.parametrize("solicited", (False, True))
def test_a_neighbor_advertisement(solicited: bool) -> None:
    body = write_neighbor_advertisement(TARGET, GUEST, TARGET, target_mac=GATEWAY_MAC, solicited=solicited)
    packet = dissect(TARGET, GUEST, body)
    assert isinstance(packet, ICMPv6ND_NA)
    assert (packet.R, packet.S, packet.O, packet.tgt) == (1, solicited, 1, "fd00:c0a8:5::2")
    assert packet[ICMPv6NDOptDstLLAddr].lladdr == "52:55:c0:a8:05:02"
    read = parse_neighbor_advertisement(body, 0, len(body), dst=GUEST)
    assert read == (TARGET, True, solicited, True, GATEWAY_MAC)


def test_a_neighbor_solicitation() -> None:
    group = solicited_node(TARGET)
    assert group == bytes.fromhex("ff0200000000000000000001ff000002")
    body = write_neighbor_solicitation(GATEWAY, group, TARGET, source_mac=GATEWAY_MAC)
    packet = dissect(GATEWAY, group, body)
    assert isinstance(packet, ICMPv6ND_NS)
    assert packet.tgt == "fd00:c0a8:5::2"
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == "52:55:c0:a8:05:02"
    assert parse_neighbor_solicitation(body, 0, len(body), src=GATEWAY, dst=group) == (TARGET, GATEWAY_MAC)


def test_messages_inside_a_larger_buffer() -> None:
    body = bytes(ICMPv6ND_NS(tgt="fd00:c0a8:5::2") / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT))
    buffer = memoryview(b"\xff" * 7 + body + b"\xff" * 9)
    assert parse_neighbor_solicitation(buffer, 7, 7 + len(body), src=GUEST, dst=TARGET) == (TARGET, MAC)


def test_router_solicitations() -> None:
    bare = bytes(ICMPv6ND_RS())
    full = bytes(ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT))
    odd = bytes(ICMPv6ND_RS() / ICMPv6NDOptUnknown(type=14, data=b"nonce!") / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT))
    assert parse_router_solicitation(bare, 0, 8, src=UNSPECIFIED) == (None,)
    assert parse_router_solicitation(full, 0, 16, src=GUEST) == (MAC,)
    assert parse_router_solicitation(odd, 0, len(odd), src=GUEST) == (MAC,)
    assert parse_router_solicitation(full, 0, 16, src=UNSPECIFIED) is None  # RFC 4861 6.1.1
    assert parse_router_solicitation(b"\x85\x01" + bare[2:], 0, 8, src=GUEST) is None  # code
    assert parse_router_solicitation(b"\x86" + bare[1:], 0, 8, src=GUEST) is None  # type


def test_duplicate_address_detection() -> None:
    body = bytes(ICMPv6ND_NS(tgt="fd00:c0a8:5::2"))
    with_mac = bytes(ICMPv6ND_NS(tgt="fd00:c0a8:5::2") / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT))
    group = solicited_node(TARGET)
    assert parse_neighbor_solicitation(body, 0, 24, src=UNSPECIFIED, dst=group) == (TARGET, None)
    assert parse_neighbor_solicitation(body, 0, 24, src=UNSPECIFIED, dst=TARGET) is None
    assert parse_neighbor_solicitation(with_mac, 0, 32, src=UNSPECIFIED, dst=group) is None


@pytest.mark.parametrize("target", ("ff02::1", "ff05::1:3"))
def test_groups_are_no_targets(target: str) -> None:
    body = bytes(ICMPv6ND_NS(tgt=target))
    assert parse_neighbor_solicitation(body, 0, 24, src=GUEST, dst=TARGET) is None
    assert parse_neighbor_advertisement(bytes(ICMPv6ND_NA(tgt=target)), 0, 24, dst=TARGET) is None


def test_an_advertisement_to_all_is_not_solicited() -> None:
    body = bytes(ICMPv6ND_NA(tgt="fe80::1", S=1))
    assert parse_neighbor_advertisement(body, 0, 24, dst=ALL_NODES) is None
    assert parse_neighbor_advertisement(body, 0, 24, dst=TARGET) is not None


@pytest.mark.parametrize(
    "options",
    (
        b"\x01\x00" + MAC,  # RFC 4861 4.6: a length of 0
        b"\x01\x02" + MAC,  # past the end
        b"\x01",  # half a head
        b"\x0e\x01" + bytes(6) + b"\x01",
        b"\x0e\x01" * 4 * 65,  # more options than anybody sends
    ),
)
def test_options_that_do_not_add_up(options: bytes) -> None:
    body = bytes(ICMPv6ND_NS(tgt="fd00:c0a8:5::2")) + options
    assert parse_neighbor_solicitation(body, 0, len(body), src=GUEST, dst=TARGET) is None
    body = bytes(ICMPv6ND_RS()) + options
    assert parse_router_solicitation(body, 0, len(body), src=GUEST) is None


@pytest.mark.parametrize("lladdr", (bytes(6), b"\xff" * 6, b"\x33\x33\0\0\0\1"))
def test_what_is_no_guests_mac_counts_as_none(lladdr: bytes) -> None:
    body = bytes(ICMPv6ND_NS(tgt="fd00:c0a8:5::2")) + b"\x01\x01" + lladdr
    assert parse_neighbor_solicitation(body, 0, len(body), src=GUEST, dst=TARGET) == (TARGET, None)


def test_every_prefix_is_refused_quietly() -> None:
    for whole in (
        bytes(ICMPv6ND_NS(tgt="fd00::2") / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT)),
        bytes(ICMPv6ND_NA(tgt="fd00::2") / ICMPv6NDOptDstLLAddr(lladdr=MAC_TEXT)),
        bytes(ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT)),
    ):
        for end in range(len(whole)):
            for buffer in (whole, whole[:end]):
                results = (
                    parse_router_solicitation(buffer, 0, end, src=GUEST),
                    parse_neighbor_solicitation(buffer, 0, end, src=GUEST, dst=TARGET),
                    parse_neighbor_advertisement(buffer, 0, end, dst=TARGET),
                )
                # Whole without its option it is a message too.
                assert (results == (None, None, None)) == (end != len(whole) - 8)


@given(st.sampled_from([133, 134, 135, 136]), st.binary(max_size=120))
def test_any_bytes_are_survived(kind: int, rest: bytes) -> None:
    body = bytes((kind, 0)) + rest
    parse_router_solicitation(body, 0, len(body), src=GUEST)
    parse_neighbor_solicitation(body, 0, len(body), src=GUEST, dst=TARGET)
    parse_neighbor_advertisement(body, 0, len(body), dst=TARGET)
