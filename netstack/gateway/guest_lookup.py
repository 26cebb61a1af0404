"""Which address a guest has now: by name, by address, or as the first one. Asked at each connection, so it is cheap.

The first guest is the one with the lowest lease whose machine is here; then whoever has the lowest lease, here or not:
a guest that netstack remembers from its last run is there before it has said a word. Without leases it is the lowest
address that was heard of (guests that need no DHCP), and without that the address that the first guest will get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from netstack.core.addresses import Addresses, is_link_local6
from netstack.core.leases import FIRST_HOST

if TYPE_CHECKING:
    from netstack.core.lease import Lease
    from netstack.core.leases import LeaseTable, StaticLease
    from netstack.core.stack import Stack

# Sorting some hundred leases for each of 5,000 connections a second would be most of the work.
_KEPT: Final = 0.05


class GuestLookup:
    """Finds guests of one network."""

    def __init__(self, stack: Stack, leases: LeaseTable, statics: Callable[[], list[StaticLease]]) -> None:
        """`statics` gives the guests of the settings."""
        self._stack = stack
        self._leases = leases
        self._statics = statics
        self._first: list[bytes] = []
        self._first_at = float("-inf")

    def check(self, guest: str) -> str | None:
        """Why no guest of this network can be meant, or None when one can: names may come later."""
        packed = parse_guest(guest)
        if packed is None or self._addresses.may_be_guest(packed):
            return None
        if packed in self._addresses.own:
            return f"{guest} is the gateway's own address, not a guest's"
        network = self._addresses.subnet if len(packed) == 4 else self._addresses.subnet6
        return f"{guest} is no guest's address in {network}"

    def finder(self, guest: str) -> Callable[[int, float], bytes | None]:
        """find() for one guest, to be called for each of its connections."""
        packed = parse_guest(guest)
        if packed is not None:
            return lambda family, now: packed
        return lambda family, now: self.find(guest, family, now)

    def find(self, guest: str, family: int, now: float) -> bytes | None:
        """The address of this guest, of the family (4 or 6) if it has one; None: nobody has this name now.

        A guest that is named by its address is there for all that is known here: it will be asked.
        """
        if not guest:
            if now - self._first_at > _KEPT:
                self._first_at = now
                self._first = self._find_first(now)
            return _choose(self._first, family)
        packed = parse_guest(guest)
        if packed is not None:
            return packed
        return _choose(self._find_name(guest, now), family)

    def all_of(self, mac: bytes, now: float) -> list[bytes]:
        """Every address of a guest that is known, but link-local ones: leased, or used."""
        lease = self._leases.find_mac(mac)
        found = lease.addresses(now) if lease is not None else []
        for neighbor in self._stack.neighbors.all():
            address = neighbor.address
            if neighbor.mac == mac and address not in found and not (len(address) == 16 and is_link_local6(address)):
                found.append(address)
        return found

    @property
    def _addresses(self) -> Addresses:
        return self._stack.addresses

    def _find_first(self, now: float) -> list[bytes]:
        live = self._leases.live(now)
        if live:
            here = self._stack.switch.where
            return self._of_lease(next((lease for lease in live if here(lease.mac) is not None), live[0]), now)
        heard = sorted(
            (neighbor for neighbor in self._stack.neighbors.all() if self._addresses.may_be_guest(neighbor.address)),
            key=lambda neighbor: (len(neighbor.address), neighbor.address),
        )
        for neighbor in heard:
            found = self.all_of(neighbor.mac, now)
            if found:
                return found
        subnet = self._addresses.subnet
        number = FIRST_HOST if subnet.num_addresses > FIRST_HOST + 1 else 1
        while subnet[number].packed in self._addresses.own:
            number += 1
        return [subnet[number].packed]

    def _find_name(self, name: str, now: float) -> list[bytes]:
        lease = self._leases.find_name(name, now)
        if lease is not None:
            return self._of_lease(lease, now)
        static = next((static for static in self._statics() if static.name == name), None)
        if static is None:
            return []
        # Named by the settings, and without a lease: it has configured itself, or was not here yet.
        found = [address for address in (static.address, static.address6) if address is not None]
        return found or self.all_of(static.mac, now)

    def _of_lease(self, lease: Lease, now: float) -> list[bytes]:
        found = lease.addresses(now)
        # An address that the guest made itself (SLAAC) is looked for only where there is no lease of that family.
        if {len(address) for address in found} != {4, 16}:
            found += [address for address in self.all_of(lease.mac, now) if address not in found]
        return found


def parse_guest(guest: str) -> bytes | None:
    """The address that a guest is named by; None when it is a name."""
    try:
        return ip_address(guest).packed
    except ValueError:
        return None


def _choose(addresses: list[bytes], family: int) -> bytes | None:
    wanted = 4 if family == 4 else 16
    return next(_of_length(addresses, wanted), next(iter(addresses), None))


def _of_length(addresses: list[bytes], length: int) -> Iterator[bytes]:
    return (address for address in addresses if len(address) == length)
