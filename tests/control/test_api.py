"""The HTTP API, over real sockets and by a real HTTP client."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from netstack.control.api import ApiError, ApiListener, listen_tcp, listen_unix, serve_api
from netstack.control.events import EventHub
from netstack.control.log import Log
from netstack.control.tunnels import UnknownGuestError


class Source:
    """A network to look at, of which most is not asked for here."""

    dns_view: Any = None  # tests/control/test_dns_api.py
    forwards: Any = ()
    capture: Any = None
    gvproxy: Any = None

    def __init__(self) -> None:
        self.hub = EventHub()
        self.answer: dict[str, Any] = {"version": "9", "guests": [{"name": "é"}]}
        self.fails = False

    def statistics(self) -> Mapping[str, Any]:
        if self.fails:
            raise RuntimeError("a bug")
        return self.answer

    def summary(self) -> dict[str, Any]:
        return dict(self.statistics())

    def guests(self) -> list[dict[str, Any]]:
        return []

    def lease_list(self) -> list[dict[str, Any]]:
        return []

    def flows(self, protocol: str | None, guest: str | None, limit: int) -> dict[str, Any]:
        return {"asked": [protocol, guest, limit]}

    def proxy(self) -> Mapping[str, Any] | None:
        return None

    def proxy_env(self, form: str) -> str:
        raise ValueError(f"no {form}")

    def open_guest(self, sock: socket.socket, guest: str, port: int, on_opened: Callable[[int], None]) -> None:
        raise UnknownGuestError(f"there is no guest {guest!r}")


@asynccontextmanager
async def served(source: Source, *listeners: ApiListener, log: Log | None = None) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_api(source, listeners, log=log, task_status=task_status)

        await nursery.start(serve)
        yield
        nursery.cancel_scope.cancel()


def client(listener: ApiListener, path: Path | None = None, **kwargs: Any) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(path) if path else None)
    base = "http://netstack" if path else f"http://127.0.0.1:{listener.port}"
    return httpx.AsyncClient(transport=transport, base_url=base, **kwargs)


async def test_status_over_the_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listener = listen_unix(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    source = Source()
    async with served(source, listener), client(listener, path) as http:
        answer = await http.get("/v1/status")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json() == source.answer
        source.answer = {"version": "10"}
        assert (await http.get("/v1/status")).json() == {"version": "10"}
        assert (await http.get("/nowhere")).status_code == 404
        wrong = await http.post("/v1/status")
        assert (wrong.status_code, set(wrong.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
        openapi = (await http.get("/openapi.json")).json()
        assert openapi["openapi"].startswith("3.")
        assert "/v1/status" in openapi["paths"]
        assert "security" not in openapi
    assert not path.exists()


async def test_tcp_wants_the_token(tmp_path: Path) -> None:
    listener = listen_tcp("127.0.0.1", 0)
    assert listener.port > 0
    assert listener.uri == f"tcp://127.0.0.1:{listener.port}"
    place = tmp_path / "token"
    place.write_text("an old one")
    listener.store_token(place)
    assert place.stat().st_mode & 0o777 == 0o600
    token = place.read_text().strip()
    async with served(Source(), listener), client(listener) as http:
        wrong: list[dict[str, str]]
        wrong = [{}, {"authorization": token}, {"authorization": f"Bearer {token}x"}, {"authorization": "Bearer"}]
        for headers in wrong:
            for path in ("/v1/status", "/openapi.json", "/nowhere"):
                answer = await http.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {token}"}
        assert (await http.get("/v1/status", headers=right)).status_code == 200
        assert (await http.get("/openapi.json", headers=right)).json()["security"] == [{"token": []}]
    assert not place.exists()


def test_tokens_are_fresh_and_long() -> None:
    listeners = [listen_tcp("127.0.0.1", 0) for _ in range(2)]
    first, second = (listener.token or "" for listener in listeners)
    assert first != second
    assert len(first) >= 43  # 256 bits
    for listener in listeners:
        listener.close()


async def test_a_bug_in_an_answer_is_logged_and_the_api_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    stream = io.StringIO()
    source = Source()
    source.fails = True
    listener = listen_unix(str(path))
    async with served(source, listener, log=Log("info", "json", stream=stream)), client(listener, path) as http:
        answer = await http.get("/v1/status")
        assert answer.status_code == 500
        assert "a bug" not in answer.text
        source.fails = False
        assert (await http.get("/v1/status")).status_code == 200
    assert "a bug" in json.loads(stream.getvalue())["error"]


async def test_junk_and_silence_disturb_nobody(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listener = listen_unix(str(path))
    async with served(Source(), listener), client(listener, path) as http:
        silent = await trio.open_unix_socket(str(path))
        junk = await trio.open_unix_socket(str(path))
        await junk.send_all(os.urandom(100) + b"\r\n\r\n")
        assert (await http.get("/v1/status")).status_code == 200
        await silent.aclose()
        await junk.aclose()


async def test_it_ends_at_once_with_a_request_open(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listener = listen_unix(str(path))
    async with served(Source(), listener):
        stream = await trio.open_unix_socket(str(path))
        await stream.send_all(b"GET /v1/status HTTP/1.1\r\n")
        before = trio.current_time()
    assert trio.current_time() - before < 1
    await stream.aclose()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    live = listen_unix(str(path))
    with pytest.raises(ApiError, match="another process listens there"):
        listen_unix(str(path))
    assert path.is_socket()
    # Somebody put another socket in its place: that one is not ours to remove.
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        live.close()
        assert path.is_socket()


def test_what_cannot_be_listened_at_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ApiError, match="a file that is no socket is there"):
        listen_unix(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ApiError, match="No such file or directory"):
        listen_unix(str(tmp_path / "gone" / "a.sock"))
    taken = listen_tcp("127.0.0.1", 0)
    with pytest.raises(ApiError, match=rf"tcp://127.0.0.1:{taken.port}: Address already in use"):
        listen_tcp("127.0.0.1", taken.port)
    with pytest.raises(ApiError, match="cannot store the API's token"):
        taken.store_token(tmp_path / "gone" / "token")
    taken.close()
    taken.close()


def test_the_umask_is_left_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        listen_unix(str(tmp_path / "a.sock")).close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_token_goes_into_a_file_of_our_own_making_or_nowhere(tmp_path: Path) -> None:
    listener = listen_tcp("127.0.0.1", 0)
    place = tmp_path / "token"
    waiting = tmp_path / f".token.{os.getpid()}"
    waiting.touch()
    with waiting.open() as theirs:
        listener.store_token(place)
        assert theirs.read() == ""
    place.unlink()
    place.mkdir()
    with pytest.raises(ApiError, match="Is a directory"):
        listener.store_token(place)
    assert list(tmp_path.iterdir()) == [place]
    listener.close()


async def test_without_descriptors_it_warns_once_and_serves_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "api.sock"
    stream = io.StringIO()
    listener = listen_unix(str(path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with served(Source(), listener, log=Log("info", "json", stream=stream)), client(listener, path) as http:
        assert (await http.get("/v1/status")).status_code == 200
        waiting = socket.socket(socket.AF_UNIX)
        spare = os.open(os.devnull, os.O_RDONLY)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        try:
            waiting.connect(str(path))
            await trio.sleep(0.35)  # trio tries again every 0.1 s
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        waiting.close()
        assert (await http.get("/v1/status")).status_code == 200
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "the API cannot accept requests"
    assert "Too many open files" in json.loads(line)["error"]
    assert capfd.readouterr().err == ""
    assert logging.getLogger("trio.serve_listeners").filters == []
