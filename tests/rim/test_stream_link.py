"""QEMU's stream framing on real sockets: frames both ways, guests that do not read, links that end."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import numpy as np
import pytest
import trio
import trio.lowlevel

from netstack.core.ports import READABLE, WRITABLE
from netstack.host.poller import HostPoller
from netstack.vde.datagram import DatagramLink
from netstack.vde.link import CONGESTED, FULL, BaseLink
from netstack.vde.stream import StreamLink
from netstack.wire.ethernet import MAX_FRAME
from tests.rim.rig import Factory, framed, running, wait_for


class Bench:
    """A link on one end of a socketpair, the test on the other."""

    def __init__(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.poller = HostPoller()
        self.factory = Factory(self.poller)
        ours, self.guest = socket.socketpair(socket.AF_UNIX, kind)
        self.guest.setblocking(False)
        self.link: BaseLink
        if kind == socket.SOCK_STREAM:
            self.link = self.factory.stream("link", ours)
        else:
            self.link = self.factory.datagram("link", ours, 9000)

    @property
    def frames(self) -> list[bytes]:
        return [frame for _, frame in self.factory.frames]

    def send(self, *frames: bytes) -> None:
        """The stack's side queues frames, with the prefix that the link asks for."""
        for frame in frames:
            head = bytearray(self.link.prefix) + frame
            self.link.write_prefix(head, len(frame))
            self.link.queue_frame(head)

    def close(self) -> None:
        for link in self.factory.links:
            link.close("test over")
        self.guest.close()
        self.poller.close()

    async def read(self, size: int) -> bytes:
        """The guest reads exactly so much."""
        guest = trio.socket.from_stdlib_socket(self.guest)
        data = b""
        with trio.fail_after(5):
            while len(data) < size:
                data += await guest.recv(size - len(data))
        return data


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def datagrams() -> Iterator[Bench]:
    made = Bench(socket.SOCK_DGRAM)
    yield made
    made.close()


class Waiter:
    """A flow that waits for the link."""

    def __init__(self) -> None:
        self.drained = 0

    def on_drained(self, now: float) -> None:
        self.drained += 1


async def test_frames_from_the_guest(bench: Bench) -> None:
    frames = [bytes([i]) * (14 + 100 * i) for i in range(10)]
    async with running(bench.poller, bench.factory.flush):
        stream = framed(*frames)
        for at in range(0, len(stream), 777):
            bench.guest.send(stream[at : at + 777])
            await trio.lowlevel.checkpoint()
        await wait_for(lambda: len(bench.frames) == 10)
    assert bench.frames == frames
    assert (bench.link.frames_from_guest, bench.link.bytes_from_guest) == (10, sum(map(len, frames)))


async def test_the_largest_frame_and_the_smallest(bench: Bench) -> None:
    frames = [b"a" * MAX_FRAME, b"b" * 14, b"c" * MAX_FRAME]
    async with running(bench.poller, bench.factory.flush):
        guest = trio.SocketStream(trio.socket.from_stdlib_socket(bench.guest))
        await guest.send_all(framed(*frames))
        await wait_for(lambda: len(bench.frames) == 3)
    assert bench.frames == frames


async def test_frames_to_the_guest_in_one_call_and_in_order(bench: Bench) -> None:
    chance = random.Random(7)
    frames = [chance.randbytes(60 + i) for i in range(3000)]
    async with running(bench.poller, bench.factory.flush):
        bench.send(*frames[:1500])
        burst = np.zeros((5, 4 + 100), dtype=np.uint8)
        burst[:, 3] = 100
        burst[:, 4:] = np.arange(5, dtype=np.uint8)[:, None]
        bench.link.queue_burst(burst)
        head = bytearray((0, 0, 0, 60)) + b"h" * 10
        bench.link.queue_frame(head, b"tail" + b"t" * 46)
        bench.send(*frames[1500:])
        bench.link.flush()
        wanted = framed(
            *frames[:1500], *[bytes([i]) * 100 for i in range(5)], b"h" * 10 + b"tail" + b"t" * 46, *frames[1500:]
        )
        assert await bench.read(len(wanted)) == wanted
        await wait_for(lambda: bench.link.backlog == 0)
    assert bench.link.frames_to_guest == 3006
    assert bench.link.bytes_to_guest == len(wanted) - 4 * 3006


