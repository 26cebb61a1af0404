"""Which servers are asked for which name: the routing table, pure (reference B5).

A *scope* is a set of servers with the names that they are for: an interface's, the global ones, a line of the user's.
Its domains are suffixes, "." among them being the root: "all names" (systemd's `~.`, macOS' resolver without a domain).
A query goes to the scopes that hold the longest matching suffix, and to no other:

    x.corp.example    a scope with corp.example; not one with example, not the default ones
    two scopes with corp.example: both, at the same time
    no suffix matches: the scopes with the root; where there are none, the default scopes; else nobody

So what a VPN claims does not leak to the home router, and the reverse. A scope without servers takes part in nothing:
otherwise a half-configured link would swallow names. What the user says in the settings (`rank` 0) stands before what
the host says (`rank` 1) for the same suffix, and does not get mixed with it.

Suffixes are compared by label, in lower case, in a dict from suffix to scopes: one look-up per label of the name, from
the longest suffix that is in the table. A table always gives the same tuple objects.

`RoutingTable` is a value: a change makes another one with a higher version, and `changed_keys` says what the cache has
to forget.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

Transport = Literal["udp", "tcp", "tls", "https", "system"]

PORTS: dict[Transport, int] = {"udp": 53, "tcp": 53, "tls": 853, "https": 443, "system": 0}  # RFC 7858 3.1, RFC 8484

ROOT = "."

# What Server.options may hold. The first three are those of resolv.conf(5).
EDNS0 = "edns0"  # the host's programs send an OPT
TRUST_AD = "trust-ad"  # the way to the server is trusted: its AD bit is passed on (RFC 6840 5.8)
USE_VC = "use-vc"  # ask by TCP
OPPORTUNISTIC = "opportunistic"  # the certificate is not checked, and unencrypted is better than nothing (RFC 7858 4.1)

USER_RANK, HOST_RANK, FALLBACK_RANK = 0, 1, 1000

Labels = tuple[bytes, ...]


class Server(NamedTuple):
    """A server to ask. The address is text: it may have a scope (fe80::1%eth0), whose number changes over time."""

    address: str
    """Empty only with "https", where the URL's host is looked up."""
    port: int = 53
    transport: Transport = "udp"
    name: str = ""
    """The name in the server's certificate ("tls"), or the URL ("https")."""
    interface: str = ""
    """The interface by which it is reached; bind to it where the host allows that. Empty: as the host routes."""
    options: frozenset[str] = frozenset()

    def packed(self) -> bytes:
        """The address as bytes, without its scope; empty when there is none."""
        return pack_address(self.address)

    def __str__(self) -> str:
        if self.transport in ("https", "system"):
            return self.name
        host = f"[{self.address}]" if ":" in self.address else self.address
        text = host if self.port == PORTS[self.transport] else f"{host}:{self.port}"
        if self.transport != "udp":
            text = f"{self.transport}://{text}"
        elif self.port == PORTS["udp"]:
            text = self.address
        return f"{text}#{self.name}" if self.name else text


@dataclass(frozen=True, slots=True)
class Scope:
    """Servers, and the names that they are for."""

    key: str
    """Stable while the thing it stands for lives, such as "resolved:tun0": the cache's entries hang on it."""
    servers: tuple[Server, ...] = ()
    domains: tuple[str, ...] = ()
    """The suffixes that lead here, search domains among them; "." is the root."""
    search: tuple[str, ...] = ()
    """What hosts append to short names, in order. The gateway only hands this on to guests."""
    default: bool = False
    """Whether it takes names that no suffix claims."""
    source: str = ""
    """Where this was read, for people: "/etc/resolv.conf", "systemd-resolved, link tun0"."""
    rank: int = HOST_RANK
    """Of the scopes that match a name equally well, only those of the lowest rank are asked."""
    system: bool = False
    """Whether the system's resolver is known to send these names to these servers, and nowhere else."""

    def claims(self, labels: Labels) -> bool:
        """Whether one of its domains, the root among them, is a suffix of a name in lower case."""
        return any(labels[len(labels) - len(suffix) :] == suffix for suffix in _suffixes(self.domains))


