"""Rule 58: guests hear of the host's neighbors, by the gateway's DNS or, as systemd asks, by multicast."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.message
import pytest

from tests.dns.nameserver import make_query
from tests.dns.test_mdns import GROUP, NEIGHBOR, connected, printer_is_at, responder
from tests.lab.namespaces import TapNamespace, wait_until
from tests.lab.netstack import Netstack
from tests.rim.inside import call_inside

pytestmark = [pytest.mark.needs("netns", "root", "tun"), pytest.mark.timeout(90)]

GUEST, GATEWAY, DNS = "192.168.5.20", "192.168.5.2", "192.168.5.3"


@pytest.fixture(scope="module")
def guest() -> Iterator[TapNamespace]:
    """A guest, on a host with a neighbor who has a printer."""
    with connected() as (host, neighbor), tempfile.TemporaryDirectory(prefix="netstack-") as name:
        folder = Path(name)
        socket_path = folder / "g.sock"
        with (
            responder(neighbor, lambda query, source: [(printer_is_at(NEIGHBOR, query), source)]),
            Netstack(host, folder, links=[f"unix://{socket_path}"]),
            TapNamespace(socket_path, inside=host) as found,
        ):
            found.set_addresses(f"{GUEST}/24", gateways=[GATEWAY])
            wait_until(lambda: found.run("ping", "-c1", "-W1", GATEWAY, check=False).returncode == 0, "the link is up")
            yield found


def ask(guest: TapNamespace, target: tuple[str, int], port: int = 0, **settings: Any) -> tuple[bytes, tuple[str, int]]:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(GUEST))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        sock.bind(("", port))
        if port:
            member = socket.inet_aton(GROUP) + socket.inet_aton(GUEST)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        sock.settimeout(5.0)
        return sock

    with call_inside(guest, make) as sock:
        sock.sendto(make_query("printer.local", **settings), target)
        answer: tuple[bytes, tuple[str, int]] = sock.recvfrom(4096)
        return answer


def test_rule_58_asked_at_the_gateways_dns(guest: TapNamespace) -> None:
    answer = dns.message.from_wire(ask(guest, (DNS, 53))[0])
    assert answer.answer[0][0].to_text() == NEIGHBOR
    empty = dns.message.from_wire(ask(guest, (DNS, 53), kind="AAAA")[0])
    assert (empty.rcode(), empty.answer) == (0, [])


def test_rule_58_asked_by_multicast(guest: TapNamespace) -> None:
    wire, source = ask(guest, (GROUP, 5353), port=5353, ident=0)
    assert source == (GATEWAY, 5353)
    answer = dns.message.from_wire(wire)
    assert (answer.id, answer.question) == (0, [])
    assert answer.answer[0].name.to_text() == "printer.local."
    assert answer.answer[0][0].to_text() == NEIGHBOR


def test_rule_58_asked_by_multicast_from_another_port(guest: TapNamespace) -> None:
    wire, source = ask(guest, (GROUP, 5353), ident=0x4711)
    assert source == (GATEWAY, 5353)
    answer = dns.message.from_wire(wire)
    assert (answer.id, answer.question[0].to_text()) == (0x4711, "printer.local. IN A")
    assert answer.answer[0][0].to_text() == NEIGHBOR
