"""The guest that has the host's address, in the core: its lease, what DHCP tells it, and who may speak as it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from netstack.core import lease_records
from netstack.core.dhcp import OUTSIDE_LEASE_TIME, DhcpServer, OutsideNetwork
from netstack.core.leases import LEASE_TIME, LeaseTable, StaticLease
from netstack.core.neighbors import Neighbor
from netstack.wire.arp import REPLY, REQUEST, Arp, parse_arp, write_arp
from tests.core.ip_fakes import addresses
from tests.core.test_dhcp import GATEWAY, MAC, OTHER, ask, request
from tests.world import GUEST_MAC, OTHER_MAC, WORLD4, World

HOST = bytes((198, 51, 100, 1))
HOST_TEXT = "198.51.100.1"
MOVED = bytes((198, 51, 100, 9))
ROUTER = bytes((198, 51, 100, 254))
NEIGHBOR = bytes((198, 51, 100, 77))
HOST6 = ip_address("2001:db8:1::1").packed
POOL6 = ip_address("fd00:c0a8:5::").packed
NAMED = StaticLease(MAC, HOST, HOST6, "k3s")


def make_leases(*statics: StaticLease) -> LeaseTable:
    return LeaseTable(bytes((192, 168, 5, 0)), 24, reserved=(GATEWAY,), prefix6=POOL6, statics=statics)


def make_server(leases: LeaseTable) -> DhcpServer:
    return DhcpServer(
        leases,
        gateway=GATEWAY,
        dns=(GATEWAY,),
        mtu=1500,
        outside={HOST: OutsideNetwork(24, ROUTER), MOVED: OutsideNetwork(20, ROUTER)},
        moving={MAC},
    )


class TestLease:
    def test_dhcp_gives_the_hosts_address_its_network_and_its_router(self) -> None:
        server = make_server(make_leases(NAMED))
        for kind, wanted in (("discover", []), ("request", [("requested_addr", HOST_TEXT)])):
            answer = ask(server, request(kind, *wanted))
            assert answer.yiaddr == HOST_TEXT
            assert answer.options["subnet_mask"] == "255.255.255.0"
            assert answer.options["router"] == "198.51.100.254"
            assert answer.options["broadcast_address"] == "198.51.100.255"
            assert answer.options["server_id"] == "192.168.5.2"
            assert answer.options["lease_time"] == OUTSIDE_LEASE_TIME

    def test_other_guests_get_what_they_always_got(self) -> None:
        server = make_server(make_leases(NAMED))
        ask(server, request("discover"))
        answer = ask(server, request("discover", mac=OTHER), mac=OTHER)
        assert answer.yiaddr.startswith("192.168.5.")
        assert answer.options["router"] == "192.168.5.2"
        assert answer.options["lease_time"] == LEASE_TIME
        assert ask(server, request("request", ("requested_addr", HOST_TEXT), mac=OTHER), mac=OTHER).kind == "nak"

    def test_it_is_one_lease_with_both_addresses_found_by_each_and_by_name(self) -> None:
        leases = make_leases(NAMED)
        lease = leases.bind(MAC, HOST, 0.0)
        assert lease is not None
        assert leases.bind6(MAC, 0.0) is lease
        assert lease.addresses(1.0) == [HOST, HOST6]
        assert leases.find_address(HOST) is leases.find_address(HOST6) is leases.find_name("k3s", 1.0) is lease
        assert leases.owner_of(HOST, 1.0) == MAC
        assert leases.release(MAC, HOST, 2.0) is lease
        assert leases.bind(MAC, HOST, 3.0) is lease

    def test_when_the_host_moves_a_renewal_is_refused_and_the_new_address_is_given(self) -> None:
        leases = make_leases(NAMED)
        server = make_server(leases)
        ask(server, request("request", ("requested_addr", HOST_TEXT)))
        leases.set_statics([StaticLease(MAC, MOVED, HOST6, "k3s")])
        assert ask(server, request("request", ciaddr=HOST_TEXT)).kind == "nak"
        answer = ask(server, request("discover"))
        assert answer.yiaddr == "198.51.100.9"
        assert answer.options["subnet_mask"] == "255.255.240.0"
        assert leases.find_address(HOST) is None

    @pytest.mark.parametrize("after", ((), (StaticLease(MAC, None, None, "k3s"),)), ids=("not named", "as the others"))
    def test_when_the_settings_or_the_host_have_none_any_more_it_is_a_guest_like_others(
        self, after: tuple[StaticLease, ...]
    ) -> None:
        leases = make_leases(NAMED)
        server = make_server(leases)
        ask(server, request("request", ("requested_addr", HOST_TEXT)))
        leases.set_statics(after)
        assert ask(server, request("request", ciaddr=HOST_TEXT)).kind == "nak"
        assert ask(server, request("discover")).yiaddr.startswith("192.168.5.")

    def test_one_that_was_a_guest_like_others_becomes_the_host(self) -> None:
        leases = make_leases()
        server = make_server(leases)
        mine = ask(server, request("discover")).yiaddr
        ask(server, request("request", ("requested_addr", mine)))
        leases.set_statics([NAMED])
        assert ask(server, request("request", ciaddr=mine)).kind == "nak"
        assert ask(server, request("discover")).yiaddr == HOST_TEXT
        assert len(leases) == 1

    def test_it_is_not_what_a_restart_should_remember(self) -> None:
        leases = make_leases(NAMED)
        leases.bind(MAC, HOST, 0.0)
        leases.bind(OTHER, bytes((192, 168, 5, 16)), 0.0)
        written = lease_records.write_leases(leases, 0.0, 1e9)
        assert [entry["address"] for entry in written["leases"]] == ["192.168.5.16"]


class TestAddresses:
    def test_who_has_the_hosts_address_may_send_from_it_and_no_caller_has_it(self) -> None:
        where = addresses()
        assert not where.may_be_guest(HOST)
        assert where.caller(HOST, 4) == HOST
        where.borrowed.update((HOST, HOST6))
        assert where.may_be_guest(HOST)
        assert where.caller(HOST, 4) == where.gateway
        assert where.caller(HOST6, 16) == where.gateway6
        assert where.caller(WORLD4, 4) == WORLD4


class Wire(World):
    """A stack whose first guest has the host's address."""

    def __init__(self) -> None:
        super().__init__()
        self.link = self.add_link()
        self.stack.addresses.borrowed.add(HOST)
        self.stack.neighbors.owner_of = lambda address: GUEST_MAC if address == HOST else None

    def ask(self, sender: bytes, target: bytes, mac: bytes = GUEST_MAC) -> Arp | None:
        """The answer to an ARP request."""
        packet = write_arp(REQUEST, mac, sender, bytes(6), target)
        self.receive(self.link, b"\xff" * 6 + mac + b"\x08\x06" + packet + bytes(18))
        for frame in self.take(self.link):
            found = parse_arp(memoryview(frame), 14, len(frame))
            if found is not None and found.operation == REPLY:
                return found
        return None


