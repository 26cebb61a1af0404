"""Who is at which address: learning, ownership, resolution, bounds (RFC 826, RFC 1122 2.3.2.1, RFC 4861 7.2)."""

from __future__ import annotations

import pytest

from netstack.core.flows import Limits
from netstack.core.neighbors import _ASKS, _RESOLUTIONS, DEFAULT_MTU, Neighbor
from netstack.core.ports import Link
from netstack.wire.arp import parse_arp, write_arp
from tests.core.ip_fakes import GATEWAY4, GUEST4, GUEST6
from tests.fakes import FakeLink
from tests.frames import udp_frame
from tests.script import Talk, seg
from tests.world import GUEST_MAC, OTHER_MAC, WORLD4, World


class Discovery:
    """Remembers who was asked for over IPv6."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def on_packet(self, *_: object) -> None: ...

    def solicit(self, address: bytes, link: Link | None) -> None:
        self.asked.append(address)


class Bench:
    def __init__(self, limits: Limits | None = None) -> None:
        self.world = World(limits=limits)
        self.link = self.world.add_link("one")
        self.neighbors = self.world.stack.neighbors
        self.found: list[tuple[Neighbor | None, float]] = []

    def resolve(self, address: bytes) -> None:
        self.neighbors.resolve(address, lambda neighbor, now: self.found.append((neighbor, now)), self.world.now)
        self.world.end_round()

    def questions(self, link: FakeLink | None = None) -> list[bytes]:
        asked = []
        for frame in self.world.take(link or self.link):
            packet = parse_arp(frame, 14, 42)
            assert packet is not None
            assert packet.operation == 1
            assert packet.sender_address == GATEWAY4
            asked.append(packet.target_address)
        return asked

    def answer(self, address: bytes = GUEST4, mac: bytes = GUEST_MAC, link: FakeLink | None = None) -> None:
        body = write_arp(2, mac, address, self.world.mac, GATEWAY4)
        self.world.receive(link or self.link, self.world.mac + mac + b"\x08\x06" + body)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_guest_is_learnt_from_its_first_packet(bench: Bench) -> None:
    bench.world.receive(bench.link, udp_frame(bench.world.mac, GUEST_MAC, GUEST4, WORLD4, (1, 53), b"?"))
    neighbor = bench.neighbors.find(GUEST4)
    assert neighbor is not None
    assert (neighbor.mac, neighbor.link, neighbor.mtu) == (GUEST_MAC, bench.link, DEFAULT_MTU)


def test_a_known_guest_is_found_at_once(bench: Bench) -> None:
    bench.answer()
    bench.resolve(GUEST4)
    assert [neighbor is not None for neighbor, _ in bench.found] == [True]
    assert bench.questions() == []


def test_an_unknown_guest_is_asked_for_on_all_links_every_second(bench: Bench) -> None:
    two = bench.world.add_link("two")
    bench.resolve(GUEST4)
    bench.resolve(GUEST4)
    start = bench.world.now
    for second in range(_ASKS):
        assert bench.questions() == [GUEST4]
        assert bench.questions(two) == [GUEST4]
        assert bench.found == []
        bench.world.advance(start + second + 1)
    assert [neighbor for neighbor, _ in bench.found] == [None, None]
    bench.world.advance(start + 100)
    assert bench.questions() == []


def test_an_answer_ends_the_asking(bench: Bench) -> None:
    bench.resolve(GUEST4)
    bench.resolve(GUEST4)
    bench.world.advance(bench.world.now + 1.5)
    bench.questions()
    bench.answer()
    assert [neighbor.mac for neighbor, _ in bench.found if neighbor] == [GUEST_MAC, GUEST_MAC]
    bench.world.take(bench.link)
    bench.world.advance(bench.world.now + 10)
    assert bench.questions() == []


def test_asking_again_after_a_failure(bench: Bench) -> None:
    bench.resolve(GUEST4)
    bench.world.advance(bench.world.now + 10)
    bench.questions()
    bench.resolve(GUEST4)
    assert bench.questions() == [GUEST4]


def test_resolutions_are_bounded(bench: Bench) -> None:
    subnet = GUEST4[:2] + b"\x05"
    for i in range(1, 255):
        if i not in (2, 3):
            bench.resolve(subnet + bytes((i,)))
    for i in range(20):
        bench.resolve(GUEST6[:15] + bytes((i + 100,)))
    assert [neighbor for neighbor, _ in bench.found] == [None] * (20 + 252 - _RESOLUTIONS)


def test_over_ipv6_neighbor_discovery_asks(bench: Bench) -> None:
    discovery = Discovery()
    bench.world.stack.discovery = discovery
    bench.resolve(GUEST6)
    assert discovery.asked == [GUEST6]
    bench.world.advance(bench.world.now + 1)
    assert discovery.asked == [GUEST6, GUEST6]
    bench.neighbors.learn(bench.link, GUEST_MAC, GUEST6, bench.world.now)
    assert [neighbor is not None for neighbor, _ in bench.found] == [True]


def test_the_table_is_bounded_and_forgets_the_oldest() -> None:
    bench = Bench(Limits(neighbors=10))
    for i in range(100, 150):
        bench.answer(GUEST4[:3] + bytes((i,)), GUEST_MAC)
    assert len(bench.neighbors.all()) == 10
    assert bench.neighbors.find(GUEST4[:3] + bytes((149,))) is not None
    assert bench.neighbors.find(GUEST4[:3] + bytes((100,))) is None


def test_a_flood_of_addresses_pushes_out_only_those_of_its_own_link() -> None:
    """Another guest's address that nobody leased would be free to take, once it is forgotten."""
    bench = Bench(Limits(neighbors=10))
    two = bench.world.add_link("two")
    bench.answer()
    for i in range(50):
        bench.answer(GUEST4[:3] + bytes((100 + i,)), OTHER_MAC, two)
    bench.answer(GUEST4, OTHER_MAC, two)
    neighbor = bench.neighbors.find(GUEST4)
    assert neighbor is not None
    assert neighbor.mac == GUEST_MAC
    assert len(bench.neighbors.all()) == 10


