"""The table of TCP flows: keys, limits, and who pays for a full one."""

from __future__ import annotations

import struct

from netstack.core.flows import Limits, flow_key
from tests.script import Talk, established, seg
from tests.world import GUEST4, GUEST6, OTHER4, OTHER_MAC, WORLD4, WORLD6, World


def test_keys_are_what_one_unpack_of_the_packet_gives() -> None:
    addresses, ports = struct.unpack("!QI", GUEST4 + WORLD4 + bytes.fromhex("9c40 0050"))
    assert flow_key(GUEST4, 40000, WORLD4, 80) == (addresses, ports)
    assert flow_key(GUEST6, 40000, WORLD6, 80) == (GUEST6 + WORLD6, 0x9C400050)


def test_keys_differ_in_each_part() -> None:
    ends = [
        (GUEST4, 1, WORLD4, 2),
        (GUEST4, 2, WORLD4, 1),
        (WORLD4, 1, GUEST4, 2),
        (GUEST4, 1, WORLD4, 3),
        (OTHER4, 1, WORLD4, 2),
        (GUEST6, 1, WORLD6, 2),
    ]
    assert len({flow_key(*end) for end in ends}) == len(ends)


def _open(world: World, port: int, **where: object) -> Talk:
    talk = Talk(world=world, guest_port=port, **where)  # type: ignore[arg-type]
    talk.guest(seg("S", mss=1460))
    return talk


def test_a_full_table_is_silent_and_counts() -> None:
    """The guest tries again later; a reset would tell it that nobody listens."""
    world = World(limits=Limits(tcp_flows=3))
    talks = []
    for port in (1, 2, 3):
        talks.append(_open(world, port))
        talks[-1].received()
    late = _open(world, 4, link=talks[0].link)
    late.silence()
    assert world.drops == {"tcp_flow_table_full": 1}
    assert len(world.stack.flows) == 3
    talks[0].guest(seg("R", seq=1))
    late.guest(seg("S", seq=0, mss=1460))
    late.expect(seg("SA", ack=1))


def test_a_guest_has_its_share_and_others_go_on() -> None:
    world = World(limits=Limits(tcp_flows_per_guest=2))
    link = world.add_link()
    for port in (1, 2, 3):
        _open(world, port, link=link)
        world.take(link)
    assert world.drops == {"tcp_flows_of_guest": 1}
    other = Talk(world=world, link=world.add_link("two"), mac=OTHER_MAC, guest=OTHER4)
    established(talk=other)
    assert len(world.stack.flows) == 3


def test_the_share_is_the_links_whatever_addresses_its_guest_uses() -> None:
    world = World(limits=Limits(tcp_flows_per_guest=3))
    link = world.add_link()
    for n in range(5):
        _open(world, 1, link=link, guest=GUEST4[:3] + bytes((100 + n,)))
        world.take(link)
        _open(world, 1, link=link, guest=GUEST6[:15] + bytes((100 + n,)), ipv6=True)
        world.take(link)
    assert len(world.stack.flows) == 3
    assert world.drops == {"tcp_flows_of_guest": 7}


def test_the_share_moves_with_the_flow() -> None:
    world = World(limits=Limits(tcp_flows_per_guest=1))
    talk = established(talk=Talk(world=world))
    world.remove_link(talk.link)
    talk.link = world.add_link("again")
    talk.guest(seg("A"))
    late = _open(world, 41000, link=talk.link)
    late.silence()
    assert world.drops == {"tcp_flows_of_guest": 1}


def test_refused_connections_take_no_room() -> None:
    world = World(limits=Limits(tcp_flows=2))
    link = world.add_link()
    world.host.result = 111
    for port in range(1, 50):
        _open(world, port, link=link)
        world.take(link)
    assert len(world.stack.flows) == 0
    assert world.drops == {}
    world.host.result = 0
    established(talk=Talk(world=world, link=link, guest_port=77))


def test_black_holes_do_not_hold_others_up() -> None:
    """SYNs to where nobody answers wait in the host's kernel; there is no limit but the table's own."""
    world = World()
    link = world.add_link()
    world.host.connects = False
    for port in range(1, 1001):
        world.receive(link, Talk(world=world, link=link, guest_port=port).frame(seg("S", mss=1460)))
    assert len(world.stack.flows) == 1000
    world.host.connects = True
    established(talk=Talk(world=world, link=link, guest_port=2000))


