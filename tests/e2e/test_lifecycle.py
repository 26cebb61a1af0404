"""netstack as a service: it starts, ends and starts again, on hosts of several kinds; the guests live through it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import MACS, Lab, keep_if_failed, open_lab
from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, output_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.namespaces import TapNamespace

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq"), pytest.mark.timeout(180), pytest.mark.slow]

GATEWAY4, GATEWAY6 = "192.168.5.2", "fd00:c0a8:5::2"


# Opens a connection, says so, and says so when it has ended.
HOLD_OPEN = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 9))
print("open", flush=True)
try:
    connection.recv(1)
except ConnectionResetError:
    pass
print("ended", flush=True)
"""


def ping(guest: TapNamespace, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    return guest.run("ping", "-c", "1", "-W", "5", *options, address, check=False)


# ---- a restart ----


def test_leases_survive_a_restart_and_a_fresh_qemu_gets_its_own(lab: Lab, tmp_path: Path) -> None:
    link = lab.link("stream")
    with lab.netstack([link], state=tmp_path), lab.guest("stream", 0) as one, lab.guest("stream", 1) as other:
        assert one.configure()["ip"] == "192.168.5.15"
        assert other.configure()["ip"] == "192.168.5.16"
    # Everything has ended. The one that came second is now the only one, and its address is not the first.
    with lab.netstack([link], state=tmp_path), lab.guest("stream", 1) as other:
        assert other.configure()["ip"] == "192.168.5.16"
        assert "Hello, guest." in other.check(f"wget -q -O - http://{HOST4}/", 20)


def test_a_crash_loses_no_lease_and_no_socket(lab: Lab, tmp_path: Path) -> None:
    netstack = lab.netstack([lab.link("stream"), lab.link("vde")], state=tmp_path)
    netstack.start()
    with lab.guest("stream", 1) as guest:
        assert guest.configure()["ip"] == "192.168.5.15"
        # Half a second after the change, and a disk's time.
        wait_until(
            lambda: any(MACS[1] in file.read_text() for file in tmp_path.rglob("leases-*.json")),
            "the lease to be written",
        )
    netstack.kill()
    assert lab.socket.exists(), "a socket without a listener is what a crash leaves"
    # It takes the places over that its predecessor could not clear.
    with lab.netstack([lab.link("stream"), lab.link("vde")], state=tmp_path), lab.guest("vde", 0) as guest:
        assert guest.configure()["ip"] == "192.168.5.16", "the other guest's lease stands"


# ---- the end ----


def test_sigterm_ends_it_at_once_and_cleanly_whatever_is_open(lab: Lab) -> None:
    netstack = lab.netstack([lab.link("stream"), lab.link("vde")])
    netstack.start()
    guest = lab.kernel_guest()
    idle = guest.popen("python3", "-c", HOLD_OPEN, HOST4, stdout=subprocess.PIPE, text=True)
    busy = guest.popen("curl", "-s", "-o", "/dev/null", f"http://{HOST4}/bytes/4000000000")
    assert output_of(idle).readline() == "open\n"
    lab.servers.wait_event(event="http", path="/bytes/4000000000")
    start = time.monotonic()
    assert netstack.stop() == 0
    assert time.monotonic() - start < 2
    assert output_of(idle).readline() == "ended\n", "the guest is told"
    assert not lab.socket.exists()
    assert not lab.switch.exists()
    for process in (busy, idle):
        process.kill()
        process.communicate()
    # The host's side sees its connections end too.
    wait_until(
        lambda: [e for e in lab.servers.events if e["event"] in {"tcp-close", "tcp-error"} and e["local"] == 9],
        "the server on the host to see the end",
    )


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=lambda number: number.name)
def test_either_signal_is_a_normal_end(lab: Lab, number: signal.Signals) -> None:
    netstack = lab.netstack([lab.link("stream")])
    netstack.start()
    assert netstack.process is not None
    netstack.process.send_signal(number)
    assert netstack.process.wait(5) == 0


def test_it_is_ready_in_half_a_second(lab: Lab) -> None:
    # Not a timed test: a machine under load is given ten times as long.
    with lab.netstack([lab.link("stream")]) as netstack:
        assert netstack.ready_after < 5
        assert any(line.startswith("ready") for line in netstack.log.splitlines())


# ---- hosts of several kinds ----


@pytest.fixture
def bare(request: pytest.FixtureRequest, machine: None) -> Iterator[Lab]:
    """A lab on a host that forbids ping sockets and has no IPv6 route."""
    for folder in keep_if_failed(request, request.node.name):
        with open_lab(folder, ping=False, ipv6_route=False) as lab:
            yield lab


def test_a_host_without_ping_sockets_says_so_and_answers_prohibited(bare: Lab) -> None:
    with bare.netstack([bare.link("stream")]) as netstack:
        guest = bare.kernel_guest()
        assert ping(guest, GATEWAY4).returncode == 0, "the gateway answers by itself"
        assert ping(guest, GATEWAY6).returncode == 0
        for _ in range(3):
            assert "Packet filtered" in ping(guest, FAR4).stdout
        assert "prohibited" in ping(guest, FAR6).stdout or "No route" in ping(guest, FAR6).stdout
        lines = [line for line in netstack.log.splitlines() if "ping_group_range" in line]
        assert len(lines) == 1, "once, with the setting that mends it"
        assert guest.probe("echo", HOST4, 7, 1000)["same"]


