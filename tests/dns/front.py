"""The front of the DNS service, with a resolver that does what a test says, and guests in this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from netstack.core.ports import Datagram
from netstack.dns.message import Query
from netstack.dns.server import DnsServer
from tests.dns.nameserver import address_of

Answer = Callable[[bytes], Awaitable[bytes]]


@dataclass
class ScriptedResolver:
    """Answers as a test says, later; keeps the queries."""

    answer: Answer
    nursery: trio.Nursery
    queries: list[tuple[bytes, bool]] = field(default_factory=list)
    at_once: bytes = b""
    """What is known without asking, where a test says so."""

    def remembered(self, wire: bytes, guest: bytes | str) -> bytes | None:
        return None

    def remember(self, query: Query, answer: bytes) -> None: ...

    def known(self, query: Query) -> bytes | None:
        return self.at_once or None

    def resolve(self, query: Query, reply: Callable[[bytes], None]) -> None:
        self.queries.append((query.wire, query.tcp))
        self.nursery.start_soon(self._run, query.wire, reply)

    async def _run(self, query: bytes, reply: Callable[[bytes], None]) -> None:
        reply(await self.answer(query))


async def at_once(query: bytes) -> bytes:
    return address_of(query)


class Front:
    """A DnsServer whose guests are in this process."""

    def __init__(self, nursery: trio.Nursery, answer: Answer = at_once) -> None:
        self.resolver = ScriptedResolver(answer, nursery)
        self.nursery = nursery
        self.answers: list[tuple[Datagram, bytes]] = []
        self.warnings: list[str] = []
        self.flushed: list[object] = []
        self.server = DnsServer(self.resolver, nursery, self._reply, flush=self.flushed.append, events=self)
        self._answered = trio.Event()

    def _reply(self, datagram: Datagram, answer: bytes) -> None:
        self.answers.append((datagram, answer))
        self._answered.set()

    # What it uses of core.ports.Events.
    debug = False

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None: ...
    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None: ...
    def info(self, message: str, **fields: object) -> None: ...

    def warning(self, key: str, message: str, **fields: object) -> None:
        self.warnings.append(key)

    def send(self, query: bytes, link: Any = "link") -> None:
        guest = bytes((192, 168, 5, 15))
        self.server.on_datagram(
            Datagram(query, link, b"\x52\x54\0\0\0\1", guest, 5353, bytes((192, 168, 5, 3)), 53), 0.0
        )

    async def ask(self, query: bytes) -> bytes:
        """Send a datagram, wait for its answer."""
        self._answered = trio.Event()
        self.send(query)
        with trio.fail_after(60):
            await self._answered.wait()
        return self.answers[-1][1]

    def connect(self, guest: object = "guest") -> trio.StapledStream[Any, Any]:
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.server.serve_stream, theirs, guest)
        return ours
