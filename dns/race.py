"""One query and the servers of one scope: who is asked when, and what comes back.

Theory of operation
-------------------
The servers are asked one after the other, but nobody is waited for: if an answer takes longer than it
should by what is known of the server, the next is asked as well, and the first useful answer counts. The next is
asked at once when a server says that it cannot help (SERVFAIL, REFUSED, NOTIMP, FORMERR), when its host says that
nobody listens (ICMP port unreachable), or when its connection fails. "No such name" is an answer. Servers that do not
answer are asked again, three times in all (RFC 9520 3.1); after 4.5 s it is over, half a second before the guest's
resolver gives up itself, so that it learns why.

    0.0 s   the first server            0.25 s  the second              (or four of its round trips, if that is less)
    1.0 s   those that are silent       2.5 s   once more               4.5 s   the end

By which transport: as the server's entry says; TCP where the guest used TCP (RFC 5625 4.4.1) or the host's settings say
so (use-vc), with UDP as a fallback for home routers without it. A truncated answer by UDP is fetched by TCP from the
same server; if that fails, it is the answer after all (RFC 7766 5). An OPT is always sent, our own (RFC 6891 6.1.1),
unless the server cannot read it: see `health`.

A query that was signed by the guest leaves as it is, ID apart.

A race is no task: ten thousand of them may be waiting for a server that is silent, and a task takes more memory than
all the rest. It is told of answers and errors by `Datagrams` or by the task of a stream, and of the time by `Upstream`;
`_advance` does what is due then, and says when it wants to be called next. `done` is called once, and that may be
before begin() returns.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import trio

from netstack.core.timers import NEVER
from netstack.dns.health import Health
from netstack.dns.message import (
    BADVERS,
    EDE_INVALID_DATA,
    EDE_NETWORK,
    EDE_NO_AUTHORITY,
    EDE_OTHER,
    FORMERR,
    NOERROR,
    NOTIMP,
    NXDOMAIN,
    TC,
    Ede,
    Query,
    flags_of,
    rcode_of,
    write_query,
)
from netstack.dns.replies import Reply, parse_reply
from netstack.dns.routes import HOST_RANK, OPPORTUNISTIC, TRUST_AD, USE_VC, Labels, Scope, Server
from netstack.dns.upstream_system import SYSTEM
from netstack.dns.upstream_udp import OUR_ERRORS, Exchange

if TYPE_CHECKING:
    from netstack.dns.upstream import Upstream

# Seconds. glibc and musl give up after 5 (RES_TIMEOUT), so that this is the last moment to say why.
DEADLINE = 4.5
# When each server's turn comes round: glibc waits 5 s, systemd-resolved 5 s for the first time.
_ROUNDS = (0.0, 1.0, 2.5)
# When the system's resolver is asked, if all of these are silent.
_SYSTEM = 1.5
# Until the next server is asked as well, at most. Tailscale's head start is twice that.
_STAGGER, _STAGGER_MIN = 0.25, 0.05
# By TCP, TLS and HTTPS at a time: these have a task each, 5 KiB, and guests can bring about as many as they may ask.
MAX_STREAM_QUERIES = 1024
_FEW = 8  # servers of one scope that are asked for one query

_UNREACHABLE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EINVAL, errno.ENODEV})


class Answer(NamedTuple):
    """What came of it."""

    wire: bytes
    """The reply's bytes as they came; empty when nobody answered."""
    reply: Reply | None
    scope: str
    """The key of the scope that answered."""
    server: str
    ede: tuple[Ede, ...] = ()
    """Why nobody answered, or nobody could help."""


@dataclass(slots=True, eq=False)
class _Attempt:
    """One try to ask one server."""

    race: Race
    server: Server
    health: Health
    transport: str
    edns: bool
    began_at: float
    exchange: Exchange | None = None
    scope: trio.CancelScope | None = None
    """Of the task, where it is not a datagram."""
    truncated: bytes = b""
    """What UDP said, which TCP is to complete."""
    after: _Attempt | None = None
    """The try that failed in a way that this one may mend: by UDP for TCP, without an OPT for one with."""

    def tell(self, answer: bytes | None, error: OSError | None) -> None:
        """Here is what came of it."""
        self.race.on_heard(self, answer, error)