class TestWire:
    def test_the_gateway_answers_for_all_the_hosts_network(self) -> None:
        wire = Wire()
        for target in (ROUTER, NEIGHBOR, WORLD4, wire.stack.addresses.gateway):
            answer = wire.ask(HOST, target)
            assert answer is not None
            assert (answer.sender_mac, answer.sender_address) == (wire.mac, target)

    def test_but_not_for_the_guests_own_address_nor_for_those_of_guests(self) -> None:
        wire = Wire()
        for target in (HOST, bytes((192, 168, 5, 16))):
            assert wire.ask(HOST, target) is None
        assert wire.ask(bytes(4), HOST) is None

    def test_nor_to_others(self) -> None:
        wire = Wire()
        assert wire.ask(bytes((192, 168, 5, 16)), ROUTER, OTHER_MAC) is None
        assert wire.ask(HOST, ROUTER, OTHER_MAC) is None

    def test_a_forward_to_an_address_of_the_hosts_finds_its_guest_without_asking(self) -> None:
        wire = Wire()
        found: list[Neighbor | None] = []
        wire.stack.neighbors.resolve(HOST, lambda neighbor, now: found.append(neighbor), wire.now)
        assert not found  # it has not said a word yet: asked for by ARP
        wire.stack.end_round(wire.now)
        assert wire.take(wire.link)
        wire.ask(bytes((192, 168, 5, 15)), ROUTER)  # now its MAC is known on this link
        second = bytes((198, 51, 100, 2))
        wire.stack.addresses.borrowed.add(second)
        wire.stack.neighbors.owner_of = lambda address: GUEST_MAC
        wire.stack.neighbors.resolve(second, lambda neighbor, now: found.append(neighbor), wire.now)
        assert found[-1] is not None
        assert (found[-1].mac, found[-1].link) == (GUEST_MAC, wire.link)

    def test_where_its_guest_is_there_is_an_address_that_no_interface_has(self) -> None:
        wire = Wire()
        second = bytes((198, 51, 100, 2))
        wire.stack.addresses.borrowed.add(second)
        wire.stack.neighbors.owner_of = lambda address: GUEST_MAC
        found: list[Neighbor | None] = []
        for link in (wire.link, wire.add_link("where it went without a word about that address")):
            wire.stack.switch.learn(GUEST_MAC, link, wire.now)
            wire.stack.neighbors.resolve(second, lambda neighbor, now: found.append(neighbor), wire.now)
            neighbor = found[-1]
            assert neighbor is not None
            assert neighbor.link is link
            assert wire.stack.neighbors.current(second, wire.now) is neighbor
            wire.now += 1000.0

    def test_nobody_stands_for_the_hosts_router_before_that_guest(self) -> None:
        wire = Wire()
        wire.ask(HOST, ROUTER)
        wire.stack.switch.learn(OTHER_MAC, wire.add_link("other"), wire.now)
        claim = write_arp(REPLY, OTHER_MAC, ROUTER, GUEST_MAC, HOST)
        wire.receive(wire.links[1], GUEST_MAC + OTHER_MAC + b"\x08\x06" + claim + bytes(18))
        assert wire.drops["source_not_its_own"] == 1
        assert wire.take(wire.link) == []
