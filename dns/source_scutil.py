"""macOS' resolver configuration, as `scutil --dns` prints it, and what /etc/resolver/* adds to that.

scutil prints three sections of resolvers; only the first one says where ordinary names go, the others are for look-ups
that are bound to an interface or a service. Of the first:

    no domain, not Supplemental    the default resolver; its search list has the domains of VPNs already
    no domain, Supplemental        a VPN that takes all names: before the default
    domain                         names below it
    options : mdns                 multicast: not ours (dns.mdns)

Several with one domain are asked together, in their `order`. `if_index` says where a resolver belongs; it matters where
two of them have the same address (rule 45).

`scutil -W --dns` prints everything again at each change, behind a line of stars and the time, and keeps running: that
is the watcher. A port that is written behind an address in /etc/resolver (127.0.0.1.5353) is not printed, so those
files are read too (resolver(5)), and stand for what scutil says about their domains.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from netstack.dns.routes import ROOT, Scope, Server, clean_domain
from netstack.dns.sources import poll

RESOLVER_DIRECTORY = Path("/etc/resolver")

_DEFAULT_ORDER = 200_000

# Bounds far above what a host has.
_MAX_TEXT = 1 << 20
_MAX_FILES = 256
_MAX_FILE = 10 * 1024
_MAX_NAMESERVERS = 3  # resolver(5), in a file

# The watcher prints a configuration in one go; what comes within this many seconds belongs together.
_SETTLE = 0.1
# Between the end of scutil, which is not expected, and the next one.
_RESTART = 1.5

_STARS = re.compile(rb"^\*\*\* [0-9:.]+\s*$", re.MULTILINE)


@dataclass(slots=True)
class _Resolver:
    """One `resolver #N` of scutil's, or one file of /etc/resolver."""

    domain: str = ""
    nameservers: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    port: int = 53
    order: int = _DEFAULT_ORDER
    interface: str = ""
    options: str = ""
    flags: str = ""


def parse_scutil(text: str) -> list[Scope]:
    """The scopes of what `scutil --dns` printed."""
    resolvers: list[_Resolver] = []
    ours = False
    current: _Resolver | None = None
    for line in text.splitlines():
        if line.startswith("DNS configuration"):
            ours = line.strip() == "DNS configuration"
            current = None
        elif ours and line.startswith("resolver #"):
            current = _Resolver()
            resolvers.append(current)
        elif ours and current is not None:
            _take_line(current, line)
    return _scopes_of(resolvers, "scutil --dns")


def _take_line(resolver: _Resolver, line: str) -> None:
    key, colon, value = line.partition(" : ")
    if not colon:  # keys are padded, some to "flags    :"
        key, colon, value = line.partition(":")
    key, value = key.strip(), value.strip()
    if not colon or not value:
        return
    if key == "domain":
        resolver.domain = clean_domain(value)
    elif key.startswith("nameserver["):
        resolver.nameservers.append(value)
    elif key.startswith("search domain["):
        resolver.search.append(value)
    elif key == "port":
        resolver.port = _number(value, 53)
    elif key == "order":
        resolver.order = _number(value, _DEFAULT_ORDER)
    elif key == "if_index":
        name = re.search(r"\(([^)\s]+)\)", value)
        resolver.interface = name[1] if name else ""
    elif key == "options":
        resolver.options = value
    elif key == "flags":
        resolver.flags = value


def _number(text: str, default: int) -> int:
    return int(text[:9]) if text.isascii() and text.isdecimal() else default


def _scopes_of(resolvers: Iterable[_Resolver], source: str) -> list[Scope]:
    usable = [r for r in resolvers if r.nameservers and not {"mdns", "pdns"} & set(r.options.lower().split())]
    usable.sort(key=lambda resolver: resolver.order)
    places: dict[str, set[str]] = {}
    for resolver in usable:
        for address in resolver.nameservers:
            places.setdefault(address, set()).add(resolver.interface)
    keys: Counter[str] = Counter()
    scopes = []
    for resolver in usable:
        servers = []
        for text in resolver.nameservers:
            # Only where the address alone does not say which: binding needs care, and the host's routes know the rest.
            interface = resolver.interface if len(places[text]) > 1 else ""
            server = parse_flat_server(text, resolver.port)
            if server is not None:
                servers.append(server._replace(interface=interface))
        supplemental = "Supplemental" in resolver.flags
        domain = resolver.domain or (ROOT if supplemental else "")
        key = f"scutil:{domain or 'default'}" + (f":{resolver.interface}" if resolver.interface else "")
        keys[key] += 1
        if keys[key] > 1:
            key += f":{keys[key]}"
        where = f"{source}, {resolver.interface}" if resolver.interface else source
        search = tuple(resolver.search)
        # getaddrinfo asks the resolver that this is the configuration of.
        scope = Scope(key, tuple(servers), (domain,) if domain else (), search, not domain, where, system=True)
        scopes.append(scope)
    return scopes


