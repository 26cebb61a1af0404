"""The table of forwards without guests: what is open, what fails without a trace, whom a SPEC means."""

from __future__ import annotations

import errno
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

import netstack
from netstack import ForwardError
from netstack.core.leases import StaticLease
from netstack.gateway.guest_lookup import GuestLookup
from netstack.host import listeners
from netstack.host.port_owner import find_owner
from tests.fakes import FakeLink
from tests.world import GUEST6, GUEST_MAC, OTHER4, OTHER_MAC, World

FIRST4 = bytes((192, 168, 5, 15))


@pytest.fixture
async def network() -> AsyncIterator[netstack.Network]:
    config = netstack.Config(network={"subnet": "10.98.8.0/24"}, dns={"source": "none"})
    async with netstack.open_network(config) as opened:
        yield opened


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def is_open(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address, port)) == 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- opening and closing ----


async def test_publish_is_open_when_it_returns_and_closed_when_the_network_is(network: netstack.Network) -> None:
    forward = await network.publish("0:80")
    assert forward.spec.host_port
    assert str(forward.spec) == f"127.0.0.1:{forward.spec.host_port}:80"
    assert is_open(forward.spec.host_port)
    network.close()
    assert not is_open(forward.spec.host_port)
    assert not list(network.forwards)
    with pytest.raises(ForwardError, match="the network is ending"):
        await network.publish("0:80")


async def test_a_caller_whose_guest_is_still_looked_for_is_reset_at_the_end(network: netstack.Network) -> None:
    forward = await network.publish("0:80")
    caller = await trio.open_tcp_stream("127.0.0.1", forward.spec.host_port)
    async with caller:
        with trio.fail_after(10):
            while not forward.describe()["connections"]["total"]:  # noqa: ASYNC110 # the poller's task accepts
                await trio.sleep(0.001)
        network.close()
        assert forward.describe()["connections"]["refused"] == 1
        with pytest.raises(trio.BrokenResourceError):
            await caller.receive_some()


async def test_a_forward_that_fails_leaves_nothing(network: netstack.Network, taken: socket.socket) -> None:
    before = open_files()
    port = port_of(taken)
    for spec in (
        f"{port}:80",
        f"{port - 2}-{port}:80-82",
        f"unix:/proc/{port}.sock:80",
        "203.0.113.9:80:80",
        "nonsense",
    ):
        with pytest.raises(ForwardError):
            network.forwards.add(spec)
    assert open_files() == before
    assert not is_open(port - 2)
    assert len(network.forwards) == 0


async def test_a_guests_own_flow_gives_way_to_a_forward_of_its_port(network: netstack.Network) -> None:
    """A server that has spoken first has the host's port of the same number for the source of what it sends."""
    stack, now = network.stack, time.monotonic()
    link = FakeLink()
    stack.add_link(link, now)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(10)
        there = network.addresses.gateway, peer.getsockname()[1]

        def say(text: bytes, port: int) -> int:
            guest = bytes((10, 98, 8, 15))
            stack.udp.on_datagram(link, GUEST_MAC, guest, port, *there, memoryview(text), 0, len(text), 64, False, now)
            stack.udp.flows[guest, port].finish_batch(now)
            payload, sender = peer.recvfrom(100)
            assert payload == text
            return int(sender[1])

        port = say(b"I am here", 0)  # which the kernel chose
        number = next(number for number in range(port + 1, port + 100) if say(b"I am here", number) == number)
        forward = await network.publish(f"{number}:10.98.8.15:{number}/udp")
        assert say(b"and still", number) != number
        forward.close()
        flows = list(stack.udp.flows)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
            foreign.bind(("127.0.0.1", 0))
            say(b"in vain", port_of(foreign))
            with pytest.raises(ForwardError, match="the port is in use"):
                await network.publish(f"{port_of(foreign)}:10.98.8.15:1/udp")
        assert list(stack.udp.flows)[: len(flows)] == flows  # nobody gave way for nothing