class Race:
    """One query and the servers of one scope. `done` gets the answer."""

    __slots__ = (
        "_advancing", "_done", "_heard", "_plain", "_with_opt", "began_at", "fallback", "heap_at", "plan", "query",
        "running", "scope", "spent", "tcp", "timer_at", "upstream", "useless", "why",
    )  # fmt: skip

    def __init__(
        self, upstream: Upstream, query: Query, scope: Scope, tcp: bool, done: Callable[[Answer], None]
    ) -> None:
        self.upstream = upstream
        self.query = query
        self.scope = scope
        self.tcp = tcp
        self.began_at = trio.current_time()
        self.timer_at = self.heap_at = NEVER
        self.running: list[_Attempt] = []
        self.spent: list[Server] = []
        """Who will not be asked again: they said what they had to say."""
        self.useless: Answer | None = None
        self.fallback: tuple[_Attempt, bytes] | None = None
        self.why: list[Ede] = []
        servers = upstream.health.order(scope.servers, self.began_at)[:_FEW]
        self.plan = list(self._plan(servers))
        self._done: Callable[[Answer], None] | None = done
        self._with_opt = self._plain = b""
        self._heard: list[tuple[_Attempt, bytes | None, OSError | None]] = []
        self._advancing = False

    def begin(self) -> None:
        """Ask the first server."""
        self._advance(self.began_at)

    def stop(self) -> None:
        """Nobody wants to know any more: `done` is not called."""
        if self._done is not None:
            self._done = None
            self._clean(trio.current_time())

    def on_timer(self, now: float) -> None:
        """What was due at timer_at is."""
        self._advance(now)

    def on_heard(self, attempt: _Attempt, answer: bytes | None, error: OSError | None) -> None:
        """A try has come to its end. Untrusted."""
        attempt.exchange = None  # nothing may go round in circles: the collector of these seldom runs
        if attempt in self.running:
            self._heard.append((attempt, answer, error))
            if not self._advancing:
                self._advance(trio.current_time())

    def _advance(self, now: float) -> None:
        """Do what is due. A bug in it must not end the network of all guests."""
        self._advancing = True
        try:
            answer = self._step(now)
        except Exception as error:
            self.upstream.on_bug(self.query, error)
            answer = Answer(b"", None, self.scope.key, "", ((EDE_OTHER, "internal error"),))
        self._advancing = False
        done = self._done
        if answer is not None and done is not None:
            self._done = None
            self._clean(now)
            done(answer)

    def _step(self, now: float) -> Answer | None:
        """Look at what was heard, ask whose turn it is; give the answer, if that is settled now."""
        plan = self.plan
        end = self.began_at + self.upstream.deadline
        while True:
            eager = False
            while self._heard:
                attempt, reply, error = self._heard.pop(0)
                self.running.remove(attempt)
                answer = self._on_heard(attempt, reply, error, now)
                if answer is not None:
                    return answer
                eager = True
            if now >= end:
                return self._give_up()
            if eager:
                self._hurry(now)
            while plan and (plan[0][0] <= now or not self.running):
                # Nobody left to wait for: whoever is next is asked now.
                _, round_, server = plan.pop(0)
                # The system is no second opinion: it would hear the same.
                if server not in self.spent and (server is not SYSTEM or self.useless is None):
                    self._launch(server, now, again=round_ > 0)
            if self._heard:
                continue  # it failed at once
            if not self.running and not plan:
                return self._give_up()
            self.upstream.wait(self, min(plan[0][0], end) if plan else end)
            return None

    def _plan(self, servers: list[Server]) -> Iterator[tuple[float, int, Server]]:
        system = self.upstream.system
        question = self.query.question
        last = system is not None and _may_ask_system(self.scope, question.labels) and system.can_tell(question)
        dead = all(self.upstream.health.of(server).dead_until > self.began_at for server in servers)
        if last and servers and dead:
            yield self.began_at, 0, SYSTEM
        for round_, begin in enumerate(_ROUNDS):
            if last and servers and not dead and round_ == len(_ROUNDS) - 1:
                yield self.began_at + _SYSTEM, round_, SYSTEM
            at = self.began_at + begin
            for server in servers:
                yield at, round_, server
                health = self.upstream.health.of(server)
                usual = _STAGGER if health.round_trip is None else 4 * health.round_trip
                at += min(max(usual, _STAGGER_MIN), _STAGGER)

    def _hurry(self, now: float) -> None:
        """Somebody cannot help: bring the next who was not asked yet forward."""
        busy = {attempt.server for attempt in self.running}
        for index, (_, round_, server) in enumerate(self.plan):
            if round_ == 0 and server not in self.spent and server not in busy:
                del self.plan[index]
                self.plan.insert(0, (now, 0, server))
                return

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _launch(self, server: Server, now: float, *, again: bool) -> None:
        """Ask one server, once more if `again`."""
        health = self.upstream.health.of(server)
        transport: str = server.transport
        if transport == "tls" and OPPORTUNISTIC in server.options and health.clear_until > now:
            server, transport = _in_the_clear(server), "udp"
            health = self.upstream.health.of(server)
        if transport == "udp" and (self.tcp or USE_VC in server.options):
            transport = "tcp"
        # What was lost was perhaps lost because of its OPT: some middleboxes do that.
        edns = health.plain_until <= now and not (again and not health.speaks_edns)
        if transport != "udp" and any(a.server == server and a.transport == transport for a in self.running):
            return  # streams lose nothing: to ask a second time says nothing new
        self._start(_Attempt(self, server, health, transport, edns, now))

    def _start(self, attempt: _Attempt) -> None:
        if attempt.edns:
            wire = self._with_opt = self._with_opt or write_query(self.query, edns=True)
        else:
            wire = self._plain = self._plain or write_query(self.query, edns=False)
        attempt.health.queries += 1
        self.upstream.counters["dns_upstream_queries"] += 1
        self.running.append(attempt)
        if attempt.transport == "udp":
            try:
                attempt.exchange = self.upstream.datagrams.ask(attempt.server, wire, self.query.question, attempt.tell)
            except OSError as error:
                self.on_heard(attempt, None, error)
        elif self.upstream.stream_queries < MAX_STREAM_QUERIES:
            self.upstream.stream_queries += 1
            attempt.scope = trio.CancelScope()
            self.upstream.nursery.start_soon(self._ask_stream, attempt, wire, attempt.scope)
        else:
            self.on_heard(attempt, None, OSError(errno.EAGAIN, "too many queries by TCP at once"))

    async def _ask_stream(self, attempt: _Attempt, wire: bytes, scope: trio.CancelScope) -> None:
        ask = self.upstream.https.ask if attempt.transport == "https" else self.upstream.streams.ask
        if attempt.transport == "system" and self.upstream.system is not None:
            ask = self.upstream.system.ask
        server = attempt.server
        if attempt.transport == "tcp" and server.transport == "udp":
            server = server._replace(transport="tcp")
        with scope:
            try:
                attempt.tell(await ask(server, wire, self.query.question), None)
            except OSError as error:
                attempt.tell(None, error)
            except Exception as error:  # of a library: this task's end must not be that of the network
                attempt.tell(None, OSError(errno.EPROTO, repr(error)))
            finally:
                self.upstream.stream_queries -= 1

    # ---- what comes back -------------------------------------------------------------------------------------------

    def _on_heard(self, attempt: _Attempt, answer: bytes | None, error: OSError | None, now: float) -> Answer | None:
        """Give the answer, if this settles it. Untrusted."""
        if answer is None:
            self._on_error(attempt, error, now)
            return None
        health = attempt.health
        health.on_answer(now - attempt.began_at if attempt.transport == "udp" else None)
        rcode = rcode_of(answer)
        if rcode in (FORMERR, NOTIMP) and attempt.edns and not self.query.signed:
            self._start(_Attempt(self, attempt.server, health, attempt.transport, False, now, after=attempt))
            return None
        if flags_of(answer) & TC and attempt.transport == "udp":
            self.fallback = self.fallback or (attempt, answer)
            self._start(_Attempt(self, attempt.server, health, "tcp", attempt.edns, now, truncated=answer))
            return None
        reply = parse_reply(answer, self.query.question, trust_ad=_trusts(attempt.server))
        if reply is None:
            self._say(attempt, "an answer that cannot be read", EDE_INVALID_DATA)
            self.spent.append(attempt.server)
            return None
        if reply.rcode == BADVERS and attempt.edns and not self.query.signed:
            self._start(_Attempt(self, attempt.server, health, attempt.transport, False, now, after=attempt))
            return None
        self._learn_edns(attempt, rcode, now)
        found = Answer(answer, reply, self.scope.key, str(attempt.server), reply.ede)
        if reply.rcode in (NOERROR, NXDOMAIN):
            return found
        self.spent.append(attempt.server)
        self.useless = self.useless or found
        return None

    def _learn_edns(self, attempt: _Attempt, rcode: int, now: float) -> None:
        health = attempt.health
        if attempt.edns:
            health.on_edns()
        elif attempt.after is not None and attempt.after.edns and rcode not in (FORMERR, NOTIMP):
            health.on_no_edns(now, sure=True)
        elif not health.speaks_edns and any(a.server == attempt.server and a.edns for a in self.running):
            health.on_no_edns(now, sure=False)

    def _on_error(self, attempt: _Attempt, error: OSError | None, now: float) -> None:
        """A try failed before there was an answer."""
        code = error.errno if error is not None else None
        self._say(attempt, (error.strerror if error is not None else None) or str(error), EDE_NETWORK)
        server, health = attempt.server, attempt.health
        if attempt.transport == "tcp" and server.transport == "udp" and USE_VC not in server.options:
            if attempt.truncated:
                self.spent.append(server)  # what it said by UDP is all that it says
                return
            # There are nameservers without TCP, in home routers above all. What they say by UDP says itself whether it
            # is all.
            self._start(_Attempt(self, server, health, "udp", attempt.edns, now, after=attempt))
        elif attempt.transport == "tls" and OPPORTUNISTIC in server.options:
            health.on_no_tls(now)
            clear = _in_the_clear(server)
            self._start(_Attempt(self, clear, self.upstream.health.of(clear), "udp", attempt.edns, now, after=attempt))
        elif code not in OUR_ERRORS:
            self.spent.append(server)
            if code in _UNREACHABLE or attempt.transport != "udp":
                health.on_dead(now)

    def _say(self, attempt: _Attempt, what: str, code: int) -> None:
        if len(self.why) < 3:
            self.why.append((code, f"{attempt.server}: {what}"))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _clean(self, now: float) -> None:
        """Stop what still runs; who has had its time without an answer has missed it."""
        self.upstream.timers.cancel(self)
        silent = set()
        for attempt in self.running:
            health = attempt.health
            patience = _STAGGER if health.round_trip is None else max(4 * health.round_trip, _STAGGER)
            if now - attempt.began_at >= patience and attempt.server not in silent:
                silent.add(attempt.server)
                health.on_miss(now)
            if attempt.exchange is not None:
                self.upstream.datagrams.close(attempt.exchange)
                attempt.exchange = None
            if attempt.scope is not None:
                attempt.scope.cancel()
        self.running = []
        self.fallback = None

    def _give_up(self) -> Answer:
        if self.fallback is not None:
            attempt, answer = self.fallback
            reply = parse_reply(answer, self.query.question, trust_ad=_trusts(attempt.server))
            if reply is not None:
                return Answer(answer, reply, self.scope.key, str(attempt.server))
        if self.useless is not None:
            return self.useless._replace(ede=self.useless.ede or tuple(self.why))
        if any(attempt.server not in self.spent for attempt in self.running):
            servers = ", ".join(dict.fromkeys(str(attempt.server) for attempt in self.running))
            self.why.insert(0, (EDE_NO_AUTHORITY, f"{servers}: timed out"))
        elif not self.why:
            self.why.append((EDE_NETWORK, "no nameserver for this name"))
        return Answer(b"", None, self.scope.key, "", tuple(self.why))


def _may_ask_system(scope: Scope, labels: Labels) -> bool:
    """Whether the system's resolver may be asked in place of a scope's servers.

    Whom it asks is not ours to say. Of names that a scope claims, a VPN's above all, it may tell the home router, or
    ask for them by mDNS as those in .local, and then have its "no such name" stand for that of the silent servers.
    """
    if scope.rank < HOST_RANK or labels[-1:] == (b"local",):
        return False
    return scope.system or not scope.claims(labels)


def _in_the_clear(server: Server) -> Server:
    return server._replace(transport="udp", port=53, name="")


def _trusts(server: Server) -> bool:
    """Whether its AD bit is worth passing on: the host's settings say so, or nobody can have changed it on the way."""
    if TRUST_AD in server.options:
        return True
    return server.transport in ("tls", "https") and OPPORTUNISTIC not in server.options
