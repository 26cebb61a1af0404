"""Names as programs look them up: getaddrinfo() of musl, and of glibc, in real guests behind `netstack run`.

The two differ in what they make of an answer. musl asks for A and AAAA at once, and takes NXDOMAIN or SERVFAIL of
either for the whole name; before 1.2.4 (Debian 12 has 1.2.3) it has no TCP and no EDNS, and takes the addresses that a
truncated answer has. glibc asks again by TCP. Most complaints about the peers' DNS are about these (vpnkit#509,
docker/for-mac#5088, apple/container#786, lima#380).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import Lab, keep_if_failed, open_lab
from tests.lab.namespaces import FAR4, HOST4, HOST6
from tests.lab.servers import Resolver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.guest import Guest

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq", "musl-gcc", "gcc"),
    pytest.mark.timeout(180),
    pytest.mark.slow,
]

# Of what the C libraries give: <netdb.h>. For a name without addresses of the family musl has the code of no name.
NO_NAME, TRY_AGAIN, NO_DATA = -2, -3, -5
MANY = [f"192.0.2.{number}" for number in range(1, 61)]  # 60 addresses: 1,000 bytes, twice what fits without EDNS

HOSTS = """\
127.0.0.1     localhost app.dev
192.0.2.77    nas.home.example NAS
2001:db8::77  nas.home.example
"""

SETTINGS = """\
[dns]
search = ["corp.example", "example.test"]
hosts_file = "{hosts}"

[[dns.route]]
domains = ["corp.example"]
upstreams = ["{corp}"]

[[dns.route]]
domains = ["silent.example"]
upstreams = ["192.0.2.250"]
"""


class Found(NamedTuple):
    """What a program was told."""

    status: int
    words: str
    addresses: list[str]


class Running(NamedTuple):
    """A guest, and which of the two programs it runs."""

    lab: Lab
    libc: str
    guest: Guest
    corp: Resolver

    def look_up(self, name: str, family: str = "0") -> Found:
        """getaddrinfo(); family 0 is both."""
        first, *rest = self.guest.check(f"/lab/lookup-{self.libc} {name} {family}").splitlines()
        status, _, words = first.partition(" ")
        return Found(int(status), words, rest)


@pytest.fixture(scope="module", params=("musl", "glibc"))
def running(request: pytest.FixtureRequest, machine: None) -> Iterator[Running]:
    libc: str = request.param
    for folder in keep_if_failed(request, f"c-library-{libc}"):
        with open_lab(folder) as lab:
            names = lab.folder / "names"
            names.write_text("".join(f"{address} many.corp.example\n" for address in MANY))
            options = (
                *("--local=/corp.example/", f"--addn-hosts={names}", "--host-record=git.corp.example,192.0.2.10"),
                "--cname=wiki.corp.example,git.corp.example",
            )
            corp = lab.stack.enter_context(Resolver(lab.world.far, folder, address=FAR4, options=options))
            hosts = lab.folder / "hosts"
            hosts.write_text(HOSTS)
            settings = lab.folder / "netstack.toml"
            settings.write_text(SETTINGS.format(hosts=hosts, corp=FAR4))
            lab.stack.enter_context(lab.netstack([lab.link("stream")], "-c", str(settings)))
            guest = lab.stack.enter_context(lab.guest("stream", 0))
            guest.configure()
            guest.wait_ipv6()
            yield Running(lab, libc, guest, corp)


def test_it_is_the_library_that_it_should_be(running: Running) -> None:
    dynamic = "ld-linux" in running.guest.check(f"strings /lab/lookup-{running.libc} | grep ld- || true")
    assert dynamic == (running.libc == "glibc")
    # The words are musl's own.
    assert (running.look_up("nobody.example.test").words == "Name does not resolve") == (running.libc == "musl")


def test_a_and_aaaa_and_both(running: Running) -> None:
    assert running.look_up("www.example.test", "4").addresses == [HOST4]
    assert running.look_up("www.example.test", "6").addresses == [HOST6]
    assert sorted(running.look_up("www.example.test").addresses) == sorted([HOST4, HOST6])
    assert running.look_up("WwW.Example.TEST.", "4").addresses == [HOST4]
    assert sorted(running.look_up("alias.example.test").addresses) == sorted([HOST4, HOST6])


def test_a_name_with_addresses_of_one_family_only_is_found(running: Running) -> None:
    """Rule 13: were the other family's answer NXDOMAIN, musl would not find the name at all."""
    assert running.look_up("v4only.example.test") == (0, "ok", [HOST4])
    assert running.look_up("v6only.example.test") == (0, "ok", [HOST6])
    assert running.look_up("v4only.example.test", "6").status in (NO_NAME, NO_DATA)
    assert running.look_up("host.netstack.internal", "4").addresses == ["192.168.5.2"]


def test_what_is_not_there_and_what_cannot_be_asked_are_different(running: Running) -> None:
    assert running.look_up("nobody.example.test").status == NO_NAME
    # Nobody answers there: after 4.5 s the gateway says so, before the library gives up or asks elsewhere.
    assert running.look_up("www.silent.example.", "4").status == TRY_AGAIN


def test_search_domains_complete_a_short_name(running: Running) -> None:
    assert re.search(r"search corp\.example example\.test", running.guest.check("cat /etc/resolv.conf"))
    assert running.look_up("git", "4").addresses == ["192.0.2.10"]
    assert running.look_up("v4only", "4").addresses == [HOST4], "the second of them"


def test_the_hosts_file_of_the_host_is_seen(running: Running) -> None:
    assert sorted(running.look_up("nas.home.example").addresses) == ["192.0.2.77", "2001:db8::77"]
    assert running.look_up("nas", "4").addresses == ["192.0.2.77"], "in any case of letters"
    # The host's loopback is reached at the gateway; the guest's own stays its own.
    assert running.look_up("app.dev", "4").addresses == ["192.168.5.2"]
    assert running.look_up("localhost", "4").addresses == ["127.0.0.1"]
    # Of several names for an address glibc takes the first, which is the canonical one, and musl the last.
    assert running.look_up("-x", "192.0.2.77").addresses == ["nas" if running.libc == "musl" else "nas.home.example"]


def test_split_dns_asks_only_the_server_of_the_domain(running: Running) -> None:
    assert running.look_up("git.corp.example", "4").addresses == ["192.0.2.10"]
    assert running.look_up("wiki.corp.example", "4").addresses == ["192.0.2.10"]
    assert running.look_up("nobody.corp.example").status == NO_NAME
    # glibc goes on with the search list: nobody.corp.example.example.test is not the company's.
    asked = [re.findall(r"query\[\w+\] (\S+) from", line)[0] for line in running.corp.queries()]
    assert "git.corp.example" in asked
    loops = re.compile(r"[0-9a-f]{32}\.test")  # our own question: netstack.dns.loops
    assert all(name.endswith("corp.example") or loops.fullmatch(name) for name in asked)
    others = [re.findall(r"query\[\w+\] (\S+) from", line)[0] for line in running.lab.resolver.queries()]
    assert others
    assert not any(name.endswith("corp.example") for name in others)


def test_an_answer_that_is_too_long_for_a_datagram_is_whole_by_tcp_or_has_what_fits(running: Running) -> None:
    """Rules 16 and 23: glibc asks again by TCP; musl takes what is there (resolved gives it 29, unbound none)."""
    status, _, addresses = running.look_up("many.corp.example", "4")
    assert status == 0
    assert set(addresses) <= set(MANY)
    assert len(set(addresses)) == len(addresses)
    if running.libc == "glibc":
        assert len(addresses) == len(MANY)
    else:
        assert len(addresses) >= 28
