"""The gateway's UDP services: the short way says what the slow road says, for as long as the guest may ask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.core.ports import Datagram, Offload
from tests.frames import udp_frame
from tests.world import GUEST4, GUEST6, GUEST_MAC, OTHER_MAC, WORLD4, World

BOTH_FAMILIES = pytest.mark.parametrize("ipv6", (False, True), ids=["ipv4", "ipv6"])
QUERY = bytes(range(20))  # what is shorter than a TCP header is not looked at by the fast path
ALL = Offload(checksum=True, tso4=True, tso6=True, uso=True)


class Service:
    """Answers by both ways, with what it was sent; `quick` says whether it knows the answer at once."""

    def __init__(self, world: World, *, tail: bytes = b" yes") -> None:
        self.world = world
        self.tail = tail
        self.knows = True
        self.slow: list[bytes] = []
        self.quick: list[tuple[bytes, bytes]] = []
        addresses = world.stack.addresses
        where = (addresses.dns, addresses.dns6)
        world.stack.register_udp(53, self.on_datagram, addresses=where, quick=self.answer)

    def answer(self, payload: bytes, guest: bytes) -> bytes | None:
        if not self.knows:
            return None
        self.quick.append((payload, guest))
        return payload + self.tail

    def on_datagram(self, datagram: Datagram, now: float) -> None:
        self.slow.append(datagram.payload)
        answer = datagram.payload + self.tail
        to = datagram.src, datagram.src_port
        self.world.stack.send_udp(datagram.link, datagram.mac, datagram.dst, datagram.dst_port, *to, answer)


def ask(world: World, payload: bytes, *, ipv6: bool = False, port: int = 40000, mac: bytes = GUEST_MAC) -> bytes:
    guest, dns = (GUEST6, world.stack.addresses.dns6) if ipv6 else (GUEST4, world.stack.addresses.dns)
    return udp_frame(world.mac, mac, guest, dns, (port, 53), payload)


@BOTH_FAMILIES
@pytest.mark.parametrize("offload", (None, ALL), ids=["plain", "offload"])
@pytest.mark.parametrize("size", (13, 30, 31, 511))
def test_the_short_way_says_to_the_byte_what_the_slow_road_says(ipv6: bool, offload: Offload | None, size: int) -> None:
    """The World's judge has scapy verify checksums and lengths of both."""
    world = World()
    link = world.add_link(offload=offload)
    service = Service(world)
    world.receive(link, ask(world, bytes(size), ipv6=ipv6))
    (slow,) = world.take(link)
    world.receive(link, ask(world, bytes(size), ipv6=ipv6))
    (quick,) = world.take(link)
    assert quick == slow
    assert (len(service.slow), len(service.quick)) == (1, 1)
    assert service.quick[0] == (bytes(size), GUEST6 if ipv6 else GUEST4)


def test_answers_of_one_batch_go_to_the_ports_that_asked_in_order() -> None:
    world = World()
    link = world.add_link()
    service = Service(world)
    world.receive(link, ask(world, b"first"))
    world.take(link)
    batch = [ask(world, b"query number %d" % number, port=50000 + number % 3) for number in range(9)]
    world.receive(link, *batch)
    got = [(frame[36] << 8 | frame[37], frame[42:].rstrip(b"\0")) for frame in world.take(link)]
    assert got == [(50000 + number % 3, b"query number %d yes" % number) for number in range(9)]
    assert len(service.slow) == 1


def test_what_is_not_known_at_once_takes_the_slow_road() -> None:
    world = World()
    link = world.add_link()
    service = Service(world)
    service.knows = False
    for _ in range(3):
        world.receive(link, ask(world, QUERY))
    assert service.slow == [QUERY] * 3


def test_a_datagram_beyond_what_is_looked_at_takes_the_slow_road() -> None:
    world = World()
    link = world.add_link()
    service = Service(world)
    world.receive(link, ask(world, QUERY), ask(world, bytes(513)))
    assert service.slow == [QUERY, bytes(513)]


