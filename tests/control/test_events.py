"""Events: the hub by itself, and `GET /v1/events` over a real socket in front of a real network."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
import trio

import netstack
from netstack.control import events, events_api
from netstack.control.api import listen_unix, serve_api
from netstack.control.events import KINDS, MAX_LISTENERS, MAX_WAITING, EventHub, TooManyListenersError, write_event
from netstack.control.log import Log

PATIENCE = 20
SETTINGS: dict[str, Any] = {"network": {"subnet": "10.98.8.0/24"}, "dns": {"source": "none", "mdns": False}}


# ---- the hub ----


async def test_each_listener_hears_what_it_asked_for() -> None:
    hub = EventHub()
    hub.publish("lease", {"what": "bound"})  # to nobody
    assert not hub.wants("lease")
    everything, leases = hub.listen(), hub.listen(["lease"])
    assert hub.wants("flow")
    hub.publish("flow", {"what": "opened"})
    hub.publish("lease", {"what": "released"})
    assert [event.fields["what"] for event in await everything.wait(0)] == ["opened", "released"]
    (event,) = await leases.wait(0)
    assert (event.kind, event.fields["what"]) == ("lease", "released")
    assert event.fields["time"].endswith("Z")
    everything.close()
    everything.close()
    assert not hub.wants("flow")
    assert hub.wants("lease")
    leases.close()
    assert not hub.wants("lease")


async def test_a_listener_waits_until_something_happens(autojump_clock: trio.testing.MockClock) -> None:
    hub = EventHub()
    listener = hub.listen()
    before = trio.current_time()
    assert await listener.wait(5) == []
    assert trio.current_time() - before == 5

    async def happen() -> None:
        await trio.sleep(2)
        hub.publish("link", {"what": "up"})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(happen)
        assert len(await listener.wait(60)) == 1
    assert trio.current_time() - before == 7


async def test_one_that_does_not_read_loses_the_oldest_and_is_told() -> None:
    hub = EventHub()
    slow, quick = hub.listen(), hub.listen()
    for number in range(MAX_WAITING + 10):
        hub.publish("flow", {"n": number})
        if number % 100 == 0:
            await quick.wait(0)
    lost, first, *others = await slow.wait(0)
    assert (lost.kind, lost.fields) == ("lost", {"events": 10})
    assert first.fields["n"] == 10
    assert len(others) == MAX_WAITING - 1
    assert all(event.kind == "flow" for event in await quick.wait(0))
    hub.publish("flow", {"n": 0})
    assert [event.kind for event in await slow.wait(0)] == ["flow"]


def test_there_are_only_so_many_listeners() -> None:
    hub = EventHub()
    listeners = [hub.listen() for _ in range(MAX_LISTENERS)]
    with pytest.raises(TooManyListenersError):
        hub.listen()
    listeners[0].close()
    hub.listen()


def test_an_event_is_one_data_line_whatever_a_guest_is_called() -> None:
    event = events.Event(7, "lease", {"name": "a\n\ndata: x\r\u2028é", "n": None})
    assert write_event(event) == (b'id: 7\nevent: lease\ndata: {"name":"a\\n\\ndata: x\\r\\u2028\\u00e9","n":null}\n\n')
    assert write_event(events.Event(0, "status", {})) == b"event: status\ndata: {}\n\n"


# ---- over HTTP ----


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[tuple[netstack.Network, httpx.AsyncClient]]:
    opened = netstack.open_network(netstack.Config(**SETTINGS), log=Log("error"))
    async with opened as network, trio.open_nursery() as serving:
        listener = listen_unix(str(tmp_path / "a"))
        await serving.start(functools.partial(serve_api, network.api, [listener]))
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "a"))
        async with httpx.AsyncClient(transport=transport, base_url="http://n", timeout=PATIENCE) as client:
            yield network, client
        serving.cancel_scope.cancel()


class Heard:
    """A stream of events, read as the HTML standard says, over a connection of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._reader = h11.Connection(h11.CLIENT)
        self._rest = ""
        self.headers: dict[bytes, bytes] = {}

    async def ask(self, target: str) -> None:
        request = h11.Request(method="GET", target=target, headers=[("host", "n")])
        for event in (request, h11.EndOfMessage()):
            await self._stream.send_all(self._reader.send(event) or b"")

    async def next(self) -> tuple[str, Any]:
        """The next event, or comment."""
        with trio.fail_after(PATIENCE):
            while "\n\n" not in self._rest:
                event = self._reader.next_event()
                if event is h11.NEED_DATA:
                    self._reader.receive_data(bytes(await self._stream.receive_some()))
                elif isinstance(event, h11.Response):
                    self.headers = dict(event.headers)
                else:
                    assert isinstance(event, h11.Data), event
                    self._rest += bytes(event.data).decode()
        part, _, self._rest = self._rest.partition("\n\n")
        if part.startswith(":"):
            return "comment", part
        fields = dict(line.split(": ", 1) for line in part.split("\n"))
        return fields["event"], json.loads(fields["data"])


