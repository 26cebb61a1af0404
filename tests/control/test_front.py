"""The API's front: what becomes a tunnel, what goes to hypercorn, and clients that misbehave."""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netstack.control import front
from netstack.control.api import ApiListener, listen_tcp, listen_unix, serve_api
from netstack.control.tunnels import UnknownGuestError
from tests.control.test_api import Source

PATIENCE = 20


class Guests(Source):
    """A network whose guest echoes at port 7, refuses port 9, and says nothing at port 10."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []
        self.open: list[socket.socket] = []
        self.waiting: list[Callable[[int], None]] = []

    def open_guest(self, sock: socket.socket, guest: str, port: int, on_opened: Callable[[int], None]) -> None:
        self.asked.append((guest, port))
        if guest == "nobody":
            raise UnknownGuestError("there is no guest 'nobody'")
        if port == 9:
            # As a flow does: the owner of the socket resets it after it has told why.
            on_opened(errno.ECONNREFUSED)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        elif port == 10:
            self.open.append(sock)
            self.waiting.append(on_opened)
        else:
            on_opened(0)
            trio.lowlevel.spawn_system_task(echo, sock)


async def echo(sock: socket.socket) -> None:
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
        async for data in stream:
            await stream.send_all(data.upper())
        await stream.send_eof()


@asynccontextmanager
async def serving(*listeners: ApiListener) -> AsyncIterator[Guests]:
    source = Guests()
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_api, source, listeners))
        yield source
        nursery.cancel_scope.cancel()
    for sock in source.open:
        sock.close()


@pytest.fixture(params=("unix", "tcp"))
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> ApiListener:
    return listen_unix(str(tmp_path / "a")) if request.param == "unix" else listen_tcp("127.0.0.1", 0)


async def dial(listener: ApiListener) -> trio.SocketStream:
    if listener.port:
        return await trio.open_tcp_stream("127.0.0.1", listener.port)
    return await trio.open_unix_socket(str(listener.sock.getsockname()))


def head(listener: ApiListener, line: str, *more: str) -> bytes:
    token = [f"Authorization: Bearer {listener.token}"] if listener.token else []
    return "\r\n".join([f"{line} HTTP/1.1", "Host: base", *token, *more, "", ""]).encode()


async def read_all(stream: trio.SocketStream) -> bytes:
    with trio.fail_after(PATIENCE):
        return b"".join([bytes(chunk) async for chunk in stream])


async def test_a_tunnel_is_ok_and_then_the_guests_bytes(listener: ApiListener) -> None:
    async with serving(listener) as source, await dial(listener) as stream:
        # What the client sends early, before anybody has answered, is the guest's too.
        await stream.send_all(head(listener, "POST /tunnel?ip=192.168.5.15&port=7") + b"early ")
        await stream.send_all(b"and late")
        await stream.send_eof()
        assert await read_all(stream) == b"OKEARLY AND LATE"
        assert source.asked == [("192.168.5.15", 7)]


@pytest.mark.parametrize("method", ("GET", "POST", "CONNECT"))
async def test_a_tunnel_takes_any_method(tmp_path: Path, method: str) -> None:
    listener = listen_unix(str(tmp_path / "a"))
    async with serving(listener), await dial(listener) as stream:
        await stream.send_all(head(listener, f"{method} /tunnel?ip=192.168.5.15&port=7") + b"x")
        await stream.send_eof()
        assert await read_all(stream) == b"OKX"


async def test_a_request_may_come_byte_by_byte(listener: ApiListener) -> None:
    async with serving(listener):
        for line, wanted in (
            ("POST /tunnel?ip=1.2.3.4&port=7", b"OKTAIL"),
            ("GET /v1/status", b"HTTP/1.1 200 \r\ncache-control: no-store\r\n"),
            ("GET /tunnel-vision", b"HTTP/1.1 404 "),
            ("GET /", b"HTTP/1.1 200 "),
        ):
            async with await dial(listener) as stream:
                for byte in head(listener, line, "Connection: close"):
                    await stream.send_all(bytes([byte]))
                    await trio.lowlevel.checkpoint()
                if wanted.startswith(b"OK"):
                    await stream.send_all(b"tail")
                    await stream.send_eof()
                assert (await read_all(stream)).startswith(wanted)


async def test_connect_answers_when_the_guest_has(listener: ApiListener) -> None:
    async with serving(listener) as source:
        async with await dial(listener) as stream:
            await stream.send_all(head(listener, "POST /v1/connect?guest=debian&port=7") + b"hello")
            await stream.send_eof()
            wanted = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nHELLO"
            assert await read_all(stream) == wanted
        for line, status, words in (
            ("POST /v1/connect?guest=debian&port=9", 502, "debian port 9: Connection refused"),
            ("POST /v1/connect?port=9", 502, "the first guest port 9: Connection refused"),
            ("POST /v1/connect?guest=nobody&port=7", 404, "there is no guest 'nobody'"),
            ("POST /v1/connect?guest=debian", 400, "port: must be a number, 1 to 65535"),
            ("POST /v1/connect?guest=debian&port=0", 400, "port: must be a number, 1 to 65535"),
            ("POST /v1/connect?guest=debian&port=65536", 400, "port: must be a number, 1 to 65535"),
            ("POST /v1/connect?guest=debian&port=%D9%A7", 400, "port: must be a number, 1 to 65535"),
            ("GET /v1/connect?guest=debian&port=7", 405, "connect with POST"),
        ):
            async with await dial(listener) as stream:
                await stream.send_all(head(listener, line))
                answer = (await read_all(stream)).decode()
                assert answer.startswith(f"HTTP/1.1 {status} "), line
                assert answer.endswith(f"\r\n\r\n{words}\n"), line
        assert source.asked[:1] == [("debian", 7)]


async def test_while_a_guest_is_asked_others_are_answered(listener: ApiListener) -> None:
    async with serving(listener) as source, await dial(listener) as waiting:
        await waiting.send_all(head(listener, "POST /v1/connect?guest=debian&port=10"))
        async with await dial(listener) as stream:
            await stream.send_all(head(listener, "GET /v1/status", "Connection: close"))
            assert (await read_all(stream)).startswith(b"HTTP/1.1 200 ")
        (on_opened,) = source.waiting
        on_opened(errno.EHOSTUNREACH)
        source.open.pop().close()
        assert (await read_all(waiting)).startswith(b"HTTP/1.1 504 ")


async def test_over_tcp_tunnels_want_the_token() -> None:
    listener = listen_tcp("127.0.0.1", 0)
    async with serving(listener) as source:
        for more in ((), ("Authorization: Bearer x",), (f"Authorization: {listener.token}",)):
            for line in ("POST /tunnel?ip=1.2.3.4&port=7", "POST /v1/connect?port=7"):
                async with await dial(listener) as stream:
                    lines = [f"{line} HTTP/1.1", "Host: x", *more, "", ""]
                    await stream.send_all("\r\n".join(lines).encode() + b"bytes for nobody")
                    assert (await read_all(stream)).startswith(b"HTTP/1.1 401 ")
        assert source.asked == []


@pytest.mark.parametrize(
    ("line", "more", "status"),
    (
        ("POST /tunnel?ip=1.2.3.4&port=7", ("Content-Length: 5",), 400),
        ("POST /tunnel?ip=1.2.3.4&port=7", ("Transfer-Encoding: chunked",), 400),
        ("POST /tunnel?ip=1.2.3.4&port=7", ("bad header",), 400),
        ("POST /tunnel?ip=1.2.3.4&port=7", (f"X: {'x' * 9000}", f"Y: {'y' * 9000}"), 400),
        ("POST /tunnel?ip=1.2.3.4&port=99999999999999999999", (), 500),
        ("POST /tunnel?ip=1.2.3.4&port=-1", (), 500),
    ),
)
async def test_what_is_no_request_for_a_tunnel_is_refused(
    tmp_path: Path, line: str, more: tuple[str, ...], status: int
) -> None:
    listener = listen_unix(str(tmp_path / "a"))
    async with serving(listener) as source, await dial(listener) as stream:
        await stream.send_all(head(listener, line, *more))
        answer = await read_all(stream)
        assert answer.startswith(
            (f"HTTP/1.1 {status} ".encode(), b"HTTP/1.1 431 " if len(more) > 1 else b"HTTP/1.1 400 ")
        )
        assert source.asked == []


async def test_a_later_request_of_a_connection_is_told_that_it_is_too_late(tmp_path: Path) -> None:
    listener = listen_unix(str(tmp_path / "a"))
    async with serving(listener) as source, await dial(listener) as stream:
        await stream.send_all(
            head(listener, "GET /v1/leases") + head(listener, "POST /tunnel?ip=1.2.3.4&port=7", "Connection: close")
        )
        assert b"a tunnel must be the first request of a connection" in await read_all(stream)
        assert source.asked == []


async def test_a_client_that_begins_and_says_no_more_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEAD_SECONDS", 0.2)
    listener = listen_unix(str(tmp_path / "a"))
    async with serving(listener):
        for begun in (b"", b"POST /tun", b"POST /tunnel?ip=1.2.3.4&port=7 HTTP/1.1\r\nHost: x\r\n"):
            async with await dial(listener) as stream:
                await stream.send_all(begun)
                assert await read_all(stream) == b""


async def test_more_clients_than_there_are_places_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "CONNECTIONS", 3)
    listener = listen_unix(str(tmp_path / "a"))
    async with serving(listener):
        silent = [await dial(listener) for _ in range(3)]
        async with await dial(listener) as stream:
            await stream.send_all(head(listener, "GET /v1/status", "Connection: close"))
            with trio.move_on_after(0.2) as scope:
                await stream.receive_some()
            assert scope.cancelled_caught
            await silent.pop().aclose()
            assert (await read_all(stream)).startswith(b"HTTP/1.1 200 ")
        for each in silent:
            await each.aclose()


async def test_a_client_that_does_not_read_is_let_go_and_keeps_nobody_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen_unix(str(tmp_path / "a"))
    with trio.fail_after(PATIENCE):
        async with serving(listener) as source:
            source.answer = {"much": "x" * (8 << 20)}
            stuck = await dial(listener)
            await stuck.send_all(head(listener, "GET /v1/status"))
            await stuck.receive_some(1)
            before = trio.current_time()
        assert trio.current_time() - before < 1  # and not after WRITE_SECONDS
    await stuck.aclose()
    monkeypatch.setattr(front, "WRITE_SECONDS", 0.2)
    listener = listen_unix(str(tmp_path / "b"))
    async with serving(listener) as source, await dial(listener) as stream:
        source.answer = {"much": "x" * (8 << 20)}
        await stream.send_all(head(listener, "GET /v1/status"))
        await trio.sleep(0.5)
        assert len(await read_all(stream)) < 8 << 20


async def test_junk_ends_nothing_but_its_connection(listener: ApiListener) -> None:
    async with serving(listener):
        for junk in (
            b"\n" * 100,
            os.urandom(5000) + b"\r\n\r\n",
            b"POST /tunnel?" + b"\xff" * 20_000,
            b"\x16\x03\x01\r\n\r\n",
        ):
            async with await dial(listener) as stream:
                await stream.send_all(junk)
                await stream.send_eof()
                assert b"OK" not in (await read_all(stream))[:2]
        async with await dial(listener) as stream:
            await stream.send_all(head(listener, "GET /v1/status", "Connection: close"))
            assert (await read_all(stream)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "said",
    (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABk\r\n\r\n"
        ),
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n",
    ),
)
async def test_who_has_no_token_cannot_keep_a_place(said: bytes) -> None:
    listener = listen_tcp("127.0.0.1", 0)
    async with serving(listener), await dial(listener) as stream:
        await stream.send_all(said)
        with trio.fail_after(15):
            answer = b"".join([bytes(chunk) async for chunk in stream])
        assert answer.startswith(b"HTTP/1.1 ")
        assert b" 101 " not in answer[:20]
