"""DHCPv6 messages: scapy writes what we read and reads what we write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_RelayForward,
    DHCP6_Reply,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptElapsedTime,
    DHCP6OptIA_NA,
    DHCP6OptIA_PD,
    DHCP6OptIA_TA,
    DHCP6OptIAAddress,
    DHCP6OptOptReq,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)

from netstack.wire.dhcpv6 import (
    OPTION_CLIENT_ID,
    OPTION_IA_NA,
    OPTION_IA_PD,
    OPTION_IA_TA,
    OPTION_REQUEST_LIST,
    OPTION_SERVER_ID,
    REPLY,
    SOLICIT,
    parse_association,
    parse_dhcpv6,
    write_address,
    write_association,
    write_dhcpv6,
    write_duid,
    write_status,
)

MAC = bytes.fromhex("525400123456")
ADDRESS = bytes.fromhex("fd00c0a8000500000000000000000015")

SOLICITATION = bytes(
    DHCP6_Solicit(trid=0xABCDEF)
    / DHCP6OptClientId(duid=DUID_LL(lladdr="52:54:00:12:34:56"))
    / DHCP6OptOptReq(reqopts=[23, 24])
    / DHCP6OptElapsedTime(elapsedtime=0)
    / DHCP6OptIA_NA(iaid=7, T1=1, T2=2, ianaopts=[DHCP6OptIAAddress(addr="fd00:c0a8:5::15", preflft=3, validlft=4)])
)


def test_a_solicitation_is_read() -> None:
    message = parse_dhcpv6(SOLICITATION)
    assert message is not None
    assert (message.kind, message.transaction) == (SOLICIT, b"\xab\xcd\xef")
    assert message.option(OPTION_CLIENT_ID) == write_duid(MAC)
    assert message.option(OPTION_REQUEST_LIST) == b"\0\x17\0\x18"
    assert message.option(OPTION_SERVER_ID) is None
    data = message.option(OPTION_IA_NA)
    assert data is not None
    assert parse_association(OPTION_IA_NA, data) == (OPTION_IA_NA, b"\0\0\0\x07", (ADDRESS,))


def test_scapy_reads_what_is_written() -> None:
    association = write_association(
        OPTION_IA_NA, b"\0\0\0\x07", [write_address(ADDRESS, 86400, 86401), write_status(0, "fine")], 100, 200
    )
    payload = write_dhcpv6(REPLY, b"\xab\xcd\xef", [(OPTION_SERVER_ID, write_duid(MAC)), (OPTION_IA_NA, association)])
    packet = DHCP6_Reply(payload)
    assert packet.trid == 0xABCDEF
    assert packet[DHCP6OptServerId].duid.lladdr == "52:54:00:12:34:56"
    found = packet[DHCP6OptIA_NA]
    assert (found.iaid, found.T1, found.T2) == (7, 100, 200)
    address, status = found.ianaopts
    assert (address.addr, address.preflft, address.validlft) == ("fd00:c0a8:5::15", 86400, 86401)
    assert isinstance(status, DHCP6OptStatusCode)
    assert (status.statuscode, status.statusmsg) == (0, b"fine")


def test_other_associations() -> None:
    temporary = bytes(DHCP6OptIA_TA(iaid=9, iataopts=[DHCP6OptIAAddress(addr="fd00:c0a8:5::15")]))[4:]
    assert parse_association(OPTION_IA_TA, temporary) == (OPTION_IA_TA, b"\0\0\0\x09", (ADDRESS,))
    prefix = bytes(DHCP6OptIA_PD(iaid=9))[4:]
    assert parse_association(OPTION_IA_PD, prefix) == (OPTION_IA_PD, b"\0\0\0\x09", ())
    assert parse_association(OPTION_IA_TA, write_association(OPTION_IA_TA, b"\0\0\0\x09", [])) is not None


def test_cut_messages_are_refused() -> None:
    ends = {4, 18, 26, 32}  # behind the head and behind each whole option
    for end in range(len(SOLICITATION)):
        assert (parse_dhcpv6(SOLICITATION[:end]) is None) == (end not in ends)


def test_cut_associations_are_refused() -> None:
    data = bytes(DHCP6OptIA_NA(iaid=7, ianaopts=[DHCP6OptIAAddress(addr="fd00::1")]))[4:]
    for end in range(len(data)):
        assert (parse_association(OPTION_IA_NA, data[:end]) is None) == (end != 12)
    # An address option that is too short is none.
    assert parse_association(OPTION_IA_NA, data[:12] + b"\0\5\0\4abcd") == (OPTION_IA_NA, b"\0\0\0\7", ())


def test_relayed_messages_are_refused() -> None:
    assert parse_dhcpv6(bytes(DHCP6_RelayForward())) is None


def test_more_options_than_anybody_sends_are_refused() -> None:
    assert parse_dhcpv6(b"\x01abc" + bytes(4) * 128) is not None
    assert parse_dhcpv6(b"\x01abc" + bytes(4) * 129) is None


@given(st.binary(max_size=200), st.sampled_from([OPTION_IA_NA, OPTION_IA_TA, OPTION_IA_PD]))
def test_any_bytes_are_survived(data: bytes, code: int) -> None:
    message = parse_dhcpv6(data)
    if message is not None:
        assert write_dhcpv6(message.kind, message.transaction, message.options) == data
    parse_association(code, data)


@pytest.mark.parametrize("seed", (b"\0\3\0\0", b"\xff" * 40, b"\0\x03\xff\xff"))
def test_options_past_the_end(seed: bytes) -> None:
    message = parse_dhcpv6(b"\x01abc" + seed)
    assert message is None or message.options == [(3, b"")]
