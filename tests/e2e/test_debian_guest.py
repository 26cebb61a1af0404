"""A stock Debian kernel behind `netstack run`, on QEMU's stream socket and on a VDE switch: the main job, on real data.

The guests are booted once for each kind of link; the tests share them and leave them as they found them.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import MACS, Lab, keep_if_failed, open_lab
from tests.lab.namespaces import (
    BLACKHOLE4,
    FAR4,
    FAR6,
    HOST4,
    HOST6,
    PROHIBITED4,
    PROHIBITED6,
    ROUTER4,
    ROUTER6,
    UNREACHABLE4,
    UNREACHABLE6,
)
from tests.lab.rootfs.pattern import pattern_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.guest import Guest
    from tests.lab.netstack import Netstack

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq"), pytest.mark.timeout(180), pytest.mark.slow]

GATEWAY4, GATEWAY6 = "192.168.5.2", "fd00:c0a8:5::2"
DNS4, DNS6 = "192.168.5.3", "fd00:c0a8:5::3"
FIRST4, FIRST6 = "192.168.5.15", "fd00:c0a8:5::15"
# The guest's address by SLAAC: the prefix and the EUI-64 of its MAC (RFC 4291, appendix A).
SLAAC6 = "fd00:c0a8:5:0:5054:ff:fe12:3401"
MB = 1_000_000


class Running(NamedTuple):
    """A lab with a netstack and a guest that has its addresses."""

    lab: Lab
    kind: str
    netstack: Netstack
    guest: Guest
    lease: dict[str, str]


@pytest.fixture(scope="module", params=("stream", "vde"))
def running(request: pytest.FixtureRequest, machine: None) -> Iterator[Running]:
    kind: str = request.param
    for folder in keep_if_failed(request, f"debian-{kind}"):
        with open_lab(folder) as lab:
            netstack = lab.stack.enter_context(lab.netstack([lab.link(kind)]))
            guest = lab.stack.enter_context(lab.guest(kind, 0))
            lease = guest.configure()
            guest.wait_ipv6()
            yield Running(lab, kind, netstack, guest, lease)


@pytest.fixture(scope="module")
def second(running: Running) -> Iterator[Guest]:
    """Another guest on the same netstack, with its addresses."""
    with running.lab.guest(running.kind, 1) as guest:
        guest.configure()
        guest.wait_ipv6()
        yield guest


# ---- addresses ----


def test_dhcp_gives_the_first_address_and_every_option(running: Running) -> None:
    lease = running.lease
    assert lease["ip"] == FIRST4
    assert lease["subnet"] == "255.255.255.0"
    assert lease["broadcast"] == "192.168.5.255"
    assert lease["router"] == GATEWAY4
    assert lease["dns"] == DNS4
    assert lease["ntpsrv"] == GATEWAY4
    assert lease["serverid"] == GATEWAY4
    assert "example.test" in lease["search"], "the host's search list"
    assert int(lease["lease"]) >= 600
    # A VDE switch passes frames of 9,014 bytes (wire formats of vdeplug); QEMU's stream socket whole packets of IP.
    assert int(lease["mtu"]) == (65520 if running.kind == "stream" else 9000)


def test_a_lease_is_renewed_and_given_back(running: Running) -> None:
    guest = running.guest
    guest.check("udhcpc -i eth0 -f -s /lab/udhcpc.sh -p /run/udhcpc.pid >/run/udhcpc.log 2>&1 &")
    guest.wait_for("grep -q obtained /run/udhcpc.log")
    guest.check("kill -USR1 $(cat /run/udhcpc.pid)")  # renew, by unicast
    guest.wait_for("[ $(grep -c obtained /run/udhcpc.log) = 2 ]")
    assert "sending renew to server 192.168.5.2" in guest.check("cat /run/udhcpc.log")
    guest.check("kill -USR2 $(cat /run/udhcpc.pid)")  # release
    guest.wait_for("grep -q released /run/udhcpc.log")
    guest.check("kill $(cat /run/udhcpc.pid)")
    # With -a it looks by ARP whether anybody has the address: nobody may answer for it.
    guest.check("udhcpc -i eth0 -f -n -q -a -s /lab/udhcpc.sh")
    assert guest.variables("/run/lease")["ip"] == FIRST4
    guest.configure()


@pytest.mark.needs("dhclient")
def test_another_dhcp_client_gets_the_same(running: Running) -> None:
    # ISC's: /bin/true for its script, because the address is set already.
    guest = running.guest
    guest.check("dhclient -4 -1 -sf /bin/true -lf /run/leases4 -pf /run/pid4 eth0", 40)
    guest.check("kill $(cat /run/pid4)")
    lease = guest.check("cat /run/leases4")
    for line in (
        f"fixed-address {FIRST4};",
        f"option routers {GATEWAY4};",
        f"option domain-name-servers {DNS4};",
        f"option interface-mtu {running.lease['mtu']};",
        "option broadcast-address 192.168.5.255;",
    ):
        assert line in lease


def test_the_interface_has_what_the_lease_says(running: Running) -> None:
    assert f"mtu {running.lease['mtu']} " in running.guest.check("ip link show dev eth0")
    assert f"default via {GATEWAY4} dev eth0" in running.guest.check("ip route")


def test_router_advertisement_gives_prefix_route_and_mtu(running: Running) -> None:
    assert SLAAC6 in running.guest.addresses()
    route = running.guest.check("ip -6 route show default")
    assert re.match(r"default via fe80::\S+ dev eth0 proto ra", route)
    facts = running.guest.probe("router")
    assert facts["prefixes"] == ["fd00:c0a8:5::/64"]
    assert facts["dns"] == [DNS6]
    assert "example.test" in facts["search"], "the host's search list"
    assert facts["mtu"] == int(running.lease["mtu"])
    assert facts["lifetime"] > 0


@pytest.mark.needs("dhclient")
def test_dhcpv6_gives_an_address(running: Running) -> None:
    guest = running.guest
    guest.check("dhclient -6 -1 -sf /lab/dhclient6.sh -lf /run/leases6 -pf /run/pid6 eth0", 40)
    lease = guest.variables("/run/lease6")
    assert lease["new_ip6_address"] == FIRST6
    assert lease["new_dhcp6_name_servers"] == DNS6
    assert "example.test" in lease["new_dhcp6_domain_search"]
    guest.wait_for("! ip -6 addr show dev eth0 | grep -q tentative")
    assert FIRST6 in guest.addresses()
    guest.check(f"ping -c 1 -W 5 -I {FIRST6} {GATEWAY6}")


# ---- ICMP ----


@pytest.mark.parametrize(
    "address", (GATEWAY4, DNS4, GATEWAY6, DNS6, HOST4, HOST6, ROUTER4, ROUTER6, FAR4, FAR6), ids=str
)
def test_ping(running: Running, address: str) -> None:
    output = running.guest.check(f"ping -c 3 -i 0.2 -W 5 {address}")
    assert " 0% packet loss" in output


@pytest.mark.parametrize("address", (GATEWAY4, GATEWAY6, HOST4, HOST6))
@pytest.mark.parametrize("size", (0, 1472, 8000, 60000))
def test_ping_of_any_size(running: Running, address: str, size: int) -> None:
    output = running.guest.check(f"ping -c 1 -W 5 -s {size} {address}")
    assert " 0% packet loss" in output


def test_ping_the_link_local_gateway(running: Running) -> None:
    route = running.guest.check("ip -6 route show default")
    router = route.split()[2]
    assert " 0% packet loss" in running.guest.check(f"ping -c 1 -W 5 {router}%eth0")


@pytest.mark.parametrize(("far", "router"), ((FAR4, ROUTER4), (FAR6, ROUTER6)))
def test_ping_whose_ttl_ends_at_the_router(running: Running, far: str, router: str) -> None:
    status, output = running.guest.run(f"ping -c 1 -W 5 -t 2 {far}")
    assert status == 1
    assert f"From {router}" in output
    assert "Time to live exceeded" in output or "Hop limit" in output


@pytest.mark.parametrize(
    ("far", "hops"), ((FAR4, [GATEWAY4, ROUTER4, FAR4]), (FAR6, [GATEWAY6, ROUTER6, FAR6])), ids=("IPv4", "IPv6")
)
def test_traceroute_shows_every_hop(running: Running, far: str, hops: list[str]) -> None:
    program = "traceroute6" if ":" in far else "traceroute"
    output = running.guest.check(f"{program} -n -q 1 -w 5 -m 5 {far}", 60)
    seen = [line.split()[1] for line in output.splitlines() if re.match(r"\s*\d+ ", line)]
    assert seen == hops, output


@pytest.mark.parametrize("target", (UNREACHABLE4, UNREACHABLE6, PROHIBITED4, PROHIBITED6))
def test_what_cannot_be_reached_is_known_at_once(running: Running, target: str) -> None:
    found = running.guest.probe("connect", target, 80)
    assert found["error"] in {"EHOSTUNREACH", "ENETUNREACH", "EACCES"}, found
    assert found["seconds"] < 3


@pytest.mark.parametrize("target", (HOST4, HOST6, GATEWAY4, GATEWAY6, FAR4))
def test_a_refused_connection_is_refused_at_once(running: Running, target: str) -> None:
    found = running.guest.probe("connect", target, 444)
    assert found["error"] == "ECONNREFUSED"
    assert found["seconds"] < 2


@pytest.mark.parametrize("target", (HOST4, HOST6, FAR4, FAR6))
def test_a_closed_udp_port_is_reported(running: Running, target: str) -> None:
    found = running.guest.probe("udp", target, 444, 100)
    assert found["error"] == "ECONNREFUSED", found


def test_a_black_hole_stalls_nobody_else(running: Running) -> None:
    guest = running.guest
    guest.check(f"for n in 1 2 3 4 5 6 7 8; do (nc -w 20 {BLACKHOLE4} 80 >/dev/null 2>&1 &) ; done")
    start = time.monotonic()
    assert guest.probe("echo", HOST4, 7, 100_000)["same"]
    assert time.monotonic() - start < 10
    guest.run("kill $(pidof nc)")


# ---- names ----


@pytest.mark.parametrize("server", (DNS4, GATEWAY4, DNS6, GATEWAY6))
@pytest.mark.parametrize("transport", ("udp", "tcp"))
def test_dns(running: Running, server: str, transport: str) -> None:
    def ask(name: str, kind: str) -> dict[str, object]:
        return running.guest.probe("dns", server, name, kind, transport)

    assert ask("www.example.test", "A")["answers"] == [HOST4]
    assert ask("www.example.test", "AAAA")["answers"] == [HOST6]
    assert ask("alias.example.test", "A")["answers"] == [HOST4]
    assert ask("small.example.test", "TXT")["answers"] == ["a small text"]
    nothing = ask("v4only.example.test", "AAAA")
    assert (nothing["code"], nothing["answers"]) == (0, [])
    assert ask("nobody.example.test", "A")["code"] == 3  # NXDOMAIN


def test_a_big_answer_is_truncated_over_udp_and_whole_over_tcp(running: Running) -> None:
    assert running.guest.probe("dns", DNS4, "big.example.test", "TXT", "udp")["truncated"]
    whole = running.guest.probe("dns", DNS4, "big.example.test", "TXT", "tcp")
    assert not whole["truncated"]
    assert len(whole["answers"]) == 40
    assert whole["answers"][39].startswith("039.")


def test_the_guests_own_resolver_finds_names(running: Running) -> None:
    assert HOST4 in running.guest.check("nslookup www.example.test")
    assert HOST4 in running.guest.check("ping -4 -c 1 www"), "by the search list"


# ---- TCP ----


@pytest.mark.parametrize(
    "host", ("www.example.test", HOST4, f"[{HOST6}]", GATEWAY4, f"[{GATEWAY6}]", FAR4, f"[{FAR6}]", "far.example.test")
)
def test_wget_fetches_a_page(running: Running, host: str) -> None:
    assert "Hello, guest." in running.guest.check(f"wget -q -O - http://{host}/", 20)


def test_curl_talks_http_over_a_kept_connection(running: Running) -> None:
    output = running.guest.check(
        f"curl -sS --max-time 20 http://{HOST4}/ http://{HOST4}/headers http://{HOST4}/bytes/10 | wc -c"
    )
    assert int(output) > 100


@pytest.mark.parametrize(("host", "size"), ((HOST4, 100 * MB), (HOST6, 20 * MB), (GATEWAY4, 5 * MB), (FAR6, 5 * MB)))
def test_upload(running: Running, host: str, size: int) -> None:
    found = running.guest.probe("upload", host, 80, size, timeout=120)
    assert found["length"] == size
    assert found["sha256"] == pattern_digest(size)
    print(f"upload {size / MB:.0f} MB to {host}: {size * 8e-6 / found['seconds']:.0f} Mbit/s")


@pytest.mark.parametrize(("host", "size"), ((HOST4, 100 * MB), (HOST6, 20 * MB), (GATEWAY6, 5 * MB), (FAR4, 5 * MB)))
def test_download(running: Running, host: str, size: int) -> None:
    found = running.guest.probe("download", host, 80, size, timeout=120)
    assert found["length"] == size
    assert found["sha256"] == pattern_digest(size)
    print(f"download {size / MB:.0f} MB from {host}: {size * 8e-6 / found['seconds']:.0f} Mbit/s")


@pytest.mark.parametrize("host", (HOST4, HOST6, GATEWAY4, FAR6))
@pytest.mark.parametrize("size", (0, 1, 2 * MB))
def test_half_close(running: Running, host: str, size: int) -> None:
    # The echo server goes on until our half is closed, and we read until its half is.
    found = running.guest.probe("echo", host, 7, size)
    assert found == {"received": size, "same": True}


def test_many_connections_at_once(running: Running) -> None:
    assert running.guest.probe("many", HOST4, 7, 300, timeout=60) == {"good": 300}


def test_a_connection_that_the_guest_drops_is_reset_at_the_host(running: Running) -> None:
    before = len(running.lab.servers.events)
    assert running.guest.probe("reset", HOST4, 9) == {"reset": True}
    event = _new_event(running, before, event="tcp-error", local=9)
    assert event["error"] == "ConnectionResetError"


def _new_event(running: Running, before: int, **facts: object) -> dict[str, object]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for event in running.lab.servers.events[before:]:
            if facts.items() <= event.items():
                return event
        time.sleep(0.05)
    raise AssertionError(f"no event {facts} in {running.lab.servers.events[before:]}")


# ---- UDP ----


@pytest.mark.parametrize("host", (HOST4, HOST6, GATEWAY4, GATEWAY6, FAR4, FAR6))
@pytest.mark.parametrize("size", (0, 1, 1400, 8000, 60000))
def test_udp_echo(running: Running, host: str, size: int) -> None:
    found = running.guest.probe("udp", host, 7, size, 3)
    assert (found.get("answered"), found.get("lost")) == (3, 0), found


@pytest.mark.parametrize("far", (FAR4, FAR6))
def test_the_guest_learns_the_path_mtu(running: Running, far: str) -> None:
    # The router's link to the far side takes 1,400 bytes (FAR_MTU), the guest's own takes more, and Linux sets DF.
    running.guest.probe("udp", far, 7, 1400)
    assert "mtu 1400" in running.guest.check(f"ip route get {far}")


def test_udp_keeps_the_guests_source_port(running: Running) -> None:
    found = running.guest.probe("udp", HOST4, 13, 1, 1, 5, 40123)
    assert found["text"].split() == [HOST4, "40123"], "the host sees its own address, and the guest's port"


def test_sntp_tells_the_hosts_time(running: Running) -> None:
    for server in (GATEWAY4, GATEWAY6):
        found = running.guest.probe("sntp", server)
        assert (found["mode"], found["version"], found["echoed"]) == (4, 4, True)
        assert 1 <= found["stratum"] <= 15
        assert found["leap"] != 3, "3: the clock is not set"
        # QEMU's clock starts as the host's; what differs is the time that the guest took.
        assert abs(found["time"] - time.time()) < 30


# ---- another guest ----


def test_two_guests_reach_each_other(running: Running, second: Guest) -> None:
    other4 = next(address for address in second.addresses() if address.startswith("192.168.5."))
    other6 = next(address for address in second.addresses() if address.startswith("fd00:"))
    assert other4 == "192.168.5.16"
    for address in (other4, other6):
        assert " 0% packet loss" in running.guest.check(f"ping -c 2 -i 0.2 -W 5 {address}")
    assert " 0% packet loss" in second.check(f"ping -c 2 -i 0.2 -W 5 {FIRST4}")
    second.check("python3 /lab/probe.py serve 4000 >/run/serve.log 2>&1 & echo $! >/run/serve.pid")
    try:
        for address in (other4, other6):
            running.guest.wait_for(f"nc -w 2 {address} 4000 </dev/null")
            assert running.guest.probe("many", address, 4000, 20) == {"good": 20}
            assert running.guest.probe("udp", address, 4000, 5000, 2)["answered"] == 2
    finally:
        second.run("kill $(cat /run/serve.pid)")


def test_a_broadcast_reaches_the_other_guest(running: Running, second: Guest) -> None:
    second.check("sysctl -w net.ipv4.icmp_echo_ignore_broadcasts=0")
    output = running.guest.check("ping -b -c 2 -i 0.2 -W 3 192.168.5.255")
    assert "from 192.168.5.16" in output


def test_the_second_guest_has_the_world_too(running: Running, second: Guest) -> None:
    assert "Hello, guest." in second.check(f"wget -q -O - http://{HOST4}/", 20)
    assert second.probe("udp", FAR6, 7, 1400)["answered"] == 1


# ---- what the host sees ----


def test_status_shows_link_guests_and_flows(running: Running) -> None:
    running.guest.check(f"(sleep 20 | nc {HOST4} 9) >/dev/null 2>&1 &")
    deadline = time.monotonic() + 10
    while True:
        status = running.netstack.status()
        flows = [flow for flow in status["flows"]["list"] if flow["peer"].endswith(f"{HOST4}:9")]
        if flows or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert flows, status["flows"]
    assert flows[0]["guest"].startswith(f"{FIRST4}:")
    assert flows[0]["protocol"] == "tcp"
    guests = {guest["mac"]: guest for guest in status["guests"]}
    assert FIRST4 in guests[MACS[0]]["addresses"]
    assert sum(link["guests"] for link in status["links"]) >= 1
    assert status["network"]["gateway"] == GATEWAY4


# ---- a guest that comes back ----


def test_a_reset_guest_gets_its_address_again(running: Running) -> None:
    guest = running.guest
    guest.reset()
    lease = guest.configure()
    assert lease["ip"] == FIRST4
    guest.wait_for(f"ip -6 addr show dev eth0 | grep -q {SLAAC6}")
    guest.wait_for("! ip -6 addr show dev eth0 | grep -q tentative")
    assert "Hello, guest." in guest.check(f"wget -q -O - http://{HOST4}/", 20)
    assert "Hello, guest." in guest.check(f"wget -q -O - http://[{HOST6}]/", 20)


def test_a_guest_that_vanished_and_came_back_gets_its_address_again(running: Running) -> None:
    guest = running.guest
    guest.stop()
    guest.start()
    assert guest.configure()["ip"] == FIRST4
    assert "Hello, guest." in guest.check(f"wget -q -O - http://{HOST4}/", 20)


def test_netstack_has_complained_about_nothing(running: Running) -> None:
    # The last of the file: all that went before was ordinary use.
    lines = running.netstack.log.splitlines()
    complaints = [line for line in lines if re.search(r"Traceback|\[(error|critical)|Error:", line)]
    assert not complaints
    assert running.netstack.stop() == 0
