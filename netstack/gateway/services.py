"""The gateway's own services, wired into the stack: DHCP, DHCPv6, router and neighbor discovery, SNTP.

The servers are pure (`core.dhcp`, `core.dhcpv6`, `core.ndp`, `core.sntp`); here are the few lines that give them a
datagram and send their answer. What a server announces as the MTU is the smaller of the network's and the link's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from netstack.core.dhcp import DhcpServer
from netstack.core.dhcpv6 import Dhcpv6Server
from netstack.core.leases import LeaseTable
from netstack.core.ndp import NdpMessage, NdpResponder
from netstack.core.ports import Datagram, Link
from netstack.core.sntp import SntpServer
from netstack.core.timers import NEVER
from netstack.host import subnets
from netstack.wire.ipv6 import write_ipv6

if TYPE_CHECKING:
    from netstack.core.ingress import Packet
    from netstack.core.stack import Stack

DHCP_SERVER_PORT = 67
DHCP_CLIENT_PORT = 68
DHCPV6_SERVER_PORT = 547
NTP_PORT = 123

# Guests are NAME.netstack.internal (interface of the gateway's DNS).
DOMAIN = "netstack.internal"

PROTOCOL_ICMP6 = 58
_NDP_HOP_LIMIT = 255  # RFC 4861 6.1.1: proof that it comes from the wire itself


class AddressServices:
    """DHCP, DHCPv6 and discovery for all links of one stack."""

    def __init__(
        self, stack: Stack, dhcp: DhcpServer, dhcpv6: Dhcpv6Server, ndp: NdpResponder, sntp: SntpServer
    ) -> None:
        self.dhcp = dhcp
        self.dhcpv6 = dhcpv6
        self.ndp = ndp
        self.sntp = sntp
        self._stack = stack
        self._mtu = dhcp.mtu
        self.timer_at = self.heap_at = NEVER
        stack.discovery = self
        stack.register_udp(DHCP_SERVER_PORT, self._on_dhcp)
        stack.register_udp(DHCPV6_SERVER_PORT, self._on_dhcpv6)
        stack.register_udp(NTP_PORT, self._on_ntp, addresses=stack.addresses.own)
        ndp.on_neighbor = self._on_neighbor
        ndp.drop = stack.counters.drop

    # ---- DHCP ------------------------------------------------------------------------------------------------------

    def _on_dhcp(self, datagram: Datagram, now: float) -> None:
        stack = self._stack
        link = datagram.link
        server = self.dhcp if link.mtu >= self.dhcp.mtu else replace(self.dhcp, mtu=link.mtu)
        reply = server.answer(datagram.payload, datagram.mac, now, link.name)
        if reply is not None:
            stack.send_udp(
                link,
                reply.dst_mac,
                stack.addresses.gateway,
                DHCP_SERVER_PORT,
                reply.dst_address,
                DHCP_CLIENT_PORT,
                reply.payload,
            )

    def _on_dhcpv6(self, datagram: Datagram, now: float) -> None:
        stack = self._stack
        link = datagram.link
        payload = self.dhcpv6.answer(datagram.payload, datagram.mac, datagram.src, now, link.name)
        if payload is not None:
            stack.send_udp(
                link,
                datagram.mac,
                stack.addresses.link_local,
                DHCPV6_SERVER_PORT,
                datagram.src,
                datagram.src_port,
                payload,
            )

    # ---- discovery -------------------------------------------------------------------------------------------------

    def on_packet(self, link: Link, mac: bytes, packet: Packet, body: bytes, now: float) -> None:
        """Router or neighbor discovery from a guest. Untrusted."""
        self.ndp.mtu = min(self._mtu, link.mtu)
        for message in self.ndp.on_icmp6(packet.src, packet.dst, packet.ttl, body, mac, now):
            self._send(link, message)
        self._rearm(now)

    def solicit(self, address: bytes, link: Link | None) -> None:
        """Who has this IPv6 address?"""
        message = self.ndp.probe(address)
        for one in (link,) if link is not None else tuple(self._stack.switch.links):
            self._send(one, message)

    def on_link(self, link: Link, now: float) -> None:
        """A link came up: announce the router and our addresses on it, and ask for the guests that we remember."""
        for message in self.ndp.advertise_addresses():
            self._send(link, message)
        self.ndp.announce(now)
        self._rearm(now)
        for lease in self.dhcp.leases.live(now):
            self._stack.neighbors.ask(lease.address, link)
            if lease.address6 is not None:
                self._stack.neighbors.ask(lease.address6, link)

    def on_timer(self, now: float) -> None:
        """The periodic advertisement, on every link with the MTU of that link."""
        if self.ndp.on_timer(now):
            for link in tuple(self._stack.switch.links):
                self.ndp.mtu = min(self._mtu, link.mtu)
                self._send(link, self.ndp.advertisement())
        self._rearm(now)

    def _rearm(self, now: float) -> None:
        due = max(self.ndp.due_at, now)
        if due != self.timer_at:
            self._stack.timers.arm(self, due)

    def _send(self, link: Link, message: NdpMessage) -> None:
        head = write_ipv6(message.src, message.dst, PROTOCOL_ICMP6, len(message.body), ttl=_NDP_HOP_LIMIT)
        self._stack.send_ip(link, message.dst_mac, head + message.body)

    def _on_neighbor(self, address: bytes, mac: bytes, now: float) -> None:
        """Discovery proved that this MAC speaks for this address."""
        link = self._stack.switch.where(mac)
        if link is not None:
            self._stack.neighbors.admit(link, mac, address, now)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _on_ntp(self, datagram: Datagram, now: float) -> None:
        payload = self.sntp.answer(datagram.payload)
        if payload is not None:
            self._stack.send_udp(
                datagram.link, datagram.mac, datagram.dst, NTP_PORT, datagram.src, datagram.src_port, payload
            )

    def set_search(self, search: Sequence[str]) -> None:
        """Change the search domains that guests are told: the host's, then our own, in which guests have names.

        Guests hear of it soon by a router advertisement, and by DHCP when they ask again.
        """
        domains = (*(domain for domain in search if domain != DOMAIN), DOMAIN)
        if domains != tuple(self.ndp.search):
            self.dhcp.search = self.dhcpv6.search = domains
            now = time.monotonic()
            self.ndp.set_search(domains, now)
            self._rearm(now)

    def set_router(self, is_router: bool, now: float) -> None:
        """Whether the host has a route to the IPv6 world; guests hear of a change soon."""
        if is_router != self.ndp.is_router:
            self.ndp.is_router = is_router
            self.ndp.announce(now)
            self._rearm(now)


def wall_clock() -> float:
    """Seconds since 1970 by the host's clock: what guests are told, and what a file keeps over a restart."""
    return time.time()


def build_services(stack: Stack, leases: LeaseTable, *, mtu: int, search: Sequence[str]) -> AddressServices:
    """The servers of one network, as its addresses and settings ask for."""
    addresses = stack.addresses
    services = AddressServices(
        stack,
        DhcpServer(
            leases,
            addresses.gateway,
            dns=(addresses.dns,),
            mtu=mtu,
            domain=DOMAIN,
            search=search,
            ntp=(addresses.gateway,),
        ),
        Dhcpv6Server(leases, addresses.mac, dns=(addresses.dns6,), search=search),
        NdpResponder(
            addresses.mac,
            addresses.link_local,
            (addresses.link_local, addresses.gateway6, addresses.dns6),
            addresses.subnet6.network_address.packed,
            random.random,
            mtu=mtu,
            dns=(addresses.dns6,),
            search=search,
            is_router=subnets.has_ipv6_default_route(),
        ),
        SntpServer(wall_clock),
    )
    services.set_search(search)
    return services