async def test_a_guest_that_does_not_read_costs_a_bounded_queue(bench: Bench) -> None:
    """Beyond CONGESTED flows wait; beyond FULL frames are dropped and counted; a frame begun is finished."""
    frame = random.Random(8).randbytes(9000)
    async with running(bench.poller, bench.factory.flush):
        while not bench.link.congested:
            bench.send(frame)
        assert CONGESTED < bench.link.backlog <= CONGESTED + 10_000
        for _ in range(2000):
            bench.send(frame)
        assert bench.link.backlog <= FULL + 10_000
        assert bench.link.drops_to_guest > 0
        sent = bench.link.frames_to_guest
        wanted = framed(frame) * sent
        assert await bench.read(len(wanted)) == wanted
        await wait_for(lambda: bench.link.backlog == 0)
        assert not bench.link.congested


async def test_who_waited_for_a_congested_link_is_called_when_it_has_room(bench: Bench) -> None:
    waiters = [Waiter() for _ in range(3)]
    async with running(bench.poller, bench.factory.flush):
        while not bench.link.congested:
            bench.send(bytes(9000))
        for waiter in waiters:
            bench.link.wait_drained(waiter)
        await trio.sleep(0.01)
        assert [waiter.drained for waiter in waiters] == [0, 0, 0]
        await bench.read(9004 * bench.link.frames_to_guest)
        await wait_for(lambda: waiters[-1].drained)
        assert [waiter.drained for waiter in waiters] == [1, 1, 1]
        # And the link asks for writability no longer, or it would be ready for ever.
        await wait_for(lambda: not bench.link._waits_writable)


async def test_a_flush_that_drains_the_link_does_not_forget_who_waited(bench: Bench) -> None:
    """The wakeup of another descriptor flushes all links, before this one was found writable."""
    waiter = Waiter()
    while not bench.link.congested:
        bench.send(bytes(9000))
    bench.link.wait_drained(waiter)
    left = 9004 * bench.link.frames_to_guest
    while left:
        bench.link.flush()
        left -= len(bench.guest.recv(1 << 20))
    bench.link.flush()
    assert bench.link.backlog == 0
    async with running(bench.poller, bench.factory.flush):
        await wait_for(lambda: waiter.drained)
    assert not bench.link.congested


async def test_waiters_that_fill_the_link_again_leave_the_rest_their_turn(bench: Bench) -> None:
    class Filler(Waiter):
        def on_drained(self, now: float) -> None:
            super().on_drained(now)
            while not bench.link.congested:
                bench.send(bytes(9000))

    waiters = [Filler(), Waiter(), Waiter()]
    async with running(bench.poller, bench.factory.flush):
        while not bench.link.congested:
            bench.send(bytes(9000))
        for waiter in waiters:
            bench.link.wait_drained(waiter)
        guest = trio.socket.from_stdlib_socket(bench.guest)
        with trio.fail_after(5):
            while not waiters[2].drained:
                await guest.recv(1 << 20)
    assert [waiter.drained for waiter in waiters] == [1, 1, 1]


@pytest.mark.parametrize("length", (0, 1, 13, MAX_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF))
async def test_a_wrong_length_ends_this_link_only(bench: Bench, length: int) -> None:
    other_ours, other_guest = socket.socketpair()
    bench.factory.stream("other", other_ours)
    async with running(bench.poller, bench.factory.flush):
        bench.guest.send(framed(b"x" * 60) + length.to_bytes(4, "big") + b"y" * 100)
        await wait_for(lambda: bench.link.closed)
        assert bench.frames == [b"x" * 60]
        assert bench.factory.closed == [("link", f"bad frame length {length}: must be 14 to {MAX_FRAME}")]
        assert bench.guest.recv(10) == b""
        other_guest.send(framed(b"z" * 60))
        await wait_for(lambda: len(bench.frames) == 2)
        assert len(bench.poller) == 1
    other_guest.close()


@pytest.mark.parametrize(
    ("before", "why"),
    ((b"", "guest closed the connection"), (b"\0\0\0\x3cxyz", "guest closed the connection amid a frame")),
)
async def test_a_guest_that_goes(bench: Bench, before: bytes, why: str) -> None:
    async with running(bench.poller, bench.factory.flush):
        bench.guest.send(before)
        bench.guest.close()
        await wait_for(lambda: bench.link.closed)
    assert bench.factory.closed == [("link", why)]
    assert bench.frames == []


async def test_a_guest_that_goes_while_frames_wait_for_it(bench: Bench) -> None:
    async with running(bench.poller, bench.factory.flush):
        while not bench.link.congested:
            bench.send(bytes(9000))
        waiter = Waiter()
        bench.link.wait_drained(waiter)
        bench.guest.close()
        await wait_for(lambda: bench.link.closed)
        assert bench.link.backlog == 0
        bench.send(bytes(60))
        bench.link.flush()
        assert bench.link.drops_to_guest == 1
        assert waiter.drained == 0


