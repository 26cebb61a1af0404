"""DNS for guests, wired into the stack: the front (`dns.server`), our own names, the host's nameservers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from netstack.config import Config, split_nameserver
from netstack.core.leases import LeaseTable
from netstack.core.ports import Datagram, Events, HostSocket, TcpServiceCall
from netstack.core.stack import Stack
from netstack.dns.local import HOST_NAMES, LocalNames
from netstack.dns.resolvconf import HostNameservers, Nameserver, ResolvConf
from netstack.dns.server import PORT, DnsServer, RelayResolver
from netstack.dns.upstream import Upstream
from netstack.gateway.services import DOMAIN

if TYPE_CHECKING:
    from netstack.core.stack import TcpService

# Connections to one TCP service that may be open or opening.
_CONNECTIONS = 1024


class StreamService:
    """A TCP service: each connection of a guest is one end of a socketpair, so that TCP has no second code path."""

    def __init__(self, nursery: trio.Nursery, serve: Callable[[trio.abc.Stream, TcpServiceCall], object]) -> None:
        self._nursery = nursery
        self._serve = serve
        self._open = 0

    def open(self, call: TcpServiceCall) -> HostSocket | None:
        """The flow's end; a task reads the other one."""
        if self._open >= _CONNECTIONS:
            return None
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            return None
        theirs.setblocking(False)
        self._open += 1
        self._nursery.start_soon(self._run, ours, call)
        return theirs

    async def _run(self, ours: socket.socket, call: TcpServiceCall) -> None:
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            await self._serve(stream, call)  # type: ignore[misc]
        finally:
            ours.close()
            self._open -= 1


class DnsService:
    """The gateway's DNS at port 53 of its DNS and gateway addresses, UDP and TCP."""

    def __init__(
        self,
        stack: Stack,
        leases: LeaseTable,
        config: Config,
        nursery: trio.Nursery,
        events: Events,
        on_search: Callable[[Sequence[str]], None],
    ) -> None:
        """`on_search` is told the host's search domains whenever they change."""
        addresses = stack.addresses
        self._stack = stack
        self._leases = leases
        self._configured: tuple[Nameserver, ...] = ()
        self._search: Sequence[str] = ()
        self._on_search = on_search
        self.host = HostNameservers(Path(config.dns.resolv_conf), addresses.own, time.monotonic, self._on_change)
        both = (addresses.gateway, addresses.gateway6)
        local = LocalNames(
            DOMAIN,
            dict.fromkeys(HOST_NAMES, both),
            (addresses.subnet, addresses.subnet6),
            self._find_guest,
            self._find_name,
        )
        self.server = DnsServer(RelayResolver(local, Upstream(self._nameservers)), nursery, self._reply, events=events)
        where = (addresses.dns, addresses.gateway, addresses.dns6, addresses.gateway6, addresses.link_local)
        stack.register_udp(PORT, self.server.on_datagram, addresses=where)
        service: TcpService = StreamService(nursery, lambda stream, call: self.server.serve_stream(stream, call.link))
        stack.register_tcp(PORT, service, addresses=where)
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Take nameservers and search domains from the settings; where they name none, from the host."""
        named = (Nameserver(*split_nameserver(text)) for text in config.dns.nameservers)
        # Asking ourselves would go round for ever.
        self._configured = tuple(server for server in named if server.packed() not in self._stack.addresses.own)
        self._search = config.dns.search
        self._on_search(self._search or self.host.current().search)

    def follow(self) -> None:
        """Look whether the host's settings changed, though no guest asks: their search domains are in DHCP and RA."""
        self.host.current()

    def _nameservers(self) -> Sequence[Nameserver]:
        return self._configured or self.host.current().nameservers

    def _on_change(self, found: ResolvConf) -> None:
        if not self._search:
            self._on_search(found.search)

    def _reply(self, datagram: Datagram, answer: bytes) -> None:
        link = datagram.link
        self._stack.send_udp(
            link, datagram.mac, datagram.dst, datagram.dst_port, datagram.src, datagram.src_port, answer
        )
        link.flush()  # not within a round of the poller, perhaps

    def _find_guest(self, label: str) -> Sequence[bytes] | None:
        now = time.monotonic()
        lease = self._leases.find_name(label, now)
        return lease.addresses(now) if lease is not None else None

    def _find_name(self, address: bytes) -> str | None:
        now = time.monotonic()
        lease = self._leases.find_address(address)
        return lease.name or None if lease is not None and address in lease.addresses(now) else None
