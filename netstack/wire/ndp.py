"""Neighbor discovery for IPv6 (RFC 4861), the ICMPv6 messages that guests and a router exchange about each other.

    router solicitation      133, code, checksum 2, reserved 4, options
    router advertisement     134, code, checksum 2, hop limit 1, flags 1 (M 0x80, O 0x40), router lifetime 2 (s),
                             reachable time 4 (ms), retransmission timer 4 (ms), options
    neighbor solicitation    135, code, checksum 2, reserved 4, target 16, options
    neighbor advertisement   136, code, checksum 2, flags 1 (router 0x80, solicited 0x40, override 0x20), reserved 3,
                             target 16, options

An option is a type, a length in units of 8 bytes with both of these bytes counted, and data. A length of 0 would hold a
reader up for ever: RFC 4861 4.6 has the whole message thrown away.

The readers check what RFC 4861 6.1 and 7.1 demand, but for the hop limit of 255, which is in the IPv6 header and the
caller's to check. Redirects (137) are for hosts; a router has no use for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, pseudo_sum, sum_words
from netstack.wire.domains import write_domains
from netstack.wire.ipv6 import PROTOCOL_ICMPV6, UNSPECIFIED

ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOR_SOLICITATION = 135
NEIGHBOR_ADVERTISEMENT = 136

# RFC 4861 4: what comes with another hop limit crossed a router, and is a forgery.
HOP_LIMIT = 255

ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
ALL_ROUTERS = bytes.fromhex("ff020000000000000000000000000002")

_SOURCE_MAC = 1  # RFC 4861 4.6.1
_TARGET_MAC = 2
_PREFIX = 3  # 4.6.2
_MTU = 5  # 4.6.4
_RDNSS = 25  # RFC 8106 5.1
_DNSSL = 31  # RFC 8106 5.2

_ADVERTISEMENT = Struct("!BBHBBHII")
_NEIGHBOR = Struct("!BBHI16s")
# type, length, prefix length, flags (L 0x80 on-link, A 0x40 autonomous), valid and preferred lifetime (s), reserved,
# prefix
_PREFIX_OPTION = Struct("!BBBBIII16s")
# type, length, reserved, and a lifetime (s) or the MTU
_LONG_OPTION = Struct("!BBHI")

# 64 KiB of options are 8,190 at most; no honest message has more than a dozen.
_MAX_OPTIONS = 64

_HEAD = 8
_NEIGHBOR_HEAD = 24


class RouterSolicitation(NamedTuple):
    """A guest asks for routers. The MAC is what the guest says of itself, None when it does not."""

    source_mac: bytes | None


class NeighborSolicitation(NamedTuple):
    """A guest asks who has the target, or whether anybody has."""

    target: bytes
    source_mac: bytes | None


class NeighborAdvertisement(NamedTuple):
    """A guest says that it has the target."""

    target: bytes
    router: bool
    solicited: bool
    override: bool
    target_mac: bytes | None


class Prefix(NamedTuple):
    """A prefix to announce: always on-link and autonomous. Lifetimes in seconds."""

    prefix: bytes
    prefix_length: int
    valid: int
    preferred: int


def solicited_node(address: bytes) -> bytes:
    """Give the multicast group in which the owner of this address listens for solicitations (RFC 4291 2.7.1)."""
    return bytes.fromhex("ff0200000000000000000001ff") + address[13:]


def parse_router_solicitation(buffer: Buffer, start: int, end: int, *, src: bytes) -> RouterSolicitation | None:
    """Untrusted. None unless RFC 4861 6.1.1 holds."""
    options = _parse_options(buffer, start + _HEAD, end)
    if end - start < _HEAD or buffer[start] != ROUTER_SOLICITATION or buffer[start + 1] != 0 or options is None:
        return None
    source_mac = options.get(_SOURCE_MAC)
    if src == UNSPECIFIED and source_mac is not None:
        return None
    return RouterSolicitation(source_mac)


def parse_neighbor_solicitation(
    buffer: Buffer, start: int, end: int, *, src: bytes, dst: bytes
) -> NeighborSolicitation | None:
    """Untrusted. None unless RFC 4861 7.1.1 holds."""
    options = _parse_options(buffer, start + _NEIGHBOR_HEAD, end)
    if end - start < _NEIGHBOR_HEAD or options is None:
        return None
    kind, code, _, _, target = _NEIGHBOR.unpack_from(buffer, start)
    if kind != NEIGHBOR_SOLICITATION or code != 0 or target[0] == 0xFF:
        return None
    source_mac = options.get(_SOURCE_MAC)
    # From the unspecified address it is a guest's duplicate address detection (RFC 4862 5.4.2).
    if src == UNSPECIFIED and (source_mac is not None or dst != solicited_node(target)):
        return None
    return NeighborSolicitation(target, source_mac)


def parse_neighbor_advertisement(buffer: Buffer, start: int, end: int, *, dst: bytes) -> NeighborAdvertisement | None:
    """Untrusted. None unless RFC 4861 7.1.2 holds."""
    options = _parse_options(buffer, start + _NEIGHBOR_HEAD, end)
    if end - start < _NEIGHBOR_HEAD or options is None:
        return None
    kind, code, _, flags, target = _NEIGHBOR.unpack_from(buffer, start)
    if kind != NEIGHBOR_ADVERTISEMENT or code != 0 or target[0] == 0xFF:
        return None
    router, solicited, override = (bool(flags & bit << 24) for bit in (0x80, 0x40, 0x20))
    if dst[0] == 0xFF and solicited:
        return None
    return NeighborAdvertisement(target, router, solicited, override, options.get(_TARGET_MAC))


def _parse_options(buffer: Buffer, position: int, end: int) -> dict[int, bytes] | None:
    """The link-layer addresses among the options, the first of each type. Untrusted: None when they do not add up.

    What is no Ethernet address counts as no option. Options of other types are skipped (RFC 4861 4.6).
    """
    found: dict[int, bytes] = {}
    count = 0
    while position < end:
        count += 1
        size = buffer[position + 1] * 8 if position + 1 < end else 0
        if size == 0 or position + size > end or count > _MAX_OPTIONS:
            return None
        kind = buffer[position]
        if kind in (_SOURCE_MAC, _TARGET_MAC) and size == 8:
            mac = bytes(buffer[position + 2 : position + 8])
            # A group address, or none, is nobody's own.
            if not mac[0] & 1 and mac != bytes(6):
                found.setdefault(kind, mac)
        position += size
    return found


def write_router_advertisement(
    src: bytes,
    dst: bytes,
    *,
    source_mac: bytes,
    lifetime: int,
    managed: bool = False,
    other: bool = False,
    hop_limit: int = 64,
    mtu: int | None = None,
    prefixes: Sequence[Prefix] = (),
    dns: Sequence[bytes] = (),
    search: Sequence[str] = (),
    dns_lifetime: int = 0,
    withdrawn: Sequence[str] = (),
) -> bytes:
    """A router advertisement with its checksum. Lifetimes are in seconds; `lifetime` 0 says "no default router".

    `dns_lifetime` holds for the servers and for the search list; the domains `withdrawn` are to be forgotten.
    """
    flags = (0x80 if managed else 0) | (0x40 if other else 0)
    parts = [
        # Reachable time and retransmission timer 0: the guest's own defaults (RFC 4861 4.2).
        _ADVERTISEMENT.pack(ROUTER_ADVERTISEMENT, 0, 0, hop_limit, flags, lifetime, 0, 0),
        bytes((_SOURCE_MAC, 1)) + source_mac,
    ]
    if mtu is not None:
        parts.append(_LONG_OPTION.pack(_MTU, 1, 0, mtu))
    for prefix, length, valid, preferred in prefixes:
        parts.append(_PREFIX_OPTION.pack(_PREFIX, 4, length, 0xC0, valid, preferred, 0, prefix))
    if dns:
        parts.append(_LONG_OPTION.pack(_RDNSS, 1 + 2 * len(dns), 0, dns_lifetime) + b"".join(dns))
    for domains, seconds in ((search, dns_lifetime), (withdrawn, 0)):
        names = write_domains(domains)
        # The length has to fit into a byte: 2,032 bytes of names. A list longer than that is not announced at all.
        if 0 < len(names) <= 254 * 8:
            names += bytes(-len(names) % 8)
            parts.append(_LONG_OPTION.pack(_DNSSL, 1 + len(names) // 8, 0, seconds) + names)
    return _finished(src, dst, b"".join(parts))


def write_neighbor_solicitation(src: bytes, dst: bytes, target: bytes, *, source_mac: bytes) -> bytes:
    """A question for the owner of `target`, with its checksum."""
    head = _NEIGHBOR.pack(NEIGHBOR_SOLICITATION, 0, 0, 0, target)
    return _finished(src, dst, head + bytes((_SOURCE_MAC, 1)) + source_mac)


def write_neighbor_advertisement(
    src: bytes, dst: bytes, target: bytes, *, target_mac: bytes, solicited: bool, override: bool = True
) -> bytes:
    """A router's statement that `target` is at `target_mac`, with its checksum."""
    flags = 0x80 | (0x40 if solicited else 0) | (0x20 if override else 0)
    head = _NEIGHBOR.pack(NEIGHBOR_ADVERTISEMENT, 0, 0, flags << 24, target)
    return _finished(src, dst, head + bytes((_TARGET_MAC, 1)) + target_mac)


def _finished(src: bytes, dst: bytes, message: bytes) -> bytes:
    """The message with its checksum filled in (RFC 4443 2.3)."""
    total = pseudo_sum(src, dst, PROTOCOL_ICMPV6, len(message)) + sum_words(message)
    return message[:2] + finish(total).to_bytes(2, "big") + message[4:]
