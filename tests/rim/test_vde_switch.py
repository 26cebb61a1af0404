"""`vde://DIR`: the control protocol by a client of our own, and by vde2's vde_plug."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from netstack.host.poller import HostPoller
from netstack.vde.datagram import DatagramLink
from netstack.vde.vde_switch import VDE_MTU, VdeSwitch, parse_request
from tests.rim.rig import Factory, running, wait_for

MAGIC = 0xFEEDFACE


def request(path: Path | str, *, kind: int = 0, version: int = 3, magic: int = MAGIC, family: int = 1) -> bytes:
    """As libvdeplug packs it, native endian."""
    return struct.pack("=IIIH108s", magic, version, kind, family, str(path).encode())


class Plug:
    """A VDE client: libvdeplug's part."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.path = directory.parent / name
        self.data = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.data.bind(str(self.path))
        self.data.setblocking(False)
        self.control = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.answer = b""

    async def plug(self, kind: int = 0, description: bytes = b"test") -> str:
        """Plug in; the path of the switch's port."""
        await self.control.connect(str(self.directory / "ctl"))
        await self.control.send(request(self.path, kind=kind) + description)
        while len(self.answer) < 110:
            piece = await self.control.recv(200)
            if not piece:
                return ""
            self.answer += piece
        family, path = struct.unpack("=H108s", self.answer)
        assert family == socket.AF_UNIX
        port: str = path.split(b"\0")[0].decode()
        self.data.connect(port)
        return port

    async def receive(self) -> bytes:
        return await trio.socket.from_stdlib_socket(self.data).recv(70_000)

    def close(self) -> None:
        self.control.close()
        self.data.close()
        self.path.unlink(missing_ok=True)


