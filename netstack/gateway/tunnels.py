"""Connections into guests that come from no socket of a caller's own: the API's tunnels.

To the guest they come from the gateway's address of its family, and from any port that is free.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from netstack.control.tunnels import UnknownGuestError
from netstack.gateway.services import DOMAIN

if TYPE_CHECKING:
    from netstack.core.tcp import TcpFlow
    from netstack.gateway.network import Network


def open_guest(network: Network, sock: socket.socket, guest: str, port: int, on_opened: Callable[[int], None]) -> None:
    """See control.tunnels.GuestOpener."""
    stack = network.stack
    address = find_guest(network, guest)

    def opened(flow: TcpFlow | None, error: int) -> None:
        on_opened(error)

    peer = stack.addresses.router_for(address)
    stack.open_to_guest(sock, address, port, peer, 0, opened, time.monotonic())
    stack.flush()


def find_guest(network: Network, text: str) -> bytes:
    """The address of a guest: by name, by address, or "" for the first one. Raises UnknownGuestError."""
    guests = network.forwards.guests
    guest = text.strip("[]").lower().removesuffix(".").removesuffix(f".{DOMAIN}")
    if "%" in guest:
        raise UnknownGuestError(f"{text} names an interface of the host; leave that out of a guest's address")
    problem = guests.check(guest) if guest else None
    if problem is not None:
        raise UnknownGuestError(problem)
    address = guests.find(guest, 4, time.monotonic())
    if address is None:
        raise UnknownGuestError(f"there is no guest {text!r} now: see netstack leases")
    return address
