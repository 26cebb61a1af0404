"""Row 36: private addresses from the outside are refused where that is wanted, and pass where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dns.message
import dns.rcode
import pytest

from netstack.dns.message import parse_question
from netstack.dns.rebind import find_private
from netstack.dns.routes import Scope
from tests.dns.nameserver import make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, errors_of, scope

if TYPE_CHECKING:
    import trio

PRIVATE = (
    "www.test. 60 IN A 192.168.1.1",
    "www.test. 60 IN A 127.0.0.1",
    "www.test. 60 IN A 0.0.0.0",
    "www.test. 60 IN A 10.1.2.3",
    "www.test. 60 IN A 172.31.255.255",
    "www.test. 60 IN A 169.254.169.254",
    "www.test. 60 IN A 100.100.100.100",
    "www.test. 60 IN AAAA ::1",
    "www.test. 60 IN AAAA ::",
    "www.test. 60 IN AAAA fd00::1",
    "www.test. 60 IN AAAA fe80::1",
    "www.test. 60 IN AAAA ::ffff:192.168.1.1",
    "www.test. 60 IN AAAA 64:ff9b::10.0.0.1",
    "www.test. 60 IN HTTPS 1 . ipv4hint=203.0.113.1,192.168.1.1",
    "www.test. 60 IN SVCB 1 svc.test. alpn=h2 ipv6hint=fd00::1",
)
PUBLIC = (
    "www.test. 60 IN A 203.0.113.1",
    "www.test. 60 IN A 172.32.0.1",
    "www.test. 60 IN AAAA 2001:db8::1",
    "www.test. 60 IN AAAA ::ffff:203.0.113.1",
    "www.test. 60 IN HTTPS 1 . alpn=h2,h3 ipv4hint=203.0.113.1 ipv6hint=2001:db8::1",
    "www.test. 60 IN TXT 192.168.1.1",
)


def kind_of(record: str) -> str:
    return record.split()[3]


@pytest.mark.parametrize("record", PRIVATE)
async def test_row_36_a_private_address_is_refused_and_named(nursery: trio.Nursery, record: str) -> None:
    async with open_nameserver(lambda query: [make_answer(query, record)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        query = make_query("www.test", kind_of(record), use_edns=0)
        relay.resolver.flights.rebind.configure(True, ())
        for _ in range(2):  # the second time from the cache of failures
            answer = await relay.ask(query)
            assert (answer.rcode(), answer.answer) == (dns.rcode.REFUSED, [])
            ((code, words), *_) = errors_of(answer)
            assert code == 15
            assert "private address" in words
        assert len(server.udp_queries) == 1
        assert relay.resolver.counters["dns_rebind_refused"] == 1


@pytest.mark.parametrize("record", (*PUBLIC, *PRIVATE))
async def test_row_36_public_addresses_pass_and_all_do_while_it_is_off(nursery: trio.Nursery, record: str) -> None:
    async with open_nameserver(lambda query: [make_answer(query, record)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        relay.resolver.flights.rebind.configure(record in PUBLIC, ())
        assert (await relay.ask(make_query("www.test", kind_of(record)))).answer


async def test_row_36_one_private_address_behind_an_alias_among_public_ones_is_enough(nursery: trio.Nursery) -> None:
    records = (
        "www.test. 60 IN CNAME a.test.",
        "a.test. 60 IN A 203.0.113.1",
        "a.test. 60 IN A 192.168.1.1",
    )
    async with open_nameserver(lambda query: [make_answer(query, *records)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        relay.resolver.flights.rebind.configure(True, ())
        assert (await relay.ask(make_query("www.test"))).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize(
    ("name", "passes"),
    (("fritz.box", True), ("a.FRITZ.box", True), ("notfritz.box", False), ("box", False), ("www.test", False)),
)
async def test_row_36_domains_that_are_allowed_pass(nursery: trio.Nursery, name: str, passes: bool) -> None:
    async with open_nameserver(lambda query: [make_answer(query, f"{name}. 60 IN A 192.168.178.1")]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        relay.resolver.flights.rebind.configure(True, ("fritz.box",))
        assert bool((await relay.ask(make_query(name))).answer) is passes


async def test_row_36_a_domain_that_a_scope_claims_has_private_addresses_and_all_names_do_not(
    nursery: trio.Nursery,
) -> None:
    """A VPN that takes all names ("~.") is not the owner of each."""

    def behave(query: bytes) -> list[bytes]:
        name = dns.message.from_wire(query).question[0].name
        return [make_answer(query, f"{name} 60 IN A 10.0.0.1")]

    async with open_nameserver(behave) as server:
        vpn = Scope("vpn", (server.nameserver,), ("corp.test", "."))
        relay = Relay(nursery, vpn)
        relay.resolver.flights.rebind.configure(True, ())
        assert (await relay.ask(make_query("git.corp.test"))).answer
        assert (await relay.ask(make_query("git.test"))).rcode() == dns.rcode.REFUSED


def test_hints_that_are_cut_short_do_no_harm() -> None:
    query = make_query("www.test", "HTTPS")
    whole = make_answer(query, "www.test. 60 IN HTTPS 1 . alpn=h2 ipv4hint=203.0.113.1,192.168.1.1")
    question = parse_question(query)
    assert question is not None
    assert find_private(whole, question, 1) is not None
    for end in range(question.end, len(whole)):
        find_private(whole[:end], question, 1)
    for at in range(question.end, len(whole)):
        for value in (0, 1, 63, 64, 255):
            find_private(whole[:at] + bytes((value,)) + whole[at + 1 :], question, 1)
