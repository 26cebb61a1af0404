"""Rules 16 to 29 of forwarding DNS: sizes, EDNS, TCP, and what guards against forged answers."""

from __future__ import annotations

import random

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import pytest
import trio
import trio.testing

from netstack.dns import upstream_tcp
from netstack.dns.message import MAX_UDP, with_id
from tests.dns.nameserver import address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, closed_port, errors_of, framed, receive, scope, silent, wait_until

FORTY = [f"www.example.test. 60 IN A 10.0.0.{n}" for n in range(40)]
OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"


async def test_rule_16_512_bytes_without_edns(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, *FORTY)]) as server:
        answer = await Relay(nursery, scope(server.nameserver)).ask_raw(make_query())
        assert len(answer) <= 512
        message = dns.message.from_wire(answer)
        assert message.flags & dns.flags.TC
        assert message.question[0].name.to_text() == "www.example.test."
        assert len(message.answer[0]) == (512 - len(make_query())) // 16


async def test_rule_16_additional_records_may_be_left_out_without_a_word(nursery: trio.Nursery) -> None:
    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(make_answer(query, "www.example.test. 60 IN MX 1 mx.example.test."))
        answer.additional.append(
            dns.rrset.from_text("mx.example.test.", 60, "IN", "A", *(f"10.0.0.{n}" for n in range(40)))
        )
        return [answer.to_wire(max_size=4096)]

    async with open_nameserver(behave) as server:
        answer = await Relay(nursery, scope(server.nameserver)).ask(make_query(kind="MX"))
        assert not answer.flags & dns.flags.TC
        assert len(answer.answer) == 1


@pytest.mark.parametrize(
    ("size", "limit"),
    ((0, 512), (1, 512), (511, 512), (512, 512), (600, 600), (1232, 1232), (4096, MAX_UDP), (65535, MAX_UDP)),
)
async def test_rule_17_the_size_is_that_of_the_opt(nursery: trio.Nursery, size: int, limit: int) -> None:
    records = [f"www.example.test. 60 IN A 10.0.{n // 250}.{n % 250}" for n in range(300)]
    async with open_nameserver(lambda query: [make_answer(query, *records)]) as server:
        answer = await Relay(nursery, scope(server.nameserver)).ask_raw(make_query(use_edns=0, payload=size))
        assert limit - 16 < len(answer) <= limit
        assert dns.message.from_wire(answer).flags & dns.flags.TC


@pytest.mark.parametrize("upstream_edns", (False, True))
@pytest.mark.parametrize("edns", (False, True))
async def test_rule_18_an_opt_for_an_opt(nursery: trio.Nursery, edns: bool, upstream_edns: bool) -> None:
    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(address_of(query))
        answer.use_edns(
            0 if upstream_edns else False, payload=4096, options=[dns.edns.GenericOption("10", b"12345678")]
        )
        return [answer.to_wire()]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            wire = await relay.ask_raw(make_query(use_edns=0, payload=4000) if edns else make_query())
            answer = dns.message.from_wire(wire)
            assert answer.answer
            assert int.from_bytes(wire[10:12], "big") == edns
            assert answer.edns == (0 if edns else -1)
            if edns:
                assert (answer.payload, answer.options) == (MAX_UDP, ())


async def test_rule_19_a_later_edns_is_badvers(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        for version in (1, 255):
            query = make_query(use_edns=0)
            query = query[:-5] + bytes((version,)) + query[-4:]  # version of the OPT, the last 11 bytes
            answer = dns.message.from_wire(await Relay(nursery, scope(server.nameserver)).ask_raw(query))
            assert (answer.rcode(), answer.edns, answer.answer) == (dns.rcode.BADVERS, 0, [])
        assert not server.udp_queries


async def test_rule_20_unknown_options_are_ignored_and_go_no_further(nursery: trio.Nursery) -> None:
    options = [
        dns.edns.GenericOption("65001", b"?"),
        dns.edns.GenericOption("10", b"12345678"),
        dns.edns.ECSOption("192.0.2.0", 24),
    ]
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query(use_edns=0, options=options))).answer
        assert dns.message.from_wire(server.udp_queries[0]).options == ()


