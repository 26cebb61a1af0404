"""Which address is whose."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest

from netstack.core.addresses import Addresses, link_local
from tests.core.ip_fakes import addresses


def _packed(text: str) -> bytes:
    return ip_address(text).packed


def test_link_local_of_a_mac() -> None:
    """RFC 4291 appendix A, its own example."""
    assert link_local(bytes.fromhex("34567890abcd")) == _packed("fe80::3656:78ff:fe90:abcd")


@pytest.mark.parametrize(
    ("destination", "host"),
    (
        ("192.168.5.2", "127.0.0.1"),
        ("fd00:c0a8:5::2", "::1"),
        ("fe80::5055:c0ff:fea8:502", "::1"),
        ("8.8.8.8", "8.8.8.8"),
        ("10.0.0.1", "10.0.0.1"),
        ("192.168.4.2", "192.168.4.2"),
        ("192.168.6.2", "192.168.6.2"),
        ("128.0.0.1", "128.0.0.1"),
        ("126.255.255.255", "126.255.255.255"),
        ("1.0.0.0", "1.0.0.0"),
        ("223.255.255.255", "223.255.255.255"),
        ("2001:db8::1", "2001:db8::1"),
        ("fd00:c0a8:6::2", "fd00:c0a8:6::2"),
        ("::1:0:0:0", "::1:0:0:0"),
        ("64:ff9b::808:808", "64:ff9b::808:808"),
        ("192.168.5.3", None),
        ("192.168.5.15", None),
        ("192.168.5.255", None),
        ("127.0.0.1", None),
        ("0.0.0.0", None),
        ("224.0.0.1", None),
        ("255.255.255.255", None),
        ("::", None),
        ("::1", None),
        ("::8.8.8.8", None),
        ("::ffff:8.8.8.8", None),
        ("fe80::1", None),
        ("febf::1", None),
        ("ff02::1", None),
        ("fd00:c0a8:5::3", None),
        ("fd00:c0a8:5::15", None),
    ),
)
def test_where_the_host_sends(destination: str, host: str | None) -> None:
    assert addresses().to_host(_packed(destination)) == (None if host is None else _packed(host))


@pytest.mark.parametrize("gateway", ("192.168.5.2", "fd00:c0a8:5::2", "fe80::5055:c0ff:fea8:502"))
def test_without_the_hosts_loopback(gateway: str) -> None:
    assert addresses(host_loopback=False).to_host(_packed(gateway)) is None


@pytest.mark.parametrize(
    ("address", "seen"),
    (
        ("127.0.0.1", "192.168.5.2"),
        ("127.0.1.1", "192.168.5.2"),
        ("::1", "fd00:c0a8:5::2"),
        ("8.8.8.8", "8.8.8.8"),
        ("2001:db8::1", "2001:db8::1"),
    ),
)
def test_how_guests_see_the_host(address: str, seen: str) -> None:
    assert addresses().from_host(_packed(address)) == _packed(seen)


@pytest.mark.parametrize(
    ("address", "may"),
    (
        ("192.168.5.1", True),
        ("192.168.5.15", True),
        ("192.168.5.254", True),
        ("192.168.5.0", False),
        ("192.168.5.2", False),
        ("192.168.5.3", False),
        ("192.168.5.255", False),
        ("192.168.4.15", False),
        ("0.0.0.0", False),
        ("fd00:c0a8:5::15", True),
        ("fd00:c0a8:5:0:ffff::1", True),
        ("fe80::1", True),
        ("fd00:c0a8:5::2", False),
        ("fd00:c0a8:5::3", False),
        ("fe80::5055:c0ff:fea8:502", False),
        ("fd00:c0a8:6::15", False),
        ("2001:db8::1", False),
        ("::", False),
    ),
)
def test_who_may_be_a_guest(address: str, may: bool) -> None:
    assert addresses().may_be_guest(_packed(address)) is may


@pytest.mark.parametrize(
    ("address", "group"),
    (
        ("192.168.5.255", True),
        ("255.255.255.255", True),
        ("224.0.0.1", True),
        ("239.1.2.3", True),
        ("ff02::1", True),
        ("192.168.5.15", False),
        ("192.168.4.255", False),
        ("fe80::1", False),
    ),
)
def test_groups(address: str, group: bool) -> None:
    assert addresses().is_group(_packed(address)) is group


@pytest.mark.parametrize("prefix", (16, 22, 24, 28, 29))
def test_subnets_of_any_size(prefix: int) -> None:
    subnet = IPv4Network(f"10.20.0.0/{prefix}")
    hosts = list(subnet.hosts())
    here = Addresses(
        bytes.fromhex("5255c0a80502"),
        subnet,
        hosts[1].packed,
        hosts[2].packed,
        IPv6Network("fd00:1:2:3::/64"),
        _packed("fd00:1:2:3::2"),
        _packed("fd00:1:2:3::3"),
    )
    assert here.in_subnet(hosts[0].packed)
    assert here.in_subnet(hosts[-1].packed)
    assert here.may_be_guest(hosts[-1].packed)
    assert not here.in_subnet((subnet.broadcast_address + 1).packed)
    assert here.is_group(subnet.broadcast_address.packed)
    assert not here.may_be_guest(subnet.broadcast_address.packed)
    assert here.to_host((subnet.broadcast_address + 1).packed) is not None


def test_which_of_the_gateways_addresses_complains() -> None:
    here = addresses()
    assert here.router_for(_packed("192.168.5.15")) == _packed("192.168.5.2")
    assert here.router_for(_packed("fd00:c0a8:5::15")) == _packed("fd00:c0a8:5::2")
    assert here.router_for(_packed("fe80::15")) == here.link_local
