"""Guests that take all they can get: connections by the thousand, every descriptor, and hosts that never answer."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from tests.lab.namespaces import BLACKHOLE4, BLACKHOLE6, HOST4, HOST6, ROOT, TapNamespace, output_of, wait_until
from tests.netns.net import (
    GATEWAY_MAC,
    MEGABYTE,
    Echo,
    connect,
    errors_of,
    family_of,
    listen,
    mac_of,
    memory_settles,
    open_socket,
    port_of,
    wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(120), pytest.mark.slow]

# What one guest opens in all, and the descriptors that netstack may have when it is to run out of them.
MANY = 20_000
FEW_FILES = 3_000
FEW_FLOWS = 10  # what is open all the time, or in TIME-WAIT


class Hoarder:
    """tests/netns/many.py in a guest."""

    def __init__(self, guest: TapNamespace) -> None:
        self._process = guest.popen(
            sys.executable, "-m", "tests.netns.many", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.files: int = self._answer()["files"]

    def _answer(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(output_of(self._process).readline())
        return found

    def do(self, *words: object) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def crowd(net: Net, guest: TapNamespace) -> Iterator[socket.socket]:
    """A host's listener that takes any number of connections, without a descriptor for any of them."""
    net.host.set_sysctl("net/core/somaxconn", 65535)
    for namespace in (net.host, guest):
        namespace.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")
    with listen(net.host, HOST4, backlog=65535) as listener:
        yield listener


def flows(net: Net) -> int:
    found: int = net.status()["flows"]["tcp"]
    return found


def wait_few_flows(net: Net) -> None:
    """Until what was open is not; what waits for a black hole ends when the host gives up."""
    wait_until(lambda: flows(net) < FEW_FLOWS, "the flows to end", 30)


def reset_backlog(listener: socket.socket) -> None:
    """Close what waits to be accepted."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()


# ---- hosts that do not answer ----


@pytest.mark.parametrize(("hole", "good"), ((BLACKHOLE4, HOST4), (BLACKHOLE6, HOST6)), ids=("ipv4", "ipv6"))
def test_two_hundred_connects_to_a_black_hole_hold_nobody_up(
    net: Net, guest: TapNamespace, other: TapNamespace, hole: str, good: str
) -> None:
    # 1 + 2 + 4 s, not two minutes: the tests after this one see to it that these flows have ended.
    net.host.set_sysctl("net/ipv4/tcp_syn_retries", 2)
    before = flows(net)
    with contextlib.ExitStack() as stack:
        attempts = [stack.enter_context(open_socket(guest, family_of(hole))) for _ in range(200)]
        for number, sock in enumerate(attempts):
            sock.setblocking(False)
            sock.connect_ex((hole, 1000 + number))
        wait_until(lambda: flows(net) >= before + 200, "netstack to try all of them")
        listener = stack.enter_context(listen(net.host, good))
        for namespace in (guest, other):
            times = []
            for _ in range(9):
                start = time.monotonic()
                with connect(namespace, good, port_of(listener)):
                    times.append(time.monotonic() - start)
            assert sorted(times)[4] < 0.1, times
        assert not any(errors_of(attempts)), "a black hole is a black hole, not a refusal"


# ---- a guest that begins and does not go on ----


def test_thousands_of_half_open_connections(
    net: Net, guest: TapNamespace, other: TapNamespace, crowd: socket.socket
) -> None:
    """SYNs from an address at which no kernel answers the SYN-ACKs; then they are all reset."""
    wait_few_flows(net)
    count, ghost, memory = 3000, "192.168.5.60", net.netstack.memory()
    ethernet = Ether(src=mac_of(0), dst=GATEWAY_MAC)
    with wire(guest) as tap, Echo(net, other, HOST4) as echo:
        for which, flags in (("opened", "S"), ("reset", "R")):
            # The reset is for the next sequence number, else it would be answered with a challenge (RFC 5961 3.2).
            segment = TCP(sport=10_000, dport=port_of(crowd), flags=flags, seq=1 + (flags == "R"))
            for number in range(count):
                segment.sport = 10_000 + number
                tap.send(bytes(ethernet / IP(src=ghost, dst=HOST4) / segment))
            if which == "opened":
                wait_until(lambda: flows(net) >= count, "all of them to be under way")
                assert echo.median() < 0.1
                with net.pair(other, HOST6), net.pair(guest, HOST4):
                    pass  # both still get what they ask for
                assert net.netstack.memory() - memory < 64 * MEGABYTE
    wait_few_flows(net)
    reset_backlog(crowd)


# ---- descriptors ----


def test_a_guest_that_opens_all_it_can(
    net: Net, guest: TapNamespace, other: TapNamespace, crowd: socket.socket
) -> None:
    """It gets its share, the rest gets no answer, and somebody else still gets what he asks for."""
    limit = net.status()["flows"]["limit"]
    with contextlib.ExitStack() as stack:
        stack.callback(reset_backlog, crowd)
        hoarders = [stack.enter_context(Hoarder(guest)) for _ in range(2)]
        got = [hoarder.do("open", HOST4, port_of(crowd), MANY // 2) for hoarder in hoarders]
        opened = sum(answer["open"] for answer in got)
        assert opened + sum(answer.get("waiting", 0) for answer in got) == MANY, got
        assert opened > min(MANY, limit // 2), got
        if opened < MANY:
            assert net.drops("tcp_flows_of_guest") > 0
        assert net.netstack.memory() < 200 * MEGABYTE
        for address in (HOST4, HOST6):
            with Echo(net, other, address) as echo:
                assert echo.median() < 0.1
        with net.guest(2) as late, Echo(net, late, HOST4) as echo:
            assert echo.median() < 0.1, "somebody who comes now is served too"
        for hoarder in hoarders:
            hoarder.do("close")
    wait_few_flows(net)
    for namespace in (guest, other):
        with Echo(net, namespace, HOST4) as echo:
            assert echo.median() < 0.1
    memory_settles(net, 200 * MEGABYTE, "after it all")


def test_out_of_descriptors(net: Net, guest: TapNamespace, other: TapNamespace, crowd: socket.socket) -> None:
    """No descriptor is left: what is open goes on, the rest is refused, the log says why; and all is well after."""
    assert net.netstack.process is not None
    pid = net.netstack.process.pid
    wait_few_flows(net)
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    count = FEW_FILES + 500
    with contextlib.ExitStack() as stack:
        stack.callback(reset_backlog, crowd)
        hoarder = stack.enter_context(Hoarder(guest))
        echo = stack.enter_context(Echo(net, other, HOST4))
        # The soft limit alone: not everybody could raise the hard one again.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW_FILES, usual[1]))
        stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, usual)
        got = hoarder.do("open", HOST4, port_of(crowd), count)
        assert got["open"] > FEW_FILES // 2, got
        assert got["open"] + got["ECONNREFUSED"] == count, got
        assert echo.median() < 0.1
        with pytest.raises(ConnectionRefusedError):
            connect(other, HOST4, port_of(crowd))
        warnings = [line for line in net.netstack.log.splitlines() if "Too many open files" in line]
        assert 1 <= len(warnings) < 20, "it is said, and not for each"
        # A guest that comes now waits until there is a descriptor for its link.
        with net.plug() as newcomer:
            assert hoarder.do("close")["closed"] == got["open"]
            reset_backlog(crowd)
            wait_few_flows(net)
            with Echo(net, other, HOST4) as again:
                assert again.median() < 0.1
            assert newcomer.recv(4) != b"", "netstack has something to say to it"
