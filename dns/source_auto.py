"""Which of the host's sources is the true one: what the host's own programs would ask (reference G).

    macOS            scutil and /etc/resolver
    elsewhere, in this order:
    systemd-resolved where resolv.conf leads to it: its stub, its list of uplinks, or nsswitch.conf's `resolve` before
                     `dns` while it has read that same resolv.conf. Its servers by D-Bus, with their domains; its stub
                     where its policy (DNSOverTLS, DNSSEC) would be lost otherwise, or the bus cannot be read
    NetworkManager   where it wrote resolv.conf and routes nothing itself: a list of three servers is all that is left
                     there of the domains of its VPNs
    resolv.conf      everywhere else, a local resolver at 127.0.0.1 included: it is asked from here

All three are watched all the time, since hosts change their mind while guests run: a VPN client brings its own
resolv.conf, a package upgrade restarts resolved. `choose` is pure and decides anew after each change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import trio

from netstack.dns.routes import Scope, pack_address
from netstack.dns.source_networkmanager import NetworkManager, NetworkManagerSource
from netstack.dns.source_resolvconf import ResolvConf, ResolvConfSource, scopes_of
from netstack.dns.source_resolved import STUB, Resolved, ResolvedSource
from netstack.dns.source_scutil import ScutilSource
from netstack.dns.sources import Source, WatchedFile, poll

Kind = Literal["auto", "resolved", "networkmanager", "resolv.conf", "scutil", "stub", "none"]

RESOLV_CONF = Path("/etc/resolv.conf")
NSSWITCH = Path("/etc/nsswitch.conf")

# Seconds until a source that failed is started again.
_RESTART = 5.0


def asks_resolved(nsswitch: str) -> bool:
    """Whether nsswitch.conf(5) has the C library ask resolved before it reads resolv.conf."""
    for line in nsswitch.splitlines():
        database, colon, services = line.partition("#")[0].partition(":")
        if colon and database.strip() == "hosts":
            words = services.split()
            return "resolve" in words and "dns" not in words[: words.index("resolve")]
    return False


def choose(
    resolv: ResolvConf, path: str, resolved: Resolved | None, manager: NetworkManager | None, *, nss_resolve: bool
) -> tuple[list[Scope], str]:
    """The scopes of the true source, and why it is that one."""
    plain = scopes_of(resolv, path)
    if resolved is not None and _leads_to_resolved(resolv, resolved, nss_resolve=nss_resolve):
        if resolved.policy:
            if not resolv.is_resolved_stub() and resolved.stub:
                plain = [Scope("resolv.conf", (STUB,), (), resolv.search, True, "systemd-resolved's stub")]
            return plain, f"systemd-resolved's stub, because of {resolved.policy}"
        return list(resolved.scopes), "systemd-resolved over D-Bus"
    if resolv.is_resolved_stub():
        return plain, "systemd-resolved's stub, because D-Bus does not say more"
    if manager is not None and manager.writes(resolv.nameservers):
        return list(manager.scopes), "NetworkManager over D-Bus"
    return plain, path


def _leads_to_resolved(resolv: ResolvConf, resolved: Resolved, *, nss_resolve: bool) -> bool:
    if resolv.is_resolved_stub():
        return True
    # In a container resolv.conf may be another one than the resolved that we see by its bus has.
    known = {server.packed() for scope in resolved.scopes for server in scope.servers}
    same = all(pack_address(address) in known for address in resolv.nameservers)
    return same and (resolved.mode == "uplink" or nss_resolve)


class HostSource:
    """Follows the host by one kind of source, or by whichever is the true one ("auto")."""

    def __init__(
        self,
        kind: Kind = "auto",
        resolv_conf: Path = RESOLV_CONF,
        *,
        nsswitch: Path = NSSWITCH,
        platform: str = sys.platform,
    ) -> None:
        if kind == "auto" and resolv_conf != RESOLV_CONF:
            kind = "resolv.conf"  # who names another file means that file
        if kind == "auto" and platform == "darwin":
            kind = "scutil"
        self.name: str = kind
        self.why = ""
        self.failures: dict[str, str] = {}
        """Sources that ended by an error of ours, and by which; they are started again."""
        self._kind = kind
        self._resolv = ResolvConfSource(resolv_conf)
        self._nsswitch = WatchedFile(nsswitch, 65536)
        self._nss_resolve = False
        self._resolved = ResolvedSource() if kind in ("auto", "resolved") else None
        self._manager = NetworkManagerSource() if kind in ("auto", "networkmanager") else None
        self._scutil = ScutilSource() if kind == "scutil" else None
        self._look_at_nsswitch()

    def current(self) -> list[Scope]:
        """What the host says now. A source that was named but says nothing yet leaves resolv.conf in charge."""
        if self._kind == "none":
            self.why = "nothing of the host's is asked"
            return []
        if self._kind == "stub":
            self.why = "the settings say so"
            return [Scope("stub", (STUB,), (), self._resolv.found.search, True, "systemd-resolved's stub")]
        scopes, self.why = choose(
            self._resolv.found,
            self._resolv.name,
            self._resolved.found if self._resolved else None,
            self._manager.found if self._manager else None,
            nss_resolve=self._nss_resolve,
        )
        for source, name in ((self._resolved, "resolved"), (self._manager, "networkmanager"), (self._scutil, "scutil")):
            if self._kind == name and source is not None and (found := source.current()):
                scopes, self.why = found, f"{source.name}, because the settings say so"
            elif self._kind == name and source is not None:
                self.why = f"{self._resolv.name}, because {source.name} says nothing: {source.problem}"
        return scopes

    async def run(self, changed: Callable[[], None]) -> None:
        members: list[Source | None] = [self._resolv, self._resolved, self._manager, self._scutil]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll, self._look_at_nsswitch, changed, 5.0)
            for member in members:
                if member is not None:
                    nursery.start_soon(self._keep_running, member, changed)

    async def _keep_running(self, member: Source, changed: Callable[[], None]) -> None:
        """What a host says may be something that nobody thought of; the other sources go on, and this one again."""
        while True:
            try:
                await member.run(changed)
            except Exception as error:
                self.failures[member.name] = repr(error)
                changed()
            await trio.sleep(_RESTART)

    def _look_at_nsswitch(self) -> bool:
        data = self._nsswitch.read_changed()
        was = self._nss_resolve
        if data is not None:
            self._nss_resolve = asks_resolved(data.decode("utf-8", "replace"))
        return was != self._nss_resolve
