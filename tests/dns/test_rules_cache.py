"""Rules 30 to 36 of forwarding DNS: the cache; and 48 to 51, where they are about what is in flight."""

from __future__ import annotations

from collections.abc import Callable

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio

from netstack.dns.cache import MAX_REPLY, Cache
from netstack.dns.message import Query, Question, parse_query, write_error
from netstack.dns.replies import parse_reply
from netstack.dns.routes import RoutingTable
from tests.dns.nameserver import address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, closed_port, errors_of, scope, silent, wait_until


def with_authority(query: bytes, *records: str, rcode: int = 0) -> bytes:
    answer = dns.message.from_wire(make_answer(query, rcode=rcode))
    for record in records:
        owner, ttl, class_, kind, data = record.split(maxsplit=4)
        answer.authority.append(dns.rrset.from_text(owner, int(ttl), class_, kind, data))
    return answer.to_wire()


def soa(ttl: int = 600, minimum: int = 60) -> str:
    return f"example.test. {ttl} IN SOA ns.example.test. root.example.test. 1 3600 600 86400 {minimum}"


def with_ttls(answer: bytes, *ttls: int) -> bytes:
    """An answer for an A, with records whose TTLs are these bits."""
    end = answer.index(b"\0\0\1\0\1", 12) + 5
    records = b"".join(
        b"\xc0\x0c\0\1\0\1" + ttl.to_bytes(4, "big") + b"\0\4\xc0\0\2" + bytes((number,))
        for number, ttl in enumerate(ttls)
    )
    return answer[:6] + len(ttls).to_bytes(2, "big") + b"\0\0\0\0" + answer[12:end] + records


