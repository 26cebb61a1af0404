"""The guest that is the host: `[[guest]] address = "host"`.

Theory of operation
-------------------
That guest gets the host's own outward address by DHCP, with the network's length, and the host's router as its own. It
sees the network that the host sees: its neighbors there answer, because the gateway answers for them all (proxy ARP,
core.neighbors), and what it sends them leaves as the host's traffic, as everything does. The host itself it finds at
the gateway's address in the guests' network (192.168.5.2), where any guest finds it. In IPv6, where the host has an
outward address, DHCPv6 gives the guest that one; the router is ours, as for the others.

What a forward delivers then has the destination address that the caller called, and so software in the guest that
looks at it works: a Kubernetes service with an external IP, a server that prints its own address, a license. The host
may have further addresses, and those are the guest's as well, as far as forwards go: one to 198.51.100.2:80 of a guest
with that address leads to this guest, whether it has the address on an interface or, as kube-proxy does, only in rules.

`Addresses.borrowed` is what follows from all this for the stack: the host's addresses, from which this guest alone may
send, and to which callers of its forwards are never said to belong.

The host may change its address while guests run. It is looked at every few seconds; the guest is told when it renews,
and because it renews every few minutes that is soon. Until then its former address goes on to work: what leaves the
host has the host's own address anyway. While the host has no address the guest has one like any other guest's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING

from netstack.config.tables import HOST
from netstack.core.dhcp import OutsideNetwork
from netstack.gateway.settings import static_leases
from netstack.host.outward import Outward, find_outward
from netstack.wire.ethernet import parse_mac

if TYPE_CHECKING:
    from netstack.config import Config
    from netstack.control.log import Log
    from netstack.core.addresses import Addresses
    from netstack.core.lease import StaticLease


class HostGuest:
    """Which guest is the host, if one is, and with which addresses."""

    def __init__(
        self, addresses: Addresses, config: Config, log: Log, forget: Callable[[bytes], None] = lambda address: None
    ) -> None:
        """Looks at the host once, when a guest asks for it. `forget`: of an address, who was known to have it."""
        self._addresses = addresses
        self._config = config
        self._log = log
        self._forget = forget
        self._outward: Outward | None = None
        self._mac: bytes | None = None
        self.macs: set[bytes] = set()  # for the DHCP server, as is:
        self.networks: dict[bytes, OutsideNetwork] = {}
        self.refresh(config)

    def refresh(self, config: Config) -> bool:
        """Look at the settings and at the host anew; whether the static leases are others than before."""
        self._config = config
        macs = [parse_mac(guest.mac) for guest in config.guest if guest.address == HOST]
        mac = macs[0] if macs else None
        try:
            outward = find_outward() if mac is not None else None
        except OSError:  # no descriptors are left: what was seen last still holds
            outward = self._outward
        if (mac, outward) == (self._mac, self._outward):
            return False
        addresses = self._addresses
        if mac != self._mac:
            for address in addresses.borrowed:
                self._forget(address)
            addresses.borrowed.clear()
            self.networks.clear()
            self.macs.clear()
            if mac is not None:
                self.macs.add(mac)
        self._mac = mac
        self._outward = outward
        if outward is not None:
            # Former addresses stay: the guest has one of them until it renews its lease.
            addresses.borrowed.update(address for address in outward.all if not addresses.in_subnet(address))
            if outward.address is None:
                self._log.warning("the host has no address of its own; the guest that is to have it gets another")
            elif outward.router is not None:
                self.networks[outward.address] = OutsideNetwork(outward.prefix_length, outward.router)
                self._log.info(
                    "a guest has the host's address",
                    address=f"{ipaddress.ip_address(outward.address)}/{outward.prefix_length}",
                    router=str(ipaddress.ip_address(outward.router)),
                )
        return True

    def statics(self, config: Config) -> list[StaticLease]:
        """The leases of the settings, with the host's addresses where a guest asks for them."""
        outward = self._outward
        if outward is None:
            return static_leases(config)
        return static_leases(config, outward.address, outward.address6)

    def owner_of(self, address: bytes) -> bytes | None:
        """The MAC of the guest that has this address of the host."""
        return self._mac if address in self._addresses.borrowed else None
