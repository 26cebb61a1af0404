"""The front of the DNS service: what it turns away, and how much it takes on. Its TCP: test_server_tcp.py."""

from __future__ import annotations

import random
from ipaddress import IPv4Network
from pathlib import Path

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.local import LocalNames
from netstack.dns.message import MAX_UDP
from netstack.dns.resolver import Resolver
from netstack.dns.routes import RoutingTable, Scope
from netstack.dns.upstream import Upstream
from tests.dns.front import Front, ScriptedResolver, at_once
from tests.dns.nameserver import TestNameserver, address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import framed, receive

LOCAL = LocalNames(
    "netstack.internal", {"host.netstack.internal": (bytes((192, 168, 5, 2)),)}, (IPv4Network("192.168.5.0/24"),)
)


# UDP.


async def test_a_datagram_is_answered(nursery: trio.Nursery) -> None:
    it = Front(nursery)
    query = make_query(ident=0xABCD)
    assert await it.ask(query) == address_of(query)
    assert it.resolver.queries == [(query, False)]
    assert it.answers[0][0].src_port == 5353


@pytest.mark.parametrize("message", (b"", b"\x12\x34\x01", make_query()[:11], address_of(make_query())))
async def test_what_is_no_query_gets_no_answer(nursery: trio.Nursery, message: bytes) -> None:
    it = Front(nursery)
    it.send(message)
    await trio.testing.wait_all_tasks_blocked()
    assert it.answers == []
    assert it.resolver.queries == []


def with_opcode(opcode: int) -> bytes:
    query = bytearray(make_query())
    query[2] |= opcode << 3
    return bytes(query)


@pytest.mark.parametrize(
    ("query", "rcode"),
    (
        (with_opcode(1), "NOTIMP"),
        (with_opcode(2), "NOTIMP"),
        (with_opcode(4), "NOTIMP"),
        (with_opcode(5), "NOTIMP"),
        (make_query()[:4] + b"\0\0" + make_query()[6:], "FORMERR"),
        (make_query()[:4] + b"\0\2" + make_query()[6:], "FORMERR"),
        (make_query()[:12], "FORMERR"),
        (make_query()[:12] + b"\x40x\0\0\1\0\1", "FORMERR"),
        (make_query()[:12] + b"\xc0\x0c\0\1\0\1", "FORMERR"),
        (make_query(kind="AXFR"), "REFUSED"),
        (make_query(kind="IXFR"), "REFUSED"),
        (make_query(use_edns=1), "BADVERS"),
    ),
)
async def test_what_cannot_be_resolved_is_refused(nursery: trio.Nursery, query: bytes, rcode: str) -> None:
    it = Front(nursery)
    answer = await it.ask(query)
    assert answer[:2] == query[:2]
    assert answer[2] & 0xF8 == query[2] & 0x78 | 0x80
    full = answer[3] & 15 | (answer[-6] << 4 if rcode == "BADVERS" else 0)
    assert dns.rcode.to_text(dns.rcode.Rcode(full)).replace("BADSIG", "BADVERS") == rcode
    assert it.resolver.queries == []
    by_tcp = it.connect()
    await by_tcp.send_all(framed(query))
    assert await receive(by_tcp, 1) == [answer]
    await by_tcp.aclose()


async def test_trailing_bytes_do_no_harm(nursery: trio.Nursery) -> None:
    assert (await Front(nursery, lambda query: at_once(make_query())).ask(make_query() + b"xyz"))[3] & 15 == 0


async def test_what_is_known_is_answered_within_the_call(nursery: trio.Nursery) -> None:
    it = Front(nursery)
    it.resolver.at_once = address_of(make_query())
    it.send(make_query())
    assert [answer for _, answer in it.answers] == [it.resolver.at_once]
    assert it.flushed == it.resolver.queries == []  # the batch that brought it flushes
    it.resolver.at_once = b""
    await it.ask(make_query())
    assert it.flushed == ["link"]


