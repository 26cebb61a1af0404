"""systemd-resolved: what its D-Bus says, recorded and from a real one."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netstack.dns.routes import FALLBACK_RANK, RoutingTable, Server
from netstack.dns.source_resolved import link_path, links_of, parse_resolved
from tests.lab.follow import Watcher
from tests.lab.namespaces import Namespace
from tests.lab.resolved import Resolved

# Recorded from 252: a global server with a port and a name, a network with a router, a split VPN.
MANAGER: dict[str, Any] = {
    "DNSEx": [
        (0, 2, b"\xc0\x00\x02\x35", 5353, "dns.example"),
        (2, 2, b"\xc0\x00\x02\x01", 0, ""),
        (2, 10, bytes.fromhex("20010db8000000000000000000000001"), 0, ""),
        (3, 2, b"\x0a\x08\x00\x01", 0, ""),
        (3, 2, b"\x0a\x08\x00\x03", 0, ""),
    ],
    "Domains": [
        (2, "home.arpa", False),
        (3, "corp.example", False),
        (3, "internal.example", True),
        (3, "8.10.in-addr.arpa", True),
    ],
    "FallbackDNSEx": [(0, 2, b"\xcb\x00\x71\x09", 0, "")],
    "CurrentDNSServerEx": (0, 0, b"", 0, ""),
    "DNSOverTLS": "no",
    "DNSSEC": "no",
    "DNSStubListener": "yes",
    "ResolvConfMode": "stub",
}
LINKS: dict[int, dict[str, Any]] = {
    2: {"DefaultRoute": True, "ScopesMask": 1, "DNSOverTLS": "no", "DNSSEC": "no"},
    3: {"DefaultRoute": False, "ScopesMask": 1, "DNSOverTLS": "no", "DNSSEC": "no"},
}
NAMES = {2: "eth0", 3: "tun0"}


def routes_of(table: RoutingTable) -> dict[str, list[str]]:
    return {line["domain"]: line["servers"] for line in table.describe()}


def parse(manager: dict[str, Any], links: dict[int, dict[str, Any]] = LINKS) -> dict[str, list[str]]:
    return routes_of(RoutingTable(parse_resolved(manager, links, NAMES).scopes))


def test_links_and_the_global_servers_become_scopes() -> None:
    found = parse_resolved(MANAGER, LINKS, NAMES)
    assert [(scope.key, scope.default, scope.search) for scope in found.scopes] == [
        ("resolved:global", True, ()),
        ("resolved:eth0", True, ("home.arpa",)),
        ("resolved:tun0", False, ("corp.example",)),
    ]
    assert found.scopes[0].servers == (Server("192.0.2.53", 5353, name="dns.example"),)
    assert found.scopes[2].servers[0] == Server("10.8.0.1", interface="tun0")
    assert (found.policy, found.stub, found.mode) == ("", True, "stub")
    assert routes_of(RoutingTable(found.scopes)) == {
        "8.10.in-addr.arpa": ["10.8.0.1", "10.8.0.3"],
        "corp.example": ["10.8.0.1", "10.8.0.3"],
        "home.arpa": ["192.0.2.1", "2001:db8::1"],
        "internal.example": ["10.8.0.1", "10.8.0.3"],
        ".": ["192.0.2.53:5353#dns.example", "192.0.2.1", "2001:db8::1"],
    }


def test_rule_39_a_link_with_the_root_takes_the_rest() -> None:
    manager = MANAGER | {"Domains": [(2, "fritz.box", False), (3, ".", True)]}
    assert parse(manager) == {"fritz.box": ["192.0.2.1", "2001:db8::1"], ".": ["10.8.0.1", "10.8.0.3"]}


def test_rule_40_fallback_servers_count_where_nobody_named_one() -> None:
    found = parse_resolved(MANAGER | {"DNSEx": []}, LINKS, NAMES)
    fallback = [scope for scope in found.scopes if scope.servers]
    assert [(scope.key, scope.rank) for scope in fallback] == [("resolved:fallback", FALLBACK_RANK)]
    only_vpn = [entry for entry in MANAGER["DNSEx"] if entry[0] == 3]
    assert parse(MANAGER | {"DNSEx": only_vpn})["."] == []  # resolved says NoNameServers, and so do we


def test_rule_41_a_link_that_is_not_used_for_dns_claims_nothing() -> None:
    links = LINKS | {3: LINKS[3] | {"ScopesMask": 0}}
    assert "corp.example" not in parse(MANAGER, links)


def test_a_link_that_went_away_is_left_out() -> None:
    assert "corp.example" not in parse(MANAGER, {2: LINKS[2]})
    found = parse_resolved(MANAGER, LINKS, {2: "eth0"})
    assert [scope.key for scope in found.scopes] == ["resolved:global", "resolved:eth0"]


def test_rule_45_servers_are_bound_to_their_link_but_for_those_on_the_loopback() -> None:
    link_local = bytes.fromhex("fe800000000000000000000000000001")
    manager = {"DNSEx": [(2, 10, link_local, 0, ""), (2, 2, b"\x7f\x00\x00\x01", 5300, "")]}
    assert parse_resolved(manager, LINKS, NAMES).scopes[0].servers == (
        Server("fe80::1%eth0", interface="eth0"),
        Server("127.0.0.1", 5300),
    )


@pytest.mark.parametrize(
    ("manager", "link", "policy"),
    (
        ({"DNSOverTLS": "yes"}, {}, "DNSOverTLS=yes"),
        ({"DNSSEC": "yes"}, {}, "DNSSEC=yes"),
        ({}, {"DNSOverTLS": "yes"}, "DNSOverTLS=yes on tun0"),
        ({"DNSOverTLS": "opportunistic", "DNSSEC": "allow-downgrade"}, {}, ""),
    ),
)
def test_a_policy_that_direct_queries_would_undo_is_told(
    manager: dict[str, Any], link: dict[str, Any], policy: str
) -> None:
    assert parse_resolved(MANAGER | manager, LINKS | {3: LINKS[3] | link}, NAMES).policy == policy


def test_before_version_246_servers_have_no_ports() -> None:
    manager = {"DNS": [(2, 2, b"\xc0\x00\x02\x01"), (2, 2, b"short")], "Domains": []}
    assert parse_resolved(manager, LINKS, NAMES).scopes[0].servers == (Server("192.0.2.1", interface="eth0"),)


def test_links_and_their_objects() -> None:
    assert links_of(MANAGER) == [2, 3]
    assert link_path(2) == "/org/freedesktop/resolve1/link/_32"
    assert link_path(12) == "/org/freedesktop/resolve1/link/_312"
    assert len(links_of({"Domains": [(n, "x", False) for n in range(1000)]})) == 64


# ---- a real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    namespace = Namespace("host")
    yield namespace
    namespace.close()


@pytest.fixture(scope="module")
def resolved(host: Namespace) -> Iterator[Resolved]:
    resolved = Resolved(host)
    resolved.use_stub()
    resolved.add_link("wifi", "192.0.2.10/24")
    resolved.add_link("tun0", "10.8.0.9/24")
    resolved.control("dns", "wifi", "192.0.2.1")
    resolved.control("domain", "wifi", "home.arpa")
    yield resolved
    resolved.close()


@pytest.fixture(scope="module")
def watcher(host: Namespace, resolved: Resolved) -> Iterator[Watcher]:
    watcher = Watcher(host)
    yield watcher
    watcher.close()


HOME = {"home.arpa": ["192.0.2.1"], ".": ["192.0.2.1"]}
SPLIT = {
    "8.10.in-addr.arpa": ["10.8.0.1:5353"],
    "corp.example": ["10.8.0.1:5353"],
    "home.arpa": ["192.0.2.1"],
    ".": ["192.0.2.1"],
}


def seen(watcher: Watcher, change: Callable[[], object], routes: dict[str, list[str]]) -> dict[str, Any]:
    """The view after a change, which must come within 2 s."""
    change()
    done_at = time.monotonic()
    view = watcher.wait(lambda view: view["routes"] == routes)
    assert view["at"] - done_at < 2.0
    return view


def test_a_real_resolved_is_followed_through_a_vpns_life(resolved: Resolved, watcher: Watcher) -> None:
    first = watcher.wait(lambda view: view["routes"] == HOME)
    assert first["why"] == "systemd-resolved over D-Bus"
    assert first["search"] == ["home.arpa"]
    assert watcher.views[0]["routes"] == {".": ["127.0.0.53"]}  # until the bus has answered

    def up() -> None:
        resolved.control("domain", "tun0", "corp.example", "~8.10.in-addr.arpa")
        resolved.control("dns", "tun0", "10.8.0.1:5353")

    view = seen(watcher, up, SPLIT)
    assert view["changed"] == ["resolved:tun0"]
    assert view["interfaces"]["corp.example"] == ["tun0"]
    assert view["search"] == ["home.arpa", "corp.example"]
    # Without a signal: found by polling.
    full = {"home.arpa": ["192.0.2.1"], ".": ["10.8.0.1:5353"]}
    seen(watcher, lambda: resolved.control("domain", "tun0", "~."), full)
    seen(watcher, lambda: resolved.control("domain", "tun0", "corp.example", "~8.10.in-addr.arpa"), SPLIT)
    both = SPLIT | {".": ["192.0.2.1", "10.8.0.1:5353"]}
    seen(watcher, lambda: resolved.control("default-route", "tun0", "yes"), both)
    seen(watcher, lambda: resolved.control("revert", "tun0"), HOME)


def test_a_link_that_goes_takes_its_routes_with_it(resolved: Resolved, watcher: Watcher) -> None:
    resolved.add_link("tun1", "10.8.0.19/24")
    resolved.control("domain", "tun1", "corp.example", "~8.10.in-addr.arpa")
    seen(watcher, lambda: resolved.control("dns", "tun1", "10.8.0.1:5353"), SPLIT)
    seen(watcher, lambda: resolved.namespace.ip("link", "del", "tun1"), HOME)


def test_a_restart_of_resolved_is_survived(resolved: Resolved, watcher: Watcher) -> None:
    watcher.wait(lambda view: view["routes"] == HOME)
    count = len(watcher.views)
    resolved.stop()
    time.sleep(1.0)
    assert len(watcher.views) == count  # what was known stays
    resolved.start()
    seen(
        watcher,
        lambda: resolved.control("dns", "wifi", "192.0.2.2"),
        HOME | {"home.arpa": ["192.0.2.2"], ".": ["192.0.2.2"]},
    )
    seen(watcher, lambda: resolved.control("dns", "wifi", "192.0.2.1"), HOME)


def test_encryption_by_resolved_is_not_undone(resolved: Resolved, watcher: Watcher) -> None:
    seen(watcher, lambda: resolved.control("dnsovertls", "wifi", "yes"), {".": ["127.0.0.53"]})
    assert watcher.views[-1]["why"] == "systemd-resolved's stub, because of DNSOverTLS=yes on wifi"
    seen(watcher, lambda: resolved.control("dnsovertls", "wifi", "no"), HOME)
