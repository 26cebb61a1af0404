"""One running network: its stack, links and services, and what the API and the library ask of it."""

from __future__ import annotations

import ipaddress
import secrets
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from netstack.config import Config, parse_link_uri
from netstack.control.events import EventHub
from netstack.control.log import Events, Log
from netstack.core import lease_records
from netstack.core.datagrams import DatagramFlow
from netstack.core.leases import Lease, LeaseTable
from netstack.core.ports import Handler
from netstack.core.stack import Stack
from netstack.core.tcp import TcpFlow
from netstack.core.udp_callers import UdpPort
from netstack.gateway.api_view import ApiView
from netstack.gateway.dns_state import DnsView
from netstack.gateway.event_feed import EventFeed
from netstack.gateway.forwards import Forward, Forwards, OnConflict, Source
from netstack.gateway.guest_lookup import GuestLookup
from netstack.gateway.guest_web import serve_guest_http
from netstack.gateway.host_guest import HostGuest
from netstack.gateway.links import Links
from netstack.gateway.names import DnsService
from netstack.gateway.proxy_ports import ProxyPorts
from netstack.gateway.proxy_state import ProxyState
from netstack.gateway.services import AddressServices, build_services, wall_clock
from netstack.gateway.settings import (
    choose_addresses,
    choose_limits,
    choose_ports,
    claim_lease_file,
    open_capture,
    static_leases,
)
from netstack.gateway.status import LISTED_FLOWS, statistics_of
from netstack.host import state, subnets
from netstack.host.capture import Capture
from netstack.host.poller import HostPoller
from netstack.host.sockets import HostSockets
from netstack.vde.attachment import Attachment, StreamListener
from netstack.vde.link import BaseLink, LinkPart
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.gateway.guest_agents import GuestAgents

# How often the host's IPv6 default route is looked for: a small file to read, and guests may be late by that much.
_ROUTE_INTERVAL = 5.0

# Less than the time for which a MAC or an address counts as in use (core.switch, core.neighbors).
_REFRESH_INTERVAL = 20.0

# How long after a change the leases are written: a boot makes several. And when they could not be, until the next try.
_SAVE_DELAY = 0.5
_SAVE_AGAIN = 30.0

# Lines of the log about leases in so many seconds. Guests can make them as fast as they send.
_LEASE_LINES = 50
_LEASE_LINES_INTERVAL = 10.0

# What `reload` can change. The rest is built into the stack, its sockets or its files.
_LIVE_SETTINGS = frozenset(
    (
        "auto_publish.enabled",
        "auto_publish.fallback",
        "auto_publish.max_ports",
        "auto_publish.on_conflict",
        "auto_publish.privileged",
        "auto_publish.rule",
        "dns.encryption",
        "dns.hosts",
        "dns.serve_stale",
        "dns.dns64",
        "dns.lenient_aaaa",
        "dns.rebind_allow",
        "dns.rebind_protection",
        "dns.log_queries",
        "dns.nameservers",
        "dns.resolv_conf",
        "dns.route",
        "dns.search",
        "dns.source",
        "dns.upstreams",
        "guest",
        "limits.dns_queries",
        "limits.dns_queries_per_guest",
        "limits.flows",
        "limits.flows_per_guest",
        "limits.udp_flows_per_guest",
        "log.level",
        "proxy.all",
        "proxy.announce",
        "proxy.credentials",
        "proxy.ftp",
        "proxy.guests",
        "proxy.http",
        "proxy.https",
        "proxy.no_proxy",
        "proxy.pac",
        "proxy.share_credentials",
        "proxy.socks",
        "proxy.sources",
        "proxy.block_quic",
        "proxy.log_requests",
        "proxy.transparent",
        "proxy.transparent_http_ports",
        "proxy.transparent_https_ports",
        "proxy.wpad",
        "publish",
    )
)