async def test_rule_20_two_opts_are_formerr(nursery: trio.Nursery) -> None:
    query = make_query()
    answer = await Relay(nursery).ask_raw(query[:10] + b"\0\2" + query[12:] + OPT + OPT)
    assert answer[3] & 15 == dns.rcode.FORMERR


async def test_rule_20_an_opt_need_not_be_last(nursery: trio.Nursery) -> None:
    query = make_query()
    extra = b"\0\0\1\0\1\0\0\0\0\0\4\x0a\0\0\1"
    async with open_nameserver() as server:
        answer = await Relay(nursery, scope(server.nameserver)).ask(query[:10] + b"\0\2" + query[12:] + OPT + extra)
        assert answer.answer
        assert answer.edns == 0


@pytest.mark.parametrize("where", ("first", "last"))
async def test_rule_21_an_opt_goes_one_hop(nursery: trio.Nursery, where: str) -> None:
    """Theirs is taken out wherever it stands, and the records beside it stay."""
    glue = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\7"

    def behave(query: bytes) -> list[bytes]:
        plain = make_answer(query[:10] + b"\0\0" + query[12:-11], "www.example.test. 60 IN A 192.0.2.1")
        return [plain[:10] + b"\0\2" + plain[12:] + (OPT + glue if where == "first" else glue + OPT)]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for edns in (False, True):
            answer = await relay.ask(make_query(use_edns=0) if edns else make_query())
            assert answer.answer[0][0].to_text() == "192.0.2.1"
            assert answer.additional[0][0].to_text() == "192.0.2.7"
            assert answer.edns == (0 if edns else -1)


@pytest.mark.parametrize("how", ("FORMERR", "NOTIMP", "bare FORMERR", "BADVERS", "silence"))
async def test_rule_21_a_server_that_cannot_read_an_opt_is_asked_without(nursery: trio.Nursery, how: str) -> None:
    def behave(query: bytes) -> list[bytes]:
        if dns.message.from_wire(query).edns < 0:
            return [address_of(query)]
        if how == "silence":
            return []
        if how == "bare FORMERR":
            return [query[:2] + bytes.fromhex("81810000000000000000")]
        if how == "BADVERS":
            answer = dns.message.from_wire(make_answer(query))
            answer.use_edns(0)
            answer.set_rcode(dns.rcode.BADVERS)
            return [answer.to_wire()]
        plain = dns.message.from_wire(query)
        plain.use_edns(False)
        return [make_answer(plain.to_wire(), rcode=dns.rcode.from_text(how))]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query())).answer
        asked = len(server.udp_queries)
        assert asked == 2
        assert (await relay.ask(make_query("another.test"))).answer
        assert len(server.udp_queries) == asked + 1  # and that is remembered


async def test_rule_21_a_query_that_is_formerr_either_way_says_so(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=dns.rcode.FORMERR)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query())).rcode() == dns.rcode.FORMERR
        assert relay.upstream.health.of(server.nameserver).plain_until == 0


async def test_rule_22_pipelined_queries_are_answered_out_of_order(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        stream = relay.connect()
        data = framed(*(make_query(f"n{n}.test", ident=n) for n in range(10)))
        chance = random.Random(22)
        while data:
            cut = chance.randrange(1, 40)
            await stream.send_all(data[:cut])
            data = data[cut:]
        await stream.send_eof()
        answers = [dns.message.from_wire(answer) for answer in await receive(stream, 10)]
        assert {answer.id for answer in answers} == set(range(10))
        assert all(answer.answer for answer in answers)
        assert await stream.receive_some() == b""
        assert len(server.tcp_queries) == 10


async def test_rule_23_a_truncated_answer_is_completed_by_tcp(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, *FORTY[:2], flags=dns.flags.TC)]) as server:
        server.tcp_behaviour = lambda query: [make_answer(query, *FORTY)]
        relay = Relay(nursery, scope(server.nameserver))
        answer = await relay.ask(make_query(use_edns=0, payload=1232))
        assert not answer.flags & dns.flags.TC
        assert len(answer.answer[0]) == 40
        # A client without TCP gets what fits.
        answer = await relay.ask(make_query())
        assert answer.flags & dns.flags.TC
        assert len(answer.answer[0]) == 29
        assert (len(server.udp_queries), len(server.tcp_queries)) == (1, 1)