async def test_what_went_wrong_has_a_kind(network: netstack.Network, taken: socket.socket) -> None:
    port = port_of(taken)
    for spec, kind in (
        (f"{port}:80", "conflict"),
        ("80:10.98.9.1:80", "invalid"),
        ("80:10.98.8.2:80", "invalid"),
        ("80", "invalid"),
    ):
        with pytest.raises(ForwardError) as raised:
            network.forwards.add(spec)
        assert raised.value.kind == kind
        assert "\n" not in str(raised.value)
    with pytest.raises(ForwardError, match="on_conflict is error, next or loopback"):
        network.forwards.add("0:80", on_conflict="later")


async def test_more_ports_than_there_are_files_for(network: netstack.Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "netstack.host.port_owner", None)  # an import would need a file, too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
    try:
        with pytest.raises(ForwardError, match="no more files can be open; raise the limit"):
            network.forwards.add("21000-21099:1000-1099")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_files() == before


async def test_ports_of_all_forwards_are_bounded(network: netstack.Network) -> None:
    with pytest.raises(ForwardError, match=r"all forwards together may have [0-9]+ ports") as raised:
        network.forwards.add("1025-65535:1025-65535")
    assert raised.value.kind == "denied"


async def test_who_wants_to_know_is_told(network: netstack.Network) -> None:
    told: list[tuple[str, str]] = []
    network.forwards.on_change.append(lambda what, forward: told.append((what, forward.id)))
    forward = await network.publish("0:80")
    forward.close()
    forward.close()
    assert told == [("added", forward.id), ("removed", forward.id)]
    assert not network.forwards.remove(forward.id)


async def test_forwards_are_found_by_id_by_spec_and_by_what_they_take(network: netstack.Network) -> None:
    forward = await network.publish("0:web:80")
    for text in (forward.id, "0:web:80", str(forward.spec), forward.spec.host_side):
        assert network.forwards.find(text) == [forward]
    assert network.forwards.find("1:2") == []


async def test_a_reload_touches_only_what_changed(network: netstack.Network, taken: socket.socket) -> None:
    def config(*specs: str) -> netstack.Config:
        return netstack.Config(
            network={"subnet": "10.98.8.0/24"}, dns={"source": "none"}, publish=[{"spec": spec} for spec in specs]
        )

    by_hand = await network.publish("0:81")
    network.reload(config("0:80", "0:82"))
    first, second = (forward for forward in network.forwards if forward.owner == "config")
    network.reload(config("0:82", f"{port_of(taken)}:83"))
    assert {forward.id for forward in network.forwards} == {by_hand.id, second.id}
    taken.close()
    network.reload(config("0:82", f"{port_of_spec(network)}:83", "0:80"))
    assert first.closed
    assert second.id in {forward.id for forward in network.forwards}


def port_of_spec(network: netstack.Network) -> int:
    """A port that is free."""
    forward = network.forwards.add("0:1")
    forward.close()
    return forward.spec.host_port


# ---- who has a port ----


def test_the_process_that_has_a_port_is_found(taken: socket.socket) -> None:
    words = find_owner("tcp", "0.0.0.0", [port_of(taken)])
    assert f"(process {Path('/proc/self').resolve().name})" in words
    assert find_owner("tcp", "127.0.0.2", [port_of(taken)]) == "", "that is another address"
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        assert "(process " in find_owner("udp", "::1", [port_of(sock)])


# ---- whom a SPEC means ----


class Guests:
    """A world with leases, and the lookup."""

    def __init__(self, *statics: StaticLease) -> None:
        self.world = World(oracle=False)
        self.link: FakeLink = self.world.add_link()
        self.leases = self.world.add_services().dhcp.leases
        self.leases.set_statics(statics)
        self.lookup = GuestLookup(self.world.stack, self.leases, lambda: list(statics))
        self.now = self.world.now

    def lease(self, mac: bytes, name: str = "") -> bytes:
        lease = self.leases.offer(mac, self.now)
        assert lease is not None
        assert self.leases.bind(mac, lease.address, self.now, name=name) is not None
        self.later()
        return lease.address

    def hear(self, mac: bytes, address: bytes) -> None:
        self.world.stack.switch.learn(mac, self.link, self.now)
        self.world.stack.neighbors.learn(self.link, mac, address, self.now)
        self.later()

    def later(self) -> None:
        self.now += 1.0

    def find(self, guest: str = "", family: int = 4) -> bytes | None:
        return self.lookup.find(guest, family, self.now)


