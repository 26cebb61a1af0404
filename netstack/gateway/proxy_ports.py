"""The gateway's proxy, wired into the stack: its ports, what is intercepted, and what is refused for its sake.

    gateway:3128, gateway:1080      always, while `[proxy] enabled`
    anywhere:80, anywhere:443       intercepted while the host's settings have a proxy for http, for https
    UDP anywhere:443                refused while `block_quic` and the host has a proxy for https: browsers take TCP

`update()` is called whenever the host's settings or ours change. What is open stays as it is. With no proxy in
the host's settings a guest's connection costs one look at an empty dict.

The proxy's code, with h11 and ssl, takes 60 ms to import: that is done soon after the start where the host has a proxy,
else for the first connection.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import zlib
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import trio

from netstack.gateway.answered_names import AnsweredNames
from netstack.proxy.routes import ProxyRouter
from netstack.proxy.service import Gate, Guest, ProxyService

if TYPE_CHECKING:
    from netstack.config.proxy import ProxyTable
    from netstack.control.log import Log
    from netstack.core.ports import Events
    from netstack.core.stack import Stack
    from netstack.dns.resolver import Resolver
    from netstack.gateway.names import DnsService
    from netstack.proxy.records import Record
    from netstack.proxy.server import GatewayProxy
    from netstack.proxy.settings import ProxyServer

_QUIC = 443
_WARM_UP_AFTER = 0.5
_FAILURE_LINES = 16


class ProxyPorts:
    """The ports of one network's proxy."""

    def __init__(
        self,
        stack: Stack,
        dns: DnsService,
        router: ProxyRouter,
        nursery: trio.Nursery,
        events: Events,
        log: Log,
        table: ProxyTable,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.names = AnsweredNames(stack.neighbors)
        self._stack = stack
        self._dns = dns
        self._router = router
        self._events = events
        self._log = log
        self._table = table
        self._proxy: GatewayProxy | None = None
        self._gate = Gate()
        self._enabled = table.enabled  # it takes a restart to change that
        self._intercepted: set[int] = set()
        self._nursery = nursery
        self._warm = False

        def service(serve: Any, passes: Callable[[bytes, int], bool] = lambda address, port: False) -> ProxyService:
            return ProxyService(nursery, stack, self._gate, serve, events, self.counters, passes)

        addresses = stack.addresses
        where = (addresses.gateway, addresses.gateway6)
        if table.enabled:
            stack.register_tcp(table.http_port, service(self._serve_http), addresses=where)
            stack.register_tcp(table.socks_port, service(self._serve_socks), addresses=where)
        self._interceptor = service(self._serve_transparent, self._passes)
        self.update()

    def update(self, table: ProxyTable | None = None) -> None:
        """The host's settings are others (`router.current`), or ours: then `table`."""
        if table is not None:
            self._table = table.model_copy(update={"enabled": self._enabled})
        table = self._table
        wanted: set[int] = set()
        if table.enabled and table.transparent:
            if self._router.may_proxy("http"):
                wanted.update(table.transparent_http_ports)
            if self._router.may_proxy("https"):
                wanted.update(table.transparent_https_ports)
        for port in wanted - self._intercepted:
            self._stack.intercept_tcp(port, self._interceptor)
        for port in self._intercepted - wanted:
            self._stack.intercept_tcp(port, None)
        if wanted and not self._warm:
            self._warm = True
            self._nursery.start_soon(self._warm_up)
        self._intercepted = wanted
        self._dns.on_answer = self.names.on_answer if wanted else None
        if not wanted:
            self.names.clear()
        blocks = table.enabled and table.block_quic and self._router.may_proxy("https")
        self._stack.block_udp((_QUIC,) if blocks else ())

    def _passes(self, address: bytes, port: int) -> bool:
        """Whether a connection is left alone whatever its name turns out to be: its address is an exception."""
        return self._router.current.no_proxy.match(str(ip_address(address)), port) is not None

    async def _warm_up(self) -> None:
        """The host has a proxy, so ours will be needed: import it when the network is up."""
        await trio.sleep(_WARM_UP_AFTER)
        with contextlib.suppress(RuntimeError, OSError):  # the system gives no more threads, or descriptors
            await trio.to_thread.run_sync(importlib.import_module, "netstack.proxy.server")

    async def _serve_http(self, guest: Guest) -> None:
        await self._open_proxy().serve_http(guest)

    async def _serve_socks(self, guest: Guest) -> None:
        await self._open_proxy().serve_socks(guest)

    async def _serve_transparent(self, guest: Guest) -> None:
        await self._open_proxy().serve_transparent(guest)

    def _open_proxy(self) -> GatewayProxy:
        if self._proxy is None:
            from netstack.gateway.proxy_dial import ProxyDialler
            from netstack.proxy.server import GatewayProxy
            from netstack.proxy.upstream import Connector

            dialler = ProxyDialler(self._stack, self._resolver)
            connector = Connector(
                self._router.choose,
                dialler.dial,
                dialler.dial_proxy,
                dialler.resolve,
                counters=self.counters,
                on_result=self._on_result,
                # A name that no other proxy has, so that a circle is noticed.
                via=b"1.1 netstack-" + secrets.token_hex(4).encode(),
            )
            self._proxy = GatewayProxy(connector, dialler.dial_address, self.names.find, self.counters)
            self._proxy.records.on_record = self._on_record
        return self._proxy

    @property
    def _resolver(self) -> Resolver:
        return self._dns.resolver

    def _on_result(self, server: ProxyServer, worked: bool) -> None:
        if worked:
            self._router.note_success(server)
        else:
            self._router.note_failure(server)

    def _on_record(self, record: Record) -> None:
        fields: dict[str, Any] = {
            "guest": record.guest,
            "kind": record.kind,
            "method": record.method,
            "host": record.host,
            "port": record.port,
            "route": record.route,
            "status": record.status,
            "ms": round(record.seconds * 1000, 3),
        }
        if record.error:
            # What a guest asks for and does not get. Of alike ones one line in ten seconds; a guest can name any number
            # of hosts, so all that fail in one way make _FAILURE_LINES at most.
            alike = zlib.crc32(record.error.encode("utf-8", "replace")) % _FAILURE_LINES
            self._events.warning(f"proxy {record.status} {alike}", "proxy request failed", **fields, error=record.error)
        elif self._table.log_requests:
            self._log.info("proxy request", **fields)
        else:
            self._log.debug("proxy request", **fields)

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/proxy` shows beside the settings."""
        return {
            "http_port": self._table.http_port if self._table.enabled else None,
            "socks_port": self._table.socks_port if self._table.enabled else None,
            "intercepted_ports": sorted(self._intercepted),
            "blocked_udp_ports": sorted(self._stack.blocked_udp),
            "connections": self._gate.total,
            "counters": dict(sorted(self.counters.items())),
            "requests": self._proxy.records.recent() if self._proxy is not None else [],
        }
