"""Asking the host's nameservers, with the guest's own bytes.

A query goes out as it came in, but for its ID: each gets a fresh random one, and a fresh socket and so a fresh random
port, connected to the nameserver (RFC 5452 9.2). What comes back must have that ID and ask the same question; anything
else is somebody's guess, and the wait goes on. The guest gets the answer's bytes with its own ID and its own spelling
of the name.

The nameservers are asked in their order, as the C library does: five seconds for each, the next one at once where the
host says that there is nobody (ICMP port unreachable), or where the server says that it cannot help (SERVFAIL,
REFUSED).

A query that came by UDP is asked by UDP, and an answer that says "truncated" is passed on: the guest comes again by
TCP, and then TCP is used here too (RFC 5625 4.4.1).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from netstack.dns.message import REFUSED, SERVFAIL, Question, is_answer_to, rcode_of, with_id, with_question
from netstack.dns.resolvconf import Nameserver

# RES_TIMEOUT of the C library (resolv.conf(5), "timeout"), in seconds.
TIMEOUT = 5.0

MAX_MESSAGE = 65535


@dataclass(slots=True)
class Upstream:
    """Asks the nameservers that `nameservers` gives at the time."""

    nameservers: Callable[[], Sequence[Nameserver]]
    timeout: float = TIMEOUT

    async def ask(self, query: bytes, question: Question, *, tcp: bool) -> bytes | None:
        """Give the first useful answer to a query, or None when no nameserver gave one.

        question is what parse_question found in the query.
        """
        useless = None
        for nameserver in tuple(self.nameservers()):
            sent = with_id(query, secrets.randbits(16))
            answer = None
            with trio.move_on_after(self.timeout):
                try:
                    answer = await self._ask_one(nameserver, sent, question, tcp=tcp)
                except OSError:
                    # Nobody there, no route, no descriptor left: for this query the nameserver is not to be had.
                    continue
            if answer is None:
                continue
            answer = with_question(with_id(answer, int.from_bytes(query[:2], "big")), query, question)
            if rcode_of(answer) not in (SERVFAIL, REFUSED):
                return answer
            useless = useless or answer
        return useless

    async def _ask_one(self, nameserver: Nameserver, query: bytes, question: Question, *, tcp: bool) -> bytes:
        if tcp:
            try:
                return await _ask_tcp(nameserver, query, question)
            except (OSError, EOFError):
                # There are nameservers without TCP, in home routers above all. What they say by UDP is better than
                # nothing, and says itself whether it is all.
                pass
        return await _ask_udp(nameserver, query, question)


async def _connect(nameserver: Nameserver, kind: int) -> trio.socket.SocketType:
    """A socket connected to the nameserver. The look-up is numeric: it turns a scope's name into its number."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, _, protocol, _, sockaddr = socket.getaddrinfo(nameserver.address, nameserver.port, type=kind, flags=flags)[
        0
    ]
    sock = trio.socket.socket(family, kind, protocol)
    try:
        await sock.connect(sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


async def _ask_udp(nameserver: Nameserver, query: bytes, question: Question) -> bytes:
    with await _connect(nameserver, socket.SOCK_DGRAM) as sock:
        await sock.send(query)
        while True:
            answer = await sock.recv(MAX_MESSAGE)
            if is_answer_to(answer, query, question):
                return answer


async def _ask_tcp(nameserver: Nameserver, query: bytes, question: Question) -> bytes:
    async with trio.SocketStream(await _connect(nameserver, socket.SOCK_STREAM)) as stream:
        # In one piece: some servers read the length alone and give up (RFC 7766 8).
        try:
            await stream.send_all(len(query).to_bytes(2, "big") + query)
            while True:
                length = int.from_bytes(await _receive_exactly(stream, 2), "big")
                answer = await _receive_exactly(stream, length)
                if is_answer_to(answer, query, question):
                    return answer
        except trio.BrokenResourceError:
            raise EOFError from None


async def _receive_exactly(stream: trio.SocketStream, count: int) -> bytes:
    """Read so many bytes. Raises EOFError when the stream ends before."""
    received = bytearray()
    while len(received) < count:
        chunk = await stream.receive_some(count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)
