"""Where answers come from: names that are known here, the cache, the host's nameservers, in this order.

Theory of operation
-------------------
    loop?  ->  local names  ->  mDNS, aliases  ->  cache  ->  servers of the scopes that the routing table names

Most queries are answered at once, by `known()`, which is a plain call without a task: local names and what the cache
has. Everything else is a *flight*: one task that asks the servers, for all guests that want to know the same, so that a
guest cannot have a server asked the same thing a thousand times, whose answer is then guessed (RFC 5452 5, the
"birthday attack"). When it lands, each who waits gets the answer in its own words; `resolve()` is told whom to call.

When the routing table changes, what the cache has of the scopes that changed is forgotten, and all failures; flights
that would take another way now are turned back and start again; the others go on (rules 33, 35, 50).

What the cache had is remembered as it left, for the same query again: see `query_log`. `remembered()` then costs one
look-up in place of all that, and what changes the cache or the local names ends it.

Nobody waits for ever: `upstream` gives up after 4.5 s, and the answer then is SERVFAIL, with the reason (RFC 8914).

"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from netstack.core.ports import Events
from netstack.dns.cache import STALE_TTL, Cache, Entry, Keys, flight_key
from netstack.dns.loops import LoopGuard
from netstack.dns.message import (
    CLASS_IN,
    EDE_CACHED,
    EDE_NETWORK,
    EDE_OTHER,
    EDE_STALE,
    EDE_STALE_NXDOMAIN,
    NOERROR,
    NXDOMAIN,
    RD,
    REFUSED,
    SERVFAIL,
    TYPE_A,
    TYPE_AAAA,
    Ede,
    Query,
    Question,
    message_id,
    parse_query,
    rcode_of,
    with_id,
    write_error,
)
from netstack.dns.query_log import Answers, Logged, QueryLog
from netstack.dns.race import Answer, Race
from netstack.dns.routes import RoutingTable, Scope
from netstack.dns.upstream import Upstream

# RFC 8767 5: after so long without an answer, an old one is better. Seconds.
_STALE_AFTER = 1.8

Reply = Callable[[bytes], None]


class LocalAnswers(Protocol):
    """Names that are known here."""

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer, or None for names of others."""
        ...


class Multicast(Protocol):
    """Names of the host's neighbors."""

    def claims(self, question: Question) -> bool: ...
    async def answer(self, query: bytes, question: Question, guest: object = None) -> bytes: ...


class Aliases(Protocol):
    """Names of ours that stand for names of others."""

    def target(self, question: Question) -> object | None: ...
    async def follow(self, query: bytes, question: Question, ask: Callable[[bytes], Awaitable[bytes]]) -> bytes: ...


@dataclass(slots=True, eq=False)
class _Flight:
    """A question that is on its way."""

    key: object
    query: Query
    scopes: tuple[Scope, ...]
    keys: Keys
    at: float
    waiting: list[tuple[Query, Reply, float]] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    turned_back: bool = False
    race: Race | None = None
    """Where somebody was asked already."""
    stale: Entry | None = None


