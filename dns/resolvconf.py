"""The host's /etc/resolv.conf: which nameservers it uses, noticed when it changes (resolv.conf(5)).

The file is looked at when a query needs it, at most once a second: a stat, and a read only when the file is another one
(inode), or changed (mtime, size). That notices a rewrite, a rename over it and a switched symlink, and costs nothing
while no guest asks.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# glibc resolv.h: MAXNS. Further ones are not asked by the host's programs either.
MAX_NAMESERVERS = 3

# Tailscale's bound, and ten times what anybody has.
MAX_SIZE = 10 * 1024

CHECK_INTERVAL = 1.0

PORT = 53


class Nameserver(NamedTuple):
    """A server to ask. The address is text: it may have a scope (fe80::1%eth0), whose number changes over time."""

    address: str
    port: int = PORT

    def packed(self) -> bytes:
        """The address as bytes, without its scope."""
        return ipaddress.ip_address(self.address.partition("%")[0]).packed


class ResolvConf(NamedTuple):
    """What one version of the file says."""

    nameservers: tuple[Nameserver, ...] = ()
    search: tuple[str, ...] = ()


def parse_resolv_conf(text: str, own: Collection[bytes] = ()) -> ResolvConf:
    """Read the text. Lines that cannot be understood count for nothing, as they do for the C library.

    `own` are the gateway's own addresses (packed): asking those would ask ourselves.
    """
    nameservers: list[Nameserver] = []
    search: tuple[str, ...] = ()
    named = 0
    for line in text.removeprefix("\ufeff").splitlines():
        # The C library wants the keyword in the first column, in lower case, and something behind it.
        words = line.split() if line[:1].isalpha() else []
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            nameserver = parse_nameserver(words[1])
            if nameserver is not None and named < MAX_NAMESERVERS:
                named += 1
                if nameserver.packed() not in own and nameserver not in nameservers:
                    nameservers.append(nameserver)
        elif words[0] == "search":
            # The last one wins. systemd-resolved writes "search ." for none.
            search = tuple(word.rstrip(".") for word in words[1:] if word.rstrip("."))
        elif words[0] == "domain":
            search = tuple(word.rstrip(".") for word in words[1:2] if word.rstrip("."))
    if not named:
        # resolv.conf(5): without any, the name server on the local machine is asked.
        nameservers.append(Nameserver("127.0.0.1"))
    return ResolvConf(tuple(nameservers), search)


def parse_nameserver(text: str) -> Nameserver | None:
    """Read an IPv4 or IPv6 address, or give None. Octal and shortened IPv4 addresses are none (010.0.0.1, 127.1)."""
    try:
        return Nameserver(str(ipaddress.ip_address(text)))
    except ValueError:
        return None


@dataclass(slots=True)
class HostNameservers:
    """The nameservers of the host as they are now. clock gives monotonic seconds."""

    path: Path
    own: Collection[bytes]
    clock: Callable[[], float]
    on_change: Callable[[ResolvConf], None] | None = None
    """Told when another version was read; the first one does not count. Must not raise."""
    _current: ResolvConf | None = field(init=False, default=None)
    _identity: tuple[int, int, int, int] | None = field(init=False, default=None)
    _check_at: float = field(init=False, default=float("-inf"))

    def current(self) -> ResolvConf:
        """Give what the file says, read at most a second ago."""
        now = self.clock()
        if self._current is None or now >= self._check_at:
            self._check_at = now + CHECK_INTERVAL
            self._check()
        return self._current or ResolvConf()

    def _check(self) -> None:
        try:
            status = self.path.stat()
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            if self._current is not None and identity == self._identity:
                return
            with self.path.open("rb") as file:
                text = file.read(MAX_SIZE).decode("utf-8", "replace")
        except OSError:
            # Missing is a state like any other (in the middle of a rename, or for good): what is known stays in use.
            if self._current is None:
                self._current = parse_resolv_conf("", self.own)
            self._identity = None
            return
        found = parse_resolv_conf(text, self.own)
        was, self._current, self._identity = self._current, found, identity
        if was is not None and was != found and self.on_change is not None:
            self.on_change(found)
