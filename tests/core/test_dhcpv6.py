"""The DHCPv6 server, spoken to as guests do. scapy writes the requests and reads the answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Advertise,
    DHCP6_Confirm,
    DHCP6_Decline,
    DHCP6_InfoRequest,
    DHCP6_Rebind,
    DHCP6_Release,
    DHCP6_Renew,
    DHCP6_Reply,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientFQDN,
    DHCP6OptClientId,
    DHCP6OptDNSDomains,
    DHCP6OptDNSServers,
    DHCP6OptIA_NA,
    DHCP6OptIA_PD,
    DHCP6OptIA_TA,
    DHCP6OptIAAddress,
    DHCP6OptInfoRefreshTime,
    DHCP6OptOptReq,
    DHCP6OptPref,
    DHCP6OptRapidCommit,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)

from netstack.core.dhcpv6 import Dhcpv6Server
from netstack.core.leases import LEASE_TIME, LeaseTable
from netstack.wire.dhcpv6 import parse_dhcpv6

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400abcdef")
GATEWAY_MAC = bytes.fromhex("5255c0a80502")
PREFIX = bytes.fromhex("fd00c0a800050000") + bytes(8)
GUEST = bytes.fromhex("fe80000000000000505400fffe123456")
FIRST = "fd00:c0a8:5::15"

CLIENT = DHCP6OptClientId(duid=DUID_LL(lladdr="52:54:00:12:34:56"))
SERVER = DHCP6OptServerId(duid=DUID_LL(lladdr="52:55:c0:a8:05:02"))
OTHER_SERVER = DHCP6OptServerId(duid=DUID_LL(lladdr="52:55:00:00:00:01"))
ASKED = DHCP6OptOptReq(reqopts=[23, 24])


def make_server() -> Dhcpv6Server:
    leases = LeaseTable(bytes((192, 168, 5, 0)), 24, prefix6=PREFIX)
    return Dhcpv6Server(leases, GATEWAY_MAC, dns=(PREFIX[:15] + b"\x03",), search=("netstack.internal", "corp.example"))


def ia(*addresses: str, iaid: int = 7) -> Any:
    return DHCP6OptIA_NA(iaid=iaid, ianaopts=[DHCP6OptIAAddress(addr=address) for address in addresses])


def ask(server: Dhcpv6Server, message: Any, now: float = 0.0, mac: bytes = MAC) -> Any:
    message.trid = 0xABCDEF
    payload = server.answer(bytes(message), mac, GUEST, now)
    assert payload is not None
    answer = (DHCP6_Advertise if payload[0] == 2 else DHCP6_Reply)(payload)
    assert answer.trid == 0xABCDEF
    assert answer[DHCP6OptServerId].duid.lladdr == "52:55:c0:a8:05:02"
    return answer


def addresses(answer: Any) -> list[tuple[str, int]]:
    return [(option.addr, option.validlft) for option in answer[DHCP6OptIA_NA].ianaopts]


def test_the_whole_exchange() -> None:
    server = make_server()
    advertise = ask(server, DHCP6_Solicit() / CLIENT / ASKED / ia())
    assert advertise.msgtype == 2
    assert advertise[DHCP6OptPref].prefval == 255
    assert addresses(advertise) == [(FIRST, LEASE_TIME)]
    assert server.leases.live(1.0) == []
    reply = ask(server, DHCP6_Request() / CLIENT / SERVER / ASKED / ia(FIRST))
    assert reply.msgtype == 7
    assert reply[DHCP6OptClientId].duid.lladdr == "52:54:00:12:34:56"
    assert addresses(reply) == [(FIRST, LEASE_TIME)]
    found = reply[DHCP6OptIA_NA]
    assert (found.iaid, found.T1, found.T2) == (7, LEASE_TIME // 2, LEASE_TIME * 4 // 5)
    assert reply[DHCP6OptDNSServers].dnsservers == ["fd00:c0a8:5::3"]
    assert reply[DHCP6OptDNSDomains].dnsdomains == ["netstack.internal.", "corp.example."]
    assert DHCP6OptPref not in reply
    (lease,) = server.leases.live(1.0)
    assert (lease.mac, lease.duid) == (MAC, b"\0\3\0\1" + MAC)


def test_ipv4_and_ipv6_have_the_same_number() -> None:
    server = make_server()
    offer = server.leases.offer(MAC, 0.0, requested=bytes((192, 168, 5, 77)))
    assert offer is not None
    assert addresses(ask(server, DHCP6_Solicit() / CLIENT / ia())) == [("fd00:c0a8:5::77", LEASE_TIME)]


def test_only_what_is_asked_for_is_told() -> None:
    answer = ask(make_server(), DHCP6_Solicit() / CLIENT / DHCP6OptOptReq(reqopts=[24, 82]) / ia())
    assert DHCP6OptDNSServers not in answer
    assert DHCP6OptDNSDomains in answer
    answer = ask(make_server(), DHCP6_Solicit() / CLIENT / ia())
    assert DHCP6OptDNSServers in answer
    assert DHCP6OptDNSDomains in answer


def test_rapid_commit() -> None:
    server = make_server()
    answer = ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / ia())
    assert answer.msgtype == 7
    assert DHCP6OptRapidCommit in answer
    assert addresses(answer) == [(FIRST, LEASE_TIME)]
    assert server.leases.live(1.0)


@pytest.mark.parametrize("kind", (DHCP6_Renew, DHCP6_Rebind))
def test_renewing(kind: Any) -> None:
    server = make_server()
    head = kind() / CLIENT
    if kind is DHCP6_Renew:
        head = head / SERVER
    ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / ia())
    assert addresses(ask(server, head / ia(FIRST), LEASE_TIME / 2)) == [(FIRST, LEASE_TIME)]
    assert server.leases.live(LEASE_TIME * 1.4)
    # Addresses that it should not have any more are ended.
    answer = ask(server, head / ia("fd00:c0a8:5::99", FIRST, "fd00:c0a8:6::15"), LEASE_TIME)
    assert addresses(answer) == [(FIRST, LEASE_TIME), ("fd00:c0a8:5::99", 0), ("fd00:c0a8:6::15", 0)]


def test_renewing_with_a_server_that_forgot() -> None:
    assert addresses(ask(make_server(), DHCP6_Renew() / CLIENT / SERVER / ia(FIRST))) == [(FIRST, LEASE_TIME)]


def test_one_address_for_each_guest() -> None:
    server = make_server()
    answer = server.answer(
        bytes(DHCP6_Solicit(trid=1) / CLIENT / ia(iaid=1) / ia(iaid=2) / DHCP6OptIA_TA(iaid=3) / DHCP6OptIA_PD(iaid=4)),
        MAC,
        GUEST,
        0.0,
    )
    assert answer is not None
    message = parse_dhcpv6(answer)
    assert message is not None
    found = [
        DHCP6OptIA_NA(code.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data)
        for code, data in message.options
        if code == 3
    ]
    assert [option.iaid for option in found] == [1, 2]
    assert found[0].ianaopts[0].addr == FIRST
    assert found[1].ianaopts[0].statuscode == 2  # NoAddrsAvail
    assert [data[:4] for code, data in message.options if code == 4] == [b"\0\0\0\3"]
    assert [data[16:18] for code, data in message.options if code == 25] == [b"\0\6"]  # NoPrefixAvail
    assert len(server.leases) == 1


def test_an_empty_pool_says_so() -> None:
    server = make_server()
    server.leases.prefix6 = None
    answer = ask(server, DHCP6_Solicit() / CLIENT / ia())
    assert answer[DHCP6OptIA_NA].ianaopts[0].statuscode == 2


@pytest.mark.parametrize(
    ("found", "status"), (([FIRST], 0), (["fd00:c0a8:5::99"], 0), (["fd00:c0a8:6::15"], 4), ([FIRST, "2001:db8::1"], 4))
)
def test_confirm(found: list[str], status: int) -> None:
    assert ask(make_server(), DHCP6_Confirm() / CLIENT / ia(*found))[DHCP6OptStatusCode].statuscode == status


def test_confirm_without_addresses_is_silent() -> None:
    assert make_server().answer(bytes(DHCP6_Confirm() / CLIENT / ia()), MAC, GUEST, 0.0) is None


def test_release() -> None:
    server = make_server()
    ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / ia())
    answer = ask(server, DHCP6_Release() / CLIENT / SERVER / ia(FIRST), 1.0)
    assert answer[DHCP6OptStatusCode].statuscode == 0
    assert DHCP6OptIA_NA not in answer
    assert server.leases.live(2.0) == []
    answer = ask(server, DHCP6_Release() / CLIENT / SERVER / ia("fd00:c0a8:5::99"), 1.0)
    assert answer[DHCP6OptIA_NA].ianaopts[0].statuscode == 3  # NoBinding


def test_no_guest_releases_for_another() -> None:
    server = make_server()
    ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / ia())
    answer = ask(server, DHCP6_Release() / CLIENT / SERVER / ia(FIRST), 1.0, OTHER)
    assert answer[DHCP6OptIA_NA].ianaopts[0].statuscode == 3
    assert server.leases.live(2.0)


def test_decline() -> None:
    server = make_server()
    ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / ia())
    ask(server, DHCP6_Decline() / CLIENT / SERVER / ia(FIRST), 1.0)
    ((address, _),) = addresses(ask(server, DHCP6_Solicit() / CLIENT / ia(), 2.0))
    assert address == "fd00:c0a8:5::10:15"


def test_information() -> None:
    asked = DHCP6OptOptReq(reqopts=[23, 24, 32])
    for message in (DHCP6_InfoRequest() / asked, DHCP6_InfoRequest() / CLIENT / SERVER / asked):
        answer = ask(make_server(), message)
        assert answer[DHCP6OptDNSServers].dnsservers == ["fd00:c0a8:5::3"]
        assert answer[DHCP6OptInfoRefreshTime].reftime == 3600
    assert make_server().answer(bytes(DHCP6_InfoRequest() / OTHER_SERVER), MAC, GUEST, 0.0) is None


def test_the_guests_name() -> None:
    server = make_server()
    name = DHCP6OptClientFQDN(flags=0, fqdn="debian.example.")
    ask(server, DHCP6_Solicit() / CLIENT / DHCP6OptRapidCommit() / name / ia())
    lease = server.leases.find_name("debian", 1.0)
    assert lease is not None
    assert lease.mac == MAC


@pytest.mark.parametrize(
    "message",
    (
        DHCP6_Solicit() / ia(),  # who asks?
        DHCP6_Solicit() / CLIENT / SERVER / ia(),
        DHCP6_Request() / CLIENT / ia(),
        DHCP6_Request() / CLIENT / OTHER_SERVER / ia(),
        DHCP6_Renew() / CLIENT / OTHER_SERVER / ia(FIRST),
        DHCP6_Rebind() / CLIENT / SERVER / ia(FIRST),
        DHCP6_Confirm() / CLIENT / SERVER / ia(FIRST),
        DHCP6_Release() / SERVER / ia(FIRST),
        DHCP6_Advertise() / CLIENT / SERVER,
        DHCP6_Reply() / CLIENT / SERVER,
        DHCP6_Solicit() / DHCP6OptClientId(duid=b"\0\3" + b"x" * 129) / ia(),
        DHCP6_Solicit() / DHCP6OptClientId(duid=b"") / ia(),
        b"\x63abc",
        b"\x01ab",
        b"",
    ),
)
def test_what_is_not_for_us(message: Any) -> None:
    server = make_server()
    assert server.answer(bytes(message), MAC, GUEST, 0.0) is None
    assert server.counters == {"dhcpv6_malformed": 1}
    assert len(server.leases) == 0


@pytest.mark.parametrize("src", (bytes(16), PREFIX[:15] + b"\x15", bytes.fromhex("ff02") + bytes(13) + b"\1", b""))
def test_only_link_local_senders_are_answered(src: bytes) -> None:
    assert make_server().answer(bytes(DHCP6_Solicit() / CLIENT / ia()), MAC, src, 0.0) is None


@given(
    st.sampled_from([1, 3, 4, 5, 6, 8, 9, 11]),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 13, 14, 25, 39]), st.binary(max_size=40)),
        max_size=6,
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_messages_are_survived(kind: int, options: list[tuple[int, bytes]], client: bool, ours: bool) -> None:
    server = make_server()
    parts = ([bytes(CLIENT)] if client else []) + ([bytes(SERVER)] if ours else [])
    parts += [code.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data for code, data in options]
    answer = server.answer(bytes((kind,)) + b"xyz" + b"".join(parts), MAC, GUEST, 0.0)
    if answer is not None:
        assert parse_dhcpv6(answer) is not None
