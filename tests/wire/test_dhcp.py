"""DHCP messages: one table of samples both ways, scapy as the independent reader and writer, and hostile bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from netstack.wire import dhcp
from netstack.wire.dhcp import DhcpMessage, Route, parse_dhcp, parse_routes, write_dhcp, write_routes
from netstack.wire.domains import parse_domains, write_domain, write_domains

MAC = bytes.fromhex("525400123456")
HEAD = bytes.fromhex("01010600deadbeef00000000") + bytes(16) + MAC + bytes(10)
COOKIE = bytes.fromhex("63825363")


def message_with(options: bytes, *, sname: bytes = b"", file: bytes = b"") -> bytes:
    return HEAD + sname.ljust(64, b"\0") + file.ljust(128, b"\0") + COOKIE + options


def test_scapy_discover_is_read() -> None:
    packet = BOOTP(chaddr=MAC, xid=0xDEADBEEF, flags=0x8000, secs=7) / DHCP(
        options=[("message-type", "discover"), ("requested_addr", "192.168.5.20"), ("hostname", b"debian"), "end"]
    )
    message = parse_dhcp(bytes(packet))
    assert message is not None
    assert (message.op, message.xid, message.secs, message.flags) == (1, 0xDEADBEEF, 7, 0x8000)
    assert message.chaddr == MAC
    assert message.is_dhcp
    assert message.byte(dhcp.OPTION_MESSAGE_TYPE) == dhcp.DISCOVER
    assert message.address(dhcp.OPTION_REQUESTED_ADDRESS) == bytes((192, 168, 5, 20))
    assert message.options[dhcp.OPTION_HOST_NAME] == b"debian"


def test_scapy_reads_what_is_written() -> None:
    options = {
        dhcp.OPTION_MESSAGE_TYPE: bytes((dhcp.OFFER,)),
        dhcp.OPTION_SERVER_ID: bytes((192, 168, 5, 2)),
        dhcp.OPTION_SUBNET_MASK: bytes((255, 255, 255, 0)),
        dhcp.OPTION_MTU: (65520).to_bytes(2, "big"),
        dhcp.OPTION_LEASE_TIME: (86400).to_bytes(4, "big"),
    }
    message = DhcpMessage(2, 0x01020304, MAC, yiaddr=bytes((192, 168, 5, 15)), options=options)
    packet = BOOTP(write_dhcp(message))
    assert (packet.op, packet.xid, packet.yiaddr, packet.hlen) == (2, 0x01020304, "192.168.5.15", 6)
    assert packet.chaddr[:6] == MAC
    read: dict[str, object] = dict(option[:2] for option in packet[DHCP].options if isinstance(option, tuple))
    assert read["message-type"] == 2
    assert read["server_id"] == "192.168.5.2"
    assert read["subnet_mask"] == "255.255.255.0"
    assert read["interface-mtu"] == 65520
    assert read["lease_time"] == 86400


CASES: list[tuple[str, bytes, dict[int, bytes]]] = [
    ("no options", b"\xff", {}),
    ("end missing", b"\x35\x01\x01", {53: b"\x01"}),
    ("padding between", b"\0\0\x35\x01\x03\0\xff", {53: b"\x03"}),
    ("behind the end", b"\x35\x01\x03\xff\x32\x04\x01\x02\x03\x04", {53: b"\x03"}),
    ("cut in two (RFC 3396)", b"\x0c\x02ab\x35\x01\x01\x0c\x03cde\xff", {12: b"abcde", 53: b"\x01"}),
    ("empty option", b"\x50\x00\xff", {80: b""}),
    ("length past the end", b"\x35\x01\x01\x32\x05\x01\x02\x03\x04", {53: b"\x01"}),
    ("length missing", b"\x35\x01\x01\x32", {53: b"\x01"}),
]


@pytest.mark.parametrize(("options", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_options_are_read(options: bytes, expected: dict[int, bytes]) -> None:
    message = parse_dhcp(message_with(options))
    assert message is not None
    assert message.options == expected


@pytest.mark.parametrize(("value", "expected"), ((1, b"FILE"), (2, b"SNAME"), (3, b"FILESNAME")))
def test_overloaded_fields_are_read_file_first(value: int, expected: bytes) -> None:
    payload = message_with(
        bytes((52, 1, value)) + b"\xff", file=b"\x0c\x04FILE\xff\x0c\x01x", sname=b"\x0c\x05SNAME\x34\x01\x01\xff"
    )
    message = parse_dhcp(payload)
    assert message is not None
    assert message.options[12] == expected


def test_fields_without_overload_are_no_options() -> None:
    message = parse_dhcp(message_with(b"\x35\x01\x01\xff", file=b"\x0c\x04FILE\xff"))
    assert message is not None
    assert 12 not in message.options


def test_bootp_has_no_options() -> None:
    message = parse_dhcp(HEAD + bytes(192) + bytes(64))
    assert message is not None
    assert not message.is_dhcp
    assert message.options == {}


def test_short_and_lying_headers_are_refused() -> None:
    whole = message_with(b"\xff")
    for length in range(236):
        assert parse_dhcp(whole[:length]) is None
    assert parse_dhcp(whole[:2] + b"\x11" + whole[3:]) is None  # hlen 17


def test_values_of_the_wrong_length_are_none() -> None:
    message = parse_dhcp(message_with(b"\x35\x02\x01\x01\x32\x03\x01\x02\x03\x39\x03\x01\x02\x03\xff"))
    assert message is not None
    assert message.byte(53) is None
    assert message.address(50) is None
    assert message.number(57) is None
    assert message.number(99) is None


def test_messages_are_padded_for_bootp() -> None:
    assert len(write_dhcp(DhcpMessage(2, 1, MAC))) == 300


def test_what_does_not_fit_is_overloaded_then_left_out() -> None:
    options = {53: b"\x02", 12: b"a" * 250, 15: b"b" * 100, 119: b"c" * 50, 121: b"d" * 60, 42: b"e" * 4}
    payload = write_dhcp(DhcpMessage(2, 1, MAC, options=options), max_length=548)
    assert len(payload) <= 548
    message = parse_dhcp(payload)
    assert message is not None
    # 15 went to `file`, 119 to `sname`; there is no place left for 121.
    assert dict(message.options) == {
        53: b"\x02",
        12: b"a" * 250,
        42: b"e" * 4,
        52: b"\x03",
        15: b"b" * 100,
        119: b"c" * 50,
    }


def test_bootp_replies_are_never_overloaded() -> None:
    payload = write_dhcp(DhcpMessage(2, 1, MAC, options={1: b"abcd", 12: b"a" * 100, 3: b"abcd"}), max_length=300)
    message = parse_dhcp(payload)
    assert message is not None
    assert message.options == {1: b"abcd", 3: b"abcd"}
    assert len(payload) == 300


def test_long_options_are_cut_and_joined_again() -> None:
    data = bytes(range(256)) * 3
    payload = write_dhcp(DhcpMessage(2, 1, MAC, options={53: b"\x05", 119: data}), max_length=1472)
    message = parse_dhcp(payload)
    assert message is not None
    assert message.options[119] == data


# RFC 3442, "Description": 0, 10/8, 10/24, 10.17/16, 10.27.129/24, 10.229.0.128/25, 10.198.122.47/32.
ROUTES: list[tuple[str, str]] = [
    ("0.0.0.0/0", "00"),
    ("10.0.0.0/8", "080a"),
    ("10.0.0.0/24", "180a0000"),
    ("10.17.0.0/16", "100a11"),
    ("10.27.129.0/24", "180a1b81"),
    ("10.229.0.128/25", "190ae50080"),
    ("10.198.122.47/32", "200ac67a2f"),
]


@pytest.mark.parametrize(("network", "encoded"), ROUTES)
def test_classless_routes(network: str, encoded: str) -> None:
    address, _, bits = network.partition("/")
    route = Route(bytes(map(int, address.split("."))), int(bits), b"\xc0\xa8\x05\x02")
    data = bytes.fromhex(encoded) + b"\xc0\xa8\x05\x02"
    assert write_routes([route]) == data
    assert parse_routes(data) == [route]
    assert parse_routes(data[:-1]) is None
    assert parse_routes(data + data) == [route, route]


def test_a_route_of_33_bits_is_refused() -> None:
    assert parse_routes(b"\x21" + bytes(9)) is None


# RFC 3397 section 2, its own example: eng.apple.com and marketing.apple.com.
RFC_3397 = b"\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04"


def test_search_lists() -> None:
    names = ["eng.apple.com", "marketing.apple.com"]
    assert parse_domains(RFC_3397, compressed=True) == names
    assert parse_domains(RFC_3397, compressed=False) is None
    assert parse_domains(write_domains(names), compressed=False) == names


@pytest.mark.parametrize(
    "data",
    (
        b"\x03ab",  # past the end
        b"\xc0\x00",  # to itself
        b"\x01a\xc0\x00",  # round and round
        b"\x01a\x00\xc0\x05",  # forward
        b"\x01a\x00\xc0",  # half a pointer
        b"\x40a\x00",  # reserved label type
        b"\x03a.b\x00",  # a dot inside a label
        b"\x01\x00\x00",  # a NUL inside a label
        b"\x01\xe9\x00",  # not ASCII
        (b"\x3f" + b"a" * 63) * 4 + b"\x00",  # 257 bytes
    ),
)
def test_bad_names_are_refused(data: bytes) -> None:
    assert parse_domains(data, compressed=True) is None


def test_names_that_cannot_be_written_are_left_out() -> None:
    assert write_domains(["a" * 64 + ".test", "b\u00fccher.test", "a..b", "", "ok.test."]) == b"\x02ok\x04test\x00"
    assert write_domain(".".join(["a" * 63] * 4)) is None


@given(st.binary(max_size=600))
def test_any_options_are_survived(options: bytes) -> None:
    message = parse_dhcp(message_with(options, file=options[:128], sname=options[-64:]))
    assert message is not None
    parse_domains(options, compressed=True)
    parse_routes(options)
    # What was read can be written, and is read the same again.
    again = parse_dhcp(write_dhcp(message, max_length=65535))
    assert again is not None
    assert again.options == message.options


@given(st.binary(max_size=700))
def test_any_bytes_are_survived(payload: bytes) -> None:
    message = parse_dhcp(payload)
    assert (message is None) == (len(payload) < 236 or payload[2] > 16)
