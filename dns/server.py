"""The gateway's DNS service: queries come in from guests by UDP and TCP, answers go back.

Theory of operation
-------------------
This front knows nothing about where answers come from: it has a Resolver, which has two verbs. `known` gives what can
be answered at once, from local names and the cache; that is most of it, and takes no task, no wait and no bookkeeping:
a datagram is answered within the call that brought it, and leaves with everything else that the guest's batch of frames
brings about. `resolve` finds out the rest, and calls back. What was answered in the same second already is `remembered`
by its bytes, and the stack asks for that before it makes a Datagram (`core.udp_services`).

What the front does itself is to turn away what is no query, to keep the number of queries in flight within bounds, to
hold answers by UDP to the size that the guest takes, and to speak TCP, where answers leave in the order in which they
are ready (RFC 7766 6.2.1.1).

Bounds: queries in flight for each guest, and in all; beyond that the answer is SERVFAIL, at once, with an extended
error that says so, so that the guest's resolver tries again later and holds nothing here. One by UDP costs some 3 KiB;
one by TCP may have an answer of 64 KiB that waits for the guest to read, so of these there are fewer. TCP connections
for each guest and in all; beyond that they are closed. A guest that does not read its answers holds its own queries up,
and after a while its connection is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from netstack.core.ports import Datagram, Events, Link
from netstack.dns.message import (
    EDE_OTHER,
    FORMERR,
    HEADER_LENGTH,
    REFUSED,
    SERVFAIL,
    TYPE_AXFR,
    TYPE_IXFR,
    Query,
    parse_query,
    udp_limit,
    write_error,
)
from netstack.dns.replies import truncate

PORT = 53

# A guest may be a resolver for many others, and ask for ten thousand names while a server is silent. What one has left
# is for the others. [limits] may say otherwise.
MAX_QUERIES_OF_GUEST = 10_000
MAX_QUERIES = 16_384
MAX_TCP_QUERIES_OF_GUEST = 256
MAX_TCP_QUERIES = 1024

MAX_CONNECTIONS_OF_GUEST = 32
MAX_CONNECTIONS = 128

# RFC 7766 6.2.3 leaves it to the server; knot and unbound are of this order. Seconds.
IDLE_TIMEOUT = 20.0
WRITE_TIMEOUT = 20.0

# The longest query that is taken by TCP. Real ones are under 600 bytes; the peers' bound.
MAX_TCP_QUERY = 4096

# The longest answer that has room behind the two bytes of its length (RFC 1035 4.2.2).
MAX_TCP_ANSWER = 65535

# Queries of one chunk that are answered before others get a turn: some 600 fit into one.
_QUERIES_AT_ONCE = 16


class Resolver(Protocol):
    """Where answers come from. They may be of any length: the front truncates them for UDP."""

    def remembered(self, wire: bytes, guest: bytes | str) -> bytes | None:
        """The answer to the bytes of a datagram, if that was given lately."""
        ...

    def remember(self, query: Query, answer: bytes) -> None:
        """What known() said leaves in this form: an answer that fits."""
        ...

    def known(self, query: Query) -> bytes | None:
        """The answer to a query, if that takes no time; else None."""
        ...

    def resolve(self, query: Query, reply: Callable[[bytes], None]) -> None:
        """Find the answer, and call `reply` with it, once, now or later. No answer is one too: SERVFAIL."""
        ...


@dataclass(slots=True)
class _Quota:
    """How many of something are in use, by each and by all."""

    of_each: int
    of_all: int
    used: Counter[object] = field(default_factory=Counter)
    total: int = 0

    def take(self, who: object) -> bool:
        if self.total >= self.of_all or self.used[who] >= self.of_each:
            # Counter's look-up leaves no entry behind, so strangers cost nothing.
            return False
        self.used[who] += 1
        self.total += 1
        return True

    def give_back(self, who: object) -> None:
        self.total -= 1
        self.used[who] -= 1
        if not self.used[who]:
            del self.used[who]


class DnsServer:
    """The front of the DNS service.

    reply(datagram, answer) sends an answer back to where a datagram came from, from the address that it was sent to.
    """

    def __init__(
        self,
        resolver: Resolver,
        nursery: trio.Nursery,
        reply: Callable[[Datagram, bytes], None],
        *,
        flush: Callable[[Link], None] = lambda link: None,
        events: Events | None = None,
    ) -> None:
        """`flush` is called for the link of an answer that leaves later than within the call that brought its query."""
        self.resolver = resolver
        self.counters: Counter[str] = Counter()
        self.queries = _Quota(MAX_QUERIES_OF_GUEST, MAX_QUERIES)
        self.tcp_queries = _Quota(MAX_TCP_QUERIES_OF_GUEST, MAX_TCP_QUERIES)
        self.connections = _Quota(MAX_CONNECTIONS_OF_GUEST, MAX_CONNECTIONS)
        self._nursery = nursery
        self._reply = reply
        self._flush = flush
        self._events = events

    def answer_again(self, wire: bytes, guest: bytes) -> bytes | None:
        """The answer to a datagram, where it was given lately: the stack's short way. Untrusted.

        What there is None for goes to on_datagram().
        """
        try:
            answer = self.resolver.remembered(wire, guest)
        except Exception:  # a bug: let the longer way report it
            return None
        if answer is not None:
            self.counters["dns_udp_queries"] += 1
        return answer

    def on_datagram(self, datagram: Datagram, now: float) -> None:
        """Take a datagram from a guest to port 53. Untrusted. The answer goes out now or later."""
        self.counters["dns_udp_queries"] += 1
        wire = bytes(datagram.payload)
        query = parse_query(wire, guest=datagram.src)
        answer = self._begin(query, wire)
        if answer is None:
            assert isinstance(query, Query)  # anything else was answered
            refusal = self._admit(self.queries, datagram.link, query)
            if not refusal:
                query = query._replace(link=datagram.link)
                self._resolve(query, partial(self._on_answer, datagram, query))
                return
            answer = refusal
        if answer:
            if isinstance(query, Query):
                answer = _fit(self, query, answer)
                self.resolver.remember(query, answer)
            self._reply(datagram, answer)

    async def serve_stream(self, stream: trio.abc.Stream, guest: object, address: bytes | str = "") -> None:
        """Serve one TCP connection until it ends. Untrusted.

        guest is whatever tells guests apart, for the bounds; address is for the log.
        """
        async with stream:
            if not self.connections.take(guest):
                self.counters["dns_tcp_refused"] += 1
                return
            try:
                await _Connection(self, stream, guest, address).serve()
            finally:
                self.connections.give_back(guest)

    def _begin(self, query: Query | int | None, wire: bytes) -> bytes | None:
        """Give the answer that can be given at once, empty for silence; None where the resolver has to find out."""
        if query is None:
            self.counters["dns_malformed"] += 1
            return b""
        if isinstance(query, int):
            self.counters["dns_malformed" if query == FORMERR else "dns_refused"] += 1
            return write_error(wire, query)
        if query.question.type in (TYPE_AXFR, TYPE_IXFR):
            self.counters["dns_refused"] += 1
            return write_error(wire, REFUSED)
        try:
            return self.resolver.known(query)
        except Exception as error:
            return self._on_bug(query, error)

    def _resolve(self, query: Query, reply: Callable[[bytes], None]) -> None:
        """Have the resolver find out."""
        try:
            self.resolver.resolve(query, reply)
        except Exception as error:
            reply(self._on_bug(query, error))

    def _on_bug(self, query: Query, error: Exception) -> bytes:
        """One query's bug must not end the network of all guests."""
        self.counters["dns_failed"] += 1
        if self._events is not None:
            self._events.warning("dns_failed", "a DNS query failed", error=repr(error), query=query.wire.hex())
        return write_error(query.wire, SERVFAIL)

    def _admit(self, quota: _Quota, guest: object, query: Query) -> bytes:
        """Count one more in flight; empty where that is allowed, else what to answer."""
        if quota.take(guest):
            return b""
        self.counters["dns_too_many"] += 1
        whose, limit = ("this guest", quota.of_each) if quota.total < quota.of_all else ("all guests", quota.of_all)
        words = f"too many queries at once: {limit} of {whose} are in flight"
        if self._events is not None:
            self._events.warning("dns_too_many", "too many DNS queries at once: answering SERVFAIL", limit=limit)
        return write_error(query.wire, SERVFAIL, ((EDE_OTHER, words),))

    def _on_answer(self, datagram: Datagram, query: Query, answer: bytes) -> None:
        """The resolver has found out."""
        self.queries.give_back(datagram.link)
        self._reply(datagram, _fit(self, query, answer))
        self._flush(datagram.link)


