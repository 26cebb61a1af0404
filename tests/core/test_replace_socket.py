"""A flow whose host side is a service goes on with another socket: what was said before, what comes after, the ends.

And connections that a service intercepts on their way to the world.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from netstack.core.ports import TcpServiceCall
from tests.fakes import FakeSocket, oserror
from tests.frames import udp_frame
from tests.script import Talk, established, seg
from tests.world import GATEWAY4, GUEST4, GUEST_MAC, WORLD4, World

if TYPE_CHECKING:
    from netstack.core.ports import Handler


class Service:
    """Takes connections, some of them in place of their peers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls: list[TcpServiceCall] = []
        self.refused = b""  # an address that it does not want

    def wants(self, address: bytes, port: int) -> bool:
        return address != self.refused

    def open(self, call: TcpServiceCall) -> FakeSocket | None:
        self.calls.append(call)
        return self.world.host.accepted()


class Bench:
    """A guest's connection to a service, and the socket that is to take its place."""

    def __init__(self) -> None:
        self.world = world = World()
        self.service = Service(world)
        world.stack.register_tcp(3128, self.service, addresses=[GATEWAY4])
        self.talk = established(talk=Talk(world=world, peer=GATEWAY4, peer_port=3128))
        self.old = self.talk.host
        self.new = world.host.accepted()

    def replace(self, early: bytes = b"") -> bool:
        stack = self.world.stack
        done = stack.replace_socket(self.service.calls[0], self.old, self.new, early, self.world.now)
        if done:
            stack.end_round(self.world.now)
        self.world.settle()
        return done


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_the_service_said_last_comes_first(bench: Bench) -> None:
    bench.old.sends(b"200 OK")
    assert bench.replace()
    bench.talk.expect(seg("PA", data=b"200 OK"))
    assert bench.old.closed
    bench.new.sends(b"hello")
    bench.talk.settle()
    bench.talk.expect(seg("PA", data=b"hello"))
    bench.talk.guest(seg("PA", data=b"request", ack=12))
    bench.new.takes(b"request")


def test_what_the_guest_said_early_comes_first(bench: Bench) -> None:
    bench.new.room = 3
    assert bench.replace(b"early")
    bench.talk.guest(seg("PA", data=b"late"))
    bench.new.takes(b"ear")
    bench.new.room = None
    bench.talk.settle()
    bench.new.takes(b"lylate")


def test_what_the_old_socket_had_no_room_for_goes_to_the_new_one_behind_what_it_had(bench: Bench) -> None:
    bench.old.room = 2
    bench.talk.guest(seg("PA", data=b"abcd"))
    bench.old.takes(b"ab")
    assert bench.replace(b"ab")
    bench.new.takes(b"abcd")


def test_a_guest_that_has_closed_its_half_has_closed_the_new_one(bench: Bench) -> None:
    bench.talk.guest(seg("FPA", data=b"all"))
    assert bench.old.shut
    assert not bench.new.shut
    assert bench.replace(b"all")
    bench.new.takes(b"all")
    assert bench.new.shut
    bench.new.closes()
    bench.talk.settle()
    assert bench.talk.state == "LAST_ACK"


def test_a_guest_that_said_all_to_the_service_has_closed_the_new_one_too(bench: Bench) -> None:
    bench.talk.guest(seg("FA"))
    assert bench.replace()
    assert bench.new.shut


def test_resets_go_through(bench: Bench) -> None:
    assert bench.replace()
    bench.new.breaks()
    bench.talk.settle()
    bench.talk.expect(seg("RA"))
    assert bench.talk.state == "CLOSED"


def test_it_waits_while_the_guests_window_is_full(bench: Bench) -> None:
    bench.talk.guest(seg("A", win=0))
    bench.old.sends(b"200 OK")
    bench.talk.settle()
    assert not bench.replace()
    assert not bench.old.closed
    assert bench.talk.flow.sock is bench.old


def test_a_connection_that_is_over_takes_none(bench: Bench) -> None:
    bench.talk.guest(seg("RA"))
    assert not bench.replace()
    assert not bench.new.closed


def test_a_service_that_has_closed_gives_none(bench: Bench) -> None:
    bench.old.closes()
    assert not bench.replace()


def test_another_connection_with_the_same_ends_is_left_alone(bench: Bench) -> None:
    stack = bench.world.stack
    other = bench.world.host.accepted()
    assert not stack.replace_socket(bench.service.calls[0], other, bench.new, b"", bench.world.now)
    stack.reset_service(bench.service.calls[0], other, bench.world.now)
    assert bench.talk.state == "ESTABLISHED"


def test_a_poller_that_takes_no_more_ends_the_connection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def register(fd: int, handler: Handler, events: int) -> None:
        raise oserror(errno.ENOSPC)

    monkeypatch.setattr(bench.world.poller, "register", register)
    assert bench.replace(b"early")
    assert bench.talk.state == "CLOSED"
    assert bench.new.was_reset


def test_a_service_resets(bench: Bench) -> None:
    bench.world.stack.reset_service(bench.service.calls[0], bench.old, bench.world.now)
    bench.world.settle()
    bench.talk.expect(seg("RA"))
    assert bench.talk.state == "CLOSED"


# ---- interception ----------------------------------------------------------------------------------------------------


def test_a_connection_is_intercepted_where_the_service_wants_it() -> None:
    world = World()
    service = Service(world)
    world.stack.intercept_tcp(443, service)
    established(talk=Talk(world=world, peer_port=443))
    assert world.host.opened == []
    assert [(call.address, call.port) for call in service.calls] == [(WORLD4, 443)]
    service.refused = WORLD4
    established(talk=Talk(world=world, peer_port=443, guest_port=40001, link=world.links[0]))
    assert world.host.opened == [("tcp", WORLD4, 443)]


def test_other_ports_the_gateway_and_forbidden_addresses_are_not_intercepted() -> None:
    world = World()
    service = Service(world)
    world.stack.intercept_tcp(443, service)
    link = world.add_link()
    established(talk=Talk(world=world, link=link, peer_port=80))
    established(talk=Talk(world=world, link=link, peer=GATEWAY4, peer_port=443))
    talk = Talk(world=world, link=link, peer=bytes((127, 0, 0, 1)), peer_port=443)
    world.receive(link, talk.frame(seg("S")))
    assert world.drops == {"tcp_no_route": 1}
    world.take(link)
    assert service.calls == []
    world.stack.intercept_tcp(443, None)
    established(talk=Talk(world=world, link=link, guest_port=40002, peer_port=443))
    assert service.calls == []


def test_a_blocked_port_of_udp_is_refused_and_all_others_are_not() -> None:
    world = World()
    link = world.add_link()

    def send(port: int) -> int:
        before = len(world.host.datagrams)
        world.receive(link, udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (5000 + port, port), bytes(40)))
        return len(world.host.datagrams) - before

    world.stack.block_udp((443,))
    assert (send(443), send(444)) == (0, 1)
    assert world.drops["udp_blocked"] == 1
    assert world.stack.counters.icmp_errors_sent == 1
    world.stack.block_udp(())
    assert send(443) == 1
    world.stack.block_udp((443,))
    assert send(443) == 0  # the path that is known by now is forgotten
    assert world.drops["udp_blocked"] == 2
