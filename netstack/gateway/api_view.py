"""A network as its HTTP API shows and changes it: the one object behind the protocols of `netstack.control`.

Made with the network, because the state of gvproxy's API is the network's: it is the same over each of the API's
sockets.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from netstack.control.tunnels import UnknownGuestError
from netstack.gateway.capture_control import CaptureControl
from netstack.gateway.status import list_flows, list_guests, list_leases
from netstack.gateway.tunnels import find_guest, open_guest

if TYPE_CHECKING:
    import trio

    from netstack.control.events import EventHub
    from netstack.gateway.dns_state import DnsView
    from netstack.gateway.forwards import Forwards
    from netstack.gateway.gvproxy_view import GvproxyView
    from netstack.gateway.network import Network


class ApiView:
    """`control.api.ApiSource`."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self._network = network
        self.capture = CaptureControl(network, nursery)
        self._gvproxy: GvproxyView | None = None

    def statistics(self) -> dict[str, Any]:
        """Everything."""
        return self._network.statistics()

    def summary(self) -> dict[str, Any]:
        """Everything but the list of flows, which may be long: what events of the kind `status` show."""
        state = self._network.statistics(flows=0)
        del state["flows"]["list"]
        return state

    @property
    def hub(self) -> EventHub:
        """Who listens."""
        return self._network.hub

    @property
    def dns_view(self) -> DnsView:
        """DNS."""
        return self._network.dns_view

    @property
    def forwards(self) -> Forwards:
        """The forwards."""
        return self._network.forwards

    @property
    def gvproxy(self) -> GvproxyView:
        """What gvproxy's API has beyond that."""
        if self._gvproxy is None:
            from netstack.gateway.gvproxy_view import GvproxyView

            self._gvproxy = GvproxyView(self._network)
        return self._gvproxy

    def guests(self) -> list[dict[str, Any]]:
        """Who is here."""
        return list_guests(self._network, time.monotonic())

    def lease_list(self) -> list[dict[str, Any]]:
        """The addresses that were given out."""
        return list_leases(self._network, time.monotonic())

    def flows(self, protocol: str | None, guest: str | None, limit: int) -> dict[str, Any]:
        """Open flows, of one protocol and of one guest by name or address where asked."""
        network = self._network
        guests = None if guest is None else _addresses_of(network, guest)
        protocols = (protocol,) if protocol is not None else ("tcp", "udp", "icmp")
        listed = list_flows(network, time.monotonic(), protocols=protocols, guests=guests, limit=limit)
        stack = network.stack
        count = {
            "tcp": len(stack.flows),
            "udp": len(stack.udp) + len(stack.udp_forwards),
            "icmp": len(stack.icmp.pings),
        }
        return {**count, "limit": stack.limits.tcp_flows, "list": listed}

    def proxy(self) -> Mapping[str, Any] | None:
        """What the host's proxy settings say."""
        return self._network.proxy.describe() | {"server": self._network.proxy_ports.describe()}

    def proxy_env(self, form: str) -> str:
        """What guests are told of them, in a program's form. Raises ValueError."""
        return self._network.proxy.env(form)

    def open_guest(self, sock: socket.socket, guest: str, port: int, on_opened: Callable[[int], None]) -> None:
        """See control.tunnels.GuestOpener."""
        open_guest(self._network, sock, guest, port, on_opened)


def _addresses_of(network: Network, guest: str) -> set[bytes]:
    """All addresses of a guest by name, or the one by which it is called; none of one that is not here."""
    try:
        address = find_guest(network, guest)
    except UnknownGuestError:
        return set()
    neighbor = network.stack.neighbors.find(address)
    if neighbor is None or guest.strip("[]") == str(ip_address(address)):
        return {address}
    return {address, *network.forwards.guests.all_of(neighbor.mac, time.monotonic())}
