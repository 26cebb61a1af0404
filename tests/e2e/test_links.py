"""Every kind of link with a real QEMU at its other end; iPXE as the guest, for it is there in a second."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import MACS, Lab
from tests.lab.guest import Nic, stream_nic, vde_nic
from tests.lab.ipxe import Ipxe
from tests.lab.namespaces import HOST4, wait_until
from tests.lab.rootfs.pattern import pattern_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.lab.netstack import Netstack

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq"), pytest.mark.timeout(180), pytest.mark.slow]


def check_network(lab: Lab, nic: Nic, prefix: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> None:
    """Boot iPXE on `nic`, and see that it gets an address and a page."""
    events = len(lab.servers.events)
    with Ipxe(nic, lab.folder, prefix=prefix, pass_fds=pass_fds) as ipxe:
        assert ipxe.run("dhcp", 60).endswith("ok")
        assert "192.168.5.15/255.255.255.0" in ipxe.run("route")
        assert ipxe.run(f"imgfetch http://{HOST4}/").endswith("ok")
    assert any(event["event"] == "http" for event in lab.servers.events[events:])


def is_connected(netstack: Netstack) -> bool:
    return any(link["connected"] for link in netstack.status()["links"])


def test_qemu_listens_and_netstack_connects_whenever_it_is_there(lab: Lab) -> None:
    nic = stream_nic(lab.socket, MACS[0], server=True)
    # netstack first: its socket has yet to appear; then QEMU ends, and another one comes.
    with lab.netstack([f"connect+unix://{lab.socket}"]) as netstack:
        assert not is_connected(netstack)
        for _ in range(2):
            check_network(lab, nic)
            wait_until(lambda: not is_connected(netstack), "netstack to see that QEMU has gone")


def test_tcp(lab: Lab) -> None:
    nic = Nic("stream,server=off,addr.type=inet,addr.host=127.0.0.1,addr.port=5555", MACS[0])
    with lab.netstack(["tcp://127.0.0.1:5555"]):
        check_network(lab, nic, prefix=lab.world.host.words())


def test_tcp_where_qemu_listens(lab: Lab) -> None:
    nic = Nic("stream,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port=5556", MACS[0])
    with lab.netstack(["connect+tcp://127.0.0.1:5556"]):
        check_network(lab, nic, prefix=lab.world.host.words())


def test_a_descriptor_that_both_inherit(lab: Lab) -> None:
    ours, qemus = socket.socketpair()
    with ours, qemus, lab.netstack([f"fd://{ours.fileno()}"], pass_fds=[ours.fileno()]):
        nic = Nic(f"stream,addr.type=fd,addr.str={qemus.fileno()},server=off", MACS[0])
        check_network(lab, nic, pass_fds=[qemus.fileno()])


def test_the_legacy_socket_netdev(lab: Lab) -> None:
    ours, qemus = socket.socketpair()
    with ours, qemus, lab.netstack([f"fd://{ours.fileno()}"], pass_fds=[ours.fileno()]):
        check_network(lab, Nic(f"socket,fd={qemus.fileno()}", MACS[0]), pass_fds=[qemus.fileno()])


def test_two_links_are_one_network(lab: Lab) -> None:
    with (
        lab.netstack([f"unix://{lab.socket}", f"vde://{lab.switch}"]) as netstack,
        Ipxe(vde_nic(lab.switch, MACS[0]), lab.folder) as ipxe,
    ):
        assert ipxe.run("dhcp", 60).endswith("ok")
        kernel = lab.kernel_guest(1)
        # iPXE answers while it waits for the next command.
        assert " 0% packet loss" in kernel.run("ping", "-c", "3", "-i", "0.2", "-W", "5", "192.168.5.15").stdout
        found = {guest["mac"]: guest for guest in netstack.status()["guests"]}
        assert "192.168.5.15" in found[MACS[0]]["addresses"]
        assert "192.168.5.16" in found[MACS[1]]["addresses"]
        assert found[MACS[0]]["link"] != found[MACS[1]]["link"]


def test_a_guest_hears_that_a_packet_is_too_big_for_the_others_link(lab: Lab) -> None:
    with (
        lab.netstack([f"unix://{lab.socket}", f"vde://{lab.switch}"]),
        Ipxe(vde_nic(lab.switch, MACS[0]), lab.folder) as ipxe,
    ):
        assert ipxe.run("dhcp", 60).endswith("ok")
        kernel = lab.kernel_guest(1)
        # Its own MTU is 65,520, and that of a VDE switch 9,000.
        output = kernel.run("ping", "-c", "1", "-W", "2", "-M", "do", "-s", "20000", "192.168.5.15", check=False).stdout
        assert "mtu = 9000" in output or "mtu=9000" in output


def test_a_guest_that_comes_back_goes_on_where_it_was(lab: Lab, tmp_path: Path) -> None:
    with lab.netstack([f"unix://{lab.socket}"]):
        guest = lab.kernel_guest()
        # It only receives: whatever it is to get on its new connection, netstack has to send by itself.
        got = tmp_path / "got"
        words = ("curl", "-s", "-S", "--limit-rate", "4M", "-o", got, f"http://{HOST4}/bytes/12000000")
        download = guest.popen(*words, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: got.exists() and got.stat().st_size > 1_000_000, "the download to be on its way")
        guest.unplug()
        guest.plug_in()
        lab.set_addresses(guest, 0)
        _, errors = download.communicate(timeout=60)
        assert (download.returncode, errors) == (0, "")
        assert hashlib.sha256(got.read_bytes()).hexdigest() == pattern_digest(12_000_000)


def test_a_frame_of_a_bad_length_ends_that_link_alone(lab: Lab) -> None:
    with lab.netstack([f"unix://{lab.socket}"]) as netstack, socket.socket(socket.AF_UNIX) as liar:
        good = lab.kernel_guest()
        good.run("ping", "-c", "1", "-W", "5", "192.168.5.2")
        liar.connect(str(lab.socket))
        liar.sendall(b"\xff\xff\xff\xff" + bytes(100))
        liar.settimeout(10)
        while liar.recv(1 << 16):
            pass
        good.run("ping", "-c", "1", "-W", "5", "192.168.5.2")
        assert good.probe("echo", HOST4, 7, 100_000) == {"received": 100_000, "same": True}
        assert "4294967295" in netstack.log


def test_a_guest_that_does_not_read_costs_little_and_stalls_nobody(lab: Lab) -> None:
    with lab.netstack([f"unix://{lab.socket}"]) as netstack, socket.socket(socket.AF_UNIX) as deaf:
        good = lab.kernel_guest()
        deaf.connect(str(lab.socket))
        # It claims an address, and then everybody talks to it.
        mac = bytes.fromhex(MACS[1].replace(":", ""))
        arp = bytes.fromhex("0001080006040001") + mac + bytes([192, 168, 5, 16]) + bytes(6) + bytes([192, 168, 5, 2])
        frame = b"\xff" * 6 + mac + b"\x08\x06" + arp
        deaf.sendall(len(frame).to_bytes(4, "big") + frame)
        good.ip("neigh", "replace", "192.168.5.16", "lladdr", MACS[1], "dev", good.tap)
        before = netstack.memory()
        flood = good.popen("ping", "-f", "-q", "-s", "60000", "192.168.5.16", stdout=subprocess.DEVNULL)

        def dropped() -> int:
            status = netstack.status()
            by_links = sum(int(link.get("drops_to_guest", 0)) for link in status["links"])
            return by_links + sum(int(count) for count in status["drops"].values())

        try:
            wait_until(lambda: dropped() > 100, "frames for the deaf guest to be dropped and counted", 20)
            start = time.monotonic()
            assert good.probe("download", HOST4, 80, 50_000_000)["length"] == 50_000_000
            assert time.monotonic() - start < 20
        finally:
            flood.terminate()
            flood.wait()
        assert netstack.memory() - before < 64 << 20
