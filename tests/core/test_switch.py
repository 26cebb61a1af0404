"""The learning switch: who gets which frame (IEEE 802.1D 7.7 and 7.8)."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.l2 import Ether

from netstack.core.switch import _AGEING, _IN_USE, _TABLE
from tests.fakes import FakeLink
from tests.frames import udp_frame
from tests.script import Talk, established, seg
from tests.world import GUEST4, GUEST_MAC, OTHER4, OTHER_MAC, World

THIRD_MAC = bytes.fromhex("525400333333")
BROADCAST = b"\xff" * 6


class Bench:
    """Three links, a guest on each of the first two."""

    def __init__(self) -> None:
        self.world = World()
        self.one, self.two, self.three = (self.world.add_link(name) for name in ("one", "two", "three"))

    def send(self, link: FakeLink, dst: bytes, src: bytes = GUEST_MAC, payload: bytes = b"hello") -> bytes:
        frame = udp_frame(dst, src, GUEST4, OTHER4, (1000, 2000), payload)
        self.world.receive(link, frame)
        return frame

    def heard(self) -> list[list[bytes]]:
        return [self.world.take(link) for link in self.world.links]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_unknown_unicast_is_flooded_and_known_is_not(bench: Bench) -> None:
    frame = bench.send(bench.one, OTHER_MAC)
    padded = frame.ljust(60, b"\0")
    assert bench.heard() == [[], [padded], [padded]]
    bench.send(bench.two, GUEST_MAC, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [1, 0, 0]
    bench.send(bench.one, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [0, 1, 0]


@pytest.mark.parametrize("group", (BROADCAST, b"\x01\0\x5e\0\0\xfb", b"\x33\x33\0\0\0\x01"), ids=bytes.hex)
def test_groups_reach_all_others(bench: Bench, group: bytes) -> None:
    bench.send(bench.two, group, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [1, 0, 1]


def test_frames_for_the_gateway_go_nowhere_else(bench: Bench) -> None:
    bench.send(bench.one, bench.world.mac)
    assert all(len(frames) == 0 for frames in bench.heard()[1:])


def test_a_frame_for_a_guest_on_the_same_link_is_not_repeated(bench: Bench) -> None:
    bench.send(bench.one, bench.world.mac, OTHER_MAC)
    bench.heard()
    bench.send(bench.one, OTHER_MAC)
    assert bench.heard() == [[], [], []]


def test_a_guest_that_moves_is_found_at_its_new_place(bench: Bench) -> None:
    """Its old link is closed, or it has been silent there for a while."""
    bench.send(bench.one, BROADCAST)
    bench.heard()
    bench.world.advance(bench.world.now + _IN_USE)
    bench.send(bench.three, BROADCAST)
    bench.heard()
    bench.send(bench.two, GUEST_MAC, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [0, 0, 1]


def test_a_mac_in_use_cannot_be_taken_over(bench: Bench) -> None:
    """Another guest sends with it: its frames are dropped and counted, and the owner's go on."""
    bench.send(bench.one, BROADCAST)
    bench.heard()
    for _ in range(10):
        bench.send(bench.two, BROADCAST)
        bench.send(bench.two, bench.world.mac)
        assert bench.heard() == [[], [], []]
        bench.world.advance(bench.world.now + 25)
        bench.send(bench.one, BROADCAST)
        bench.heard()
    assert bench.world.drops["mac_of_another_link"] == 20
    bench.send(bench.three, GUEST_MAC, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [1, 0, 0]


def test_a_guest_in_the_middle_of_a_transfer_counts_as_heard(bench: Bench) -> None:
    """Its frames take the fast path, which notes nothing: so the rim has them take the slow road every 20 s."""
    talk = established(talk=Talk(world=bench.world, link=bench.one))
    for _ in range(10):
        bench.world.advance(bench.world.now + 20)
        talk.received()
        bench.world.stack.switch.refresh()
        talk.guest(seg("A", data=b"more"))
        talk.received()
    assert bench.world.stack.switch.find(GUEST_MAC, bench.world.now) is bench.one
    bench.send(bench.two, BROADCAST)
    assert bench.world.drops["mac_of_another_link"] == 1
    assert bench.world.stack.neighbors.admit(bench.one, OTHER_MAC, GUEST4, bench.world.now) is None


def test_a_silent_guest_is_forgotten(bench: Bench) -> None:
    bench.send(bench.one, BROADCAST)
    bench.heard()
    bench.world.advance(bench.world.now + _AGEING + 1)
    bench.send(bench.two, GUEST_MAC, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [1, 0, 1]


def test_macs_of_a_lost_link_are_forgotten(bench: Bench) -> None:
    bench.send(bench.one, BROADCAST)
    bench.heard()
    bench.world.remove_link(bench.one)
    bench.send(bench.two, GUEST_MAC, OTHER_MAC)
    assert [len(frames) for frames in bench.heard()] == [0, 0, 1]


def test_a_flood_of_macs_is_bounded_and_keeps_those_that_speak(bench: Bench) -> None:
    switch = bench.world.stack.switch
    now = bench.world.now
    switch.learn(OTHER_MAC, bench.two, now)
    for i in range(3 * _TABLE):
        now += 0.01
        if i % 500 == 0:
            switch.learn(OTHER_MAC, bench.two, now)
        switch.learn(b"\x02" + i.to_bytes(5, "big"), bench.one, now)
    assert len(switch.macs()) == _TABLE
    assert switch.find(OTHER_MAC, now) is bench.two


def test_a_flood_of_macs_pushes_out_only_those_of_its_own_link(bench: Bench) -> None:
    """Faster than the others are heard from again, so that their MACs are older than all of the flood's."""
    switch = bench.world.stack.switch
    now = bench.world.now
    switch.learn(OTHER_MAC, bench.two, now)
    for i in range(2 * _TABLE):
        switch.learn(b"\x02" + i.to_bytes(5, "big"), bench.one, now)
    assert len(switch.macs()) == _TABLE
    assert not switch.learn(OTHER_MAC, bench.one, now + 1)  # the flood was for this
    assert switch.find(OTHER_MAC, now + 1) is bench.two


def test_what_a_lost_link_still_says_is_not_learnt(bench: Bench) -> None:
    """It closed amid a batch; its guest would be locked out when it comes back on another link."""
    bench.world.remove_link(bench.one)
    bench.send(bench.one, bench.world.mac)
    assert bench.world.drops == {"link_gone": 1}
    assert bench.world.stack.switch.macs() == {}
    assert bench.world.stack.neighbors.find(GUEST4) is None
    bench.send(bench.three, bench.world.mac)
    assert bench.world.stack.switch.macs() == {GUEST_MAC: bench.three}


def test_a_link_of_a_smaller_mtu_does_not_get_larger_frames() -> None:
    world = World()
    big, small = world.add_link("big", mtu=9000), world.add_link("small", mtu=1500)
    world.receive(big, udp_frame(BROADCAST, GUEST_MAC, GUEST4, OTHER4, (1, 2), bytes(1473)))
    assert world.take(small) == []
    assert world.drops["frame_too_big_for_link"] == 1
    world.receive(big, udp_frame(BROADCAST, GUEST_MAC, GUEST4, OTHER4, (1, 2), bytes(1472)))
    assert len(world.take(small)) == 1


def test_one_link_has_nobody_to_send_to() -> None:
    world = World()
    link = world.add_link()
    world.receive(link, udp_frame(OTHER_MAC, GUEST_MAC, GUEST4, OTHER4, (1, 2), b"?"))
    assert world.take(link) == []
    assert world.stack.counters.frames_switched == 0


def test_what_is_not_ip_is_switched_too(bench: Bench) -> None:
    """Guests speak to each other whatever they like."""
    frame = OTHER_MAC + GUEST_MAC + b"\x88\xcc" + bytes(50)
    bench.world.receive(bench.one, frame)
    assert bench.heard() == [[], [frame], [frame]]
    assert bench.world.drops == {}


def test_a_guest_that_does_not_read_does_not_hold_the_others_up(bench: Bench) -> None:
    bench.two.stuck = True
    for _ in range(100):
        bench.send(bench.one, BROADCAST)
    assert [len(frames) for frames in bench.heard()] == [0, 0, 100]


def test_frames_switched_are_counted(bench: Bench) -> None:
    bench.send(bench.one, BROADCAST)
    assert bench.world.stack.counters.frames_switched == 1


def test_the_first_frame_after_a_move_takes_the_slow_road(bench: Bench) -> None:
    """known_macs of the link that it left are emptied."""
    bench.send(bench.one, bench.world.mac)
    assert bench.one.known_macs
    bench.world.advance(bench.world.now + _IN_USE)
    bench.send(bench.two, BROADCAST, GUEST_MAC)
    assert not bench.one.known_macs
    assert THIRD_MAC not in bench.world.stack.switch.macs()


def test_a_frame_too_big_for_the_other_link_is_answered(bench: Bench) -> None:
    """A router would say "too big" with the smaller MTU (RFC 1191); a silent switch would make it vanish for ever."""
    bench.send(bench.two, GUEST_MAC, OTHER_MAC)
    bench.two.mtu = 9000
    bench.one.mtu = 65520
    bench.heard()
    bench.send(bench.one, OTHER_MAC, payload=bytes(20_000))
    ours, theirs, _ = bench.heard()
    assert theirs == []
    (answer,) = (Ether(frame) for frame in ours)
    assert (answer[ICMP].type, answer[ICMP].code, answer[ICMP].nexthopmtu) == (3, 4, 9000)
    assert bench.world.drops["frame_too_big_for_link"] == 1