async def test_rule_23_where_tcp_is_dead_the_truncated_answer_is_the_answer(nursery: trio.Nursery) -> None:
    behave = lambda query: [make_answer(query, *FORTY[:2], flags=dns.flags.TC)]  # noqa: E731
    async with open_nameserver(behave, tcp=False) as server:
        relay = Relay(nursery, scope(server.nameserver))
        answer = await relay.ask(make_query(use_edns=0, payload=1232))
        assert answer.flags & dns.flags.TC
        assert len(answer.answer[0]) == 2
        await relay.ask(make_query())
        assert len(server.udp_queries) == 2  # it is no answer to keep


async def test_rule_24_by_tcp_on_one_connection_with_ids_of_our_own(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        stream = relay.connect()
        for number in range(20):
            await stream.send_all(framed(make_query(f"n{number}.test", ident=7)))
        answers = await receive(stream, 20)
        assert {answer[:2] for answer in answers} == {b"\0\7"}
        assert len({query[:2] for query in server.tcp_queries}) == 20
        assert server.connections == 1
        assert not server.udp_queries


async def test_rule_24_a_used_connection_that_ends_is_made_anew(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        stream = relay.connect()
        await stream.send_all(framed(make_query("first.test")))
        await receive(stream, 1)
        hangs_up = True

        def behave(query: bytes) -> list[bytes]:
            nonlocal hangs_up
            if hangs_up:
                hangs_up = False
                return []
            return [address_of(query)]

        server.tcp_behaviour = behave
        await stream.send_all(framed(make_query("second.test")))
        assert dns.message.from_wire((await receive(stream, 1))[0]).answer
        assert server.connections == 2
        assert not server.udp_queries


async def test_rule_24_an_idle_connection_is_closed(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_tcp, "IDLE_TIMEOUT", 0.1)
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver._replace(transport="tcp")))
        assert (await relay.ask(make_query())).answer
        assert relay.upstream.streams.open == 1
        await wait_until(lambda: relay.upstream.streams.open == 0)


