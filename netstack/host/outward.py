"""By which address the host goes out into the world, through which router, and what other addresses it has.

The kernel is asked which source address it would take for a destination that only a default route leads to: connect()
of a UDP socket looks the route up and sends nothing. Which interface has that address, its netmask and the router are
netifaces' to say. A host with a VPN that takes all traffic goes out by the VPN's address, as the kernel sees it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Final

# Set aside for documentation (RFC 5737, RFC 3849): nobody's network, so the default route is what leads there.
_FAR4: Final = "203.0.113.1"
_FAR6: Final = "2001:db8::1"
_PORT: Final = 9  # discard; nothing is sent

# A point-to-point interface has a network of one address, in which there is no room for a router.
_LONGEST: Final = 30
_WIDENED: Final = 24

# The host cannot be asked now, which says nothing about its addresses.
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))


@dataclass(frozen=True, slots=True)
class Outward:
    """How the host is seen from outside. Addresses are packed."""

    address: bytes | None
    prefix_length: int
    router: bytes | None  # always in the network of `address`
    address6: bytes | None
    all: frozenset[bytes]  # every address of the host but loopback and link-local ones


def find_outward() -> Outward:
    """Ask the host now. What it does not have is None. Raises OSError when no descriptors are left to ask with."""
    import netifaces  # a C extension, 6 ms; only who needs it comes here

    entries = list(_addresses())
    source = _source(socket.AF_INET, _FAR4)
    source6 = _source(socket.AF_INET6, _FAR6)
    others = frozenset(address.packed for address, _ in entries)
    if source6 is not None and (source6.is_link_local or source6.is_loopback):
        source6 = None
    packed6 = source6.packed if source6 is not None else None
    if not isinstance(source, IPv4Address) or source.is_loopback or source.is_link_local:
        return Outward(None, 0, None, packed6, others)
    length = next((length for address, length in entries if address == source), 32)
    network = IPv4Network((source.packed, length if length <= _LONGEST else _WIDENED), strict=False)
    router: IPv4Address | None = None
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        router = IPv4Address(netifaces.gateways()["default"][netifaces.AF_INET][0])
    if router is None or router not in network or router == source:
        # A way out without a router in the same network: any address will do, as the gateway answers for all.
        router = next(address for address in network.hosts() if address != source)
    return Outward(source.packed, network.prefixlen, router.packed, packed6, others | {source.packed})


def _source(family: socket.AddressFamily, far: str) -> IPv4Address | IPv6Address | None:
    """The address from which the host would send there; None when it has no route. Raises OSError."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, _PORT))
            return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        return None


def _addresses() -> Iterator[tuple[IPv4Address | IPv6Address, int]]:
    """Every address of the host that others could know, and the length of its network."""
    import netifaces

    for name in netifaces.interfaces():
        try:
            families = netifaces.ifaddresses(name)
        except (OSError, ValueError):
            continue  # it went away in between
        for family in (netifaces.AF_INET, netifaces.AF_INET6):
            for entry in families.get(family, ()):
                try:
                    address = ipaddress.ip_address(entry.get("addr", "").partition("%")[0])
                    # IPv6: "ffff:ffff:ffff:ffff::/64".
                    mask = entry.get("netmask", "")
                    mask = mask.partition("/")[2] or mask
                    length = IPv4Network(f"0.0.0.0/{mask}").prefixlen if address.version == 4 and mask else 64
                except ValueError:
                    continue
                if not address.is_loopback and not address.is_link_local and not address.is_unspecified:
                    yield address, length
