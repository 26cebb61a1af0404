"""A small real nameserver on loopback, whose behaviour a test chooses. dnspython builds its answers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import dns.flags
import dns.message
import dns.rrset
import trio

from netstack.dns.routes import Server

# What it does with a query: gives the packets to send back, in order.
# By TCP, None is for keeping the connection and saying nothing; an empty answer ends it.
Behaviour = Callable[[bytes], Iterable[bytes]]
TcpBehaviour = Callable[[bytes], Iterable[bytes] | None]


def make_query(name: str = "www.example.test", kind: str = "A", ident: int = 0x1234, **settings: Any) -> bytes:
    message = dns.message.make_query(name, kind, **settings)
    message.id = ident
    return message.to_wire()


def make_answer(query: bytes, *records: str, rcode: int = 0, flags: int = 0) -> bytes:
    """An answer with records in the form of a zone file: "www.example.test. 60 IN A 192.0.2.1"."""
    answer = dns.message.make_response(dns.message.from_wire(query), recursion_available=True)
    answer.set_rcode(dns.rcode.Rcode(rcode))
    answer.flags |= flags
    for record in records:
        owner, ttl, class_, kind, data = record.split(maxsplit=4)
        answer.answer.append(dns.rrset.from_text(owner, int(ttl), class_, kind, data))
    return answer.to_wire(max_size=65535)


def address_of(query: bytes) -> bytes:
    """The usual answer."""
    name = dns.message.from_wire(query).question[0].name
    return make_answer(query, f"{name} 60 IN A 192.0.2.1")


def is_probe(query: bytes) -> bool:
    """Whether it is a question of netstack.dns.loops, by which a loop would be noticed."""
    return query[12:13] == b"\x20" and query[45:] == b"\4test\0\0\x10\0\1"


class TestNameserver:
    """Listens at one address and port by UDP and TCP; keeps what it was asked."""

    __test__ = False

    def __init__(self, udp: trio.socket.SocketType, tcp: trio.SocketListener | None, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.tcp_behaviour: TcpBehaviour = lambda query: [address_of(query)]
        self.udp_queries: list[bytes] = []
        self.probes: list[bytes] = []  # netstack.dns.loops: not by a guest
        self.udp_sources: list[int] = []
        self.tcp_queries: list[bytes] = []
        self.connections = 0
        self.port = int(udp.getsockname()[1])
        self.nameserver = Server("127.0.0.1", self.port)
        self._udp = udp
        self._last: tuple[str, int] = ("", 0)
        self._tcp = tcp

    async def answer_late(self, answer: bytes) -> None:
        """Answer the last query by UDP."""
        await self._udp.sendto(answer, self._last)

    async def serve_udp(self) -> None:
        while True:
            query, source = await self._udp.recvfrom(65535)
            self._last = source
            (self.probes if is_probe(query) else self.udp_queries).append(query)
            self.udp_sources.append(source[1])
            for answer in self.behaviour(query):
                with contextlib.suppress(OSError):
                    await self._udp.sendto(answer, source)

    async def serve_tcp(self) -> None:
        if self._tcp is not None:
            await trio.serve_listeners(self.serve_one, [self._tcp])

    async def serve_one(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        data = b""
        while chunk := await stream.receive_some(65536):
            data += chunk
            while len(data) >= 2 and len(data) >= 2 + int.from_bytes(data[:2], "big"):
                end = 2 + int.from_bytes(data[:2], "big")
                query, data = data[2:end], data[end:]
                self.tcp_queries.append(query)
                found = self.tcp_behaviour(query)
                if found is None:
                    continue
                answers = list(found)
                for answer in answers:
                    await stream.send_all(len(answer).to_bytes(2, "big") + answer)
                if not answers:
                    await stream.aclose()
                    return


@contextlib.asynccontextmanager
async def open_nameserver(
    behaviour: Behaviour = lambda query: [address_of(query)], *, tcp: bool = True
) -> AsyncIterator[TestNameserver]:
    """Run a nameserver on a free port of 127.0.0.1, the same for UDP and TCP."""
    while True:
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        listener = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            await listener.bind(udp.getsockname())
        except OSError:
            udp.close()
            listener.close()
            continue
        break
    # Bound and not listening, it refuses connections, and nobody else gets the port.
    if tcp:
        listener.listen()
    server = TestNameserver(udp, trio.SocketListener(listener) if tcp else None, behaviour)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_udp)
            nursery.start_soon(server.serve_tcp)
            yield server
            nursery.cancel_scope.cancel()
    finally:
        udp.close()
        listener.close()
