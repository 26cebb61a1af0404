"""The system's resolver as the last one to ask: what it says, and when it is asked at all."""

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import pytest
import trio

from netstack.dns.message import parse_question
from netstack.dns.race import Answer
from netstack.dns.routes import HOST_RANK, USER_RANK, Scope, Server
from netstack.dns.upstream import Upstream
from netstack.dns.upstream_system import SYSTEM, System
from tests.lab.namespaces import Namespace, wait_until

KNOWN = {
    b"www.example.": ["192.0.2.80", "192.0.2.81", "2001:db8::80"],
    b"only4.example.": ["192.0.2.4"],
    b"scoped.example.": ["fe80::1%lo"],
}


def addresses(name: bytes, port: None, family: int, type: int) -> list[Any]:
    """A getaddrinfo that knows those above."""
    if name == b"broken.example.":
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    if name == b"slow.example.":
        time.sleep(0.5)
    found = [
        (socket.AF_INET6 if ":" in text else socket.AF_INET, type, 17, "", (text, 0)) for text in KNOWN.get(name, ())
    ]
    found = [entry for entry in found if family in (socket.AF_UNSPEC, entry[0])]
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return found


def names(where: tuple[str, int], flags: int) -> tuple[str, str]:
    if where[0] != "192.0.2.80":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return "www.example", "0"


async def ask(name: str, kind: str) -> str:
    query = dns.message.make_query(name, kind).to_wire()
    question = parse_question(query)
    assert question is not None
    answer = dns.message.from_wire(await System(addresses, names).ask(SYSTEM, query, question))
    assert dns.message.from_wire(query).is_response(answer)
    texts = [item.to_text() for rrset in answer.answer for item in rrset]
    return " ".join(texts) or dns.rcode.to_text(answer.rcode())


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    (
        ("www.example", "A", "192.0.2.80 192.0.2.81"),
        ("WWW.Example", "AAAA", "2001:db8::80"),
        ("only4.example", "AAAA", "NOERROR"),  # rule 13: the name is there
        ("none.example", "AAAA", "NXDOMAIN"),
        ("none.example", "A", "NXDOMAIN"),
        ("scoped.example", "AAAA", "NOERROR"),
        ("80.2.0.192.in-addr.arpa", "PTR", "www.example."),
        ("81.2.0.192.in-addr.arpa", "PTR", "NXDOMAIN"),
    ),
)
async def test_what_it_says_is_a_message_like_any_other(name: str, kind: str, expected: str) -> None:
    assert await ask(name, kind) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    (("broken.example", "A"), ("www.example", "MX"), ("www.example", "HTTPS"), (".", "A"), ("a\\000b.example", "A")),
)
async def test_what_it_cannot_tell_is_an_error(name: str, kind: str) -> None:
    with pytest.raises(OSError, match="the system's resolver"):
        await ask(name, kind)


async def test_threads_are_few() -> None:
    system = System(addresses, names)
    query = dns.message.make_query("slow.example", "A").to_wire()
    question = parse_question(query)
    assert question is not None
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(_expect_error, system, query)
        await trio.sleep(0.1)
        with pytest.raises(OSError, match="busy"):
            await system.ask(SYSTEM, query, question)


async def _expect_error(system: System, query: bytes) -> None:
    question = parse_question(query)
    assert question is not None
    answer = dns.message.from_wire(await system.ask(SYSTEM, query, question))
    assert answer.rcode() == dns.rcode.NXDOMAIN


# ---- when it is asked ----------------------------------------------------------------------------------------------


async def race(nursery: trio.Nursery, scope: Scope, name: str = "www.example", kind: str = "A") -> Answer:
    upstream = Upstream(nursery, system=System(addresses, names))
    return await upstream.ask(dns.message.make_query(name, kind).to_wire(), (scope,), tcp=False)


