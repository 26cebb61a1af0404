"""NetworkManager: what its D-Bus says, recorded, and followed on a bus with a service that repeats it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from netstack.dns.routes import RoutingTable
from netstack.dns.source_networkmanager import NetworkManager, parse_default_routes, parse_networkmanager
from tests.lab.follow import Watcher
from tests.lab.namespaces import Namespace
from tests.lab.networkmanager import NetworkManager as Manager

SIGNATURES = {"nameservers": "as", "domains": "as", "interface": "s", "priority": "i", "vpn": "b"}

WIFI = {
    "nameservers": ["192.0.2.1"], "domains": ["home.arpa"], "interface": "wlan0", "priority": 100, "vpn": False,
}  # fmt: skip
WIFI6 = {"nameservers": ["2001:db8::1"], "domains": [], "interface": "wlan0", "priority": 100, "vpn": False}
SPLIT = {
    "nameservers": ["10.8.0.1", "10.8.0.3"],
    "domains": ["~corp.example", "corp2.example"],
    "interface": "tun0",
    "priority": 50,
    "vpn": True,
}


def parse(
    *entries: dict[str, Any], routes: Sequence[str] = ("wlan0",), more: Mapping[str, str] | None = None
) -> NetworkManager:
    variants = [{key: (SIGNATURES[key], value) for key, value in entry.items()} for entry in entries]
    properties = {"Mode": "default", "RcManager": "symlink", **(more or {}), "Configuration": variants}
    return parse_networkmanager(properties, routes)


def routes_of(found: NetworkManager) -> dict[str, list[str]]:
    return {line["domain"]: line["servers"] for line in RoutingTable(found.scopes).describe()}


def test_a_split_vpn_gets_its_domains_and_no_more() -> None:
    found = parse(SPLIT, WIFI, WIFI6)
    assert routes_of(found) == {
        "corp.example": ["10.8.0.1", "10.8.0.3"],
        "corp2.example": ["10.8.0.1", "10.8.0.3"],
        "home.arpa": ["192.0.2.1"],
        ".": ["192.0.2.1", "2001:db8::1"],
    }
    assert RoutingTable(found.scopes).search == ("corp2.example", "home.arpa")
    assert [scope.key for scope in found.scopes] == [
        "networkmanager:tun0",
        "networkmanager:wlan0",
        "networkmanager:wlan0:2",
    ]
    assert found.scopes[0].servers[0].interface == "tun0"


def test_wireguard_is_no_vpn_to_networkmanager_but_may_be_split_all_the_same() -> None:
    assert routes_of(parse(SPLIT | {"vpn": False}, WIFI))["."] == ["192.0.2.1"]
    # Nothing says that it is split, and the host's own programs ask it first.
    assert routes_of(parse(SPLIT | {"vpn": False, "domains": ["corp.example"]}, WIFI))["."] == ["10.8.0.1", "10.8.0.3"]


def test_a_vpn_with_the_default_route_stands_before_the_rest() -> None:
    assert routes_of(parse(SPLIT, WIFI, routes=("tun0", "wlan0")))["."] == ["10.8.0.1", "10.8.0.3"]
    assert routes_of(parse(SPLIT | {"domains": []}, WIFI))["."] == ["10.8.0.1", "10.8.0.3"]


@pytest.mark.parametrize("root", ("~", "~.", ""))
def test_the_root_takes_everything(root: str) -> None:
    assert routes_of(parse(SPLIT | {"domains": [root]}, WIFI)) == {
        "home.arpa": ["192.0.2.1"],
        ".": ["10.8.0.1", "10.8.0.3"],
    }


def test_a_negative_priority_excludes_all_others() -> None:
    found = parse(SPLIT | {"priority": -50}, WIFI, WIFI6 | {"priority": -10})
    assert [scope.key for scope in found.scopes] == ["networkmanager:tun0"]


def test_fields_may_be_missing_and_servers_unreadable() -> None:
    found = parse({"nameservers": ["192.0.2.1", "x", "fe80::1", "127.0.0.1"], "interface": "eth0"}, {})
    assert [str(server) for server in found.scopes[0].servers] == ["192.0.2.1", "fe80::1%eth0", "127.0.0.1"]
    assert [server.interface for server in found.scopes[0].servers] == ["eth0", "eth0", ""]
    assert parse().scopes == ()


@pytest.mark.parametrize(
    ("more", "nameservers", "expected"),
    (
        ({}, ["10.8.0.1", "192.0.2.1"], True),
        ({}, ["192.0.2.99"], False),
        ({}, ["127.0.0.53"], False),
        ({}, [], False),
        ({"Mode": "systemd-resolved"}, ["192.0.2.1"], False),
        ({"RcManager": "unmanaged"}, ["192.0.2.1"], False),
    ),
)
def test_whether_a_resolv_conf_is_its_work(more: dict[str, str], nameservers: list[str], expected: bool) -> None:
    assert parse(SPLIT, WIFI, more=more).writes(nameservers) == expected


def test_default_routes_of_the_kernel() -> None:
    routes4 = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "wlan0\t00000000\t010200C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
        "tun0\t0000080A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    zeros = "0" * 32
    routes6 = (
        f"{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003    eth0\n"
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
        f"{zeros[:-1]}1 80 {zeros} 00 {zeros} 00000000 00000001 00000000 80200001       lo\n"
    )
    assert parse_default_routes(routes4, routes6) == {"wlan0", "eth0"}
    assert parse_default_routes("", "") == set()
    assert parse_default_routes("x\ny", "z") == set()


# ---- a real one ----------------------------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[Manager]:
    namespace = Namespace("host")
    try:
        manager = Manager(namespace)
        yield manager
        manager.close()
    finally:
        namespace.close()


def test_a_real_networkmanager_is_followed_through_a_vpns_life(manager: Manager) -> None:
    manager.add_connection(
        "wifi", "192.0.2.10/24", "gw4", "192.0.2.1", "ipv4.dns", "192.0.2.1", "ipv4.dns-search", "home.arpa"
    )
    manager.up("wifi")
    watcher = Watcher(manager.namespace)
    try:
        home = {"home.arpa": ["192.0.2.1"], ".": ["192.0.2.1"]}
        view = watcher.wait(lambda view: view["routes"] == home)
        assert view["why"] == "NetworkManager over D-Bus"
        assert view["search"] == ["home.arpa"]

        split = ("ipv4.never-default", "yes", "ipv4.dns-priority", "50", "ipv4.dns-search", "~corp.example")
        manager.add_connection("tun0", "10.8.0.9/24", "ipv4.dns", "10.8.0.1", *split)
        manager.up("tun0")
        up_at = time.monotonic()
        view = watcher.wait(lambda view: "corp.example" in view["routes"])
        assert view["at"] - up_at < 2.0
        assert view["routes"] == home | {"corp.example": ["10.8.0.1"]}
        assert view["interfaces"]["corp.example"] == ["tun0"]
        # What this was for: resolv.conf has both, and the VPN's first.
        text = manager.namespace.run("cat", "/etc/resolv.conf").stdout
        assert text.index("nameserver 10.8.0.1") < text.index("nameserver 192.0.2.1")

        manager.down("tun0")
        down_at = time.monotonic()
        view = watcher.wait(lambda view: view["routes"] == home)
        assert view["at"] - down_at < 2.0

        # A VPN that takes all names.
        manager.control("connection", "modify", "tun0", "ipv4.dns-search", "~.")
        manager.up("tun0")
        watcher.wait(lambda view: view["routes"] == home | {".": ["10.8.0.1"]})
        manager.control("connection", "modify", "tun0", "ipv4.dns-search", "", "ipv4.dns-priority", "-50")
        manager.up("tun0")
        watcher.wait(lambda view: view["routes"] == {".": ["10.8.0.1"]})
    finally:
        watcher.close()


def test_a_resolv_conf_that_somebody_else_writes_is_followed_instead(manager: Manager) -> None:
    manager.add_connection("wifi", "192.0.2.10/24", "gw4", "192.0.2.1", "ipv4.dns", "192.0.2.1")
    manager.up("wifi")
    watcher = Watcher(manager.namespace)
    try:
        watcher.wait(lambda view: view["why"] == "NetworkManager over D-Bus")
        manager.namespace.run("sh", "-c", "echo nameserver 198.51.100.1 >/etc/resolv.conf")
        watcher.wait(lambda view: view["routes"] == {".": ["198.51.100.1"]})
    finally:
        watcher.close()
