"""The whole road on real sockets: a client, a stack that plays the guest, a QEMU stream link, the gateway, a server.

    client --TCP--> accepted socket -> stack (guest) == socketpair, framed == stack (gateway) -> connect() --> server

Both stacks run on the same poller. Everything stays on this machine's loopback.
"""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from time import monotonic

import pytest
import trio

from netstack.core.addresses import Addresses
from netstack.core.stack import Stack
from netstack.host.poller import HostPoller
from netstack.host.sockets import HostSockets
from netstack.vde.stream import StreamLink
from tests.core.ip_fakes import GATEWAY4, GUEST4, addresses
from tests.rim.rig import raise_it, wait_for
from tests.world import GUEST_MAC

Server = Callable[[trio.SocketStream], Awaitable[None]]


class Road:
    """Both stacks and the wire between them."""

    def __init__(self, mtu: int) -> None:
        self.poller = HostPoller()
        where = addresses()
        self.gateway = Stack(where, HostSockets(), self.poller, secret=b"a secret")
        guest = Addresses(
            GUEST_MAC,
            IPv4Network("192.168.5.0/24"),
            GATEWAY4[:3] + b"\xc8",
            GATEWAY4[:3] + b"\xc9",
            where.subnet6,
            where.gateway6,
            where.dns6,
        )
        self.guest = Stack(guest, HostSockets(), self.poller, secret=b"another")
        one, two = socket.socketpair()
        self.links = []
        for stack, sock in ((self.gateway, one), (self.guest, two)):
            link = StreamLink("wire", sock, mtu, self.poller, stack.receive_frames)
            stack.add_link(link, monotonic())
            self.links.append(link)
        self.guest.neighbors.learn(self.links[1], where.mac, GATEWAY4, monotonic())
        self.refused: list[int] = []
        self.ports = iter(range(40000, 50000))

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        return self.gateway, self.guest

    def end_round(self, now: float) -> None:
        for stack in self.stacks:
            stack.end_round(now)

    async def run_timers(self) -> None:
        while True:
            now = monotonic()
            for stack in self.stacks:
                if stack.next_deadline() <= now:
                    stack.handle_timers(now)
                    stack.end_round(now)
            await trio.sleep(0.001)

    async def run_listener(self, listener: socket.socket, port: int) -> None:
        """What a client connects to: each connection becomes one of the guest's, to this port of the gateway."""
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            sock.setblocking(False)

            def opened(flow: object, error: int) -> None:
                if error:
                    self.refused.append(error)

            now = monotonic()
            self.guest.open_to_guest(sock, GATEWAY4, port, GUEST4, next(self.ports), opened, now)
            self.end_round(now)

    def close(self) -> None:
        now = monotonic()
        for stack in self.stacks:
            for flow in stack.flows:
                flow.abort(now, "test over", tell_guest=False)
        for link in self.links:
            link.close("test over")
        assert len(self.poller) == 0
        self.poller.close()


@asynccontextmanager
async def road_to(serve: Server | None, mtu: int = 1500) -> AsyncIterator[tuple[Road, tuple[str, int]]]:
    """A road to a server (None: to a port where nobody listens), and the address for clients."""
    road = Road(mtu)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    entrance = socket.create_server(("127.0.0.1", 0))
    entrance.setblocking(False)
    try:
        async with trio.open_nursery() as nursery:
            if serve is None:
                server.close()
            else:
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))
                nursery.start_soon(trio.serve_listeners, serve, [listener])
            nursery.start_soon(road.poller.run, road.end_round, raise_it)
            nursery.start_soon(road.run_timers)
            nursery.start_soon(road.run_listener, entrance, port)
            with trio.fail_after(30):
                yield road, entrance.getsockname()
            nursery.cancel_scope.cancel()
    finally:
        road.close()
        entrance.close()
        server.close()


async def _read_all(stream: trio.SocketStream) -> bytes:
    pieces = [piece async for piece in stream]
    return b"".join(pieces)


async def _until_no_flows(road: Road) -> None:
    """Both sides have closed; TIME-WAIT lasts two seconds."""
    for stack in road.stacks:
        assert stack.bytes_in_flight == stack.bytes_for_host == 0
        for flow in stack.flows:
            assert flow.sock is None


