"""The whole relay in one process: a guest's queries go into the front, nameservers on loopback are asked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import dns.edns
import dns.message
import trio
import trio.testing

from netstack.core.ports import Datagram
from netstack.dns.message import Ede
from netstack.dns.race import DEADLINE
from netstack.dns.resolver import LocalAnswers, Resolver
from netstack.dns.routes import RoutingTable, Scope, Server
from netstack.dns.server import DnsServer
from netstack.dns.upstream import Upstream

GUEST = bytes((192, 168, 5, 15))


@dataclass
class Events:
    """What core.ports.Events is to those who use its warnings."""

    warnings: list[str] = field(default_factory=list)
    debug: bool = False

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None: ...
    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None: ...
    def info(self, message: str, **fields: object) -> None: ...

    def warning(self, key: str, message: str, **fields: object) -> None:
        self.warnings.append(f"{key}: {fields}")


class Relay:
    """A DnsServer with its resolver, whose clock is trio's, put forward by `ahead` seconds."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *scopes: Scope,
        local: Sequence[LocalAnswers] = (),
        deadline: float = DEADLINE,
        ca_file: str | None = None,
        **settings: Any,
    ) -> None:
        self.ahead = 0.0
        self.events = Events()
        self.nursery = nursery
        self.upstream = Upstream(nursery, deadline, ca_file)
        self.resolver = Resolver(
            self.upstream,
            local,
            table=RoutingTable(scopes),
            events=self.events,
            clock=lambda: trio.current_time() + self.ahead,
            **settings,
        )
        self.answers: list[tuple[Datagram, bytes]] = []
        self.server = DnsServer(self.resolver, nursery, self._reply, events=self.events)
        self._answered = trio.Event()

    def _reply(self, datagram: Datagram, answer: bytes) -> None:
        self.answers.append((datagram, answer))
        self._answered.set()

    def send(self, query: bytes, link: Any = "link", port: int = 5353) -> None:
        """A datagram from a guest."""
        self.server.on_datagram(
            Datagram(query, link, b"\x52\x54\0\0\0\1", GUEST, port, bytes((192, 168, 5, 3)), 53), trio.current_time()
        )

    async def wait(self, count: int = 1, seconds: float = 30.0) -> list[bytes]:
        """Wait for so many answers in all, and give them."""
        with trio.fail_after(seconds):
            while len(self.answers) < count:
                self._answered = trio.Event()
                await self._answered.wait()
        return [answer for _, answer in self.answers]

    async def ask_raw(self, query: bytes) -> bytes:
        """Send a datagram, wait for its answer."""
        before = len(self.answers)
        self.send(query)
        await self.wait(before + 1)
        return self.answers[-1][1]

    async def ask(self, query: bytes) -> dns.message.Message:
        return dns.message.from_wire(await self.ask_raw(query))

    async def silence(self, query: bytes) -> None:
        """Send what is not answered."""
        before = len(self.answers)
        self.send(query)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(self.answers) == before

    def connect(self, guest: object = "guest") -> trio.StapledStream[Any, Any]:
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.server.serve_stream, theirs, guest, GUEST)
        return ours


def framed(*queries: bytes) -> bytes:
    return b"".join(len(query).to_bytes(2, "big") + query for query in queries)


async def receive(stream: trio.abc.ReceiveStream, count: int) -> list[bytes]:
    """Read so many answers."""
    data = b""
    answers: list[bytes] = []
    with trio.fail_after(600):  # of a clock that jumps, in some tests
        while len(answers) < count:
            while len(data) >= 2 and len(data) >= 2 + int.from_bytes(data[:2], "big"):
                end = 2 + int.from_bytes(data[:2], "big")
                answers.append(data[2:end])
                data = data[end:]
            if len(answers) < count:
                chunk = await stream.receive_some()
                assert chunk, f"the connection ended after {len(answers)} answers"
                data += chunk
    assert not data
    return answers


def scope(*servers: Server, key: str = "host", domains: Sequence[str] = (), default: bool = True) -> Scope:
    return Scope(key, servers, tuple(domains), default=default)


def errors_of(answer: dns.message.Message) -> list[Ede]:
    """The extended errors of an answer."""
    return [
        (int(option.code), option.text or "") for option in answer.options if isinstance(option, dns.edns.EDEOption)
    ]


def silent(query: bytes) -> list[bytes]:
    """A nameserver that does not answer."""
    return []


@contextlib.asynccontextmanager
async def closed_port() -> AsyncIterator[Server]:
    """A server where nobody listens, and nobody will meanwhile: the TCP side of the port is bound."""
    with (
        trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp,
        trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM) as tcp,
    ):
        await udp.bind(("127.0.0.1", 0))
        await tcp.bind(udp.getsockname())
        port = udp.getsockname()[1]
        udp.close()
        yield Server("127.0.0.1", port)


async def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what a server does in its own time."""
    with trio.fail_after(seconds):
        while not true():  # noqa: ASYNC110 - what it waits for knows nothing of events
            await trio.sleep(0.01)
