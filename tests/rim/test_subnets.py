"""Which networks the host has: on made-up hosts, and on a real kernel with addresses, routes and a VPN's table."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from ipaddress import IPv6Network, ip_network

import pytest

from netstack.host import subnets
from netstack.host.subnets import SubnetError, Taken, check_subnet, choose_subnet, choose_subnet6, find_clash


def host(*networks: str) -> list[Taken]:
    return [Taken(ip_network(network), f"route to {network}") for network in networks]


@pytest.mark.parametrize(
    ("taken", "expected"),
    (
        ([], "192.168.5.0/24"),
        (["192.168.5.0/24"], "192.168.6.0/24"),
        (["192.168.5.77/32"], "192.168.6.0/24"),
        (["192.168.4.0/22"], "192.168.8.0/24"),
        (["192.168.5.0/24", "192.168.6.0/24", "10.0.0.0/8"], "192.168.7.0/24"),
        (["192.168.0.0/16"], "172.31.5.0/24"),
        (["192.168.0.0/16", "172.16.0.0/12"], "10.5.5.0/24"),
        (["192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8"], "198.18.5.0/24"),
        (["192.168.5.0/25", "fd00::/8"], "192.168.6.0/24"),
        (["10.0.0.0/8", "172.17.0.0/16", "192.0.2.0/24"], "192.168.5.0/24"),
    ),
)
def test_the_next_free_network_is_taken(taken: list[str], expected: str) -> None:
    assert str(choose_subnet(host(*taken))) == expected


@pytest.mark.parametrize(
    ("taken", "expected"),
    (
        ([], "fd00:c0a8:5::/64"),
        (["fd00:c0a8:5::/64"], "fd00:c0a8:6::/64"),
        (["fd00:c0a8:5:0:1::/80", "192.168.0.0/16"], "fd00:c0a8:6::/64"),
        (["fd00:c0a8::/32"], "fec0:c0a8:5::/64"),
        (["fc00::/7"], "fec0:c0a8:5::/64"),
    ),
)
def test_the_next_free_ipv6_network_is_taken(taken: list[str], expected: str) -> None:
    assert choose_subnet6(host(*taken)) == IPv6Network(expected)


def test_a_named_network_that_clashes_is_refused_with_the_reason() -> None:
    taken = [Taken(ip_network("192.168.0.0/16"), "route through tun0")]
    with pytest.raises(SubnetError, match=r"192\.168\.5\.0/24 overlaps 192\.168\.0\.0/16.*route through tun0"):
        check_subnet(ip_network("192.168.5.0/24"), taken)
    check_subnet(ip_network("10.1.0.0/16"), taken)
    check_subnet(ip_network("fd00:c0a8:5::/64"), taken)


def test_nothing_free_is_an_error_that_says_why() -> None:
    with pytest.raises(SubnetError, match=r"192\.0\.0\.0/8 \(route to 192\.0\.0\.0/8\).*--subnet"):
        choose_subnet(host("192.0.0.0/8", "172.0.0.0/8", "10.0.0.0/8", "198.0.0.0/8"))


def test_all_candidates_are_networks_of_their_own() -> None:
    for texts in (subnets.CANDIDATES4, subnets.CANDIDATES6):
        networks = [ip_network(text) for text in texts]
        assert len(set(networks)) == len(networks)
        for network in networks[:60]:
            assert sum(find_clash(network, [Taken(other, "")]) is not None for other in networks) == 1


def test_this_host_is_read_without_an_error() -> None:
    for taken in subnets.list_taken():
        assert taken.why
        assert not taken.network.is_loopback
    assert subnets.has_ipv6_default_route() in (True, False)


def test_interfaces_as_other_systems_describe_them() -> None:
    parse = subnets._parse_interface
    assert parse({"addr": "10.1.2.3", "netmask": "255.255.0.0"}) == ip_network("10.1.0.0/16")
    assert parse({"addr": "10.8.0.2", "netmask": "255.255.255.255", "peer": "10.8.0.1"}) == ip_network("10.8.0.1/32")
    assert parse({"addr": "fd00::5%eth0", "netmask": "ffff:ffff:ffff:ffff::/64"}) == ip_network("fd00::/64")
    assert parse({"addr": "fd00::5", "netmask": "64"}) == ip_network("fd00::/64")
    assert parse({"addr": "10.1.2.3"}) == ip_network("10.1.2.3/32")
    assert parse({"peer": "10.8.0.1"}) is None
    assert parse({"addr": "x", "netmask": "y"}) is None


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_answers_that_make_no_sense_are_survived(cut: int) -> None:
    routes: list[subnets._Route] = []
    message = subnets._RTMSG.pack(socket.AF_INET, 16, 0, 0, 254, 0, 0, 1, 0)
    message += subnets._RTATTR.pack(8, 1) + bytes((192, 168, 0, 0)) + subnets._RTATTR.pack(8, 4) + b"\7\0\0\0"
    whole = subnets._NLMSGHDR.pack(16 + len(message), 24, 0, 1, 0) + message
    assert not subnets._parse_block(whole, routes)
    assert [(str(route.network), route.interface) for route in routes] == [("192.168.0.0/16", 7)]
    assert subnets._parse_block(subnets._NLMSGHDR.pack(3, 24, 0, 1, 0), routes)  # a length that would go nowhere
    subnets._parse_block(whole[:-cut] if cut else whole + b"\0", routes)


# A host with a VPN, as the kernel of a network namespace has it.
HOST = """
set -e
ip link set lo up
ip link add lan0 type veth peer name lan1
ip link set lan0 up
ip link set lan1 up
ip addr add 192.168.5.10/24 dev lan0
ip addr add fd00:c0a8:5::10/64 dev lan0 nodad
ip route add default via 192.168.5.1
ip tuntap add tun0 mode tun
ip link set tun0 up
ip addr add 10.8.0.2 peer 10.8.0.1 dev tun0
ip route add 192.168.6.0/23 dev tun0
ip route add 0.0.0.0/1 dev tun0
ip route add 128.0.0.0/1 dev tun0
ip route add 192.168.8.0/24 dev tun0 table 52
ip route add unreachable 192.168.9.0/24
ip -6 route add fd00:c0a8:6::/64 dev lan0 table 52
"""

REPORT = """
import json
from netstack.host import subnets
taken = subnets.list_taken()
print(json.dumps({
    "taken": [(str(entry.network), entry.why) for entry in taken],
    "subnet": str(subnets.choose_subnet(taken)),
    "subnet6": str(subnets.choose_subnet6(taken)),
    "ipv6": subnets.has_ipv6_default_route(),
}))
"""


def report(*commands: str) -> dict[str, object]:
    """Give what a process finds out on a host that these shell commands made."""
    script = "\n".join((*commands, f"exec {sys.executable} -c '{REPORT}'"))
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.needs("netns", "ip", "tun")
def test_a_real_host_with_a_vpn() -> None:
    found = report(HOST)
    taken = found["taken"]
    assert isinstance(taken, list)
    known = dict(reversed(taken))
    assert known["192.168.5.0/24"] == "address 192.168.5.10 of lan0"
    assert known["10.8.0.1/32"] == "address 10.8.0.2 of tun0"
    assert known["192.168.6.0/23"] == "route through tun0"
    assert known["192.168.8.0/24"] == "route through tun0"  # of another table
    assert known["fd00:c0a8:6::/64"] == "route through lan0"
    assert not {"0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "192.168.9.0/24", "127.0.0.0/8", "fe80::/64"} & set(known)
    assert found["subnet"] == "192.168.9.0/24"
    assert found["subnet6"] == "fd00:c0a8:7::/64"
    assert found["ipv6"] is False


@pytest.mark.needs("netns", "ip", "tun")
@pytest.mark.parametrize(
    "route", ("default dev lan0", "2000::/3 dev lan0", "default via fe80::1 dev lan0", "default dev lan0 table 51820")
)
def test_a_real_host_with_a_way_to_the_ipv6_world(route: str) -> None:
    assert report(HOST, f"ip -6 route add {route}")["ipv6"] is True


@pytest.mark.needs("netns")
def test_a_host_without_any_network() -> None:
    assert report("true") == {"taken": [], "subnet": "192.168.5.0/24", "subnet6": "fd00:c0a8:5::/64", "ipv6": False}