class RoutingTable:
    """An immutable routing table.

    `own` are the gateway's own addresses (packed): servers there are left out, because asking them would ask ourselves.
    """

    __slots__ = ("_default", "_depth", "_root", "_routes", "scopes", "search", "version")

    def __init__(self, scopes: Iterable[Scope] = (), *, own: Collection[bytes] = (), version: int = 0) -> None:
        self.scopes: tuple[Scope, ...] = tuple(_without_own(scope, own) for scope in scopes)
        self.version = version
        self.search: tuple[str, ...] = tuple(
            dict.fromkeys(clean for scope in self.scopes for name in scope.search if (clean := clean_domain(name)))
        )
        found: dict[Labels, list[Scope]] = {}
        for scope in self.scopes:
            # Rule 41: without servers its domains have no effect.
            for labels in {parse_name(domain) for domain in scope.domains} if scope.servers else ():
                if labels is not None:
                    found.setdefault(labels, []).append(scope)
        self._routes = {labels: _lowest_rank(matching) for labels, matching in found.items()}
        self._root = self._routes.pop((), ())
        self._default = _lowest_rank([scope for scope in self.scopes if scope.default and scope.servers])
        self._depth = max(map(len, self._routes), default=0)

    def route(self, labels: Labels) -> tuple[Scope, ...]:
        """The scopes to ask for a name, all at the same time; () when there is nobody.

        `labels` are in lower case, without the root's empty one: as `message.parse_question` gives them. Untrusted.
        """
        claim = self.claim(labels)
        if claim is not None:
            return self._routes[claim]
        return self._root or self._default

    def claim(self, labels: Labels) -> Labels | None:
        """The longest suffix of a name that a scope claims, the root apart; None when there is none. Untrusted.

        Names that never go to the default servers (.local, .internal, private reverse zones) do go where a route
        claims them.
        """
        routes = self._routes
        for start in range(max(len(labels) - self._depth, 0), len(labels)):
            suffix = labels[start:]
            if suffix in routes:
                return suffix
        return None

    def servers(self) -> tuple[Server, ...]:
        """Every server once, in the table's order."""
        return tuple(dict.fromkeys(server for scope in self.scopes for server in scope.servers))

    def changed_keys(self, newer: RoutingTable) -> frozenset[str]:
        """The keys of the scopes that are gone in a newer table, are new, or ask other servers now."""
        was = {scope.key: scope.servers for scope in self.scopes}
        now = {scope.key: scope.servers for scope in newer.scopes}
        return frozenset(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))

    def same_as(self, other: RoutingTable) -> bool:
        """Whether another table says the same, its version apart."""
        return self.scopes == other.scopes

    def describe(self) -> list[dict[str, Any]]:
        """The table for people and programs: a line for each suffix, the longest first, then the root and the default.

        `scopes` and `servers` are who is asked; `source` says where the line came from.
        """
        lines: list[tuple[str, tuple[Scope, ...]]] = [
            (format_name(labels), self._routes[labels])
            for labels in sorted(self._routes, key=lambda labels: (-len(labels), labels[::-1]))
        ]
        # With a root no default scope is ever asked (rule 39).
        lines.append((ROOT, self._root or self._default))
        return [
            {
                "domain": domain,
                "default": domain == ROOT and not self._root,
                "scopes": [scope.key for scope in scopes],
                "servers": [str(server) for scope in scopes for server in scope.servers],
                "interfaces": sorted({s.interface for scope in scopes for s in scope.servers if s.interface}),
                "source": "; ".join(dict.fromkeys(scope.source for scope in scopes)),
            }
            for domain, scopes in lines
        ]


def _lowest_rank(scopes: Sequence[Scope]) -> tuple[Scope, ...]:
    lowest = min((scope.rank for scope in scopes), default=0)
    return tuple(scope for scope in scopes if scope.rank == lowest)


def _without_own(scope: Scope, own: Collection[bytes]) -> Scope:
    servers = tuple(dict.fromkeys(s for s in scope.servers if not own or s.packed() not in own))
    if servers == scope.servers:
        return scope
    return replace(scope, servers=servers)


@lru_cache(maxsize=256)
def _suffixes(domains: tuple[str, ...]) -> frozenset[Labels]:
    """Domains as labels. Kept, because races ask for each query, and parsing a domain costs 2 us."""
    return frozenset(labels for domain in domains if (labels := parse_name(domain)) is not None)


def parse_name(text: str) -> Labels | None:
    """The labels of a domain in lower case, () for the root; None for what is no domain name (RFC 1035 2.3.4)."""
    text = text.strip().removesuffix(".")
    if not text:
        return ()
    labels = []
    for part in text.split("."):
        try:
            label = part.encode("ascii") if part.isascii() else part.lower().encode("idna")
        except UnicodeError:
            return None
        # Control characters: search domains go to guests and to terminals.
        if not 1 <= len(label) <= 63 or not part.isprintable():
            return None
        labels.append(label.lower())
    if sum(len(label) + 1 for label in labels) >= 255:
        return None
    return tuple(labels)


def format_name(labels: Labels) -> str:
    """A name as people write it, without the last dot; "." for the root. A dot in a label is escaped (RFC 1035 5.1)."""
    return b".".join(map(_escape, labels)).decode("latin-1") or ROOT


def _escape(label: bytes) -> bytes:
    return label if b"." not in label else label.replace(b"\\", b"\\\\").replace(b".", b"\\.")


def clean_domain(text: str) -> str:
    """A domain in lower case without the last dot; empty for the root and for what is no domain name."""
    labels = parse_name(text)
    return format_name(labels) if labels else ""


def pack_address(text: str) -> bytes:
    """An address as bytes, without its scope; empty for what is none."""
    try:
        return ipaddress.ip_address(text.partition("%")[0]).packed
    except ValueError:
        return b""
