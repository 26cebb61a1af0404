"""UDP of all sizes, ping and traceroute from a real kernel, through netstack, to the host and beyond."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, ROUTER4, ROUTER6
from tests.lab.rootfs.pattern import pattern
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    PATIENCE,
    address4_of,
    address6_of,
    connect,
    datagrams,
    family_of,
    listen,
    open_socket,
    port_of,
)

if TYPE_CHECKING:
    from tests.lab.namespaces import Namespace, TapNamespace
    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]


def place_of(net: Net, address: str) -> tuple[Namespace, str]:
    """The namespace and address that a guest means."""
    if address in (GATEWAY4, GATEWAY6):
        return net.host, "127.0.0.1" if address == GATEWAY4 else "::1"
    return (net.world.far if address in (FAR4, FAR6) else net.host), address


def send_through(ours: socket.socket, theirs: socket.socket, payload: bytes) -> None:
    """Send until it has arrived: the first one may find out the MTU of the path, which the guest is then told."""
    for _ in range(4):
        ours.send(payload)
        ready = select.select([ours, theirs], [], [], PATIENCE)[0]
        if theirs in ready:
            return
        assert ready, "neither the datagram nor an error came"
        with pytest.raises(OSError) as caught:
            ours.recv(1)
        assert caught.value.errno == errno.EMSGSIZE
    pytest.fail("too big for every MTU")


@pytest.mark.parametrize("length", (0, 1, 1400, 8000, 60000))
@pytest.mark.parametrize("address", (HOST4, HOST6, GATEWAY4, GATEWAY6, FAR4, FAR6))
@pytest.mark.parametrize("mtu", (65520, 1500))
def test_a_datagram_and_its_answer(
    net: Net, guest: TapNamespace, other: TapNamespace, address: str, mtu: int, length: int
) -> None:
    namespace, bound = place_of(net, address)
    payload = pattern(length)
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(datagrams(namespace, bound))
        ours = stack.enter_context(open_socket(guest if mtu == 65520 else other, family_of(address), socket.SOCK_DGRAM))
        ours.connect((address, port_of(theirs)))
        send_through(ours, theirs, payload)
        received, peer = theirs.recvfrom(1 << 16)
        assert received == payload
        theirs.sendto(received[::-1], peer)
        assert ours.recv(1 << 16) == payload[::-1]


@pytest.mark.parametrize("address", (GATEWAY4, GATEWAY6))
def test_a_closed_udp_port_is_refused(guest: TapNamespace, address: str) -> None:
    with open_socket(guest, family_of(address), socket.SOCK_DGRAM) as ours:
        ours.connect((address, 1))
        ours.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(1)


@pytest.mark.needs("ping")
@pytest.mark.parametrize("address", (GATEWAY4, GATEWAY6, HOST4, HOST6, ROUTER4, ROUTER6, FAR4, FAR6))
def test_ping(guest: TapNamespace, address: str) -> None:
    for size in (0, 56, 1300):
        # One at a time: after a first answer ping waits two round trips for the next one and not -W seconds.
        answer = guest.run("ping", "-n", "-c", "1", "-W", "5", "-s", str(size), address).stdout
        assert " 0% packet loss" in answer


@pytest.mark.needs("busybox")
@pytest.mark.parametrize(
    ("program", "options", "path"),
    (
        ("traceroute", (), [GATEWAY4, ROUTER4, FAR4]),
        ("traceroute", ("-I",), [GATEWAY4, ROUTER4, FAR4]),
        ("traceroute6", (), [GATEWAY6, ROUTER6, FAR6]),
    ),
    ids=("udp", "icmp", "udp6"),
)
def test_traceroute_shows_the_gateway_the_router_and_the_end(
    guest: TapNamespace, program: str, options: tuple[str, ...], path: list[str]
) -> None:
    words = [program, "-n", "-q", "1", "-w", "3", "-m", "6", *options, path[-1]]
    lines = guest.run("busybox", *words, timeout=30).stdout.splitlines()[1:]
    assert [line.split()[1] for line in lines] == path, lines


@pytest.mark.parametrize("number", (0, 1))
def test_guests_reach_each_other(guest: TapNamespace, other: TapNamespace, number: int) -> None:
    here, there = ((guest, other), (other, guest))[number]
    for address in (address4_of(1 - number), address6_of(1 - number)):
        with contextlib.ExitStack() as stack:
            theirs = stack.enter_context(datagrams(there, address))
            ours = stack.enter_context(open_socket(here, family_of(address), socket.SOCK_DGRAM))
            ours.sendto(b"hello", (address, port_of(theirs)))
            assert theirs.recv(64) == b"hello"
            listener = stack.enter_context(listen(there, address))
            caller = stack.enter_context(connect(here, address, port_of(listener)))
            callee = stack.enter_context(listener.accept()[0])
            caller.sendall(pattern(200_000))
            caller.shutdown(socket.SHUT_WR)
            received = bytearray()
            while data := callee.recv(1 << 16):
                received += data
            assert received == pattern(200_000)
