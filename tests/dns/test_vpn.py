r"""A VPN's life, end to end: a guest behind a real netstack, on a host with a real systemd-resolved and two networks.

    guest --- netstack --- host --- wifi --- home: dnsmasq at 192.0.2.1, knows public.example
                                \-- tun0 --- corp: dnsmasq at 10.8.0.1, knows corp.example

Both servers log what they are asked, so that a query which goes where it must not is seen.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.namespaces import Namespace, TapNamespace, connect_namespaces, wait_until
from tests.lab.netstack import Netstack
from tests.lab.resolved import Resolved

pytestmark = [pytest.mark.needs("root", "netns", "tun", "dnsmasq"), pytest.mark.slow]

# Asks the gateway as a guest's C library would, and prints the answers as a line of JSON; with "steady" for so many
# seconds, every 20 ms, what was answered to how many.
ASK = """
import collections, json, sys, time
import dns.exception, dns.message, dns.query, dns.rcode
def ask(name, kind):
    query = dns.message.make_query(name, kind)
    try:
        answer = dns.query.udp(query, "192.168.5.3", timeout=5)
    except dns.exception.Timeout:
        return "silence"
    texts = sorted(item.to_text() for rrset in answer.answer for item in rrset)
    return " ".join(texts) or dns.rcode.to_text(answer.rcode())
if sys.argv[1] == "steady":
    found, until = collections.Counter(), time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until:
        # Another name each time, so that the cache does not answer.
        found[ask(f"n{time.monotonic_ns()}.{sys.argv[3]}", "A")] += 1
        time.sleep(0.02)
    print(json.dumps(found))
else:
    print(json.dumps(ask(sys.argv[1], sys.argv[2])))
"""


class Nameserver:
    """A dnsmasq that logs its queries."""

    def __init__(self, namespace: Namespace, folder: Path, address: str, *options: str) -> None:
        self.log = folder / f"{namespace.name}.log"
        words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user="]
        words += [f"--listen-address={address}", "--bind-interfaces", "--log-queries", f"--log-facility={self.log}"]
        words += [
            "--local=/public.example/",
            "--local=/corp.example/",
            "--local=/10.in-addr.arpa/",
            "--pid-file=",
            *options,
        ]
        self.process: subprocess.Popen[bytes] = namespace.popen(*words)
        wait_until(lambda: self.log.exists() and "started" in self.log.read_text(), "dnsmasq starts")

    def count(self, name: str) -> int:
        """How often it was asked for a name that ends so."""
        return sum(f"{name} from" in line for line in self.log.read_text().splitlines() if " query[" in line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Lab:
    """Everything in the picture."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        folder = self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ns-")))
        self.host = stack.enter_context(Namespace("host"))
        home, corp = stack.enter_context(Namespace("home")), stack.enter_context(Namespace("corp"))
        self.resolved = Resolved(self.host)
        stack.callback(self.resolved.close)
        self.resolved.use_stub()
        connect_namespaces(self.host, "wifi", home, "eth0")
        connect_namespaces(self.host, "tun0", corp, "eth0")
        for space, device, address in (
            (self.host, "wifi", "192.0.2.10/24"),
            (self.host, "tun0", "10.8.0.9/24"),
            (home, "eth0", "192.0.2.1/24"),
            (corp, "eth0", "10.8.0.1/24"),
        ):
            space.add_address(device, address)
        self.home = Nameserver(
            home, folder, "192.0.2.1", "--address=/public.example/192.0.2.80", "--local=/home.example/"
        )
        stack.callback(self.home.close)
        self.corp = Nameserver(
            corp, folder, "10.8.0.1", "--address=/public.example/10.8.0.66", "--host-record=git.corp.example,10.8.0.80"
        )
        stack.callback(self.corp.close)
        self.control("dns", "wifi", "192.0.2.1")
        self.control("domain", "wifi", "home.example")
        socket = folder / "n.sock"
        self.netstack = Netstack(self.host, folder, links=[f"unix://{socket}"])
        self.netstack.start()
        stack.callback(self.netstack.stop)
        self.guest = TapNamespace(socket)
        stack.callback(self.guest.close)
        self.guest.set_addresses("192.168.5.15/24", gateways=["192.168.5.2"])

    def control(self, *words: str) -> None:
        self.resolved.control(*words)

    def ask(self, name: str, kind: str = "A") -> str:
        found: str = json.loads(self.guest.run(sys.executable, "-c", ASK, name, kind).stdout)
        return found

    def steadily(self, seconds: float, domain: str) -> subprocess.Popen[str]:
        return self.guest.popen(
            sys.executable, "-c", ASK, "steady", str(seconds), domain, stdout=subprocess.PIPE, text=True
        )

    def until(self, look: Callable[[], bool], since: float) -> None:
        """Within the 2 s that a change may take, and one that the asking itself does."""
        wait_until(look, "the change is noticed", timeout=10)
        assert time.monotonic() - since < 3.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


