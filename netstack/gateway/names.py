"""DNS for guests, wired into the stack: the front (`dns.server`), our own names, the host's nameservers."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from netstack.config import Config
from netstack.control.log import Log
from netstack.core.leases import LeaseTable
from netstack.core.ports import Datagram, Events, HostSocket, TcpServiceCall
from netstack.core.stack import Stack
from netstack.dns.dns64 import Dns64
from netstack.dns.follower import Follower
from netstack.dns.mdns_guests import GROUPS, GuestMdns
from netstack.dns.mdns_sockets import PORT as MDNS_PORT
from netstack.dns.mnemonics import rcode_name, type_name
from netstack.dns.prefixes import parse_prefix
from netstack.dns.query_log import Logged, format_guest
from netstack.dns.resolver import Resolver
from netstack.dns.routes import RoutingTable, format_name
from netstack.dns.server import PORT, DnsServer
from netstack.dns.source_auto import HostSource
from netstack.dns.source_settings import user_scopes
from netstack.dns.upstream import Upstream
from netstack.dns.upstream_system import System
from netstack.gateway.dns_state import DnsView
from netstack.gateway.local_names import LocalData
from netstack.gateway.settings import choose_dns_sockets

if TYPE_CHECKING:
    from netstack.core.stack import TcpService

# Routes of the log of queries that do not lead to a server.
_OURSELVES = frozenset(("local", "mdns", "alias", ""))

# Connections to one TCP service that may be open or opening.
_CONNECTIONS = 1024


class StreamService:
    """A TCP service: each connection of a guest is one end of a socketpair, so that TCP has no second code path."""

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: Callable[[trio.SocketStream, TcpServiceCall], Awaitable[None]],
        events: Events,
    ) -> None:
        self._nursery = nursery
        self._serve = serve
        self._events = events
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
            await self._serve(stream, call)
        except Exception as error:
            # One connection's bug must not end the network of all guests.
            self._events.warning("tcp_service", "internal error: a TCP connection was lost", error=repr(error))
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
        log: Log,
    ) -> None:
        """`on_search` is told the search domains for guests whenever they change; `log` gets queries, where asked."""
        addresses = stack.addresses
        self._stack = stack
        self._nursery = nursery
        self._on_search = on_search
        self._log = log
        self._following = False
        self._host = (config.dns.source, config.dns.resolv_conf)
        self.source = HostSource(*self._host)
        self.follower = Follower(
            self.source,
            addresses.own,
            lambda error: events.warning("dns_follow", "internal error: a change of DNS was lost", error=repr(error)),
        )
        self.local = LocalData(addresses, leases, config, nursery, events, lambda: self.follower.table)
        self.resolver = Resolver(
            Upstream(nursery, system=System() if config.dns.fallback == "system" else None, poller=stack.poller),
            (self.local,),
            table=self.follower.table,
            mdns=self.local.mdns,
            aliases=self.local.names,
            events=events,
        )
        self.resolver.upstream.datagrams.max_sockets = choose_dns_sockets()
        # Until a query has gone to a server there is no circle, and nothing is sent on our own account.
        self.resolver.guard.enabled = False
        self.resolver.local_version = lambda: self.local.version
        self._logs_queries = False
        self._answering: object = None
        """The settings that make what the cache has wrong when they change."""
        self.on_answer: Callable[[Datagram, bytes], None] | None = None
        """Told of every answer by UDP before it goes to a guest, where anybody wants to know."""
        self.resolver.queries.on_query = self._on_query
        self.follower.subscribe(self._on_table)
        self.server = DnsServer(self.resolver, nursery, self._reply, flush=lambda link: link.flush(), events=events)
        where = (addresses.dns, addresses.gateway, addresses.dns6, addresses.gateway6, addresses.link_local)
        stack.register_udp(PORT, self.server.on_datagram, addresses=where, quick=self._answer_again)
        service: TcpService = StreamService(nursery, self._serve_stream, events)
        stack.register_tcp(PORT, service, addresses=where)
        self.guest_mdns = GuestMdns(self.local.mdns, nursery, self._send_mdns)
        stack.register_udp(MDNS_PORT, self.guest_mdns.on_datagram, addresses=GROUPS)
        self.view = DnsView(self)
        self.apply(config)

    def start(self) -> None:
        """Begin to follow the host's settings and files."""
        self._following = True
        self._nursery.start_soon(self.follower.run)
        self._nursery.start_soon(self.local.run)

    def apply(self, config: Config) -> None:
        """Take what the settings say."""
        dns = config.dns
        if (dns.source, dns.resolv_conf) != self._host:
            self._host = (dns.source, dns.resolv_conf)
            self.source = HostSource(*self._host)
            self.follower.set_source(self.source)
        routes = ((route.domains, route.upstreams, route.interface) for route in dns.route)
        opportunistic = dns.encryption == "opportunistic"
        upstreams = (*dns.upstreams, *dns.nameservers)
        self.follower.set_user_scopes(user_scopes(upstreams, routes, dns.search, opportunistic=opportunistic))
        self.local.apply(config)
        self.resolver.cache.max_stale = float(dns.serve_stale)
        self.resolver.wording.lenient_aaaa = dns.lenient_aaaa
        self.resolver.flights.rebind.configure(dns.rebind_protection, dns.rebind_allow)
        self.resolver.dns64 = Dns64(parse_prefix(dns.dns64)) if dns.dns64 is not None else None
        answering = (dns.rebind_protection, dns.rebind_allow, dns.dns64)
        if answering != self._answering:
            self._answering = answering
            self.resolver.flush()
        limits = config.limits
        self.server.queries.of_all, self.server.queries.of_each = limits.dns_queries, limits.dns_queries_per_guest
        self._logs_queries = dns.log_queries
        if self.resolver.guard.enabled:
            self.resolver.queries.on_query = self._log_query if dns.log_queries else None
        self._on_search(self.follower.table.search)

    def _on_table(self, was: RoutingTable, table: RoutingTable) -> None:
        self.resolver.set_table(table)
        self.local.mdns.flush()
        if self._following and was.describe() != table.describe():
            servers = ", ".join(map(str, table.servers()[:8])) or "none"
            self._log.info("DNS upstreams changed", source=self.source.why, servers=servers)
        if table.search != was.search:
            self._on_search(table.search)

    async def _serve_stream(self, stream: trio.abc.Stream, call: TcpServiceCall) -> None:
        await self.server.serve_stream(stream, call.link, call.guest)

    def _reply(self, datagram: Datagram, answer: bytes) -> None:
        if self.on_answer is not None:
            self.on_answer(datagram, answer)
        self._stack.send_udp(
            datagram.link, datagram.mac, datagram.dst, datagram.dst_port, datagram.src, datagram.src_port, answer
        )

    def _answer_again(self, wire: bytes, guest: bytes) -> bytes | None:
        """The stack's short way, which tells nobody of an answer: not while somebody wants to know. Untrusted."""
        return self.server.answer_again(wire, guest) if self.on_answer is None else None

    def _send_mdns(self, datagram: Datagram, answer: bytes, to_group: bool) -> None:
        addresses = self._stack.addresses
        is_ipv4 = len(datagram.src) == 4
        src = addresses.gateway if is_ipv4 else addresses.link_local
        dst = GROUPS[not is_ipv4] if to_group else datagram.src
        # To the group, but in a frame for the one guest that asked.
        self._stack.send_udp(datagram.link, datagram.mac, src, MDNS_PORT, dst, datagram.src_port, answer, ttl=255)
        datagram.link.flush()

    def _on_query(self, query: Logged) -> None:
        """The first queries, until one has gone to a server."""
        if query.route not in _OURSELVES:
            self.resolver.start()
            self.resolver.queries.on_query = self._log_query if self._logs_queries else None
        if self._logs_queries:
            self._log_query(query)

    def _log_query(self, query: Logged) -> None:
        self._log.info(
            "DNS query",
            guest=format_guest(query.guest),
            name=format_name(query.name),
            type=type_name(query.type),
            rcode=rcode_name(query.rcode),
            route=query.route,
            cached=query.cached,
            ms=round(query.seconds * 1000, 3),
        )
