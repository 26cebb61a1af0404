"""A stock Debian kernel whose card is a vhost-user one: its memory is shared, and frames carry offload.

What guests do with their network is in test_debian_guest.py; here is what differs: the driver's life, and data.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import MACS, Lab, keep_if_failed, open_lab
from tests.lab.guest import Guest, vhost_user_nic
from tests.lab.ipxe import Ipxe
from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, wait_until
from tests.lab.rootfs.pattern import pattern_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.netstack import Netstack

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq"), pytest.mark.timeout(180), pytest.mark.slow]

FIRST4 = "192.168.5.15"
MB = 1_000_000

# virtio feature bits, as a guest's sysfs shows them: CSUM, GUEST_CSUM, GUEST_TSO4 and 6, HOST_TSO4 and 6, MRG_RXBUF,
# INDIRECT_DESC, EVENT_IDX, VERSION_1.
OFFLOAD = (0, 1, 7, 8, 11, 12, 15, 28, 29, 32)


class Running(NamedTuple):
    """A lab with a netstack and a guest that has its addresses."""

    lab: Lab
    netstack: Netstack
    guest: Guest


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, machine: None) -> Iterator[Running]:
    for folder in keep_if_failed(request, "vhost-user"):
        with open_lab(folder) as lab:
            netstack = lab.stack.enter_context(lab.netstack([lab.link("vhost-user")], "--mtu", "1500"))
            guest = lab.stack.enter_context(lab.guest("vhost-user", 0))
            guest.configure()
            guest.wait_ipv6()
            yield Running(lab, netstack, guest)


@pytest.fixture(scope="module")
def second(running: Running) -> Iterator[Guest]:
    """Another guest on the same netstack, with its addresses."""
    with running.lab.guest("vhost-user", 1) as guest:
        guest.configure()
        guest.wait_ipv6()
        yield guest


def link_of(netstack: Netstack) -> dict[str, int]:
    found: dict[str, int] = netstack.status()["links"][0]
    return found


def check_data(guest: Guest, size: int = 3 * MB, hosts: tuple[str, ...] = (HOST4, HOST6)) -> None:
    """Data in both directions arrives whole."""
    for host in hosts:
        for what in ("upload", "download"):
            found = guest.probe(what, host, 80, size, timeout=60)
            assert (found["length"], found["sha256"]) == (size, pattern_digest(size)), (what, host)


def test_the_driver_takes_all_offload(running: Running) -> None:
    features = running.guest.check("cat /sys/class/net/eth0/device/features").strip()
    assert [bit for bit in OFFLOAD if features[bit] != "1"] == []


def test_data_in_both_directions(running: Running) -> None:
    before = link_of(running.netstack)
    check_data(running.guest, 20 * MB)
    after = link_of(running.netstack)
    for way in ("from_guest", "to_guest"):
        frames, octets = (after[f"{kind}_{way}"] - before[f"{kind}_{way}"] for kind in ("frames", "bytes"))
        assert octets > 40 * MB
        # Half of the frames acknowledge. Without offload they would be of 1,500 bytes.
        assert octets / frames > 4000, (way, octets, frames)


def test_half_close_and_many_connections(running: Running) -> None:
    for host in (HOST4, HOST6, FAR4, FAR6):
        assert running.guest.probe("echo", host, 7, 500_000) == {"received": 500_000, "same": True}
    assert running.guest.probe("many", HOST4, 7, 100, timeout=60) == {"good": 100}


def test_datagrams_and_pings_of_any_size(running: Running) -> None:
    for host in (HOST4, HOST6):
        for size in (0, 1, 1400, 8000, 60000):
            found = running.guest.probe("udp", host, 7, size, 3)
            assert (found.get("answered"), found.get("lost")) == (3, 0), (host, size, found)
        for size in (0, 1472, 8000, 60000):
            assert " 0% packet loss" in running.guest.check(f"ping -c 1 -W 5 -s {size} {host}")


def test_two_guests_reach_each_other(running: Running, second: Guest) -> None:
    """Frames with unfinished checksums, and large ones, pass from one guest's memory to the other's."""
    other = next(address for address in second.addresses() if address.startswith("192.168.5."))
    assert " 0% packet loss" in running.guest.check(f"ping -c 2 -i 0.2 -W 5 {other}")
    second.check("python3 /lab/probe.py serve 4000 >/run/serve.log 2>&1 & echo $! >/run/serve.pid")
    try:
        running.guest.wait_for(f"nc -w 2 {other} 4000 </dev/null")
        assert running.guest.probe("echo", other, 4000, 2 * MB) == {"received": 2 * MB, "same": True}
        assert running.guest.probe("udp", other, 4000, 5000, 2)["answered"] == 2
    finally:
        second.run("kill $(cat /run/serve.pid)")
    check_data(second)


def test_the_driver_is_taken_out_and_put_in_again(running: Running) -> None:
    guest = running.guest
    module = "$(grep virtio_net /lib/modules/order)"
    for _ in range(3):
        guest.check("ip link set eth0 down && rmmod virtio_net")
        guest.check(f"insmod /lib/modules/{module}")
        guest.wait_for("ip link show dev eth0")
        assert guest.configure()["ip"] == FIRST4
    guest.wait_ipv6()
    check_data(guest)


def test_a_reset_guest_goes_on(running: Running) -> None:
    running.guest.reset()
    assert running.guest.configure()["ip"] == FIRST4
    running.guest.wait_ipv6()
    check_data(running.guest)


def test_a_netstack_that_is_restarted_is_found_again(running: Running) -> None:
    """QEMU looks for it every second; the guest's driver notices nothing but a cable out and in."""
    running.netstack.stop()
    assert running.guest.run(f"ping -c 1 -W 1 {HOST4}").status != 0
    running.netstack.start()
    wait_until(lambda: any(link["connected"] for link in running.netstack.status()["links"]), "QEMU to come back", 20)
    running.guest.wait_for(f"ping -c 1 -W 1 {HOST4}")
    running.guest.wait_ipv6()
    check_data(running.guest)


def test_a_guest_that_vanishes_in_the_middle_and_comes_back(running: Running) -> None:
    guest = running.guest
    guest.check(f"(wget -q -O /dev/null http://{HOST4}/bytes/1000000000 &)")
    time.sleep(0.5)
    guest.stop()
    guest.start()
    assert guest.configure()["ip"] == FIRST4
    guest.wait_ipv6()
    check_data(guest)


def test_another_driver(running: Running) -> None:
    """iPXE's takes no offload, no mergeable buffers, and no indirect tables."""
    with Ipxe(vhost_user_nic(running.lab.socket, MACS[2]), running.lab.folder / "ipxe") as ipxe:
        assert ipxe.run("dhcp", 60).endswith("ok")
        assert ipxe.run(f"imgfetch http://{HOST4}/bytes/1000000").endswith("ok")


def test_netstack_has_complained_about_nothing(running: Running) -> None:
    # The last of the file: all that went before was ordinary use.
    lines = running.netstack.log.splitlines()
    complaints = [line for line in lines if re.search(r"Traceback|\[(error|critical|warning)|Error:|violation: ", line)]
    assert not complaints
    assert running.netstack.stop() == 0
