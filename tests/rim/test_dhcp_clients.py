"""Real clients against our address servers: busybox udhcpc, ISC dhclient for both families, and the kernel's SLAAC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What a client calls when something happened: does as it is told, and writes that into a file named for the reason.
HOOK = """#!/bin/sh
reason=${reason:-$1}
set | grep -E "^(new_|[a-z0-9]+=)" > DIRECTORY/$reason.env
case $reason in
    bound) ip addr add $ip/$mask dev $interface ;;
    BOUND) ip addr add $new_ip_address/24 dev $interface
           ip neigh replace 192.168.5.2 lladdr 52:55:c0:a8:05:02 dev $interface ;;
    BOUND6) ip addr add $new_ip6_address/64 dev $interface nodad ;;
esac
exit 0
"""

# wait_address SCOPE: until the kernel has made an address of that kind and found nobody else at it. dhclient goes into
# the background when it has what it wanted, and stays there until its namespace ends.
WORDS = """
wait_address() {
    tries=0
    until ip -6 -o addr show dev guest0 scope $1 -tentative | grep -q inet6; do
        tries=$((tries + 1))
        test $tries -lt 600 || { ip addr; exit 1; }
        sleep 0.05
    done
}
client() { dhclient -v -1 --no-pid -sf $HOOK -lf $PWD/leases "$@" guest0; }
"""


class Outcome:
    """What a client was told, and what the servers counted."""

    def __init__(self, directory: Path, output: str) -> None:
        self.directory = directory
        self.output = output
        self.counters: dict[str, int] = json.loads((directory / "counters.json").read_text())

    def told(self, reason: str) -> dict[str, str]:
        lines = (self.directory / f"{reason}.env").read_text().splitlines()
        return {key: value.strip("'") for key, _, value in (line.partition("=") for line in lines)}

    def kernel(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.directory / name).read_text())
        return found


def run_guest(directory: Path, script: str) -> Outcome:
    """Run a shell script as the guest, against the servers."""
    hook = directory / "hook"
    hook.write_text(HOOK.replace("DIRECTORY", str(directory)))
    hook.chmod(0o755)
    (directory / "guest.sh").write_text(f"set -e\nHOOK={hook}\ncd {directory}\n{WORDS}\n{script}\n")
    command = [sys.executable, "-m", "tests.rim.address_wire", str(directory), "sh", str(directory / "guest.sh")]
    # With a namespace of processes too: nothing that a client left behind outlives it.
    namespaces = ["unshare", "-n", "--pid", "--fork", "--kill-child"]
    done = subprocess.run([*namespaces, *command], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return Outcome(directory, done.stdout + done.stderr)


@pytest.mark.needs("netns", "ip", "busybox")
def test_udhcpc(tmp_path: Path) -> None:
    outcome = run_guest(
        tmp_path, "busybox udhcpc -i guest0 -n -q -f -s $HOOK -x hostname:My_VM -O search -O mtu -O ntpsrv"
    )
    told = outcome.told("bound")
    assert told["ip"] == "192.168.5.15"
    assert told["mask"] == "24"
    assert told["subnet"] == "255.255.255.0"
    assert told["router"] == told["serverid"] == told["ntpsrv"] == "192.168.5.2"
    assert told["dns"] == "192.168.5.3"
    assert told["mtu"] == "4000"
    assert told["hostname"] == "my-vm"
    assert told["domain"] == "netstack.internal"
    assert told["search"] == "netstack.internal corp.example"
    assert told["broadcast"] == "192.168.5.255"
    assert told["lease"] == "86400"
    assert outcome.counters == {"dhcp_offer": 1, "dhcp_ack": 1}


@pytest.mark.needs("netns", "ip", "dhclient")
def test_dhclient(tmp_path: Path) -> None:
    outcome = run_guest(tmp_path, "client -4\nclient -4 -r\nclient -4")
    told = outcome.told("BOUND")
    assert told["new_ip_address"] == "192.168.5.15"
    assert told["new_domain_search"] == "netstack.internal. corp.example."
    assert told["new_interface_mtu"] == "4000"
    assert told["new_ntp_servers"] == "192.168.5.2"
    assert told["new_dhcp_renewal_time"] == "43200"
    assert told["new_dhcp_rebinding_time"] == "75600"
    assert outcome.counters == {"dhcp_offer": 2, "dhcp_ack": 2, "dhcp_release": 1}


@pytest.mark.needs("netns", "ip", "dhclient")
def test_dhclient_reboots_into_its_address(tmp_path: Path) -> None:
    """INIT-REBOOT of a guest whose lease nobody remembers: 192.168.5.77 is free, so it goes on with it."""
    lease = (
        'lease { interface "guest0"; fixed-address 192.168.5.77; option subnet-mask 255.255.255.0; '
        "option dhcp-server-identifier 192.168.5.2; expire never; }"
    )
    (tmp_path / "leases").write_text(lease + "\n")
    outcome = run_guest(tmp_path, "client -4")
    assert outcome.told("REBOOT")["new_ip_address"] == "192.168.5.77"
    assert outcome.counters == {"dhcp_ack": 1}


@pytest.mark.needs("netns", "ip", "dhclient")
def test_dhclient_for_ipv6(tmp_path: Path) -> None:
    outcome = run_guest(tmp_path, "wait_address link\nclient -6\nclient -6 -r")
    told = outcome.told("BOUND6")
    assert told["new_ip6_address"] == "fd00:c0a8:5::15"
    assert told["new_dhcp6_name_servers"] == "fd00:c0a8:5::3"
    assert told["new_dhcp6_domain_search"] == "netstack.internal. corp.example."
    assert outcome.counters == {"dhcpv6_advertise": 1, "dhcpv6_reply": 1, "dhcpv6_release": 1}


@pytest.mark.needs("netns", "ip", "dhclient")
def test_dhclient_for_ipv6_without_an_address(tmp_path: Path) -> None:
    outcome = run_guest(tmp_path, "wait_address link\nclient -6 -S")
    assert outcome.told("RENEW6")["new_dhcp6_name_servers"] == "fd00:c0a8:5::3"
    assert outcome.counters == {"dhcpv6_inform": 1}


@pytest.mark.needs("netns", "ip")
def test_the_kernel_believes_the_router(tmp_path: Path) -> None:
    outcome = run_guest(
        tmp_path,
        """
        wait_address global
        ping -6 -c 1 -W 1 fd00:c0a8:5::2 >/dev/null || true  # nobody answers, but the neighbor is asked for
        ip -j -6 addr show dev guest0 scope global > addresses
        ip -j -6 route show default > routes
        ip -j -6 neigh show dev guest0 > neighbors
        cat /proc/sys/net/ipv6/conf/guest0/mtu > mtu
        """,
    )
    (address,) = [
        address for interface in outcome.kernel("addresses") for address in interface.get("addr_info", ()) if address
    ]
    assert address["local"] == "fd00:c0a8:5:0:5054:ff:fe12:3456"
    assert 86000 < address["valid_life_time"] <= 86400
    assert 14000 < address["preferred_life_time"] <= 14400
    (route,) = outcome.kernel("routes")
    assert (route["gateway"], route["dev"]) == ("fe80::5055:c0ff:fea8:502", "guest0")
    neighbors = {neighbor["dst"]: neighbor for neighbor in outcome.kernel("neighbors")}
    for ours in ("fe80::5055:c0ff:fea8:502", "fd00:c0a8:5::2"):
        assert neighbors[ours]["lladdr"] == "52:55:c0:a8:05:02"
    assert (tmp_path / "mtu").read_text() == "4000\n"
