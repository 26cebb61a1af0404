"""Connections to nameservers that several queries share."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from netstack.dns.message import Question, parse_question
from netstack.dns.routes import Server
from netstack.dns.upstream_tcp import LostError, Streams, _Connection
from tests.dns.nameserver import address_of, make_query, open_nameserver


def question_of(query: bytes) -> Question:
    question = parse_question(query)
    assert question is not None
    return question


class Half:
    """A stream that takes half of what is sent, and the rest never."""

    def __init__(self) -> None:
        self.sent = b""

    async def send_all(self, data: bytes) -> None:
        self.sent += data[: len(data) // 2]
        await trio.sleep_forever()


async def test_nothing_is_sent_behind_half_a_query(nursery: trio.Nursery) -> None:
    pool = Streams(nursery, Counter())
    connection = _Connection(pool, Server("127.0.0.1", transport="tcp"))
    stream = Half()
    connection._stream = stream  # type: ignore[assignment]
    connection._ready.set()
    query = make_query()
    lost = trio.Event()

    async def other() -> None:
        with pytest.raises(LostError):
            await connection.ask(query, question_of(query))
        lost.set()

    with trio.move_on_after(10) as race:
        async with trio.open_nursery() as asking:
            asking.start_soon(connection.ask, query, question_of(query))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            race.cancel()
    assert race.cancelled_caught
    with trio.fail_after(5):
        await lost.wait()
    assert connection.closed
    assert len(stream.sent) == (len(query) + 2) // 2
    nursery.cancel_scope.cancel()


async def test_answers_to_nothing_are_counted(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        server.tcp_behaviour = lambda query: [address_of(make_query("other.test")), address_of(query)]
        counters: Counter[str] = Counter()
        query = make_query()
        streams = Streams(nursery, counters)
        await streams.ask(server.nameserver._replace(transport="tcp"), query, question_of(query))
        assert counters["dns_mismatched_replies"] == 1
        nursery.cancel_scope.cancel()
