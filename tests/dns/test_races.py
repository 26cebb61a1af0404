"""Several servers, several scopes: who is asked when, whose word counts, and what guests are told when nobody helps."""

from __future__ import annotations

import dns.message
import dns.rcode
import pytest
import trio

from netstack.dns.routes import RoutingTable, Scope, Server
from tests.dns.nameserver import Behaviour, address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, closed_port, errors_of, scope, silent, wait_until
from tests.dns.test_rules_cache import soa, with_authority


def negative(rcode: int) -> Behaviour:
    return lambda query: [with_authority(query, soa(), rcode=rcode)]


def both(*servers: Server) -> tuple[Scope, ...]:
    """A scope for each, which match a name equally well."""
    return tuple(scope(server, key=f"link{n}", domains=("example.test",)) for n, server in enumerate(servers))


@pytest.mark.parametrize("no", (dns.rcode.NXDOMAIN, dns.rcode.NOERROR, dns.rcode.SERVFAIL, dns.rcode.REFUSED))
@pytest.mark.parametrize("order", (1, -1))
async def test_of_two_scopes_the_one_that_has_it_wins(nursery: trio.Nursery, no: int, order: int) -> None:
    async with open_nameserver(negative(no)) as hasnt, open_nameserver() as has:
        relay = Relay(nursery, *both(hasnt.nameserver, has.nameserver)[::order])
        assert (await relay.ask(make_query())).answer
        assert len(hasnt.udp_queries) == len(has.udp_queries) == 1


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    ((3, 0, 0), (0, 3, 0), (3, 5, 3), (2, 3, 3), (5, 2, 5)),
)
async def test_of_two_noes_the_milder_counts(nursery: trio.Nursery, one: int, other: int, expected: int) -> None:
    async with open_nameserver(negative(one)) as first, open_nameserver(negative(other)) as second:
        relay = Relay(nursery, *both(first.nameserver, second.nameserver))
        rcode = (await relay.ask(make_query())).rcode()
        assert rcode == expected or {one, other} == {2, 5}


async def test_a_dead_scope_does_not_hold_up_a_no_for_long(nursery: trio.Nursery) -> None:
    async with open_nameserver(negative(3)) as first, open_nameserver(silent) as dead:
        relay = Relay(nursery, *both(first.nameserver, dead.nameserver))
        began = trio.current_time()
        assert (await relay.ask(make_query())).rcode() == dns.rcode.NXDOMAIN
        assert trio.current_time() - began < 2.5


async def test_a_name_of_one_scope_is_not_heard_of_by_others(nursery: trio.Nursery) -> None:
    async with open_nameserver() as public, open_nameserver() as corporate:
        relay = Relay(
            nursery,
            scope(public.nameserver),
            scope(corporate.nameserver, key="vpn", domains=("corp.example",), default=False),
        )
        for name in ("git.corp.example", "CORP.example", "a.b.corp.EXAMPLE"):
            await relay.ask(make_query(name, "MX"))
        for name in ("notcorp.example", "example", "corp.example.org"):
            await relay.ask(make_query(name))
        assert len(corporate.udp_queries) == len(public.udp_queries) == 3


async def test_a_slow_server_is_overtaken(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as slow, open_nameserver() as quick:
        relay = Relay(nursery, scope(slow.nameserver, quick.nameserver))
        began = trio.current_time()
        assert (await relay.ask(make_query())).answer
        assert 0.2 < trio.current_time() - began < 0.6


async def test_a_slow_answer_still_counts(nursery: trio.Nursery) -> None:
    """The first server answers after the second was asked too, which is slower still."""
    async with open_nameserver(silent) as first, open_nameserver(silent) as second:
        relay = Relay(nursery, scope(first.nameserver, second.nameserver))
        relay.send(make_query())
        await wait_until(lambda: bool(second.udp_queries))
        await first.answer_late(address_of(first.udp_queries[0]))
        assert dns.message.from_wire((await relay.wait())[0]).answer


@pytest.mark.parametrize("rcode", (dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP, dns.rcode.FORMERR))
async def test_a_server_that_cannot_help_costs_no_time(nursery: trio.Nursery, rcode: int) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=rcode)]) as bad, open_nameserver() as good:
        relay = Relay(nursery, scope(bad.nameserver, good.nameserver))
        began = trio.current_time()
        assert (await relay.ask(make_query())).answer
        assert trio.current_time() - began < 0.2


async def test_an_answer_that_cannot_be_read_is_passed_over(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [address_of(query)[:-3]]) as bad, open_nameserver() as good:
        assert (await Relay(nursery, scope(bad.nameserver, good.nameserver)).ask(make_query())).answer
        answer = await Relay(nursery, scope(bad.nameserver)).ask(make_query(use_edns=0))
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert errors_of(answer) == [(24, f"{bad.nameserver}: an answer that cannot be read")]


async def test_when_all_are_gone_the_guest_is_told_at_once(nursery: trio.Nursery) -> None:
    async with closed_port() as one, closed_port() as other:
        relay = Relay(nursery, scope(one, other))
        began = trio.current_time()
        answer = await relay.ask(make_query(use_edns=0))
        assert trio.current_time() - began < 0.2
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert errors_of(answer) == [(23, f"{server}: Connection refused") for server in (one, other)]


async def test_what_a_server_said_about_its_failure_is_passed_on(nursery: trio.Nursery) -> None:
    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(make_answer(query, rcode=2))
        answer.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode.SIGNATURE_EXPIRED, "signature expired")])
        return [answer.to_wire()]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert errors_of(await relay.ask(make_query(use_edns=0))) == [(7, "signature expired")]
        assert (await relay.ask(make_query())).edns == -1


async def test_a_guest_that_hangs_up_does_not_take_the_answer_from_others(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as server:
        relay = Relay(nursery, scope(server.nameserver))
        stream = relay.connect()
        query = make_query()
        await stream.send_all(len(query).to_bytes(2, "big") + query)
        await wait_until(lambda: bool(server.udp_queries or server.tcp_queries))
        relay.send(query)
        await stream.aclose()
        await trio.sleep(0.05)
        server.behaviour = lambda query: [address_of(query)]
        assert dns.message.from_wire((await relay.wait())[0]).answer
        assert relay.server.queries.total == 0


async def test_many_names_at_once_do_not_grow_without_bound(nursery: trio.Nursery) -> None:
    """10,000 names from many guests: what is over the bound is told so, and nothing stays behind."""
    async with open_nameserver(silent) as server:
        relay = Relay(nursery, scope(server.nameserver), deadline=1.0)
        relay.server.queries.of_all = 1024
        for number in range(10_000):
            relay.send(make_query(f"n{number}.test"), link=number % 50)
        assert relay.server.queries.total == 1024
        assert relay.upstream.datagrams.open <= 1024
        await relay.wait(10_000)
        assert {answer[3] & 15 for _, answer in relay.answers} == {2}
        assert relay.upstream.datagrams.open == 0
        assert relay.resolver.cache.bytes < 8 << 20


async def test_a_table_without_the_servers_of_connections_closes_them(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver._replace(transport="tcp")))
        assert (await relay.ask(make_query())).answer
        assert relay.upstream.streams.open == 1
        relay.resolver.set_table(RoutingTable())
        assert relay.upstream.streams.open == 0
