"""Questions that are on their way, each once, for all guests that want to know the same (rule 27).

Theory of operation
-------------------
A *flight* is a question to the scopes that the routing table names, to the host's neighbors by mDNS, or to the target
of an alias of ours. Whoever asks the same meanwhile waits for the same flight, so that a guest cannot have a server
asked the same thing a thousand times, whose answer is then guessed (RFC 5452 5, the "birthday attack"). When it lands,
each who waits gets the answer in its own words.

A flight to one scope, which is nearly all of them, is a race (`netstack.dns.race`) and has no task; some 3 KiB are all
that a question to a silent server costs. The others have one.

When the routing table changes, flights that would take another way now are turned back and start again; the others go
on (rule 50). Where an old answer may be given (RFC 8767), it is after 1.8 s, and the flight goes on for the cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from netstack.dns.cache import STALE_TTL, Cache, Entry, Keys, flight_key
from netstack.dns.message import EDE_OTHER, REFUSED, SERVFAIL, Query, message_id, with_id, write_error
from netstack.dns.race import Answer, Race
from netstack.dns.rebind import RebindGuard
from netstack.dns.routes import RoutingTable, Scope

if TYPE_CHECKING:
    from netstack.dns.upstream import Upstream
    from netstack.dns.wording import Wording

# RFC 8767 5: after so long without an answer, an old one is better. Seconds.
_STALE_AFTER = 1.8

Reply = Callable[[bytes], None]
Ask = Callable[[Query], Awaitable[bytes]]
"""Finds out what no server is asked for: an answer to the query, whatever its ID."""


class Deliver(Protocol):
    """Gives one who waits the answer."""

    def __call__(self, query: Query, reply: Reply, answer: bytes, route: str, seconds: float, /) -> None: ...


@dataclass(slots=True, eq=False)
class _Flight:
    """A question that is on its way."""

    key: object
    query: Query
    scopes: tuple[Scope, ...]
    keys: Keys
    waiting: list[tuple[Query, Reply, float]] = field(default_factory=list)
    race: Race | None = None
    task: trio.CancelScope | None = None
    """Where several scopes are asked."""
    stale: Entry | None = None


class Flights:
    """All of them. route gives the scopes of a query, and their keys."""

    def __init__(
        self,
        upstream: Upstream,
        cache: Cache,
        wording: Wording,
        route: Callable[[Query], tuple[tuple[Scope, ...], Keys]],
        deliver: Deliver,
        on_bug: Callable[[Query, Exception], None],
        clock: Callable[[], float],
    ) -> None:
        self._upstream = upstream
        self._cache = cache
        self._wording = wording
        self._route = route
        self._deliver = deliver
        self._on_bug = on_bug
        self._clock = clock
        self.rebind = RebindGuard()
        self._counters = upstream.counters
        self._flights: dict[object, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, query: Query, reply: Reply, special: tuple[str, Ask] | None = None) -> None:
        """Find the answer; `reply` is called with it, now or later.

        `special`: what to call the way that leads to no server, and the way.
        """
        now = self._clock()
        scopes, keys = self._route(query) if special is None else ((), (special[0],))
        # Answers of the first are given to the others as they are, where they are not a server's reply: so they differ
        # in nothing.
        same = flight_key(keys, query) if special is None else (flight_key(keys, query), query.opt, query.flags)
        key: object = object() if query.signed else same
        flight = self._flights.get(key)
        if flight is not None:
            self._counters["dns_coalesced"] += 1
            flight.waiting.append((query, reply, now))
            return
        self._counters["dns_cache_misses"] += 1
        flight = self._flights[key] = _Flight(key, query, scopes, keys, [(query, reply, now)])
        if special is not None:
            self._upstream.nursery.start_soon(self._find_out, flight, special[1])
            return
        flight.stale = None if query.signed else self._cache.find_stale(keys, query, now)
        if flight.stale is not None:
            self._upstream.nursery.start_soon(self._give_stale, flight)
        self._depart(flight)

    def reroute(self, table: RoutingTable) -> None:
        """The routing table is another one: turn back those that would take another way now."""
        for flight in list(self._flights.values()):
            if flight.scopes and table.route(flight.query.question.labels) != flight.scopes:
                self._turn_back(flight)

    # ---- under way -------------------------------------------------------------------------------------------------

    def _depart(self, flight: _Flight) -> None:
        """Ask the servers. It may land at once."""
        if len(flight.scopes) == 1:
            race = self._upstream.begin(flight.query, flight.scopes[0], partial(self._land, flight))
            if self._flights.get(flight.key) is flight:
                flight.race = race
        else:
            flight.task = trio.CancelScope()
            self._upstream.nursery.start_soon(self._ask_all, flight, flight.task)

    async def _ask_all(self, flight: _Flight, task: trio.CancelScope) -> None:
        """Several scopes at once, or none."""
        with task:
            try:
                answer = await self._upstream.ask(flight.query, flight.scopes)
            except Exception as error:
                self._on_bug(flight.query, error)
                answer = _bug()
            self._land(flight, answer)

    async def _find_out(self, flight: _Flight, ask: Ask) -> None:
        """By another way than servers."""
        try:
            answer = await ask(flight.query)
        except Exception as error:
            self._on_bug(flight.query, error)
            answer = write_error(flight.query.wire, SERVFAIL, ((EDE_OTHER, "internal error"),))
        self._land(flight, answer)

    def _turn_back(self, flight: _Flight) -> None:
        """Start again, by the way that is right now, or with who is on that way already."""
        race, flight.race = flight.race, None
        task, flight.task = flight.task, None
        if race is not None:
            race.stop()
        if task is not None:
            task.cancel()
        del self._flights[flight.key]
        flight.scopes, flight.keys = self._route(flight.query)
        if not flight.query.signed:
            flight.key = flight_key(flight.keys, flight.query)
        other = self._flights.get(flight.key)
        if other is not None:
            other.waiting += flight.waiting
            return
        self._flights[flight.key] = flight
        self._depart(flight)

    async def _give_stale(self, flight: _Flight) -> None:
        """Those who wait have waited long enough; the flight goes on for the cache's sake (RFC 8767 5)."""
        await trio.sleep(_STALE_AFTER)
        now = self._clock()
        stale = flight.stale
        if self._flights.get(flight.key) is flight and stale is not None:
            stale.stale_until = now + STALE_TTL
            waiting, flight.waiting = flight.waiting, []
            for query, reply, at in waiting:
                self._deliver(query, reply, self._wording.entry(query, stale, now), flight.keys[0], now - at)

    # ---- landing ---------------------------------------------------------------------------------------------------

    def _land(self, flight: _Flight, answer: Answer | bytes) -> None:
        """Give everybody the answer. One query's bug must not end the network of all guests."""
        if self._flights.get(flight.key) is not flight:
            return  # turned back in the same moment
        del self._flights[flight.key]
        flight.race = None
        try:
            if isinstance(answer, bytes):
                self._land_whole(flight, answer)
            else:
                self._land_reply(flight, answer)
        except Exception as error:
            self._on_bug(flight.query, error)
            for query, reply, _ in flight.waiting:
                self._deliver(query, reply, write_error(query.wire, SERVFAIL), "", 0.0)

    def _land_whole(self, flight: _Flight, answer: bytes) -> None:
        """An answer of our own, for a question that all of them put in the same way, but for the letters' case."""
        now = self._clock()
        for query, reply, at in flight.waiting:
            theirs = with_id(answer, message_id(query.wire))
            end = query.question.end
            if len(theirs) >= end and theirs[4:6] == b"\0\1":
                theirs = theirs[:12] + query.wire[12:end] + theirs[end:]
            self._deliver(query, reply, theirs, flight.keys[0], now - at)

    def _land_reply(self, flight: _Flight, answer: Answer) -> None:
        """What a server said, or that none did."""
        now = self._clock()
        found, query = answer.reply, flight.query
        if query.signed:
            wire = with_id(answer.wire, message_id(query.wire)) if answer.wire else write_error(query.wire, SERVFAIL)
            for asked, reply, at in flight.waiting:
                self._deliver(asked, reply, wire, answer.scope, now - at)
            return
        screened = self.rebind.screen(query.question, flight.scopes, answer)
        if screened is not answer:
            self._counters["dns_rebind_refused"] += 1
            answer, found = screened, screened.reply
        if found is not None and found.rcode not in (SERVFAIL, REFUSED):
            self._cache.keep(flight.keys, query, found, now)
            for asked, reply, at in flight.waiting:
                self._deliver(asked, reply, found.write(asked), answer.scope, now - at)
            return
        stale = flight.stale
        if stale is not None and now < stale.until + self._cache.max_stale:
            stale.stale_until = now + STALE_TTL
        else:
            stale = None
            self._cache.keep_failure(flight.keys, query, found, answer.ede, now)
        for asked, reply, at in flight.waiting:
            if stale is not None:
                wire = self._wording.entry(asked, stale, now)
            else:
                wire = self._wording.failure(asked, found, answer.ede, flight.keys, now)
            self._deliver(asked, reply, wire, answer.scope, now - at)


def _bug() -> Answer:
    return Answer(b"", None, "", "", ((EDE_OTHER, "internal error"),))
