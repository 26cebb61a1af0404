"""Asking the scopes that the routing table named for a name, and whose word counts.

`ask` gets a query and the scopes that `routes` found for its name. Scopes are asked at the same time; the first that
has what was asked for wins, and if none has it, the mildest "no" does: no such type, no such name, cannot help. Once
one has said no, the others have two seconds to say yes. What goes on within a scope is a race: see `race`.

Here live what all queries share: sockets, connections, what is known of the servers, and the one task that tells the
races the time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import trio

from netstack.core.ports import Poller
from netstack.core.timers import Timers
from netstack.dns.health import HealthTable
from netstack.dns.message import EDE_NETWORK, NOERROR, NXDOMAIN, Query, parse_query, write_query
from netstack.dns.race import DEADLINE, Answer, Race
from netstack.dns.routes import USE_VC, Scope, Server
from netstack.dns.upstream_https import Https
from netstack.dns.upstream_system import System
from netstack.dns.upstream_tcp import Streams
from netstack.dns.upstream_udp import Datagrams

# Seconds that other scopes are waited for, once one has said no.
_OTHERS = 2.0


@dataclass(slots=True)
class Upstream:
    """Asks servers. Tasks and connections live in the nursery; clock is trio's."""

    nursery: trio.Nursery
    deadline: float = DEADLINE
    ca_file: str | None = None
    """Certificates to trust, in place of the host's."""
    system: System | None = None
    """Whom to ask where the host's nameservers are silent."""
    counters: Counter[str] = field(default_factory=Counter)
    health: HealthTable = field(default_factory=HealthTable)
    poller: Poller | None = None
    """Where the sockets of queries by UDP are watched."""
    on_bug: Callable[[Query, Exception], None] = lambda query, error: None
    """Told of what must not have happened."""
    stream_queries: int = 0
    """How many are on their way by other transports than UDP."""
    timers: Timers = field(init=False)
    datagrams: Datagrams = field(init=False)
    streams: Streams = field(init=False)
    https: Https = field(init=False)

    _earlier: trio.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.timers = Timers(self._on_earlier)
        self.datagrams = Datagrams(self.nursery, self.counters, self.poller)
        self.streams = Streams(self.nursery, self.counters, self.ca_file)
        self.https = Https(self.streams.tls_context)

    async def ask(self, query: Query | bytes, scopes: Sequence[Scope], *, tcp: bool | None = None) -> Answer:
        """Ask the scopes' servers; what nobody answers has an Answer too, without a reply.

        tcp says that TCP is to be preferred: without it, as the guest asked.
        """
        if not isinstance(query, Query):
            parsed = parse_query(query)
            if not isinstance(parsed, Query):
                raise ValueError("not a query")  # noqa: TRY004 - of no use, not of the wrong type
            query = parsed
        tcp = query.tcp if tcp is None else tcp
        if len(scopes) == 1:
            return await self._race(query, scopes[0], tcp)
        if not scopes:
            return Answer(b"", None, "", "", ((EDE_NETWORK, "no nameserver for this name"),))
        return await self._ask_all(query, scopes, tcp)

    def begin(self, query: Query, scope: Scope, done: Callable[[Answer], None], *, tcp: bool | None = None) -> Race:
        """Ask one scope, without a task: `done` gets the answer, at once or later."""
        race = Race(self, query, scope, query.tcp if tcp is None else tcp, done)
        race.begin()
        return race

    def wait(self, race: Race, at: float) -> None:
        """Have race.on_timer() called then."""
        if self._earlier is None:
            self._earlier = trio.Event()
            self.nursery.start_soon(self._keep_time)
        self.timers.arm(race, at)

    async def probe(self, query: Query, scope: Scope) -> None:
        """Send a query whose answer does not matter, as other queries of guests by UDP are sent."""
        wire = write_query(query, edns=False)
        for server in scope.servers:
            if server.transport == "tcp" or USE_VC in server.options:
                with contextlib.suppress(OSError):
                    await self.streams.ask(server._replace(transport="tcp"), wire, query.question)
                continue
            try:
                exchange = self.datagrams.ask(server, wire, query.question, lambda *_: None)
            except OSError:
                continue
            try:
                await trio.sleep(1.0)
            finally:
                self.datagrams.close(exchange)

    def retain(self, servers: Collection[Server]) -> None:
        """The host's network changed: forget what is known of other servers than these, and that these were dead."""
        self.health.retain(servers)
        self.streams.retain(servers)
        self.nursery.start_soon(self.https.retain, frozenset(servers))

    async def _keep_time(self) -> None:
        """Wake the races when they want to be."""
        try:
            while True:
                self._earlier = trio.Event()
                with trio.move_on_at(self.timers.next_deadline()):
                    await self._earlier.wait()
                self.timers.run(trio.current_time())
        finally:
            self.datagrams.end()

    def _on_earlier(self, deadline: float) -> None:
        del deadline
        if self._earlier is not None:
            self._earlier.set()

    async def _race(self, query: Query, scope: Scope, tcp: bool) -> Answer:
        """begin(), for who waits in a task."""
        answers: list[Answer] = []
        over = trio.Event()

        def on_answer(answer: Answer) -> None:
            answers.append(answer)
            over.set()

        race = self.begin(query, scope, on_answer, tcp=tcp)
        try:
            await over.wait()
        finally:
            race.stop()
        return answers[0]

    async def _ask_all(self, query: Query, scopes: Sequence[Scope], tcp: bool) -> Answer:
        """Ask several scopes at once; the first that has it wins."""
        answers: list[Answer] = []
        winner: Answer | None = None

        async def ask_one(scope: Scope) -> None:
            nonlocal winner
            answer = await self._race(query, scope, tcp)
            answers.append(answer)
            if answer.reply is not None and answer.reply.positive and winner is None:
                winner = answer
                nursery.cancel_scope.cancel()
            elif _mildness(answer) <= 1:
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + _OTHERS)

        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(ask_one, scope)
        return winner or min(answers, key=_mildness)


def _mildness(answer: Answer) -> int:
    """Of several who have not got it, whose word counts: the one with the least number."""
    reply = answer.reply
    if reply is None:
        return 9
    return {NOERROR: 0, NXDOMAIN: 1}.get(reply.rcode, 2)