def test_an_answer_that_is_too_long_for_one_frame_is_fragmented() -> None:
    world = World(oracle=False)
    link = world.add_link()
    service = Service(world, tail=bytes(2000))
    world.receive(link, ask(world, QUERY))
    slow = world.take(link)
    world.receive(link, ask(world, QUERY))
    quick = world.take(link)
    assert len(service.quick) == 1
    assert [len(frame) for frame in quick] == [len(frame) for frame in slow]
    assert len(quick) == 2


def test_another_mac_with_the_address_of_a_guest_gets_no_answer() -> None:
    """The slow road refuses it, and so it is not answered by the short way either."""
    world = World()
    link = world.add_link()
    service = Service(world)
    world.receive(link, ask(world, QUERY))
    world.take(link)
    thief = ask(world, QUERY, mac=OTHER_MAC)
    world.receive(link, thief, thief)
    assert world.take(link) == []
    assert not service.quick
    assert world.drops == {"source_not_its_own": 2}


def test_a_guest_that_comes_back_on_another_link_is_answered_there() -> None:
    world = World()
    old = world.add_link("old")
    service = Service(world)
    world.receive(old, ask(world, QUERY), ask(world, QUERY))
    world.remove_link(old)
    new = world.add_link("new")
    world.receive(new, ask(world, QUERY), ask(world, QUERY))
    assert len(world.take(new)) == 2
    assert (len(service.slow), len(service.quick)) == (2, 2)


def test_an_address_that_went_to_another_guest_is_answered_to_that_one() -> None:
    world = World()
    link, other = world.add_link("one"), world.add_link("two")
    Service(world)
    world.receive(link, ask(world, QUERY), ask(world, QUERY))
    world.take(link)
    world.now += 120.0  # silent for so long that the address, which nobody leased, is free
    world.stack.switch.refresh()
    frame = ask(world, QUERY, mac=OTHER_MAC)
    world.receive(other, frame, frame)
    assert [frame[:6] for frame in world.take(other)] == [OTHER_MAC] * 2
    assert world.take(link) == []
    world.receive(link, ask(world, QUERY))
    assert world.take(link) == []


def test_a_guest_that_lost_its_address_to_another_is_not_answered_any_more() -> None:
    """The other one never asked here, so that the route is still that of the first."""
    world = World()
    link, other = world.add_link("one"), world.add_link("two")
    service = Service(world)
    world.receive(link, ask(world, QUERY), ask(world, QUERY))
    world.take(link)
    world.now += 120.0
    world.receive(other, udp_frame(world.mac, OTHER_MAC, GUEST4, WORLD4, (40000, 9), QUERY))
    world.receive(link, ask(world, QUERY))
    assert world.take(link) == []
    assert (len(service.quick), world.drops) == (1, {"source_not_its_own": 1})


def test_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netstack.core.udp_services._ROUTES", 4)
    world = World(oracle=False)
    link = world.add_link()
    service = Service(world)
    dns = world.stack.addresses.dns
    for number in range(20, 40):
        guest = GUEST4[:3] + bytes((number,))
        frame = udp_frame(world.mac, GUEST_MAC, guest, dns, (40000, 53), QUERY)
        world.receive(link, frame, frame)
    assert len(world.take(link)) == 40
    assert len(service.quick) == 20
    assert len(world.stack.udp_services._routes) <= 4


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4),
    st.integers(0, 130),
    st.sampled_from((None, ALL)),
)
def test_whatever_is_changed_in_a_frame_nothing_raises_and_what_leaves_is_sound(
    ipv6: bool, changes: list[tuple[int, int]], cut: int, offload: Offload | None
) -> None:
    world = World()
    link = world.add_link(offload=offload)
    service = Service(world)
    whole = ask(world, QUERY, ipv6=ipv6)
    world.receive(link, whole, whole)
    assert (len(service.slow), len(service.quick)) == (1, 1)
    world.take(link)
    frame = bytearray(whole)
    for position, value in changes:
        frame[position % len(frame)] = value
    world.receive(link, bytes(frame)[: max(cut, 1)], bytes(frame))
    world.take(link)  # scapy looks at each