@pytest.mark.parametrize(
    ("size", "limit"), ((None, 512), (0, 512), (511, 512), (1232, 1232), (4096, MAX_UDP), (65535, MAX_UDP))
)
async def test_answers_by_udp_have_the_size_that_the_guest_takes(
    nursery: trio.Nursery, size: int | None, limit: int
) -> None:
    query = make_query() if size is None else make_query(use_edns=0, payload=size)
    tail = 0 if size is None else 11

    async def answer(sent: bytes) -> bytes:
        return long

    def fill(length: int) -> bytes:
        """An answer of this length."""
        records = 3
        text = length - len(make_answer(query)) - tail * (size is None) - 16 * records - 14
        texts = [f'"{"x" * 200}"'] * (text // 201) + [f'"{"x" * (text % 201)}"']
        made = make_answer(query, *(f"www.example.test. 60 IN A 192.0.2.{n}" for n in range(records)))
        assert len(made) < length
        data = b"".join(bytes((len(t) - 2,)) + t[1:-1].encode() for t in texts)
        extra = length - len(made) - 12
        data = (data + bytes(extra))[:extra]
        record = b"\xc0\x0c\0\x10\0\1\0\0\0\x3c" + len(data).to_bytes(2, "big") + data
        end = len(made) - tail
        counts = made[:6] + (records + 1).to_bytes(2, "big") + made[8:12]
        return counts + made[12:end] + record + made[end:]

    long = fill(limit)
    assert len(long) == limit
    assert await Front(nursery, answer).ask(query) == long
    long = fill(limit + 1)
    wire = await Front(nursery, answer).ask(query)
    found = dns.message.from_wire(wire)
    assert found.flags & dns.flags.TC
    assert found.question == dns.message.from_wire(query).question
    assert [len(rrset) for rrset in found.answer] == [3]  # whole records, as many as fit
    assert (found.edns == 0) == (size is not None)


@pytest.mark.parametrize("verb", ("known", "resolve"))
async def test_a_bug_in_the_resolver_is_a_servfail_and_ends_nothing(
    nursery: trio.Nursery, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> bytes:
        raise IndexError("a bug")

    monkeypatch.setattr(ScriptedResolver, verb, broken)
    it = Front(nursery)
    for _ in range(2):
        assert (await it.ask(make_query()))[3] & 15 == dns.rcode.SERVFAIL
    assert it.warnings == ["dns_failed"] * 2
    assert it.server.queries.total == 0


async def test_slow_queries_do_not_delay_others(nursery: trio.Nursery) -> None:
    slow = trio.Event()

    async def answer(query: bytes) -> bytes:
        if b"slow" in query:
            await slow.wait()
        return address_of(query)

    it = Front(nursery, answer)
    it.send(make_query("slow.test", ident=1))
    assert (await it.ask(make_query(ident=2)))[:2] == b"\0\2"
    slow.set()
    await trio.testing.wait_all_tasks_blocked()
    assert [sent[:2] for _, sent in it.answers] == [b"\0\2", b"\0\1"]


async def test_the_same_id_for_two_types_is_answered_twice(nursery: trio.Nursery) -> None:
    """Old resolvers ask A and AAAA with one ID from one port."""
    it = Front(nursery)
    for kind in ("A", "AAAA"):
        it.send(make_query(kind=kind, ident=7))
    await trio.testing.wait_all_tasks_blocked()
    kinds = {dns.message.from_wire(answer).question[0].rdtype for _, answer in it.answers}
    assert kinds == {dns.rdatatype.A, dns.rdatatype.AAAA}


async def test_too_many_queries_are_answered_servfail_at_once(nursery: trio.Nursery) -> None:
    gate = trio.Event()

    async def answer(query: bytes) -> bytes:
        await gate.wait()
        return address_of(query)

    it = Front(nursery, answer)
    each, everybody = it.server.queries.of_each, it.server.queries.of_all = 256, 1024
    for number in range(each + 50):
        it.send(make_query(ident=number), "greedy")
    assert len(it.answers) == 50
    assert all(sent[3] & 15 == dns.rcode.SERVFAIL for _, sent in it.answers)
    # Others have room until all of it is taken.
    for guest in range(10):
        for number in range(each):
            it.send(make_query(ident=number), f"guest {guest}")
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.queries.total == everybody == len(it.resolver.queries)
    assert set(it.warnings) == {"dns_too_many"}
    gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert it.server.queries.total == 0
    assert not it.server.queries.used
    assert len(it.answers) == each * 11 + 50
    assert (await it.ask(make_query()))[3] & 15 == 0


@given(st.lists(st.binary(max_size=60), max_size=6), st.integers(0, 2**32))
def test_any_bytes_are_survived(pieces: list[bytes], seed: int) -> None:
    chance = random.Random(seed)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            it = Front(nursery, echo)
            stream = it.connect()
            for piece in pieces:
                query = bytearray(make_query(use_edns=0))
                for position, byte in enumerate(piece):
                    query[(chance.randrange(len(query)) + position) % len(query)] = byte
                it.send(piece)
                it.send(bytes(query))
                try:
                    await stream.send_all(framed(bytes(query)) + piece)
                except trio.BrokenResourceError:
                    stream = it.connect()
                await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert it.server.queries.total == it.server.connections.total == 0
            nursery.cancel_scope.cancel()

    async def echo(query: bytes) -> bytes:
        return query

    trio.run(run)


# The whole relay: front, own names, a nameserver.


def make_relay(nursery: trio.Nursery, nameserver: TestNameserver | None) -> Front:
    it = Front(nursery)
    servers = () if nameserver is None else (nameserver.nameserver,)
    table = RoutingTable((Scope("host", servers, default=True),))
    it.server.resolver = Resolver(Upstream(nursery), (LOCAL,), table=table)
    return it


async def ask_relay(it: Front, query: bytes) -> dns.message.Message:
    return dns.message.from_wire(await it.ask(query))


async def test_the_relay(nursery: trio.Nursery) -> None:
    async with open_nameserver() as nameserver:
        it = make_relay(nursery, nameserver)
        answer = await ask_relay(it, make_query("host.netstack.internal"))
        assert answer.answer[0][0].to_text() == "192.168.5.2"
        assert nameserver.udp_queries == []
        answer = await ask_relay(it, make_query("www.example.test"))
        assert answer.answer[0][0].to_text() == "192.0.2.1"
        stream = it.connect()
        await stream.send_all(framed(make_query("a.test", ident=1), make_query("host.netstack.internal", ident=2)))
        assert {sent[:2] for sent in await receive(stream, 2)} == {b"\0\1", b"\0\2"}
        assert len(nameserver.tcp_queries) == len(nameserver.udp_queries) == 1
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_without_nameservers_the_answer_is_servfail(nursery: trio.Nursery) -> None:
    it = make_relay(nursery, None)
    assert (await ask_relay(it, make_query())).rcode() == dns.rcode.SERVFAIL
    assert (await ask_relay(it, make_query("host.netstack.internal"))).rcode() == dns.rcode.NOERROR
    assert isinstance(it.server.resolver, Resolver)
    assert it.server.resolver.counters["dns_servfail"] == 1


async def test_a_truncated_answer_is_fetched_by_tcp(nursery: trio.Nursery) -> None:
    records = [f"big.test. 60 IN A 10.0.0.{number}" for number in range(200)]
    async with open_nameserver(lambda query: [make_answer(query, flags=dns.flags.TC)]) as nameserver:
        nameserver.tcp_behaviour = lambda query: [make_answer(query, *records)]
        it = make_relay(nursery, nameserver)
        answer = await ask_relay(it, make_query("big.test"))
        assert answer.flags & dns.flags.TC
        assert len(answer.answer[0]) == 30  # 512 bytes
        stream = it.connect()
        await stream.send_all(framed(make_query("big.test")))
        assert len(dns.message.from_wire((await receive(stream, 1))[0]).answer[0]) == 200
        await stream.aclose()
        assert len(nameserver.tcp_queries) == 1


@pytest.mark.needs("dnsmasq")
async def test_dnsmasq_as_the_nameserver(nursery: trio.Nursery, tmp_path: Path) -> None:
    """A real one, with no nameserver of its own to ask: records by UDP and TCP, NODATA, NXDOMAIN, REFUSED."""
    async with open_nameserver() as placeholder:
        port = placeholder.port
    process = await trio.lowlevel.open_process(
        [
            *("/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"),
            *("--listen-address=127.0.0.1", "--bind-interfaces", f"--port={port}", "--user=root", "--pid-file="),
            *("--host-record=www.example.test,192.0.2.7", "--local=/example.test/"),
            *(f"--txt-record=big.example.test,{'x' * 200},{'y' * 200},{'z' * 200}",),
        ]
    )
    try:
        probe = dns.message.make_query("www.example.test", "A")
        with trio.fail_after(30):
            while True:
                try:
                    await dns.asyncquery.udp(probe, "127.0.0.1", port=port, timeout=1)
                    break
                except (OSError, dns.exception.Timeout):
                    assert process.poll() is None
        placeholder.nameserver = placeholder.nameserver._replace(port=port)
        it = make_relay(nursery, placeholder)
        answer = await ask_relay(it, make_query("www.example.test", use_edns=0))
        assert answer.answer[0][0].to_text() == "192.0.2.7"
        assert answer.edns == 0
        answer = await ask_relay(it, make_query("WWW.example.test", "AAAA"))
        assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
        assert (await ask_relay(it, make_query("no.example.test"))).rcode() == dns.rcode.NXDOMAIN
        assert (await ask_relay(it, make_query("elsewhere.test"))).rcode() == dns.rcode.REFUSED
        answer = await ask_relay(it, make_query("big.example.test", "TXT"))
        assert answer.flags & dns.flags.TC
        stream = it.connect()
        await stream.send_all(framed(make_query("big.example.test", "TXT")))
        ((wire,),) = [await receive(stream, 1)]
        assert len(dns.message.from_wire(wire).answer[0][0].strings) == 3
        await stream.aclose()
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()