def test_without_an_ipv6_route_it_is_no_ipv6_router(bare: Lab) -> None:
    with bare.netstack([bare.link("stream")]):
        guest = bare.kernel_guest()
        facts = wait_until(
            lambda: found if "error" not in (found := guest.probe("router", guest.tap)) else None,
            "a router advertisement",
        )
        assert facts["lifetime"] == 0
        assert facts["prefixes"] == ["fd00:c0a8:5::/64"]
        # What the host itself can reach, a guest with a route of its own can too.
        assert guest.probe("echo", HOST6, 7, 1000)["same"]
        assert guest.probe("connect", FAR6, 80)["error"] in {"ENETUNREACH", "EHOSTUNREACH"}


def test_no_host_loopback(lab: Lab) -> None:
    with lab.netstack([lab.link("stream")], "--no-host-loopback"):
        guest = lab.kernel_guest()
        for gateway in (GATEWAY4, GATEWAY6):
            assert ping(guest, gateway).returncode == 0
            found = guest.probe("connect", gateway, 8080)
            assert found["error"] == "ENETUNREACH"
            assert found["seconds"] < 2
            # Linux keeps this ICMP error from a UDP socket that did not ask for it (IP_RECVERR).
            assert guest.probe("udp", gateway, 7, 10, 1, 1)["lost"] == 1
            assert guest.probe("dns", gateway, "www.example.test", "A")["answers"] == [HOST4]
        assert guest.probe("echo", HOST4, 7, 1000)["same"]


def test_a_network_that_the_host_has_already_is_not_taken(lab: Lab) -> None:
    lab.world.host.add_address("eth0", "192.168.5.77/24")
    with lab.netstack([lab.link("stream")]) as netstack:
        network = netstack.status()["network"]
        assert network["subnet"] != "192.168.5.0/24"
        assert "192.168.5.0/24" in netstack.log, "it says so"
    with pytest.raises(RuntimeError, match=r"192\.168\.5\.0/24"):
        lab.netstack([lab.link("stream")], "--subnet", "192.168.5.0/24").start()


def test_the_nameserver_is_read_again_when_it_changes(lab: Lab) -> None:
    from tests.lab.servers import Resolver

    with (
        lab.netstack([lab.link("stream")]),
        Resolver(lab.world.host, lab.folder, address="127.0.0.54", www="203.0.113.1"),
    ):
        guest = lab.kernel_guest()
        assert guest.probe("dns", GATEWAY4, "www.example.test", "A")["answers"] == [HOST4]
        lab.world.resolv_conf.write_text("nameserver 127.0.0.54\n")
        wait_until(
            lambda: guest.probe("dns", GATEWAY4, "www.example.test", "A")["answers"] == [FAR4],
            "the new nameserver to be asked",
        )


# ---- what it writes ----


@pytest.mark.needs("tshark")
def test_the_pcap_holds_all_and_tshark_finds_nothing_malformed(lab: Lab, tmp_path: Path) -> None:
    pcap = tmp_path / "all.pcapng"
    with lab.netstack([lab.link("stream"), lab.link("vde")], "--pcap", str(pcap)), lab.guest("stream", 0) as guest:
        guest.configure()
        guest.wait_ipv6()
        guest.check(f"ping -c 2 -i 0.2 {FAR4}; ping -c 1 {FAR6}; traceroute -n -q 1 -m 4 {FAR4}", 60)
        assert guest.probe("dns", GATEWAY4, "big.example.test", "TXT", "tcp")["answers"]
        assert guest.probe("download", HOST4, 80, 5_000_000)["length"] == 5_000_000
        assert guest.probe("udp", FAR6, 7, 9000)["answered"] == 1
        assert guest.probe("sntp", GATEWAY4)["mode"] == 4
        assert guest.probe("connect", HOST4, 444)["error"] == "ECONNREFUSED"
    shutil.copy(pcap, lab.folder / "all.pcapng")

    def tshark(*words: str) -> str:
        command = ("tshark", "-n", "-r", str(pcap), *words)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    assert tshark("-Y", "_ws.malformed || _ws.short") == ""
    check = [word for layer in ("ip", "tcp", "udp") for word in ("-o", f"{layer}.check_checksum:TRUE")]
    bad = " || ".join(f"{layer}.checksum.status == 0" for layer in ("ip", "tcp", "udp", "icmp", "icmpv6"))
    assert tshark(*check, "-Y", bad) == "", "every checksum is right, both ways"
    for what in ("dhcp", "icmpv6.type == 134", "dns", "ntp", "icmp.type == 11", "http", "udp.port == 7"):
        assert tshark("-Y", what, "-c", "2000"), f"{what} is in the pcap"
    assert (
        "unix://"
        in subprocess.run(("capinfos", str(pcap)), check=True, capture_output=True, text=True, timeout=30).stdout
    ), "an interface for each link, named"


def test_a_pid_file_while_it_runs(lab: Lab, tmp_path: Path) -> None:
    pidfile = tmp_path / "netstack.pid"
    with lab.netstack([lab.link("stream")], "--pidfile", str(pidfile)) as netstack:
        assert netstack.process is not None
        assert int(pidfile.read_text()) == netstack.process.pid
    assert not pidfile.exists()