def test_before_anybody_is_here_the_first_guest_is_who_will_come_first() -> None:
    assert Guests().find() == FIRST4


def test_the_first_guest_is_the_lowest_lease_of_a_machine_that_is_here() -> None:
    guests = Guests()
    first, second = guests.lease(GUEST_MAC), guests.lease(OTHER_MAC)
    assert guests.find() == first, "remembered from the last run, say"
    guests.hear(OTHER_MAC, second)
    assert guests.find() == second
    guests.hear(GUEST_MAC, first)
    assert guests.find() == first


def test_a_guest_without_a_lease_is_the_first_when_it_is_the_only_one() -> None:
    guests = Guests()
    guests.hear(OTHER_MAC, OTHER4)
    assert guests.find() == OTHER4


def test_a_name_is_a_lease_and_follows_it() -> None:
    guests = Guests()
    address = guests.lease(GUEST_MAC, "web")
    assert guests.find("web") == address
    assert guests.find("other") is None
    guests.leases.release(GUEST_MAC, address, guests.now)
    guests.later()
    assert guests.find("web") is None


def test_a_name_of_the_settings_is_known_before_there_is_a_lease() -> None:
    guests = Guests(StaticLease(GUEST_MAC, OTHER4, None, "web"), StaticLease(OTHER_MAC, None, None, "db"))
    assert guests.find("web") == OTHER4
    assert guests.find("db") is None
    guests.hear(OTHER_MAC, bytes((192, 168, 5, 77)))
    assert guests.find("db") == bytes((192, 168, 5, 77))


def test_a_caller_over_ipv6_gets_the_guests_ipv6_address_where_it_has_one() -> None:
    guests = Guests()
    address = guests.lease(GUEST_MAC, "web")
    assert guests.find("web", 6) == address
    guests.hear(GUEST_MAC, GUEST6)
    assert guests.find("web", 6) == GUEST6
    assert guests.find("web", 4) == address
    assert guests.find("", 6) == GUEST6


def test_an_address_is_itself() -> None:
    guests = Guests()
    assert guests.find("192.168.5.99") == bytes((192, 168, 5, 99))
    assert guests.lookup.finder("192.168.5.99")(6, guests.now) == bytes((192, 168, 5, 99))
    assert guests.lookup.check("192.168.5.99") is None
    assert guests.lookup.check("fd00:c0a8:5::2") == "fd00:c0a8:5::2 is the gateway's own address, not a guest's"
    assert guests.lookup.check("web") is None


# ---- the host is out of something ----


def test_a_listener_without_descriptors_waits_a_second() -> None:
    world = World(oracle=False)
    told: list[int | None] = []

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(errno.EMFILE, "Too many open files")

    with socket.create_server(("127.0.0.1", 0)) as real:
        sock = Exhausted(fileno=real.detach())
    listener = listeners.Listener(
        sock,
        world.poller,
        world.stack.timers,
        lambda *args: pytest.fail("nobody was accepted"),
        on_exhausted=lambda error: told.append(error.errno),
    )
    listener.resume()
    listener.on_ready(1, world.now)
    assert told == [errno.EMFILE]
    assert not world.poller.handlers
    listener.resume()
    assert not world.poller.handlers, "the pause is not over"
    world.stack.handle_timers(world.now + 1.0)
    assert list(world.poller.handlers.values()) == [listener]
    listener.close()
    listener.close()
    assert not world.poller.handlers


async def test_the_next_free_run_is_found_without_trying_every_one(network: netstack.Network) -> None:
    with socket.create_server(("127.0.0.1", 23_200)), socket.create_server(("127.0.0.1", 23_450)):
        began = time.monotonic()
        forward = network.forwards.add("22901-23200:1-300", on_conflict="next")
        assert time.monotonic() - began < 0.5  # one by one it takes more than a second, in which nobody is served
        assert forward.spec.host_port == 23_451
    forward.close()
    assert len(network.forwards) == 0
