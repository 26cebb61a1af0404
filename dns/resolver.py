"""Where answers come from: names that are known here, the cache, the host's nameservers, in this order.

Theory of operation
-------------------
    loop?  ->  local names  ->  mDNS, aliases  ->  cache  ->  servers of the scopes that the routing table names

Most queries are answered at once, by `known()`, which is a plain call without a task: local names and what the cache
has. Everything else becomes a flight (`netstack.dns.flights`): one question to the servers for all guests that want to
know the same; `resolve()` is told whom to call.

When the routing table changes, what the cache has of the scopes that changed is forgotten, and all failures; questions
that would take another way now start again (rules 33, 35, 50).

What the cache had is remembered as it left, for the same query again: see `query_log`. `remembered()` then costs one
look-up in place of all that, and what changes the cache or the local names ends it.

Nobody waits for ever: `upstream` gives up after 4.5 s, and the answer then is SERVFAIL, with the reason (RFC 8914).

"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import trio

from netstack.core.ports import Events
from netstack.dns.cache import Cache, Keys
from netstack.dns.dns64 import Dns64
from netstack.dns.flights import Flights, Reply
from netstack.dns.loops import LoopGuard
from netstack.dns.message import (
    CLASS_IN,
    EDE_NETWORK,
    RD,
    REFUSED,
    SERVFAIL,
    Ede,
    Query,
    Question,
    parse_query,
    rcode_of,
    write_error,
)
from netstack.dns.query_log import Answers, Logged, QueryLog
from netstack.dns.routes import RoutingTable, Scope
from netstack.dns.upstream import Upstream
from netstack.dns.wording import Wording

# RFC 8767 5: after so long without an answer, an old one is better. Seconds.
_STALE_AFTER = 1.8


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
        self.wording = Wording(self.cache, self.counters, lenient_aaaa=lenient_aaaa)
        self.local_version: Callable[[], int] = lambda: 0
        """Says when what `local` answers has changed: by another number."""
        self.dns64: Dns64 | None = None
        self.queries = QueryLog()
        self._answers = Answers()
        self._hit: tuple[Query, float, Logged] | None = None
        """For which query known() found what in the cache: until when it may be said again in the same words."""
        self._events = events
        self._clock = clock
        self._keys: dict[int, Keys] = {}
        upstream.on_bug = self._on_bug
        self.flights = Flights(upstream, self.cache, self.wording, self._route, self._deliver, self._on_bug, clock)

    # ---- asking ----------------------------------------------------------------------------------------------------

    def remembered(self, wire: bytes, guest: bytes | str) -> bytes | None:
        """The answer to the bytes of a query, as it left lately. Untrusted."""
        now = self._clock()
        found = self._answers.find(wire, now, self.local_version())
        if found is None:
            return None
        answer, logged = found
        self.counters["dns_cache_hits"] += 1
        self.queries.add_again(logged, now, guest)
        return answer

    def remember(self, query: Query, answer: bytes) -> None:
        """The answer that known() just gave leaves in this form."""
        hit, self._hit = self._hit, None
        # Queries that the front turns away have answers too, but none of known().
        if hit is not None and hit[0] is query:
            _, until, logged = hit
            self._answers.keep(query.wire, answer, until, self.local_version(), logged)

    def known(self, query: Query, *, plain: bool = False) -> bytes | None:
        """The answer, where that needs nobody else; None where resolve() has to ask. Untrusted.

        plain: as the nameservers have it, without DNS64.
        """
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
        if self.dns64 is not None and not plain and self.dns64.wants(query):
            return None
        scopes = self.table.route(question.labels)
        keys = self._keys_of(scopes)
        if not query.signed:
            now = self._clock()
            entry = self.cache.find(keys, query, now)
            if entry is not None:
                self.counters["dns_cache_hits"] += 1
                answer = self.wording.entry(query, entry, now)
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

    def resolve(self, query: Query, reply: Reply, *, plain: bool = False) -> None:
        """Find the answer to what is not known; `reply` is called with it, now or later. Untrusted."""
        question = query.question
        if self.mdns is not None and self.mdns.claims(question):
            self.flights.join(query, reply, ("mdns", self._ask_neighbors))
        elif self.aliases is not None and self.aliases.target(question) is not None:
            self.flights.join(query, reply, ("alias", self._follow_alias))
        elif self.dns64 is not None and not plain and self.dns64.wants(query):
            ask = partial(self.ask, tcp=query.tcp, plain=True)
            self.flights.join(query, reply, ("dns64", partial(self.dns64.answer, ask=ask)))
        else:
            self.flights.join(query, reply)

    async def ask(self, wire: bytes, *, tcp: bool = True, guest: str = "", plain: bool = False) -> bytes:
        """Answer the bytes of a query, of whatever length the answer is: for aliases and `netstack dns query`."""
        query = parse_query(wire, tcp=tcp, guest=guest)
        if not isinstance(query, Query):
            return write_error(wire, query or SERVFAIL)
        answer = self.known(query, plain=plain)
        if answer is not None:
            return answer
        answers: list[bytes] = []
        done = trio.Event()

        def on_reply(reply: bytes) -> None:
            answers.append(reply)
            done.set()

        self.resolve(query, on_reply, plain=plain)
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
        self.flights.reroute(table)

    def start(self) -> None:
        """Look whether servers lead back to us. Called once, in trio."""
        self.guard.enabled = True
        self.guard.probe(self.table.servers())

    def flush(self, *, scope: str | None = None, name: bytes | None = None) -> int:
        """Empty the cache: of a scope, of a name (as on the wire, in lower case), or all. Gives how many are gone."""
        self._answers.clear()
        return self.cache.flush(scopes=frozenset((scope,)) if scope is not None else None, name=name)

    # ---- answers ---------------------------------------------------------------------------------------------------

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

    def _on_bug(self, query: Query, error: Exception) -> None:
        """One query's bug must not end the network of all guests."""
        self.counters["dns_failed"] += 1
        if self._events is not None:
            self._events.warning("dns_failed", "a DNS query failed", error=repr(error), query=query.wire.hex())

    async def _ask_neighbors(self, query: Query) -> bytes:
        assert self.mdns is not None  # it claimed the name
        return await self.mdns.answer(query.wire, query.question, query.link)

    async def _follow_alias(self, query: Query) -> bytes:
        assert self.aliases is not None  # it has a target for the name
        return await self.aliases.follow(query.wire, query.question, self.ask)

    def _route(self, query: Query) -> tuple[tuple[Scope, ...], Keys]:
        scopes = self.table.route(query.question.labels)
        return scopes, self._keys_of(scopes)

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
            "in_flight": len(self.flights),
            "servers": self.upstream.health.describe(trio.current_time()),
            "counters": dict(self.counters),
        }