class Network:
    """What `open_network` gives. Its methods are called from the trio task that opened it."""

    def __init__(self, config: Config, log_events: Events, log: Log, nursery: trio.Nursery) -> None:
        self.config = config
        self.log = log
        self.hub = EventHub()
        self._events = events = EventFeed(log_events, self.hub)
        self._nursery = nursery
        self.started_at = time.monotonic()
        self.started = datetime.now(UTC)
        self._attachments: list[Attachment] = []
        self._timer_due = trio.Event()
        self._leases_saved = 0
        self._lease_lines = 0
        self._lease_lines_at = -_LEASE_LINES_INTERVAL
        self._closed = False
        self.addresses = choose_addresses(config, log)  # may refuse: before a capture file is made anew
        self.capture = open_capture(config, log)
        self._poller = HostPoller()
        self.stack = Stack(
            self.addresses,
            HostSockets(),
            self._poller,
            limits=choose_limits(config, log),
            events=events,
            secret=secrets.token_bytes(32),
            on_earlier=self._on_earlier,
        )
        self.host_guest = HostGuest(self.addresses, config, log, self.stack.neighbors.forget)
        self.leases = self._make_leases()
        self.services: AddressServices = build_services(
            self.stack, self.leases, mtu=config.network.mtu, search=config.dns.search
        )
        self.services.dhcp.outside = self.host_guest.networks
        self.services.dhcp.moving = self.host_guest.macs
        self.stack.neighbors.owner_of = self._owner_of
        self.stack.neighbors.on_change = events.on_neighbor
        self._links = Links(
            self.stack,
            self._poller,
            log,
            mtu=config.network.mtu,
            capture=self.capture,
            on_link=self.services.on_link,
        )
        self._links.on_change = events.on_link
        self.guests = GuestLookup(self.stack, self.leases, lambda: self.host_guest.statics(self.config))
        self.forwards = Forwards(self.stack, self._poller, self.guests, log, events, max_ports=choose_ports())
        self.forwards.on_change.append(lambda what, forward: events.on_forward(what, forward.describe()))
        self.api = ApiView(self, nursery)
        self.guest_http = serve_guest_http(self.stack, nursery, events)
        self.agents: GuestAgents | None = None
        self.dns = DnsService(self.stack, self.leases, config, nursery, events, self.services.set_search, log)
        self.proxy = ProxyState(
            self.stack,
            self.leases,
            config,
            self.dns.resolver,
            self.services,
            self.guest_http,
            nursery,
            events,
            log,
        )
        self.proxy_ports = ProxyPorts(self.stack, self.dns, self.proxy.router, nursery, events, log, config.proxy)
        self.proxy.follower.subscribe(lambda was, settings: self.proxy_ports.update())
        self.dns.follower.subscribe(self.proxy.on_dns_change)

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve, and attach the links of the settings."""
        self._nursery.start_soon(self._run_poller)
        self._nursery.start_soon(self._run_timers)
        self._nursery.start_soon(self._run_route_watch)
        self._nursery.start_soon(self._run_refresh)
        self.dns.start()
        self.proxy.start()
        if self.capture is not None:
            self.api.capture.run(self.capture)
        if self._lease_claim is not None:
            self._nursery.start_soon(self._run_lease_saver, self._lease_claim.path)
        self.forwards.apply(self.config.publish, strict=True)
        self._apply_auto_publish()
        for link in self.config.link:
            await self.attach(link.uri)
        await trio.lowlevel.checkpoint()  # the tasks have begun when this returns, so that close() ends them in order

    async def attach(self, uri: str) -> Attachment:
        """Make what this link URI stands for, ready for guests when this returns. Raises OSError, ConfigError."""
        spec = parse_link_uri(uri)
        attachment = self._links.make_attachment(spec)
        await attachment.open()
        if spec.scheme == "tcp" and isinstance(attachment, StreamListener):
            # Or a guest could attach once more through the gateway address, as somebody else.
            self.stack.protect_port(int(attachment.address.rpartition(":")[2]))
        self._attachments.append(attachment)
        self._nursery.start_soon(attachment.run)
        return attachment

    async def publish(
        self, spec: str, *, on_conflict: OnConflict = "error", source: Source = "caller", description: str = ""
    ) -> Forward:
        """Forward a port or a socket of the host to a guest, open when this returns. Raises ForwardError."""
        await trio.lowlevel.checkpoint()
        return self.forwards.add(spec, on_conflict=on_conflict, source=source, description=description)

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while True:
            if not self.stack.bytes_in_flight and not self.stack.bytes_for_host:
                return
            await trio.sleep(0.01)

    def close(self) -> None:
        """Reset what is open, close all links and files. The tasks are the nursery's to cancel."""
        if self._closed:
            return
        self._closed = True
        if self.agents is not None:
            self.agents.close()
        now = time.monotonic()
        self.forwards.close()
        self.stack.neighbors.give_up(now)
        for flow in self.stack.flows:
            flow.abort(now, "network closed", tell_guest=True)
        self.stack.flows.drop_lingering()
        self.stack.flush()
        self.stack.udp.close_all(now)
        self.stack.icmp.close_all(now)
        for attachment in self._attachments:
            attachment.close()
        if self.capture is not None:
            self.capture.close()

    def release(self) -> None:
        """Close what the tasks used to the end. Called when they are over."""
        if self._lease_claim is not None:
            try:
                state.write_json(self._lease_claim.path, self._lease_records())
            except OSError as error:
                self._on_unsaved(self._lease_claim.path, error)
            self._lease_claim.release()
        self._poller.close()

    def reload(self, config: Config) -> list[str]:
        """Apply what can be changed while guests are attached; returns the names of settings that need a restart."""
        fixed = [name for name in self.config.changed(config) if name not in _LIVE_SETTINGS]
        self.log.set_level(config.log.level)
        self.host_guest.refresh(config)
        self.leases.set_statics(self.host_guest.statics(config))
        self.dns.apply(config)
        self.proxy.apply(config)
        self.proxy_ports.update(config.proxy)
        limits, wanted = self.stack.limits, choose_limits(config, self.log)
        limits.tcp_flows = wanted.tcp_flows
        limits.tcp_flows_per_guest = wanted.tcp_flows_per_guest
        limits.udp_flows_per_guest = wanted.udp_flows_per_guest
        self.config = self._with_live_settings(config)
        self.forwards.apply(self.config.publish)
        self._apply_auto_publish()
        return fixed

    def _apply_auto_publish(self) -> None:
        """What guests' agents may have; nothing of it is made while it is off."""
        table = self.config.auto_publish
        if self.agents is None:
            if not table.enabled:
                return
            from netstack.gateway.guest_agents import GuestAgents

            self.agents = GuestAgents(self.guest_http, self.forwards, self.stack, self.leases, self.log, self._nursery)
            self._nursery.start_soon(self.agents.run)
        self.agents.apply(table, {static.mac: static.name for static in static_leases(self.config)})

    def _with_live_settings(self, config: Config) -> Config:
        """Our settings with those of `config` that were taken over: the rest is still to be told of next time."""
        update: dict[str, Any] = {}
        for name in _LIVE_SETTINGS:
            table, _, key = name.partition(".")
            fresh = getattr(config, table)
            if key:
                ours = update.get(table, getattr(self.config, table))
                fresh = ours.model_copy(update={key: getattr(fresh, key)})
            update[table] = fresh
        return self.config.model_copy(update=update)

    def protect_port(self, port: int) -> None:
        """Refuse guests this port of the host's loopback."""
        self.stack.protect_port(port)

    # ---- tasks -----------------------------------------------------------------------------------------------------

    async def _run_poller(self) -> None:
        await self._poller.run(self.stack.end_round, self._on_crash)

    async def _run_timers(self) -> None:
        stack = self.stack
        while True:
            deadline = stack.next_deadline()
            self._timer_due = trio.Event()
            # trio's clock is monotonic with an offset of its own, so it is told how long, not until when.
            with trio.move_on_after(max(0.0, deadline - time.monotonic())):
                await self._timer_due.wait()
            now = time.monotonic()
            if stack.next_deadline() <= now:
                try:
                    stack.handle_timers(now)
                except Exception as error:
                    self._report(error, "timer")
                stack.end_round(now)
                await trio.lowlevel.checkpoint()

    async def _run_route_watch(self) -> None:
        """The host's way to the world changes with its networks; guests are told."""
        while True:
            await trio.sleep(_ROUTE_INTERVAL)
            if self.host_guest.refresh(self.config):
                self.leases.set_statics(self.host_guest.statics(self.config))
            self.services.set_router(subnets.has_ipv6_default_route(), time.monotonic())

    async def _run_refresh(self) -> None:
        """Guests in the middle of a transfer are on the fast path, which notes nothing: look at each now and then."""
        while True:
            await trio.sleep(_REFRESH_INTERVAL)
            self.stack.switch.refresh()

    def _on_earlier(self, deadline: float) -> None:
        self._timer_due.set()

    async def _run_lease_saver(self, path: Path) -> None:
        while True:
            await trio.sleep(_SAVE_DELAY)
            version = self.leases.version
            if version == self._leases_saved:
                continue
            records = self._lease_records()
            try:
                # In a thread: a disk may take seconds to say that it has them, and guests do not wait for it.
                await trio.to_thread.run_sync(state.write_json, path, records)
            except (OSError, RuntimeError) as error:  # RuntimeError: the system gives no more threads
                self._on_unsaved(path, error)
                await trio.sleep(_SAVE_AGAIN)
            else:
                self._leases_saved = version

    def _on_crash(self, handler: Handler, error: Exception) -> None:
        """A bug, seen by one flow or link: that one ends."""
        self._report(error, type(handler).__name__)
        now = time.monotonic()
        if isinstance(handler, TcpFlow):
            handler.abort(now, "internal error", tell_guest=True)
        elif isinstance(handler, BaseLink):
            handler.close("internal error")
        elif isinstance(handler, LinkPart):
            handler.link.close("internal error")
        elif isinstance(handler, UdpPort):
            handler.close(now, "internal error")
            handler.forward.done.last_error = "internal error"
        elif isinstance(handler, DatagramFlow):
            handler.table.close(handler, now, "internal error")

    def _report(self, error: Exception, where: str) -> None:
        self.stack.counters.drop("internal_error")
        text = "".join(traceback.format_exception(error))
        self._events.warning(f"crash {where}", "internal error", where=where, traceback=text)

    # ---- leases ----------------------------------------------------------------------------------------------------

    def _make_leases(self) -> LeaseTable:
        addresses = self.addresses
        leases = LeaseTable(
            addresses.subnet.network_address.packed,
            addresses.subnet.prefixlen,
            reserved=(addresses.gateway, addresses.dns),
            prefix6=addresses.subnet6.network_address.packed,
            statics=self.host_guest.statics(self.config),
            is_present=lambda mac: self.stack.switch.where(mac) is not None,
            is_in_use=self._is_in_use,
            on_event=self._on_lease,
        )
        self._lease_claim = claim_lease_file(self.config, addresses, self.log)
        if self._lease_claim is not None:
            self._load_leases(leases, self._lease_claim.path)
        return leases

    def _on_lease(self, what: str, lease: Lease) -> None:
        self._events.on_lease(what, lease)
        if what in ("bound", "declined", "released"):
            now = time.monotonic()
            if now - self._lease_lines_at >= _LEASE_LINES_INTERVAL:
                self._lease_lines_at, self._lease_lines = now, 0
            self._lease_lines += 1
            if self._lease_lines > _LEASE_LINES:
                self._events.warning("lease lines", "too many changes of leases to show them all")
                return
            self.log.info(
                "lease",
                what=what,
                guest=lease.name or format_mac(lease.mac),
                mac=format_mac(lease.mac),
                address=str(ipaddress.ip_address(lease.address)),
            )

    def _is_in_use(self, address: bytes, mac: bytes) -> bool:
        neighbor = self.stack.neighbors.find(address)
        return neighbor is not None and neighbor.mac != mac

    def _owner_of(self, address: bytes) -> bytes | None:
        return self.host_guest.owner_of(address) or self.leases.owner_of(address, time.monotonic())

    def _load_leases(self, leases: LeaseTable, path: Path) -> None:
        def take(data: object) -> None:
            skipped = lease_records.read_leases(leases, data, time.monotonic(), wall_clock())
            if skipped:
                self.log.info("leases left out: unreadable, or not of this network", file=str(path), entries=skipped)

        state.read_json(path, check=take, warn=self.log.warning)
        self._leases_saved = leases.version

    def _lease_records(self) -> object:
        return lease_records.write_leases(self.leases, time.monotonic(), wall_clock())

    def _on_unsaved(self, path: Path, error: Exception) -> None:
        words = getattr(error, "strerror", None) or str(error)
        self._events.warning("leases", "cannot keep the leases", file=str(path), error=words)

    # ---- what is running -------------------------------------------------------------------------------------------

    @property
    def links(self) -> list[BaseLink]:
        """The links that are up."""
        return [link for attachment in self._attachments for link in attachment.links]

    def waiting_uris(self) -> list[str]:
        """The link URIs that have no guest now."""
        return [attachment.uri for attachment in self._attachments if not attachment.links]

    def set_capture(self, capture: Capture | None) -> None:
        """Write what crosses the links there from now on; None: nowhere. The one before is still to be closed."""
        self.capture = capture
        self._links.set_capture(capture, self.links)

    @property
    def dns_view(self) -> DnsView:
        """DNS, as the API shows and changes it."""
        return self.dns.view

    def statistics(self, *, flows: int = LISTED_FLOWS) -> dict[str, Any]:
        """What is running, as plain data that JSON takes: what `GET /v1/status` shows. Of `flows` so many at most."""
        return statistics_of(self, flows)
