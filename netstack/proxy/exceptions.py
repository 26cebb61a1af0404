"""NO_PROXY: which hosts are reached without a proxy.

Theory of operation. Every program that reads NO_PROXY reads it a little differently (curl, wget, urllib, requests,
httpx and Go agree on less than half of it), and a list was written for one of them. So this reads the union: what any
of them takes for an exception is one.

    example.test          the name and all below it                 example.test:8080    the same at that port only
    .example.test         the same (curl, urllib)                   *.example.test       only what is below it (Go)
    10.1.2.3, ::1, [::1]  that address                              10.0.0.0/8, fd00::/8 that network
    *                     everything                                <local>              names without a dot

Entries are divided by commas and blanks, in either letter case, a trailing dot ignored. An address or a network never
matches a name, whatever the name resolves to, and a name never matches an address. Loopback is always an exception, as
in Go: a proxy cannot reach the loopback that is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

# A list of more entries than this is cut: each name is compared with all of them.
MAX_ENTRIES: Final = 4096

SIMPLE_NAMES: Final = "<local>"  # as Windows writes it

_LOOPBACK: Final = "loopback"


class _Name(NamedTuple):
    entry: str
    suffix: str  # without a leading dot
    apex: bool  # whether the name itself is meant, too
    port: int | None


class _Address(NamedTuple):
    entry: str
    network: IPv4Network | IPv6Network
    port: int | None


class NoProxy:
    """A list of exceptions. Immutable; two with the same entries are equal."""

    __slots__ = ("_addresses", "_all", "_names", "_simple", "entries")

    entries: Final[tuple[str, ...]]

    def __init__(self, entries: Iterable[str] = ()) -> None:
        """Take entries one by one. What cannot be read as an exception matches nothing."""
        self.entries = tuple(dict.fromkeys(entry.strip().lower() for entry in entries if entry.strip()))[:MAX_ENTRIES]
        self._all = "*" in self.entries
        self._simple = SIMPLE_NAMES in self.entries
        self._names: list[_Name] = []
        self._addresses: list[_Address] = []
        for entry in self.entries:
            self._add(entry)

    @classmethod
    def parse(cls, text: str) -> NoProxy:
        """The value of NO_PROXY."""
        return cls(re.split(r"[,\s]+", text))

    def _add(self, entry: str) -> None:
        place, port = _split_port(entry)
        bare = place.strip("[]")
        try:
            self._addresses.append(_Address(entry, ip_network(bare, strict=False), port))
        except ValueError:
            name = place.rstrip(".")
            apex = not name.startswith("*.")
            suffix = _to_ascii(name.removeprefix("*").lstrip("."))
            if suffix and "*" not in suffix and "/" not in suffix and not entry.startswith("<"):
                self._names.append(_Name(entry, suffix, apex, port))

    def match(self, host: str, port: int | None = None) -> str | None:
        """The entry that makes this host an exception, or None. Untrusted."""
        name = host.strip("[]").partition("%")[0].rstrip(".").lower()
        if self._all:
            return "*"
        address = _parse(name)
        if address is not None:
            if address.is_loopback:
                return _LOOPBACK
            for rule in self._addresses:
                if address in rule.network and rule.port in (None, port):
                    return rule.entry
            return None
        name = _to_ascii(name)
        if name == "localhost" or name.endswith(".localhost"):
            return _LOOPBACK
        if self._simple and "." not in name:
            return SIMPLE_NAMES
        for known in self._names:
            if known.port not in (None, port) or not name.endswith(known.suffix):
                continue
            if name == known.suffix:
                if known.apex:
                    return known.entry
            elif name[-len(known.suffix) - 1] == ".":
                return known.entry
        return None

    def __contains__(self, host: str) -> bool:
        return self.match(host) is not None

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoProxy) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __str__(self) -> str:
        return ",".join(self.entries)

    def __repr__(self) -> str:
        return f"NoProxy({str(self)!r})"


def _split_port(entry: str) -> tuple[str, int | None]:
    """An entry and the port after it; the colons of an IPv6 address are none."""
    place, colon, digits = entry.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", digits):
        return entry, None
    if ":" in place and not (place.startswith("[") and place.endswith("]")):
        return entry, None
    return place, int(digits)


def _parse(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _to_ascii(name: str) -> str:
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:
        return name


NO_EXCEPTIONS: Final = NoProxy()
