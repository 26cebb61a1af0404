"""The gateway's DNS follows the host and the settings while the network runs. No packet is sent: nobody asks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

import netstack

SECONDS = 10.0  # a deadline, never a time that is waited


def settings(tmp_path: Path, **dns: Any) -> netstack.Config:
    table = {"resolv_conf": tmp_path / "resolv.conf", "hosts_file": tmp_path / "hosts", "mdns": False, **dns}
    return netstack.Config(network={"subnet": "10.98.7.0/24"}, dns=table)


def routes(network: netstack.Network) -> dict[str, list[str]]:
    return {line["domain"]: line["servers"] for line in network.dns.follower.table.describe()}


async def until(look: Callable[[], bool]) -> float:
    began_at = time.monotonic()
    with trio.fail_after(SECONDS):
        while not look():  # noqa: ASYNC110 # a file is polled
            await trio.sleep(0.01)
    return time.monotonic() - began_at


async def test_resolv_conf_and_the_search_domains_of_guests_follow_within_2_s(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.0.0.9\nsearch home.example\n")
    async with netstack.open_network(settings(tmp_path)) as network:
        services = network.services
        assert list(services.dhcp.search) == ["home.example", "netstack.internal"]
        assert routes(network) == {".": ["127.0.0.9"]}
        path.write_text("nameserver 127.0.0.8\nsearch corp.example home.example\n")
        took = await until(lambda: routes(network) == {".": ["127.0.0.8"]})
        assert took < 2.0
        expected = ["corp.example", "home.example", "netstack.internal"]
        for service in (services.dhcp, services.dhcpv6, services.ndp):
            assert list(service.search) == expected
        # Guests are told in a few seconds (RFC 4861 10, MIN_DELAY_BETWEEN_RAS), and not in minutes.
        assert services.ndp.due_at <= time.monotonic() + 4
        assert network.dns.resolver.table is network.dns.follower.table


async def test_rule_48_the_gateways_own_addresses_are_never_asked(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 10.98.7.3\nnameserver 127.0.0.9\n")
    async with netstack.open_network(settings(tmp_path, upstreams=["10.98.7.2:5353"])) as network:
        assert routes(network) == {".": ["127.0.0.9"]}


async def test_upstreams_and_routes_of_the_settings_are_taken_over_by_a_reload(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.9\nsearch home.example\n")
    async with netstack.open_network(settings(tmp_path)) as network:
        route = {"domains": ["corp.example"], "upstreams": ["127.0.0.7:5353"]}
        config = settings(tmp_path, upstreams=["127.0.0.6"], route=[route], search=["lab.example"])
        assert network.reload(config) == []
        assert routes(network) == {"corp.example": ["127.0.0.7:5353"], ".": ["127.0.0.6"]}
        assert list(network.services.dhcp.search) == ["lab.example", "netstack.internal"]
        assert network.reload(settings(tmp_path, nameservers=["127.0.0.5"])) == []
        assert routes(network) == {".": ["127.0.0.5"]}
        assert list(network.services.dhcp.search) == ["home.example", "netstack.internal"]
        assert network.reload(settings(tmp_path, source="none")) == []
        assert routes(network) == {".": []}
        assert network.reload(settings(tmp_path)) == []
        assert routes(network) == {".": ["127.0.0.9"]}


async def test_stale_answers_and_lenience_are_the_settings_to_choose_live(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("")
    async with netstack.open_network(settings(tmp_path)) as network:
        resolver = network.dns.resolver
        assert (resolver.cache.max_stale, resolver.wording.lenient_aaaa) == (0.0, False)
        assert network.reload(settings(tmp_path, serve_stale=86400, lenient_aaaa=True)) == []
        assert (resolver.cache.max_stale, resolver.wording.lenient_aaaa) == (86400.0, True)


async def test_rebind_protection_dns64_and_limits_are_the_settings_to_choose_live(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("")
    async with netstack.open_network(settings(tmp_path)) as network:
        resolver, server = network.dns.resolver, network.dns.server
        assert (resolver.flights.rebind.enabled, resolver.dns64) == (False, None)
        assert (server.queries.of_each, server.queries.of_all) == (10_000, 16_384)
        config = settings(tmp_path, rebind_protection=True, rebind_allow=["fritz.box"], dns64="64:ff9b::/96")
        limits = {"dns_queries": 500, "dns_queries_per_guest": 100}
        assert network.reload(config.model_copy(update={"limits": config.limits.model_copy(update=limits)})) == []
        assert resolver.flights.rebind.enabled
        assert resolver.dns64 is not None
        assert str(resolver.dns64.prefix) == "64:ff9b::/96"
        assert (server.queries.of_each, server.queries.of_all) == (100, 500)
        assert network.reload(settings(tmp_path)) == []
        assert not network.dns.resolver.flights.rebind.enabled
        assert network.dns.resolver.dns64 is None
