"""mDNS as one who asks once (section B7): avahi as a neighbor, neighbors who do not behave, and any bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rrset
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.mdns import MAX_EXCHANGES, MAX_RECORDS, Mdns, _Exchange
from netstack.dns.message import TYPE_A, TYPE_AAAA, TYPE_PTR, parse_question
from netstack.dns.records import read_all
from tests.dns.nameserver import make_query
from tests.lab.daemons import find_daemon
from tests.lab.namespaces import Namespace, connect_namespaces, wait_until
from tests.rim.inside import call_inside

HOST, NEIGHBOR = "198.51.100.1", "198.51.100.2"
HOST6, NEIGHBOR6 = "2001:db8:1::1", "2001:db8:1::2"
GROUP = "224.0.0.251"

PRINTER = (b"printer", b"local")


# ---- what a reply says -----------------------------------------------------------------------------------------------


def reply(*records: str, query: bytes = b"") -> bytes:
    """A message of a responder, with records in the form of a zone file."""
    message = dns.message.make_response(dns.message.from_wire(query)) if query else dns.message.Message(0)
    message.flags = dns.flags.QR | dns.flags.AA
    for record in records:
        owner, ttl, class_, kind, data = record.split(maxsplit=4)
        message.answer.append(dns.rrset.from_text(owner, int(ttl), class_, kind, data))
    return message.to_wire()


def exchange(
    *messages: bytes, labels: tuple[bytes, ...] = PRINTER, types: tuple[int, ...] = (TYPE_A, TYPE_AAAA)
) -> _Exchange:
    found = _Exchange(labels, types)
    for message in messages:
        records = read_all(message)
        assert records is not None
        found.on_message(message, records)
    return found


def data_of(found: _Exchange, kind: int) -> list[str]:
    return [str(ip_address(data)) for _, data in found.result(kind).records]


def test_rule_60_the_cache_flush_bit_is_not_a_part_of_the_class() -> None:
    plain = reply("printer.local. 120 IN A 192.0.2.1")
    flush = plain.replace(b"\0\1\0\1\0\0\0\x78", b"\0\1\x80\1\0\0\0\x78")
    assert flush != plain
    for message in (plain, flush):
        found = exchange(message)
        assert data_of(found, TYPE_A) == ["192.0.2.1"]
        assert found.result(TYPE_A).ttl == 10  # rule 59
    assert not exchange(plain.replace(b"\0\1\0\1\0\0\0\x78", b"\0\1\0\3\0\0\0\x78")).exists


def test_names_are_compared_without_case_and_others_do_not_count() -> None:
    found = exchange(reply("PRINTER.Local. 5 IN A 192.0.2.1", "other.local. 5 IN A 192.0.2.2"))
    assert data_of(found, TYPE_A) == ["192.0.2.1"]
    assert found.result(TYPE_A).ttl == 5


def test_goodbyes_do_not_count() -> None:
    assert not exchange(reply("printer.local. 0 IN A 192.0.2.1")).exists


def test_an_alias_is_followed_within_the_message() -> None:
    found = exchange(reply("printer.local. 9 IN CNAME real.local.", "real.local. 9 IN A 192.0.2.1"))
    assert data_of(found, TYPE_A) == ["192.0.2.1"]


def test_rule_61_link_local_addresses_only_where_there_are_no_others() -> None:
    both = exchange(reply("printer.local. 9 IN AAAA fe80::1", "printer.local. 9 IN AAAA 2001:db8::1"))
    assert data_of(both, TYPE_AAAA) == ["2001:db8::1"]
    with_a = exchange(reply("printer.local. 9 IN AAAA fe80::1", "printer.local. 9 IN A 192.0.2.1"))
    assert data_of(with_a, TYPE_AAAA) == []
    assert with_a.is_settled(TYPE_AAAA)
    alone = exchange(reply("printer.local. 9 IN AAAA fe80::1"))
    assert data_of(alone, TYPE_AAAA) == ["fe80::1"]
    assert not alone.is_settled(TYPE_AAAA)  # an A may come


def test_an_nsec_record_says_at_once_what_there_is_not() -> None:
    found = exchange(reply("printer.local. 9 IN A 192.0.2.1", "printer.local. 9 IN NSEC printer.local. A"))
    assert found.is_settled(TYPE_AAAA)
    assert found.result(TYPE_AAAA) == (True, (), 5)
    assert data_of(found, TYPE_A) == ["192.0.2.1"]


def test_names_in_the_data_are_spelt_out() -> None:
    message = reply("_ipp._tcp.local. 9 IN PTR My\\032Printer._ipp._tcp.local.")
    found = exchange(message, labels=(b"_ipp", b"_tcp", b"local"), types=(TYPE_PTR,))
    assert found.result(TYPE_PTR).records == ((TYPE_PTR, (b"My Printer", b"_ipp", b"_tcp", b"local")),)
    srv = reply("x._ipp._tcp.local. 9 IN SRV 0 0 631 printer.local.")
    found = exchange(srv, labels=(b"x", b"_ipp", b"_tcp", b"local"), types=(33,))
    assert found.result(33).records == ((33, b"\0\0\0\0\2\x77\7printer\5local\0"),)


def test_the_number_of_records_is_bounded() -> None:
    many = (reply(*(f"printer.local. 9 IN A 10.{n}.{m}.1" for m in range(100))) for n in range(3))
    assert len(exchange(*many).result(TYPE_A).records) == MAX_RECORDS


@given(st.binary(max_size=200), st.integers(0, 300), st.binary(max_size=8))
def test_any_bytes_from_neighbors(tail: bytes, at: int, patch: bytes) -> None:
    good = reply(
        "printer.local. 9 IN A 192.0.2.1",
        "printer.local. 9 IN NSEC printer.local. A AAAA",
        "printer.local. 9 IN CNAME x.local.",
    )
    for message in (tail, good[:12] + tail, good[:at] + patch + good[at + len(patch) :]):
        records = read_all(message)
        if records is not None:
            found = _Exchange(PRINTER, (TYPE_A, TYPE_AAAA, TYPE_PTR, 33, 47))
            found.on_message(message, records)
            for kind in found.types:
                found.result(kind)


def test_messages_made_to_keep_us_busy() -> None:
    # A chain of pointers, each to the one before; 4,000 records that all point at its end.
    chain = b"\1a\0" + b"".join(struct.pack("!H", 0xC000 | 12 + max(0, 3 + 2 * (n - 1))) for n in range(4000))
    record = struct.pack("!HHHIH", 0xC000 | 12 + len(chain) - 2, TYPE_A, 1, 9, 4) + bytes(4)
    message = struct.pack("!HHHHHH", 0, 0x8400, 0, 4000, 0, 0) + chain + record * 4000
    began = time.thread_time()
    read_all(message[:9000])
    read_all(message)
    assert time.thread_time() - began < 0.005


# ---- asking ----------------------------------------------------------------------------------------------------------


async def ask(mdns: Mdns, name: str, kind: str = "A") -> dns.message.Message:
    query = make_query(name, kind)
    question = parse_question(query)
    assert question is not None
    return dns.message.from_wire(await mdns.answer(query, question))


@pytest.mark.parametrize(
    ("name", "kind", "claimed"),
    (
        ("printer.local", "A", True),
        ("a.b.LOCAL", "AAAA", True),
        ("_ipp._tcp.local", "PTR", True),
        ("7.1.254.169.in-addr.arpa", "PTR", True),
        (f"1.{'0.' * 28}8.e.f.ip6.arpa", "PTR", True),
        ("local", "A", False),
        ("printer.local.example", "A", False),
        ("mylocal", "A", False),
        ("git.corp.local", "A", False),  # rule 42: routed
        ("1.1.168.192.in-addr.arpa", "PTR", False),
        (".", "NS", False),
    ),
)
async def test_rule_42_60_which_names_are_asked_for(nursery: trio.Nursery, name: str, kind: str, claimed: bool) -> None:
    question = parse_question(make_query(name, kind))
    assert question is not None
    mdns = Mdns(nursery, is_routed=lambda labels: labels[-2:] == (b"corp", b"local"))
    assert mdns.claims(question) is claimed
    mdns.enabled = False
    assert not mdns.claims(question)


async def test_without_interfaces_there_is_no_such_name_at_once(nursery: trio.Nursery) -> None:
    mdns = Mdns(nursery, interfaces=list)
    began = trio.current_time()
    answer = await ask(mdns, "printer.local")
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert trio.current_time() - began < 1.0  # a thread finds that out


async def test_too_many_names_at_once_are_refused(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Mdns, found: _Exchange, guest: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Mdns, "_run", never)
    mdns = Mdns(nursery, interfaces=list)
    for number in range(MAX_EXCHANGES):
        nursery.start_soon(ask, mdns, f"n{number}.local")
    await trio.testing.wait_all_tasks_blocked()
    assert (await ask(mdns, "one-more.local")).rcode() == dns.rcode.SERVFAIL
    nursery.cancel_scope.cancel()


# ---- on a wire -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected() -> Iterator[tuple[Namespace, Namespace]]:
    """The host, and a neighbor on its network. There is no route anywhere."""
    with Namespace("host") as host, Namespace("neighbor", inside=host) as neighbor:
        connect_namespaces(host, "eth0", neighbor, "eth0")
        host.add_address("eth0", f"{HOST}/24", f"{HOST6}/64")
        neighbor.add_address("eth0", f"{NEIGHBOR}/24", f"{NEIGHBOR6}/64")
        # A VPN, up and with an address, where nobody may be asked.
        host.ip("tuntap", "add", "tun0", "mode", "tun")
        host.ip("addr", "add", "10.8.0.1/24", "dev", "tun0")
        host.ip("link", "set", "tun0", "up")
        yield host, neighbor


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[Namespace, Namespace]]:
    with connected() as both:
        yield both


def look_up(host: Namespace, *words: str) -> list[dict[str, Any]]:
    outcome = host.run(sys.executable, "-m", "tests.lab.mdns", *words)
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(lines) == len(words) // 2
    return sorted(lines, key=lambda line: (line["name"], line["type"]))


AVAHI = """\
[server]
host-name=printer
enable-dbus=no
use-ipv4=yes
use-ipv6=yes
[publish]
publish-hinfo=no
publish-workstation=no
[wide-area]
enable-wide-area=no
"""
SERVICE = """\
<service-group><name>Bob\u2019s Printer</name>
<service><type>_ipp._tcp</type><port>631</port><txt-record>rp=print</txt-record></service></service-group>
"""


@pytest.fixture(scope="module")
def avahi() -> Iterator[Namespace]:
    """The host; avahi runs at the neighbor's."""
    with connected() as (host, neighbor), tempfile.TemporaryDirectory(prefix="netstack-avahi-") as name:
        folder = Path(name)
        (folder / "avahi.conf").write_text(AVAHI)
        (folder / "hosts").write_text("198.51.100.77 v4only.local\n2001:db8:1::78 v6only.local\n")
        (folder / "ipp.service").write_text(SERVICE, encoding="utf-8")
        # Everything avahi reads and writes besides, out of this namespace's sight.
        for place in ("/run", "/etc/avahi/services"):
            neighbor.run("mount", "-t", "tmpfs", "tmpfs", place)
        neighbor.run("mkdir", "-p", "/run/avahi-daemon")
        neighbor.run("cp", folder / "ipp.service", "/etc/avahi/services/ipp.service")
        neighbor.bind_file("/etc/avahi/hosts", folder / "hosts")
        command = (
            *find_daemon("avahi-daemon"),
            "--no-drop-root",
            "--no-rlimits",
            "--no-chroot",
            "-f",
            str(folder / "avahi.conf"),
        )
        with (folder / "log").open("w") as log:
            daemon = neighbor.popen(*command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: "successfully established" in (folder / "log").read_text(), "avahi's service is up", 20)
            wait_until(lambda: "Server startup complete" in (folder / "log").read_text(), "avahi's name is up", 20)
            yield host
        finally:
            daemon.terminate()
            daemon.wait(timeout=10)


