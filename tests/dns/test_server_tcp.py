"""The front of the DNS service by TCP: messages cut anywhere, answers as they are ready, ends of connections."""

from __future__ import annotations

import random

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import pytest
import trio
import trio.testing

from netstack.dns import server as front
from tests.dns.front import Front
from tests.dns.nameserver import address_of, make_answer, make_query
from tests.dns.relay import framed, receive


@pytest.mark.parametrize("seed", range(25))
async def test_queries_may_be_cut_anywhere(nursery: trio.Nursery, seed: int) -> None:
    chance = random.Random(seed)
    queries = [make_query(f"{'x' * chance.randrange(1, 60)}.test", ident=number) for number in range(10)]
    data = framed(*queries)
    cuts = sorted(chance.randrange(len(data)) for _ in range(chance.randrange(8)))
    stream = Front(nursery).connect()
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if start < end:
            await stream.send_all(data[start:end])
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(await receive(stream, 10)) == sorted(map(address_of, queries))
    await stream.aclose()


async def test_queries_may_come_byte_by_byte(nursery: trio.Nursery) -> None:
    it = Front(nursery)
    stream = it.connect()
    for byte in framed(make_query(ident=1), make_query(ident=2)):
        await stream.send_all(bytes((byte,)))
        await trio.testing.wait_all_tasks_blocked()
    assert len(await receive(stream, 2)) == 2
    assert [tcp for _, tcp in it.resolver.queries] == [True, True]
    await stream.aclose()


async def test_answers_leave_when_they_are_ready(nursery: trio.Nursery) -> None:
    slow = trio.Event()

    async def answer(query: bytes) -> bytes:
        if query[:2] == b"\0\0":
            await slow.wait()
        return address_of(query)

    stream = Front(nursery, answer).connect()
    await stream.send_all(framed(*(make_query(ident=number) for number in range(10))))
    assert {sent[:2] for sent in await receive(stream, 9)} == {bytes((0, number)) for number in range(1, 10)}
    slow.set()
    assert (await receive(stream, 1))[0][:2] == b"\0\0"
    await stream.aclose()


async def test_a_half_closed_connection_is_answered_and_then_closed(nursery: trio.Nursery) -> None:
    gate = trio.Event()

    async def answer(query: bytes) -> bytes:
        await gate.wait()
        return address_of(query)

    it = Front(nursery, answer)
    stream = it.connect()
    await stream.send_all(framed(make_query(ident=1), make_query(ident=2)))
    await stream.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.connections.total == 1
    gate.set()
    assert len(await receive(stream, 2)) == 2
    assert await stream.receive_some() == b""
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.connections.total == it.server.queries.total == 0


async def test_answers_by_tcp_are_whole(nursery: trio.Nursery) -> None:
    records = [f"www.example.test. 60 IN A 10.0.{number // 250}.{number % 250}" for number in range(3000)]

    async def answer(query: bytes) -> bytes:
        return make_answer(query, *records)

    stream = Front(nursery, answer).connect()
    await stream.send_all(framed(make_query()))
    (answer_bytes,) = await receive(stream, 1)
    assert len(dns.message.from_wire(answer_bytes).answer[0]) == 3000
    await stream.aclose()


@pytest.mark.parametrize("length", (0, 1, 11, front.MAX_TCP_QUERY + 1, 65535))
async def test_a_bad_length_ends_the_connection(nursery: trio.Nursery, length: int) -> None:
    it = Front(nursery)
    stream = it.connect()
    await stream.send_all(length.to_bytes(2, "big") + b"x" * 20)
    assert await stream.receive_some() == b""
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.connections.total == 0
    assert it.server.counters["dns_malformed"] == 1


async def test_an_answer_by_tcp_ends_in_silence_and_the_connection_lives(nursery: trio.Nursery) -> None:
    stream = Front(nursery).connect()
    await stream.send_all(framed(address_of(make_query()), make_query(ident=9)))
    assert (await receive(stream, 1))[0][:2] == b"\0\x09"
    await stream.aclose()


async def test_an_idle_connection_is_closed(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    stream = Front(nursery).connect()
    await stream.send_all(framed(make_query()))
    await receive(stream, 1)
    began = trio.current_time()
    assert await stream.receive_some() == b""
    assert trio.current_time() - began == pytest.approx(front.IDLE_TIMEOUT)


async def test_a_connection_that_waits_for_an_answer_is_not_idle(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(query: bytes) -> bytes:
        await trio.sleep(front.IDLE_TIMEOUT * 3)
        return address_of(query)

    stream = Front(nursery, answer).connect()
    await stream.send_all(framed(make_query()))
    assert await receive(stream, 1) == [address_of(make_query())]
    await stream.aclose()


async def test_a_guest_that_does_not_read_is_let_go(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    it = Front(nursery)
    ours, theirs = trio.testing.lockstep_stream_pair()  # send_all waits until it is read
    nursery.start_soon(it.server.serve_stream, theirs, "guest")
    await ours.send_all(framed(*(make_query(ident=number) for number in range(20))))
    await trio.sleep(front.WRITE_TIMEOUT + 1)
    assert it.server.connections.total == it.server.queries.total == 0


async def test_a_guest_that_goes_away_leaves_nothing_behind(nursery: trio.Nursery) -> None:
    gate = trio.Event()

    async def answer(query: bytes) -> bytes:
        await gate.wait()
        return address_of(query)

    it = Front(nursery, answer)
    stream = it.connect()
    await stream.send_all(framed(make_query()))
    await trio.testing.wait_all_tasks_blocked()
    await stream.aclose()
    gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.connections.total == it.server.queries.total == 0


async def test_connections_are_bounded(nursery: trio.Nursery) -> None:
    it = Front(nursery)
    streams = [it.connect("greedy") for _ in range(front.MAX_CONNECTIONS_OF_GUEST + 3)]
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.counters["dns_tcp_refused"] == 3
    other = it.connect("other")
    await other.send_all(framed(make_query()))
    assert len(await receive(other, 1)) == 1
    for stream in (*streams, other):
        await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.connections.total == 0
