"""wire.icmp: one table both ways, every prefix, when and how errors are answered and quoted, scapy as the oracle."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.layers.inet6 import (
    UDPerror as UDPerror6,
)
from scapy.packet import Packet, Raw

from netstack.wire import icmp
from netstack.wire.checksum import pseudo_sum, sum_words
from netstack.wire.icmp import Icmp, Problem, Quoted

GUEST, GATEWAY, PEER = "192.168.5.15", "192.168.5.2", "203.0.113.7"
GUEST6, GATEWAY6, PEER6 = "fd00:5::15", "fd00:5::2", "2001:db8::7"


def packed(address: str) -> bytes:
    return ip_address(address).packed


# identifier, sequence number, payload, whether it is the reply; the message.
ECHOES = [
    ((0x1234, 1, b"abcdefgh", False), "08 00 5435 1234 0001 6162636465666768"),
    ((0xFFFF, 0xFFFF, b"x", True), "00 00 87ff ffff ffff 78"),
]
ECHOES6 = [
    ((0x1234, 1, b"abcdefgh", False), "80 00 e1c7 1234 0001 6162636465666768"),
    ((7, 9, b"", True), "81 00 848a 0007 0009"),
]


@pytest.mark.parametrize(("fields", "data"), ECHOES)
def test_echo_both_ways(fields: tuple[int, int, bytes, bool], data: str) -> None:
    message = bytes.fromhex(data)
    ident, sequence, payload, reply = fields
    assert icmp.write_echo(ident, sequence, payload, reply=reply) == message
    kind = icmp.ECHO_REPLY if reply else icmp.ECHO_REQUEST
    assert icmp.parse_icmp(message, 0, len(message)) == Icmp(kind, 0, ident, sequence, 0, 8, len(message))
    shifted = icmp.parse_icmp(memoryview(b"..." + message + b".."), 3, 3 + len(message))
    assert shifted == Icmp(kind, 0, ident, sequence, 0, 11, 3 + len(message))
    for length in range(len(message)):
        assert (icmp.parse_icmp(message[:length], 0, length) is None) == (length < 8)
        assert (icmp.parse_icmp(b"..." + message, 3, 3 + length) is None) == (length < 8)


@pytest.mark.parametrize(("fields", "data"), ECHOES6)
def test_echo6_both_ways(fields: tuple[int, int, bytes, bool], data: str) -> None:
    message = bytes.fromhex(data)
    ident, sequence, payload, reply = fields
    assert icmp.write_echo6(packed(GUEST6), packed(GATEWAY6), ident, sequence, payload, reply=reply) == message
    kind = icmp.ECHO_REPLY6 if reply else icmp.ECHO_REQUEST6
    assert icmp.parse_icmp6(message, 0, len(message)) == Icmp(kind, 0, ident, sequence, 0, 8, len(message))
    for length in range(len(message)):
        assert (icmp.parse_icmp6(message[:length], 0, length) is None) == (length < 8)
        assert (icmp.parse_icmp6(b"..." + message, 3, 3 + length) is None) == (length < 8)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=40), st.integers(0, 60), st.booleans())
def test_scapy_agrees_on_echo(ident: int, sequence: int, payload: bytes, repeat: int, reply: bool) -> None:
    payload *= repeat
    ours = icmp.write_echo(ident, sequence, payload, reply=reply)
    theirs = bytes(ICMP(type=0 if reply else 8, id=ident, seq=sequence) / Raw(payload))
    # The same checksum, though zero has two spellings.
    assert ours[:2] + ours[4:] == theirs[:2] + theirs[4:]
    assert sum_words(ours) == 0

    ours = icmp.write_echo6(packed(GUEST6), packed(PEER6), ident, sequence, payload, reply=reply)
    message = (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=ident, seq=sequence, data=payload)
    theirs = bytes(IPv6(src=GUEST6, dst=PEER6) / message)[40:]
    assert ours[:2] + ours[4:] == theirs[:2] + theirs[4:]
    assert (sum_words(ours) + pseudo_sum(packed(GUEST6), packed(PEER6), 58, len(ours))) % 65535 == 0


@pytest.mark.parametrize(
    ("message", "parameter"),
    (
        (ICMP(type=3, code=4, nexthopmtu=1400), 1400),
        (ICMP(type=3, code=3, nexthopmtu=1400), 0),
        (ICMP(type=12, code=0, ptr=9), 9),
        (ICMP(type=5, code=4, gw="192.168.5.2"), 0),
        (ICMP(type=11, code=0), 0),
    ),
)
def test_parameters_of_errors(message: Packet, parameter: int) -> None:
    data = bytes(message)
    parsed = icmp.parse_icmp(data, 0, len(data))
    assert parsed is not None
    assert parsed.parameter == parameter
    assert icmp.is_error(parsed.type)


@pytest.mark.parametrize(
    ("message", "parameter"),
    (
        (ICMPv6PacketTooBig(mtu=1280), 1280),
        (ICMPv6PacketTooBig(mtu=0xFFFFFFFF), 0xFFFFFFFF),
        (ICMPv6ParamProblem(code=1, ptr=40), 40),
        (ICMPv6DestUnreach(code=4), 0),
    ),
)
def test_parameters_of_errors6(message: Packet, parameter: int) -> None:
    data = bytes(IPv6(src=PEER6, dst=GUEST6) / message)[40:]
    parsed = icmp.parse_icmp6(data, 0, len(data))
    assert parsed is not None
    assert parsed.parameter == parameter
    assert icmp.is_error6(parsed.type)


def from_guest(*layers: Packet, **fields: Any) -> bytes:
    packet = IP(**{"src": GUEST, "dst": PEER, **fields})
    for layer in layers:
        packet /= layer
    return bytes(packet)


def from_guest6(*layers: Packet, **fields: Any) -> bytes:
    packet = IPv6(**{"src": GUEST6, "dst": PEER6, **fields})
    for layer in layers:
        packet /= layer
    return bytes(packet)


# Types and codes as the RFCs number them: RFC 792, RFC 1122 3.2.2.1, RFC 1812 5.2.7.1, RFC 1191 4; RFC 4443 3.1 to 3.4.
PROBLEMS = [
    (icmp.NO_ROUTE, (3, 0), (1, 0)),
    (icmp.HOST_UNREACHABLE, (3, 1), (1, 3)),
    (icmp.PROTOCOL_UNREACHABLE, (3, 2), (4, 1)),
    (icmp.PORT_UNREACHABLE, (3, 3), (1, 4)),
    (icmp.PROHIBITED, (3, 13), (1, 1)),
    (icmp.TOO_BIG, (3, 4), (2, 0)),
    (icmp.TTL_EXCEEDED, (11, 0), (3, 0)),
    (icmp.REASSEMBLY_TIMEOUT, (11, 1), (3, 1)),
    (icmp.MALFORMED, (12, 0), (4, 0)),
]


@pytest.mark.parametrize(("problem", "expected", "_"), PROBLEMS)
def test_errors_as_scapy_reads_them(problem: Problem, expected: tuple[int, int], _: object) -> None:
    offending = from_guest(UDP(sport=5353, dport=9999), Raw(b"question"), ttl=7)
    error = icmp.write_error(packed(GATEWAY), offending, problem, 40)
    assert error is not None
    packet = IP(error)
    assert (packet.src, packet.dst, packet.proto, packet.len) == (GATEWAY, GUEST, 1, len(error))
    # RFC 1812 4.3.2.5: the precedence of network control.
    assert (packet.tos, packet.ttl) == (0xC0, 64)
    assert (packet[ICMP].type, packet[ICMP].code) == expected
    assert bytes(packet[IPerror])[: len(offending)] == offending
    assert packet[UDPerror].dport == 9999
    assert sum_words(error[:20]) == sum_words(error[20:]) == 0
    if problem is icmp.TOO_BIG:
        assert packet[ICMP].nexthopmtu == 40
    if problem is icmp.MALFORMED:
        assert packet[ICMP].ptr == 40


@pytest.mark.parametrize(("problem", "_", "expected"), PROBLEMS)
def test_errors6_as_scapy_reads_them(problem: Problem, _: object, expected: tuple[int, int]) -> None:
    offending = from_guest6(UDP(sport=5353, dport=9999), Raw(b"question"))
    error = icmp.write_error(packed(GATEWAY6), offending, problem, 40, ttl=255)
    assert error is not None
    packet = IPv6(error)
    assert (packet.src, packet.dst, packet.nh, packet.hlim) == (GATEWAY6, GUEST6, 58, 255)
    assert packet.plen == len(error) - 40
    layer = {1: ICMPv6DestUnreach, 2: ICMPv6PacketTooBig, 3: ICMPv6TimeExceeded, 4: ICMPv6ParamProblem}[expected[0]]
    assert packet[layer].code == expected[1]
    assert bytes(packet[IPerror6]) == offending
    assert packet[UDPerror6].dport == 9999
    assert (sum_words(error[40:]) + pseudo_sum(error[8:24], error[24:40], 58, len(error) - 40)) % 65535 == 0
    if problem.type6 == icmp.TOO_BIG6:
        assert packet[layer].mtu == 40
    if problem.type6 == icmp.PARAMETER_PROBLEM6:
        assert packet[layer].ptr == 40


@pytest.mark.parametrize("length", (0, 1, 500, 519, 520, 521, 548, 549, 1200, 1203, 1204, 1205, 1232, 5000))
def test_how_much_is_quoted(length: int) -> None:
    # RFC 1812 4.3.2.3: up to 576 bytes in all.
    offending = from_guest(UDP(), Raw(bytes(length)))
    error = icmp.write_error(packed(GATEWAY), offending, icmp.PORT_UNREACHABLE)
    assert error is not None
    assert len(error) == min(576, 28 + len(offending))
    assert error[28:] == offending[: len(error) - 28]
    # RFC 4443 2.4 (c): up to 1280 bytes in all.
    offending = from_guest6(UDP(), Raw(bytes(length)))
    error = icmp.write_error(packed(GATEWAY6), offending, icmp.PORT_UNREACHABLE)
    assert error is not None
    assert len(error) == min(1280, 48 + len(offending))
    assert error[48:] == offending[: len(error) - 48]


def test_padding_of_the_frame_is_not_quoted() -> None:
    offending = from_guest(UDP(sport=1, dport=2))
    error = icmp.write_error(packed(GATEWAY), memoryview(offending + b"secret of the last frame"), icmp.NO_ROUTE)
    assert error is not None
    assert error[28:] == offending


def test_a_parameter_too_large_for_its_field_is_the_largest() -> None:
    offending = from_guest(UDP())
    error = icmp.write_error(packed(GATEWAY), offending, icmp.TOO_BIG, 65536)
    assert error is not None
    assert error[24:28] == b"\0\0\xff\xff"
    error = icmp.write_error(packed(GATEWAY), offending, icmp.MALFORMED, 256)
    assert error is not None
    assert error[24:28] == b"\xff\0\0\0"
    error = icmp.write_error(packed(GATEWAY6), from_guest6(UDP()), icmp.TOO_BIG, 1 << 32)
    assert error is not None
    assert error[44:48] == b"\xff\xff\xff\xff"
    error = icmp.write_error(packed(GATEWAY6), from_guest6(UDP()), icmp.TOO_BIG)
    assert error is not None
    assert error[44:48] == bytes(4)
    error = icmp.write_error(packed(GATEWAY), offending, icmp.PORT_UNREACHABLE, 1234)
    assert error is not None
    assert error[24:28] == bytes(4)


def test_an_error_from_the_other_family_is_not_written() -> None:
    assert icmp.write_error(packed(GATEWAY6), from_guest(UDP()), icmp.NO_ROUTE) is None
    assert icmp.write_error(packed(GATEWAY), from_guest6(UDP()), icmp.NO_ROUTE) is None


@pytest.mark.parametrize(
    "packet",
    (
        from_guest(UDP()),
        from_guest(TCP()),
        from_guest(ICMP(type=8)),
        from_guest(ICMP(type=13)),
        from_guest(UDP(), Raw(bytes(100)), flags="MF"),  # the first fragment
        from_guest(Raw(b""), proto=99),
        from_guest6(UDP()),
        from_guest6(ICMPv6EchoRequest()),
        from_guest6(IPv6ExtHdrDestOpt(), UDP()),
        from_guest6(IPv6ExtHdrFragment(nh=17, m=1), Raw(bytes(16))),
        from_guest6(Raw(b"x"), nh=99),
        from_guest6(UDP(), src="fe80::1"),
        # The last and first hosts beside the ranges that are none.
        from_guest(UDP(), src="1.0.0.1", dst="223.255.255.254"),
        from_guest(UDP(), src="223.255.255.254", dst="1.0.0.1"),
        from_guest6(UDP(), src="::2", dst="::2"),
    ),
)
def test_what_may_be_answered_with_an_error(packet: bytes) -> None:
    assert icmp.may_answer_with_error(packet)
    assert icmp.write_error(packed(GATEWAY if packet[0] >> 4 == 4 else GATEWAY6), packet, icmp.NO_ROUTE)
    # Cut short it is malformed, and nothing is answered.
    for length in range(len(packet)):
        assert not icmp.may_answer_with_error(packet[:length])


@pytest.mark.parametrize(
    ("packet", "why"),
    (
        *[(from_guest(ICMP(type=kind)), f"ICMP error {kind}") for kind in (3, 4, 5, 11, 12)],
        (from_guest(Raw(b""), proto=1), "ICMP without a type"),
        (from_guest(UDP(), frag=1), "a fragment other than the first"),
        (from_guest(UDP(), dst="255.255.255.255"), "the broadcast address"),
        (from_guest(UDP(), dst="224.0.0.251"), "a multicast address"),
        (from_guest(UDP(), dst="240.0.0.1"), "class E"),
        (from_guest(UDP(), src="0.0.0.0"), "from nobody"),
        (from_guest(UDP(), src="0.1.2.3"), "from this network"),
        (from_guest(UDP(), src="127.0.0.1"), "from loopback"),
        (from_guest(UDP(), src="224.0.0.1"), "from a multicast address"),
        (from_guest(UDP(), src="255.255.255.255"), "from the broadcast address"),
        *[(from_guest6(Raw(bytes((kind,)) + bytes(7)), nh=58), f"error {kind}") for kind in (1, 2, 3, 4, 100, 127)],
        (from_guest6(ICMPv6ND_Redirect()), "a redirect"),
        (from_guest6(IPv6ExtHdrDestOpt(), ICMPv6DestUnreach()), "an error behind an extension header"),
        (from_guest6(IPv6ExtHdrDestOpt(nh=58, len=0)), "ICMPv6 without a type"),
        (from_guest6(IPv6ExtHdrFragment(nh=17, offset=1), Raw(b"x")), "a fragment other than the first"),
        (from_guest6(IPv6ExtHdrFragment(nh=60, m=1), Raw(bytes(16))), "a first fragment that hides its protocol"),
        (from_guest6(UDP(), dst="ff02::fb"), "a multicast address"),
        (from_guest6(ICMPv6ND_NS(), dst="ff02::1:ff00:2"), "a solicitation"),
        (from_guest6(ICMPv6MLReport2(), src="::", dst="ff02::16"), "from nobody to all"),
        (from_guest6(UDP(), src="::"), "from nobody"),
        (from_guest6(UDP(), src="::1"), "from loopback"),
        (from_guest6(UDP(), src="ff02::1"), "from a multicast address"),
        (b"", "nothing"),
        (b"\x45", "one byte"),
        (b"\x75" + bytes(60), "IP version 7"),
    ),
)
def test_what_must_not_be_answered_with_an_error(packet: bytes, why: str) -> None:
    assert not icmp.may_answer_with_error(packet), why
    for gateway in (GATEWAY, GATEWAY6):
        assert icmp.write_error(packed(gateway), packet, icmp.NO_ROUTE) is None, why


# What a guest may complain about: packets that netstack sent to it.
QUOTED = [
    (
        bytes(IP(src=PEER, dst=GUEST) / UDP(sport=53, dport=40000) / Raw(b"answer")),
        Quoted(packed(PEER), packed(GUEST), 17, 53, 40000, 0),
    ),
    (
        bytes(IP(src=PEER, dst=GUEST) / TCP(sport=443, dport=40001, seq=0xDEADBEEF) / Raw(b"data")),
        Quoted(packed(PEER), packed(GUEST), 6, 443, 40001, 0xDEADBEEF),
    ),
    (
        bytes(IP(src=PEER, dst=GUEST) / ICMP(type=0, id=77, seq=3) / Raw(b"pong")),
        Quoted(packed(PEER), packed(GUEST), 1, 77, 0, 3),
    ),
    (
        bytes(IP(src=PEER, dst=GUEST, proto=47) / Raw(b"tunnel..")),
        Quoted(packed(PEER), packed(GUEST), 47, 0, 0, 0),
    ),
    (
        bytes(IP(src=PEER, dst=GUEST, options=b"\x94\x04\0\0") / UDP(sport=53, dport=40000)),
        Quoted(packed(PEER), packed(GUEST), 17, 53, 40000, 0),
    ),
    (
        bytes(IPv6(src=PEER6, dst=GUEST6) / UDP(sport=53, dport=40000) / Raw(b"answer")),
        Quoted(packed(PEER6), packed(GUEST6), 17, 53, 40000, 0),
    ),
    (
        bytes(IPv6(src=PEER6, dst=GUEST6) / IPv6ExtHdrFragment(nh=6, m=1) / TCP(sport=443, dport=2, seq=5)),
        Quoted(packed(PEER6), packed(GUEST6), 6, 443, 2, 5),
    ),
    (
        bytes(IPv6(src=PEER6, dst=GUEST6) / ICMPv6EchoRequest(id=78, seq=4, data=b"ping")),
        Quoted(packed(PEER6), packed(GUEST6), 58, 78, 0, 4),
    ),
    (
        bytes(IPv6(src=PEER6, dst=GUEST6) / ICMPv6ND_NS(tgt=GUEST6)),
        Quoted(packed(PEER6), packed(GUEST6), 58, 0, 0, 0),
    ),
]


@pytest.mark.parametrize(("packet", "expected"), QUOTED)
def test_a_quoted_packet_tells_its_flow(packet: bytes, expected: Quoted) -> None:
    assert icmp.parse_quoted(packet, 0, len(packet)) == expected
    # Quoted within an error, and cut short there: 8 bytes behind the IP header suffice (RFC 792).
    readable = [
        length
        for length in range(len(packet) + 1)
        if icmp.parse_quoted(b"." * 28 + packet[:length], 28, 28 + length) == expected
    ]
    refused = [length for length in range(len(packet) + 1) if icmp.parse_quoted(packet[:length], 0, length) is None]
    assert sorted(readable + refused) == list(range(len(packet) + 1))
    transport = {4: (packet[0] & 15) * 4, 6: 48 if packet[6] == 44 else 40}[packet[0] >> 4]
    assert readable[0] == transport + 8


@pytest.mark.parametrize(("packet", "expected"), QUOTED)
def test_an_error_that_we_write_is_read_back(packet: bytes, expected: Quoted) -> None:
    error = icmp.write_error(packed(GUEST if len(expected.src) == 4 else GUEST6), packet, icmp.TTL_EXCEEDED)
    assert error is not None
    start = 20 if len(expected.src) == 4 else 40
    message = (icmp.parse_icmp if start == 20 else icmp.parse_icmp6)(error, start, len(error))
    assert message is not None
    assert icmp.parse_quoted(error, message.payload_start, message.payload_end) == expected


def test_a_later_fragment_tells_no_flow() -> None:
    packet = bytes(IP(src=PEER, dst=GUEST, proto=17, frag=185) / Raw(bytes(100)))
    assert icmp.parse_quoted(packet, 0, len(packet)) is None
    packet = bytes(IPv6(src=PEER6, dst=GUEST6) / IPv6ExtHdrFragment(nh=17, offset=181) / Raw(bytes(100)))
    assert icmp.parse_quoted(packet, 0, len(packet)) is None
