"""The host's interfaces on which there may be neighbors who speak mDNS: up, with multicast, no loopback and no VPN.

netifaces knows names and addresses; the flags come from the kernel (netdevice(7), SIOCGIFFLAGS; the same call and the
same place in the structure on macOS). Tunnels are point-to-point: nobody's printer is at the other end of a VPN.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

# Not compared in place: mypy would take the code for other systems for unreachable.
_LINUX: bool = sys.platform == "linux"

# struct ifreq: the name in 16 bytes, then the flags (net/if.h); 40 bytes long on Linux, 32 on macOS.
_SIOCGIFFLAGS = 0x8913 if _LINUX else 0xC0206911
_IFREQ = struct.Struct("=16sH22x" if _LINUX else "=16sH14x")
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_POINTOPOINT = 0x10
_IFF_MULTICAST = 0x1000 if _LINUX else 0x8000

# Hosts of containers have hundreds of interfaces, and a question goes out on each.
MAX_INTERFACES = 16


class Interface(NamedTuple):
    """One interface, and the networks on it. Addresses are what to send from, "" for none."""

    name: str
    number: int
    address4: str
    address6: str
    """The link-local one, without its scope."""
    networks: tuple[IPv4Network | IPv6Network, ...]

    def has(self, address: str) -> bool:
        """Whether an address, with or without a scope, is one of a neighbor."""
        found = ipaddress.ip_address(address.partition("%")[0])
        return any(found.version == network.version and found in network for network in self.networks)


def list_interfaces() -> list[Interface]:
    """Give the interfaces where mDNS makes sense. What cannot be found out is left out."""
    # A C extension, 6 ms: when it is used.
    import netifaces

    found: list[Interface] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
        for name in netifaces.interfaces():
            if len(found) >= MAX_INTERFACES:
                break
            try:
                if not _is_wanted(kernel, name):
                    continue
                interface = _describe(name, netifaces.ifaddresses(name))
            except (OSError, ValueError):  # it went away between the calls
                continue
            if interface.address4 or interface.address6:
                found.append(interface)
    return found


def _is_wanted(kernel: socket.socket, name: str) -> bool:
    request = _IFREQ.pack(name.encode()[:15], 0)
    flags = _IFREQ.unpack(fcntl.ioctl(kernel.fileno(), _SIOCGIFFLAGS, request))[1]
    wanted = _IFF_UP | _IFF_MULTICAST
    return bool(flags & (wanted | _IFF_LOOPBACK | _IFF_POINTOPOINT) == wanted)


def _describe(name: str, families: dict[int, list[dict[str, str]]]) -> Interface:
    address4 = address6 = ""
    networks: list[IPv4Network | IPv6Network] = []
    for entry in families.get(socket.AF_INET, ()):
        if "addr" in entry and "netmask" in entry:
            address4 = address4 or entry["addr"]
            networks.append(IPv4Network(f"{entry['addr']}/{entry['netmask']}", strict=False))
    for entry in families.get(socket.AF_INET6, ()):
        address = entry.get("addr", "").partition("%")[0]
        # "ffff:ffff:ffff:ffff::/64"
        length = entry.get("netmask", "").partition("/")[2] or "64"
        if address:
            networks.append(IPv6Network(f"{address}/{length}", strict=False))
            if not address6 and ipaddress.IPv6Address(address).is_link_local:
                address6 = address
    return Interface(name, socket.if_nametoindex(name), address4, address6, tuple(networks))
