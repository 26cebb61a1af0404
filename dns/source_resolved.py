"""systemd-resolved, over D-Bus (org.freedesktop.resolve1(5)): one scope for each link with servers, one for the rest.

    Manager DNSEx     a(iiayqs)  link (0: global), family, address, port (0: 53), name for TLS
    Manager Domains   a(isb)     link, domain ("." for all), whether it is for routing only
    Link DefaultRoute b          whether the link takes names that nobody claims; worked out by resolved where unset
    Link ScopesMask   t          bit 0: it is used for unicast DNS at all
    FallbackDNSEx                asked when no link and nobody has set any server

This is what the host's own programs get, split DNS included; /run/systemd/resolve/resolv.conf is not: it leaves out
links that are no default route and servers with a port. Where resolved encrypts (DNSOverTLS=yes) or validates
(DNSSEC=yes), asking its servers behind its back would undo the owner's policy: `policy` says so, and `source_auto` asks
the stub.

Changes: setting a link's servers emits a signal, setting its domains or its default route does not (the properties say
EmitsChangedSignal=false), so that everything is read on any signal and polled besides.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from netstack.dns.dbus import BusSource, Service
from netstack.dns.routes import FALLBACK_RANK, ROOT, Scope, Server

NAME = "org.freedesktop.resolve1"
_MANAGER = ("/org/freedesktop/resolve1", "org.freedesktop.resolve1.Manager")
_LINK_INTERFACE = "org.freedesktop.resolve1.Link"

STUB = Server("127.0.0.53")

# More links with DNS settings than anybody has; a bound for the time that one reading takes.
_MAX_LINKS = 64

_UNICAST_DNS = 1  # SD_RESOLVED_DNS in ScopesMask


class Resolved(NamedTuple):
    """What resolved says."""

    scopes: tuple[Scope, ...]
    policy: str = ""
    """Why its servers must not be asked directly, or empty: "DNSOverTLS=yes on tun0"."""
    stub: bool = True
    """Whether its stub listens at 127.0.0.53."""
    mode: str = ""
    """What /etc/resolv.conf is to it: stub, static, uplink (its own files), foreign (its input), missing."""


def link_path(ifindex: int) -> str:
    """The object of a link: sd_bus_path_encode(3) escapes a leading digit as _ and its hexadecimal code."""
    digits = str(ifindex)
    return f"/org/freedesktop/resolve1/link/_{ord(digits[0]):02x}{digits[1:]}"


def links_of(manager: Mapping[str, Any]) -> list[int]:
    """The links for which the manager names servers or domains."""
    found = {entry[0] for name in ("DNSEx", "DNS", "Domains") for entry in manager.get(name) or ()}
    return sorted(ifindex for ifindex in found if ifindex > 0)[:_MAX_LINKS]


def parse_resolved(
    manager: Mapping[str, Any], links: Mapping[int, Mapping[str, Any]], names: Mapping[int, str]
) -> Resolved:
    """Make scopes of the properties of the manager and of its links. `names` are the interfaces by index."""
    servers: dict[int, list[Server]] = {}
    for entry in manager.get("DNSEx") or manager.get("DNS") or ():  # DNSEx since 246
        ifindex, _, packed, *rest = entry
        server = _server(packed, *rest, interface=names.get(ifindex, ""))
        if server is not None:
            servers.setdefault(ifindex, []).append(server)
    domains: dict[int, list[tuple[str, bool]]] = {}
    for ifindex, domain, route_only in manager.get("Domains") or ():
        domains.setdefault(ifindex, []).append((domain or ROOT, route_only))
    scopes = []
    for ifindex in sorted({0, *servers, *domains}):
        link = links.get(ifindex, {})
        if ifindex and (ifindex not in names or not link):
            continue  # it went away while we were reading
        usable = not ifindex or bool(link.get("ScopesMask", _UNICAST_DNS) & _UNICAST_DNS)
        scopes.append(
            Scope(
                f"resolved:{names[ifindex]}" if ifindex else "resolved:global",
                tuple(servers.get(ifindex, ())) if usable else (),
                tuple(domain for domain, _ in domains.get(ifindex, ())),
                tuple(domain for domain, route_only in domains.get(ifindex, ()) if not route_only and domain != ROOT),
                bool(link.get("DefaultRoute", True)),  # the global servers always take the rest
                f"systemd-resolved, link {names[ifindex]}" if ifindex else "systemd-resolved, global",
            )
        )
    # resolved falls back only where nobody named any server at all, split or not.
    if not any(scope.servers for scope in scopes):
        entries = manager.get("FallbackDNSEx") or manager.get("FallbackDNS") or ()
        fallback = [server for _, _, packed, *rest in entries if (server := _server(packed, *rest)) is not None]
        if fallback:
            source = "systemd-resolved, fallback"
            scopes.append(Scope("resolved:fallback", tuple(fallback), (), (), True, source, FALLBACK_RANK))
    policy = _policy_of([("", manager), *((f" on {names[i]}", links[i]) for i in sorted(links) if i in names)])
    kept = tuple(scope for scope in scopes if scope.servers or scope.search)
    stub = manager.get("DNSStubListener", "yes") in ("yes", "udp")
    return Resolved(kept, policy, stub, str(manager.get("ResolvConfMode", "")))


def _server(packed: bytes, port: int = 0, name: str = "", *, interface: str = "") -> Server | None:
    try:
        address = ipaddress.ip_address(bytes(packed))
    except ValueError:
        return None
    text = str(address)
    if address.version == 6 and address.is_link_local and interface:
        text = f"{text}%{interface}"
    # A stub of somebody's on the loopback is not reached through a link, whatever link it was set on.
    return Server(text, port or 53, name=name, interface="" if address.is_loopback else interface)


def _policy_of(places: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    for where, properties in places:
        for name in ("DNSOverTLS", "DNSSEC"):
            if properties.get(name) == "yes":
                return f"{name}=yes{where}"
    return ""


class ResolvedSource(BusSource[Resolved]):
    """Follows systemd-resolved."""

    def __init__(self) -> None:
        super().__init__("systemd-resolved", NAME)

    async def read(self, service: Service) -> Resolved:
        manager = await service.properties(*_MANAGER)
        links = {}
        for ifindex in links_of(manager):
            try:
                links[ifindex] = await service.properties(link_path(ifindex), _LINK_INTERFACE)
            except LookupError:
                continue  # gone meanwhile
        return parse_resolved(manager, links, _names_of(links))

    def current(self) -> list[Scope]:
        return list(self.found.scopes) if self.found is not None else []


def _names_of(links: Iterable[int]) -> dict[int, str]:
    names = {}
    for ifindex in links:
        try:
            names[ifindex] = socket.if_indextoname(ifindex)
        except OSError:
            continue
    return names