def test_connections_whose_host_has_not_taken_all_still_count() -> None:
    """They are closed for the guest, and hold a descriptor until the host has read, or LINGER is over."""
    world = World(limits=Limits(tcp_flows=10, tcp_flows_per_guest=3))
    for port in range(1, 4):
        talk = established(talk=Talk(world=world, guest_port=port))
        talk.host.room = 0
        talk.host.closes()
        talk.settle()
        talk.expect(seg("FA", seq=1))
        talk.guest(seg("FA", ack=2, data=b"unread"))
        talk.received()
        world.advance(world.now + 3)
        assert talk.state == "CLOSED"
        assert not talk.host.closed
    assert len(world.stack.flows) == 0
    another = Talk(world=world, guest_port=4)
    another.guest(seg("S"))
    another.silence()
    assert world.drops == {"tcp_flows_of_guest": 1}
    next(world.host.open_sockets()).room = None
    world.settle()
    established(talk=Talk(world=world, guest_port=5))
    world.advance(world.now + 100)
    assert world.stack.flows._of_link == {another.link: 1}


def test_removing_twice_or_in_anothers_place_is_harmless() -> None:
    world = World()
    talk = established(talk=Talk(world=world))
    flow = talk.flow
    table = world.stack.flows
    table.remove(flow)
    table.remove(flow)
    assert len(table) == 0
    assert table._of_link == {}
    table.add(flow)
    assert list(table) == [flow]


def test_iterating_while_flows_end() -> None:
    world = World()
    socks = [established(talk=Talk(world=world, guest_port=port)).host for port in range(1, 6)]
    for flow in world.stack.flows:
        flow.abort(world.now, "test", tell_guest=False)
    assert len(world.stack.flows) == 0
    assert all(sock.was_reset for sock in socks)
    world.check()


def _waits(world: World, port: int) -> Talk:
    """A connection of the guest's in TIME-WAIT."""
    talk = established(talk=Talk(world=world, guest_port=port))
    talk.host.closes()
    talk.settle()
    talk.received()
    talk.guest(seg("FA", ack=2))
    talk.received()
    assert talk.state == "TIME_WAIT"
    return talk


def test_the_oldest_in_time_wait_makes_room_for_a_new_connection() -> None:
    """2,000 connections a second leave 4,000 in TIME-WAIT, and a guest that makes more must not run into its limit."""
    world = World(limits=Limits(tcp_flows=3))
    first, second, alive = _waits(world, 1), _waits(world, 2), established(talk=Talk(world=world, guest_port=3))
    _open(world, 4).expect(seg("SA", ack=1))
    assert (first.state, second.state, alive.state) == ("CLOSED", "TIME_WAIT", "ESTABLISHED")
    _open(world, 5).expect(seg("SA", ack=1))
    assert (second.state, alive.state) == ("CLOSED", "ESTABLISHED")
    _open(world, 6).silence()
    assert world.drops == {"tcp_flow_table_full": 1}
    assert not world.stack.flows._time_wait


def test_another_guests_time_wait_is_its_own() -> None:
    world = World(limits=Limits(tcp_flows=2))
    waiting = _waits(world, 1)
    established(talk=Talk(world=world, guest_port=2))
    other = Talk(world=world, link=world.add_link("two"), mac=OTHER_MAC, guest=OTHER4)
    other.guest(seg("S", mss=1460))
    other.silence()
    assert waiting.state == "TIME_WAIT"


def test_time_wait_follows_its_guest_to_another_link_and_ends_there() -> None:
    world = World()
    talk = _waits(world, 1)
    flow, link = talk.flow, world.add_link("two")
    world.stack.flows.move(flow, link)
    flow.link = link
    assert world.stack.flows.oldest_time_wait(link) is flow
    assert world.stack.flows.oldest_time_wait(talk.link) is None
    talk.wait(2.0)
    assert talk.state == "CLOSED"
    assert not world.stack.flows._time_wait