class Resolver:
    """Answers queries. `local` are asked in their order; `clock` gives monotonic seconds."""

    def __init__(
        self,
        upstream: Upstream,
        local: Sequence[LocalAnswers] = (),
        *,
        table: RoutingTable | None = None,
        mdns: Multicast | None = None,
        aliases: Aliases | None = None,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_stale: float = 0.0,
        lenient_aaaa: bool = False,
    ) -> None:
        """With lenient_aaaa, a AAAA that nobody answers is "no such type" where the A is known (rule 14)."""
        self.upstream = upstream
        self.local = tuple(local)
        self.table = table if table is not None else RoutingTable()
        self.mdns = mdns
        self.aliases = aliases
        self.cache = Cache(max_stale)
        self.guard = LoopGuard(upstream, events)
        self.counters: Counter[str] = upstream.counters
        self.lenient_aaaa = lenient_aaaa
        self.local_version: Callable[[], int] = lambda: 0
        """Says when what `local` answers has changed: by another number."""
        self.queries = QueryLog()
        self._answers = Answers()
        self._hit: tuple[Query, float, Logged] | None = None
        """For which query known() found what in the cache: until when it may be said again in the same words."""
        self._events = events
        self._clock = clock
        self._keys: dict[int, Keys] = {}
        self._flights: dict[object, _Flight] = {}

    # ---- asking ----------------------------------------------------------------------------------------------------

    def remembered(self, wire: bytes, guest: bytes | str) -> bytes | None:
        """The answer to the bytes of a query, as it left lately. Untrusted."""
        now = self._clock()
        found = self._answers.find(wire, now, self.local_version())
        if found is None:
            return None
        answer, logged = found
        self.counters["dns_cache_hits"] += 1
        self.queries.add(logged._replace(at=now, guest=guest))
        return answer

    def remember(self, query: Query, answer: bytes) -> None:
        """The answer that known() just gave leaves in this form."""
        hit, self._hit = self._hit, None
        # Queries that the front turns away have answers too, but none of known().
        if hit is not None and hit[0] is query:
            _, until, logged = hit
            self._answers.keep(query.wire, answer, until, self.local_version(), logged)

    def known(self, query: Query) -> bytes | None:
        """The answer, where that needs nobody else; None where resolve() has to ask. Untrusted."""
        self._hit = None
        wire, question, *_ = query
        if self.guard.is_ours(question):
            return write_error(wire, REFUSED)
        for source in self.local:
            answer = source.answer(wire, question)
            if answer is not None:
                self.counters["dns_local"] += 1
                self._note(query, "local", answer, 0.0, cached=False)
                return answer
        if question.class_ != CLASS_IN:
            return self._refuse(query, "local", REFUSED)
        if self.mdns is not None and self.mdns.claims(question):
            return None
        if self.aliases is not None and self.aliases.target(question) is not None:
            return None
        scopes = self.table.route(question.labels)
        keys = self._keys_of(scopes)
        if not query.signed:
            now = self._clock()
            entry = self.cache.find(keys, query, now)
            if entry is not None:
                self.counters["dns_cache_hits"] += 1
                answer = self._write_entry(query, entry, now)
                route = keys[0] if keys else ""
                logged = self._note(query, route, answer, 0.0, cached=True)
                if not entry.failures and now < entry.until:
                    self._hit = query, min(entry.until, entry.at + entry.age(now) + 1), logged
                return answer
        if not query.flags & RD:
            # RFC 1034 4.3.1: not to be asked of others. What nobody knows here is nobody's business.
            return self._refuse(query, "local", REFUSED)
        if not scopes:
            return self._refuse(query, "", SERVFAIL, ((EDE_NETWORK, "no nameserver for this name"),))
        return None

    def resolve(self, query: Query, reply: Reply) -> None:
        """Find the answer to what is not known; `reply` is called with it, later. Untrusted."""
        question = query.question
        now = self._clock()
        scopes: tuple[Scope, ...] = ()
        keys: Keys
        if self.mdns is not None and self.mdns.claims(question):
            keys = ("mdns",)
        elif self.aliases is not None and self.aliases.target(question) is not None:
            keys = ("alias",)
        else:
            scopes = self.table.route(question.labels)
            keys = self._keys_of(scopes)
        # Answers of the first are given to the others as they are, where they are not a server's reply: so they differ
        # in nothing.
        same = flight_key(keys, query) if scopes else (flight_key(keys, query), query.opt, query.flags)
        key: object = object() if query.signed else same
        flight = self._flights.get(key)
        if flight is None:
            self.counters["dns_cache_misses"] += 1
            flight = _Flight(key, query, scopes, keys, now)
            flight.stale = self.cache.find_stale(keys, query, now) if scopes and not query.signed else None
            if scopes:
                flight.race = self.upstream.begin(query, scopes)
            self._flights[key] = flight
            self.upstream.nursery.start_soon(self._fly, flight)
        else:
            self.counters["dns_coalesced"] += 1
        flight.waiting.append((query, reply, now))

    async def ask(self, wire: bytes, *, tcp: bool = True, guest: str = "") -> bytes:
        """Answer the bytes of a query, of whatever length the answer is: for aliases and `netstack dns query`."""
        query = parse_query(wire, tcp=tcp, guest=guest)
        if not isinstance(query, Query):
            return write_error(wire, query or SERVFAIL)
        answer = self.known(query)
        if answer is not None:
            return answer
        answers: list[bytes] = []
        done = trio.Event()

        def on_reply(reply: bytes) -> None:
            answers.append(reply)
            done.set()

        self.resolve(query, on_reply)
        await done.wait()
        return answers[0]

    # ---- changes ---------------------------------------------------------------------------------------------------

    def set_table(self, table: RoutingTable) -> None:
        """Take another routing table: after a change of the host's network, or of the settings."""
        changed = self.table.changed_keys(table)
        self.table = table
        self._keys = {}
        self._answers.clear()
        self.cache.flush(scopes=changed, failures=True)
        self.upstream.retain(table.servers())
        self.guard.probe(table.servers())
        for flight in list(self._flights.values()):
            if flight.scopes and self.table.route(flight.query.question.labels) != flight.scopes:
                flight.turned_back = True
                flight.scope.cancel()

    def start(self) -> None:
        """Look whether servers lead back to us. Called once, in trio."""
        self.guard.enabled = True
        self.guard.probe(self.table.servers())

    def flush(self, *, scope: str | None = None, name: bytes | None = None) -> int:
        """Empty the cache: of a scope, of a name (as on the wire, in lower case), or all. Gives how many are gone."""
        self._answers.clear()
        return self.cache.flush(scopes=frozenset((scope,)) if scope is not None else None, name=name)

    # ---- flights ---------------------------------------------------------------------------------------------------

    async def _fly(self, flight: _Flight) -> None:
        try:
            answer = await self._find_out(flight)
        except Exception as error:
            # One query's bug must not end the network of all guests.
            self.counters["dns_failed"] += 1
            if self._events is not None:
                self._events.warning(
                    "dns_failed", "a DNS query failed", error=repr(error), query=flight.query.wire.hex()
                )
            answer = Answer(b"", None, "", "", ((EDE_OTHER, "internal error"),))
        if answer is None:
            return
        del self._flights[flight.key]
        self._land(flight, answer)

    async def _find_out(self, flight: _Flight) -> Answer | bytes | None:
        """Ask whoever knows. None when another flight has taken over who waits."""
        query = flight.query
        if flight.keys == ("mdns",) and self.mdns is not None:
            return await self.mdns.answer(query.wire, query.question, query.link)
        if flight.keys == ("alias",) and self.aliases is not None:
            return await self.aliases.follow(query.wire, query.question, self.ask)
        if flight.stale is not None:
            self.upstream.nursery.start_soon(self._give_stale, flight)
        while True:
            with flight.scope:
                race, flight.race = flight.race, None
                return await (race.run() if race is not None else self.upstream.ask(query, flight.scopes))
            # Turned back: the routing table is another one.
            del self._flights[flight.key]
            flight.scope, flight.turned_back = trio.CancelScope(), False
            flight.scopes = self.table.route(query.question.labels)
            flight.keys = self._keys_of(flight.scopes)
            if not query.signed:
                flight.key = flight_key(flight.keys, query)
            other = self._flights.get(flight.key)
            if other is not None:
                other.waiting += flight.waiting
                return None
            self._flights[flight.key] = flight

    def _land(self, flight: _Flight, answer: Answer | bytes) -> None:
        """Give everybody the answer."""
        now = self._clock()
        if isinstance(answer, bytes):
            for query, reply, at in flight.waiting:
                theirs = with_id(answer, message_id(query.wire))
                end = query.question.end
                if len(theirs) >= end and theirs[4:6] == b"\0\1":
                    theirs = theirs[:12] + query.wire[12:end] + theirs[end:]
                self._deliver(query, reply, theirs, flight.keys[0], now - at)
            return
        found, query = answer.reply, flight.query
        useful = found is not None and found.rcode not in (SERVFAIL, REFUSED)
        if query.signed:
            wire = with_id(answer.wire, message_id(query.wire)) if answer.wire else write_error(query.wire, SERVFAIL)
            for asked, reply, at in flight.waiting:
                self._deliver(asked, reply, wire, answer.scope, now - at)
            return
        if found is not None and useful:
            self.cache.keep(flight.keys, query, found, now)
            for asked, reply, at in flight.waiting:
                self._deliver(asked, reply, found.write(asked), answer.scope, now - at)
            return
        stale = flight.stale
        if stale is not None and now < stale.until + self.cache.max_stale:
            stale.stale_until = now + STALE_TTL
        else:
            stale = None
            self.cache.keep_failure(flight.keys, query, found, answer.ede, now)
        for asked, reply, at in flight.waiting:
            if stale is not None:
                wire = self._write_entry(asked, stale, now)
            else:
                wire = self._write_failure(asked, found, answer.ede, flight.keys, now)
            self._deliver(asked, reply, wire, answer.scope, now - at)

    async def _give_stale(self, flight: _Flight) -> None:
        """Those who wait have waited long enough; the flight goes on for the cache's sake (RFC 8767 5)."""
        await trio.sleep(_STALE_AFTER)
        now = self._clock()
        stale = flight.stale
        if self._flights.get(flight.key) is flight and stale is not None:
            stale.stale_until = now + STALE_TTL
            waiting, flight.waiting = flight.waiting, []
            for query, reply, at in waiting:
                self._deliver(query, reply, self._write_entry(query, stale, now), flight.keys[0], now - at)

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _write_entry(self, query: Query, entry: Entry, now: float) -> bytes:
        """The answer that the cache has."""
        if entry.failures:
            ede = (*entry.ede, (EDE_CACHED, f"failed {entry.age(now)} s ago"))
            return self._write_servfail(query, entry.reply, ede)
        assert entry.reply is not None  # only failures have none
        if now < entry.until:
            return entry.reply.write(query, entry.age(now))
        self.counters["dns_stale"] += 1
        code = EDE_STALE_NXDOMAIN if entry.reply.rcode == NXDOMAIN else EDE_STALE
        return entry.reply.write(query, stale_ttl=STALE_TTL, ede=((code, ""),))

    def _write_failure(self, query: Query, reply: Any, ede: tuple[Ede, ...], keys: Keys, now: float) -> bytes:
        question = query.question
        if self.lenient_aaaa and reply is None and question.type == TYPE_AAAA:
            twin = query._replace(question=question._replace(type=TYPE_A))
            entry = self.cache.find(keys, twin, now)
            if entry is not None and entry.reply is not None and entry.reply.positive:
                return write_error(query.wire, NOERROR, ede)
        return self._write_servfail(query, reply, ede)

    def _write_servfail(self, query: Query, reply: Any, ede: tuple[Ede, ...]) -> bytes:
        """Say that it failed: in the server's words, where it had some."""
        self.counters["dns_servfail"] += 1
        if reply is not None:
            return bytes(reply.write(query, ede=ede))
        return write_error(query.wire, SERVFAIL, ede)

    def _refuse(self, query: Query, route: str, rcode: int, ede: tuple[Ede, ...] = ()) -> bytes:
        if rcode == SERVFAIL:
            self.counters["dns_servfail"] += 1
        answer = write_error(query.wire, rcode, ede)
        self._note(query, route, answer, 0.0, cached=False)
        return answer

    def _deliver(self, query: Query, reply: Reply, answer: bytes, route: str, seconds: float) -> None:
        self._note(query, route, answer, seconds, cached=False)
        try:
            reply(answer)
        except Exception as error:
            self.counters["dns_failed"] += 1
            if self._events is not None:
                self._events.warning("dns_failed", "a DNS answer could not be sent", error=repr(error))

    def _keys_of(self, scopes: tuple[Scope, ...]) -> Keys:
        """The keys of scopes. A table gives the same tuples always, and hashing scopes costs more than all the rest."""
        keys = self._keys.get(id(scopes))
        if keys is None:
            keys = self._keys[id(scopes)] = tuple(scope.key for scope in scopes)
        return keys

    # ---- for people ------------------------------------------------------------------------------------------------

    def _note(self, query: Query, route: str, answer: bytes, seconds: float, *, cached: bool) -> Logged:
        question = query.question
        now, rcode = self._clock(), rcode_of(answer)
        logged = Logged(now, query.guest, question.labels, question.type, route, rcode, seconds, cached)
        self.queries.add(logged)
        return logged

    def log(self) -> list[tuple[float, str, str, int, str, int, float, bool]]:
        """The last queries, the newest first: (seconds ago, guest, name, type, route, rcode, ms, cached)."""
        return self.queries.recent(self._clock())

    def describe(self) -> dict[str, Any]:
        """The state for `GET /v1/dns`."""
        return {
            "cache": self.cache.describe(),
            "in_flight": len(self._flights),
            "servers": self.upstream.health.describe(trio.current_time()),
            "counters": dict(self.counters),
        }