@pytest.mark.parametrize("mtu", (1500, 65520))
async def test_ten_megabytes_each_way(mtu: int) -> None:
    up, down = random.Random(1).randbytes(10_000_000), random.Random(2).randbytes(10_000_000)
    got: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                got.append(await _read_all(stream))

            nursery.start_soon(read)
            await stream.send_all(down)
            await stream.send_eof()

    async with road_to(serve, mtu) as (road, address):
        client = await trio.open_tcp_stream(*address)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await client.send_all(up)
                await client.send_eof()

            nursery.start_soon(write)
            answer = await _read_all(client)
        await wait_for(lambda: got)
        assert hashlib.sha256(answer).digest() == hashlib.sha256(down).digest()
        assert hashlib.sha256(got[0]).digest() == hashlib.sha256(up).digest()
        await client.aclose()
        for stack in road.stacks:
            assert stack.counters.tcp_retransmits == 0
            assert sum(stack.counters.drops.values()) == 0
        await trio.sleep(0.05)
        await _until_no_flows(road)


async def test_an_answer_behind_a_half_close_comes_whole() -> None:
    """The client says all it has and half-closes; the server answers more than any window holds, and closes."""
    answer = random.Random(3).randbytes(3_000_000)

    async def serve(stream: trio.SocketStream) -> None:
        assert await _read_all(stream) == b"question"
        await stream.send_all(answer)
        await stream.aclose()

    async with road_to(serve) as (_, address):
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"question")
        await client.send_eof()
        await trio.sleep(0.1)  # the server has closed by now: what it sent waits in the sockets on the way
        assert await _read_all(client) == answer
        await client.aclose()


async def test_a_small_answer_behind_a_half_close_to_a_slow_reader() -> None:
    """It fits into the host socket's buffer, which is in TCP_CLOSE long before the guest has read it all."""
    answer = random.Random(4).randbytes(60_000)

    async def serve(stream: trio.SocketStream) -> None:
        await _read_all(stream)
        await stream.send_all(answer)
        await stream.aclose()

    async with road_to(serve) as (_, address):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        client = trio.socket.from_stdlib_socket(sock)
        await client.connect(address)
        await client.send(b"question")
        client.shutdown(socket.SHUT_WR)
        got = b""
        while piece := await client.recv(1000):
            got += piece
            await trio.sleep(0.001)
        assert got == answer
        client.close()


async def test_a_server_that_resets() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(10)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()

    async with road_to(serve) as (_, address):
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"hello")
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some(10)
        await client.aclose()


async def test_a_client_that_resets() -> None:
    broken = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        try:
            while await stream.receive_some(10):
                pass
        except trio.BrokenResourceError:
            broken.set()

    async with road_to(serve) as (_, address):
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"hello")
        await trio.sleep(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.aclose()
        await broken.wait()


async def test_a_port_where_nobody_listens() -> None:
    async with road_to(None) as (road, address):
        client = await trio.open_tcp_stream(*address)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some(10)
        await client.aclose()
        assert road.refused == [111]
        assert road.gateway.counters.tcp_refused == 1
        assert len(road.gateway.flows) == 0


async def test_a_server_that_does_not_read_and_one_that_does() -> None:
    """The first fills its buffers and stops; the second is not held up by it, on the same link."""
    stopped = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1) == b"s":
            await stopped.wait()
        else:
            await stream.send_all(await _read_all(stream))
        await stream.aclose()

    async with road_to(serve) as (road, address):
        slow = await trio.open_tcp_stream(*address)
        with trio.move_on_after(0.5):
            while True:
                await slow.send_all(b"s" * 100_000)
        assert road.gateway.bytes_for_host <= road.gateway.limits.for_host_bytes
        quick = await trio.open_tcp_stream(*address)
        await quick.send_all(b"q" + b"x" * 1_000_000)
        await quick.send_eof()
        assert len(await _read_all(quick)) == 1_000_000
        stopped.set()
        await slow.aclose()
        await quick.aclose()


async def test_many_connections_at_once() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async for piece in stream:
            await stream.send_all(piece.upper())
        await stream.aclose()

    async with road_to(serve) as (road, address):
        answers: list[bytes] = []

        async def talk(n: int) -> None:
            client = await trio.open_tcp_stream(*address)
            await client.send_all(b"number %d" % n)
            await client.send_eof()
            answers.append(await _read_all(client))
            await client.aclose()

        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(talk, n)
        assert sorted(answers) == sorted(b"NUMBER %d" % n for n in range(100))
        assert road.gateway.counters.tcp_opened == 100
