"""The pcap mode turned on and off over the API, in front of a real network with a real link."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from dpkt import pcapng

import netstack
from netstack.control.api import make_app
from netstack.control.log import Log

ARP = bytes.fromhex("ffffffffffff 525400000001 0806 0001080006040001 525400000001 0a620811 000000000000 0a620802")
SETTINGS: dict[str, Any] = {"network": {"subnet": "10.98.8.0/24"}, "dns": {"source": "none", "mdns": False}}


class Api:
    def __init__(self, network: netstack.Network, client: httpx.AsyncClient, guest: trio.SocketStream) -> None:
        self.network = network
        self._client = client
        self._guest = guest

    async def post(self, **body: Any) -> tuple[int, Any]:
        answer = await self._client.post("/v1/pcap", json=body)
        return answer.status_code, answer.json()

    async def ask(self) -> Any:
        return (await self._client.get("/v1/pcap")).json()

    async def say(self) -> None:
        """One frame of the guest's, and the answer to it."""
        await self._guest.send_all(struct.pack(">I", len(ARP)) + ARP)
        with trio.fail_after(20):
            while (await self._frame())[12:14] != b"\x08\x06" or self._last[21] != 2:
                pass

    async def _frame(self) -> bytes:
        head = await self._exactly(4)
        self._last = await self._exactly(int.from_bytes(head, "big"))
        return self._last

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += await self._guest.receive_some(count - len(data))
        return data


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    config = netstack.Config(**SETTINGS, link=[{"uri": f"unix://{tmp_path}/q"}])
    async with netstack.open_network(config, log=Log("error")) as network:
        transport = httpx.ASGITransport(make_app(network.api, None))
        guest = await trio.open_unix_socket(str(tmp_path / "q"))
        async with guest, httpx.AsyncClient(transport=transport, base_url="http://n") as client:
            yield Api(network, client, guest)


def frames_in(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return [data for _, data in pcapng.Reader(file)]


async def test_frames_are_written_from_the_start_to_the_stop(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "one.pcapng"
    await api.say()
    assert await api.ask() == {"active": False, "file": None, "frames": 0, "bytes": 0}
    status, state = await api.post(action="start", file=str(file))
    assert (status, state["active"], state["file"], state["frames"]) == (200, True, str(file), 0)
    await api.say()
    assert (await api.ask())["frames"] == 2
    assert await api.post(action="start", file=str(file)) == (
        409,
        {"error": f"frames are written to {file} already; stop that first"},
    )
    assert (await api.post(action="stop"))[1]["active"] is False
    await api.say()
    asked, answer = frames_in(file)
    assert asked == ARP
    assert answer[:6] == ARP[6:12]
    assert (await api.post(action="stop"))[0] == 409
    # And once more, with a limit that the first frames reach.
    second = tmp_path / "two.pcapng"
    assert (await api.post(action="start", file=str(second), max_size=100))[0] == 200
    for _ in range(3):
        await api.say()
    assert api.network.capture is not None
    api.network.capture.flush()
    assert (await api.ask())["active"] is False
    assert (await api.post(action="start", file=str(second)))[0] == 200
    await api.say()


async def test_a_capture_that_is_full_leaves_no_task_behind(api: Api, tmp_path: Path) -> None:
    async def fill_and_count() -> int:
        assert (await api.post(action="start", file=str(tmp_path / "x"), max_size=1))[0] == 200
        assert api.network.capture is not None
        api.network.capture.flush()
        await trio.testing.wait_all_tasks_blocked()
        return trio.lowlevel.current_statistics().tasks_living

    first = await fill_and_count()
    assert [await fill_and_count() for _ in range(3)] == [first] * 3


@pytest.mark.parametrize(
    ("body", "words"),
    (
        ({}, "action is missing"),
        ({"action": "pause"}, "action: must be one of start, stop"),
        ({"action": "start"}, "file is missing"),
        ({"action": "start", "file": "all.pcapng"}, "must be a path that begins with /"),
        ({"action": "start", "file": "/tmp/a\0b"}, "must be a path that begins with /"),
        ({"action": "start", "file": "/nowhere/at/all"}, "No such file or directory"),
        ({"action": "start", "file": "/"}, "Is a directory"),
        ({"action": "start", "file": "/x", "max_size": -1}, "max_size: must be a number of bytes"),
        ({"action": "start", "file": "/x", "max_size": True}, "max_size: must be a number of bytes"),
        ({"action": "start", "file": "/x", "size": 1}, "unknown key 'size'"),
        ({"action": "stop", "file": "/x"}, "unknown key 'file'"),
    ),
)
async def test_what_cannot_be_is_refused_with_words(api: Api, body: dict[str, Any], words: str) -> None:
    status, answer = await api.post(**body)
    assert status == 400
    assert words in answer["error"]
    assert api.network.capture is None


async def test_a_network_that_ends_closes_its_capture(tmp_path: Path) -> None:
    async with netstack.open_network(netstack.Config(**SETTINGS), log=Log("error")) as network:
        network.api.capture.start(str(tmp_path / "x"))
        capture = network.capture
        assert capture is not None
    assert not capture.is_open
