"""What is known of each server that is asked: how quick it is, whether it is dead, and which EDNS and TLS it can.

A server that leaves queries unanswered, or whose host says that nobody listens, is *dead* for a while, the longer the
more often: 5 s, doubling up to a minute (dnsmasq looks again after 20 s, systemd-resolved by each query). Dead servers
are asked last, and when all are dead they are asked all the same. After the while it is asked in its turn again, and
if it is still dead, that costs the one query the time until the next server is asked, and no answer.

A server that cannot read a query with an OPT (FORMERR, NOTIMP, or silence, where it answers without one) is asked
without for ten minutes (RFC 6891 6.2.2 and 7).

When the host's network changes, servers that are gone are forgotten, and nobody is dead any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from netstack.dns.routes import Server

# Queries left unanswered, one after the other, until a server is dead.
_MISSES = 2
_DEAD, _DEAD_MAX = 5.0, 60.0
_PLAIN = 600.0
_PLAIN_GUESS = 60.0  # where the evidence is silence, which may have been a lost packet
_CLEAR = 120.0

# Servers that are remembered; each change of the host's network begins anew, so that this is never reached by itself.
_SERVERS = 1024


@dataclass(slots=True)
class Health:
    """One server. Times are in seconds of the clock that the methods are given."""

    round_trip: float | None = None
    """How long answers take (smoothed, RFC 6298's weights)."""
    misses: int = 0
    dead_until: float = 0.0
    deaths: int = 0
    speaks_edns: bool = False
    plain_until: float = 0.0
    """Until then it is asked without an OPT."""
    clear_until: float = 0.0
    """Until then it is asked unencrypted, where that is allowed: its TLS failed."""
    looping: bool = False
    """What is sent there comes back from a guest or the host: it is not asked at all (netstack.dns.loops)."""
    queries: int = 0
    answers: int = 0

    def on_answer(self, seconds: float | None) -> None:
        """It answered, after so long; None where that says nothing about it, as after a connection was made."""
        self.answers += 1
        self.misses = self.deaths = 0
        self.dead_until = 0.0
        if seconds is not None:
            self.round_trip = seconds if self.round_trip is None else 0.875 * self.round_trip + 0.125 * seconds

    def on_miss(self, now: float) -> None:
        """It did not answer in time."""
        self.misses += 1
        if self.misses >= _MISSES:
            self.on_dead(now)

    def on_dead(self, now: float) -> None:
        """Nobody is there: the host says so."""
        if now >= self.dead_until:
            self.dead_until = now + min(_DEAD * 2**self.deaths, _DEAD_MAX)
            self.deaths = min(self.deaths + 1, 10)

    def on_edns(self) -> None:
        self.speaks_edns = True

    def on_no_edns(self, now: float, *, sure: bool) -> None:
        self.speaks_edns = False
        self.plain_until = now + (_PLAIN if sure else _PLAIN_GUESS)

    def on_no_tls(self, now: float) -> None:
        self.clear_until = now + _CLEAR


class HealthTable:
    """The servers that were asked."""

    def __init__(self) -> None:
        self._table: dict[Server, Health] = {}

    def of(self, server: Server) -> Health:
        """What is known of a server."""
        health = self._table.get(server)
        if health is None:
            if len(self._table) >= _SERVERS:
                self._table.clear()
            health = self._table[server] = Health()
        return health

    def order(self, servers: Sequence[Server], now: float) -> list[Server]:
        """Those to ask, in their order, the dead ones last; those that lead back to us not at all."""
        if len(servers) == 1:
            return [] if self.of(servers[0]).looping else list(servers)
        known = [(server, self.of(server)) for server in servers]
        alive = [server for server, health in known if health.dead_until <= now and not health.looping]
        return alive + [server for server, health in known if health.dead_until > now and not health.looping]

    def retain(self, servers: Collection[Server]) -> None:
        """The network is another one: forget all others, and what may be different now of these."""
        kept = set(servers)
        self._table = {server: health for server, health in self._table.items() if server in kept}
        for health in self._table.values():
            health.misses = health.deaths = 0
            health.dead_until = health.clear_until = 0.0
            health.looping = False

    def describe(self, now: float) -> list[dict[str, object]]:
        """For people and programs: one entry a server."""
        return [
            {
                "server": str(server),
                "queries": health.queries,
                "answers": health.answers,
                "ms": None if health.round_trip is None else round(health.round_trip * 1000, 2),
                "dead": health.dead_until > now,
                "edns": health.plain_until <= now,
                "loop": health.looping,
            }
            for server, health in self._table.items()
        ]
