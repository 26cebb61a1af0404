"""Notices servers that ask us: a query that goes round for ever would be a flood (rule 48).

It happens when the host's resolver forwards to a guest, and that guest to the gateway: each setting is sensible by
itself. So each server is sent a question that nobody else can know, `<random>.test TXT` (as dnsmasq's dns-loop-detect),
when it is new; if that arrives here from a guest, the server is not asked any more until the host's network changes,
and then is sent another. All others are sent one only: hosts change their settings often, and servers do not. It goes
by the transport that queries go by. Servers at addresses of the gateway itself are left out by `routes`.

`.test` is never delegated (RFC 6761 6.2), so that no resolver on the way learns more than a random number.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from netstack.dns.message import RD, TYPE_TXT, Query, Question, parse_query
from netstack.dns.routes import Scope, Server

if TYPE_CHECKING:
    from netstack.core.ports import Events
    from netstack.dns.upstream import Upstream

_WAIT = 10.0  # for how long a question may be on its way
_MAX_PROBES = 64


class LoopGuard:
    """Sends the questions, and knows them when they come back."""

    def __init__(self, upstream: Upstream, events: Events | None = None) -> None:
        self._upstream = upstream
        self._events = events
        self._probes: dict[bytes, Server] = {}
        self._probed: set[Server] = set()
        self.counters: Counter[str] = upstream.counters
        self.enabled = True
        """Whether anything is sent. A network that serves nobody yet asks nobody."""

    def probe(self, servers: Iterable[Server]) -> None:
        """These are all servers there are: ask those that are new, and those that led back to us, without waiting."""
        if not self.enabled:
            return
        servers = tuple(servers)
        self._probed.intersection_update(servers)
        for server in servers:
            # One loops through TLS only on purpose.
            if server.transport in ("udp", "tcp") and server not in self._probed and len(self._probes) < _MAX_PROBES:
                label = secrets.token_hex(16).encode()
                self._probes[label] = server
                self._probed.add(server)
                self._upstream.nursery.start_soon(self._ask, label, server)

    async def _ask(self, label: bytes, server: Server) -> None:
        try:
            query = parse_query(_write_probe(label))
            if isinstance(query, Query):
                with trio.move_on_after(_WAIT):
                    await self._upstream.probe(query, Scope("probe", (server,)))
                    await trio.sleep(_WAIT)
        finally:
            self._probes.pop(label, None)

    def is_ours(self, question: Question) -> bool:
        """Whether a guest's query is one of these; then its server is not asked any more. Untrusted."""
        if not self._probes or question.type != TYPE_TXT or len(question.labels) != 2:
            return False
        server = self._probes.pop(question.labels[0], None)
        if server is None:
            return False
        self._probed.discard(server)
        self._upstream.health.of(server).looping = True
        self.counters["dns_loops"] += 1
        if self._events is not None:
            self._events.warning(
                "dns_loop",
                "a nameserver of the host sends its queries back to us, and is not asked any more",
                server=str(server),
            )
        return True


def _write_probe(label: bytes) -> bytes:
    name = bytes((len(label),)) + label + b"\x04test\0"
    return b"\0\0" + RD.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\0" + name + TYPE_TXT.to_bytes(2, "big") + b"\0\1"
