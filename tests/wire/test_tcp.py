"""wire.tcp: one table both ways, every prefix, options, sequence arithmetic, scapy as the oracle."""

from __future__ import annotations

import itertools
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from netstack.wire import tcp
from netstack.wire.tcp import Tcp, TcpOptions

GUEST, GATEWAY = bytes((192, 168, 5, 15)), bytes((192, 168, 5, 2))
GUEST6, GATEWAY6 = ip_address("fd00:5::15").packed, ip_address("fd00:5::2").packed

# Arguments of write_tcp; the segment.
SAMPLES: list[tuple[tuple[Any, ...], str]] = [
    (
        (GUEST, GATEWAY, 40000, 443, 0x01020304, 0, tcp.SYN, 64240, b"", tcp.write_syn_options(1460, 7, True)),
        "9c40 01bb 01020304 00000000 80 02 faf0 46bd 0000 020405b4 01010402 01030307",
    ),
    (
        (GUEST6, GATEWAY6, 443, 40000, 0xFFFFFFFF, 0x01020305, tcp.PSH | tcp.ACK, 501, b"payload", b""),
        "01bb 9c40 ffffffff 01020305 50 18 01f5 547c 0000 7061796c6f6164",
    ),
    ((GUEST, GATEWAY, 1, 2, 3, 4, tcp.RST | tcp.ACK, 0, b"", b""), "0001 0002 00000003 00000004 50 14 0000 2465 0000"),
]


@pytest.mark.parametrize(("fields", "data"), SAMPLES)
def test_both_ways(fields: tuple[Any, ...], data: str) -> None:
    segment = bytes.fromhex(data)
    assert tcp.write_tcp(*fields) == segment
    payload_start = len(segment) - len(fields[8])
    assert tcp.parse_tcp(segment, 0, len(segment)) == Tcp._make((*fields[2:8], payload_start, 20))
    shifted = tcp.parse_tcp(memoryview(b"......" + segment + b"....."), 6, 6 + len(segment))
    assert shifted == Tcp._make((*fields[2:8], 6 + payload_start, 26))
    for length in range(len(segment)):
        cut = tcp.parse_tcp(segment[:length], 0, length)
        assert (cut is None) == (length < payload_start)
        cut = tcp.parse_tcp(b"......" + segment, 6, 6 + length)
        assert (cut is None) == (length < payload_start)


@pytest.mark.parametrize("words", (0, 1, 2, 3, 4, 6, 15))
def test_a_lying_header_length_is_refused(words: int) -> None:
    segment = bytearray.fromhex(SAMPLES[2][1])
    segment[12] = words << 4
    assert tcp.parse_tcp(segment, 0, len(segment)) is None


@given(
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.binary(max_size=40),
    st.integers(0, 60),
    st.booleans(),
)
def test_scapy_agrees(
    src_port: int,
    dst_port: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    payload: bytes,
    repeat: int,
    six: bool,
) -> None:
    payload *= repeat
    src, dst = (GUEST6, GATEWAY6) if six else (GUEST, GATEWAY)
    ip = IPv6 if six else IP
    theirs = bytes(
        ip(src=str(ip_address(src)), dst=str(ip_address(dst)))
        / TCP(sport=src_port, dport=dst_port, seq=seq, ack=ack, flags=flags, window=window)
        / Raw(payload)
    )[40 if six else 20 :]
    ours = tcp.write_tcp(src, dst, src_port, dst_port, seq, ack, flags, window, payload)
    assert theirs[:16] == ours[:16]
    assert theirs[18:] == ours[18:]
    # The same number, though zero has two spellings.
    assert int.from_bytes(theirs[16:18], "big") % 65535 == int.from_bytes(ours[16:18], "big") % 65535
    assert tcp.parse_tcp(theirs, 0, len(theirs)) == Tcp(src_port, dst_port, seq, ack, flags, window, 20, 20)


NOTHING = TcpOptions(None, None, False, None)

# What write_syn_options is given, its bytes.
SYN_OPTIONS = [
    ((1460, None, False), "020405b4"),
    ((65495, 8, False), "0204ffd7 01030308"),
    ((1440, 14, True), "020405a0 01010402 0103030e"),
    ((536, None, True), "02040218 01010402"),
    ((1220, 0, False), "020404c4 01030300"),
]


@pytest.mark.parametrize(("fields", "data"), SYN_OPTIONS)
def test_syn_options_both_ways(fields: tuple[int, int | None, bool], data: str) -> None:
    options = bytes.fromhex(data)
    assert tcp.write_syn_options(*fields) == options
    assert len(options) % 4 == 0
    assert tcp.parse_options(options, 0, len(options)) == TcpOptions(*fields, None)
    for length in range(len(options)):
        tcp.parse_options(options[:length], 0, length)


