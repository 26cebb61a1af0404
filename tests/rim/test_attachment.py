"""Link URIs come to life: listeners with several guests, connectors that come back, inherited descriptors."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netstack.host.poller import HostPoller
from netstack.vde import attachment
from netstack.vde.attachment import Attachment, StreamConnector, StreamDescriptor, StreamListener
from tests.rim.rig import Factory, framed, running, wait_for


class Bench:
    def __init__(self) -> None:
        self.poller = HostPoller()
        self.factory = Factory(self.poller)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A poller that runs, and nothing attached."""
    made = Bench()
    async with running(made.poller, made.factory.flush):
        yield made
    made.poller.close()


@asynccontextmanager
async def attached(which: Attachment) -> AsyncIterator[trio.Nursery]:
    """Opened and running, until the block ends."""
    await which.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(which.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def _connect(path: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(path))


# ---- listeners


async def test_several_guests_on_one_socket(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    listener = StreamListener("unix://guests", bench.factory, path=str(path))
    assert listener.address == str(path)
    async with attached(listener):
        guests = [await _connect(path) for _ in range(3)]
        await wait_for(lambda: len(listener.links) == 3)
        assert [link.name for link in listener.links] == ["unix://guests", "unix://guests#2", "unix://guests#3"]
        for i, guest in enumerate(guests):
            await guest.send_all(framed(bytes([i]) * 60))
        await wait_for(lambda: len(bench.factory.frames) == 3)
        await guests[1].aclose()
        await wait_for(lambda: len(listener.links) == 2)
        assert bench.factory.closed == [("unix://guests#2", "guest closed the connection")]
        late = await _connect(path)
        await wait_for(lambda: len(listener.links) == 3)
        assert listener.links[-1].name == "unix://guests#4"
        for guest in (*guests, late):
            await guest.aclose()
        await wait_for(lambda: not listener.links)
    assert not path.exists()


async def test_the_socket_is_for_its_owner_only(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    listener = StreamListener("unix://guests", bench.factory, path=str(path))
    before = os.umask(0)
    os.umask(before)
    async with attached(listener):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    after = os.umask(before)
    os.umask(after)
    assert after == before


async def test_the_end_closes_all_guests(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    listener = StreamListener("unix://guests", bench.factory, path=str(path))
    async with attached(listener):
        guest = await _connect(path)
        await wait_for(lambda: listener.links)
    assert bench.factory.closed == [("unix://guests", "network closed")]
    assert await guest.receive_some(10) == b""
    assert len(bench.poller) == 0
    await guest.aclose()
    listener.close()


async def test_a_dead_socket_in_the_way_is_replaced(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with attached(StreamListener("unix://guests", bench.factory, path=str(path))):
        guest = await _connect(path)
        await wait_for(lambda: bench.factory.links)
        await guest.aclose()


async def test_a_socket_in_use_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    async with attached(StreamListener("unix://one", bench.factory, path=str(path))):
        second = StreamListener("unix://two", bench.factory, path=str(path))
        with pytest.raises(OSError, match="in use by another process"):
            await second.open()
        second.close()
        guest = await _connect(path)
        await guest.aclose()


async def test_a_socket_of_our_successor_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    """It took the path over while we were shutting down."""
    path = tmp_path / "guests"
    first = StreamListener("unix://one", bench.factory, path=str(path))
    await first.open()
    path.unlink()
    second = StreamListener("unix://two", bench.factory, path=str(path))
    await second.open()
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


async def test_a_file_in_the_way_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    path.write_text("mine")
    with pytest.raises(OSError, match="is not a socket"):
        await StreamListener("unix://guests", bench.factory, path=str(path)).open()
    assert path.read_text() == "mine"


async def test_a_live_socket_of_another_kind_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(OSError, match=f"cannot listen at {path}"):
            await StreamListener("unix://journal", bench.factory, path=str(path)).open()
    assert path.is_socket()


async def test_a_path_that_cannot_be(bench: Bench, tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no" / "such" / "directory", "No such file"), (tmp_path / ("x" * 200), "too long")):
        with pytest.raises(OSError, match=f"cannot listen at {path}: .*{why}"):
            await StreamListener("unix://guests", bench.factory, path=str(path)).open()


async def test_too_many_guests(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "MAX_GUESTS", 2)
    path = tmp_path / "guests"
    listener = StreamListener("unix://guests", bench.factory, path=str(path))
    async with attached(listener):
        guests = [await _connect(path) for _ in range(3)]
        assert await guests[2].receive_some(1) == b""
        assert bench.factory.told == ["too many guests on one socket"]
        assert len(listener.links) == 2
        for guest in guests:
            await guest.aclose()


async def test_a_guest_that_cannot_be_attached_is_turned_away_alone(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "guests"
    listener = StreamListener("unix://guests", bench.factory, path=str(path))
    bench.factory.fails.append(OSError(28, "no space in epoll"))
    async with attached(listener):
        unlucky = await _connect(path)
        assert await unlucky.receive_some(1) == b""
        lucky = await _connect(path)
        await wait_for(lambda: len(listener.links) == 1)
        await unlucky.aclose()
        await lucky.aclose()


@pytest.mark.parametrize("host", ("127.0.0.1", "::1"))
async def test_tcp_guests(bench: Bench, host: str) -> None:
    listener = StreamListener(f"tcp://{host}", bench.factory, host=host, port=0)
    try:
        await listener.open()
    except OSError as error:
        pytest.skip(f"needs {host} ({error})")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run)
        shown, _, port = listener.address.rpartition(":")
        assert shown == (f"[{host}]" if ":" in host else host)
        guest = await trio.open_tcp_stream(host, int(port))
        await guest.send_all(framed(b"x" * 60))
        await wait_for(lambda: bench.factory.frames)
        await guest.aclose()
        await wait_for(lambda: not listener.links)
        nursery.cancel_scope.cancel()


async def test_a_tcp_port_in_use(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
            await StreamListener("tcp://", bench.factory, host="127.0.0.1", port=port).open()


# ---- connectors


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "_RETRY_FIRST", 0.005)
    monkeypatch.setattr(attachment, "_RETRY_LONGEST", 0.02)


@pytest.mark.usefixtures("quick_retries")
async def test_a_connector_waits_for_the_guests_side_and_comes_back(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    connector = StreamConnector("connect+unix://qemu", bench.factory, path=str(path))
    async with attached(connector):
        await wait_for(lambda: bench.factory.told)
        await trio.sleep(0.05)
        assert bench.factory.told == ["waiting for the guest's side"]  # once, not each time
        for round_ in range(3):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                listener.setblocking(False)
                guest, _ = await trio.socket.from_stdlib_socket(listener).accept()
                await guest.send(framed(bytes([round_]) * 60))
                await wait_for(lambda n=round_: len(bench.factory.frames) == n + 1)  # type: ignore[misc]
                assert len(connector.links) == 1
                guest.close()
                await wait_for(lambda: not connector.links)
            path.unlink()
    assert [name for name, _ in bench.factory.frames] == ["connect+unix://qemu"] * 3


@pytest.mark.usefixtures("quick_retries")
async def test_a_peer_that_accepts_and_closes_is_no_busy_loop(bench: Bench) -> None:
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener[0].socket.getsockname()[1]
    accepted = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal accepted
        accepted += 1
        await stream.aclose()

    connector = StreamConnector("connect+tcp://", bench.factory, host="127.0.0.1", port=port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listener)
        nursery.start_soon(connector.run)
        began = trio.current_time()
        await wait_for(lambda: accepted >= 5)
        assert trio.current_time() - began >= 4 * 0.005
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("quick_retries")
async def test_a_connector_whose_link_cannot_be_made_tries_again(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    bench.factory.fails += [OSError(28, "no space in epoll")] * 2
    connector = StreamConnector("connect+unix://qemu", bench.factory, path=str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        async with attached(connector):
            await wait_for(lambda: connector.links)
    assert bench.factory.told.count("cannot attach a guest") == 2


async def test_a_connector_ends_while_it_waits(bench: Bench, tmp_path: Path) -> None:
    async with attached(StreamConnector("connect+unix://x", bench.factory, path=str(tmp_path / "nobody"))):
        await wait_for(lambda: bench.factory.told)


# ---- descriptors


async def test_an_inherited_socket(bench: Bench) -> None:
    ours, guest = socket.socketpair()
    descriptor = StreamDescriptor("fd://", bench.factory, fd=ours.detach())
    async with attached(descriptor):
        guest.send(framed(b"x" * 60))
        await wait_for(lambda: bench.factory.frames)
        guest.close()
        await wait_for(lambda: not descriptor.links)


async def test_the_end_of_the_guest_ends_the_attachment(bench: Bench) -> None:
    """Nobody can come back on it."""
    ours, guest = socket.socketpair()
    descriptor = StreamDescriptor("fd://", bench.factory, fd=ours.detach())
    await descriptor.open()
    guest.close()
    with trio.fail_after(5):
        await descriptor.run()


async def test_descriptors_that_are_no_guests(bench: Bench, tmp_path: Path) -> None:
    unconnected = socket.socket(socket.AF_UNIX)
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    file = os.open(tmp_path, os.O_RDONLY)
    closed = os.dup(file)
    os.close(closed)
    for fd, why in (
        (unconnected.fileno(), "not a connected socket"),
        (datagram.fileno(), "not a stream socket"),
        (file, "not an open socket"),
        (closed, "not an open socket"),
    ):
        with pytest.raises(OSError, match=why):
            await StreamDescriptor("fd://", bench.factory, fd=fd).open()
    os.fstat(file)  # none of them was closed
    assert unconnected.fileno() >= 0
    os.close(file)
    unconnected.close()
    datagram.close()
