"""Asking nameservers: real ones on loopback, well-behaved and not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
import trio

from netstack.dns.message import Query, parse_query, with_id
from netstack.dns.race import DEADLINE
from netstack.dns.routes import Scope, Server
from netstack.dns.upstream import Upstream
from tests.dns.nameserver import address_of, make_answer, make_query, open_nameserver

# Long enough for a busy machine, short enough to wait for.
PATIENCE = 0.4


async def ask(
    query: bytes, *servers: Server, tcp: bool = False, patience: float = DEADLINE
) -> dns.message.Message | None:
    """What a guest would get from one scope with these servers, by a resolver without a past."""
    async with trio.open_nursery() as nursery:
        asked = parse_query(query, tcp=tcp)
        assert isinstance(asked, Query)
        answer = await Upstream(nursery, patience).ask(asked, (Scope("host", servers, default=True),))
        nursery.cancel_scope.cancel()
    return None if answer.reply is None else dns.message.from_wire(answer.reply.write(asked))


async def closed_port() -> Server:
    """Where nobody listens: the port of a socket that is closed again."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        return Server("127.0.0.1", sock.getsockname()[1])


async def test_an_answer_comes_back_with_the_guests_id_and_spelling() -> None:
    # In lower case all but the ID, which is no text.
    async with open_nameserver(lambda query: [address_of(query[:2] + query[2:].lower())]) as server:
        answer = await ask(make_query("WwW.Example.TEST", ident=0x1234), server.nameserver)
    assert answer is not None
    assert answer.id == 0x1234
    assert answer.question[0].name.to_text() == "WwW.Example.TEST."
    assert answer.answer[0][0].to_text() == "192.0.2.1"


async def test_each_query_has_its_own_id_and_port() -> None:
    async with open_nameserver() as server:
        for _ in range(30):
            assert await ask(make_query(ident=0x1234), server.nameserver) is not None
        assert len({query[:2] for query in server.udp_queries}) > 25
        assert len(set(server.udp_sources)) > 25


async def test_the_query_goes_out_with_the_guests_question_and_an_opt_of_our_own() -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    query = make_query("x.test", "TYPE65280", use_edns=0, payload=4096, want_dnssec=True, options=[cookie])
    async with open_nameserver(lambda sent: [make_answer(sent)]) as server:
        assert await ask(query + b"trailing", server.nameserver) is not None
        sent = dns.message.from_wire(server.udp_queries[0])
    assert sent.question == dns.message.from_wire(query).question
    assert (sent.edns, sent.payload, sent.options) == (0, 1232, ())
    assert sent.ednsflags & dns.flags.DO


async def test_records_of_unknown_types_pass_unchanged() -> None:
    record = r"x.test. 60 IN TYPE65280 \# 5 0102030405"
    async with open_nameserver(lambda query: [make_answer(query, record)]) as server:
        answer = await ask(make_query("x.test", "TYPE65280"), server.nameserver)
    assert answer is not None
    assert answer.answer[0].to_text() == record


def forgeries(query: bytes) -> Iterable[bytes]:
    """What an attacker beside the nameserver could send, and then the truth."""
    good = address_of(query)
    yield b""
    yield b"\0"
    yield with_id(good, int.from_bytes(query[:2], "big") ^ 1)
    yield query
    yield with_id(address_of(make_query("www.example.net")), int.from_bytes(query[:2], "big"))
    yield with_id(address_of(make_query("www.example.test", "AAAA")), int.from_bytes(query[:2], "big"))
    yield good


async def test_forgeries_are_not_taken_and_do_not_end_the_wait() -> None:
    async with open_nameserver(forgeries) as server:
        answer = await ask(make_query(), server.nameserver)
    assert answer is not None
    assert answer.answer[0][0].to_text() == "192.0.2.1"


async def test_a_closed_port_costs_no_time() -> None:
    nowhere = await closed_port()
    async with open_nameserver() as server:
        with trio.fail_after(10):
            assert await ask(make_query(), nowhere, server.nameserver, patience=60) is not None
            assert await ask(make_query(), nowhere, server.nameserver, tcp=True, patience=60) is not None


async def test_a_silent_nameserver_is_given_up_after_a_while() -> None:
    async with open_nameserver(lambda query: []) as silent, open_nameserver() as server:
        answer = await ask(make_query(), silent.nameserver, server.nameserver, patience=PATIENCE)
        assert answer is not None
        assert len(silent.udp_queries) == len(server.udp_queries) == 1


