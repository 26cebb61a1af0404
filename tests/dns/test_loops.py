"""The questions by which a loop is noticed: to whom they go, and how."""

from __future__ import annotations

import pytest
import trio

from netstack.dns.routes import USE_VC, RoutingTable, Scope, Server
from tests.dns.nameserver import is_probe, open_nameserver
from tests.dns.relay import Relay, scope, wait_until


@pytest.mark.parametrize("by_option", (False, True))
async def test_servers_that_are_asked_by_tcp_hear_nothing_by_udp(nursery: trio.Nursery, by_option: bool) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery)
        where = server.nameserver
        where = where._replace(options=frozenset((USE_VC,))) if by_option else where._replace(transport="tcp")
        relay.resolver.set_table(RoutingTable((scope(where),)))
        await wait_until(lambda: bool(server.tcp_queries))
        assert is_probe(server.tcp_queries[0])
        assert not server.probes
        nursery.cancel_scope.cancel()


async def test_a_server_without_tcp_does_no_harm(nursery: trio.Nursery) -> None:
    async with open_nameserver(tcp=False) as server:
        relay = Relay(nursery)
        relay.resolver.set_table(RoutingTable((scope(server.nameserver._replace(transport="tcp")),)))
        await trio.sleep(0.1)
        assert not server.probes
        nursery.cancel_scope.cancel()


async def test_only_new_servers_are_asked(nursery: trio.Nursery, autojump_clock: object) -> None:
    relay = Relay(nursery)
    asked: list[Server] = []

    one, other = Server("192.0.2.1"), Server("192.0.2.2")
    guard = relay.resolver.guard
    guard._upstream = Probed(relay, asked)  # type: ignore[assignment]
    for servers in ((one,), (one, other), (one, other), (other,), (one, other)):
        guard.probe(servers)
        await trio.sleep(60)
    assert asked == [one, other, one]
    nursery.cancel_scope.cancel()


class Probed:
    """An upstream that only notes who is asked."""

    def __init__(self, relay: Relay, asked: list[Server]) -> None:
        self.nursery = relay.nursery
        self.asked = asked

    async def probe(self, query: object, found: Scope) -> None:
        self.asked.extend(found.servers)
