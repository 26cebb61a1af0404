"""The DHCP server, spoken to as guests do. scapy writes the requests and reads the answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from netstack.core.dhcp import DhcpReply, DhcpServer
from netstack.core.leases import LEASE_TIME, LeaseTable, StaticLease
from netstack.wire.dhcp import Route, parse_dhcp, parse_routes
from netstack.wire.domains import parse_domains

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400abcdef")
GATEWAY = bytes((192, 168, 5, 2))
DNS = bytes((192, 168, 5, 3))
FIRST = "192.168.5.15"
BROADCAST = (b"\xff" * 6, b"\xff" * 4)


def make_server(**settings: Any) -> DhcpServer:
    leases = LeaseTable(bytes((192, 168, 5, 0)), 24, reserved=(GATEWAY, DNS), statics=settings.pop("statics", ()))
    return DhcpServer(
        leases,
        gateway=GATEWAY,
        dns=(DNS,),
        mtu=65520,
        domain="netstack.internal",
        search=("netstack.internal", "corp.example"),
        ntp=(GATEWAY,),
        **settings,
    )


def request(kind: str, *options: Any, mac: bytes = MAC, **fields: Any) -> bytes:
    body = BOOTP(chaddr=mac, xid=0x1234, **fields) / DHCP(options=[("message-type", kind), *options, "end"])
    return bytes(body)


class Answer:
    """An answer as scapy reads it."""

    def __init__(self, reply: DhcpReply) -> None:
        self.packet = BOOTP(reply.payload)
        self.options: dict[Any, Any] = {}
        for option in self.packet[DHCP].options:
            if isinstance(option, tuple):
                self.options[option[0]] = option[1] if len(option) == 2 else option[1:]
        self.kind = {2: "offer", 5: "ack", 6: "nak"}[self.options["message-type"]]
        self.yiaddr = self.packet.yiaddr
        self.target = (reply.dst_mac, reply.dst_address)
        parsed = parse_dhcp(reply.payload)
        assert parsed is not None
        self.raw = parsed.options


def ask(server: DhcpServer, payload: bytes, now: float = 0.0, mac: bytes = MAC, link: str = "") -> Answer:
    reply = server.answer(payload, mac, now, link)
    assert reply is not None
    return Answer(reply)


def join(server: DhcpServer, mac: bytes = MAC, now: float = 0.0) -> str:
    offer = ask(server, request("discover", mac=mac), now, mac)
    ack = ask(
        server,
        request("request", ("server_id", "192.168.5.2"), ("requested_addr", offer.yiaddr), mac=mac),
        now,
        mac,
    )
    assert ack.kind == "ack"
    return str(ack.yiaddr)


def test_the_whole_exchange() -> None:
    server = make_server()
    offer = ask(server, request("discover"))
    assert (offer.kind, offer.yiaddr) == ("offer", FIRST)
    assert offer.target == (MAC, bytes((192, 168, 5, 15)))
    assert offer.packet.op == 2
    assert offer.packet.xid == 0x1234
    assert offer.packet.chaddr[:6] == MAC
    ack = ask(server, request("request", ("server_id", "192.168.5.2"), ("requested_addr", FIRST)))
    assert (ack.kind, ack.yiaddr) == ("ack", FIRST)
    assert ack.options["server_id"] == "192.168.5.2"
    assert ack.options["lease_time"] == LEASE_TIME
    assert ack.options["renewal_time"] == LEASE_TIME // 2
    assert ack.options["rebinding_time"] == LEASE_TIME * 7 // 8
    assert ack.options["subnet_mask"] == "255.255.255.0"
    assert ack.options["router"] == "192.168.5.2"
    assert ack.options["name_server"] == "192.168.5.3"
    assert ack.options["interface-mtu"] == 65520
    assert ack.options["broadcast_address"] == "192.168.5.255"
    assert ack.options["NTP_server"] == "192.168.5.2"
    assert ack.options["domain"] == b"netstack.internal"
    assert parse_domains(ack.raw[119], compressed=True) == ["netstack.internal", "corp.example"]
    assert 121 not in ack.raw
    assert server.counters == {"dhcp_offer": 1, "dhcp_ack": 1}


def test_the_broadcast_flag_is_honoured() -> None:
    assert ask(make_server(), request("discover", flags=0x8000)).target == BROADCAST


def test_the_parameter_list_is_honoured_and_the_needful_is_sent_anyway() -> None:
    answer = ask(make_server(), request("discover", ("param_req_list", [15, 42, 42, 200, 1])))
    assert list(answer.raw) == [53, 54, 51, 58, 59, 1, 3, 6, 26, 15, 42]
    answer = ask(make_server(), request("discover", ("param_req_list", [119])))
    assert list(answer.raw) == [53, 54, 51, 58, 59, 1, 3, 6, 26, 119]


def test_a_guest_gets_its_name_back_cleaned() -> None:
    server = make_server()
    name = ("hostname", b"My_VM.example.org")
    ask(server, request("discover", name))
    ack = ask(server, request("request", name, ("requested_addr", FIRST), ("server_id", "192.168.5.2")))
    assert ack.options["hostname"] == b"my-vm"
    lease = server.leases.find_name("my-vm", 1.0)
    assert lease is not None
    assert lease.mac == MAC


@pytest.mark.parametrize("fqdn", (b"\x05\0\0\x03foo\x04test\0", b"\x01\0\0foo.test"))
def test_the_name_may_come_as_fqdn(fqdn: bytes) -> None:
    server = make_server()
    ask(server, request("request", ("requested_addr", FIRST), (81, fqdn)))
    assert server.leases.find_name("foo", 1.0) is not None


@pytest.mark.parametrize("fqdn", (b"", b"\x04", b"\x04\0\0", b"\x04\0\0\xff", b"\x04\0\0\xffab", b"\x00\0\0\xff\xfe"))
def test_a_broken_fqdn_gives_no_name(fqdn: bytes) -> None:
    server = make_server()
    ask(server, request("request", ("requested_addr", FIRST), (81, fqdn)))
    lease = server.leases.find_mac(MAC)
    assert lease is not None
    assert lease.name in ("", "ab")


# RFC 2131 4.3.2, state by state.


def test_selecting_another_server_withdraws_the_offer() -> None:
    server = make_server()
    ask(server, request("discover"))
    message = request("request", ("server_id", "192.168.5.99"), ("requested_addr", "192.168.5.200"))
    assert server.answer(message, MAC, 0.0) is None
    assert server.leases.find_mac(MAC) is None
    assert server.counters["dhcp_other_server"] == 1


def test_selecting_another_server_ends_no_lease() -> None:
    server = make_server()
    join(server)
    message = request("request", ("server_id", "192.168.5.99"), ("requested_addr", "192.168.5.200"))
    assert server.answer(message, MAC, 0.0) is None
    assert server.leases.live(1.0)


def test_selecting_what_was_not_offered_is_refused() -> None:
    server = make_server()
    ask(server, request("discover"))
    answer = ask(server, request("request", ("server_id", "192.168.5.2"), ("requested_addr", "192.168.5.99")))
    assert answer.kind == "nak"
    assert answer.target == BROADCAST
    assert answer.yiaddr == "0.0.0.0"
    assert set(answer.raw) == {53, 54, 56}


def test_init_reboot() -> None:
    server = make_server()
    join(server)
    assert ask(server, request("request", ("requested_addr", FIRST)), 9.0).kind == "ack"
    assert ask(server, request("request", ("requested_addr", "192.168.5.20")), 9.0).kind == "nak"
    assert ask(server, request("request", ("requested_addr", "10.0.2.15")), 9.0).kind == "nak"
    # Another guest cannot reboot into this one's address.
    assert ask(server, request("request", ("requested_addr", FIRST), mac=OTHER), 9.0, OTHER).kind == "nak"


def test_init_reboot_of_a_guest_we_forgot() -> None:
    answer = ask(make_server(), request("request", ("requested_addr", "192.168.5.40")))
    assert (answer.kind, answer.yiaddr) == ("ack", "192.168.5.40")


def test_renewing_and_rebinding() -> None:
    server = make_server()
    join(server)
    answer = ask(server, request("request", ciaddr=FIRST), LEASE_TIME / 2)
    assert (answer.kind, answer.yiaddr, answer.packet.ciaddr) == ("ack", FIRST, FIRST)
    assert answer.target == (MAC, bytes((192, 168, 5, 15)))
    assert server.leases.live(LEASE_TIME * 1.4)
    # The broadcast flag does not matter to a guest that has an address (RFC 2131 4.1).
    assert ask(server, request("request", ciaddr=FIRST, flags=0x8000), LEASE_TIME).target[0] == MAC
    answer = ask(server, request("request", ciaddr="192.168.5.77"), LEASE_TIME)
    assert (answer.kind, answer.target) == ("nak", BROADCAST)


def test_a_renewal_that_names_us_and_both_addresses() -> None:
    server = make_server()
    join(server)
    message = request("request", ("server_id", "192.168.5.2"), ("requested_addr", FIRST), ciaddr=FIRST)
    assert ask(server, message).kind == "ack"


def test_a_request_for_nothing_is_dropped() -> None:
    server = make_server()
    assert server.answer(request("request"), MAC, 0.0) is None
    assert server.counters == {"dhcp_malformed": 1}


def test_release_and_return() -> None:
    server = make_server()
    join(server)
    assert server.answer(request("release", ("server_id", "192.168.5.2"), ciaddr=FIRST), MAC, 1.0) is None
    assert server.leases.live(2.0) == []
    assert join(server, OTHER, 3.0) == "192.168.5.16"
    assert join(server, MAC, 4.0) == FIRST


def test_no_guest_releases_for_another() -> None:
    server = make_server()
    join(server)
    message = request("release", ("server_id", "192.168.5.2"), ciaddr=FIRST)
    assert server.answer(message, OTHER, 1.0) is None
    assert len(server.leases.live(2.0)) == 1


@pytest.mark.parametrize("kind", ("discover", "request"))
def test_no_guest_asks_in_the_name_of_one_that_is_there(kind: str) -> None:
    server = make_server()
    join(server)
    message = request(kind, ("hostname", b"mallory"), ("client_id", b"\x00evil"), ("requested_addr", FIRST))
    assert server.answer(message, OTHER, 1.0, "its own link") is None
    assert server.counters["dhcp_not_its_own"] == 1
    (lease,) = server.leases.live(2.0)
    assert (lease.mac, lease.client_id, lease.name, lease.link) == (MAC, b"", "", "")


def test_a_bridge_may_ask_for_a_machine_that_nobody_saw() -> None:
    server = make_server()
    server.leases.is_present = lambda mac: mac == OTHER
    assert ask(server, request("discover"), mac=OTHER).target[0] == MAC


def test_decline() -> None:
    server = make_server()
    join(server)
    message = request("decline", ("server_id", "192.168.5.2"), ("requested_addr", FIRST))
    assert server.answer(message, MAC, 1.0) is None
    assert server.counters["dhcp_decline"] == 1
    assert join(server, MAC, 2.0) == "192.168.5.16"


def test_inform() -> None:
    answer = ask(make_server(), request("inform", ciaddr="192.168.5.200"))
    assert (answer.kind, answer.yiaddr) == ("ack", "0.0.0.0")
    assert answer.target == (MAC, bytes((192, 168, 5, 200)))
    assert not {51, 58, 59} & set(answer.raw)
    assert answer.options["name_server"] == "192.168.5.3"
    assert ask(make_server(), request("inform")).target == BROADCAST


def test_rapid_commit() -> None:
    server = make_server()
    answer = ask(server, request("discover", (80, b"")))
    assert (answer.kind, answer.yiaddr) == ("ack", FIRST)
    assert answer.raw[80] == b""
    assert server.leases.live(1.0)


def test_bootp() -> None:
    server = make_server()
    reply = server.answer(bytes(BOOTP(chaddr=MAC, xid=7)), MAC, 0.0)
    assert reply is not None
    message = parse_dhcp(reply.payload)
    assert message is not None
    assert message.yiaddr == bytes((192, 168, 5, 15))
    assert not message.is_dhcp
    assert len(reply.payload) == 300
    reply = server.answer(bytes(BOOTP(chaddr=MAC, xid=7)) + bytes.fromhex("63825363ff"), MAC, 0.0)
    assert reply is not None
    message = parse_dhcp(reply.payload)
    assert message is not None
    assert message.options[1] == b"\xff\xff\xff\0"
    assert message.options[3] == GATEWAY
    assert not {53, 54, 51} & set(message.options)


def test_the_client_identifier_comes_back() -> None:
    server = make_server()
    identifier = b"\xff\x01\x02\x03"
    assert ask(server, request("discover", ("client_id", identifier))).raw[61] == identifier
    answer = ask(server, request("request", ("client_id", identifier), ("requested_addr", "10.0.0.1")))
    assert (answer.kind, answer.raw[61]) == ("nak", identifier)


def test_extra_routes_bring_the_default_route_along() -> None:
    route = Route(bytes((10, 0, 0, 0)), 8, bytes((192, 168, 5, 9)))
    answer = ask(make_server(routes=(route,)), request("discover", ("param_req_list", [121])))
    assert parse_routes(answer.raw[121]) == [route, Route(bytes(4), 0, GATEWAY)]
    answer = ask(make_server(), request("discover", ("param_req_list", [121])))
    assert 121 not in answer.raw


def test_the_guest_says_how_long_an_answer_may_be() -> None:
    server = make_server()
    server.search = [f"zone-number-{number}.a-rather-long-domain.example" for number in range(20)]
    for size, limit in ((None, 548), (300, 548), (576, 548), (1000, 972), (65535, 1472)):
        options = [] if size is None else [("max_dhcp_size", size)]
        reply = server.answer(request("discover", *options), MAC, 0.0)
        assert reply is not None
        assert len(reply.payload) <= limit
        message = parse_dhcp(reply.payload)
        assert message is not None
        assert (119 in message.options) == (limit == 1472)
        assert {1, 3, 6, 26, 51, 53, 54} <= set(message.options)


def test_a_static_lease() -> None:
    server = make_server(statics=(StaticLease(MAC, bytes((192, 168, 5, 50)), name="db"),))
    answer = ask(server, request("discover", ("requested_addr", FIRST)))
    assert answer.yiaddr == "192.168.5.50"
    assert join(server) == "192.168.5.50"
    assert ask(server, request("request", ciaddr="192.168.5.50"), 1.0).options["hostname"] == b"db"


def test_an_empty_pool_is_silent() -> None:
    server = make_server()
    for number in range(240):
        assert join(server, b"\x52\x54\x00\x00\x01" + bytes((number,)))
    assert server.answer(request("discover"), MAC, 0.0) is None
    assert server.answer(bytes(BOOTP(chaddr=MAC)), MAC, 0.0) is None
    assert server.counters["dhcp_no_address"] == 2


@pytest.mark.parametrize(
    "fields",
    (
        {"op": 2},
        {"htype": 6},
        {"hlen": 5},
        {"hlen": 17},
        {"giaddr": "10.0.0.1"},
        {"mac": b"\xff" * 6},
        {"mac": bytes(6)},
        {"mac": b"\x01\0\x5e\0\0\x01"},
    ),
)
def test_messages_that_are_not_for_us(fields: dict[str, Any]) -> None:
    server = make_server()
    assert server.answer(request("discover", **fields), MAC, 0.0) is None
    assert sum(server.counters.values()) == 1
    assert len(server.leases) == 0


@pytest.mark.parametrize("kind", (0, 2, 5, 6, 9, 255))
def test_kinds_that_no_guest_sends(kind: int) -> None:
    server = make_server()
    payload = bytes(BOOTP(chaddr=MAC, options=b"\x63\x82\x53\x63")) + bytes((53, 1, kind, 255))
    assert server.answer(payload, MAC, 0.0) is None
    assert server.counters == {"dhcp_malformed": 1}


def test_a_message_type_of_two_bytes_is_no_bootp() -> None:
    server = make_server()
    payload = bytes(BOOTP(chaddr=MAC, options=b"\x63\x82\x53\x63")) + bytes((53, 2, 1, 1, 255))
    assert server.answer(payload, MAC, 0.0) is None
    assert server.counters == {"dhcp_malformed": 1}


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=24),
            st.lists(
                st.tuples(st.sampled_from([12, 50, 51, 52, 53, 54, 55, 57, 61, 80, 81, 255]), st.binary(max_size=9)),
                max_size=6,
            ),
            st.sampled_from([MAC, OTHER]),
            st.floats(0, 100_000),
        ),
        max_size=12,
    )
)
def test_any_messages_are_survived(steps: list[tuple[bytes, list[tuple[int, bytes]], bytes, float]]) -> None:
    server = make_server()
    now = 0.0
    for head, options, mac, wait in steps:
        now += wait
        base = bytearray(bytes(BOOTP(chaddr=mac, options=b"\x63\x82\x53\x63")))
        base[4 : 4 + len(head)] = head
        payload = bytes(base) + b"".join(bytes((code, len(data))) + data for code, data in options)
        reply = server.answer(payload, mac, now)
        if reply is not None:
            assert len(reply.payload) >= 300
            assert parse_dhcp(reply.payload) is not None
    assert len({lease.address for lease in server.leases}) == len(server.leases)
