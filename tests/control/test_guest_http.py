"""HTTP for guests at the gateway's port 80: what is ours is answered, all else goes to the host's server untouched."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from netstack.control import guest_http
from netstack.control.guest_http import GuestHttp, GuestRequest, GuestResponse, Outcome, StreamingRequest
from netstack.core.ports import TcpServiceCall
from netstack.proxy.service import relay

GUEST = bytes((192, 168, 5, 15))
GATEWAY = bytes((192, 168, 5, 2))


class Rig:
    """The server, and a host whose own server says back in capitals what it hears."""

    def __init__(self, nursery: trio.Nursery, *, has_server: bool = True) -> None:
        self.nursery = nursery
        self.has_server = has_server
        self.drops: Counter[str] = Counter()
        self.asked: list[GuestRequest] = []
        self.link: Any = "link"
        self.http = GuestHttp(lambda address: b"\2" * 6, lambda reason: self.drops.update([reason]))
        self.http.register("GET", "/agent", self.answer)
        self.http.register("POST", "/agent/ports", self.answer)
        self.http.register_stream("POST", "/agent/stream", self.stream)

    async def answer(self, request: GuestRequest) -> GuestResponse:
        self.asked.append(request)
        if request.query == "bug":
            raise OverflowError("a bug")
        return GuestResponse(body=b"from us\n")

    async def stream(self, stream: StreamingRequest) -> None:
        while data := await stream.receive():
            await stream.send(data.upper())

    async def serve(self, stream: trio.SocketStream, call: TcpServiceCall) -> None:
        """What `gateway.guest_web` does with a connection, without a stack."""
        async with stream:
            outcome, received = await self.http.serve_stream(stream, call)
            if outcome is Outcome.DONE:
                return
            if self.has_server:
                ours, theirs = socket.socketpair()
                self.nursery.start_soon(self.host_server, stream_of(theirs))
                await relay(stream, stream_of(ours), received)
            elif outcome is Outcome.HOSTS_HTTP:
                await self.http.send_not_found(stream)

    async def host_server(self, stream: trio.SocketStream) -> None:
        async with stream:
            while data := await stream.receive_some():
                await stream.send_all(data.upper())
            await stream.send_all(b"<end>")

    def connect(self) -> trio.SocketStream:
        """A guest's connection."""
        ours, theirs = socket.socketpair()
        call = TcpServiceCall(self.link, GUEST, 40000, GATEWAY, 80)
        self.nursery.start_soon(self.serve, stream_of(theirs), call)
        return stream_of(ours)

    async def ask(self, *pieces: bytes) -> bytes:
        """Send the pieces, end, and give all that comes back."""
        stream = self.connect()
        async with stream:
            for piece in pieces:
                await stream.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_eof()
            return await read_all(stream)


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def read_all(stream: trio.SocketStream) -> bytes:
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


@pytest.fixture
async def rig(nursery: trio.Nursery) -> AsyncIterator[Rig]:
    with trio.fail_after(20):
        yield Rig(nursery)


OURS = b"GET /agent HTTP/1.1\r\nHost: gateway\r\n\r\n"


async def test_a_path_of_ours_is_answered_and_the_connection_closed(rig: Rig) -> None:
    answer = await rig.ask(OURS)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b"\r\n\r\nfrom us\n")
    assert rig.asked[0].guest == GUEST
    assert rig.asked[0].gateway == GATEWAY
    assert rig.asked[0].mac == b"\2" * 6


async def test_it_does_not_matter_how_a_request_is_cut_into_pieces(rig: Rig) -> None:
    request = b"POST /agent/ports?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
    whole = await rig.ask(request)
    single = await rig.ask(*(request[at : at + 1] for at in range(len(request))))
    assert b"200" in whole.split(b"\r\n")[0]
    assert whole == single
    assert [one.body for one in rig.asked] == [b"body", b"body"]
    assert rig.asked[0].query == "a=b"


@pytest.mark.parametrize(
    "sent",
    (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /agents HTTP/1.1\r\n\r\n",
        b"GET /agent/other HTTP/1.0\r\n\r\n",
        b"GET http://x/agent HTTP/1.1\r\n\r\n",
        b"get /agent http/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\0",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        b"GET /ag",
        b"GET ",
        b"POST",
    ),
)
async def test_what_is_not_ours_goes_to_the_hosts_server_byte_for_byte(rig: Rig, sent: bytes) -> None:
    assert await rig.ask(sent) == sent.upper() + b"<end>"
    assert await rig.ask(*(sent[at : at + 1] for at in range(len(sent)))) == sent.upper() + b"<end>"
    assert not rig.asked