async def test_rule_25_use_vc_is_tcp(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        server_by_tcp = server.nameserver._replace(options=frozenset({"use-vc"}))
        relay = Relay(nursery, scope(server_by_tcp))
        assert (await relay.ask(make_query())).answer
        assert (len(server.udp_queries), len(server.tcp_queries)) == (0, 1)


async def test_rule_26_ids_and_ports_are_new_and_forgeries_are_not_taken(nursery: trio.Nursery) -> None:
    def behave(query: bytes) -> list[bytes]:
        good = address_of(query)
        name = dns.message.from_wire(query).question[0].name.to_text()
        forged = make_answer(query, f"{name} 60 IN A 203.0.113.66")
        return [
            with_id(forged, int.from_bytes(query[:2], "big") ^ 1),
            with_id(
                make_answer(make_query("else.test"), "else.test. 60 IN A 203.0.113.66"),
                int.from_bytes(query[:2], "big"),
            ),
            query[:2] + forged[2:2],
            good[:2] + b"\x01" + forged[3:],  # no answer: QR is 0
            good,
        ]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for number in range(30):
            answer = await relay.ask(make_query(f"n{number}.test", ident=1))
            assert answer.answer[0][0].to_text() == "192.0.2.1"
        assert len({query[:2] for query in server.udp_queries}) > 25
        assert len(set(server.udp_sources)) > 25
        assert relay.upstream.counters["dns_mismatched_replies"] == 30 * 4
        assert relay.upstream.datagrams.open == 0


async def test_rule_27_the_same_question_is_asked_once(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        for number in range(100):
            relay.send(make_query("wWw.example.test" if number % 2 else "www.example.test", ident=number), port=number)
        answers = await relay.wait(100)
        assert {answer[:2] for answer in answers} == {number.to_bytes(2, "big") for number in range(100)}
        for datagram, answer in relay.answers:
            assert answer[12:30] == bytes(datagram.payload)[12:30]
        assert len(server.udp_queries) == 1


async def test_rule_27_other_bits_are_another_question(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        cd = make_query()[:3] + b"\x10" + make_query()[4:]
        for query in (
            make_query(),
            make_query(use_edns=0, want_dnssec=True),
            cd,
            make_query(kind="AAAA"),
            make_query(use_edns=0),
        ):
            relay.send(query)
        await relay.wait(5)
        assert len(server.udp_queries) == 4


async def test_rule_28_too_many_at_once_are_servfail_at_once(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as server:
        relay = Relay(nursery, scope(server.nameserver), deadline=0.3)
        relay.server.queries.of_each, relay.server.queries.of_all = 100, 150
        for number in range(120):
            relay.send(make_query(f"n{number}.test", use_edns=0), "greedy")
        assert len(relay.answers) == 20
        why = "too many queries at once: 100 of this guest are in flight"
        answer = dns.message.from_wire(relay.answers[0][1])
        assert (answer.rcode(), errors_of(answer)) == (dns.rcode.SERVFAIL, [(0, why)])
        for number in range(120, 180):
            relay.send(make_query(f"n{number}.test", use_edns=0), "another")
        assert len(relay.answers) == 30
        why = "too many queries at once: 150 of all guests are in flight"
        assert errors_of(dns.message.from_wire(relay.answers[-1][1])) == [(0, why)]
        await relay.wait(180)
        assert relay.server.queries.total == relay.upstream.datagrams.open == 0


async def test_rule_28_what_came_along_is_no_answer(nursery: trio.Nursery) -> None:
    """Records of other names are passed on, and not taken for answers to questions about those."""

    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(address_of(query))
        answer.additional.append(dns.rrset.from_text("bank.test.", 600, "IN", "A", "203.0.113.66"))
        return [answer.to_wire()]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        assert (await relay.ask(make_query())).additional
        assert (await relay.ask(make_query("bank.test"))).answer[0][0].to_text() == "192.0.2.1"
        assert len(server.udp_queries) == 2


async def test_rule_29_where_nobody_listens_the_next_is_asked_at_once(nursery: trio.Nursery) -> None:
    async with closed_port() as nowhere, open_nameserver() as server:
        relay = Relay(nursery, scope(nowhere, server.nameserver))
        began = trio.current_time()
        assert (await relay.ask(make_query())).answer
        assert trio.current_time() - began < 0.2
        assert relay.upstream.health.of(nowhere).dead_until > trio.current_time()


async def test_a_signed_query_and_its_answer_pass_as_they_are(nursery: trio.Nursery) -> None:
    """TSIG: what is changed is no longer signed (RFC 8945 5.5)."""
    keyring = dns.tsigkeyring.from_text({"key.test.": "c2VjcmV0IHNlY3JldCBzZWNyZXQh"})
    query = dns.message.make_query("www.example.test", "A", use_edns=0)
    query.use_tsig(keyring, algorithm=dns.tsig.HMAC_SHA256)
    sent = query.to_wire()
    answers: list[bytes] = []

    def behave(wire: bytes) -> list[bytes]:
        asked = dns.message.from_wire(wire, keyring=keyring)
        answer = dns.message.make_response(asked, recursion_available=True)
        answer.answer.append(dns.rrset.from_text("www.example.test.", 60, "IN", "A", "192.0.2.1"))
        answers.append(answer.to_wire())
        return answers[-1:]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver))
        for _ in range(2):
            wire = await relay.ask_raw(sent)
            found = dns.message.from_wire(wire, keyring=keyring, request_mac=query.mac)
            assert found.had_tsig
            assert found.answer
        assert [asked[2:] for asked in server.udp_queries] == [sent[2:]] * 2  # and it is not kept


async def test_servers_are_asked_again_when_a_packet_was_lost(nursery: trio.Nursery) -> None:
    lost = 1

    def behave(query: bytes) -> list[bytes]:
        nonlocal lost
        lost -= 1
        return [] if lost >= 0 else [address_of(query)]

    async with open_nameserver(behave) as server:
        began = trio.current_time()
        assert (await Relay(nursery, scope(server.nameserver)).ask(make_query())).answer
        assert 0.9 < trio.current_time() - began < 1.5


async def test_a_dead_server_is_remembered(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as dead, open_nameserver() as alive:
        relay = Relay(nursery, scope(dead.nameserver, alive.nameserver))
        for number in range(6):
            assert (await relay.ask(make_query(f"n{number}.test"))).answer
        assert len(dead.udp_queries) == 2
        relay.resolver.set_table(relay.resolver.table)  # another network: it may live there
        await relay.ask(make_query("again.test"))
        assert len(dead.udp_queries) == 3
