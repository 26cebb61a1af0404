"""Which networks the host has already, so that the guests' network is another one.

A guests' network that the host has too is not an error of addressing: it exists in this process only. But guests could
not reach those hosts, since they would look for them among themselves. So what counts as taken is every network of an
interface's address (netifaces), and every network that a route leads to: a VPN usually has few addresses and many
routes. Routes to "everything" do not count. That is not only the default route: OpenVPN has 0.0.0.0/1 and 128.0.0.0/1,
others 2000::/3; no private network is larger than 10.0.0.0/8 or fc00::/7, so what is larger than those means the world.

Routes are read over netlink, because the file /proc/net/route has the main table only, and VPNs (Tailscale, wg-quick)
keep theirs in others. On other systems than Linux only the addresses are looked at.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

Network = IPv4Network | IPv6Network

# Not compared in place: mypy would take the code for other systems for unreachable.
_LINUX: bool = sys.platform == "linux"

# What is larger than the largest private networks: RFC 1918 3, RFC 4193 3.1.
_WORLD4 = 8
_WORLD6 = 7

# In the order of preference: the default first, then its neighbors; the networks that home routers use come last of
# 192.168. The rest of RFC 1918 is for hosts whose VPN has taken all of 192.168, and 198.18.0.0/15 (RFC 2544, for
# benchmarks, routed nowhere) for those where it has taken all of RFC 1918.
_THIRDS = (*range(5, 255), 4, 3, 2, 1, 0)
CANDIDATES4: tuple[str, ...] = (
    *(f"192.168.{third}.0/24" for third in _THIRDS),
    *(f"172.{second}.5.0/24" for second in range(31, 15, -1)),
    *(f"10.{second}.5.0/24" for second in range(5, 256)),
    *(f"198.18.{third}.0/24" for third in range(5, 20)),
)

# The same numbers, read as digits; and for hosts whose VPN has taken all of fc00::/7 the site-local range, which nobody
# else uses any more (RFC 3879) and libslirp always did.
CANDIDATES6: tuple[str, ...] = (
    *(f"fd00:c0a8:{third}::/64" for third in range(5, 255)),
    *(f"fec0:c0a8:{third}::/64" for third in range(5, 20)),
)


class Taken(NamedTuple):
    """A network that the host has, and how: words for a message."""

    network: Network
    why: str


class SubnetError(ValueError):
    """No network is free, or not the one asked for. The text says what is in the way."""


def list_taken() -> list[Taken]:
    """Give the networks that the host has now. What cannot be found out counts as free."""
    return [*_interface_networks(), *_route_networks()]


def find_clash(network: Network, taken: Iterable[Taken]) -> Taken | None:
    """Give the first network of the host that overlaps this one."""
    for entry in taken:
        if entry.network.version == network.version and entry.network.overlaps(network):
            return entry
    return None


def choose_subnet(taken: Iterable[Taken], candidates: Iterable[str] = CANDIDATES4) -> IPv4Network:
    """Give the first candidate that the host does not have. Raises SubnetError when it has them all."""
    found = _choose(taken, candidates)
    assert isinstance(found, IPv4Network)
    return found


def choose_subnet6(taken: Iterable[Taken], candidates: Iterable[str] = CANDIDATES6) -> IPv6Network:
    """Give the first candidate that the host does not have. Raises SubnetError when it has them all."""
    found = _choose(taken, candidates)
    assert isinstance(found, IPv6Network)
    return found


def check_subnet(network: Network, taken: Iterable[Taken]) -> None:
    """Raise SubnetError when the host has this network, or a part of it, or one around it."""
    clash = find_clash(network, taken)
    if clash is not None:
        raise SubnetError(f"{network} overlaps {clash.network}, which this host has: {clash.why}")


def has_ipv6_default_route() -> bool:
    """Whether the host has a way to the IPv6 world."""
    if _LINUX:
        # 2000::/3 is all that was ever given out (IANA, "IPv6 Global Unicast Address Assignments").
        return any(route.family == socket.AF_INET6 and route.network.prefixlen <= 3 for route in _read_routes())
    import netifaces

    return netifaces.AF_INET6 in netifaces.gateways().get("default", {})


def _choose(taken: Iterable[Taken], candidates: Iterable[str]) -> Network:
    known = list(taken)
    clashes: dict[Taken, None] = {}
    for candidate in candidates:
        network = ipaddress.ip_network(candidate)
        clash = find_clash(network, known)
        if clash is None:
            return network
        clashes[clash] = None
    found = ", ".join(f"{clash.network} ({clash.why})" for clash in list(clashes)[:3])
    raise SubnetError(f"no private network is free on this host, which has {found}; name one with --subnet")


def _interface_networks() -> Iterator[Taken]:
    try:
        # A C extension, 6 ms; only `netstack run` and `doctor` come here.
        import netifaces

        addresses = [(name, netifaces.ifaddresses(name)) for name in netifaces.interfaces()]
    except (ImportError, OSError, ValueError):
        # ValueError: an interface went away between the two calls.
        return
    for name, families in addresses:
        for family in (netifaces.AF_INET, netifaces.AF_INET6):
            for entry in families.get(family, ()):
                network = _parse_interface(entry)
                if network is not None and not network.is_loopback and not network.is_link_local:
                    yield Taken(network, f"address {entry['addr']} of {name}")


def _parse_interface(entry: dict[str, str]) -> Network | None:
    """The network of an address, as netifaces describes it."""
    address = entry.get("addr", "").partition("%")[0]
    # IPv6: "ffff:ffff:ffff:ffff::/64". A point-to-point interface has a mask of all ones and a peer, where it leads.
    mask = entry.get("netmask", "")
    length = mask.partition("/")[2] or mask
    if mask == "255.255.255.255" and "peer" in entry:
        address = entry["peer"]
    try:
        return ipaddress.ip_network(f"{address}/{length}" if length else address, strict=False)
    except ValueError:
        return None


def _route_networks() -> Iterator[Taken]:
    if not _LINUX:
        return
    for route in _read_routes():
        network = route.network
        world = _WORLD4 if network.version == 4 else _WORLD6
        if network.prefixlen >= world and not network.is_link_local and not network.is_loopback:
            try:
                through = socket.if_indextoname(route.interface)
            except OSError:
                through = f"interface {route.interface}"
            yield Taken(network, f"route through {through}")


class _Route(NamedTuple):
    family: int
    network: Network
    interface: int


# linux/netlink.h, struct nlmsghdr: length, type, flags, sequence number, port.
_NLMSGHDR = struct.Struct("=IHHII")
# linux/rtnetlink.h, struct rtmsg: family, bits of destination and source, tos, table, protocol, scope, type, flags.
_RTMSG = struct.Struct("=BBBBBBBBI")
# linux/rtnetlink.h, struct rtattr: length, type.
_RTATTR = struct.Struct("=HH")
_NLMSG_DONE = 3
_NLMSG_ERROR = 2
_RTM_GETROUTE = 26
_RTM_NEWROUTE = 24
_NLM_F_REQUEST_DUMP = 0x301
_RTN_UNICAST = 1
_RT_TABLE_LOCAL = 255
_RTA_DST = 1
_RTA_OIF = 4
_LOOPBACK = 1  # include/net/flow.h: LOOPBACK_IFINDEX

# The kernel answers in blocks of up to 32 KiB (net/netlink/af_netlink.c, netlink_dump).
_NETLINK_BUFFER = 65536

# A full table of the Internet is a million routes, and no host that runs virtual machines has one.
_MAX_ROUTES = 100_000


def _read_routes() -> list[_Route]:
    """Ask the kernel for all unicast routes of all tables. Empty when it does not say."""
    routes: list[_Route] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
            # It never blocks: the kernel answers at once. A sandbox that swallows the question must not hold us up.
            kernel.settimeout(1.0)
            body = _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)
            head = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST_DUMP, 1, 0)
            kernel.send(head + body)
            while len(routes) < _MAX_ROUTES:
                block = kernel.recv(_NETLINK_BUFFER)
                if not block or _parse_block(block, routes):
                    break
    except OSError:
        return routes
    return routes


def _parse_block(block: bytes, routes: list[_Route]) -> bool:
    """Add the routes of one answer; whether it was the last one."""
    position = 0
    while position + _NLMSGHDR.size <= len(block):
        length, kind, _, _, _ = _NLMSGHDR.unpack_from(block, position)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _NLMSGHDR.size + _RTMSG.size:
            return True
        if position + length > len(block):
            return True
        if kind == _RTM_NEWROUTE:
            route = _parse_route(block[position + _NLMSGHDR.size : position + length])
            if route is not None:
                routes.append(route)
        position += length + 3 & ~3
    return False


def _parse_route(message: bytes) -> _Route | None:
    family, bits, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message)
    if kind != _RTN_UNICAST or table == _RT_TABLE_LOCAL or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    destination = bytes(4 if family == socket.AF_INET else 16)
    interface = 0
    position = _RTMSG.size
    while position + _RTATTR.size <= len(message):
        length, attribute = _RTATTR.unpack_from(message, position)
        if length < _RTATTR.size:
            break
        data = message[position + _RTATTR.size : position + length]
        if attribute == _RTA_DST:
            destination = data
        elif attribute == _RTA_OIF:
            interface = int.from_bytes(data, sys.byteorder)
        position += length + 3 & ~3
    # A default route through the loopback interface leads nowhere (older kernels have it for IPv6).
    if interface == _LOOPBACK:
        return None
    return _Route(family, ipaddress.ip_network((destination, bits), strict=False), interface)
