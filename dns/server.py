"""The gateway's DNS service: queries come in from guests by UDP and TCP, answers go back.

Theory of operation
-------------------
This front knows nothing about where answers come from: it has a Resolver, whose one verb takes the bytes of a query and
gives the bytes of an answer. What it does itself is to turn away what is no query, to keep the number of queries in
flight within bounds, to hold answers by UDP to the size that the guest takes, and to speak TCP.

Each query is a task in the nursery given by the gateway, so that a slow nameserver delays nobody else's query; over TCP
the answers therefore leave in the order in which they are ready (RFC 7766 6.2.1.1).

Bounds: queries in flight for each guest, and in all; beyond that the answer is SERVFAIL, at once, so that the guest's
resolver tries again later and holds nothing here. TCP connections for each guest and in all; beyond that they are
closed. A guest that does not read its answers holds its own queries up, and after a while its connection is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from netstack.core.ports import Datagram, Events
from netstack.dns.local import LocalNames
from netstack.dns.message import (
    BADVERS,
    FORMERR,
    HEADER_LENGTH,
    NOTIMP,
    OPCODE,
    QR,
    REFUSED,
    SERVFAIL,
    TYPE_AXFR,
    TYPE_IXFR,
    find_opt,
    flags_of,
    parse_question,
    rcode_of,
    udp_limit,
    write_error,
    write_truncated,
)
from netstack.dns.upstream import Upstream

PORT = 53

# Twice what dnsmasq has in flight to one group of servers: a guest may be a resolver for many others.
MAX_QUERIES_OF_GUEST = 256
MAX_QUERIES = 1024

MAX_CONNECTIONS_OF_GUEST = 32
MAX_CONNECTIONS = 128

# RFC 7766 6.2.3 leaves it to the server; knot and unbound are of this order. Seconds.
IDLE_TIMEOUT = 20.0
WRITE_TIMEOUT = 20.0

# The longest query that is taken by TCP. Real ones are under 600 bytes; the peers' bound.
MAX_TCP_QUERY = 4096


class Resolver(Protocol):
    """Where answers come from."""

    async def resolve(self, query: bytes, *, tcp: bool) -> bytes:
        """Give the answer to a query, with its ID; of any length, the front truncates it for UDP.

        query is a standard query with exactly one question that can be read; tcp says how the guest asked. When there
        is no answer, that is an answer too: SERVFAIL.
        """
        ...


@dataclass(slots=True)
class RelayResolver:
    """Names of our own first; the rest goes to the host's nameservers."""

    local: LocalNames
    upstream: Upstream

    async def resolve(self, query: bytes, *, tcp: bool) -> bytes:
        question = parse_question(query)
        if question is None:
            return write_error(query, FORMERR)
        answer = self.local.answer(query, question)
        if answer is None:
            answer = await self.upstream.ask(query, question, tcp=tcp)
        return answer if answer is not None else write_error(query, SERVFAIL)


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
        events: Events | None = None,
    ) -> None:
        self.resolver = resolver
        self.counters: Counter[str] = Counter()
        self.queries = _Quota(MAX_QUERIES_OF_GUEST, MAX_QUERIES)
        self.connections = _Quota(MAX_CONNECTIONS_OF_GUEST, MAX_CONNECTIONS)
        self._nursery = nursery
        self._reply = reply
        self._events = events

    def on_datagram(self, datagram: Datagram, now: float) -> None:
        """Take a datagram from a guest to port 53. Untrusted. The answer goes out now or later."""
        query = bytes(datagram.payload)
        self.counters["dns_udp_queries"] += 1
        refusal = self._refuse(query)
        if refusal is not None:
            if refusal:
                self._reply(datagram, refusal)
        elif self._admit(datagram.link):
            self._nursery.start_soon(self._serve_datagram, datagram, query)
        else:
            self._reply(datagram, write_error(query, SERVFAIL))

    async def serve_stream(self, stream: trio.abc.Stream, guest: object) -> None:
        """Serve one TCP connection until it ends. Untrusted. guest is whatever tells guests apart, for the bounds."""
        async with stream:
            if not self.connections.take(guest):
                self.counters["dns_tcp_refused"] += 1
                return
            try:
                await _Connection(self, stream, guest).serve()
            finally:
                self.connections.give_back(guest)

    def _refuse(self, query: bytes) -> bytes | None:
        """Give the answer to what is no query that can be resolved, empty for silence; None for a good query."""
        if len(query) < HEADER_LENGTH or flags_of(query) & QR:
            # Never answer an answer: two servers would go on for ever.
            self.counters["dns_malformed"] += 1
            return b""
        if flags_of(query) & OPCODE:
            self.counters["dns_refused"] += 1
            return write_error(query, NOTIMP)
        question = parse_question(query)
        if question is None:
            self.counters["dns_malformed"] += 1
            # RFC 9619: a query has one question.
            return write_error(query, FORMERR)
        if question.type in (TYPE_AXFR, TYPE_IXFR):
            self.counters["dns_refused"] += 1
            return write_error(query, REFUSED)
        opt = find_opt(query, question)
        if opt is not None and opt.version:
            self.counters["dns_refused"] += 1
            return write_error(query, BADVERS)
        return None

    def _admit(self, guest: object) -> bool:
        if self.queries.take(guest):
            return True
        self.counters["dns_too_many"] += 1
        if self._events is not None:
            self._events.warning("dns_too_many", "too many DNS queries at once: answering SERVFAIL")
        return False

    async def _resolve(self, query: bytes, *, tcp: bool) -> bytes:
        try:
            answer = await self.resolver.resolve(query, tcp=tcp)
        except Exception as error:
            # One query's bug must not end the network of all guests.
            self.counters["dns_failed"] += 1
            if self._events is not None:
                self._events.warning("dns_failed", "a DNS query failed", error=repr(error), query=query.hex())
            answer = write_error(query, SERVFAIL)
        if rcode_of(answer) == SERVFAIL:
            self.counters["dns_servfail"] += 1
        return answer

    async def _serve_datagram(self, datagram: Datagram, query: bytes) -> None:
        try:
            answer = await self._resolve(query, tcp=False)
        finally:
            self.queries.give_back(datagram.link)
        question = parse_question(query)
        if question is not None and len(answer) > udp_limit(find_opt(query, question)):
            self.counters["dns_truncated"] += 1
            answer = write_truncated(query, answer)
        self._reply(datagram, answer)


