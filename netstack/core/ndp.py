"""The gateway as an IPv6 router and neighbor: router advertisements, and neighbor discovery for its own addresses.

Theory of operation
-------------------
Router advertisements go to all guests, on every link: three of them at most 16 s apart when there is news (a guest's
link came up, the host found or lost its IPv6 route), then one every 200 to 600 s (RFC 4861 6.2.1, 6.2.4). A
solicitation is answered to the address that it came from, at once: the random delay of RFC 4861 6.2.6 keeps several
routers from speaking at the same moment, and here is one. A guest that solicits before it has an address can only be
answered to all, by the timer; that is done once in 3 s at most (MIN_DELAY_BETWEEN_RAS), later ones are put off until
then.

Guests make themselves an address from the prefix and ask DHCPv6 for another (flags A, M and O). When the host has no
route to the IPv6 world the router's lifetime is 0: guests keep their addresses, reach each other and the gateway, and
do not try IPv6 for anything else, which would cost them a timeout for each connection (RFC 8305 is not everywhere).

Everything here takes and gives the bodies of ICMPv6 messages. The caller checks that the IPv6 packet is for us, sends
what it gets with hop limit 255, and calls on_timer when `due_at` has come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from netstack.wire.ethernet import multicast_mac
from netstack.wire.ipv6 import UNSPECIFIED
from netstack.wire.ndp import (
    ALL_NODES,
    HOP_LIMIT,
    NEIGHBOR_ADVERTISEMENT,
    NEIGHBOR_SOLICITATION,
    ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION,
    Prefix,
    parse_neighbor_advertisement,
    parse_neighbor_solicitation,
    parse_router_solicitation,
    solicited_node,
    write_neighbor_advertisement,
    write_neighbor_solicitation,
    write_router_advertisement,
)

# RFC 4861 6.2.1 and 10, in seconds.
MAX_INTERVAL = 600.0
MIN_INTERVAL = 200.0
MAX_INITIAL_INTERVAL = 16.0
MAX_INITIAL = 3
MIN_DELAY_BETWEEN_RAS = 3.0

# RFC 4861 6.2.1 (AdvDefaultLifetime) and RFC 8106 5.1: three times the longest interval, so that one lost
# advertisement changes nothing.
ROUTER_LIFETIME = 1800
DNS_LIFETIME = 1800

# A day and four hours, not the month and the week of RFC 4861 6.2.1: when netstack comes back with another prefix,
# guests should stop using the old one soon (RFC 9096 1).
PREFIX_VALID = 86400
PREFIX_PREFERRED = 14400

NDP_TYPES = frozenset((ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, NEIGHBOR_SOLICITATION, NEIGHBOR_ADVERTISEMENT))


class NdpMessage(NamedTuple):
    """An ICMPv6 message to send: the body, complete with its checksum, in an IPv6 packet with hop limit 255."""

    src: bytes
    dst: bytes
    dst_mac: bytes
    body: bytes


@dataclass(slots=True)
class NdpResponder:
    """Answers for the gateway's IPv6 addresses, and announces it as the router.

    mac and link_local are the gateway's; addresses are all that it answers for, link_local among them. random gives
    numbers of [0, 1). on_neighbor(address, mac, now) is told what messages from guests prove about them; it must not
    raise. The settings may be changed at any time; call announce() after that.
    """

    mac: bytes
    link_local: bytes
    addresses: Collection[bytes]
    prefix: bytes
    random: Callable[[], float]
    mtu: int | None = None
    dns: Sequence[bytes] = ()
    search: Sequence[str] = ()
    is_router: bool = True
    """Whether the host has a route to the IPv6 world."""
    managed: bool = True
    """Whether there is a DHCPv6 server to get addresses from."""
    on_neighbor: Callable[[bytes, bytes, float], None] | None = None
    drop: Callable[[str], None] = lambda reason: None
    due_at: float = float("-inf")
    """When the next advertisement to all guests is due: the first one at once."""
    _initial_left: int = field(init=False, default=MAX_INITIAL)
    _last_multicast_at: float = field(init=False, default=float("-inf"))
    _withdrawn: tuple[str, ...] = field(init=False, default=())

    def on_icmp6(
        self, src: bytes, dst: bytes, hop_limit: int, body: bytes | memoryview, mac: bytes, now: float
    ) -> list[NdpMessage]:
        """Take an ICMPv6 message of a guest, of one of NDP_TYPES, and give the answers. Untrusted."""
        # RFC 4861 6.1, 7.1.
        if hop_limit != HOP_LIMIT:
            self.drop("ndp_hop_limit")
            return []
        if src[0] == 0xFF:
            self.drop("ndp_malformed")
            return []
        kind = body[0] if len(body) else 0
        if kind == ROUTER_SOLICITATION:
            return self._on_router_solicitation(src, body, mac, now)
        if kind == NEIGHBOR_SOLICITATION:
            return self._on_neighbor_solicitation(src, dst, body, mac, now)
        if kind == NEIGHBOR_ADVERTISEMENT:
            advertised = parse_neighbor_advertisement(body, 0, len(body), dst=dst)
            # The target's own MAC stands in the option, and it is the sender of the frame: a guest speaks for itself.
            if advertised is None or advertised.target in self.addresses or advertised.target_mac not in (None, mac):
                self.drop("ndp_malformed")
            else:
                self._learn(advertised.target, mac, now)
            return []
        # A guest that announces itself as a router is for other guests to believe or not. The rest is not ours.
        self.drop("ndp_router_advertisement" if kind == ROUTER_ADVERTISEMENT else "ndp_malformed")
        return []

    def on_timer(self, now: float) -> list[NdpMessage]:
        """Give the advertisement to all guests, on every link, that is due at `due_at`; nothing before that."""
        if now < self.due_at:
            return []
        self._last_multicast_at = now
        wait = MIN_INTERVAL + (MAX_INTERVAL - MIN_INTERVAL) * self.random()
        if self._initial_left > 0:
            self._initial_left -= 1
            wait = min(wait, MAX_INITIAL_INTERVAL)
        else:
            self._withdrawn = ()
        self.due_at = now + wait
        return [self.advertisement()]

    def advertisement(self) -> NdpMessage:
        """Give the advertisement to all guests as the settings are now."""
        return self._advertise(ALL_NODES, multicast_mac(ALL_NODES))

    def set_search(self, search: Sequence[str], now: float) -> None:
        """Announce other search domains. Those that are gone are told with a lifetime of 0 (RFC 8106 5.2).

        That is as often as any news is: guests would otherwise keep them for half an hour.
        """
        left = (*self._withdrawn, *self.search)
        self._withdrawn = tuple(dict.fromkeys(name for name in left if name not in search))
        self.search = tuple(search)
        self.announce(now)

    def announce(self, now: float) -> None:
        """Make the news known to all guests soon: settings changed, or a link came up."""
        self._initial_left = MAX_INITIAL
        self._hurry(now)

    def advertise_addresses(self) -> list[NdpMessage]:
        """Give unsolicited advertisements of all our addresses: guests may know another MAC (RFC 4861 7.2.6)."""
        return [
            self._claim(address, ALL_NODES, multicast_mac(ALL_NODES), solicited=False) for address in self.addresses
        ]

    def probe(self, target: bytes, mac: bytes | None = None) -> NdpMessage:
        """Ask who has this address; or the guest at this MAC whether it still has it (RFC 4861 7.3.3)."""
        group = solicited_node(target)
        dst, dst_mac = (group, multicast_mac(group)) if mac is None else (target, mac)
        body = write_neighbor_solicitation(self.link_local, dst, target, source_mac=self.mac)
        return NdpMessage(self.link_local, dst, dst_mac, body)

    def _on_router_solicitation(self, src: bytes, body: bytes | memoryview, mac: bytes, now: float) -> list[NdpMessage]:
        solicitation = parse_router_solicitation(body, 0, len(body), src=src)
        if solicitation is None or src in self.addresses or solicitation.source_mac not in (None, mac):
            self.drop("ndp_malformed")
            return []
        if src == UNSPECIFIED:
            # What is returned goes to this guest's link alone: one that solicits all the time would otherwise use up
            # the advertisements of all the others.
            self._hurry(now)
            return []
        self._learn(src, mac, now)
        return [self._advertise(src, mac)]

    def _on_neighbor_solicitation(
        self, src: bytes, dst: bytes, body: bytes | memoryview, mac: bytes, now: float
    ) -> list[NdpMessage]:
        solicitation = parse_neighbor_solicitation(body, 0, len(body), src=src, dst=dst)
        if solicitation is None or src in self.addresses or solicitation.source_mac not in (None, mac):
            self.drop("ndp_malformed")
            return []
        if src != UNSPECIFIED:
            self._learn(src, mac, now)
        if solicitation.target not in self.addresses:
            return []
        if src == UNSPECIFIED:
            # A guest is about to take our address: told to all, it gives up (RFC 4861 7.2.4, RFC 4862 5.4.4).
            return [self._claim(solicitation.target, ALL_NODES, multicast_mac(ALL_NODES), solicited=False)]
        return [self._claim(solicitation.target, src, mac, solicited=True)]

    def _learn(self, address: bytes, mac: bytes, now: float) -> None:
        if self.on_neighbor is not None:
            self.on_neighbor(address, mac, now)

    def _hurry(self, now: float) -> None:
        """Have the next advertisement to all guests go out as soon as the rate limit allows."""
        self.due_at = min(self.due_at, max(now, self._last_multicast_at + MIN_DELAY_BETWEEN_RAS))

    def _advertise(self, dst: bytes, dst_mac: bytes) -> NdpMessage:
        body = write_router_advertisement(
            self.link_local,
            dst,
            source_mac=self.mac,
            lifetime=ROUTER_LIFETIME if self.is_router else 0,
            managed=self.managed,
            other=True,
            mtu=self.mtu,
            prefixes=(Prefix(self.prefix, 64, PREFIX_VALID, PREFIX_PREFERRED),),
            dns=self.dns,
            search=self.search,
            dns_lifetime=DNS_LIFETIME,
            withdrawn=self._withdrawn,
        )
        return NdpMessage(self.link_local, dst, dst_mac, body)

    def _claim(self, target: bytes, dst: bytes, dst_mac: bytes, *, solicited: bool) -> NdpMessage:
        body = write_neighbor_advertisement(target, dst, target, target_mac=self.mac, solicited=solicited)
        return NdpMessage(target, dst, dst_mac, body)
