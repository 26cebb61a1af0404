"""Any bytes as a nameserver's reply, or as a query: nothing raises, and nothing takes long."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import dns.edns
import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.message import UPSTREAM_UDP, Query, is_answer_to, parse_query, udp_limit
from netstack.dns.replies import parse_reply, truncate
from tests.dns.nameserver import make_answer, make_query
from tests.dns.relay import Relay

if TYPE_CHECKING:
    import trio

# Seconds. What is allowed for one message; the best of three counts, because the machine does other things too.
PATIENCE = 0.005


def seeds() -> list[tuple[bytes, bytes]]:
    """Queries, and real replies to them."""
    found = []
    for name, kind, records in (
        ("www.example.test", "A", ["www.example.test. 60 IN A 192.0.2.1"]),
        ("www.example.test", "A", ["www.example.test. 60 IN CNAME a.test.", "a.test. 5 IN A 192.0.2.1"]),
        ("example.test", "MX", [f"example.test. 60 IN MX {n} mx{n}.example.test." for n in range(20)]),
        ("example.test", "TXT", [f'example.test. 60 IN TXT "{"x" * 200}"']),
        ("x.test", "HTTPS", ["x.test. 60 IN HTTPS 1 . alpn=h2 ipv4hint=192.0.2.1"]),
        ("example.test", "SOA", ["example.test. 60 IN SOA a. b. 1 2 3 4 5"]),
    ):
        query = make_query(name, kind, use_edns=0, want_dnssec=True)
        answer = dns.message.from_wire(make_answer(query, *records))
        answer.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode.STALE_ANSWER, "stale")])
        answer.authority.append(dns.rrset.from_text("example.test.", 60, "IN", "SOA", "a. b. 1 2 3 4 5"))
        answer.additional.append(dns.rrset.from_text("a.test.", 60, "IN", "AAAA", "2001:db8::1"))
        found.append((query, answer.to_wire(max_size=65535)))
    return found


SEEDS = seeds()


def survive(query_bytes: bytes, wire: bytes) -> None:
    """All that is done with a reply."""
    query = parse_query(query_bytes)
    assert isinstance(query, Query)
    is_answer_to(wire, query_bytes, query.question)
    if len(wire) < query.question.end or wire[12 : query.question.end] != query_bytes[12 : query.question.end]:
        return
    reply = parse_reply(wire, query.question)
    if reply is None:
        return
    assert 0 <= reply.lifetime <= 86400
    for age in (0, 1, 10**6):
        answer = reply.write(query, age)
        assert answer[:2] == query_bytes[:2]
        assert answer[12 : query.question.end] == query_bytes[12 : query.question.end]
        assert len(answer) <= len(wire) + 600
        short = truncate(answer, query, udp_limit(query.opt))
        assert len(short) <= udp_limit(query.opt)


@pytest.mark.parametrize("seed", range(300))
def test_mutated_replies_are_survived(seed: int) -> None:
    chance = random.Random(seed)
    for query, reply in SEEDS:
        wire = bytearray(reply)
        for _ in range(chance.randrange(1, 8)):
            at = chance.randrange(2, len(wire))
            match chance.randrange(5):
                case 0:
                    wire[at] = chance.choice((0, 0xC0, 0xFF, 0x3F, 0x40, 12, chance.randrange(256)))
                case 1:
                    del wire[at : at + chance.randrange(1, 12)]
                case 2:
                    wire[at:at] = chance.randbytes(chance.randrange(1, 12))
                case 3:
                    wire[4 + chance.randrange(8)] = chance.randrange(256)
                case _:
                    wire[at:] = wire[chance.randrange(len(wire)) :]
            if len(wire) < 20:
                break
        survive(query, bytes(wire))


@given(st.integers(0, len(SEEDS) - 1), st.binary(max_size=300), st.binary(min_size=8, max_size=8))
def test_any_bytes_behind_the_question_are_survived(which: int, tail: bytes, counts: bytes) -> None:
    query, reply = SEEDS[which]
    parsed = parse_query(query)
    assert isinstance(parsed, Query)
    end = parsed.question.end
    survive(query, reply[:6] + counts[:6] + reply[12:end] + tail)


def bombs() -> dict[str, bytes]:
    """Replies of the longest kind that cost the most."""
    query = make_query("x.test")
    head = query[:2] + b"\x81\x80\0\1\xff\xff\xff\xff\xff\xff" + query[12:]
    room = 65535 - len(head)
    record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\0"
    labels = b"\1a" * 120 + b"\0\0\1\0\1\0\0\0\x3c\0\0"
    chain = b"".join(b"\xc0" + bytes((12 + 2 * n & 0xFF,)) for n in range(60)) + b"\0\0\1\0\1\0\0\0\x3c\0\0"
    opt = b"\0\0\x29\4\xd0\0\0\0\0\xff\xf0" + b"\0\x0f\0\0" * 16380
    count = room // 12
    exact = query[:2] + b"\x81\x80\0\1" + count.to_bytes(2, "big") + bytes(4) + query[12:] + record * count
    many = room // 11
    roots = (
        query[:2]
        + b"\x81\x80\0\1"
        + many.to_bytes(2, "big")
        + bytes(4)
        + query[12:]
        + b"\0\0\1\0\1\0\0\0\x3c\0\0" * many
    )
    whole = query[:2] + b"\x81\x80\0\1" + (room // len(labels)).to_bytes(2, "big") + bytes(4) + query[12:]
    return {
        "records": head + record * (room // len(record)),
        "exactly so many records": exact,
        "records of the root": roots,
        "labels": whole + labels * (room // len(labels)),
        "pointers": head + chain * (room // len(chain)),
        "options": query[:2] + b"\x81\x80\0\1\0\0\0\0\0\1" + query[12:] + opt[:room],
        "nothing": head + bytes(room),
        "ones": head + b"\x01" * room,
        "pointers only": head + b"\xc0\x0c" * (room // 2),
    }


@pytest.mark.parametrize("which", sorted(bombs()))
def test_no_reply_takes_long(which: str) -> None:
    query, wire = make_query("x.test"), bombs()[which]
    assert len(wire) <= 65535
    parsed = parse_query(query)
    assert isinstance(parsed, Query)
    survive(query, wire)
    times = {"parse": 1.0, "write": 1.0, "truncate": 1.0}
    for _ in range(5):
        began = time.perf_counter()
        reply = parse_reply(wire, parsed.question)
        times["parse"] = min(times["parse"], time.perf_counter() - began)
        if reply is None:
            continue
        began = time.perf_counter()
        answer = reply.write(parsed, 7)
        times["write"] = min(times["write"], time.perf_counter() - began)
        began = time.perf_counter()
        truncate(answer, parsed, 512)
        times["truncate"] = min(times["truncate"], time.perf_counter() - began)
    assert {what: seconds for what, seconds in times.items() if PATIENCE < seconds < 1.0} == {}


async def test_no_query_takes_long(nursery: trio.Nursery) -> None:
    head = make_query()[:12]
    relay = Relay(nursery)
    for query in (
        head + b"\1a" * 32000,
        head + b"\xc0\x0c" * 30000,
        make_query()[:10] + b"\xff\xff" + make_query()[12:] + b"\0\0\x29\4\xd0\0\0\0\0\0\0" * 5900,
        make_query() + bytes(65000),
        make_query(use_edns=0)[:-2] + b"\xff\xf0" + b"\0\x0f\0\0" * 16000,
    ):
        best = 1.0
        for _ in range(5):
            began = time.perf_counter()
            relay.send(query[:65535])
            best = min(best, time.perf_counter() - began)
        assert best < PATIENCE
    assert UPSTREAM_UDP == 1232