async def test_rule_30_ttls_count_down_and_never_to_nothing(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        for ahead, expected in ((0, 60), (0.5, 60), (10, 50), (10.5, 50), (59, 1), (59.5, 1), (60.5, 60)):
            relay.ahead = ahead
            assert (await relay.ask(make_query())).answer[0].ttl in (expected, expected - 1 if expected > 1 else 1)
        assert len(server.udp_queries) == 2


async def test_rule_30_the_ttls_of_a_set_are_equal(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [with_ttls(make_answer(query), 300, 60, 900)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            wire = await relay.ask_raw(make_query())
            assert wire.count(b"\xc0\x0c\0\1\0\1\0\0\0\x3c") == 3


@pytest.mark.parametrize(("ttl", "delivered"), ((0x80000000, 0), (0xFFFFFFFF, 0), (0x7FFFFFFF, 0x7FFFFFFF)))
async def test_rule_30_strange_ttls(nursery: trio.Nursery, ttl: int, delivered: int) -> None:
    async with open_nameserver(lambda query: [with_ttls(make_answer(query), ttl)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask_raw(make_query())).endswith(delivered.to_bytes(4, "big") + b"\0\4\xc0\0\2\0")
        relay.ahead = 86401
        await relay.ask_raw(make_query())
        assert len(server.udp_queries) == 2  # a day at most


async def test_rule_31_a_ttl_of_0_is_for_now(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [with_ttls(make_answer(query), 0)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            assert (await relay.ask(make_query())).answer[0].ttl == 0
        assert len(server.udp_queries) == 2


async def test_rule_31_the_flags_of_an_opt_do_not_age(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        for relay.ahead in (0, 30):
            answer = await relay.ask(make_query(use_edns=0, want_dnssec=True))
            assert answer.ednsflags == dns.flags.DO
        assert len(server.udp_queries) == 1


@pytest.mark.parametrize(
    ("ttl", "minimum", "kept"), ((600, 60, 60), (60, 600, 60), (99999, 99999, 3600), (0, 60, 0), (60, 0, 0))
)
@pytest.mark.parametrize("rcode", (dns.rcode.NOERROR, dns.rcode.NXDOMAIN))
async def test_rule_32_a_no_is_kept_as_its_soa_says(
    nursery: trio.Nursery, ttl: int, minimum: int, kept: int, rcode: int
) -> None:
    async with open_nameserver(lambda query: [with_authority(query, soa(ttl, minimum), rcode=rcode)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for relay.ahead in (0, kept - 1, kept + 1):
            answer = await relay.ask(make_query())
            assert answer.rcode() == rcode
            assert answer.authority[0].ttl <= max(min(ttl, minimum), 1)
        assert len(server.udp_queries) == (2 if kept else 3)


async def test_rule_32_no_such_name_is_so_for_all_types_and_no_such_type_is_not(nursery: trio.Nursery) -> None:
    rcode = dns.rcode.NXDOMAIN
    async with open_nameserver(lambda query: [with_authority(query, soa(), rcode=rcode)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for kind in ("A", "AAAA", "MX"):
            assert (await relay.ask(make_query(kind=kind))).rcode() == dns.rcode.NXDOMAIN
        assert len(server.udp_queries) == 1
        rcode = dns.rcode.NOERROR
        for kind in ("A", "AAAA", "A"):
            assert (await relay.ask(make_query("other.test", kind))).rcode() == dns.rcode.NOERROR
        assert len(server.udp_queries) == 3


async def test_rule_32_an_alias_to_nowhere_says_nothing_about_other_types(nursery: trio.Nursery) -> None:
    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(with_authority(query, soa(), rcode=dns.rcode.NXDOMAIN))
        answer.answer.append(dns.rrset.from_text("www.example.test.", 60, "IN", "CNAME", "gone.example.test."))
        return [answer.to_wire()]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for kind in ("A", "A", "CNAME"):
            await relay.ask(make_query(kind=kind))
        assert len(server.udp_queries) == 2


async def test_rule_32_without_an_soa_a_no_is_not_kept(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=dns.rcode.NXDOMAIN)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            assert (await relay.ask(make_query())).rcode() == dns.rcode.NXDOMAIN
        assert len(server.udp_queries) == 2


@pytest.mark.parametrize("rcode", (dns.rcode.SERVFAIL, dns.rcode.REFUSED))
async def test_rule_33_failures_are_kept_for_a_moment_and_longer_each_time(nursery: trio.Nursery, rcode: int) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=rcode)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        asked = []
        for step in range(160):
            relay.ahead = step / 10
            assert (await relay.ask(make_query())).rcode() == rcode
            asked.append(len(server.udp_queries))
        assert 5 <= asked[-1] <= 6  # at 0, 1, 3, 7 and 12 s
        assert asked[9] == 1


async def test_rule_33_failures_are_forgotten_when_the_servers_change(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=2)]) as dead, open_nameserver() as alive:
        relay = Relay(nursery, scope(dead.nameserver))
        assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL
        relay.resolver.set_table(RoutingTable((scope(alive.nameserver),)))
        assert (await relay.ask(make_query())).answer


async def test_rule_33_failures_are_forgotten_when_other_servers_change(nursery: trio.Nursery) -> None:
    """With the VPN up the way to the old server may be another one."""
    async with open_nameserver(lambda query: [make_answer(query, rcode=2)]) as server, open_nameserver() as vpn:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL
        server.behaviour = lambda query: [address_of(query)]
        assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL
        other = scope(vpn.nameserver, key="vpn", domains=("corp.test",), default=False)
        relay.resolver.set_table(RoutingTable((scope(server.nameserver), other), version=1))
        assert (await relay.ask(make_query())).answer


async def test_rule_33_nobody_is_asked_more_than_three_times(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as server:
        relay = Relay(nursery, scope(server.nameserver))
        began = trio.current_time()
        answer = await relay.ask(make_query(use_edns=0))
        assert 4.0 < trio.current_time() - began < 5.0
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert errors_of(answer) == [(22, f"{server.nameserver}: timed out")]
        assert len(server.udp_queries) == 3
        cached = await relay.ask(make_query(use_edns=0))
        assert [code for code, _ in errors_of(cached)] == [22, 13]


@pytest.mark.parametrize("how", ("SERVFAIL", "silence"))
async def test_rule_34_stale_is_better_than_nothing(nursery: trio.Nursery, how: str) -> None:
    works = True

    def behave(query: bytes) -> list[bytes]:
        if works:
            return [address_of(query)]
        return [make_answer(query, rcode=2)] if how == "SERVFAIL" else []

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver), max_stale=86400)
        await relay.ask(make_query())
        works = False
        relay.ahead = 61
        began = trio.current_time()
        answer = await relay.ask(make_query(use_edns=0))
        assert trio.current_time() - began < 2.3
        assert answer.answer[0].ttl == 30
        assert errors_of(answer) == [(3, "")]
        asked = len(server.udp_queries)
        relay.ahead = 80
        assert (await relay.ask(make_query())).answer[0].ttl == 30
        assert len(server.udp_queries) == asked  # for 30 s nobody is asked
        works = True
        relay.ahead = 100
        assert (await relay.ask(make_query())).answer[0].ttl == 60
        works = False
        relay.ahead = 100 + 60 + 86401
        if how == "SERVFAIL":
            assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL


async def test_rule_34_a_fresh_no_beats_a_stale_yes(nursery: trio.Nursery) -> None:
    answers: list[Callable[[bytes], bytes]] = [
        address_of,
        lambda query: with_authority(query, soa(), rcode=dns.rcode.NXDOMAIN),
    ]
    async with open_nameserver(lambda query: [answers.pop(0)(query)]) as server:
        relay = Relay(nursery, scope(server.nameserver), max_stale=86400)
        await relay.ask(make_query())
        relay.ahead = 61
        assert (await relay.ask(make_query())).rcode() == dns.rcode.NXDOMAIN
        assert (await relay.ask(make_query())).rcode() == dns.rcode.NXDOMAIN


async def test_rule_34_stale_is_an_option(nursery: trio.Nursery) -> None:
    answers: list[Callable[[bytes], bytes]] = [address_of, lambda query: make_answer(query, rcode=2)]
    async with open_nameserver(lambda query: [answers.pop(0)(query)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        await relay.ask(make_query())
        relay.ahead = 61
        assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL


async def test_rule_35_what_one_scope_said_is_not_said_for_another(nursery: trio.Nursery) -> None:
    async with (
        open_nameserver(lambda query: [with_authority(query, soa(), rcode=dns.rcode.NXDOMAIN)]) as public,
        open_nameserver() as corporate,
    ):
        everybody = scope(public.nameserver)
        vpn = scope(corporate.nameserver, key="vpn", domains=("corp.test",), default=False)
        relay = Relay(nursery, everybody)
        assert (await relay.ask(make_query("git.corp.test"))).rcode() == dns.rcode.NXDOMAIN
        assert (await relay.ask(make_query("www.test"))).rcode() == dns.rcode.NXDOMAIN
        relay.resolver.set_table(RoutingTable((everybody, vpn), version=1))
        assert (await relay.ask(make_query("git.corp.test"))).answer
        await relay.ask(make_query("www.test"))
        assert len(public.udp_queries) == 2  # what is not about the VPN is still known
        # It comes back as another network: what it said before is gone.
        relay.resolver.set_table(RoutingTable((everybody,), version=2))
        relay.resolver.set_table(RoutingTable((everybody, vpn), version=3))
        await relay.ask(make_query("git.corp.test"))
        assert len(corporate.udp_queries) == 2


async def test_rule_48_a_server_that_asks_us_is_not_asked_any_more(nursery: trio.Nursery) -> None:
    """The host's resolver forwards to the gateway."""
    relay = Relay(nursery)
    looping = True

    def behave(query: bytes) -> list[bytes]:
        if looping:
            relay.send(query, link="another")
            return []
        return [address_of(query)]

    async with open_nameserver(behave) as around, open_nameserver() as good:
        relay.resolver.set_table(RoutingTable((scope(around.nameserver, good.nameserver),)))
        await wait_until(lambda: relay.upstream.health.of(around.nameserver).looping)
        (probe,) = around.probes
        assert dns.message.from_wire(probe).question[0].name.to_text().endswith(".test.")
        assert (await relay.ask(make_query())).answer
        assert not around.udp_queries
        assert any("dns_loop" in warning for warning in relay.events.warnings)
        # Alone, it leaves nobody to ask.
        relay.resolver.upstream.health.of(good.nameserver).looping = True
        answer = await relay.ask(make_query("else.test", use_edns=0))
        assert (answer.rcode(), [code for code, _ in errors_of(answer)]) == (dns.rcode.SERVFAIL, [23])
        looping = False
        relay.resolver.set_table(RoutingTable((scope(around.nameserver),), version=2))
        assert (await relay.ask(make_query("third.test"))).answer


async def test_rule_49_without_any_server_it_is_servfail_at_once(nursery: trio.Nursery) -> None:
    relay = Relay(nursery)
    relay.send(make_query(use_edns=0))
    answer = dns.message.from_wire(relay.answers[0][1])
    assert answer.rcode() == dns.rcode.SERVFAIL
    assert errors_of(answer) == [(23, "no nameserver for this name")]


@pytest.mark.parametrize("tcp", (False, True))
async def test_rule_50_queries_to_servers_that_are_gone_are_asked_anew(nursery: trio.Nursery, tcp: bool) -> None:
    async with open_nameserver(silent) as gone, open_nameserver() as new:
        gone.tcp_behaviour = lambda query: None
        relay = Relay(nursery, scope(gone.nameserver._replace(transport="tcp" if tcp else "udp")))
        for number in range(3):
            relay.send(make_query("a.test" if number else "b.test", ident=number))
        await wait_until(lambda: len(gone.udp_queries) + len(gone.tcp_queries) == 2)
        began = trio.current_time()
        relay.resolver.set_table(RoutingTable((scope(new.nameserver),), version=1))
        answers = [dns.message.from_wire(answer) for answer in await relay.wait(3)]
        assert all(answer.answer for answer in answers)
        assert trio.current_time() - began < 0.5
        assert len(new.udp_queries) == 2
        assert relay.resolver.describe()["in_flight"] == 0


class Names:
    """A local name."""

    def answer(self, query: bytes, question: Question) -> bytes | None:
        return write_error(query, 0) if question.labels == (b"mine", b"test") else None


async def test_rule_51_local_names_go_first(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query("mine.test"))).answer  # and is in the cache now
        relay.resolver.local = (Names(),)
        assert not (await relay.ask(make_query("MINE.test"))).answer
        assert len(server.udp_queries) == 1


def entry(name: str, size: int = 0) -> tuple[Query, bytes]:
    query = parse_query(make_query(name))
    assert isinstance(query, Query)
    texts = " ".join(["x" * 200] * (size // 200))
    return query, make_answer(
        query.wire, f"{name}. 60 IN A 192.0.2.1", *([f"{name}. 60 IN TXT {texts}"] if texts else [])
    )


def test_the_cache_is_bounded_in_number_and_in_bytes() -> None:
    for cache, size, expected in ((Cache(entries=100), 0, 100), (Cache(size=100_000), 2000, 33)):
        for number in range(200):
            query, wire = entry(f"n{number}.test", size)
            reply = parse_reply(wire, query.question)
            assert reply is not None
            cache.keep(("host",), query, reply, 0.0)
        assert len(cache) == expected
        assert cache.find(("host",), entry("n199.test")[0], 1.0) is not None
        assert cache.find(("host",), entry("n1.test")[0], 1.0) is None
        assert cache.flush() == expected
        assert cache.bytes == 0


def test_a_long_reply_is_not_kept() -> None:
    query, wire = entry("big.test", MAX_REPLY + 2000)
    reply = parse_reply(wire, query.question)
    assert reply is not None
    cache = Cache()
    cache.keep(("host",), query, reply, 0.0)
    assert len(cache) == 0


def test_flushing_a_name_or_a_scope() -> None:
    cache = Cache()
    for keys in (("a",), ("b",), ("a", "b")):
        for name in ("x.test", "y.test"):
            query, wire = entry(name)
            reply = parse_reply(wire, query.question)
            assert reply is not None
            cache.keep(keys, query, reply, 0.0)
    assert cache.flush(name=b"\1x\4test\0") == 3
    assert cache.flush(scopes=frozenset(("a",))) == 2
    assert len(cache) == 1


async def test_a_bug_in_the_upstream_is_a_servfail_and_ends_nothing(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise IndexError("a bug")

    async with closed_port() as nowhere:
        relay = Relay(nursery, scope(nowhere))
        monkeypatch.setattr("netstack.dns.race.Race._step", broken)
        for number in range(2):
            answer = await relay.ask(make_query(f"n{number}.test", use_edns=0))
            assert (answer.rcode(), errors_of(answer)) == (dns.rcode.SERVFAIL, [(0, "internal error")])
        assert len(relay.events.warnings) == 2
        assert relay.server.queries.total == 0


async def test_the_log_has_the_last_queries(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        told: list[object] = []
        relay.resolver.queries.on_query = told.append
        for name in ("a.test", "A.test", "b.test"):
            await relay.ask(make_query(name))
        log = relay.resolver.log()
        assert [(entry[1], entry[2], entry[3], entry[4], entry[5], entry[7]) for entry in log] == [
            ("192.168.5.15", "b.test", 1, "host", 0, False),
            ("192.168.5.15", "a.test", 1, "host", 0, True),
            ("192.168.5.15", "a.test", 1, "host", 0, False),
        ]
        assert len(told) == 3
        for number in range(1100):
            relay.send(make_query("a.test", ident=number))
        assert len(relay.resolver.log()) == 1000


async def test_rule_51_what_was_just_answered_is_looked_up_again_when_local_names_change(nursery: trio.Nursery) -> None:
    """The same bytes again are answered without being read, while nothing has changed."""
    version = 0
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        relay.resolver.local_version = lambda: version
        query = make_query("mine.test")
        for _ in range(3):
            assert (await relay.ask(query)).answer
        assert relay.resolver.remembered(query, "") is not None
        assert (await relay.ask(make_query("mine.test", ident=9))).id == 9
        relay.resolver.local = (Names(),)
        version += 1
        assert not (await relay.ask(query)).answer
        assert relay.resolver.remembered(query, "") is None


async def test_what_was_just_answered_is_forgotten_with_the_cache(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server, open_nameserver() as other:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            await relay.ask(make_query())
        assert relay.resolver.flush() == 1
        for _ in range(2):
            await relay.ask(make_query())
        assert len(server.udp_queries) == 2
        assert len(relay.resolver.log()) == 4
        relay.resolver.set_table(RoutingTable((scope(other.nameserver),)))
        await relay.ask(make_query())
        assert len(other.udp_queries) == 1
