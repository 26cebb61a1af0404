"""What real daemons said on the D-Bus, recorded by `python -m tests.lab.record_bus`, and what it means for routing.

The names of the files say which version it was. New ones, from other hosts, are welcome.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netstack.dns.routes import RoutingTable
from netstack.dns.source_networkmanager import NetworkManager, parse_networkmanager
from netstack.dns.source_resolved import Resolved, parse_resolved
from tests.lab.record_bus import from_json

RECORDED = Path(__file__).with_name("recorded")
HOME = {"home.arpa": ["192.0.2.1", "2001:db8::1"], ".": ["192.0.2.1", "2001:db8::1"]}


def read(name: str) -> Any:
    return from_json(json.loads((RECORDED / f"{name}.json").read_text()))


def read_resolved(name: str) -> Resolved:
    found = read(name)
    links, names = ({int(index): value for index, value in found[key].items()} for key in ("links", "names"))
    return parse_resolved(found["manager"], links, names)


def read_networkmanager(name: str) -> NetworkManager:
    found = read(name)
    return parse_networkmanager(found["properties"], found["default_routes"])


def routes_of(found: Resolved | NetworkManager) -> dict[str, list[str]]:
    return {line["domain"]: line["servers"] for line in RoutingTable(found.scopes).describe()}


def test_resolved_252_at_home() -> None:
    found = read_resolved("resolved_252_home")
    assert routes_of(found) == HOME
    assert (found.policy, found.stub) == ("", True)
    assert RoutingTable(found.scopes).search == ("home.arpa",)


def test_resolved_252_with_a_split_vpn_with_ports_and_names() -> None:
    found = read_resolved("resolved_252_split_vpn")
    vpn = ["10.8.0.1:5353#dns.corp.example", "10.8.0.3"]
    assert routes_of(found) == HOME | {"corp.example": vpn, "8.10.in-addr.arpa": vpn}
    assert RoutingTable(found.scopes).search == ("home.arpa", "corp.example")
    (tun0,) = [scope for scope in found.scopes if scope.key == "resolved:tun0"]
    assert (tun0.default, {server.interface for server in tun0.servers}) == (False, {"tun0"})


def test_resolved_252_with_a_vpn_for_all_names_that_wants_tls() -> None:
    found = read_resolved("resolved_252_full_vpn_tls")
    assert routes_of(found)["."] == ["10.8.0.1:5353#dns.corp.example", "10.8.0.3"]
    assert routes_of(found)["home.arpa"] == HOME["home.arpa"]
    assert found.policy == "DNSOverTLS=yes on tun0", "so that its stub is asked instead"


def test_networkmanager_1_42_at_home() -> None:
    found = read_networkmanager("networkmanager_1.42_home")
    assert (found.mode, found.rc_manager) == ("default", "file")
    assert routes_of(found) == {"home.arpa": ["192.0.2.1"], ".": ["192.0.2.1"]}
    assert found.writes(["192.0.2.1"])


def test_networkmanager_1_42_with_a_split_vpn() -> None:
    found = read_networkmanager("networkmanager_1.42_split_vpn")
    vpn = ["10.8.0.1", "10.8.0.3"]
    assert routes_of(found) == {
        "home.arpa": ["192.0.2.1"],
        ".": ["192.0.2.1"],
        "corp.example": vpn,
        "corp2.example": vpn,
    }


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_whatever_is_missing_or_of_another_type_does_no_harm_beyond_what_it_says(path: Path) -> None:
    """Other versions leave properties out."""
    found = read(path.stem)
    for key in found["manager"] if "manager" in found else found["properties"]:
        if "manager" in found:
            less = {name: value for name, value in found["manager"].items() if name != key}
            parse_resolved(less, {int(index): value for index, value in found["links"].items()}, {3: "wifi", 5: "tun0"})
        else:
            less = {name: value for name, value in found["properties"].items() if name != key}
            parse_networkmanager(less, found["default_routes"])
