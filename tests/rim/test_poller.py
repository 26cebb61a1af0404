"""The one owner of fd -> handler, on real epoll: level-triggered, reused numbers, crashes, fairness."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
import trio

from netstack.core.ports import FAILED, HUNG_UP, READABLE, WRITABLE, Handler
from netstack.host.poller import HostPoller
from tests.rim.rig import raise_it, running, wait_for


class Reader:
    """Calls what it is told when its socket is ready, and remembers the events."""

    def __init__(self, action: Callable[[], None] | None = None) -> None:
        self.events: list[int] = []
        self.action = action

    def on_ready(self, events: int, now: float) -> None:
        self.events.append(events)
        if self.action is not None:
            self.action()


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Three pairs of connected sockets, non-blocking."""
    made = [socket.socketpair() for _ in range(3)]
    for pair in made:
        for sock in pair:
            sock.setblocking(False)
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


@pytest.fixture
def poller() -> Iterator[HostPoller]:
    made = HostPoller()
    yield made
    made.close()


Pairs = list[tuple[socket.socket, socket.socket]]


async def test_readable_until_it_was_read(poller: HostPoller, pairs: Pairs) -> None:
    """Level-triggered: a handler that leaves something is called again."""
    ours, theirs = pairs[0]
    got = bytearray()
    reader = Reader(lambda: got.extend(ours.recv(2)))
    poller.register(ours.fileno(), reader, READABLE)
    rounds: list[float] = []
    async with running(poller, rounds.append):
        theirs.send(b"abcdef")
        await wait_for(lambda: len(got) == 6)
    assert bytes(got) == b"abcdef"
    assert reader.events == [READABLE] * 3
    assert len(rounds) == 3
    assert rounds == sorted(rounds)


async def test_writable_only_when_asked_for(poller: HostPoller, pairs: Pairs) -> None:
    ours, theirs = pairs[0]
    reader = Reader(lambda: poller.modify(ours.fileno(), READABLE))
    poller.register(ours.fileno(), reader, READABLE)
    async with running(poller, lambda now: None):
        poller.modify(ours.fileno(), READABLE | WRITABLE)
        await wait_for(lambda: reader.events)
        assert reader.events == [WRITABLE]
        theirs.close()
        await wait_for(lambda: len(reader.events) > 1)
        assert reader.events[1] & HUNG_UP
        poller.unregister(ours.fileno())


async def test_failures_are_reported_unasked(poller: HostPoller) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(listener.getsockname())
    peer, _ = listener.accept()
    reader = Reader(lambda: poller.unregister(sock.fileno()))
    poller.register(sock.fileno(), reader, 0)
    async with running(poller, lambda now: None):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        await wait_for(lambda: reader.events)
    assert reader.events[0] & FAILED
    sock.close()
    listener.close()


async def test_an_unregistered_handler_is_not_called(poller: HostPoller, pairs: Pairs) -> None:
    """Not even for what the same round still holds for it."""
    (first, first_end), (second, second_end), _ = pairs
    late = Reader()

    def end_the_other() -> None:
        first.recv(10)
        poller.unregister(second.fileno())

    poller.register(first.fileno(), Reader(end_the_other), READABLE)
    poller.register(second.fileno(), late, READABLE)
    first_end.send(b"x")
    second_end.send(b"y")
    async with running(poller, lambda now: None):
        await wait_for(lambda: len(poller) == 1)
        await trio.sleep(0.01)
    assert late.events == []


async def test_the_next_owner_of_a_number_does_not_get_its_predecessors_events(
    poller: HostPoller, pairs: Pairs
) -> None:
    """The kernel gives the lowest free descriptor: a flow that opens while another one closes has the same number.

    Its connect() is still under way, and "writable" would have been taken for its success.
    """
    (first, first_end), (second, second_end), _ = pairs
    second_fd = second.fileno()
    new = Reader()
    made: list[socket.socket] = []
    order: list[str] = []

    def replace() -> None:
        order.append("first")
        first.recv(10)
        poller.unregister(second_fd)
        second.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        assert sock.fileno() == second_fd, "the kernel reuses the number"
        poller.register(sock.fileno(), new, 0)
        made.append(sock)

    poller.register(first.fileno(), Reader(replace), READABLE)
    poller.register(second_fd, Reader(lambda: order.append("second")), READABLE)
    first_end.send(b"x")  # epoll reports in the order in which they became ready
    second_end.send(b"y")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, lambda now: None, raise_it)
        await wait_for(lambda: made)
        # A socket that is not connected is reported as hung up, rightly, from the next round on.
        await wait_for(lambda: new.events)
        nursery.cancel_scope.cancel()
    assert order == ["first"]
    assert not any(events & READABLE for events in new.events)
    made[0].close()


async def test_a_crash_ends_one_handler_and_the_others_go_on(poller: HostPoller, pairs: Pairs) -> None:
    crashed: list[tuple[Handler, Exception]] = []

    def crash() -> None:
        raise RuntimeError("a bug")

    def on_crash(handler: Handler, error: Exception) -> None:
        crashed.append((handler, error))
        poller.unregister(pairs[0][0].fileno())

    def read() -> None:
        pairs[1][0].recv(1)

    bad, good = Reader(crash), Reader(read)
    poller.register(pairs[0][0].fileno(), bad, READABLE)
    poller.register(pairs[1][0].fileno(), good, READABLE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, lambda now: None, on_crash)
        pairs[0][1].send(b"x")
        pairs[1][1].send(b"yz")
        await wait_for(lambda: len(good.events) == 2)
        nursery.cancel_scope.cancel()
    assert [(handler, str(error)) for handler, error in crashed] == [(bad, "a bug")]


async def test_trio_has_its_turn_while_something_is_always_ready(poller: HostPoller, pairs: Pairs) -> None:
    """A handler that never finishes its work does not starve the other tasks."""
    greedy = Reader()
    poller.register(pairs[0][0].fileno(), greedy, WRITABLE)
    turns = 0
    async with running(poller, lambda now: None):
        with trio.fail_after(5):
            for _ in range(100):
                await trio.lowlevel.checkpoint()
                turns += 1
    assert turns == 100
    assert greedy.events


async def test_many_ready_sockets_are_all_served(poller: HostPoller) -> None:
    """More than one round reports."""
    count = 700
    made = [socket.socketpair() for _ in range(count)]
    served: set[int] = set()

    def serve(sock: socket.socket) -> None:
        sock.recv(1)
        served.add(sock.fileno())

    for ours, theirs in made:
        poller.register(ours.fileno(), Reader(lambda sock=ours: serve(sock)), READABLE)  # type: ignore[misc]
        theirs.send(b"x")
    async with running(poller, lambda now: None):
        await wait_for(lambda: len(served) == count)
    for pair in made:
        for sock in pair:
            sock.close()


def test_the_number_of_registered(poller: HostPoller) -> None:
    one, two = socket.socketpair()
    assert len(poller) == 0
    poller.register(one.fileno(), Reader(), READABLE)
    assert len(poller) == 1
    poller.unregister(one.fileno())
    poller.unregister(two.fileno())  # harmless
    assert len(poller) == 0
    one.close()
    two.close()
