"""Row 38: DNS64. What RFC 6147 and RFC 6052 say, with a nameserver on loopback behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from netstack.dns.dns64 import Dns64
from netstack.dns.prefixes import parse_prefix
from tests.dns.nameserver import TestNameserver, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, scope

if TYPE_CHECKING:
    import trio

PREFIX = "64:ff9b::/96"
ZONE = {
    ("v4.test.", "A"): ("v4.test. 300 IN A 203.0.113.7", "v4.test. 300 IN A 203.0.113.8"),
    ("both.test.", "A"): ("both.test. 300 IN A 203.0.113.7",),
    ("both.test.", "AAAA"): ("both.test. 300 IN AAAA 2001:db8::7",),
    ("alias.test.", "A"): ("alias.test. 300 IN CNAME v4.test.", "v4.test. 200 IN A 203.0.113.7"),
    ("alias.test.", "AAAA"): ("alias.test. 300 IN CNAME v4.test.",),
    ("mapped.test.", "A"): ("mapped.test. 300 IN A 203.0.113.7",),
    ("mapped.test.", "AAAA"): ("mapped.test. 300 IN AAAA ::ffff:203.0.113.7",),
    ("private.test.", "A"): ("private.test. 300 IN A 192.168.1.1",),
    ("7.113.0.203.in-addr.arpa.", "PTR"): ("7.113.0.203.in-addr.arpa. 300 IN PTR v4.test.",),
}
NAMES = {name for name, _ in ZONE} | {"empty.test."}


def behave(query: bytes) -> list[bytes]:
    question = dns.message.from_wire(query).question[0]
    name, kind = question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype)
    records = ZONE.get((name, kind))
    if records:
        return [make_answer(query, *records)]
    answer = dns.message.make_response(dns.message.from_wire(query), recursion_available=True)
    answer.set_rcode(dns.rcode.NOERROR if name in NAMES else dns.rcode.NXDOMAIN)
    answer.authority.append(dns.rrset.from_text("test.", 100, "IN", "SOA", "ns.test. root.test. 1 2 3 4 120"))
    return [answer.to_wire()]


@asynccontextmanager
async def opened(nursery: trio.Nursery, prefix: str = PREFIX) -> AsyncIterator[tuple[Relay, TestNameserver]]:
    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        relay.resolver.dns64 = Dns64(parse_prefix(prefix))
        yield relay, server


def addresses(answer: dns.message.Message) -> list[str]:
    return [record.to_text() for rrset in answer.answer if rrset.rdtype == dns.rdatatype.AAAA for record in rrset]


async def test_row_38_a_name_with_a_records_only_gets_aaaa_records(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, server):
        answer = await relay.ask(make_query("V4.test", "AAAA", ident=77, use_edns=0))
        assert (answer.id, answer.rcode(), answer.edns) == (77, 0, 0)
        assert answer.question[0].name.to_text() == "V4.test."
        assert addresses(answer) == ["64:ff9b::cb00:7107", "64:ff9b::cb00:7108"]
        assert answer.answer[0].ttl == 100, "the smaller one: the SOA's (5.1.7)"
        assert not answer.flags & dns.flags.AD
        # Again: both parts are in the cache.
        asked = len(server.udp_queries)
        assert addresses(await relay.ask(make_query("v4.test", "AAAA"))) == addresses(answer)
        assert len(server.udp_queries) == asked
        # A itself is as it was.
        assert len((await relay.ask(make_query("v4.test"))).answer[0]) == 2


async def test_row_38_what_has_aaaa_records_keeps_them(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, server):
        assert addresses(await relay.ask(make_query("both.test", "AAAA"))) == ["2001:db8::7"]
        assert len(server.udp_queries) == 1


async def test_row_38_an_alias_leads_to_what_is_made(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, _):
        answer = await relay.ask(make_query("alias.test", "AAAA"))
        assert [rrset.to_text() for rrset in answer.answer] == [
            "alias.test. 300 IN CNAME v4.test.",
            "v4.test. 200 IN AAAA 64:ff9b::cb00:7107",
        ]


async def test_row_38_mapped_addresses_do_not_count(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, _):
        assert addresses(await relay.ask(make_query("mapped.test", "AAAA"))) == ["64:ff9b::cb00:7107"]


async def test_row_38_no_such_name_and_no_address_at_all_stay_what_they_are(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, _):
        answer = await relay.ask(make_query("nobody.test", "AAAA"))
        assert (answer.rcode(), len(answer.authority)) == (dns.rcode.NXDOMAIN, 1)
        answer = await relay.ask(make_query("empty.test", "AAAA"))
        assert (answer.rcode(), answer.answer, len(answer.authority)) == (0, [], 1)


async def test_row_38_who_checks_signatures_gets_what_is_there(nursery: trio.Nursery) -> None:
    query = dns.message.make_query("v4.test", "AAAA", want_dnssec=True)
    query.flags |= dns.flags.CD
    async with opened(nursery) as (relay, _):
        assert addresses(await relay.ask(query.to_wire())) == []


async def test_row_38_private_addresses_are_not_made_with_the_well_known_prefix(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, _):
        assert addresses(await relay.ask(make_query("private.test", "AAAA"))) == []
        relay.resolver.dns64 = Dns64(parse_prefix("2001:db8:64::/96"))
        assert addresses(await relay.ask(make_query("private.test", "AAAA"))) == ["2001:db8:64::c0a8:101"]


async def test_row_38_the_name_of_an_address_that_was_made_is_found(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, _):
        name = IPv6Address("64:ff9b::203.0.113.7").reverse_pointer
        answer = await relay.ask(make_query(name, "PTR"))
        kinds = [(rrset.rdtype, [record.to_text() for record in rrset]) for rrset in answer.answer]
        assert kinds == [
            (dns.rdatatype.CNAME, ["7.113.0.203.in-addr.arpa."]),
            (dns.rdatatype.PTR, ["v4.test."]),
        ]
        answer = await relay.ask(make_query(IPv6Address("2001:db8::1").reverse_pointer, "PTR"))
        assert answer.rcode() == dns.rcode.NXDOMAIN


async def test_row_38_by_tcp_and_for_many_at_once_it_is_the_same(nursery: trio.Nursery) -> None:
    async with opened(nursery) as (relay, server):
        for number in range(20):
            relay.send(make_query("v4.test", "AAAA", ident=number))
        answers = await relay.wait(20)
        assert {answer[2:] for answer in answers} == {answers[0][2:]}
        assert len(server.udp_queries) + len(server.tcp_queries) == 2


@pytest.mark.parametrize(
    ("prefix", "address"),
    (
        # RFC 6052 2.4, to the letter.
        ("2001:db8::/32", "2001:db8:c000:221::"),
        ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
        ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
        ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
        ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
        ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
    ),
)
def test_row_38_addresses_are_made_and_taken_apart_as_rfc_6052_says(prefix: str, address: str) -> None:
    dns64 = Dns64(parse_prefix(prefix))
    packed = IPv4Address("192.0.2.33").packed
    assert dns64.embed(packed) == IPv6Address(address).packed
    from netstack.dns.message import parse_query

    query = parse_query(make_query(IPv6Address(address).reverse_pointer, "PTR"))
    assert query is not None
    assert not isinstance(query, int)
    assert dns64.wants(query)
    assert dns64._inner_of(query.question) == packed


@pytest.mark.parametrize("text", ("64:ff9b::/95", "64:ff9b::1/96", "10.0.0.0/8", "x", "2001:db8:0:0:100::/96"))
def test_what_is_no_prefix_of_a_nat64_is_refused_with_words(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_prefix(text)
    assert parse_prefix("64:ff9b::/96") == IPv6Network("64:ff9b::/96")
