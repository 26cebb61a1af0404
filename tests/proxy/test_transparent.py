"""Guests that know of no proxy: what their first bytes say, and where the connection goes for it."""

from __future__ import annotations

import ssl

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netstack.proxy import transparent
from netstack.proxy.client_hello import MoreNeeded, looks_like_tls, parse_server_name
from netstack.proxy.transparent import HTTP, OTHER, TLS, UNSURE, classify
from tests.proxy.desk import REFUSED, WORLD, Desk, Peer, read_all, read_until

ADDRESS = "203.0.113.1"
OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def client_hello(name: str | None) -> bytes:
    """A real one, of OpenSSL's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def in_records(hello: bytes, size: int) -> bytes:
    """The same ClientHello in records of this size."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


# ---- the ClientHello -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1, 3, 4, 100, 16384))
def test_the_name_is_found_in_records_of_any_size(size: int) -> None:
    assert parse_server_name(in_records(client_hello("Web.Example.test"), size) + b"trailing") == "web.example.test"


def test_a_hello_that_comes_byte_by_byte_is_waited_for() -> None:
    hello = in_records(client_hello("web.test"), 50)
    for length in range(len(hello) - 1):
        assert looks_like_tls(hello[:length])
        with pytest.raises(MoreNeeded):
            parse_server_name(hello[:length])
    assert parse_server_name(hello) == "web.test"


def test_a_hello_without_a_name_has_none() -> None:
    assert parse_server_name(client_hello(None)) is None


@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 20))
def test_no_bytes_make_the_parser_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    hello = client_hello("web.test")
    data = hello[:at] + noise + hello[at + cut :]
    looks_like_tls(data)
    classify(data)
    try:
        name = parse_server_name(data)
    except (MoreNeeded, ValueError):
        return
    assert name is None or name.isascii()


@pytest.mark.parametrize(
    ("data", "kind"),
    (
        (b"", UNSURE),
        (b"G", UNSURE),
        (b"GET / HTT", UNSURE),
        (b"GET / HTTP/1.1\r\n", HTTP),
        (b"M-SEARCH * HTTP/1.1\r\n", HTTP),
        (b"GET http://x/ HTTP/1.1\r\n", HTTP),
        (b"PRI * HTTP/2.0\r\n", OTHER),
        (b"SSH-2.0-OpenSSH_9.2\r\n", OTHER),
        (b"HELO there\r\n", OTHER),
        (b"\x00\x01", OTHER),
        (b"\x16", UNSURE),
        (b"\x16\x03\x01\x02\x00\x01", TLS),
        (b"\x16\x03\x01\x02\x00\x02", OTHER),
        (b"\x16\x02", OTHER),
        (b"GET /" + b"a" * 9000, OTHER),
    ),
)
def test_the_first_bytes_tell_what_is_spoken(data: bytes, kind: str) -> None:
    assert classify(data) == kind


# ---- where it goes ---------------------------------------------------------------------------------------------------


async def with_proxy(desk: Desk, answer: bytes = OPEN + b"through") -> list[bytes]:
    """From now on there is a proxy for everything; the heads that it gets."""
    heads: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        heads.append(await Peer(script).head(stream))
        await stream.send_all(answer)
        while data := await stream.receive_some(65536):
            heads.append(data)

    await desk.peer("proxy.test", script)
    desk.via("http://user:geheim@proxy.test:3128")
    return heads


