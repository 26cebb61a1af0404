"""The proxy that guests see: its ports, and what serves a connection to each.

    gateway:3128   HTTP and CONNECT (`session`)
    gateway:1080   SOCKS 5 (`socks`)
    anywhere:80, anywhere:443   while the host has a proxy for them, and guests' programs need not know (`transparent`)

It has no settings of its own: which way a request goes is asked of `choose` each time, so that it holds at once when
the host's settings change. Connections are dialled by what it is given, which knows the network's addresses, its DNS
and what guests may not reach.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address

from netstack.proxy.records import Records
from netstack.proxy.service import Guest
from netstack.proxy.session import Session
from netstack.proxy.socks import serve_socks
from netstack.proxy.transparent import Hellos, Interception, NameOf
from netstack.proxy.upstream import Connector, Dial


class GatewayProxy:
    """All ports of the proxy. `dial_address` reaches an address as a guest's own connection would."""

    def __init__(
        self,
        connector: Connector,
        dial_address: Dial,
        name_of: NameOf = lambda guest, address: None,
        counters: Counter[str] | None = None,
    ) -> None:
        """`counters`: what happened to requests and connections, if they are to be kept by somebody else."""
        self.connector = connector
        self.records = Records(connector.counters if counters is None else counters)
        self._dial_address = dial_address
        self._name_of = name_of
        self._hellos = Hellos()

    async def serve_http(self, guest: Guest) -> None:
        """A connection to the HTTP port. Untrusted."""
        await Session(guest, self.connector, self.records).run()

    async def serve_socks(self, guest: Guest) -> None:
        """A connection to the SOCKS port. Untrusted."""
        await serve_socks(guest, self.connector, self.records)

    async def serve_transparent(self, guest: Guest) -> None:
        """A connection on its way to the world. Untrusted."""
        host = str(ip_address(guest.call.address))
        await Interception(
            guest, self.connector, self.records, self._dial_address, self._name_of, self._hellos, host
        ).run()
