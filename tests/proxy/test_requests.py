"""The HTTP proxy with plain requests: what goes on, what comes back, and what becomes of the connections."""

from __future__ import annotations

import pytest
import trio

from netstack.proxy import session
from tests.proxy.desk import REFUSED, VIA, Desk, Peer, Script, read_all, read_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answering(*answers: bytes) -> tuple[list[bytes], Script]:
    """A script: to the requests of a connection, one after the other, these answers. And their heads."""
    heads: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        for answer in answers:
            heads.append(await Peer(script).head(stream))
            await stream.send_all(answer)

    return heads, script


async def test_a_request_goes_to_its_host_in_origin_form(desk: Desk) -> None:
    heads, script = answering(OK)
    await desk.peer("web.test", script)
    answer = await desk.ask(
        b"GET http://web.test:8080/a?b=c HTTP/1.1\r\nHost: elsewhere.test\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\n"
        b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic Zzz=\r\nX-Case: Kept\r\nTE: trailers\r\n\r\n"
    )
    head = heads[0]
    assert head.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: web.test:8080\r\n")
    assert b"X-Case: Kept\r\n" in head
    for gone in (b"elsewhere", b"X-Hop", b"Proxy-", b"Connection", b"TE:"):
        assert gone not in head
    assert b"Via: " + VIA in head
    assert answer.endswith(b"\r\n\r\nok")
    assert desk.asked == [("http", "web.test", 8080, "http://web.test:8080/a?b=c")]


async def test_a_request_goes_to_the_proxy_in_absolute_form_with_its_credentials(desk: Desk) -> None:
    heads, script = answering(OK)
    await desk.peer("proxy.test", script)
    desk.via("http://user:p%40ss@proxy.test:3128")
    await desk.ask(
        b"GET http://web.test/x HTTP/1.1\r\nHost: web.test\r\nProxy-Authorization: Basic Z3Vlc3Q=\r\n"
        b"Connection: close\r\n\r\n"
    )
    assert heads[0].startswith(b"GET http://web.test/x HTTP/1.1\r\nHost: web.test\r\n")
    assert heads[0].count(b"Proxy-Authorization") == 1
    assert b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in heads[0]


async def test_two_requests_share_both_connections(desk: Desk) -> None:
    _, script = answering(OK, OK.replace(b"ok", b"no"))
    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/1 HTTP/1.1\r\nHost: web.test\r\n\r\n")
    assert (await read_until(guest, b"ok")).startswith(b"HTTP/1.1 200")
    await guest.send_all(b"GET http://web.test/2 HTTP/1.1\r\nHost: web.test\r\n\r\n")
    await read_until(guest, b"no")
    assert web.connections == 1


async def test_requests_sent_ahead_are_answered_in_order(desk: Desk) -> None:
    _, one = answering(OK.replace(b"ok", b"11"), OK.replace(b"ok", b"33"))
    _, two = answering(OK.replace(b"ok", b"22"))
    await desk.peer("one.test", one)
    await desk.peer("two.test", two)
    desk_guest = desk.guest()
    request = b"GET http://%s.test/ HTTP/1.1\r\nHost: x\r\n\r\n"
    await desk_guest.send_all(request % b"one" + request % b"two")
    answers = await read_until(desk_guest, b"22")
    assert answers.index(b"11") < answers.index(b"22")


async def test_a_kept_connection_that_was_closed_costs_no_request(desk: Desk) -> None:
    first = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await web.head(stream)
        await stream.send_all(OK)
        if web.connections == 1:
            await web.head(stream)  # the next request is read, and the connection closed in place of an answer
            first.set()

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    for _ in range(2):
        await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n")
        await read_until(guest, b"ok")
    assert first.is_set()
    assert web.connections == 2
    assert desk.counters["proxy_repeated"] == 1


async def test_a_request_with_a_body_is_never_sent_twice(desk: Desk) -> None:

    async def script(stream: trio.SocketStream) -> None:
        await web.head(stream)
        await stream.send_all(OK)
        await web.head(stream)

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n")
    await read_until(guest, b"ok")
    await guest.send_all(b"POST http://web.test/ HTTP/1.1\r\nHost: web.test\r\nContent-Length: 3\r\n\r\nabc")
    assert b"502 Bad Gateway" in await read_all(guest)
    assert web.connections == 1


