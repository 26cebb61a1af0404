"""Callers of TCP forwards whose guests have not answered: as what the guest sees them, and how many there may be."""

from __future__ import annotations

import pytest

from netstack.core.addresses import link_local
from netstack.core.flows import Limits
from netstack.core.forwards import TcpForward
from netstack.wire.tcp import SYN
from tests.world import GUEST4, GUEST_MAC, OTHER4, WORLD6, World

LOOPBACK4 = bytes((127, 0, 0, 1))
LOOPBACK6 = bytes(15) + b"\1"
_LIMIT = 3


class Caller:
    """Calls a forward to this guest, as long as its listener would accept."""

    def __init__(self, world: World, guest: bytes) -> None:
        self.world = world
        self.forward = TcpForward(world.stack, lambda family, now: guest)
        self.forward.on_room = self.on_room
        self.woken = 0

    def on_room(self) -> None:
        self.woken += 1

    def call(self, address: bytes = LOOPBACK4) -> bool:
        if self.forward.full():
            return False
        self.forward.on_connection(self.world.host.accepted(), address, 40_000, 80, self.world.now)
        self.world.end_round()
        return True


def test_callers_of_guests_that_are_not_there_do_not_take_all_descriptors() -> None:
    world = World(limits=Limits(forward_pending=_LIMIT))
    world.add_link()
    first, second, third = (Caller(world, guest) for guest in (GUEST4, OTHER4, OTHER4))
    assert [first.call(), first.call(), second.call()] == [True] * _LIMIT
    assert not first.call()
    assert not second.call()
    assert not third.call()
    third.forward.close(world.now)
    assert (first.woken, second.woken) == (0, 0)
    world.advance(world.now + 10.0)  # nobody answers
    assert first.woken
    assert second.woken
    assert not third.woken
    assert first.forward.traffic().refused == 2
    assert [first.call(), second.call(), second.call()] == [True] * _LIMIT


@pytest.mark.parametrize("caller", (WORLD6, LOOPBACK6))
def test_a_guest_at_its_link_local_address_sees_the_gateways(caller: bytes) -> None:
    """From there it answers to its own wire alone (RFC 4291 2.5.6)."""
    world = World()
    link = world.add_link()
    guest = link_local(GUEST_MAC)
    world.stack.neighbors.learn(link, GUEST_MAC, guest, world.now)
    assert Caller(world, guest).call(caller)
    [syn] = world.take(link)
    assert syn[67] == SYN
    assert (syn[22:38], syn[38:54]) == (world.stack.addresses.link_local, guest)
