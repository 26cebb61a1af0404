"""Which guest is at which address: ARP and neighbor discovery (RFC 826, RFC 4861), and who may use an address.

A neighbor is learnt from ARP, from neighbor discovery, from its lease, and from the first packet of a flow. What the
leases say is stronger than what guests say: an address that is leased to one MAC cannot be used by another. Addresses
that nobody leased go to whoever spoke for them last, after the one before was silent for a while.

Host-side opening (forwards) asks with `resolve`, which sends ARP requests or neighbor solicitations on all links until
somebody answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from netstack.core.addresses import BROADCAST4, Addresses
from netstack.core.ports import Link
from netstack.core.timers import NEVER
from netstack.wire import arp
from netstack.wire.arp import Arp, write_arp
from netstack.wire.ethernet import BROADCAST, ETHERTYPE_ARP

if TYPE_CHECKING:
    from netstack.core.stack import Stack

# A MAC that has been silent for so long loses an address that was never leased (Linux: gc_stale_time, 60 s).
_STALE = 60.0

# RFC 1122 2.3.2.1: at most one ARP request a second for one address; RFC 4861 10: MAX_UNICAST_SOLICIT 3, RETRANS_TIMER
# 1 s.
_ASK_INTERVAL = 1.0
_ASKS = 4

# How many addresses may be asked for at once.
_RESOLUTIONS = 256

# Until a guest shows that it takes more, it is taken for an interface of Ethernet's default MTU.
DEFAULT_MTU = 1500


class Neighbor:
    """One guest's address."""

    __slots__ = ("address", "link", "mac", "mtu", "seen_at")

    def __init__(self, address: bytes, mac: bytes, link: Link, now: float) -> None:
        self.address = address
        self.mac = mac
        self.link = link
        self.seen_at = now
        self.mtu = DEFAULT_MTU  # the largest IP packet it is known to take; grows from evidence (its MSS, its packets)


Resolved = Callable[[Neighbor | None, float], None]


class _Resolution:
    """One address that is being asked for."""

    __slots__ = ("address", "asks", "heap_at", "neighbors", "timer_at", "waiting")

    def __init__(self, neighbors: Neighbors, address: bytes) -> None:
        self.neighbors = neighbors
        self.address = address
        self.asks = 0
        self.waiting: list[Resolved] = []
        self.timer_at = self.heap_at = NEVER

    def on_timer(self, now: float) -> None:
        self.neighbors.ask_again(self, now)