def add_twin(lab: Lab, stack: contextlib.ExitStack) -> Nameserver:
    """A second tunnel to a network that has the home network's addresses, its nameserver's too."""
    twin = stack.enter_context(Namespace("twin"))
    connect_namespaces(lab.host, "tun1", twin, "eth0")
    lab.host.add_address("tun1", "192.0.2.11/24")
    twin.add_address("eth0", "192.0.2.1/24")
    records = ("--host-record=git.twin.example,192.0.2.99", "--local=/twin.example/")
    nameserver = Nameserver(twin, lab.folder, "192.0.2.1", *records)
    stack.callback(nameserver.close)
    return nameserver


def vpn_up(lab: Lab, *domains: str) -> float:
    """As openconnect's script does it: domains, then servers."""
    lab.control("domain", "tun0", *domains)
    lab.control("default-route", "tun0", "no")
    lab.control("dns", "tun0", "10.8.0.1")
    return time.monotonic()


def vpn_down(lab: Lab) -> float:
    lab.control("revert", "tun0")
    return time.monotonic()


def test_a_split_vpn_comes_and_goes_and_no_query_leaks_or_is_lost(lab: Lab) -> None:
    assert lab.ask("www.public.example") == "192.0.2.80"
    assert lab.ask("git.corp.example") == "NXDOMAIN"
    assert lab.home.count("git.corp.example") == 1
    steady = lab.steadily(6, "public.example")

    up_at = vpn_up(lab, "corp.example", "~8.10.in-addr.arpa")
    lab.until(lambda: lab.ask("git.corp.example") == "10.8.0.80", up_at)
    asked_home = lab.home.count("corp.example")
    # The corporate names go through the tunnel and nowhere else, existing or not; the rest does not go there.
    assert lab.ask("GIT.Corp.example.") == "10.8.0.80"
    assert lab.ask("none.corp.example") == "NXDOMAIN"
    assert lab.ask("git.corp.example", "AAAA") == "NOERROR"
    assert lab.ask("80.0.8.10.in-addr.arpa", "PTR") == "git.corp.example."
    assert lab.ask("other.public.example") == "192.0.2.80"
    assert lab.home.count("corp.example") == asked_home
    assert lab.home.count("8.10.in-addr.arpa") == 0
    assert lab.corp.count("public.example") == 0

    shown = {line["domain"]: line for line in lab.netstack.get("/v1/dns")["routes"]}
    assert shown["corp.example"]["servers"] == ["10.8.0.1"]
    assert shown["corp.example"]["source"] == "systemd-resolved, link tun0"

    down_at = vpn_down(lab)
    lab.until(lambda: lab.ask("git.corp.example") == "NXDOMAIN", down_at)
    asked_corp = lab.corp.count("")
    assert lab.ask("new.corp.example") == "NXDOMAIN"
    assert lab.home.count("new.corp.example") == 1
    assert lab.corp.count("") == asked_corp

    answers = json.loads(steady.communicate(timeout=20)[0])
    assert set(answers) == {"192.0.2.80"}
    assert answers["192.0.2.80"] > 100


def test_a_vpn_that_takes_all_names_hides_them_from_the_home_network(lab: Lab) -> None:
    assert lab.ask("a.public.example") == "192.0.2.80"
    steady = lab.steadily(5, "public.example")
    up_at = vpn_up(lab, "~.")
    # What was cached from the home network's server is not served any more.
    lab.until(lambda: lab.ask("a.public.example") == "10.8.0.66", up_at)
    asked_home = lab.home.count("")
    assert lab.ask("b.public.example") == "10.8.0.66"
    time.sleep(0.5)
    assert lab.home.count("") == asked_home
    assert lab.ask("printer.home.example") == "NXDOMAIN"  # rule 39: the home network's own domain
    assert lab.home.count("printer.home.example") == 1
    down_at = vpn_down(lab)
    lab.until(lambda: lab.ask("a.public.example") == "192.0.2.80", down_at)
    answers = json.loads(steady.communicate(timeout=20)[0])
    assert set(answers) == {"192.0.2.80", "10.8.0.66"}  # and neither silence nor a failure


def test_rule_45_two_networks_with_the_same_addresses_are_told_apart_by_their_links(lab: Lab) -> None:
    with contextlib.ExitStack() as stack:
        twin = add_twin(lab, stack)
        lab.control("dns", "tun1", "192.0.2.1")
        lab.control("domain", "tun1", "~twin.example")
        up_at = time.monotonic()
        lab.until(lambda: lab.ask("git.twin.example") == "192.0.2.99", up_at)
        assert lab.ask("c.public.example") == "192.0.2.80"
        assert lab.ask("none.twin.example") == "NXDOMAIN"
        assert lab.home.count("none.twin.example") == 0
        assert twin.count("public.example") == 0
        lab.host.ip("link", "del", "tun1")  # as a VPN that crashes
        down_at = time.monotonic()
        lab.until(lambda: "twin.example" not in _domains(lab), down_at)
        assert lab.ask("d.public.example") == "192.0.2.80"


def _domains(lab: Lab) -> set[str]:
    return {line["domain"] for line in lab.netstack.get("/v1/dns")["routes"]}