class Bench:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.poller = HostPoller()
        self.factory = Factory(self.poller)
        self.switch = VdeSwitch("vde://test", self.factory, directory=str(directory))
        self.plugs: list[Plug] = []

    def names(self) -> list[str]:
        """What is in the directory; sockets only."""
        return [path.name for path in self.directory.iterdir() if path.is_socket()]

    def plug(self) -> Plug:
        plug = Plug(self.directory, f"client-{len(self.plugs)}")
        self.plugs.append(plug)
        return plug


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A switch that runs."""
    made = Bench(tmp_path / "switch")
    await made.switch.open()
    async with running(made.poller, made.factory.flush) as nursery:
        nursery.start_soon(made.switch.run)
        try:
            yield made
        finally:
            for plug in made.plugs:
                plug.close()
    made.poller.close()


async def test_a_client_plugs_in_and_out(bench: Bench) -> None:
    plug = bench.plug()
    port = await plug.plug()
    assert Path(port).parent == bench.directory
    assert Path(port).name.startswith("001.")
    assert sorted(bench.names()) == [Path(port).name, "ctl"]
    (link,) = bench.switch.links
    assert (link.name, link.mtu, link.prefix) == ("vde://test#1", VDE_MTU, 0)
    assert bench.factory.told == ["plugged in"]
    plug.close()
    await wait_for(lambda: link.closed)
    await wait_for(lambda: bench.names() == ["ctl"])
    assert bench.factory.closed == [("vde://test#1", "guest unplugged")]
    assert bench.switch.links == []
    assert len(bench.poller) == 0


async def test_frames_are_datagrams(bench: Bench) -> None:
    plug = bench.plug()
    await plug.plug()
    frames = [bytes([i]) * size for i, size in enumerate((14, 60, 1514, 9014))]
    for frame in frames:
        plug.data.send(frame)
    await wait_for(lambda: len(bench.factory.frames) == 4)
    assert [frame for _, frame in bench.factory.frames] == frames
    (link,) = bench.switch.links
    for frame in frames:
        link.queue_frame(frame)
    link.flush()
    assert [await plug.receive() for _ in frames] == frames


async def test_ports_are_numbered_and_reused(bench: Bench) -> None:
    plugs = [bench.plug() for _ in range(3)]
    assert [Path(await plug.plug()).name[:3] for plug in plugs] == ["001", "002", "003"]
    plugs[1].close()
    await wait_for(lambda: len(bench.switch.links) == 2)
    again = bench.plug()
    assert Path(await again.plug()).name[:3] == "002"


async def test_a_port_may_be_asked_for(bench: Bench) -> None:
    """type >> 8; one that is taken, or beyond the switch, is refused by the end of the connection."""
    seven, other, beyond = bench.plug(), bench.plug(), bench.plug()
    assert Path(await seven.plug(7 << 8)).name[:3] == "007"
    assert await other.plug(7 << 8) == ""
    assert await beyond.plug(100_000 << 8) == ""
    assert bench.factory.told == ["plugged in", "no such port is free", "no such port is free"]


async def test_the_management_port_is_a_port_like_others(bench: Bench) -> None:
    assert await bench.plug().plug(1) != ""


async def test_a_request_in_pieces(bench: Bench) -> None:
    plug = bench.plug()
    await plug.control.connect(str(bench.directory / "ctl"))
    whole = request(plug.path)
    for at in range(0, len(whole), 10):
        await plug.control.send(whole[at : at + 10])
        await trio.sleep(0.001)
    assert len(await plug.control.recv(200)) == 110
    assert len(bench.switch.links) == 1


@pytest.mark.parametrize(
    "data",
    (
        request("/tmp/x", magic=0x12345678),
        request("/tmp/x", version=1),
        request("/tmp/x", version=2),
        request("/tmp/x", family=2),
        request("/tmp/x", kind=2),
        request(""),
        request("relative/path"),
        request("/tmp/x") + b"d" * 129,
        b"\xff" * 122,
    ),
    ids=("magic", "version 1", "version 2", "family", "type", "unnamed", "relative", "too long", "garbage"),
)
async def test_what_is_not_a_request(bench: Bench, data: bytes) -> None:
    """Refused, and the switch goes on."""
    assert parse_request(data) is None
    plug = bench.plug()
    await plug.control.connect(str(bench.directory / "ctl"))
    await plug.control.send(data)
    assert await plug.control.recv(200) == b""
    assert bench.factory.told == ["not a VDE request"]
    assert await bench.plug().plug() != ""


async def test_a_client_that_hangs_up_at_once(bench: Bench) -> None:
    for data in (b"", b"\xce", request("/tmp/x")[:-1]):
        control = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await control.connect(str(bench.directory / "ctl"))
        if data:
            await control.send(data)
        control.close()
    assert await bench.plug().plug() != ""
    assert len(bench.switch.links) == 1


async def test_a_client_whose_socket_is_not_there(bench: Bench) -> None:
    plug = bench.plug()
    plug.path.unlink()
    assert await plug.plug() == ""
    assert bench.factory.told == ["cannot reach the plug's socket"]
    assert bench.names() == ["ctl"]


async def test_a_link_that_cannot_be_made_turns_away_one_client(bench: Bench) -> None:
    bench.factory.fails.append(OSError(28, "no space in epoll"))
    assert await bench.plug().plug() == ""
    assert await bench.plug().plug() != ""


async def test_a_client_that_dies_without_unplugging(bench: Bench) -> None:
    """Its datagram socket is gone first; the next frame to it tells."""
    plug = bench.plug()
    await plug.plug()
    plug.data.close()
    (link,) = bench.switch.links
    link.queue_frame(bytes(60))
    link.flush()
    assert link.closed
    await wait_for(lambda: not bench.switch.links)
    assert await bench.plug().plug() != ""


async def test_several_clients_are_several_links(bench: Bench) -> None:
    one, two = bench.plug(), bench.plug()
    await one.plug()
    await two.plug()
    one.data.send(b"1" * 60)
    two.data.send(b"2" * 60)
    await wait_for(lambda: len(bench.factory.frames) == 2)
    assert sorted(bench.factory.frames) == [("vde://test#1", b"1" * 60), ("vde://test#2", b"2" * 60)]


def test_descriptions_are_shown_as_far_as_they_go() -> None:
    assert parse_request(request("/tmp/x", kind=5 << 8) + b"QEMU user=root pid=1") == (
        5,
        "/tmp/x",
        "QEMU user=root pid=1",
    )
    assert parse_request(request("/tmp/x") + b"\xff\0rest") == (0, "/tmp/x", "\N{REPLACEMENT CHARACTER}")
    for size in range(len(request("/tmp/x"))):
        assert parse_request(request("/tmp/x")[:size]) is None


# ---- the directory


async def test_the_directory_is_private_and_goes_with_the_switch(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "switch")
    await bench.switch.open()
    assert stat.S_IMODE(bench.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((bench.directory / "ctl").stat().st_mode) == 0o600
    bench.switch.close()
    assert not bench.directory.exists()
    bench.poller.close()


async def test_the_directory_goes_also_when_the_switch_closes_with_a_guest_plugged_in(tmp_path: Path) -> None:
    """Its port's socket is there until its task ends, after close()."""
    bench = Bench(tmp_path / "switch")
    await bench.switch.open()
    async with running(bench.poller, bench.factory.flush) as nursery:
        nursery.start_soon(bench.switch.run)
        plug = bench.plug()
        assert await plug.plug()
        bench.switch.close()
        nursery.cancel_scope.cancel()
    plug.close()
    bench.poller.close()
    assert not bench.directory.exists()