def test_closing_twice_tells_once(bench: Bench) -> None:
    bench.link.close("once")
    bench.link.close("twice")
    assert bench.factory.closed == [("link", "once")]
    assert len(bench.poller) == 0


def test_a_tcp_link_does_not_delay_small_frames() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    poller = HostPoller()
    link = StreamLink("tcp", ours, 1500, poller, Factory(poller).receive)
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not ours.getblocking()
    link.close("")
    client.close()
    listener.close()
    poller.close()


@pytest.mark.parametrize("size", (60, 74, 1000), ids=("little", "less little", "large"))
@pytest.mark.parametrize("before", (0, 3), ids=("first", "behind others"))
async def test_frames_of_one_size_are_told_as_runs(bench: Bench, size: int, before: int) -> None:
    """And others before, behind and between them come in their places."""
    frames = [bytes([i]) * 100 for i in range(before)]
    frames += [bytes([i]) * size for i in range(50)]
    frames.append(b"alone" * 20)
    frames += [bytes([i]) * size for i in range(50, 150)]
    frames.append(b"last" * 20)
    wire = framed(*frames)
    bench.guest.sendall(wire)  # less than a socket's buffer holds, so that one read finds all of it
    async with running(bench.poller, bench.factory.flush):
        await wait_for(lambda: len(bench.frames) == len(frames))
    assert bench.frames == frames
    assert bench.factory.in_runs >= 140


async def test_frames_of_one_size_in_any_pieces(bench: Bench) -> None:
    """A run may end in the middle of a frame, and of a length."""
    chance = random.Random(7)
    frames: list[bytes] = []
    for i in range(100):
        frames += [bytes([i]) * chance.choice((60, 1000, 1000))] * chance.randrange(1, 60)
    wire = framed(*frames)
    guest = trio.socket.from_stdlib_socket(bench.guest)
    async with running(bench.poller, bench.factory.flush):
        at = 0
        while at < len(wire):
            at += await guest.send(wire[at : at + chance.randrange(1, 60_000)])
            await trio.lowlevel.checkpoint()
        await wait_for(lambda: len(bench.frames) == len(frames))
    assert bench.frames == frames
    assert bench.factory.in_runs


# ---- datagrams


async def test_datagram_frames_both_ways(datagrams: Bench) -> None:
    bench = datagrams
    frames = [bytes([i]) * (14 + 200 * i) for i in range(20)]
    async with running(bench.poller, bench.factory.flush):
        bench.guest.send(b"")  # libvdeplug says so when it closes; it means nothing
        bench.guest.send(b"short")
        for frame in frames:
            bench.guest.send(frame)
        await wait_for(lambda: len(bench.frames) == 20)
        assert bench.frames == frames
        bench.send(*frames)
        bench.link.queue_burst(np.full((3, 64), 9, dtype=np.uint8))
        bench.link.queue_frame(b"head", b"tail" * 20)
        bench.link.flush()
        guest = trio.socket.from_stdlib_socket(bench.guest)
        got = [await guest.recv(70_000) for _ in range(24)]
        assert got == [*frames, *[b"\x09" * 64] * 3, b"head" + b"tail" * 20]
    assert bench.link.backlog == 0


async def test_a_datagram_guest_that_does_not_read(datagrams: Bench) -> None:
    """Linux: net.unix.max_dgram_qlen datagrams, then the sender waits."""
    bench = datagrams
    waiter = Waiter()
    async with running(bench.poller, bench.factory.flush):
        while not bench.link.congested:
            bench.send(bytes(1500))
        bench.link.wait_drained(waiter)
        sent = bench.link.frames_to_guest
        guest = trio.socket.from_stdlib_socket(bench.guest)
        with trio.fail_after(10):
            for _ in range(sent):
                assert len(await guest.recv(70_000)) == 1500
        await wait_for(lambda: waiter.drained)
        assert not bench.link.congested
        assert bench.link.drops_to_guest == 0


async def test_a_datagram_guest_that_is_gone(datagrams: Bench) -> None:
    bench = datagrams
    async with running(bench.poller, bench.factory.flush):
        bench.guest.close()
        bench.send(bytes(60))
        bench.link.flush()
        assert bench.link.closed


def test_what_a_link_registers(datagrams: Bench) -> None:
    bench = datagrams
    assert isinstance(bench.link, DatagramLink)
    assert len(bench.poller) == 1
    bench.link.on_ready(READABLE | WRITABLE, 0.0)
    assert bench.frames == []