async def test_when_nobody_answers_there_is_no_answer() -> None:
    async with open_nameserver(lambda query: []) as silent:
        assert await ask(make_query(), silent.nameserver, await closed_port(), patience=PATIENCE) is None
    assert await ask(make_query()) is None


@pytest.mark.parametrize("rcode", (dns.rcode.SERVFAIL, dns.rcode.REFUSED))
async def test_a_nameserver_that_cannot_help_is_passed_over(rcode: int) -> None:
    async with (
        open_nameserver(lambda query: [make_answer(query, rcode=rcode)]) as useless,
        open_nameserver() as server,
    ):
        answer = await ask(make_query(), useless.nameserver, server.nameserver)
        assert answer is not None
        assert answer.answer
        # If nobody can, what the first one said is the answer.
        answer = await ask(make_query(), useless.nameserver, useless.nameserver)
        assert answer is not None
        assert answer.rcode() == rcode


@pytest.mark.parametrize("rcode", (dns.rcode.NXDOMAIN, dns.rcode.NOERROR))
async def test_no_such_name_is_an_answer(rcode: int) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=rcode)]) as first, open_nameserver() as second:
        answer = await ask(make_query(), first.nameserver, second.nameserver)
        assert answer is not None
        assert answer.rcode() == rcode
        assert not answer.answer
        assert second.udp_queries == []


async def test_by_tcp_it_is_asked_by_tcp() -> None:
    records = [f"www.example.test. 60 IN A 192.0.2.{number}" for number in range(200)]
    async with open_nameserver() as server:
        server.tcp_behaviour = lambda query: [make_answer(query, *records)]
        answer = await ask(make_query(ident=0x4321), server.nameserver, tcp=True)
        assert answer is not None
        assert answer.id == 0x4321
        assert len(answer.answer[0]) == 200
        assert server.udp_queries == []
        assert server.tcp_queries[0][:2] != b"\x43\x21" or server.tcp_queries[0][2:] == make_query()[2:]


async def test_answers_to_other_questions_are_skipped_by_tcp_too() -> None:
    async with open_nameserver() as server:
        server.tcp_behaviour = forgeries
        answer = await ask(make_query(), server.nameserver, tcp=True)
    assert answer is not None
    assert answer.answer[0][0].to_text() == "192.0.2.1"


async def test_a_nameserver_without_tcp_is_asked_by_udp() -> None:
    async with open_nameserver(tcp=False) as server:
        assert await ask(make_query(), server.nameserver, tcp=True) is not None
        assert len(server.udp_queries) == 1


async def test_a_connection_that_ends_early_is_followed_by_udp() -> None:
    async with open_nameserver() as server:
        server.tcp_behaviour = lambda query: []  # it hangs up
        assert await ask(make_query(), server.nameserver, tcp=True) is not None
        assert (len(server.tcp_queries), len(server.udp_queries)) == (1, 1)


async def test_an_address_that_is_none_is_passed_over() -> None:
    async with open_nameserver() as server:
        for nowhere in ("fe80::1%nosuchlink", "not-an-address", "255.255.255.255"):
            assert await ask(make_query(), Server(nowhere), server.nameserver) is not None


# A nameserver at a link-local address, in a namespace of its own.
SCOPED = """
import socket, threading
import trio
from netstack.dns.message import parse_query
from netstack.dns.routes import Scope, Server
from netstack.dns.upstream import Upstream
from tests.dns.nameserver import address_of, make_query

server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("fe80::5", 53, 0, socket.if_nametoindex("lan0")))
def serve():
    while True:
        query, source = server.recvfrom(4096)
        server.sendto(address_of(query), source)
threading.Thread(target=serve, daemon=True).start()

query = parse_query(make_query())
async def main():
    async with trio.open_nursery() as nursery:
        for server in Server("fe80::5%lan0"), Server("fe80::5%lan0", interface="lan0"):
            answer = await Upstream(nursery).ask(query, (Scope("host", (server,)),))
            assert answer.reply.write(query)[4:] == address_of(query.wire)[4:], answer
        nursery.cancel_scope.cancel()
trio.run(main)
"""


@pytest.mark.needs("netns", "ip")
def test_a_nameserver_with_a_scope_is_asked() -> None:
    script = f"""
        set -e
        ip link set lo up
        ip link add lan0 type veth peer name lan1
        ip link set lan0 up
        ip link set lan1 up
        ip addr add fe80::5/64 dev lan0 nodad
        exec {sys.executable} -c '{SCOPED}'
    """
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
