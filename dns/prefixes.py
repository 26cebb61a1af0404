"""Address prefixes that mean something to a resolver: those of private networks, and those of NAT64s."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address, IPv6Network

# RFC 6052 2.2: the lengths a prefix may have.
LENGTHS = (32, 40, 48, 56, 64, 96)
# RFC 6890's: this network, private, shared (Tailscale's, too), loopback, link-local; unspecified, unique local.
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 255.255.255.255/32 "
        "::/128 ::1/128 fc00::/7 fe80::/10 fec0::/10".split(),
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_private(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is one of somebody's own network, also where it stands within an IPv6 address."""
    if address.version == 6:
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = IPv4Address(address.packed[12:])
        address = inner or address
    return any(address.version == network.version and address in network for network in _PRIVATE)


def parse_prefix(text: str) -> IPv6Network:
    """The prefix of a NAT64. Raises ValueError with words for the user."""
    try:
        prefix = IPv6Network(text)
    except ValueError:
        raise ValueError("must be an IPv6 prefix such as 64:ff9b::/96") from None
    if prefix.prefixlen not in LENGTHS or prefix.network_address.packed[8]:
        raise ValueError(f"must have one of the lengths {', '.join(map(str, LENGTHS))} (RFC 6052 2.2)")
    return prefix
