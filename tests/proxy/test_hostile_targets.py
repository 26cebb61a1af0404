"""Guests that want the host's proxy to do for them what they may not, or to tell them what it knows.

What a proxy on the host's loopback calls loopback is the host's, in whatever spelling; what stands in a request line
must not change the host behind the one that was asked about; a proxy must not be made to echo the host's credentials;
and what breaks off is reset, so that it does not look like an end.
"""

from __future__ import annotations

import struct

import pytest
import trio
from trio import socket

from netstack.proxy.heads import HeadError, parse_place
from netstack.proxy.routes import DIRECT, ProxyRouter
from netstack.proxy.settings import ProxySettings, parse_server
from netstack.proxy.transparent import Hellos
from tests.proxy.desk import Desk, Peer, Script, read_all, read_until

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() is a RST


def answers(answer: bytes) -> Script:
    """A server that answers each connection's first head so."""

    async def script(stream: trio.SocketStream) -> None:
        await Peer(script).head(stream)
        await stream.send_all(answer)
        while await stream.receive_some(65536):
            pass

    return script


@pytest.mark.parametrize(
    "host",
    (
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "2130706433",
        "0",
        "0.0.0.0",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:0.0.0.0",
        "localhost",
        "a.localhost",
    ),
)
async def test_loopback_in_any_spelling_is_not_for_a_proxy_of_the_hosts(host: str) -> None:
    router = ProxyRouter(is_own=lambda name: False)
    server = parse_server("http://127.0.0.1:3128")
    router.current = ProxySettings(http=server, https=server, all=server)
    for scheme in ("http", "https", "tcp"):
        assert await router.choose(scheme, host, 8080, f"{scheme}://{host}:8080/") == (DIRECT,)


@pytest.mark.parametrize(
    "text",
    (
        b"00000000000000000177.0.0.1:80",  # inet_aton() takes any number of zeros
        b"0x0000000000000007f000001:80",
        b"0x.1:80",
        b"127.0.0.1.1:80",
        b"256.1.1.1:80",
        b"a.08:80",
        b"[::::]:80",
        b"[dead]:80",
        b"[...]:80",
    ),
)
def test_a_number_that_is_no_address_is_no_name_either(text: bytes) -> None:
    with pytest.raises(HeadError):
        parse_place(text)


@pytest.mark.parametrize(
    "text", (b"1e100.test:80", b"web1:80", b"0xa.test:80", b"3.example:80", b"_srv.a:80", b"9a:80")
)
def test_names_with_digits_are_names(text: bytes) -> None:
    assert parse_place(text).host == text.decode().rpartition(":")[0]


@pytest.mark.parametrize("path", (b".evil.test/", b"@evil.test/", b":22/", b"evil", b"?x", b"#"))
async def test_a_path_does_not_change_the_host_that_was_asked_about(desk: Desk, path: bytes) -> None:
    proxy = await desk.peer("proxy.test", answers(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    desk.via("http://proxy.test")
    guest = desk.guest("transparent")
    await guest.send_all(b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n")
    await read_until(guest, b"\r\n\r\n")
    await guest.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: good.test\r\n\r\n")
    assert (await read_all(guest)).startswith(b"HTTP/1.1 400")
    assert b"evil" not in proxy.received
    assert desk.counters["proxy_bad_target"] + desk.counters["proxy_bad_head"] == 1


@pytest.mark.parametrize("method", (b"TRACE", b"trace", b"TRACK"))
async def test_no_proxy_is_made_to_echo_the_hosts_credentials(desk: Desk, method: bytes) -> None:
    heads: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        heads.append(await Peer(script).head(stream))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(heads[-1]) + heads[-1])

    await desk.peer("proxy.test", script)
    desk.via("http://user:geheim@proxy.test")
    request = method + b" http://web.test/ HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\nMax-Forwards: 0\r\n\r\n"
    answer = await desk.ask(request)
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"dXNlcjpnZWhlaW0=" not in answer
    assert heads == []
    desk.via("http://proxy.test")
    answer = await desk.ask(request)  # there is nothing to tell
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_guest_that_sent_far_ahead_and_went_is_let_go(desk: Desk) -> None:
    await desk.peer("web.test", answers(b""))
    request = b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n"
    guest = desk.guest()
    await guest.send_all(request * 3000)
    guest.socket.close()
    with trio.fail_after(5):
        while desk.gate.total:
            await trio.lowlevel.checkpoint()


async def test_a_body_without_a_length_that_breaks_off_is_reset(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await Peer(script).head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nhalf of ")
        await go.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    go = trio.Event()
    await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.0\r\nHost: web.test\r\n\r\n")
    await read_until(guest, b"half of ")
    go.set()
    await read_all(guest)
    assert len(desk.stack.reset) == 1


@pytest.mark.parametrize("whole", (True, False))
async def test_a_copied_tunnel_that_breaks_off_is_reset(desk: Desk, whole: bool) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(b"half")
        await stream.receive_some(1)
        if not whole:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"CONNECT web.test:443 HTTP/1.1\r\nHost: web.test\r\n\r\n")
    await read_until(guest, b"half")
    await guest.send_all(b"x")
    await guest.send_eof()
    await read_all(guest)
    assert len(desk.stack.reset) == (0 if whole else 1)


def test_a_hello_that_was_cut_off_is_no_circle() -> None:
    hellos = Hellos()
    assert hellos.is_new(b"\x16\x03\x01\x00\x01\x01")
    assert hellos.is_new(b"\x16\x03\x01\x00\x01\x01")
    assert hellos.is_new(bytes(11) + b"r" * 32)
    assert not hellos.is_new(bytes(11) + b"r" * 32)
