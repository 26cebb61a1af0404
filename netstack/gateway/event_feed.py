"""What happens in a network, from where it happens to the log and to those who listen (`control.events`).

The stack tells of flows by the log's `Events`, and asks first whether anybody wants to know, since making the text of
two endpoints costs more than opening a flow's socket: `debug` says yes when the log shows debug lines or somebody
listens to flows. Guests, leases, links and forwards change seldom enough to be told of always.

    guest     {"what": "appeared" | "gone", "mac", "address", "link"}       one for each address
    lease     {"what": "offered" | "bound" | "renewed" | "released" | "declined", "mac", "address", "address6", "name"}
    forward   {"what": "added" | "removed" | ..., and what GET /v1/forwards shows of it}
    flow      {"what": "opened" | "closed", "protocol", "guest", "peer", and when closed: "why", bytes each way}
    link      {"what": "up" | "closed", "link", "why"}
    warning   {"message", and what belongs to it}
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from netstack.control.events import EventHub
from netstack.control.log import Events
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.core.lease import Lease
    from netstack.core.neighbors import Neighbor


class EventFeed:
    """`core.ports.Events`, told to a log and to a hub."""

    def __init__(self, log: Events, hub: EventHub) -> None:
        self._log = log
        self._hub = hub

    @property
    def debug(self) -> bool:
        """Whether anybody wants to know of single flows."""
        return self._hub.wants("flow") or self._log.debug

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None:
        self._log.flow_opened(protocol, guest, peer)
        self._hub.publish("flow", {"what": "opened", "protocol": protocol, "guest": guest, "peer": peer})

    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None:
        self._log.flow_closed(protocol, guest, peer, why, from_guest, to_guest)
        fields = {"protocol": protocol, "guest": guest, "peer": peer, "why": why}
        carried = {"bytes_from_guest": from_guest, "bytes_to_guest": to_guest}
        self._hub.publish("flow", {"what": "closed", **fields, **carried})

    def warning(self, key: str, message: str, **fields: object) -> None:
        if self._log.admit_warning(key, message, **fields):
            self._hub.publish("warning", {"message": message, **{name: str(value) for name, value in fields.items()}})

    def info(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)

    # ---- not of the stack's Events ---------------------------------------------------------------------------------

    def on_neighbor(self, what: str, neighbor: Neighbor) -> None:
        """A guest's address appeared or is gone."""
        if self._hub.wants("guest"):
            where = {"address": str(ip_address(neighbor.address)), "link": neighbor.link.name}
            self._hub.publish("guest", {"what": what, "mac": format_mac(neighbor.mac), **where})

    def on_lease(self, what: str, lease: Lease) -> None:
        """See core.leases.LeaseTable."""
        if self._hub.wants("lease"):
            addresses = {
                "address": str(ip_address(lease.address)),
                "address6": str(ip_address(lease.address6)) if lease.address6 is not None else None,
            }
            self._hub.publish("lease", {"what": what, "mac": format_mac(lease.mac), **addresses, "name": lease.name})

    def on_link(self, what: str, name: str, why: str = "") -> None:
        """A link came up, or was closed."""
        self._hub.publish("link", {"what": what, "link": name, "why": why})

    def on_forward(self, what: str, described: dict[str, Any]) -> None:
        """A forward was added, removed, or changed."""
        self._hub.publish("forward", {"what": what, **described})