@asynccontextmanager
async def listening(tmp_path: Path, query: str = "") -> AsyncIterator[Heard]:
    async with await trio.open_unix_socket(str(tmp_path / "a")) as stream:
        heard = Heard(stream)
        await heard.ask(f"/v1/events{query}")
        assert await heard.next() == ("comment", ": netstack")
        yield heard


async def until_nobody_listens(network: netstack.Network) -> None:
    with trio.fail_after(PATIENCE):
        while any(map(network.hub.wants, KINDS)):  # noqa: ASYNC110 # what is waited for is a connection's end
            await trio.sleep(0.01)


async def test_forwards_leases_and_flows_are_told_while_they_happen(tmp_path: Path) -> None:
    async with running(tmp_path) as (network, _):
        assert not network.hub.wants("flow")
        async with listening(tmp_path) as heard:
            assert heard.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
            assert all(map(network.hub.wants, KINDS))
            forward = network.forwards.add("127.0.0.1:0:80")
            kind, told = await heard.next()
            assert (kind, told["what"], told["spec"]) == ("forward", "added", str(forward.spec))
            forward.close()
            kind, told = await heard.next()
            assert (kind, told["what"], told["id"]) == ("forward", "removed", forward.id)
            mac = b"\x52\x54\0\0\0\1"
            address = network.addresses.subnet[15].packed
            assert network.leases.bind(mac, address, time.monotonic(), name="debian") is not None
            kind, told = await heard.next()
            assert (kind, told["what"], told["mac"]) == ("lease", "bound", "52:54:00:00:00:01")
            assert (told["address"], told["name"]) == ("10.98.8.15", "debian")
            events_of_stack = network.stack.events
            assert events_of_stack is not None
            assert events_of_stack.debug
            events_of_stack.flow_opened("tcp", "10.98.8.15:1", "192.0.2.1:80")
            assert (await heard.next())[1]["peer"] == "192.0.2.1:80"
            for _ in range(3):
                events_of_stack.warning("key", "all is not well", reason=b"x")
            kind, told = await heard.next()
            assert (kind, told["message"], told["reason"]) == ("warning", "all is not well", "b'x'")
            network.hub.publish("link", {"what": "up"})
            assert (await heard.next())[0] == "link"  # of three equal warnings one is told
        await until_nobody_listens(network)
        assert not events_of_stack.debug


async def test_what_is_running_comes_with_it_where_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as (network, _), listening(tmp_path, "?status=0.2&kinds=lease") as heard:
        got = [await heard.next() for _ in range(3)]
        network.hub.publish("link", {})
        got += [await heard.next() for _ in range(2)]
        assert [kind for kind, _ in got] == ["status"] * 5
        uptimes = [told["uptime"] for _, told in got]
        assert uptimes == sorted(set(uptimes))
        assert got[0][1]["network"]["subnet"] == "10.98.8.0/24"
        assert "list" not in got[0][1]["flows"]


async def test_a_quiet_stream_is_kept_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_api, "KEEP_AWAKE", 0.05)
    async with running(tmp_path), listening(tmp_path) as heard:
        assert [await heard.next() for _ in range(2)] == [("comment", ": still here")] * 2


@pytest.mark.parametrize(
    ("query", "words"),
    (
        ("kinds=lease,nonsense", "there is no 'nonsense'; there are: guest, lease, forward, flow, link, warning"),
        ("status=0", "must be a number of seconds"),
        ("status=nan", "must be a number of seconds"),
        ("status=soon", "must be a number of seconds"),
    ),
)
async def test_what_cannot_be_listened_to_is_refused(tmp_path: Path, query: str, words: str) -> None:
    async with running(tmp_path) as (network, client):
        answer = await client.get(f"/v1/events?{query}")
        assert answer.status_code == 400
        assert words in answer.json()["error"]
        assert not any(map(network.hub.wants, KINDS))


async def test_too_many_listeners_are_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as (network, client):
        listeners = [network.hub.listen() for _ in range(MAX_LISTENERS)]
        assert (await client.get("/v1/events")).status_code == 503
        for listener in listeners:
            listener.close()


async def test_asking_for_the_head_alone_ends(tmp_path: Path) -> None:
    async with running(tmp_path) as (network, client):
        with trio.fail_after(PATIENCE):
            assert (await client.head("/v1/events")).status_code == 200
        await until_nobody_listens(network)


async def test_the_network_ends_at_once_while_somebody_listens(tmp_path: Path) -> None:
    async with running(tmp_path):
        stream = await trio.open_unix_socket(str(tmp_path / "a"))
        heard = Heard(stream)
        await heard.ask("/v1/events?status=0.2")
        assert (await heard.next())[0] == "comment"
        before = trio.current_time()
    assert trio.current_time() - before < 2
    await stream.aclose()
