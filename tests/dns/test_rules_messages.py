"""Rules 1 to 15 of forwarding DNS: messages. The number of a test is the number of its rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from netstack.dns.message import parse_query
from tests.dns.nameserver import address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, errors_of, scope, silent

if TYPE_CHECKING:
    import trio

TXT_HEAD = make_query()[:12]


def with_bits(query: bytes, *, set_: int = 0, clear: int = 0) -> bytes:
    flags = int.from_bytes(query[2:4], "big") & ~clear | set_
    return query[:2] + flags.to_bytes(2, "big") + query[4:]


@pytest.mark.parametrize("message", (b"", b"\0", make_query()[:11], with_bits(make_query(), set_=dns.flags.QR)))
async def test_rule_1_what_is_no_query_is_not_answered(nursery: trio.Nursery, message: bytes) -> None:
    await Relay(nursery).silence(message)


@pytest.mark.parametrize("count", (0, 2, 255, 256, 257, 65535))
async def test_rule_2_one_question_or_formerr(nursery: trio.Nursery, count: int) -> None:
    query = make_query(ident=0xBEEF)
    answer = await Relay(nursery).ask_raw(query[:4] + count.to_bytes(2, "big") + query[6:])
    assert answer[:2] == b"\xbe\xef"
    assert (answer[2] & 0xF8, answer[3] & 15) == (0x80, dns.rcode.FORMERR)


@pytest.mark.parametrize("opcode", range(1, 16))
async def test_rule_3_other_opcodes_are_notimp_and_not_forwarded(nursery: trio.Nursery, opcode: int) -> None:
    async with open_nameserver() as server:
        answer = await Relay(nursery, scope(server.nameserver)).ask_raw(with_bits(make_query(), set_=opcode << 11))
        assert (answer[2] >> 3 & 15, answer[3] & 15) == (opcode, dns.rcode.NOTIMP)
        assert not server.udp_queries


@pytest.mark.parametrize("class_", ("CH", "HS", "ANY", "NONE"))
async def test_rule_4_other_classes_are_refused(nursery: trio.Nursery, class_: str) -> None:
    async with open_nameserver() as server:
        query = make_query("version.bind", "TXT", rdclass=class_)
        assert (await Relay(nursery, scope(server.nameserver)).ask(query)).rcode() == dns.rcode.REFUSED
        assert not server.udp_queries


@pytest.mark.parametrize("cached", (False, True))
async def test_rule_5_id_question_and_flags_are_the_querys(nursery: trio.Nursery, cached: bool) -> None:
    def behave(query: bytes) -> list[bytes]:
        lowered = query[:12] + query[12:].lower()
        return [make_answer(lowered, "www.example.test. 60 IN A 192.0.2.1", flags=dns.flags.AA)]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        if cached:
            await relay.ask(make_query())
        for spelling, ident in (("WwW.eXample.TeST", 0x0102), ("www.EXAMPLE.test", 0xFFFE)):
            query = make_query(spelling, ident=ident)
            answer = await relay.ask_raw(query)
            assert answer[:2] == ident.to_bytes(2, "big")
            assert answer[12 : len(query)] == query[12:]
            flags = int.from_bytes(answer[2:4], "big")
            assert flags == dns.flags.QR | dns.flags.RD | dns.flags.RA
        assert len(server.udp_queries) == 1


@pytest.mark.parametrize("trusted", (False, True))
@pytest.mark.parametrize("asked", (0, dns.flags.AD, dns.flags.CD, dns.flags.AD | dns.flags.CD))
@pytest.mark.parametrize("do", (False, True))
async def test_rule_6_the_bits_of_dnssec(nursery: trio.Nursery, trusted: bool, asked: int, do: bool) -> None:
    signature = "www.example.test. 60 IN RRSIG A 8 3 60 20300101000000 20200101000000 1 example.test. AAAA"

    def behave(query: bytes) -> list[bytes]:
        records = ["www.example.test. 60 IN A 192.0.2.1"]
        if dns.message.from_wire(query).ednsflags & dns.flags.DO:
            records.append(signature)
        return [make_answer(query, *records, flags=dns.flags.AD)]

    async with open_nameserver(behave) as server:
        options = frozenset({"trust-ad"} if trusted else ())
        relay = Relay(nursery, scope(server.nameserver._replace(options=options)))
        settings: dict[str, Any] = {"use_edns": 0, "want_dnssec": True} if do else {}
        query = with_bits(make_query(**settings), set_=asked)
        for _ in range(2):
            answer = await relay.ask(query)
            assert answer.flags & dns.flags.CD == asked & dns.flags.CD
            assert bool(answer.flags & dns.flags.AD) == (trusted and (do or bool(asked & dns.flags.AD)))
            assert bool(answer.ednsflags & dns.flags.DO) == do
            kinds = [rrset.rdtype for rrset in answer.answer]
            assert kinds == [dns.rdatatype.A, dns.rdatatype.RRSIG][: 1 + do]
        sent = dns.message.from_wire(server.udp_queries[0])
        assert bool(sent.ednsflags & dns.flags.DO) == do
        assert sent.flags & (dns.flags.AD | dns.flags.CD) == asked
        assert len(server.udp_queries) == 1


@pytest.mark.parametrize(
    ("kind", "data"),
    (
        ("TYPE65280", r"\# 5 0102030405"),
        ("SVCB", "1 svc.example.test. alpn=h2 port=8443"),
        ("HTTPS", "1 . alpn=h3,h2 ipv4hint=192.0.2.1"),
        ("CDS", "60485 5 1 2BB183AF5F22588179A53B0A98631FAD1A292118"),
        ("CAA", '0 issue "ca.example.test"'),
        ("SOA", "ns.example.test. root.example.test. 1 2 3 4 5"),
        ("NAPTR", '100 10 "u" "E2U+sip" "!^.*$!sip:i@example.test!" .'),
        ("TXT", r'"" "x" "\000\255"'),
        ("SRV", "0 5 5060 sip.example.test."),
        ("PTR", "host.example.test."),
    ),
)
async def test_rule_7_records_of_all_types_pass_to_the_byte(nursery: trio.Nursery, kind: str, data: str) -> None:
    async with open_nameserver(lambda query: [make_answer(query, f"x.test. 60 IN {kind} {data}")]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        query = make_query("x.test", kind)
        for _ in range(2):
            answer = await relay.ask_raw(query)
            assert answer[4:] == make_answer(query, f"x.test. 60 IN {kind} {data}")[4:]
        assert len(server.udp_queries) == 1


BAD_NAMES = (
    b"\x40a\0",
    b"\x80a\0",
    b"\xc0\x0c",
    b"\x01a\xc0\x0c",
    b"\xc0\x0e\xc0\x0c",
    (b"\x3f" + b"a" * 63) * 4 + b"\0",
    b"\x01a" * 127 + b"\x01a\0",
    b"\x3fshort",
    b"",
)


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_rule_8_bad_names_are_formerr(nursery: trio.Nursery, name: bytes) -> None:
    answer = await Relay(nursery).ask_raw(TXT_HEAD + name + b"\0\1\0\1")
    assert answer[3] & 15 == dns.rcode.FORMERR
    assert len(answer) == 12


async def test_rule_8_trailing_bytes_do_no_harm(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        for tail in (b"\0", b"xyz", bytes(600)):
            answer = await Relay(nursery, scope(server.nameserver)).ask_raw(make_query() + tail)
            assert dns.message.from_wire(answer).answer


async def test_rule_9_without_recursion_desired_only_what_is_known(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        query = with_bits(make_query(), clear=dns.flags.RD)
        assert (await relay.ask(query)).rcode() == dns.rcode.REFUSED
        assert not server.udp_queries
        await relay.ask(make_query())
        answer = await relay.ask(query)
        assert answer.answer
        assert not answer.flags & dns.flags.RD


@pytest.mark.parametrize("kind", ("AXFR", "IXFR"))
async def test_rule_10_transfers_are_refused(nursery: trio.Nursery, kind: str) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query(kind=kind))).rcode() == dns.rcode.REFUSED
        assert not server.udp_queries


async def test_rule_11_any_is_forwarded_and_fits(nursery: trio.Nursery) -> None:
    records = [f"www.example.test. 60 IN TXT {'x' * 200}{n}" for n in range(20)]
    records.insert(0, "www.example.test. 60 IN A 192.0.2.1")
    async with open_nameserver(lambda query: [make_answer(query, *records)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        answer = await relay.ask_raw(make_query(kind="ANY"))
        assert len(answer) <= 512
        message = dns.message.from_wire(answer)
        assert message.flags & dns.flags.TC
        # A set of texts is not cut in two.
        assert [rrset.rdtype for rrset in message.answer] == [dns.rdatatype.A]


async def test_rule_12_aliases_keep_their_order(nursery: trio.Nursery) -> None:
    chain = [f"a{n}.test. {60 + n} IN CNAME a{n + 1}.test." for n in range(16)] + ["a16.test. 300 IN A 192.0.2.9"]
    async with open_nameserver(lambda query: [make_answer(query, *chain)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            answer = await relay.ask(make_query("a0.test", use_edns=0))
            assert [rrset.to_text() for rrset in answer.answer] == chain
        assert len(server.udp_queries) == 1


SOA = "example.test. 60 IN SOA ns.example.test. root.example.test. 1 3600 600 86400 30"


def with_soa(query: bytes, rcode: int = 0) -> bytes:
    answer = dns.message.from_wire(make_answer(query, rcode=rcode))
    owner, ttl, class_, kind, data = SOA.split(maxsplit=4)
    answer.authority.append(dns.rrset.from_text(owner, int(ttl), class_, kind, data))
    return answer.to_wire()


@pytest.mark.parametrize("kind", ("AAAA", "MX", "HTTPS"))
async def test_rule_13_no_such_type_is_never_no_such_name(nursery: trio.Nursery, kind: str) -> None:
    """musl takes NXDOMAIN for AAAA as the end of the name, IPv4 and all."""
    async with open_nameserver(
        lambda query: [address_of(query) if parse_kind(query) == 1 else with_soa(query)]
    ) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            answer = await relay.ask(make_query(kind=kind))
            assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
            assert answer.authority[0].to_text() == SOA.replace(" 60 ", " 30 ", 1)
            assert (await relay.ask(make_query())).answer
        assert len(server.udp_queries) == 2


def parse_kind(query: bytes) -> int:
    return dns.message.from_wire(query).question[0].rdtype


@pytest.mark.parametrize("lenient", (False, True))
async def test_rule_14_a_aaaa_that_nobody_answers(nursery: trio.Nursery, lenient: bool) -> None:
    """musl fails the whole name on SERVFAIL of one half: where that is wanted, the half is just not there."""
    async with open_nameserver(lambda query: [address_of(query)] if parse_kind(query) == 1 else []) as server:
        relay = Relay(nursery, scope(server.nameserver), deadline=0.3, lenient_aaaa=lenient)
        assert (await relay.ask(make_query())).answer
        answer = await relay.ask(make_query(kind="AAAA", use_edns=0))
        assert answer.rcode() == (dns.rcode.NOERROR if lenient else dns.rcode.SERVFAIL)
        assert [code for code, _ in errors_of(answer)] == [22]
        assert (await relay.ask(make_query("other.test", "AAAA"))).rcode() == dns.rcode.SERVFAIL


async def test_rule_15_the_same_id_and_port_for_two_questions(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for kind in ("A", "AAAA"):
            relay.send(make_query(kind=kind, ident=7))
        answers = [dns.message.from_wire(answer) for answer in await relay.wait(2)]
        assert {answer.id for answer in answers} == {7}
        assert {answer.question[0].rdtype for answer in answers} == {dns.rdatatype.A, dns.rdatatype.AAAA}


async def test_nobody_is_asked_what_is_no_query(nursery: trio.Nursery) -> None:
    assert parse_query(b"") is None
    async with open_nameserver(silent) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for name in BAD_NAMES:
            await relay.ask_raw(TXT_HEAD + name + b"\0\1\0\1")
        assert not server.udp_queries
