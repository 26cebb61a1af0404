"""Proxies, wired: the host's settings followed, the PAC script run, guests told.

    sources -> ProxyFollower -> ProxyRouter.current -> choose(), for the gateway's proxy
                             -> what guests are told: /proxy.env and /wpad.dat at the gateway, DHCP option 252, the API

With `enabled = false` nothing of the host is read, and guests are told nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import trio

from netstack.control.guest_http import GuestHttp, GuestRequest, GuestResponse
from netstack.dns.local import DOMAIN, HOST_NAMES
from netstack.gateway.proxy_dial import ProxyDialler
from netstack.proxy import handout, wpad
from netstack.proxy.errors import RouteError
from netstack.proxy.follower import ProxyFollower
from netstack.proxy.pac import PacRunner
from netstack.proxy.pac_scripts import PacLibrary, PacScripts
from netstack.proxy.routes import ProxyRouter
from netstack.proxy.settings import ProxyServer, ProxySettings, is_loopback, parse_address
from netstack.proxy.source_settings import settings_layer
from netstack.proxy.sources import EnvironmentSource, FixedSource, Source, system_sources

if TYPE_CHECKING:
    from netstack.config import Config
    from netstack.control.log import Log
    from netstack.core.leases import LeaseTable
    from netstack.core.ports import Events
    from netstack.core.stack import Stack
    from netstack.dns.resolver import Resolver
    from netstack.dns.routes import RoutingTable
    from netstack.gateway.services import AddressServices

ENV_PATH: Final = "/proxy.env"
WPAD_PATH: Final = "/wpad.dat"
_WPAD_TYPE: Final = "application/x-ns-proxy-autoconfig"

# Proxies whose names are looked up, to see whether they are the host's loopback.
_MAX_NAMES: Final = 16


class ProxyState:
    """The host's proxy settings in one network, and what guests are told of them."""

    def __init__(
        self,
        stack: Stack,
        leases: LeaseTable,
        config: Config,
        resolver: Resolver,
        services: AddressServices,
        http: GuestHttp,
        nursery: trio.Nursery,
        events: Events,
        log: Log,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._stack = stack
        self._leases = leases
        self._services = services
        self._http = http
        self._nursery = nursery
        self._events = events
        self._log = log
        self._environment = environment
        self._config = config.proxy
        self._resolver = resolver
        self._following = False
        self._served = False
        self._problems: set[str] = set()
        self._circle = False
        self._local_names: frozenset[str] = frozenset()
        self._system: list[Source] = []
        self.dialler = ProxyDialler(stack, resolver)
        self.scripts = PacLibrary(lambda: PacScripts(self._discover, self._on_script))
        self.runner = PacRunner(self.scripts.get, self._resolve, self._on_pac_problem)
        self.router = ProxyRouter(self.runner, self._is_own)
        self.follower = ProxyFollower(self._sources(), self._on_failure)
        self.follower.subscribe(self._on_settings)
        self._take(self.follower.settings)
        self._apply_handout()

    def start(self) -> None:
        """Begin to follow the host."""
        if not self._config.enabled or self._following:
            return
        self._following = True
        for task in (self.follower.run, self.scripts.run, self.runner.run, self._find_local_names):
            self._nursery.start_soon(task)
        self._report(self.follower.settings, "proxy settings")

    def apply(self, config: Config) -> None:
        """Take what the settings say. `enabled` and the ports of the gateway's proxy are as they were at the start."""
        fixed = {key: getattr(self._config, key) for key in ("enabled", "http_port", "socks_port")}
        was, self._config = self._config, config.proxy.model_copy(update=fixed)
        if self._config != was:
            self.follower.set_sources(self._sources())
            self._take(self.follower.settings)
            self._apply_handout()

    def on_dns_change(self, was: RoutingTable, table: RoutingTable) -> None:
        """The host is on another network, perhaps: what was fetched or out of reach may be another thing there."""
        self.scripts.refresh()
        self.router.forget_failures()

    # ---- what the host says ----------------------------------------------------------------------------------------

    def _sources(self) -> list[Source]:
        config = self._config
        if not config.enabled:
            return []
        sources: list[Source] = []
        for name in dict.fromkeys(config.sources):
            if name == "environment":
                sources.append(EnvironmentSource(self._environment))
            elif name == "settings":
                layer = settings_layer(config.servers(), config.no_proxy, config.pac, discover=config.wpad == "always")
                sources.append(FixedSource(layer))
            else:
                self._system = self._system or system_sources(self._environment)
                sources += self._system
        return sources

    def _on_settings(self, was: ProxySettings, settings: ProxySettings) -> None:
        self._take(settings)
        self._local_names = frozenset()
        if self._following:
            self._report(settings, "proxy settings changed")
            self._nursery.start_soon(self._find_local_names)

    def _take(self, settings: ProxySettings) -> None:
        self.router.current = self._without_ourselves(settings)
        self.router.credentials = self._config.credentials
        self.router.forget_failures()
        found = (settings.pac, *(scoped.pac for _, scoped in settings.domains))
        sources = [source for source in found if source is not None]
        self.scripts.use([source for source in sources if not source.discover or self._config.wpad != "never"])

    def _without_ourselves(self, settings: ProxySettings) -> ProxySettings:
        """The settings without a proxy that is ours: a host's shell may have what is meant for guests."""
        own = self._stack.addresses.own

        def others(server: ProxyServer | None) -> ProxyServer | None:
            address = parse_address(server.host) if server is not None else None
            return None if address is not None and address.packed in own else server

        found = replace(
            settings,
            http=others(settings.http),
            https=others(settings.https),
            all=others(settings.all),
            ftp=others(settings.ftp),
            socks=others(settings.socks),
        )
        self._circle = found != settings
        return found

    def _report(self, settings: ProxySettings, words: str) -> None:
        if settings.source != "none" or words != "proxy settings":
            shown = {
                key: str(value)
                for key in ("http", "https", "all", "pac")
                if (value := getattr(settings, key)) is not None
            }
            self._log.info(words, source=settings.source, **(shown or {"route": "direct"}))
        problems = set(self._list_problems())
        for problem in sorted(problems - self._problems):
            self._log.warning("a proxy setting cannot be used as it is", problem=problem)
        self._problems = problems

    def _list_problems(self) -> list[str]:
        problems = [f"{layer.name}: {words}" for layer in self.follower.layers for words in layer.problems]
        if self._circle:
            problems.append("the host's settings name the gateway's own proxy, which is for guests; it is left out")
        return problems

    def _on_script(self, what: str, words: str) -> None:
        if what == "fetched":
            self._log.info("PAC script in use", script=words)
            source = self.router.current.pac
            if source is not None and self._following:
                self._nursery.start_soon(self.runner.warm, source)
        else:
            self._events.warning("pac fetch", "the PAC script cannot be fetched", problem=words)

    def _on_pac_problem(self, words: str) -> None:
        self._stack.counters.drop("proxy_pac_failed")
        self._events.warning("pac", "the PAC script has no answer; going direct", problem=words)

    def _on_failure(self, error: Exception) -> None:
        self._events.warning("proxy_follow", "internal error: a change of proxies was lost", error=type(error).__name__)

    # ---- names -----------------------------------------------------------------------------------------------------

    async def _discover(self) -> list[str]:
        return await wpad.discover(self._resolver.table.search)

    async def _resolve(self, name: str) -> Sequence[str]:
        """The addresses of a name, for a PAC script, IPv4 first. Untrusted: guests name hosts."""
        try:
            found = await self.dialler.resolve(name)
        except RouteError:
            return ()
        return sorted(found, key=lambda address: ":" in address)

    def _is_own(self, host: str) -> bool:
        """Whether a host is in this network. Untrusted."""
        address = parse_address(host)
        if address is not None:
            # Where a guest may not go nobody goes for it: it is refused when it is dialled.
            return address.packed in self._stack.addresses.own or self._stack.addresses.to_host(address.packed) is None
        name = host.rstrip(".").lower()
        return name in HOST_NAMES or name == DOMAIN or name.endswith("." + DOMAIN)

    async def _find_local_names(self) -> None:
        """Which of the proxies' names are the host's loopback: Debian has the host's own name at 127.0.1.1."""
        settings = self.follower.settings
        servers = (settings.http, settings.https, settings.ftp, settings.all, settings.socks)
        names = {server.host for server in servers if server is not None and parse_address(server.host) is None}
        local = set()
        own = {str(ip_address(packed)) for packed in self._stack.addresses.own}
        for name in sorted(names)[:_MAX_NAMES]:
            found = await self._resolve(name)
            # Our DNS tells of the gateway where the host's own files say loopback.
            if found and all(address in own or handout.is_loopback_by([address]) for address in found):
                local.add(name)
        if settings is self.follower.settings:
            self._local_names = frozenset(local)

    def _is_local(self, host: str) -> bool:
        return is_loopback(host) or host in self._local_names

    # ---- what guests are told --------------------------------------------------------------------------------------

    def _apply_handout(self) -> None:
        config = self._config
        served = config.enabled and config.guests != "none"
        gateway = ip_address(self._stack.addresses.gateway)
        self._services.dhcp.wpad = f"http://{gateway}{WPAD_PATH}" if served and config.announce else ""
        if served and not self._served:
            self._http.register("GET", ENV_PATH, self._serve_env)
            self._http.register("GET", WPAD_PATH, self._serve_wpad)
        elif self._served and not served:
            self._http.unregister(ENV_PATH)
            self._http.unregister(WPAD_PATH)
        self._served = served

    def handout(self, guest: bytes | None = None, *, credentials: bool = False) -> handout.Handout:
        """What a guest is told now; None is any guest."""
        config = self._config
        if not config.enabled:
            return handout.Handout()
        addresses = self._stack.addresses
        network = handout.Network(
            str(ip_address(addresses.gateway)),
            str(addresses.subnet),
            [str(ip_address(one)) for one in (addresses.gateway, addresses.dns, addresses.gateway6, addresses.dns6)],
            (*HOST_NAMES, DOMAIN),
            config.http_port,
        )
        guests = [lease.address for lease in self._leases.live(time.monotonic())]
        if guest is not None:
            guests.insert(0, guest)
        return handout.make_handout(
            config.guests,
            self.router.current,
            network,
            list(dict.fromkeys(str(ip_address(address)) for address in guests)),
            credentials=credentials and config.share_credentials,
            is_local=self._is_local,
        )

    def env(self, form: str) -> str:
        """What `netstack proxy env` prints, without credentials. Raises ValueError, with words for the user."""
        write = handout.FORMATS.get(form)
        if write is None:
            raise ValueError(f"format {form!r}: take one of {', '.join(handout.FORMATS)}")
        return write(self.handout())

    async def _serve_env(self, request: GuestRequest) -> GuestResponse:
        """GET /proxy.env?format=shell. Untrusted."""
        form = parse_qs(request.query, max_num_fields=8).get("format", ["shell"])[0] if request.query else "shell"
        write = handout.FORMATS.get(form)
        await trio.lowlevel.checkpoint()
        if write is None:
            words = f"take one of these: {', '.join(handout.FORMATS)}\n"
            return GuestResponse(400, body=words.encode())
        kind = "application/json" if form in ("json", "docker", "docker-daemon") else "text/plain; charset=utf-8"
        text = write(self.handout(request.guest, credentials=True))
        return GuestResponse(200, kind, text.encode("utf-8", "replace"))

    async def _serve_wpad(self, request: GuestRequest) -> GuestResponse:
        """GET /wpad.dat. Untrusted."""
        await trio.lowlevel.checkpoint()
        told = self.handout(request.guest)
        if not any(map(self.router.may_proxy, ("http", "https", "tcp"))):
            told = handout.Handout()  # nothing would go to a proxy, so that ours would be a way round
        return GuestResponse(200, _WPAD_TYPE, handout.write_pac(told).encode())

    # ---- what is to be seen ----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/proxy` and `netstack proxy show` print. No credentials are in it."""
        config = self._config
        script, runner = self.scripts.find(self.router.current.pac), self.runner
        problems = self._list_problems()
        problems += [f"PAC: {words}" for words in (*self.scripts.problems, runner.problem) if words]
        if config.guests == "literal" and not self._stack.addresses.host_loopback:
            servers = (self.router.current.http, self.router.current.https, self.router.current.all)
            if any(isinstance(server, ProxyServer) and self._is_local(server.host) for server in servers):
                problems.append("guests: the proxy is on the host's loopback, which guests may not reach")
        return {
            "enabled": config.enabled,
            **self.follower.describe(),
            **self.router.describe(),
            "pac": {
                "source": str(self.router.current.pac) if self.router.current.pac is not None else None,
                "script": (script.url or None) if script is not None else None,
                "characters": len(script.script or "") if script is not None else 0,
                "fetches": script.fetches if script is not None else 0,
                "workers": runner.workers,
                **runner.counters,
            },
            "guests": {
                "mode": config.guests,
                "variables": self.handout().variables(),
                "env": f"http://{ip_address(self._stack.addresses.gateway)}{ENV_PATH}" if self._served else None,
                "wpad": self._services.dhcp.wpad or None,
            },
            "problems": problems,
        }

    def counters(self) -> dict[str, int]:
        """For `GET /v1/status` and the metrics."""
        return dict(self.runner.counters)