async def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    """Ports of a switch that did not clean up go, other files do not."""
    directory = tmp_path / "switch"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    (directory / "001.txt").write_text("mine")
    for name in ("001.7", "ctl"):
        stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stale.bind(str(directory / name))
        stale.close()
    bench = Bench(directory)
    await bench.switch.open()
    assert sorted(path.name for path in directory.iterdir()) == ["001.txt", "ctl", "notes.txt"]
    bench.switch.close()
    assert sorted(path.name for path in directory.iterdir()) == ["001.txt", "notes.txt"]
    bench.poller.close()


async def test_a_switch_in_use_is_not_taken_over(bench: Bench) -> None:
    plug = bench.plug()
    port = await plug.plug()
    second = VdeSwitch("vde://second", bench.factory, directory=str(bench.directory))
    with pytest.raises(OSError, match="in use by another process"):
        await second.open()
    second.close()
    assert sorted(bench.names()) == [Path(port).name, "ctl"]


async def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path / "file")
    with pytest.raises(OSError, match="is not a directory"):
        await bench.switch.open()
    bench.poller.close()


# ---- vde2's own client


@pytest.mark.needs("vde_plug")
async def test_vde_plug_plugs_in(bench: Bench, tmp_path: Path) -> None:
    """vde_plug carries frames over its standard input and output, each behind a u16 length, big endian."""
    process = await trio.lowlevel.open_process(
        ["vde_plug", str(bench.directory)],
        stdin=-1,
        stdout=-1,
        stderr=-1,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        await wait_for(lambda: bench.switch.links)
        frame = bytes(range(200)) * 7
        await process.stdin.send_all(len(frame).to_bytes(2, "big") + frame)
        await wait_for(lambda: bench.factory.frames)
        assert [each for _, each in bench.factory.frames] == [frame]
        (link,) = bench.switch.links
        assert isinstance(link, DatagramLink)
        link.queue_frame(frame[::-1])
        link.flush()
        got = b""
        with trio.fail_after(5):
            while len(got) < 2 + len(frame):
                got += await process.stdout.receive_some(2000)
        assert got == len(frame).to_bytes(2, "big") + frame[::-1]
    finally:
        process.kill()
        await process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                await pipe.aclose()
    await wait_for(lambda: not bench.switch.links)
