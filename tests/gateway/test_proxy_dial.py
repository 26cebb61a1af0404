"""Where the gateway's proxy connects to for a guest: by any name and in any spelling, no further than the guest may."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from netstack.core.addresses import Addresses
from netstack.core.counters import Counters
from netstack.dns.message import TYPE_A, TYPE_AAAA, parse_question
from netstack.gateway.proxy_dial import ProxyDialler
from netstack.proxy.errors import RouteError

if TYPE_CHECKING:
    from netstack.core.stack import Stack
    from netstack.dns.resolver import Resolver

GATEWAY, DNS = "192.168.5.2", "192.168.5.3"
GATEWAY6, DNS6 = "fd00::2", "fd00::3"


class FakeStack:
    """A network's addresses, and one port of the loopback that no guest reaches."""

    def __init__(self, protected: int, *, host_loopback: bool) -> None:
        packed = [ip_address(text).packed for text in (GATEWAY, DNS, GATEWAY6, DNS6)]
        self.addresses = Addresses(
            bytes.fromhex("525500000002"),
            IPv4Network("192.168.5.0/24"),
            packed[0],
            packed[1],
            IPv6Network("fd00::/64"),
            packed[2],
            packed[3],
            host_loopback,
        )
        self.counters = Counters()
        self._protected = protected

    def is_protected(self, port: int) -> bool:
        return port == self._protected


class FakeResolver:
    """Answers from a table; each answer may be used once only, so that a second look is seen."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self.names = names
        self.asked: list[tuple[str, int]] = []

    async def ask(self, query: bytes, guest: str) -> bytes:
        question = parse_question(query)
        assert question is not None
        name = b".".join(question.labels).decode()
        self.asked.append((name, question.type))
        await trio.lowlevel.checkpoint()
        found = [ip_address(text) for text in self.names.get(name, ())]
        data = [one.packed for one in found if one.version == (4 if question.type == TYPE_A else 6)]
        records = [b"\xc0\x0c" + struct.pack("!HHIH", question.type, 1, 0, len(each)) + each for each in data]
        return query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(records), 0, 0) + query[12:] + b"".join(records)


def dialler(
    names: dict[str, list[str]] | None = None, *, protected: int = 0, host_loopback: bool = True
) -> tuple[ProxyDialler, FakeResolver]:
    resolver = FakeResolver(names or {})
    stack = FakeStack(protected, host_loopback=host_loopback)
    return ProxyDialler(cast("Stack", stack), cast("Resolver", resolver)), resolver


@pytest.fixture
def listening() -> Any:
    """A port of the host's loopback, on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


LOOPBACK = (
    "127.0.0.1",
    "127.1",
    "127.5.5.5",
    "0x7f000001",
    "0177.0.0.1",
    "2130706433",
    "0",
    "0.0.0.0",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:0.0.0.0",
    "localhost",
    "x.localhost",
    GATEWAY,
    GATEWAY6,
)
NEVER = (
    DNS,
    DNS6,
    "192.168.5.15",
    "192.168.5.255",
    "fd00::15",
    "::127.0.0.1",
    "::192.168.5.2",
    "::ffff:192.168.5.3",
    "::ffff:192.168.5.15",
    "0.1.2.3",
    "224.0.0.1",
    "255.255.255.255",
    "ff02::1",
    "fe80::1",
    "fe80::5055:ff:fe00:2",
)


async def refused(dialler: ProxyDialler, host: str, port: int) -> None:
    with pytest.raises(RouteError) as caught:
        await dialler.dial(host, port)
    assert (caught.value.status, caught.value.error) == (403, "destination_ip_prohibited")


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_protected_port_is_not_reached_in_any_spelling(host: str, listening: int) -> None:
    await refused(dialler(protected=listening)[0], host, listening)


@pytest.mark.parametrize("host", LOOPBACK)
async def test_the_hosts_loopback_is_not_reached_where_guests_may_not(host: str, listening: int) -> None:
    await refused(dialler(host_loopback=False)[0], host, listening)


@pytest.mark.parametrize("host", NEVER)
async def test_what_is_not_the_worlds_is_never_reached(host: str, listening: int) -> None:
    await refused(dialler()[0], host, listening)


@pytest.mark.parametrize("address", (*LOOPBACK, *NEVER))
async def test_a_name_for_such_an_address_is_refused_like_it(address: str, listening: int) -> None:
    try:
        ip_address(address)
    except ValueError:
        return  # no address that DNS could tell
    closed, resolver = dialler({"evil.test": [address]}, protected=listening, host_loopback=False)
    await refused(closed, "evil.test", listening)
    guarded, _ = dialler({"evil.test": [address]}, protected=listening)
    await refused(guarded, "evil.test", listening)
    assert sorted(resolver.asked) == [("evil.test", TYPE_A), ("evil.test", TYPE_AAAA)]  # once: what it told is dialled


async def test_of_several_addresses_only_those_that_guests_may_reach_are_dialled(listening: int) -> None:
    found, _ = dialler({"some.test": [DNS, "192.168.5.15", GATEWAY, "::127.0.0.1"]})
    stream = await found.dial("some.test", listening)
    assert stream.socket.getpeername() == ("127.0.0.1", listening)
    await stream.aclose()


@pytest.mark.parametrize("host", ("127.1", "localhost", "0.0.0.0", GATEWAY))
async def test_the_loopback_is_the_hosts_where_guests_may(host: str, listening: int) -> None:
    stream = await dialler()[0].dial(host, listening)
    assert stream.socket.getpeername() == ("127.0.0.1", listening)
    await stream.aclose()


@pytest.mark.parametrize("host", ("127.0.0.1", "192.168.5.3", "::1", "::127.0.0.1", "192.168.5.15"))
async def test_an_intercepted_connection_never_leads_where_its_syn_could_not(host: str, listening: int) -> None:
    with pytest.raises(RouteError):
        await dialler()[0].dial_address(host, listening)