class Neighbors:
    """address -> Neighbor, bounded."""

    def __init__(self, stack: Stack, addresses: Addresses, limit: int) -> None:
        self._stack = stack
        self._addresses = addresses
        self._limit = limit
        self._table: dict[bytes, Neighbor] = {}
        self._of_link: dict[Link, dict[bytes, None]] = {}  # the addresses behind each link, the newest last
        self._resolutions: dict[bytes, _Resolution] = {}
        # Says whose lease an address is (a MAC), or None. Set by the gateway.
        self.owner_of: Callable[[bytes], bytes | None] = lambda address: None
        # Told of each address that "appeared" or is "gone". Set by the gateway; a guest decides how often it is called.
        self.on_change: Callable[[str, Neighbor], None] = lambda what, neighbor: None

    def __iter__(self) -> Iterable[Neighbor]:
        return iter(list(self._table.values()))

    def find(self, address: bytes) -> Neighbor | None:
        return self._table.get(address)

    def all(self) -> list[Neighbor]:
        """Everybody known."""
        return list(self._table.values())

    def mtu_of(self, address: bytes) -> int:
        """The largest IP packet that this guest is known to take."""
        neighbor = self._table.get(address)
        return neighbor.mtu if neighbor is not None else DEFAULT_MTU

    def forget_link(self, link: Link) -> None:
        """The link is gone; its guests may come back on another."""
        for address in self._of_link.pop(link, ()):
            self.on_change("gone", self._table.pop(address))

    def forget(self, address: bytes) -> None:
        """Nobody is known to have this address any more."""
        neighbor = self._table.get(address)
        if neighbor is not None:
            self._forget(neighbor)

    def admit(self, link: Link, mac: bytes, address: bytes, now: float) -> Neighbor | None:
        """The neighbor that may send from this address: this MAC on this link. None when it is another's. Untrusted."""
        neighbor = self._table.get(address)
        if neighbor is not None and neighbor.mac == mac and neighbor.link is link:
            neighbor.seen_at = now
            return neighbor
        if not self._addresses.may_be_guest(address):
            return None
        owner = self.owner_of(address)
        if owner is not None:
            if owner != mac:
                return None
        elif neighbor is not None and neighbor.mac != mac and now - neighbor.seen_at < _STALE:
            return None
        return self.learn(link, mac, address, now)

    def learn(self, link: Link, mac: bytes, address: bytes, now: float) -> Neighbor:
        """Store it, as the newest. When the table is full, the link with most addresses loses its oldest."""
        old = self._table.get(address)
        if old is not None:
            self._forget(old)
        elif len(self._table) >= self._limit:
            most = max(self._of_link.values(), key=len)
            self._forget(self._table[next(iter(most))])
        neighbor = Neighbor(address, mac, link, now)
        if old is not None and old.mac == mac:
            neighbor.mtu = old.mtu
        self._table[address] = neighbor
        self._of_link.setdefault(link, {})[address] = None
        self.on_change("appeared", neighbor)
        resolution = self._resolutions.pop(address, None)
        if resolution is not None:
            self._stack.timers.cancel(resolution)
            for resolved in resolution.waiting:
                resolved(neighbor, now)
        return neighbor

    def _forget(self, neighbor: Neighbor) -> None:
        del self._table[neighbor.address]
        addresses = self._of_link[neighbor.link]
        del addresses[neighbor.address]
        if not addresses:
            del self._of_link[neighbor.link]
        self.on_change("gone", neighbor)

    # ---- ARP -------------------------------------------------------------------------------------------------------

    def on_arp(self, link: Link, mac: bytes, buffer: memoryview, start: int, end: int, now: float) -> None:
        """An ARP packet (RFC 826). Untrusted."""
        packet = arp.parse_arp(buffer, start, end)
        if packet is None:
            self._stack.counters.drop("arp_malformed")
            return
        if packet.sender_mac != mac:
            self._stack.counters.drop("arp_sender_mismatch")
            return
        if (
            packet.sender_address != bytes(4)
            and self.admit(link, mac, packet.sender_address, now) is None
            and packet.sender_address not in self._addresses.own
        ):
            self._stack.counters.drop("arp_not_its_address")
            return
        if packet.operation == arp.REQUEST and (
            packet.target_address in self._addresses.own
            or self._is_proxied(packet.sender_address, packet.target_address)
        ):
            # Also answers a probe for the gateway's own address (RFC 5227 2.1.1): the guest learns of the conflict.
            self._send_arp(
                link,
                mac,
                Arp(arp.REPLY, self._addresses.mac, packet.target_address, mac, packet.sender_address),
            )

    def _is_proxied(self, sender: bytes, target: bytes) -> bool:
        """Whether we answer for `target` as a proxy (RFC 1027).

        To the guest that has the host's address, all the host's network is on its link. Not for addresses of guests,
        nor for its own, of which it asks whether others have them.
        """
        addresses = self._addresses
        return sender in addresses.borrowed and target not in addresses.borrowed and not addresses.in_subnet(target)

    def announce(self, link: Link) -> None:
        """Gratuitous ARP for the gateway's addresses (RFC 5227 3): a guest that knew another gateway learns ours."""
        for address in (self._addresses.gateway, self._addresses.dns):
            self._send_arp(link, BROADCAST, Arp(arp.REQUEST, self._addresses.mac, address, bytes(6), address))

    def ask(self, address: bytes, link: Link | None = None) -> None:
        """Who has this address? On one link, or on all."""
        if len(address) == 16:
            self._stack.solicit(address, link)
            return
        request = Arp(arp.REQUEST, self._addresses.mac, self._addresses.gateway, bytes(6), address)
        for one in (link,) if link is not None else tuple(self._stack.switch.links):
            self._send_arp(one, BROADCAST, request)

    def _send_arp(self, link: Link, dst_mac: bytes, packet: Arp) -> None:
        self._stack.send_frame(link, dst_mac, ETHERTYPE_ARP, write_arp(*packet))

    # ---- resolution ------------------------------------------------------------------------------------------------

    def current(self, address: bytes, now: float) -> Neighbor | None:
        """Who is known to be at this address, for what the host sends there by itself: see forwards.

        The owner of an address of the host's need not have it on an interface, as rules may do with less: then it does
        not answer for it, nor say so when it moves. Where its owner is, there the address is.
        """
        neighbor = self._table.get(address)
        if address in self._addresses.borrowed:
            owner = self.owner_of(address)
            link = self._stack.switch.where(owner) if owner is not None else None
            if (
                owner is not None
                and link is not None
                and (neighbor is None or neighbor.mac != owner or neighbor.link is not link)
            ):
                return self.learn(link, owner, address, now)
        return neighbor

    def resolve(self, address: bytes, resolved: Resolved, now: float) -> None:
        """Call resolved(neighbor, now) at once or when it is known; with None when nobody answers for some seconds."""
        neighbor = self.current(address, now)
        if neighbor is not None:
            resolved(neighbor, now)
            return
        resolution = self._resolutions.get(address)
        if resolution is None:
            if (
                len(self._resolutions) >= _RESOLUTIONS
                or address == BROADCAST4
                or not (address in self._addresses.borrowed or self._addresses.in_subnet(address))
            ):
                resolved(None, now)
                return
            resolution = self._resolutions[address] = _Resolution(self, address)
            resolution.waiting.append(resolved)
            self.ask_again(resolution, now)
        else:
            resolution.waiting.append(resolved)

    def give_up(self, now: float) -> None:
        """The stack ends: whoever waits for an answer hears that there is none."""
        resolutions, self._resolutions = self._resolutions, {}
        for resolution in resolutions.values():
            self._stack.timers.cancel(resolution)
            for resolved in resolution.waiting:
                resolved(None, now)

    def ask_again(self, resolution: _Resolution, now: float) -> None:
        """A second went by without an answer."""
        if resolution.asks >= _ASKS:
            self._resolutions.pop(resolution.address, None)
            for resolved in resolution.waiting:
                resolved(None, now)
            return
        resolution.asks += 1
        self._stack.timers.arm(resolution, now + _ASK_INTERVAL)
        self.ask(resolution.address)