async def test_the_hosts_server_hears_of_a_request_before_its_line_is_complete(rig: Rig) -> None:
    stream = rig.connect()
    await stream.send_all(b"GET /i")
    assert await stream.receive_some() == b"GET /I"
    await stream.aclose()


async def test_a_conversation_with_the_host_stays_with_it_even_when_it_names_our_paths(rig: Rig) -> None:
    stream = rig.connect()
    await stream.send_all(b"PUT /x HTTP/1.1\r\n\r\n")
    assert await stream.receive_some() == b"PUT /X HTTP/1.1\r\n\r\n"
    await stream.send_all(OURS)
    assert await stream.receive_some() == OURS.upper()
    await stream.aclose()


async def test_a_silent_connection_is_the_hosts_after_a_while(
    rig: Rig, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = rig.connect()
    await trio.sleep(guest_http.REQUEST_SECONDS + 1)
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"HELLO"
    await stream.aclose()


async def test_without_a_server_on_the_host_the_answer_is_404_and_nothing_to_other_protocols(rig: Rig) -> None:
    rig.has_server = False
    assert (await rig.ask(b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
    assert await rig.ask(b"\x16\x03\x01") == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    (
        (b"DELETE /agent HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"GET /agent\r\n\r\n", b"400"),
        (b"GET /agent HTTP/1.1\r\n\r\n", b"400"),  # RFC 9112 3.2: without a Host
        (b"GET /agent HTTP/1.1\r\nHost: x\r\nBad header\r\n\r\n", b"400"),
        (b"GET /agent HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000 + b"\r\n\r\n", b"431"),
        (b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99999, b"413"),
        (b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"400"),
        (b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET /agent?bug HTTP/1.1\r\nHost: x\r\n\r\n", b"500"),
    ),
)
async def test_a_bad_request_of_ours_gets_its_status(rig: Rig, sent: bytes, status: bytes) -> None:
    assert (await rig.ask(sent)).split(b" ")[1] == status
    assert (await rig.ask(OURS)).endswith(b"from us\n")  # and the next one is none the worse


async def test_head_is_get_without_the_body(rig: Rig) -> None:
    answer = await rig.ask(OURS.replace(b"GET", b"HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(rig: Rig) -> None:
    stream = rig.connect()
    head = b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    await stream.send_all(head)
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
    await stream.send_all(b"ab")
    assert b"from us" in await read_all(stream)
    await stream.aclose()


async def test_a_streaming_handler_hears_and_answers_piece_by_piece(rig: Rig) -> None:
    stream = rig.connect()
    await stream.send_all(b"POST /agent/stream HTTP/1.0\r\nContent-Length: 1000000\r\n\r\none")
    received = await stream.receive_some()
    assert received.startswith(b"HTTP/1.1 200 ")
    while not received.endswith(b"ONE"):
        received += await stream.receive_some()
    await stream.send_all(b"two")
    assert await stream.receive_some() == b"TWO"
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert not rig.drops  # a guest that ends is no fault


async def test_a_slow_request_is_given_up(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    stream = rig.connect()
    await stream.send_all(b"POST /agent/ports HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")
    assert rig.drops["guest_http_slow"] == 1
    await stream.aclose()


async def test_too_many_open_requests_of_one_link_are_not_looked_at(rig: Rig) -> None:
    open_ones = [rig.connect() for _ in range(guest_http.MAX_OPEN_OF_LINK)]
    await trio.testing.wait_all_tasks_blocked()
    assert await rig.ask(OURS) == OURS.upper() + b"<end>"  # the host's server is still reached
    assert rig.drops["guest_http_too_many"] == 1
    rig.link = "another"
    assert (await rig.ask(OURS)).endswith(b"from us\n")
    rig.link = "link"
    for stream in open_ones:
        await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert (await rig.ask(OURS)).endswith(b"from us\n")


async def test_a_path_that_is_given_back_is_the_hosts_again(rig: Rig) -> None:
    rig.http.unregister("/agent")
    assert await rig.ask(OURS) == OURS.upper() + b"<end>"


async def test_a_large_transfer_through_to_the_host_and_back_is_whole(rig: Rig) -> None:
    stream = rig.connect()
    data = bytes(range(97, 123)) * 100_000
    received = bytearray()

    async def read() -> None:
        received.extend(await read_all(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await stream.send_all(data)
        await stream.send_eof()
    assert bytes(received) == data.upper() + b"<end>"
    await stream.aclose()
