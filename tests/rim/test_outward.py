"""How the host goes out into the world: on a real kernel, with the networks that hosts have."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.needs("root", "netns", "ip")]

PROGRAM = """
import json
from ipaddress import ip_address
from netstack.host.outward import find_outward
text = lambda address: None if address is None else str(ip_address(address))
found = find_outward()
print(json.dumps({
    "address": text(found.address), "length": found.prefix_length, "router": text(found.router),
    "address6": text(found.address6), "all": sorted(map(text, found.all)),
}))
"""

SIX = "ip addr add 2001:db8:7::5/64 dev eth0 nodad; ip route add default via 2001:db8:7::1"


def find_inside(*commands: str) -> dict[str, Any]:
    """What is found in a namespace of its own, with a device eth0, after these commands."""
    script = "; ".join(
        (
            "set -e",
            "ip link set lo up",
            "ip link add eth0 type veth peer name eth1",
            "ip link set eth1 up",
            "ip link set eth0 up",
            *commands,
        )
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", f'{script}; exec "$0" -c "$1"', sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_ordinary_host() -> None:
    found = find_inside(
        "ip addr add 198.51.100.7/23 dev eth0",
        "ip addr add 198.51.100.8/23 dev eth0",
        "ip route add default via 198.51.100.1",
        SIX,
    )
    assert found == {
        "address": "198.51.100.7",
        "length": 23,
        "router": "198.51.100.1",
        "address6": "2001:db8:7::5",
        "all": ["198.51.100.7", "198.51.100.8", "2001:db8:7::5"],
    }


def test_the_source_that_the_default_route_names_is_taken() -> None:
    found = find_inside(
        "ip addr add 198.51.100.7/24 dev eth0",
        "ip addr add 198.51.100.8/24 dev eth0",
        "ip route add default via 198.51.100.1 src 198.51.100.8",
    )
    assert (found["address"], found["address6"]) == ("198.51.100.8", None)


@pytest.mark.parametrize(
    ("address", "route", "length", "router"),
    (
        ("100.64.3.4/32", "default dev eth0", 24, "100.64.3.1"),  # a VPN's point-to-point interface
        ("100.64.3.1/32", "default dev eth0", 24, "100.64.3.2"),
        ("198.51.100.7/24", "default via 203.0.113.9 dev eth0 onlink", 24, "198.51.100.1"),
    ),
)
def test_a_way_out_without_a_router_in_its_network_gets_one(address: str, route: str, length: int, router: str) -> None:
    found = find_inside(f"ip addr add {address} dev eth0", f"ip route add {route}")
    assert (found["address"], found["length"], found["router"]) == (address.partition("/")[0], length, router)


def test_a_host_that_is_on_its_own_has_none() -> None:
    found = find_inside("ip addr add 198.51.100.7/24 dev eth0")
    assert (found["address"], found["router"], found["address6"]) == (None, None, None)
    assert found["all"] == ["198.51.100.7"]
