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
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import trio

from netstack.dns.health import Health
from netstack.dns.message import (
    BADVERS,
    EDE_INVALID_DATA,
    EDE_NETWORK,
    EDE_NO_AUTHORITY,
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


@dataclass(slots=True)
class _Heard:
    """Something happened to one of the tries."""

    attempt: _Attempt
    answer: bytes | None
    error: OSError | None


@dataclass(slots=True, eq=False)
class _Attempt:
    """One try to ask one server."""

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


class Race:
    """One query and the servers of one scope."""

    def __init__(self, upstream: Upstream, query: Query, scope: Scope, tcp: bool) -> None:
        self.upstream = upstream
        self.query = query
        self.scope = scope
        self.tcp = tcp
        self.began_at = trio.current_time()
        self.wires: dict[bool, bytes] = {}
        self.running: list[_Attempt] = []
        self.heard: deque[_Heard] = deque()
        self.wake = trio.Event()
        self.spent: set[Server] = set()
        """Who will not be asked again: they said what they had to say."""
        self.useless: Answer | None = None
        self.fallback: tuple[_Attempt, bytes] | None = None
        self.why: list[Ede] = []
        servers = upstream.health.order(scope.servers, self.began_at)[:_FEW]
        self.plan = deque(self._plan(servers))

    def begin(self) -> None:
        """Ask the first server at once, before there is a task: that is 0.1 ms. run() must follow."""
        if self.plan:
            self._launch(self.plan.popleft()[2], self.began_at, again=False)

    async def run(self) -> Answer:
        upstream = self.upstream
        plan = self.plan
        end = self.began_at + upstream.deadline
        now = self.began_at
        try:
            while True:
                while plan and (plan[0][0] <= now or not self.running):
                    # Nobody left to wait for: whoever is next is asked now.
                    _, round_, server = plan.popleft()
                    # The system is no second opinion: it would hear the same.
                    if server not in self.spent and (server is not SYSTEM or self.useless is None):
                        self._launch(server, now, again=round_ > 0)
                if not self.running and not plan:
                    break
                if not self.heard:
                    with trio.move_on_at(min(plan[0][0], end) if plan else end):
                        await self.wake.wait()
                    self.wake = trio.Event()
                now = trio.current_time()
                eager = False
                while self.heard:
                    answer = self._on_heard(self.heard.popleft(), now)
                    if answer is not None:
                        return answer
                    eager = True
                if now >= end:
                    break
                if eager:
                    self._hurry(plan, now)
        finally:
            self._clean(trio.current_time())
        return self._give_up()

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

    def _hurry(self, plan: deque[tuple[float, int, Server]], now: float) -> None:
        """Somebody cannot help: bring the next who was not asked yet forward."""
        busy = {attempt.server for attempt in self.running}
        for index, (_, round_, server) in enumerate(plan):
            if round_ == 0 and server not in self.spent and server not in busy:
                del plan[index]
                plan.appendleft((now, 0, server))
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
        self._start(_Attempt(server, health, transport, edns, now), now)

    def _start(self, attempt: _Attempt, now: float) -> None:
        wire = self.wires.get(attempt.edns)
        if wire is None:
            wire = self.wires[attempt.edns] = write_query(self.query, edns=attempt.edns)
        attempt.health.queries += 1
        self.upstream.counters["dns_upstream_queries"] += 1
        self.running.append(attempt)
        if attempt.transport == "udp":
            try:
                attempt.exchange = self.upstream.datagrams.ask(
                    attempt.server, wire, self.query.question, self._teller(attempt), now
                )
            except OSError as error:
                self._tell(attempt, None, error)
        else:
            attempt.scope = trio.CancelScope()
            self.upstream.nursery.start_soon(self._ask_stream, attempt, wire, attempt.scope)

    async def _ask_stream(self, attempt: _Attempt, wire: bytes, scope: trio.CancelScope) -> None:
        ask = self.upstream.https.ask if attempt.transport == "https" else self.upstream.streams.ask
        if attempt.transport == "system" and self.upstream.system is not None:
            ask = self.upstream.system.ask
        server = attempt.server
        if attempt.transport == "tcp" and server.transport == "udp":
            server = server._replace(transport="tcp")
        with scope:
            try:
                self._tell(attempt, await ask(server, wire, self.query.question), None)
            except OSError as error:
                self._tell(attempt, None, error)
            except Exception as error:  # of a library: this task's end must not be that of the network
                self._tell(attempt, None, OSError(errno.EPROTO, repr(error)))

    def _teller(self, attempt: _Attempt) -> Callable[[bytes | None, OSError | None], None]:
        return lambda answer, error: self._tell(attempt, answer, error)

    def _tell(self, attempt: _Attempt, answer: bytes | None, error: OSError | None) -> None:
        self.heard.append(_Heard(attempt, answer, error))
        self.wake.set()

    # ---- what comes back -------------------------------------------------------------------------------------------

    def _on_heard(self, heard: _Heard, now: float) -> Answer | None:
        """Give the answer, if this settles it. Untrusted."""
        attempt = heard.attempt
        if attempt not in self.running:
            return None
        self.running.remove(attempt)
        if heard.answer is None:
            self._on_error(attempt, heard.error, now)
            return None
        answer = heard.answer
        health = attempt.health
        health.on_answer(now - attempt.began_at if attempt.transport == "udp" else None)
        rcode = rcode_of(answer)
        if rcode in (FORMERR, NOTIMP) and attempt.edns and not self.query.signed:
            self._start(_Attempt(attempt.server, health, attempt.transport, False, now, after=attempt), now)
            return None
        if flags_of(answer) & TC and attempt.transport == "udp":
            self.fallback = self.fallback or (attempt, answer)
            self._start(_Attempt(attempt.server, health, "tcp", attempt.edns, now, truncated=answer), now)
            return None
        reply = parse_reply(answer, self.query.question, trust_ad=_trusts(attempt.server))
        if reply is None:
            self._say(attempt, "an answer that cannot be read", EDE_INVALID_DATA)
            self.spent.add(attempt.server)
            return None
        if reply.rcode == BADVERS and attempt.edns and not self.query.signed:
            self._start(_Attempt(attempt.server, health, attempt.transport, False, now, after=attempt), now)
            return None
        self._learn_edns(attempt, rcode, now)
        found = Answer(answer, reply, self.scope.key, str(attempt.server), reply.ede)
        if reply.rcode in (NOERROR, NXDOMAIN):
            return found
        self.spent.add(attempt.server)
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
                self.spent.add(server)  # what it said by UDP is all that it says
                return
            # There are nameservers without TCP, in home routers above all. What they say by UDP says itself whether it
            # is all.
            self._start(_Attempt(server, health, "udp", attempt.edns, now, after=attempt), now)
        elif attempt.transport == "tls" and OPPORTUNISTIC in server.options:
            health.on_no_tls(now)
            clear = _in_the_clear(server)
            self._start(_Attempt(clear, self.upstream.health.of(clear), "udp", attempt.edns, now, after=attempt), now)
        elif code not in OUR_ERRORS:
            self.spent.add(server)
            if code in _UNREACHABLE or attempt.transport != "udp":
                health.on_dead(now)

    def _say(self, attempt: _Attempt, what: str, code: int) -> None:
        if len(self.why) < 3:
            self.why.append((code, f"{attempt.server}: {what}"))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _clean(self, now: float) -> None:
        """Stop what still runs; who has had its time without an answer has missed it."""
        silent = set()
        for attempt in self.running:
            health = attempt.health
            patience = _STAGGER if health.round_trip is None else max(4 * health.round_trip, _STAGGER)
            if now - attempt.began_at >= patience and attempt.server not in silent:
                silent.add(attempt.server)
                health.on_miss(now)
            if attempt.exchange is not None:
                self.upstream.datagrams.close(attempt.exchange)
            if attempt.scope is not None:
                attempt.scope.cancel()

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