async def test_tls_goes_through_the_proxy_by_its_name(desk: Desk) -> None:
    heads = await with_proxy(desk)
    hello = client_hello("web.test")
    guest = desk.guest("transparent", port=443)
    await guest.send_all(hello[:100])
    await trio.testing.wait_all_tasks_blocked()
    await guest.send_all(hello[100:])
    await read_until(guest, b"through")
    assert heads[0].startswith(b"CONNECT web.test:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization" in heads[0]
    await guest.send_eof()
    await read_all(guest)
    assert b"".join(heads[1:]) == hello


async def test_tls_without_a_name_goes_by_the_name_that_our_dns_gave_or_by_the_address(desk: Desk) -> None:
    heads = await with_proxy(desk)
    for known, wanted in (("dns.test", b"CONNECT dns.test:443 "), ("", b"CONNECT 203.0.113.1:443 ")):
        desk.known = {WORLD: known} if known else {}
        guest = desk.guest("transparent", port=443)
        await guest.send_all(client_hello(None))
        await read_until(guest, b"through")
        assert any(head.startswith(wanted) for head in heads)


async def test_a_proxys_refusal_of_tls_is_a_reset_and_no_page(desk: Desk) -> None:
    await with_proxy(desk, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\n<html>")
    assert await ask(desk, client_hello("web.test"), 443) == b""
    assert len(desk.stack.reset) == 1
    record = desk.proxy.records.recent()[0]
    assert record["host"] == "web.test" and record["status"] == 403 and "403" in str(record["error"])
    assert "geheim" not in str(record)


async def test_what_is_to_go_direct_goes_to_the_very_address(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(65536))

    await desk.peer(ADDRESS, script)
    hello = client_hello("web.test")
    assert await ask(desk, hello, 443) == hello
    request = b"GET /a HTTP/1.1\r\nHost: web.test\r\nConnection: x\r\n\r\nbody that is none"
    assert await ask(desk, request) == request
    assert desk.dialled == [(ADDRESS, 443), (ADDRESS, 80)]
    assert [asked[:3] for asked in desk.asked] == [("https", "web.test", 443), ("http", "web.test", 80)]


async def test_http_goes_by_its_host_request_by_request(desk: Desk) -> None:
    heads: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        while True:
            heads.append(await Peer(script).head(stream))
            await stream.send_all(OK)

    await desk.peer("proxy.test", script)
    desk.via("http://proxy.test")
    guest = desk.guest("transparent")
    for host in (b"one.test", b"two.test:8080"):
        await guest.send_all(b"GET /x HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        await read_until(guest, b"ok")
    assert [head.split(b"\r\n")[0] for head in heads] == [
        b"GET http://one.test/x HTTP/1.1",
        b"GET http://two.test:8080/x HTTP/1.1",
    ]


async def test_http_without_a_host_goes_by_the_address(desk: Desk) -> None:
    heads = await with_proxy(desk, OK)
    await ask(desk, b"GET / HTTP/1.0\r\n\r\n")
    assert heads[0].startswith(b"GET http://203.0.113.1/ HTTP/1.1\r\n")


async def test_a_guest_with_a_proxy_of_its_own_at_port_80_is_left_alone(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(65536))

    await desk.peer(ADDRESS, script)
    await with_proxy(desk)
    for request in (
        b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
        b"CONNECT web.test:443 HTTP/1.1\r\nHost: web.test\r\n\r\n",
    ):
        assert await ask(desk, request) == request


async def test_a_refused_request_is_a_page_that_says_why(desk: Desk) -> None:
    desk.names["proxy.test"] = REFUSED
    desk.via("http://proxy.test")
    answer = await ask(desk, b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"the proxy http://proxy.test:80 cannot be reached: proxy.test refuses the connection" in answer


async def test_a_407_without_credentials_is_no_question_to_a_guest_that_knows_of_no_proxy(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await Peer(script).head(stream)
        await stream.send_all(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n")

    await desk.peer("proxy.test", script)
    desk.via("http://proxy.test")
    answer = await ask(desk, b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502") and b"wants credentials" in answer


async def test_a_proxy_that_is_a_guest_itself_gets_out(desk: Desk) -> None:
    """Its own connections come here as everybody's, and would go to it, and come here again."""

    async def proxy(stream: trio.SocketStream) -> None:
        head = await Peer(proxy).head(stream)
        guest = desk.guest("transparent", port=443 if head.startswith(b"CONNECT") else 80)
        if head.startswith(b"CONNECT"):
            await stream.send_all(OPEN)
            await guest.send_all(await stream.receive_some(65536))
        else:
            await guest.send_all(head.replace(b"GET http://web.test/", b"GET /"))
        await stream.send_all(await guest.receive_some(65536))

    async def web(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(OK)

    await desk.peer("proxy.test", proxy)
    origin = await desk.peer(ADDRESS, web)
    desk.via("http://proxy.test")
    for request, port in ((client_hello("web.test"), 443), (b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n", 80)):
        guest = desk.guest("transparent", port=port)
        await guest.send_all(request)
        await read_until(guest, b"ok")
    assert origin.connections == 2
    assert desk.dialled.count(("proxy.test", 80)) == 2
    assert desk.counters["proxy_loop"] == 2


async def test_tls_to_the_proxy_itself_goes_to_it(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(65536))

    await desk.peer(ADDRESS, script)
    desk.via("https://proxy.test")
    hello = client_hello("proxy.test")
    assert await ask(desk, hello, 443) == hello


async def test_a_server_that_speaks_first_is_heard(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 ready\r\n")
        await stream.send_all((await Peer(script).until(stream, b"\n")).upper())

    await desk.peer(ADDRESS, script)
    await with_proxy(desk)
    guest = desk.guest("transparent")
    assert await read_until(guest, b"\n") == b"220 ready\r\n"
    await guest.send_all(b"helo\n")
    assert await read_all(guest) == b"HELO\n"


async def test_a_guest_that_speaks_late_but_first_is_served_by_what_it_says(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transparent, "SILENCE", 0.01)
    heads = await with_proxy(desk)
    web_gone = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        assert await stream.receive_some(1) == b""
        web_gone.set()

    web = await desk.peer(ADDRESS, script)
    guest = desk.guest("transparent", port=443)
    while not web.connections:
        await trio.testing.wait_all_tasks_blocked(0.01)
    await guest.send_all(client_hello("web.test"))
    await read_until(guest, b"through")
    assert heads[0].startswith(b"CONNECT web.test:443 ")
    await web_gone.wait()


async def test_where_only_the_proxy_gets_out_a_silent_guest_is_waited_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transparent, "SILENCE", 0.01)
    heads = await with_proxy(desk)
    guest = desk.guest("transparent", port=443)
    while not desk.dialled:
        await trio.testing.wait_all_tasks_blocked(0.01)
    await guest.send_all(client_hello("web.test"))
    await read_until(guest, b"through")
    assert heads[0].startswith(b"CONNECT web.test:443 ")


async def test_an_unknown_protocol_passes_as_it_is_and_by_the_proxy_only_where_it_must(desk: Desk) -> None:
    heads = await with_proxy(desk)

    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(65536))

    await desk.peer(ADDRESS, script)
    assert await ask(desk, b"SSH-2.0-x\r\n", 443) == b"SSH-2.0-x\r\n"
    assert heads == []
    desk.names[ADDRESS] = REFUSED
    guest = desk.guest("transparent", port=443)
    await guest.send_all(b"SSH-2.0-x\r\n")
    await read_until(guest, b"through")
    assert heads[0].startswith(b"CONNECT 203.0.113.1:443 ")


async def ask(desk: Desk, data: bytes, port: int = 80) -> bytes:
    guest = desk.guest("transparent", port=port)
    await guest.send_all(data)
    return await read_all(guest)