@pytest.mark.parametrize(
    ("data", "expected"),
    (
        ("", NOTHING),
        # What Linux, the BSDs and Windows send, in their orders.
        ("020405b4 0402 080a 01020304 00000000 01 030307", TcpOptions(1460, 7, True, (0x01020304, 0))),
        ("020405b4 01 030306 0101 080a 00000001 fffffffe 0402 0000", TcpOptions(1460, 6, True, (1, 0xFFFFFFFE))),
        ("020405b4 01 030308 0101 0402", TcpOptions(1460, 8, True, None)),
        # RFC 7323 2.3: above 14 is 14.
        ("03030f", TcpOptions(None, 14, False, None)),
        ("0303ff", TcpOptions(None, 14, False, None)),
        # Unknown options are skipped by their length (RFC 9293 MUST-6): here MD5 and an experiment.
        ("1312" + "00" * 16 + "0204ffff", TcpOptions(65535, None, False, None)),
        ("fd02 030301", TcpOptions(None, 1, False, None)),
        # The end of the list is the end of the list.
        ("00 020405b4", NOTHING),
        ("01010100 030307", NOTHING),
        # Lengths that cannot be: what came before counts, nothing after.
        ("030307 0200 020405b4", TcpOptions(None, 7, False, None)),
        ("030307 0201 020405b4", TcpOptions(None, 7, False, None)),
        ("030307 0204", TcpOptions(None, 7, False, None)),
        ("030307 020405", TcpOptions(None, 7, False, None)),
        ("030307 02", TcpOptions(None, 7, False, None)),
        ("030307 ff", TcpOptions(None, 7, False, None)),
        ("030307 ff00 020405b4", TcpOptions(None, 7, False, None)),
        ("080a 01020304 000000", NOTHING),
        # Known options of a wrong length mean nothing, but the list goes on.
        ("0203aa 030307", TcpOptions(None, 7, False, None)),
        ("0205aabbcc 030307", TcpOptions(None, 7, False, None)),
        ("0302 020405b4", TcpOptions(1460, None, False, None)),
        ("0403aa 020405b4", TcpOptions(1460, None, False, None)),
        ("0808 010203040506 020405b4", TcpOptions(1460, None, False, None)),
        # An MSS of nothing.
        ("02040000 030307", TcpOptions(None, 7, False, None)),
    ),
)
def test_options_as_guests_send_them(data: str, expected: TcpOptions) -> None:
    options = bytes.fromhex(data)
    assert tcp.parse_options(options, 0, len(options)) == expected
    # What lies outside start and end is never read: here it would be an MSS.
    surrounded = bytes.fromhex("02041111") + options + bytes.fromhex("04ffff02042222")
    assert tcp.parse_options(surrounded, 4, 4 + len(options)) == expected


def test_scapy_reads_the_options() -> None:
    segment = TCP(tcp.write_tcp(GUEST, GATEWAY, 1, 2, 3, 0, tcp.SYN, 4, b"", tcp.write_syn_options(1460, 7, True)))
    assert segment.flags == "S"
    options = dict(segment.options)
    assert (options["MSS"], options["WScale"], options["SAckOK"]) == (1460, 7, b"")


def test_flags_are_those_of_scapy() -> None:
    letters = zip("FSRPAUEC", (tcp.FIN, tcp.SYN, tcp.RST, tcp.PSH, tcp.ACK, tcp.URG, tcp.ECE, tcp.CWR), strict=True)
    for letter, flag in letters:
        assert TCP(flags=letter).flags.value == flag


def test_sequence_numbers_go_round() -> None:
    assert tcp.seq_lt(0xFFFFFFFF, 0)
    assert tcp.seq_gt(0, 0xFFFFFFFF)
    assert tcp.seq_lt(0xFFFFFF00, 0x100)
    assert not tcp.seq_lt(0x100, 0xFFFFFF00)
    assert tcp.seq_le(7, 7)
    assert tcp.seq_ge(7, 7)
    assert not tcp.seq_lt(7, 7)
    assert not tcp.seq_gt(7, 7)
    assert tcp.seq_diff(5, 0xFFFFFFFB) == 10
    assert tcp.seq_diff(0xFFFFFFFB, 5) == -10
    assert tcp.seq_diff(0x80000000, 0) == -0x80000000


EDGES = [0, 1, 2, 0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF]


@pytest.mark.parametrize(("a", "b"), list(itertools.product(EDGES, repeat=2)))
def test_exactly_one_of_less_equal_greater(a: int, b: int) -> None:
    assert [tcp.seq_lt(a, b), a == b, tcp.seq_gt(a, b)].count(True) == 1
    assert tcp.seq_le(a, b) == (tcp.seq_lt(a, b) or a == b)
    assert tcp.seq_ge(a, b) == (tcp.seq_gt(a, b) or a == b)
    distance = tcp.seq_diff(a, b)
    assert -0x80000000 <= distance < 0x80000000
    assert (b + distance) & 0xFFFFFFFF == a
    assert (distance < 0) == tcp.seq_lt(a, b)