@pytest.mark.needs("netns", "root", "avahi-daemon", "tun")
def test_rule_59_names_of_a_real_responder(avahi: Namespace) -> None:
    names = (
        "PRINTER.local",
        "A",
        "printer.local",
        "AAAA",
        "v4only.local",
        "A",
        "v4only.local",
        "AAAA",
        "v6only.local",
        "A",
    )
    found = {(line["name"], line["type"]): line for line in look_up(avahi, *names)}
    assert found["PRINTER.local", "A"]["data"] == [NEIGHBOR]
    assert found["printer.local", "AAAA"]["data"] == [NEIGHBOR6]
    assert found["v4only.local", "A"]["data"] == ["198.51.100.77"]
    assert all(0 < ttl <= 10 for line in found.values() for ttl in line["ttls"])
    # No such address, but such a name: NODATA, and soon.
    for key in (("v4only.local", "AAAA"), ("v6only.local", "A")):
        assert (found[key]["rcode"], found[key]["data"]) == ("NOERROR", [])
    assert all(line["seconds"] < 1.0 for line in found.values())


@pytest.mark.needs("netns", "root", "avahi-daemon", "tun")
def test_rule_59_a_name_that_nobody_has(avahi: Namespace) -> None:
    lines = look_up(avahi, "nobody.local", "A", "nobody.local", "AAAA")
    assert [line["rcode"] for line in lines] == ["NXDOMAIN", "NXDOMAIN"]
    assert all(1.5 < line["seconds"] < 3.0 for line in lines)
    assert lines[0]["queries"] == 1  # one exchange for both