def _fit(server: DnsServer, query: Query, answer: bytes) -> bytes:
    """Hold an answer to the size that the guest takes by UDP."""
    if len(answer) <= 512 or len(answer) <= (limit := udp_limit(query.opt)):
        return answer
    server.counters["dns_truncated"] += 1
    return truncate(answer, query, limit)


class _Connection:
    """One guest's TCP connection."""

    def __init__(self, server: DnsServer, stream: trio.abc.Stream, guest: object, address: bytes | str) -> None:
        self._server = server
        self._stream = stream
        self._guest = guest
        self._address = address
        self._sending = trio.Lock()
        self._broken = False
        self._over = False
        self._in_flight = 0
        self._idle = trio.Event()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            try:
                await self._read_queries(nursery)
                # The guest has closed its half, maybe only that: what it asked is answered before ours is closed.
                while self._in_flight:
                    self._idle = trio.Event()
                    await self._idle.wait()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                nursery.cancel_scope.cancel()
            finally:
                self._over = True

    async def _read_queries(self, nursery: trio.Nursery) -> None:
        received = bytearray()
        while True:
            chunk: bytes | bytearray = b""
            with trio.move_on_after(IDLE_TIMEOUT) as patience:
                chunk = await self._stream.receive_some(65536)
            if patience.cancelled_caught:
                if self._in_flight:
                    continue
                return
            if not chunk:
                return
            received += chunk
            count = 0
            while len(received) >= 2:
                length = int.from_bytes(received[:2], "big")
                if not HEADER_LENGTH <= length <= MAX_TCP_QUERY:
                    self._server.counters["dns_malformed"] += 1
                    return
                if len(received) < 2 + length:
                    break
                wire = bytes(received[2 : 2 + length])
                del received[: 2 + length]
                await self._on_query(wire, nursery)
                count += 1
                if not count % _QUERIES_AT_ONCE:
                    await trio.lowlevel.checkpoint()

    async def _on_query(self, wire: bytes, nursery: trio.Nursery) -> None:
        """Untrusted."""
        server = self._server
        server.counters["dns_tcp_queries"] += 1
        query = parse_query(wire, tcp=True, guest=self._address)
        answer = server._begin(query, wire)
        if answer is None:
            assert isinstance(query, Query)  # anything else was answered
            refusal = server._admit(server.tcp_queries, self._guest, query)
            if not refusal:
                self._in_flight += 1
                query = query._replace(link=self._guest)
                server._resolve(query, partial(self._on_answer, nursery, query))
                return
            answer = refusal
        if answer:
            # Sent from here: a guest that asks without reading is not read from either.
            await self._send(answer, query)

    def _on_answer(self, nursery: trio.Nursery, query: Query, answer: bytes) -> None:
        """The resolver has found out; the guest may have gone meanwhile."""
        if self._over:
            self._finish()
        else:
            nursery.start_soon(self._send_late, answer, query, nursery.cancel_scope)

    async def _send_late(self, answer: bytes, query: Query, connection: trio.CancelScope) -> None:
        try:
            await self._send(answer, query)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            connection.cancel()
        finally:
            self._finish()

    def _finish(self) -> None:
        """A query has got what it gets."""
        self._in_flight -= 1
        self._server.tcp_queries.give_back(self._guest)
        if not self._in_flight:
            self._idle.set()

    async def _send(self, answer: bytes, query: Query | int | None) -> None:
        """Send one answer with its length, in one piece. Raises BrokenResourceError when the guest does not take it."""
        if len(answer) > MAX_TCP_ANSWER and isinstance(query, Query):
            # A nameserver's was as long as can be, and got an OPT of ours.
            self._server.counters["dns_truncated"] += 1
            answer = truncate(answer, query, MAX_TCP_ANSWER)
        async with self._sending:
            if not self._broken:
                # Whatever cuts this short leaves half an answer behind, and nothing can follow that.
                self._broken = True
                with trio.move_on_after(WRITE_TIMEOUT):
                    await self._stream.send_all(len(answer).to_bytes(2, "big") + answer)
                    self._broken = False
            if self._broken:
                raise trio.BrokenResourceError("the guest does not read")
