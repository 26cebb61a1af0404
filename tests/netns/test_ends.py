"""How things end: a guest that vanishes, and netstack itself amid its work."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import HOST4, HOST6, TapNamespace, wait_until
from tests.netns.net import AT_ONCE, Echo, Net, address4_of, is_readable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(90), pytest.mark.slow]

# core.tcp.LINK_GRACE, and some time for a machine that is busy.
GRACE = 30.0 + 10.0

LEASE_SCRIPT = """#!/bin/sh
case "$1" in
bound|renew)
    ip addr add "$ip/24" dev "$interface"
    ip route add default via "$router" dev "$interface" metric 50
    echo "$ip" >ADDRESS
    ;;
esac
"""


def lease(guest: TapNamespace, folder: Path) -> str:
    """Have busybox's DHCP client configure the guest; the address that it got."""
    script, answer = folder / "udhcpc.sh", folder / "address"
    script.write_text(LEASE_SCRIPT.replace("ADDRESS", str(answer)))
    script.chmod(0o755)
    guest.run("busybox", "udhcpc", "-i", guest.tap, "-n", "-q", "-f", "-t", "10", "-T", "1", "-s", script)
    return answer.read_text().strip()


def vanish(guest: TapNamespace) -> None:
    """Cut its link, as when its QEMU is killed."""
    guest.relay.kill()
    guest.relay.wait()


@pytest.mark.needs("busybox")
def test_a_guest_that_vanishes(net: Net, other: TapNamespace, tmp_path: Path) -> None:
    """Its flows end within the grace; who comes with its MAC gets its address, and nothing of its connections."""
    with contextlib.ExitStack() as stack:
        gone = stack.enter_context(net.guest(4))
        never_back = stack.enter_context(net.pair(gone, HOST4))
        returning = stack.enter_context(net.guest(5, addresses=False))
        address = lease(returning, tmp_path)
        held = [stack.enter_context(net.pair(returning, HOST4)) for _ in range(3)]
        assert len(net.flows_of(address)) == 3
        echo = stack.enter_context(Echo(net, other, HOST6))
        vanish(gone)
        vanish(returning)
        cut_at = time.monotonic()
        wait_until(lambda: len(net.status()["links"]) == 1, "netstack to see it")
        assert echo.median() < 0.1

        newcomer = stack.enter_context(net.guest(5, addresses=False))
        assert lease(newcomer, tmp_path) == address
        with Echo(net, newcomer, HOST4) as fresh:
            assert fresh.median() < 0.1
        # The new kernel knows nothing of the old one's connections: the hosts' ends are told within the grace.
        for _, theirs in (*held, never_back):
            assert is_readable(theirs, max(0.0, cut_at + GRACE - time.monotonic()))
            with pytest.raises(ConnectionResetError):
                theirs.recv(1)
        assert not net.flows_of(address4_of(4))
        assert not net.flows_of(address)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=lambda number: number.name)
def test_the_end_amid_work(number: signal.Signals) -> None:
    """A normal end within two seconds; both sides of every connection are told."""
    with contextlib.ExitStack() as stack:
        net = Net(stack)
        guests = [stack.enter_context(net.guest(which)) for which in range(2)]
        pairs = [
            stack.enter_context(net.pair(guest, address))
            for guest in guests
            for address in (HOST4, HOST6)
            for _ in range(25)
        ]
        # A transfer whose reader sleeps, so that bytes are on the way in every buffer.
        busy, _ = pairs[0]
        busy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                busy.send(bytes(1 << 18))
        process = net.netstack.process
        assert process is not None
        start = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(10) == 0
        assert time.monotonic() - start < 2 * AT_ONCE
        for ours, theirs in pairs[1:]:
            for end in (ours, theirs):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
        assert not net.socket.exists()
        assert "Traceback" not in net.netstack.log