class _Connection:
    """One guest's TCP connection."""

    def __init__(self, server: DnsServer, stream: trio.abc.Stream, guest: object) -> None:
        self._server = server
        self._stream = stream
        self._guest = guest
        self._sending = trio.Lock()
        self._broken = False
        self._in_flight = 0

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            try:
                await self._read_queries(nursery)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                nursery.cancel_scope.cancel()
            # The guest has closed its half, maybe only that: what it asked is answered before ours is closed.

    async def _read_queries(self, nursery: trio.Nursery) -> None:
        server = self._server
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
            while len(received) >= 2:
                length = int.from_bytes(received[:2], "big")
                if not HEADER_LENGTH <= length <= MAX_TCP_QUERY:
                    server.counters["dns_malformed"] += 1
                    return
                if len(received) < 2 + length:
                    break
                query = bytes(received[2 : 2 + length])
                del received[: 2 + length]
                server.counters["dns_tcp_queries"] += 1
                refusal = server._refuse(query)
                if refusal is None and not server._admit(self._guest):
                    refusal = write_error(query, SERVFAIL)
                if refusal is None:
                    self._in_flight += 1
                    nursery.start_soon(self._serve_query, query, nursery.cancel_scope)
                elif refusal:
                    # Sent from here: a guest that asks without reading is not read from either.
                    await self._send(refusal)

    async def _serve_query(self, query: bytes, connection: trio.CancelScope) -> None:
        try:
            await self._send(await self._server._resolve(query, tcp=True))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            connection.cancel()
        finally:
            self._in_flight -= 1
            self._server.queries.give_back(self._guest)

    async def _send(self, answer: bytes) -> None:
        """Send one answer with its length, in one piece. Raises BrokenResourceError when the guest does not take it."""
        async with self._sending:
            if not self._broken:
                # Whatever cuts this short leaves half an answer behind, and nothing can follow that.
                self._broken = True
                with trio.move_on_after(WRITE_TIMEOUT):
                    await self._stream.send_all(len(answer).to_bytes(2, "big") + answer)
                    self._broken = False
            if self._broken:
                raise trio.BrokenResourceError("the guest does not read")