async def test_a_body_goes_up_and_an_answer_comes_down_at_the_same_time(desk: Desk) -> None:

    async def script(stream: trio.SocketStream) -> None:
        await web.head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"one", b"two"):
            await web.until(stream, word + b"\r\n")
            await stream.send_all(b"3\r\n" + word.upper() + b"\r\n")
        await web.until(stream, b"0\r\n\r\n")
        await stream.send_all(b"0\r\n\r\n")

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"POST http://web.test/ HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n")
    for word in (b"one", b"two"):
        await guest.send_all(b"3\r\n" + word + b"\r\n")
        await read_until(guest, word.upper() + b"\r\n")
    await guest.send_all(b"0\r\n\r\n")
    await read_until(guest, b"0\r\n\r\n")


async def test_100_continue_comes_from_the_server(desk: Desk) -> None:

    async def script(stream: trio.SocketStream) -> None:
        assert b"Expect: 100-continue" in await web.head(stream)
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await web.until(stream, b"body")
        await stream.send_all(OK)

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(
        b"PUT http://web.test/ HTTP/1.1\r\nHost: web.test\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    )
    assert await read_until(guest, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await guest.send_all(b"body")
    await read_until(guest, b"ok")


async def test_an_answer_before_the_body_reaches_a_guest_that_goes_on_sending(desk: Desk) -> None:

    async def script(stream: trio.SocketStream) -> None:
        await web.head(stream)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlong")

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    answer = b""

    async def read() -> None:
        nonlocal answer
        answer = await read_until(guest, b"long")

    async with trio.open_nursery() as reading:
        reading.start_soon(read)
        await guest.send_all(b"POST http://web.test/ HTTP/1.1\r\nHost: web.test\r\nContent-Length: 1000000\r\n\r\n")
        await guest.send_all(bytes(500_000))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in answer


async def test_an_upgrade_makes_a_tunnel_with_what_came_early(desk: Desk) -> None:

    async def script(stream: trio.SocketStream) -> None:
        head = await web.head(stream)
        assert b"Upgrade: websocket" in head and b"Connection: Upgrade" in head and b"Sec-WebSocket-Key: k" in head
        await stream.send_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello"
        )
        await stream.send_all(await web.until(stream, b"frame"))

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(
        b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: k\r\n\r\n"
    )
    assert b"101 Switching" in await read_until(guest, b"hello")
    await guest.send_all(b"frame")
    assert await read_all(guest) == b"frame"


async def test_an_upgrade_to_http2_is_not_passed_on(desk: Desk) -> None:
    heads, script = answering(OK)
    await desk.peer("web.test", script)
    await desk.ask(
        b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
    )
    assert b"pgrade" not in heads[0] and b"HTTP2" not in heads[0]


async def test_an_old_guest_gets_an_answer_that_it_understands(desk: Desk) -> None:
    _, script = answering(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    await desk.peer("web.test", script)
    answer = await desk.ask(b"GET http://web.test/ HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\nok")
    assert b"chunked" not in answer and b"100 Continue" not in answer


@pytest.mark.parametrize(
    "answer", (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n")
)
async def test_answers_without_a_body_end_with_their_head(desk: Desk, answer: bytes) -> None:
    _, script = answering(answer, OK)
    await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"HEAD http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    await read_until(guest, b"\r\n\r\n")
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    await read_until(guest, b"ok")


async def test_an_answer_that_breaks_off_is_not_made_whole(desk: Desk) -> None:
    _, script = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await desk.peer("web.test", script)
    answer = await desk.ask(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b"hello\r\n")
    assert not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("script_answer", "words"),
    (
        (b"", b"closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", b"does not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"does not answer in HTTP"),
    ),
)
async def test_garbage_of_a_server_is_a_502_that_says_so(desk: Desk, script_answer: bytes, words: bytes) -> None:
    _, script = answering(script_answer)
    await desk.peer("web.test", script)
    answer = await desk.ask(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert words in answer


async def test_a_name_that_does_not_exist_and_a_port_that_is_closed_are_502s_with_the_reason(
    desk: Desk,
) -> None:
    desk.names["closed.test"] = REFUSED
    answer = await desk.ask(b"GET http://nowhere.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"502" in answer and b"nowhere.test does not exist" in answer and b"error=dns_error" in answer
    answer = await desk.ask(b"GET http://closed.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"closed.test refuses the connection" in answer and b"error=connection_refused" in answer


async def test_a_proxy_that_is_down_gives_way_to_the_next_one(desk: Desk) -> None:
    desk.names["down.test"] = REFUSED
    heads, script = answering(OK)
    await desk.peer("up.test", script)
    desk.via("http://down.test:1", "http://up.test:2")
    await desk.ask(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert len(heads) == 1
    assert [(server.host, worked) for server, worked in desk.results] == [("down.test", False), ("up.test", True)]


async def test_settings_that_change_hold_from_the_next_request_on(desk: Desk) -> None:
    _, script = answering(OK, OK)
    await desk.peer("web.test", script)
    heads, proxy_script = answering(OK.replace(b"ok", b"px"))
    await desk.peer("proxy.test", proxy_script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/1 HTTP/1.1\r\nHost: x\r\n\r\n")
    await read_until(guest, b"ok")
    desk.via("http://proxy.test:1")
    await guest.send_all(b"GET http://web.test/2 HTTP/1.1\r\nHost: x\r\n\r\n")
    await read_until(guest, b"px")
    assert heads[0].startswith(b"GET http://web.test/2")


async def test_wrong_credentials_of_the_host_are_no_question_to_the_guest(desk: Desk) -> None:
    challenge = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"
    _, script = answering(challenge)
    await desk.peer("proxy.test", script)
    desk.via("http://user:secret@proxy.test:1")
    answer = await desk.ask(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502") and b"does not accept the host's credentials" in answer
    assert b"Proxy-Authenticate" not in answer and b"secret" not in answer
    assert not any("secret" in str(record) for record in desk.proxy.records.recent())


async def test_where_the_host_has_no_credentials_the_guest_may_give_its_own(desk: Desk) -> None:
    challenge = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"
    heads, script = answering(challenge, OK)
    proxy = await desk.peer("proxy.test", script)
    desk.via("http://proxy.test:1")
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"Proxy-Authenticate: Basic realm=x\r\n" in await read_until(guest, b"\r\n\r\n")
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic Zzz=\r\n\r\n")
    await read_until(guest, b"ok")
    assert b"Proxy-Authorization: Basic Zzz=" in heads[1]
    assert proxy.connections == 1  # NTLM belongs to a connection


async def test_a_request_that_has_been_here_already_ends_here(desk: Desk) -> None:
    answer = await desk.ask(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\nVia: 1.0 a, " + VIA + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 508")
    assert desk.dialled == []


async def test_a_guest_that_goes_ends_its_request(desk: Desk) -> None:
    gone = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await web.head(stream)
        assert await stream.receive_some(1) == b""
        gone.set()

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    while not web.received:
        await trio.testing.wait_all_tasks_blocked()
    await guest.aclose()
    with trio.fail_after(5):
        await gone.wait()


async def test_a_guest_that_has_only_closed_its_half_gets_its_answer(desk: Desk) -> None:
    _, script = answering(OK)
    await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    await guest.send_eof()
    assert (await read_all(guest)).endswith(b"ok")


async def test_a_slow_head_is_not_waited_for_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HEAD_TIMEOUT", 0.05)
    assert (await desk.ask(b"GET http://web.test/ HT")).startswith(b"HTTP/1.1 408")


async def test_a_guest_that_reads_slowly_holds_its_server_up(desk: Desk) -> None:
    sent = 0

    async def script(stream: trio.SocketStream) -> None:
        nonlocal sent
        await web.head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            await stream.send_all(bytes(65536))
            sent += 65536

    web = await desk.peer("web.test", script)
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    before = -1
    while before != sent:
        before = sent
        await trio.testing.wait_all_tasks_blocked(0.2)
    assert 0 < sent < 16_000_000  # what the sockets' buffers hold
