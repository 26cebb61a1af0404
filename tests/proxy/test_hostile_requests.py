"""Requests that could be read in two ways, and other shapes that no honest guest sends: refused, never sent on.

Nothing of them reaches a server: each test has one that would tell.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.proxy.heads import HeadError, check_head, explicit_target, find_head, onward_fields, parse_request
from tests.proxy.desk import Desk, Peer, read_all

A = b"http://web.test/"

SHAPES = {
    "two equal lengths": (b"Content-Length: 1\r\nContent-Length: 1\r\n", 400, "proxy_two_lengths"),
    "two lengths": (b"Content-Length: 1\r\nContent-Length: 2\r\n", 400, "proxy_two_lengths"),
    "two lengths in one": (b"Content-Length: 1, 2\r\n", 400, "proxy_bad_length"),
    "a signed length": (b"Content-Length: +1\r\n", 400, "proxy_bad_length"),
    "a hexadecimal length": (b"Content-Length: 0x1\r\n", 400, "proxy_bad_length"),
    "no length": (b"Content-Length:\r\n", 400, "proxy_bad_length"),
    "a length and a coding": (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", 400, "proxy_two_lengths"),
    "two codings": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400, "proxy_two_lengths"),
    "a coding in disguise": (b"Transfer-Encoding: xchunked\r\n", 501, "proxy_bad_length"),
    "a coding before chunked": (b"Transfer-Encoding: gzip, chunked\r\n", 501, "proxy_bad_length"),
    "a coding behind a tab": (b"Transfer-Encoding:\x0bchunked\r\n", 501, "proxy_bad_length"),
    "a folded line": (b"X: a\r\n b\r\n", 400, "proxy_folded_line"),
    "a folded length": (b"Content-Length:\r\n 1\r\n", 400, "proxy_bad_length"),
    "a folded first line": (b" X: a\r\n", 400, "proxy_folded_line"),
    "a bare LF": (b"X: a\nContent-Length: 1\r\n", 400, "proxy_bare_lf"),
    "a bare CR": (b"X: a\rContent-Length: 1\r\n", 400, "proxy_bare_lf"),
    "a NUL": (b"X: a\0b\r\n", 400, "proxy_bad_head"),
    "a blank before the colon": (b"Content-Length : 1\r\n", 400, "proxy_bad_head"),
    "a line without a colon": (b"Nonsense\r\n", 400, "proxy_bad_head"),
    "a field without a name": (b": x\r\n", 400, "proxy_bad_head"),
    "two hosts": (b"Host: other.test\r\n", 400, "proxy_two_hosts"),
    "Connection that takes the length away": (
        b"Connection: Content-Length\r\nContent-Length: 1\r\n",
        400,
        "proxy_bad_head",
    ),
    "too many fields": (b"X: 1\r\n" * 200, 431, "proxy_head_too_large"),
    "a head without end": (b"X: " + b"a" * 70_000 + b"\r\n", 431, "proxy_head_too_large"),
}


async def refused(desk: Desk, request: bytes) -> bytes:
    """What is answered to this, after which the connection ends and no server has heard of it."""

    async def script(stream: object) -> None:
        raise AssertionError

    peers: list[Peer] = [await desk.peer(name, script) for name in ("web.test", "other.test", "smuggled.test")]
    guest = desk.guest()
    await guest.send_all(request + b"GET http://smuggled.test/ HTTP/1.1\r\nHost: smuggled.test\r\n\r\n")
    answer = await read_all(guest)
    assert desk.dialled == []
    assert [peer.connections for peer in peers] == [0, 0, 0]
    assert answer.startswith(b"HTTP/1.1 ") and answer.count(b"\r\nContent-Length: ") == 1
    assert b"Connection: close" in answer
    return answer


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_could_be_read_in_two_ways_is_refused(desk: Desk, shape: str) -> None:
    fields, status, reason = SHAPES[shape]
    answer = await refused(desk, b"POST " + A + b" HTTP/1.1\r\nHost: web.test\r\n" + fields + b"\r\nX")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert desk.counters[reason] == 1


TARGETS = {
    b"GET / HTTP/1.1": 400,
    b"GET https://web.test/ HTTP/1.1": 501,
    b"GET ftp://web.test/ HTTP/1.1": 501,
    b"GET http:///x HTTP/1.1": 400,
    b"GET http://user:pw@web.test/ HTTP/1.1": 400,
    b"GET http://web.test:99999/ HTTP/1.1": 400,
    b"GET http://web.test:0/ HTTP/1.1": 400,
    b"GET http://web.test:8x/ HTTP/1.1": 400,
    b"GET http://w\xc3\xa9b.test/ HTTP/1.1": 400,
    b"GET http://web%2etest/ HTTP/1.1": 400,
    b"GET http://[::1/ HTTP/1.1": 400,
    b"CONNECT web.test HTTP/1.1": 400,
    b"CONNECT web.test:443/ HTTP/1.1": 400,
    b"CONNECT user@web.test:443 HTTP/1.1": 400,
    b"CONNECT http://web.test:443 HTTP/1.1": 400,
    b"CONNECT :443 HTTP/1.1": 400,
    b"GET http://web.test/ HTTP/2.0": 400,
    b"GET http://web.test/ HTTP/0.9": 400,
    b"GET http://web.test/": 400,
    b"GE(T http://web.test/ HTTP/1.1": 400,
    b"\x16\x03\x01\x02\x00\x01": 400,
}


@pytest.mark.parametrize("line", TARGETS)
async def test_a_target_that_names_no_host_is_refused(desk: Desk, line: bytes) -> None:
    answer = await refused(desk, line + b"\r\nHost: web.test\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 %d " % TARGETS[line], b"HTTP/1.1 505 "))


async def test_connect_has_no_body(desk: Desk) -> None:
    answer = await refused(desk, b"CONNECT web.test:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd")
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("chunk", (b"1\nX\n", b"-1\r\n", b"FFFFFFFFFFFFFFFFFFFFF\r\n", b"1\r\nXY\r\n"))
async def test_a_chunk_that_is_none_ends_the_connection(desk: Desk, chunk: bytes) -> None:
    async def script(stream: object) -> None:
        await web.head(stream)  # type: ignore[arg-type]
        await web.until(stream, b"never")  # type: ignore[arg-type]

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"POST " + A + b" HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    await guest.send_all(b"0\r\n\r\nGET http://smuggled.test/ HTTP/1.1\r\nHost: smuggled.test\r\n\r\n")
    answer = await read_all(guest)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert b"smuggled" not in bytes(web.received)
    assert desk.dialled == [("web.test", 80)]


async def test_a_page_of_ours_says_nothing_but_what_it_should(desk: Desk) -> None:
    answer = await desk.ask(b"GET http://<script>.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"script" not in answer
    assert b"Content-Type: text/plain" in answer


@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_make_a_head_raise_anything_else(data: bytes, at: int) -> None:
    template = b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\nContent-Length: 0\r\n\r\n"
    head = template[:at] + data + template[at:]
    received = bytearray(head)
    try:
        end = find_head(received)
        if not end:
            return
        head = bytes(received[:end])
        check_head(head)
        _, request = parse_request(head)
        target = explicit_target(request)
        onward_fields(request.headers)
    except HeadError:
        return
    assert 1 <= target.place.port <= 65535
    assert target.place.host.isascii()
