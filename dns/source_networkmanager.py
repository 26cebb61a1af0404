"""NetworkManager, over D-Bus (org.freedesktop.NetworkManager.DnsManager): a scope for each of its entries.

    Mode           s        default | dnsmasq | systemd-resolved | dnsconfd | none: who routes by domain
    RcManager      s        how it writes resolv.conf; "unmanaged": it does not
    Configuration  aa{sv}   nameservers as, domains as ("~x": routing only, "~" or "~.": all), interface s,
                            priority i, vpn b

Of use where the mode is "default": then resolv.conf holds the servers of all connections in one list, three at most,
and what belongs to which VPN is to be had here only. In the other modes a local resolver knows it, and is asked.

A lower priority number stands before a higher one, here as the rank of the scope (VPNs have 50, others 100, unless
set); with any negative number, only the entries of the lowest are used (nm-settings(5), ipv4.dns-priority). An entry
takes the names that nobody claims unless it is split: a VPN with domains of its own, or anything with routing domains,
and without a default route.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from netstack.dns.dbus import BusSource, Service
from netstack.dns.routes import HOST_RANK, ROOT, Scope, Server, pack_address

NAME = "org.freedesktop.NetworkManager"
_DNS_MANAGER = ("/org/freedesktop/NetworkManager/DnsManager", "org.freedesktop.NetworkManager.DnsManager")

_MAX_ENTRIES = 64

_ROUTES4, _ROUTES6 = Path("/proc/net/route"), Path("/proc/net/ipv6_route")


class NetworkManager(NamedTuple):
    """What NetworkManager says."""

    mode: str
    rc_manager: str
    scopes: tuple[Scope, ...]

    def writes(self, nameservers: Collection[str]) -> bool:
        """Whether a resolv.conf with these nameservers is its work, and has nobody else behind it."""
        known = {server.packed() for scope in self.scopes for server in scope.servers}
        return (
            self.mode == "default"
            and self.rc_manager not in ("unmanaged", "")
            and bool(nameservers)
            and all(pack_address(address) in known for address in nameservers)
        )


def parse_networkmanager(properties: Mapping[str, Any], default_routes: Collection[str]) -> NetworkManager:
    """Make scopes of the DnsManager's properties. `default_routes`: interfaces with a default route.

    The dictionaries of Configuration hold (signature, value), as jeepney gives variants.
    """
    entries: list[dict[str, Any]] = [
        {key: value for key, (_, value) in entry.items()}
        for entry in (properties.get("Configuration") or ())[:_MAX_ENTRIES]
    ]
    priorities = sorted({int(entry.get("priority", 100)) for entry in entries})
    if priorities and priorities[0] < 0:
        priorities = priorities[:1]
    scopes = []
    seen: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: int(entry.get("priority", 100))):
        priority = int(entry.get("priority", 100))
        if priority not in priorities:
            continue
        interface = str(entry.get("interface", ""))
        # One interface has an entry for each family.
        seen[interface] = count = seen.get(interface, 0) + 1
        key = f"networkmanager:{interface or 'global'}" + (f":{count}" if count > 1 else "")
        words = [str(word) for word in entry.get("domains") or ()]
        domains = tuple(word.removeprefix("~") or ROOT for word in words)
        routed = any(word.startswith("~") for word in words)
        split = (routed or (bool(entry.get("vpn")) and bool(domains))) and interface not in default_routes
        source = f"NetworkManager, {'VPN ' if entry.get('vpn') else ''}{interface or 'global'}"
        rank = HOST_RANK + priorities.index(priority)
        search = tuple(word for word in words if word.strip(".") and not word.startswith("~"))
        servers = _servers(entry.get("nameservers") or (), interface)
        scopes.append(Scope(key, servers, domains, search, not split, source, rank))
    return NetworkManager(str(properties.get("Mode", "")), str(properties.get("RcManager", "")), tuple(scopes))


def _servers(texts: Sequence[Any], interface: str) -> tuple[Server, ...]:
    servers = []
    for text in map(str, texts):
        # Since 1.50 a server may be written dns+tls://ADDRESS#NAME; which is its own resolver's matter.
        address = text.partition("#")[0].removeprefix("dns+udp://").strip("[]")
        packed = pack_address(address)
        if packed:
            loopback = packed[:1] == b"\x7f" if len(packed) == 4 else packed == bytes(15) + b"\x01"
            link_local = packed[:1] == b"\xfe" and packed[1] & 0xC0 == 0x80
            scoped = f"{address}%{interface}" if link_local and interface and "%" not in address else address
            servers.append(Server(scoped, interface="" if loopback else interface))
    return tuple(servers)


def parse_default_routes(routes4: str, routes6: str) -> set[str]:
    """The interfaces with a default route, from /proc/net/route and /proc/net/ipv6_route."""
    found = set()
    for line in routes4.splitlines()[1:]:
        words = line.split()
        if len(words) >= 8 and words[1] == words[7] == "00000000":
            found.add(words[0])
    for line in routes6.splitlines():
        words = line.split()
        # The kernel's own unreachable ::/0 is on lo.
        if len(words) >= 10 and set(words[0]) == {"0"} and words[1] == "00" and words[9] != "lo":
            found.add(words[9])
    return found


def _read_default_routes() -> set[str]:
    texts = []
    for path in (_ROUTES4, _ROUTES6):
        try:
            texts.append(path.read_text())
        except OSError:
            texts.append("")
    return parse_default_routes(*texts)


class NetworkManagerSource(BusSource[NetworkManager]):
    """Follows NetworkManager."""

    def __init__(self) -> None:
        super().__init__("NetworkManager", NAME)

    async def read(self, service: Service) -> NetworkManager:
        return parse_networkmanager(await service.properties(*_DNS_MANAGER), _read_default_routes())

    def current(self) -> list[Scope]:
        return list(self.found.scopes) if self.found is not None else []
