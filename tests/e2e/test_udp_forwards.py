"""UDP forwards to a real Debian guest: an echo server in it, callers on the host and beyond, and a reboot meanwhile."""

from __future__ import annotations

import base64
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import Lab, keep_if_failed, open_lab
from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, wait_until
from tests.lab.rootfs.pattern import pattern
from tests.rim.inside import call_inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.guest import Guest
    from tests.lab.namespaces import Namespace
    from tests.lab.netstack import Netstack

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq", "gcc"),
    pytest.mark.timeout(180),
    pytest.mark.slow,
]

ECHO, FAR_ECHO = 7007, 7008
SPECS = (f"{ECHO}:7/udp", f"[::]:{FAR_ECHO}:7/udp")
SOURCE = Path(__file__).parents[1] / "lab" / "rootfs" / "udp_echo.c"


class Running(NamedTuple):
    """A lab with a netstack and a guest that echoes."""

    lab: Lab
    netstack: Netstack
    guest: Guest


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The echo server, as text that a shell can take."""
    path = tmp_path_factory.mktemp("echo") / "udp_echo"
    options = ("-nostdlib", "-static", "-Os", "-s", "-fno-stack-protector", "-fno-asynchronous-unwind-tables")
    linker = "-Wl,-n,--build-id=none,-z,noseparate-code"
    subprocess.run(["gcc", *options, "-fcf-protection=none", linker, "-o", path, SOURCE], check=True)
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, machine: None, program: str) -> Iterator[Running]:
    for folder in keep_if_failed(request, "udp-forwards"):
        with open_lab(folder) as lab:
            options = [word for spec in SPECS for word in ("-p", spec)]
            netstack = lab.stack.enter_context(lab.netstack([lab.link("stream")], *options))
            guest = lab.stack.enter_context(lab.guest("stream", 0))
            serve(guest, program)
            yield Running(lab, netstack, guest)


def serve(guest: Guest, program: str) -> None:
    """Give the guest its addresses, and start the echo server."""
    guest.configure()
    guest.check("rm -f /bin/udp_echo")
    for at in range(0, len(program), 2400):
        guest.check(f"echo {program[at : at + 2400]} | base64 -d >> /bin/udp_echo")
    guest.check("chmod +x /bin/udp_echo && (/bin/udp_echo </dev/null >/dev/null 2>&1 &)")
    guest.wait_for("netstat -lnu | grep -q ':7 '")


def open_caller(namespace: Namespace, address: str, port: int) -> socket.socket:
    """A socket that hears that address and port, and no other."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = call_inside(namespace, lambda: socket.socket(family, socket.SOCK_DGRAM))
    sock.settimeout(20)
    sock.connect((address, port))
    return sock


def echo(sock: socket.socket, payload: bytes) -> bytes:
    sock.send(payload)
    return sock.recv(1 << 16)


@pytest.mark.parametrize("length", (0, 1, 1400, 9000, 60000))
def test_datagrams_of_all_sizes_come_back(running: Running, length: int) -> None:
    payload = pattern(length)
    with open_caller(running.lab.world.host, "127.0.0.1", ECHO) as ours:
        assert echo(ours, payload) == payload


@pytest.mark.parametrize(
    ("where", "called"), (("far", HOST4), ("far", HOST6), ("host", "127.0.0.1"), ("host", "::1"), ("host", HOST4))
)
def test_callers_of_both_families_from_here_and_elsewhere(running: Running, where: str, called: str) -> None:
    world = running.lab.world
    with open_caller(world.host if where == "host" else world.far, called, FAR_ECHO) as ours:
        for number in range(50):
            payload = b"%d from %s" % (number, where.encode())
            assert echo(ours, payload) == payload
        peer, port = (FAR4 if ":" not in called else FAR6), ours.getsockname()[1]
        if where == "far":
            listed = [flow["peer"] for flow in running.netstack.status()["flows"]["list"]]
            assert (f"[{peer}]:{port}" if ":" in peer else f"{peer}:{port}") in listed


def test_the_guest_reboots_and_its_callers_go_on_with_the_sockets_they_have(running: Running, program: str) -> None:
    guest = running.guest
    with open_caller(running.lab.world.host, "127.0.0.1", ECHO) as ours:
        assert echo(ours, b"before") == b"before"
        guest.reset()
        serve(guest, program)
        ours.settimeout(1.0)

        def again() -> bool:
            try:
                return echo(ours, b"after") == b"after"
            except (TimeoutError, ConnectionRefusedError):
                return False  # it was asked while nobody listened yet

        wait_until(again, "the echo of the guest that is back", 20)
