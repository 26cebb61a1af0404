"""What the front does at its limits: the longest answers, many queries at once, answers that are not the cache's."""

from __future__ import annotations

import dns.flags
import dns.message
import trio
import trio.testing

from netstack.dns.message import parse_query
from netstack.dns.replies import parse_reply
from tests.dns.front import Front
from tests.dns.nameserver import make_query, open_nameserver
from tests.dns.relay import Relay, framed, receive, scope


def longest(query: bytes) -> bytes:
    """A nameserver's answer of 65,535 bytes, without an OPT."""
    head = query[:2] + b"\x81\x80\0\1\0\3\0\0\0\0" + query[12 : query.index(b"\0", 12) + 5]
    # Of two types, since a set of records is never cut in two.
    parts = ((16, 30000), (16, 30000), (99, 65535 - len(head) - 60000 - 36))
    return head + b"".join(
        b"\xc0\x0c" + kind.to_bytes(2, "big") + b"\0\1\0\0\0\x3c" + size.to_bytes(2, "big") + bytes(size)
        for kind, size in parts
    )


async def test_an_answer_that_is_too_long_with_our_opt_leaves_by_tcp_without_its_last_record(
    nursery: trio.Nursery,
) -> None:
    async def answer(sent: bytes) -> bytes:
        query = parse_query(sent, tcp=True)
        assert query is not None
        assert not isinstance(query, int)
        reply = parse_reply(longest(sent), query.question)
        assert reply is not None
        written = reply.write(query)
        assert len(written) > 65535
        return written

    it = Front(nursery, answer)
    stream = it.connect()
    await stream.send_all(framed(make_query(kind="ANY", use_edns=0)))
    (wire,) = await receive(stream, 1)
    assert wire[2] & dns.flags.TC >> 8
    assert wire[6:8] == b"\0\2"
    assert 60000 < len(wire) <= 65535
    assert it.server.counters["dns_truncated"] == 1
    await stream.aclose()


async def test_others_get_a_turn_between_the_queries_of_one_chunk(nursery: trio.Nursery) -> None:
    it = Front(nursery)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    def resolve(query: object, reply: object) -> None:
        seen.append(turns)

    seen: list[int] = []
    it.resolver.resolve = resolve  # type: ignore[method-assign]
    stream = it.connect()
    nursery.start_soon(other)
    await stream.send_all(framed(*(make_query(ident=number) for number in range(200))))
    while len(seen) < 200:
        await trio.lowlevel.checkpoint()
    assert seen[-1] - seen[0] >= 200 // 16 - 1
    nursery.cancel_scope.cancel()


async def test_a_refusal_is_not_logged_as_the_query_before_it(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        await relay.ask(make_query("secret.test"))
        await relay.ask(make_query("secret.test"))  # from the cache
        transfer = make_query("other.test", "AXFR")
        for _ in range(2):
            assert (await relay.ask(transfer)).rcode() == 5
        assert [name for _, _, name, *_ in relay.resolver.log()] == ["secret.test"] * 2
