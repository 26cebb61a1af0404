"""The host's /etc/resolv.conf (resolv.conf(5)): one scope for all names.

    nameserver ADDRESS       up to three; without any, the host itself
    search DOMAIN ...        the last one wins, and the last of `search` and `domain`; for guests, not for routing
    options WORD ...         each one adds to those before; unknown ones are for others
    sortlist ...             of no use here: answers are handed on as they came

The C library wants the keyword in the first column and in lower case, and takes the rest of a `nameserver` line up to
the next blank. Lines that it cannot read count for nothing. Which options have a meaning for a forwarder:

    edns0, trust-ad, use-vc   how the servers are asked (routes.Server.options)
    rotate                    nothing: several servers are raced anyway
    timeout, attempts, ndots, single-request, no-aaaa, ...  they are about the C library's own waiting and guessing,
                              which a guest's library does by itself; read, and kept for whoever looks

A host without nameservers of its own, every one being a local stub, is no mistake: the stub is asked from here, and
guests never hear of its address (rule 47). `source_auto` looks behind the stub where it can.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from netstack.dns.routes import EDNS0, TRUST_AD, USE_VC, Scope, Server, clean_domain
from netstack.dns.sources import WatchedFile, poll

# glibc resolv.h: MAXNS. Further ones are not asked by the host's programs either.
MAX_NAMESERVERS = 3

# Tailscale's bound, and ten times what anybody has.
MAX_SIZE = 10 * 1024

# resolv.conf(5): options with a number, what they are without being named, and what a larger number is cut to.
_NUMBERS = {"ndots": (1, 15), "timeout": (5, 30), "attempts": (2, 5)}
_FLAGS = frozenset(
    "debug rotate no-aaaa no-check-names inet6 edns0 single-request single-request-reopen no-tld-query use-vc "
    "no-reload trust-ad".split()
)

RESOLVED_STUBS = frozenset(("127.0.0.53", "127.0.0.54"))


class ResolvConf(NamedTuple):
    """What one version of the file says. Numbers are those of resolv.conf(5), timeout in seconds."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    ndots: int = 1
    timeout: int = 5
    attempts: int = 2
    sortlist: tuple[str, ...] = ()

    def is_resolved_stub(self) -> bool:
        """Whether all of this leads to systemd-resolved."""
        return bool(self.nameservers) and RESOLVED_STUBS.issuperset(self.nameservers)


def parse_resolv_conf(text: str) -> ResolvConf:
    """Read the text of a resolv.conf; anything can be in it."""
    nameservers: list[str] = []
    search: tuple[str, ...] = ()
    sortlist: tuple[str, ...] = ()
    flags: set[str] = set()
    numbers = {name: default for name, (default, _) in _NUMBERS.items()}
    for line in text.removeprefix("\ufeff").splitlines():
        words = line.split() if line[:1].isalpha() else []
        if len(words) < 2:
            continue
        keyword, values = words[0], words[1:]
        if keyword == "nameserver":
            address = _parse_address(values[0])
            if address is not None and len(nameservers) < MAX_NAMESERVERS:
                nameservers.append(address)
        elif keyword in ("search", "domain"):
            # systemd-resolved writes "search ." for none.
            named = values if keyword == "search" else values[:1]
            search = tuple(dict.fromkeys(clean for word in named if (clean := clean_domain(word))))
        elif keyword == "sortlist":
            sortlist = tuple(values)
        elif keyword == "options":
            for word in values:
                name, colon, number = word.partition(":")
                if word in _FLAGS:
                    flags.add(word)
                elif colon and name in _NUMBERS and number.isascii() and number.isdecimal():
                    numbers[name] = min(int(number[:9]), _NUMBERS[name][1])
    if not nameservers:
        # resolv.conf(5): without any, the name server on the local machine is asked.
        nameservers.append("127.0.0.1")
    # Named twice it is asked once (seen in the wild); the second still took one of the three places.
    unique = tuple(dict.fromkeys(nameservers))
    return ResolvConf(
        unique, search, frozenset(flags), numbers["ndots"], numbers["timeout"], numbers["attempts"], sortlist
    )


def scopes_of(found: ResolvConf, source: str) -> list[Scope]:
    """What a resolv.conf means for routing: one scope that takes everything."""
    options = found.options & {EDNS0, TRUST_AD, USE_VC}
    servers = tuple(Server(address, options=options) for address in found.nameservers)
    return [Scope("resolv.conf", servers, search=found.search, default=True, source=source)]


def _parse_address(text: str) -> str | None:
    """An IPv4 or IPv6 address, or None. Octal and shortened IPv4 addresses are none (010.0.0.1, 127.1)."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


class ResolvConfSource:
    """Follows a resolv.conf."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = WatchedFile(path, MAX_SIZE)
        self.found = parse_resolv_conf("")
        self.look()

    def look(self) -> bool:
        """Read the file if it changed; whether it says something else now."""
        data = self._file.read_changed()
        if data is None:
            return False
        was, self.found = self.found, parse_resolv_conf(data.decode("utf-8", "replace"))
        return was != self.found

    async def run(self, changed: Callable[[], None]) -> None:
        await poll(self.look, changed)

    def current(self) -> list[Scope]:
        return scopes_of(self.found, self.name)