def parse_flat_server(text: str, port: int) -> Server | None:
    """Read 192.0.2.1, fe80::1%en0, or either with .PORT behind it, as in a file of /etc/resolver."""
    for address, number in ((text, str(port)), text.rpartition(".")[::2]):
        if number.isascii() and number.isdecimal() and 1 <= int(number[:6]) <= 65535:
            try:
                return Server(str(ipaddress.ip_address(address)), int(number))
            except ValueError:
                continue
    return None


def parse_resolver_files(files: Mapping[str, str]) -> list[Scope]:
    """The scopes of /etc/resolver, from file names and texts."""
    scopes = []
    for name, text in sorted(files.items()):
        resolver = _Resolver()
        seen = set()
        for line in text.splitlines():
            words = line.split()
            if not words or line[0] in ";#" or len(words) < 2:
                continue
            keyword, values = words[0].lower(), words[1:]
            if keyword == "nameserver":
                if len(resolver.nameservers) < _MAX_NAMESERVERS:
                    resolver.nameservers.append(values[0])
            elif keyword == "search":
                resolver.search += values
            elif keyword not in seen:  # of the others the first one counts
                seen.add(keyword)
                if keyword == "domain":
                    resolver.domain = clean_domain(values[0])
                elif keyword == "port":
                    resolver.port = _number(values[0], 53)
                elif keyword == "search_order":
                    resolver.order = _number(values[0], _DEFAULT_ORDER)
                elif keyword in ("options", "flags", "interface"):
                    setattr(resolver, keyword, " ".join(values))
        resolver.domain = resolver.domain or clean_domain(name)
        # "scoped": for look-ups that are bound to its interface only.
        if resolver.domain and "scoped" not in resolver.flags.lower().split():
            scopes += _scopes_of([resolver], str(RESOLVER_DIRECTORY / name))
    return scopes


def merge_resolver_files(scopes: Iterable[Scope], from_files: Iterable[Scope]) -> list[Scope]:
    """scutil's scopes, with the files' own in place of those that it made of a file: files say the ports."""
    files = list(from_files)
    kept = []
    for scope in scopes:
        addresses = {server.address for server in scope.servers}
        if not any(f.domains == scope.domains and addresses <= {s.address for s in f.servers} for f in files):
            kept.append(scope)
    return kept + files


class ScutilSource:
    """Follows macOS' resolver configuration. `program` prints it, again and again with -W."""

    def __init__(self, program: str = "scutil", directory: Path = RESOLVER_DIRECTORY) -> None:
        self.name = "scutil"
        self.problem = "not read yet"
        self._program = program
        self._directory = directory
        self._scopes: list[Scope] = []
        self._files: dict[str, str] = {}
        self._identity: object = None
        self._look_at_files()

    def current(self) -> list[Scope]:
        return merge_resolver_files(self._scopes, parse_resolver_files(self._files))

    async def run(self, changed: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll, self._look_at_files, changed)
            while True:
                try:
                    await self._watch(changed)
                    self.problem = f"{self._program} ended"
                except OSError as error:
                    self.problem = f"{self._program}: {error.strerror}"
                # Started anew it prints everything, so that a scutil without -W is a poll at worst.
                await trio.sleep(_RESTART)

    async def _watch(self, changed: Callable[[], None]) -> None:
        command = [self._program, "-W", "--dns"]
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        try:
            text = b""
            while chunk := await process.stdout.receive_some(65536):
                while chunk:
                    text = (text + chunk)[-_MAX_TEXT:]
                    chunk = b""
                    with trio.move_on_after(_SETTLE):
                        chunk = await process.stdout.receive_some(65536)
                # Kept, because the rest of it may come later still.
                text = _STARS.split(text)[-1]
                scopes = parse_scutil(text.decode("utf-8", "replace"))
                self.problem = ""
                if scopes != self._scopes:
                    self._scopes = scopes
                    changed()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.stdout.aclose()

    def _look_at_files(self) -> bool:
        files: dict[str, str] = {}
        identity: list[object] = []
        try:
            for path in sorted(self._directory.iterdir())[:_MAX_FILES]:
                try:
                    status = path.stat()
                    identity.append((path.name, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
                except OSError:
                    continue
        except OSError:
            pass
        if identity == self._identity:
            return False
        self._identity = identity
        for entry in identity:
            assert isinstance(entry, tuple)
            try:
                with (self._directory / entry[0]).open("rb") as file:
                    files[entry[0]] = file.read(_MAX_FILE).decode("utf-8", "replace")
            except OSError:
                continue
        was, self._files = self._files, files
        return was != files