def test_guests_of_a_lost_link_are_forgotten(bench: Bench) -> None:
    two = bench.world.add_link("two")
    bench.answer()
    bench.answer(GUEST4[:3] + b"\x20", OTHER_MAC, two)
    bench.world.remove_link(bench.link)
    assert bench.neighbors.find(GUEST4) is None
    assert bench.neighbors.find(GUEST4[:3] + b"\x20") is not None


def test_the_mtu_grows_by_what_the_guest_sends_and_by_its_mss(bench: Bench) -> None:
    """A guest that sends a packet takes one of the same size; RFC 9293 3.7.1: MSS is what the interface takes."""
    world = World()
    link = world.add_link(mtu=9000)
    world.receive(link, udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (1, 53), bytes(2000)))
    assert world.stack.guest_mtu(GUEST4) == 2028
    Talk(world=world, link=link).guest(seg("S", mss=4000))
    assert world.stack.guest_mtu(GUEST4) == 4040
    world.take(link)
    Talk(world=world, link=link, guest_port=2).guest(seg("S", mss=65000))
    assert world.stack.guest_mtu(GUEST4) == 9000
    assert world.stack.guest_mtu(GUEST4[:3] + b"\x63") == DEFAULT_MTU


def test_the_mtu_is_remembered_where_the_guest_moves(bench: Bench) -> None:
    bench.neighbors.learn(bench.link, GUEST_MAC, GUEST4, 0.0).mtu = 9000
    two = bench.world.add_link("two")
    assert bench.neighbors.learn(two, GUEST_MAC, GUEST4, 1.0).mtu == 9000
    assert bench.neighbors.learn(two, OTHER_MAC, GUEST4, 2.0).mtu == DEFAULT_MTU


def test_a_new_link_hears_who_the_gateway_is(bench: Bench) -> None:
    """Gratuitous ARP (RFC 5227 3), so that a guest that knew another gateway learns ours."""
    link = FakeLink("new")
    bench.world.links.append(link)
    bench.world.stack.add_link(link, bench.world.now)
    bench.world.stack.flush()
    packets = [parse_arp(frame, 14, 42) for frame in bench.world.take(link)]
    addresses = bench.world.stack.addresses
    assert [(each.sender_address, each.target_address) for each in packets if each] == [
        (addresses.gateway, addresses.gateway),
        (addresses.dns, addresses.dns),
    ]
    assert all(each is not None and each.sender_mac == bench.world.mac for each in packets)