@pytest.mark.needs("netns", "root", "avahi-daemon", "tun")
def test_services_with_names_that_are_not_ascii(avahi: Namespace) -> None:
    service = "Bob\\226\\128\\153s\\032Printer._ipp._tcp.local"
    browse, details, text = look_up(avahi, "_ipp._tcp.local", "PTR", f"{service}", "SRV", f"{service}", "TXT")[:3]
    found = {line["type"]: line for line in (browse, details, text)}
    assert found["PTR"]["data"] == [f"{service}."]
    assert found["SRV"]["data"] == ["0 0 631 printer.local."]
    assert found["TXT"]["data"] == ['"rp=print"']


@pytest.mark.needs("netns", "root", "avahi-daemon", "tun")
def test_rule_61_nothing_is_asked_on_a_vpn(avahi: Namespace) -> None:
    sent = avahi.run("cat", "/sys/class/net/tun0/statistics/tx_packets").stdout
    look_up(avahi, "printer.local", "A")
    assert avahi.run("cat", "/sys/class/net/tun0/statistics/tx_packets").stdout == sent


Answers = Callable[[bytes, tuple[str, int]], list[tuple[bytes, tuple[str, int]]]]


@contextlib.contextmanager
def responder(
    neighbor: Namespace, answers: Answers, *, port: int = 5353
) -> Iterator[list[tuple[bytes, tuple[str, int]]]]:
    """A neighbor who answers as a test says; gives what it was asked."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("0.0.0.0", 5353))
        group = socket.inet_aton(GROUP) + socket.inet_aton(NEIGHBOR)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(NEIGHBOR))
        return sock

    def make_sender() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((NEIGHBOR, port))
        return sock

    sock = call_inside(neighbor, make)
    sender = sock if port == 5353 else call_inside(neighbor, make_sender)
    asked: list[tuple[bytes, tuple[str, int]]] = []

    def serve() -> None:
        while True:
            message, source = sock.recvfrom(9000)
            if not message:
                return
            if message[2] & 0x80:
                continue
            asked.append((message, source))
            for answer, target in answers(message, source):
                sender.sendto(answer, target)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        with call_inside(neighbor, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as bell:
            bell.sendto(b"", (NEIGHBOR, 5353))
        thread.join(timeout=5)
        sock.close()
        sender.close()


def printer_is_at(address: str, query: bytes) -> bytes:
    if dns.message.from_wire(query).question[0].rdtype != TYPE_A:
        return reply(query=query)
    return reply(f"printer.local. 9 IN A {address}", query=query)


@pytest.mark.needs("netns", "root", "tun")
def test_rule_59_how_it_is_asked(wire: tuple[Namespace, Namespace]) -> None:
    host, neighbor = wire
    with responder(neighbor, lambda query, source: []) as asked:
        (line,) = look_up(host, "printer.local", "A")
    assert line["rcode"] == "NXDOMAIN"
    messages = [(dns.message.from_wire(query), source) for query, source in asked]
    kinds = sorted(message.question[0].to_text() for message, _ in messages)
    assert kinds == ["printer.local. IN A"] * 2 + ["printer.local. IN AAAA"] * 2
    assert all(source[0] == HOST and source[1] != 5353 for _, source in messages)
    assert len({message.id for message, _ in messages}) == 2


@pytest.mark.needs("netns", "root", "tun")
def test_an_answer_to_the_group_is_heard(wire: tuple[Namespace, Namespace]) -> None:
    host, neighbor = wire

    def answer(query: bytes, source: tuple[str, int]) -> list[tuple[bytes, tuple[str, int]]]:
        return [(reply("printer.local. 120 IN A 192.0.2.1"), (GROUP, 5353))]

    with responder(neighbor, answer):
        (line,) = look_up(host, "printer.local", "A")
    assert line["data"] == ["192.0.2.1"]
    assert line["ttls"] == [10]


def _wrong_id(query: bytes) -> bytes:
    return bytes((query[0] ^ 1,)) + printer_is_at("192.0.2.66", query)[1:]


def _wrong_question(query: bytes) -> bytes:
    return printer_is_at("192.0.2.66", query).replace(b"\7printer", b"\7plotter", 1)


def _a_query(query: bytes) -> bytes:
    answer = printer_is_at("192.0.2.66", query)
    return answer[:2] + bytes((answer[2] & 0x7F,)) + answer[3:]


@pytest.mark.needs("netns", "root", "tun")
@pytest.mark.parametrize("lie", (_wrong_id, _wrong_question, _a_query, lambda query: b"\0" * 5, lambda query: b""))
def test_lies_are_passed_over_and_the_wait_goes_on(
    wire: tuple[Namespace, Namespace], lie: Callable[[bytes], bytes]
) -> None:
    host, neighbor = wire

    def answer(query: bytes, source: tuple[str, int]) -> list[tuple[bytes, tuple[str, int]]]:
        return [(lie(query), source), (printer_is_at("192.0.2.1", query), source)]

    with responder(neighbor, answer):
        (line,) = look_up(host, "printer.local", "A")
    assert line["data"] == ["192.0.2.1"]


@pytest.mark.needs("netns", "root", "tun")
def test_an_answer_from_another_port_does_not_count(wire: tuple[Namespace, Namespace]) -> None:
    host, neighbor = wire
    with responder(neighbor, lambda query, source: [(printer_is_at("192.0.2.66", query), source)], port=5354):
        (line,) = look_up(host, "printer.local", "A")
    assert line["rcode"] == "NXDOMAIN"


@pytest.mark.needs("netns", "root", "tun")
def test_rule_60_an_answer_from_off_the_link_does_not_count(wire: tuple[Namespace, Namespace]) -> None:
    host, neighbor = wire
    neighbor.ip("addr", "add", "192.0.2.200/32", "dev", "eth0")
    host.ip("route", "add", "192.0.2.200/32", "dev", "eth0")

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("192.0.2.200", 5353))
        return sock

    with call_inside(neighbor, make) as stranger:

        def answer(query: bytes, source: tuple[str, int]) -> list[tuple[bytes, tuple[str, int]]]:
            stranger.sendto(printer_is_at("192.0.2.66", query), source)
            return []

        with responder(neighbor, answer):
            (line,) = look_up(host, "printer.local", "A")
    assert line["rcode"] == "NXDOMAIN"
