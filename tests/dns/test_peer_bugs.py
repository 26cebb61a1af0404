"""Bugs that users of other gateways met, by the project that had them: none of them may come up here.

Where nothing else is said, the source is that project's own: see the issue numbers.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Network

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
import trio

from netstack.dns.local import LocalNames
from netstack.dns.message import MAX_UDP
from netstack.dns.routes import RoutingTable
from tests.dns.nameserver import address_of, make_answer, make_query, open_nameserver
from tests.dns.relay import Relay, closed_port, framed, receive, scope, silent
from tests.dns.test_rules_cache import soa, with_authority

OURS = LocalNames(
    "netstack.internal", {"host.netstack.internal": (bytes((192, 168, 5, 2)),)}, (IPv4Network("192.168.5.0/24"),)
)


async def by_tcp(relay: Relay, query: bytes) -> dns.message.Message:
    stream = relay.connect()
    await stream.send_all(framed(query))
    (answer,) = await receive(stream, 1)
    await stream.aclose()
    return dns.message.from_wire(answer)


@pytest.mark.parametrize("rcode", (dns.rcode.NXDOMAIN, dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOERROR))
async def test_vpnkit_no_such_name_became_no_such_type_and_lost_its_soa(nursery: trio.Nursery, rcode: int) -> None:
    def behave(query: bytes) -> list[bytes]:
        return [with_authority(query, soa(60, 60), rcode=rcode)]

    async with open_nameserver(behave) as server:
        server.tcp_behaviour = behave
        relay = Relay(nursery, scope(server.nameserver))
        for answer in (await relay.ask(make_query()), await by_tcp(relay, make_query())):
            assert answer.rcode() == rcode
            assert [rrset.rdtype for rrset in answer.authority] == [dns.rdatatype.SOA]


@pytest.mark.parametrize("dead", ("silent", "closed", "none"))
async def test_gvproxy_a_timeout_became_nxdomain_and_vpnkit_was_silent(nursery: trio.Nursery, dead: str) -> None:
    async with open_nameserver(silent) as mute, closed_port() as nowhere:
        servers = {"silent": (mute.nameserver,), "closed": (nowhere,), "none": ()}[dead]
        relay = Relay(nursery, scope(*servers), deadline=0.3)
        assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL


async def test_gvproxy_other_types_of_a_name_of_ours_were_asked_of_the_world(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver), local=(OURS,))
        for name in ("host.netstack.internal", "HOST.netstack.internal", "other.netstack.internal"):
            for kind in ("AAAA", "MX", "HTTPS", "TXT", "SOA", "TYPE65280"):
                answer = await relay.ask(make_query(name, kind))
                assert not answer.answer
                assert answer.rcode() == (3 if name.startswith("other") else 0)
        assert not server.udp_queries


async def test_docker_for_mac_5088_aaaa_of_a_name_with_only_a_was_nxdomain(nursery: trio.Nursery) -> None:
    relay = Relay(nursery, local=(OURS,))
    answer = await relay.ask(make_query("host.netstack.internal", "AAAA"))
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])


async def test_lima_380_answers_were_cut_at_512_bytes_whatever_edns_said(nursery: trio.Nursery) -> None:
    records = [f"www.example.test. 60 IN A 10.0.0.{n}" for n in range(70)]
    async with open_nameserver(lambda query: [make_answer(query, *records)]) as server:
        relay = Relay(nursery, scope(server.nameserver))
        answer = await relay.ask_raw(make_query(use_edns=0, payload=1232))
        assert 1100 < len(answer) <= 1232
        assert len(dns.message.from_wire(answer).answer[0]) == 70


async def test_lima_the_guests_id_was_used_again_and_any_answer_taken(nursery: trio.Nursery) -> None:
    async with open_nameserver() as server:
        relay = Relay(nursery, scope(server.nameserver))
        for number in range(10):
            await relay.ask(make_query(f"n{number}.test", ident=0x1234))
        assert {query[:2] for query in server.udp_queries} != {b"\x12\x34"}


@pytest.mark.parametrize("kind", ("SRV", "SOA", "PTR", "CAA", "NS", "TXT", "SVCB", "DS", "TYPE65535"))
async def test_gvproxy_612_other_types_were_empty(nursery: trio.Nursery, kind: str) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rf"x.test. 60 IN {kind} \# 0")]) as server:
        server.behaviour = lambda query: [raw_record(query)]
        answer = await Relay(nursery, scope(server.nameserver)).ask_raw(make_query("x.test", kind))
        assert answer[6:8] == b"\0\1"
        assert answer.endswith(b"\0\5hello")


def raw_record(query: bytes) -> bytes:
    """An answer with five bytes of whatever type was asked for."""
    answer = dns.message.make_response(dns.message.from_wire(query)).to_wire()
    end = len(make_query("x.test"))
    record = b"\xc0\x0c" + answer[end - 4 : end - 2] + b"\0\1\0\0\0\x3c\0\5hello"
    return answer[:6] + b"\0\1" + answer[8:end] + record + answer[end:]


async def test_moby_an_answer_with_420_srv_records(nursery: trio.Nursery) -> None:
    """Whole by TCP, in whole sets by UDP, and kept in between: 420 records are 17 KiB."""
    records = [f"_x._tcp.example.test. 60 IN SRV 0 5 {n} host{n}.some.longer.domain.example.test." for n in range(420)]
    async with open_nameserver(lambda query: [make_answer(query, flags=dns.flags.TC)]) as server:
        server.tcp_behaviour = lambda query: [make_answer(query, *records)]
        relay = Relay(nursery, scope(server.nameserver))
        for query in (make_query("_x._tcp.example.test", "SRV"), make_query("_x._tcp.example.test", "SRV", use_edns=0)):
            answer = await relay.ask_raw(query)
            assert len(answer) <= MAX_UDP
            assert dns.message.from_wire(answer).flags & dns.flags.TC
            whole = await by_tcp(relay, query)
            assert len(whole.answer[0]) == 420
            assert not whole.flags & dns.flags.TC
        assert len(server.tcp_queries) == 1


async def test_gvproxy_447_it_did_not_start_without_a_network(nursery: trio.Nursery) -> None:
    """And names of its own are there, while others say why not; when the network comes, they are."""
    relay = Relay(nursery, local=(OURS,))
    assert (await relay.ask(make_query("host.netstack.internal"))).answer
    assert (await relay.ask(make_query())).rcode() == dns.rcode.SERVFAIL
    async with open_nameserver() as server:
        relay.resolver.set_table(RoutingTable((scope(server.nameserver),)))
        assert (await relay.ask(make_query())).answer


async def test_lima_3101_after_a_vpn_came_up_the_old_servers_were_asked(nursery: trio.Nursery) -> None:
    async with open_nameserver(lambda query: [make_answer(query, rcode=2)]) as old, open_nameserver() as new:
        relay = Relay(nursery, scope(old.nameserver))
        assert (await relay.ask(make_query("git.corp.example"))).rcode() == dns.rcode.SERVFAIL
        relay.resolver.set_table(RoutingTable((scope(new.nameserver),)))
        for name in ("git.corp.example", "wiki.corp.example"):
            assert (await relay.ask(make_query(name))).answer
        assert len(old.udp_queries) == 1


async def test_lima_3101_guests_with_systemd_saw_no_opt_and_gave_up_edns(nursery: trio.Nursery) -> None:
    """Whatever the nameserver can."""

    def behave(query: bytes) -> list[bytes]:
        answer = dns.message.from_wire(address_of(query))
        answer.use_edns(False)
        return [answer.to_wire()]

    async with open_nameserver(behave) as server:
        relay = Relay(nursery, scope(server.nameserver), local=(OURS,))
        for name in ("www.example.test", "host.netstack.internal", "no.netstack.internal"):
            assert (await relay.ask(make_query(name, use_edns=0))).edns == 0


async def test_podman_15986_sockets_to_nameservers_piled_up(nursery: trio.Nursery) -> None:
    async with open_nameserver(silent) as mute, open_nameserver() as server:
        relay = Relay(nursery, scope(mute.nameserver, server.nameserver), deadline=0.5)
        for number in range(200):
            relay.send(make_query(f"n{number}.test"))
        await relay.wait(200)
        assert relay.upstream.datagrams.open == 0


async def test_lima_1488_ipv6_nameservers_had_too_many_colons(nursery: trio.Nursery) -> None:
    with trio.socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            await sock.bind(("::1", 0))
        except OSError:
            pytest.skip("needs IPv6 on the loopback")
        async with open_nameserver() as server:
            relay = Relay(nursery, scope(server.nameserver._replace(address="::1", port=sock.getsockname()[1])))
            relay.send(make_query())
            with trio.fail_after(10):
                query, source = await sock.recvfrom(4096)
                await sock.sendto(address_of(query), source)
                assert dns.message.from_wire((await relay.wait())[0]).answer
