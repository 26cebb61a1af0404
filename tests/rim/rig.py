"""What the rim's tests share: a factory of links that records, and a poller that runs."""

from __future__ import annotations

import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from netstack.core.ports import Handler, Link
from netstack.core.runs import Run
from netstack.host.poller import HostPoller
from netstack.vde.datagram import DatagramLink
from netstack.vde.link import BaseLink
from netstack.vde.stream import StreamLink

DEADLINE = 5.0  # of a test that waits for something that should take milliseconds


async def wait_for(condition: Callable[[], object]) -> None:
    """Until it is true, or the test has failed."""
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what it waits for is a side effect of sockets, nobody sets an event
            await trio.sleep(0.001)


class Factory:
    """Makes links without a stack; remembers what they received and what was told."""

    def __init__(self, poller: HostPoller, mtu: int = 1500) -> None:
        self.poller = poller
        self.mtu = mtu
        self.links: list[BaseLink] = []
        self.frames: list[tuple[str, bytes]] = []
        self.in_runs = 0  # frames that were told to be alike
        self.told: list[str] = []
        self.closed: list[tuple[str, str]] = []
        self.fails: list[OSError] = []

    def stream(self, name: str, sock: socket.socket) -> StreamLink:
        if self.fails:
            raise self.fails.pop(0)
        link = StreamLink(name, sock, self.mtu, self.poller, self.receive)
        self._join(link)
        return link

    def datagram(self, name: str, sock: socket.socket, mtu: int) -> DatagramLink:
        if self.fails:
            raise self.fails.pop(0)
        link = DatagramLink(name, sock, mtu, self.poller, self.receive)
        self._join(link)
        return link

    def _join(self, link: BaseLink) -> None:
        self.links.append(link)
        link.on_closed = lambda why: self.closed.append((link.name, why))

    def receive(
        self, link: Link, buffer: memoryview, spans: Sequence[int], now: float, runs: Sequence[Run] = ()
    ) -> None:
        for first, count, stride in runs:
            self.in_runs += count
            starts, ends = spans[2 * first : 2 * (first + count) : 2], spans[2 * first + 1 : 2 * (first + count) : 2]
            assert len(starts) == count
            assert {end - start for start, end in zip(starts, ends, strict=True)} == {ends[0] - starts[0]}
            assert {later - start for start, later in itertools.pairwise(starts)} == {stride}
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            self.frames.append((link.name, bytes(buffer[start:end])))

    def tell(self, message: str, **fields: object) -> None:
        self.told.append(message)

    def flush(self, now: float = 0.0) -> None:
        for link in tuple(self.links):
            if not link.closed:
                link.flush()


def raise_it(handler: Handler, error: Exception) -> None:
    """A crash of a handler is a crash of the test."""
    raise error


@asynccontextmanager
async def running(poller: HostPoller, end_round: Callable[[float], None]) -> AsyncIterator[trio.Nursery]:
    """A poller that runs in the background."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, end_round, raise_it)
        yield nursery
        nursery.cancel_scope.cancel()


def framed(*frames: bytes) -> bytes:
    """As QEMU's stream sockets carry them."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