def silent_server() -> tuple[socket.socket, Server]:
    """A socket that takes queries and says nothing, as a filter does."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock, Server("127.0.0.1", sock.getsockname()[1])


async def test_where_the_hosts_nameservers_are_silent_the_system_is_asked(nursery: trio.Nursery) -> None:
    sock, server = silent_server()
    with sock:
        upstream = Upstream(nursery, system=System(addresses, names))
        scope = Scope("host", (server,), default=True, rank=HOST_RANK)
        took = []
        for _ in range(4):
            began_at = trio.current_time()
            answer = await upstream.ask(dns.message.make_query("www.example", "A").to_wire(), (scope,), tcp=False)
            took.append(trio.current_time() - began_at)
            assert answer.server == "the system's resolver"
            assert "192.0.2.80" in dns.message.from_wire(answer.wire).to_text()
    assert 1.4 < took[0] < 2.5
    assert took[-1] < 0.5  # by then the nameserver counts as dead
    nursery.cancel_scope.cancel()


async def test_where_nobody_listens_the_system_is_asked_at_once(nursery: trio.Nursery) -> None:
    sock, server = silent_server()
    sock.close()
    began_at = trio.current_time()
    answer = await race(nursery, Scope("host", (server,), default=True))
    assert answer.server == "the system's resolver"
    assert trio.current_time() - began_at < 0.5
    nursery.cancel_scope.cancel()


async def test_the_users_own_upstreams_have_no_substitute(nursery: trio.Nursery) -> None:
    sock, server = silent_server()
    sock.close()
    answer = await race(nursery, Scope("settings", (server,), (".",), rank=USER_RANK))
    assert answer.reply is None
    nursery.cancel_scope.cancel()


async def test_other_types_are_not_asked_of_the_system(nursery: trio.Nursery) -> None:
    sock, server = silent_server()
    sock.close()
    answer = await race(nursery, Scope("host", (server,), default=True), kind="MX")
    assert answer.reply is None
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("scope", "name", "asked"),
    (
        (Scope("vpn", domains=("corp.example",)), "git.corp.example", False),
        (Scope("vpn", domains=("corp.example",), default=True), "CORP.example", False),
        (Scope("vpn", domains=("corp.example",), default=True), "www.example", True),
        (Scope("vpn", domains=(".",)), "www.example", False),
        (Scope("scutil:example", domains=("example",), system=True), "www.example", True),
        (Scope("host", default=True), "printer.local", False),
        (Scope("scutil:default", default=True, system=True), "printer.local", False),
    ),
)
async def test_names_that_a_scope_claims_are_not_told_to_the_system(
    nursery: trio.Nursery, scope: Scope, name: str, asked: bool
) -> None:
    heard = []

    def look(name: bytes, *args: Any, **kwargs: Any) -> list[Any]:
        heard.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    sock, server = silent_server()
    with sock:
        upstream = Upstream(nursery, 2.0, system=System(look))
        query = dns.message.make_query(name, "A").to_wire()
        answer = await upstream.ask(query, (replace(scope, servers=(server,)),), tcp=False)
    # Its "no such name" would be that of somebody who cannot know.
    assert (bool(heard), answer.reply is not None) == (asked, asked)
    nursery.cancel_scope.cancel()


# The real getaddrinfo, and a nameserver for it.
REAL = """
import trio
import dns.message
from netstack.dns.message import parse_question
from netstack.dns.upstream_system import SYSTEM, System
for name, kind in (("www.example", "A"), ("www.example", "AAAA"), ("80.2.0.192.in-addr.arpa", "PTR"),
                   ("four.example", "AAAA"), ("none.example", "A")):
    query = dns.message.make_query(name, kind).to_wire()
    answer = dns.message.from_wire(trio.run(System().ask, SYSTEM, query, parse_question(query)))
    print(" ".join(item.to_text() for rrset in answer.answer for item in rrset) or answer.rcode().name)
"""


@pytest.mark.needs("netns", "dnsmasq")
def test_the_real_getaddrinfo(tmp_path: Path) -> None:
    texts = {"resolv.conf": "nameserver 127.0.0.1\nsearch example\n", "nsswitch.conf": "hosts: dns\n"}
    with Namespace("host") as host:
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
            host.bind_file(f"/etc/{name}", tmp_path / name)
        log = tmp_path / "log"
        words = "--keep-in-foreground --no-resolv --no-hosts --conf-file=/dev/null --pid-file= --user= --local=/#/"
        records = ("--host-record=www.example,192.0.2.80,2001:db8::80", "--host-record=four.example,192.0.2.4")
        server = host.popen("dnsmasq", *words.split(), *records, "--log-queries", f"--log-facility={log}")
        try:
            wait_until(lambda: log.exists() and "started" in log.read_text(), "dnsmasq starts")
            outcome: subprocess.CompletedProcess[str] = host.run(sys.executable, "-c", REAL)
        finally:
            server.kill()
            server.wait(10)
        assert outcome.stdout.split() == ["192.0.2.80", "2001:db8::80", "www.example.", "NOERROR", "NXDOMAIN"]
        assert "example.example" not in log.read_text()  # the search list is the guest's matter
