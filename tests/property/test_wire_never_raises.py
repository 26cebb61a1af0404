"""Whatever bytes come from a guest, wherever they are said to begin and end, no parser of wire raises or reads outside.

What a parser returns is held to its own promises as well: offsets in order and within what it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstack.wire import arp, ethernet, icmp, ipv4, ipv6, tcp, udp
from netstack.wire.checksum import sum_words

Region = tuple[bytes, int, int]

GUEST, PEER = bytes((192, 168, 5, 15)), bytes((203, 0, 113, 7))
GUEST6, PEER6 = bytes.fromhex("fd000005000000000000000000000015"), bytes.fromhex("20010db8000000000000000000000007")


def _packets() -> list[bytes]:
    """Real packets to be damaged: hypothesis seldom comes upon a checksum, a version and two lengths that fit."""
    segment = tcp.write_tcp(GUEST, PEER, 40000, 443, 1, 0, tcp.SYN, 64240, b"x", tcp.write_syn_options(1460, 7, True))
    datagram = udp.write_udp(GUEST, PEER, 40000, 53, b"question")
    datagram6 = udp.write_udp(GUEST6, PEER6, 40000, 53, b"question")
    echo6 = icmp.write_echo6(GUEST6, PEER6, 1, 2, b"ping", reply=False)
    packets = [
        ipv4.write_ipv4(GUEST, PEER, 6, len(segment)) + segment,
        ipv4.write_ipv4(GUEST, PEER, 17, len(datagram)) + datagram,
        ipv6.write_ipv6(GUEST6, PEER6, 17, len(datagram6)) + datagram6,
        ipv6.write_ipv6(GUEST6, PEER6, 58, len(echo6)) + echo6,
    ]
    # Hop-by-hop, destination options, routing, AH, fragment, in front of UDP.
    headers = bytes.fromhex("3c00050200000100 2b00010400000000 3300040000000000 2c01000000000001 11000001deadbeef")
    packets.append(ipv6.write_ipv6(GUEST6, PEER6, 0, len(headers + datagram6)) + headers + datagram6)
    for packet, gateway in ((packets[1], PEER), (packets[2], PEER6)):
        error = icmp.write_error(gateway, packet, icmp.TOO_BIG, 1400)
        assert error is not None
        packets.append(error)
    return packets


PACKETS = _packets()


@st.composite
def damaged_packets(draw: st.DrawFn) -> bytes:
    packet = bytearray(draw(st.sampled_from(PACKETS)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(packet) - 1), st.integers(0, 255)), max_size=4)):
        packet[at] = value
    return bytes(packet[: draw(st.integers(0, len(packet)))]) + draw(st.binary(max_size=8))


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """A buffer, and a start and an end in it: often those of a packet that lies between other bytes."""
    data = draw(st.one_of(st.binary(max_size=120), damaged_packets()))
    if draw(st.booleans()):
        before, after = draw(st.binary(max_size=20)), draw(st.binary(max_size=20))
        return before + data + after, len(before), len(before) + len(data)
    end = draw(st.integers(0, len(data)))
    return data, draw(st.integers(0, end)), end


PARSERS: list[Callable[[memoryview, int, int], object]] = [
    ethernet.parse_ethernet,
    arp.parse_arp,
    ipv4.parse_ipv4,
    lambda buffer, start, end: ipv4.parse_ipv4(buffer, start, end, quoted=True),
    ipv6.parse_ipv6,
    lambda buffer, start, end: ipv6.parse_ipv6(buffer, start, end, quoted=True),
    tcp.parse_tcp,
    tcp.parse_options,
    udp.parse_udp,
    icmp.parse_icmp,
    icmp.parse_icmp6,
    icmp.parse_quoted,
]


@given(regions())
def test_no_parser_raises_or_reads_outside(region: Region) -> None:
    data, start, end = region
    # The same bytes within other surroundings, and with nothing behind them at all, must mean the same.
    inverted = bytes(byte ^ 0xFF for byte in data)
    other = inverted[:start] + data[start:end] + inverted[end:]
    for parse in PARSERS:
        result = parse(memoryview(data), start, end)
        assert parse(memoryview(data)[:end], start, end) == result
        assert parse(memoryview(other), start, end) == result
    sum_words(memoryview(data)[start:end])


@given(regions())
def test_offsets_are_in_order(region: Region) -> None:
    data, start, end = region
    for parse_ip in (ipv4.parse_ipv4, ipv6.parse_ipv6):
        for quoted in (False, True):
            packet = parse_ip(data, start, end, quoted=quoted)
            if packet is not None:
                assert packet.header_start == start < packet.payload_start <= packet.payload_end <= end
                assert len(packet.src) == len(packet.dst) == (4 if parse_ip is ipv4.parse_ipv4 else 16)
                assert packet.fragment_offset % 8 == 0
    segment = tcp.parse_tcp(data, start, end)
    if segment is not None:
        assert start + 20 == segment.options_start <= segment.payload_start <= end
        options = tcp.parse_options(data, segment.options_start, segment.payload_start)
        assert options.mss is None or 0 < options.mss <= 65535
        assert options.window_scale is None or 0 <= options.window_scale <= 14
    datagram = udp.parse_udp(data, start, end)
    if datagram is not None:
        assert start + 8 == datagram.payload_start <= datagram.payload_end <= end


@given(st.one_of(st.binary(max_size=120), damaged_packets()), st.integers(0, 2**32))
@example(b"", 0)
def test_errors_about_anything(packet: bytes, parameter: int) -> None:
    for gateway, limit in ((PEER, 576), (PEER6, 1280)):
        for problem in (icmp.PORT_UNREACHABLE, icmp.TOO_BIG, icmp.MALFORMED):
            error = icmp.write_error(gateway, memoryview(packet), problem, parameter)
            if error is not None:
                assert icmp.may_answer_with_error(packet)
                assert len(error) <= limit
                # What we say is well-formed, and is itself never answered with an error.
                header = (ipv4.parse_ipv4 if len(gateway) == 4 else ipv6.parse_ipv6)(error, 0, len(error))
                assert header is not None
                assert header.payload_end == len(error)
                assert not icmp.may_answer_with_error(error)


@pytest.mark.parametrize("packet", PACKETS)
def test_every_prefix_and_every_single_byte(packet: bytes) -> None:
    for length in range(len(packet) + 1):
        for parse in PARSERS:
            parse(memoryview(packet)[:length], 0, length)
        icmp.may_answer_with_error(packet[:length])
    # The headers, each of their bytes with each of the values at which some bound lies.
    for at in range(min(len(packet), 100)):
        for value in (0x00, 0x01, 0x07, 0x08, 0x0F, 0x40, 0x45, 0x4F, 0x60, 0x7F, 0x80, 0xC2, 0xFF):
            damaged = bytearray(packet)
            damaged[at] = value
            for parse in PARSERS:
                parse(memoryview(damaged), 0, len(damaged))
            icmp.may_answer_with_error(damaged)
