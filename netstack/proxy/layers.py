"""What each source says about proxies, and what holds when all of them are put together.

Theory of operation. A source gives a `Layer`: for each kind of traffic a proxy, or None for "explicitly none" (a
variable that is set and empty), or nothing. Layers are ranked, and for each scheme the first one that says anything
wins:

    in a layer, for http         PAC, else http, else all, else socks
    in a layer, for https        PAC, else https, else all, else socks
    in a layer, for all else     PAC, else all, else socks

So a variable `https_proxy` leaves what a desktop says about http as it is, while `all_proxy` replaces all of it.
Exceptions come from the first layer that has a list, but never from one that ranks below the PAC script in use: a
list that goes with other proxies is not meant for it (macOS ignores it too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from netstack.proxy.exceptions import NO_EXCEPTIONS, NoProxy
from netstack.proxy.settings import (
    PacSource,
    ProxyServer,
    ProxySettings,
    ProxySyntaxError,
    Scheme,
    parse_server,
)

# Which keys of a layer speak for a scheme, the first one that is there.
KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "http": ("http", "all", "socks"),
    "https": ("https", "all", "socks"),
    "tcp": ("all", "socks"),
    "ftp": ("ftp", "all", "socks"),
}

_MAX_DOMAINS: Final = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says. `servers` has keys http, https, ftp, socks and all; None there means explicitly none."""

    name: str
    why: str = ""  # where it was found: a file, a program
    servers: Mapping[str, ProxyServer | None] = field(default_factory=dict)
    no_proxy: NoProxy | None = None
    pac: PacSource | None = None
    domains: tuple[tuple[str, Layer], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def says_something(self) -> bool:
        """Whether it changes anything."""
        return bool(self.servers or self.no_proxy is not None or self.pac is not None or self.domains)

    def answers(self, scheme: str) -> bool:
        """Whether it has a say in where this scheme goes."""
        return self.pac is not None or any(key in self.servers for key in KEYS[scheme])

    def server_for(self, scheme: str) -> ProxyServer | None:
        """The proxy for this scheme; None is direct."""
        for key in KEYS[scheme]:
            if key in self.servers:
                return self.servers[key]
        return None

    def describe(self) -> dict[str, Any]:
        """As plain data, without credentials."""
        return {
            "name": self.name,
            "why": self.why,
            "servers": {key: str(server) if server else "direct" for key, server in self.servers.items()},
            "no_proxy": None if self.no_proxy is None else list(self.no_proxy.entries),
            "pac": None if self.pac is None else str(self.pac),
            "domains": {domain: layer.describe() for domain, layer in self.domains},
            "problems": list(self.problems),
        }


@dataclass(frozen=True, slots=True)
class Merged:
    """What holds, and which layer each part of it came from."""

    settings: ProxySettings
    won: Mapping[str, str]


def merge(layers: Sequence[Layer]) -> Merged:
    """Put layers together, the highest rank first."""
    won: dict[str, str] = {}
    servers: dict[str, ProxyServer | None] = {}
    pac: PacSource | None = None
    pac_rank = len(layers)
    schemes: set[str] = set()
    for scheme in KEYS:
        for rank, layer in enumerate(layers):
            if not layer.answers(scheme):
                continue
            won[scheme] = layer.name
            if layer.pac is None:
                servers[scheme] = layer.server_for(scheme)
            else:
                # A script decides all schemes that no higher layer does, so there is one at most.
                pac, pac_rank = layer.pac, rank
                schemes.add(scheme)
            break
    no_proxy = NO_EXCEPTIONS
    for layer in layers[: pac_rank + 1]:
        if layer.no_proxy is not None:
            no_proxy, won["no_proxy"] = layer.no_proxy, layer.name
            break
    if pac is not None:
        won["pac"] = layers[pac_rank].name
    socks = next((server for layer in layers if (server := layer.servers.get("socks")) is not None), None)
    domains: tuple[tuple[str, Layer], ...] = ()
    for rank, layer in enumerate(layers):
        # A VPN's proxies for its own names; what ranks above them stands above them here as well.
        if layer.domains:
            domains, above = layer.domains[:_MAX_DOMAINS], layers[:rank]
            won["domains"] = layer.name
            break
    else:
        above = ()
    settings = ProxySettings(
        http=servers.get("http"),
        https=servers.get("https"),
        socks=socks,
        all=servers.get("tcp"),
        ftp=servers.get("ftp"),
        no_proxy=no_proxy,
        pac=pac,
        source=", ".join(dict.fromkeys(won[key] for key in ("http", "https", "tcp") if key in won)) or "none",
        pac_schemes=frozenset(schemes),
        domains=tuple((domain, merge((*above, replace(layer, domains=()))).settings) for domain, layer in domains),
    )
    return Merged(settings, won)


class LayerWriter:
    """Collects what a source says, with words for what could not be read. No words quote a value."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        self.servers: dict[str, ProxyServer | None] = {}
        self.no_proxy: NoProxy | None = None
        self.pac: PacSource | None = None
        self.domains: list[tuple[str, Layer]] = []
        self.problems: list[str] = []

    def server(self, key: str, text: str, where: str, default: Scheme = "http", port: int | None = None) -> None:
        """A proxy for `key`; an empty text means none. `where` is what a user would call it."""
        if not text.strip():
            self.servers[key] = None
            return
        try:
            server = self.servers[key] = parse_server(text, default, port)
        except ProxySyntaxError as error:
            self.problems.append(f"{where} {error}")
        else:
            if server.problem:
                # It stands nevertheless: requests fail and say why, rather than go direct.
                self.problems.append(f"{where} {server.problem}")

    def layer(self) -> Layer:
        """All of it."""
        return Layer(
            self.name,
            self.why,
            self.servers,
            self.no_proxy,
            self.pac,
            tuple(self.domains),
            tuple(self.problems[:16]),
        )
