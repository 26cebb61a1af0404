"""Guests that mean harm: forged addresses, broken streams, floods, and those that do not listen."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Ether

from tests.lab.namespaces import HOST4, HOST6, wait_until
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    MEGABYTE,
    Echo,
    address4_of,
    address6_of,
    datagrams,
    frame,
    is_readable,
    listen,
    mac_of,
    memory_settles,
    port_of,
    wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.namespaces import TapNamespace
    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

FLOOD = 60 * MEGABYTE  # several times what a link may hold, with its socket's buffer


@pytest.fixture
def tap(net: Net, guest: TapNamespace) -> Iterator[socket.socket]:
    """A raw socket on guest 0's tap; netstack knows the guest already."""
    guest.run("ping", "-n", "-c", "1", "-W", "5", GATEWAY4)
    guest.run("ping", "-n", "-c", "1", "-W", "5", GATEWAY6)
    with wire(guest) as sock:
        yield sock


def ethernet(payload: Any, source: str = mac_of(0), target: str = GATEWAY_MAC) -> bytes:
    return bytes(Ether(src=source, dst=target) / payload)


# ---- addresses that are not the guest's to name ----

MARTIANS4 = ("127.0.0.1", "127.1.2.3", "127.255.255.255", "0.0.0.0", "0.0.0.1", "255.255.255.255", "192.168.5.255")
MARTIANS6 = (
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "fe80::1",
    "ff02::1",
)


def test_no_packet_reaches_the_hosts_loopback_but_by_the_gateway(
    net: Net, guest: TapNamespace, tap: socket.socket
) -> None:
    """What a guest sends to such an address goes nowhere, whatever the host's kernel would make of it."""
    with contextlib.ExitStack() as stack:
        listeners, readers = [], []
        # The wildcard would take 0.0.0.0, 127.1.2.3 and ::ffff:127.0.0.1 as well.
        for address in ("0.0.0.0", "::"):
            listeners.append(stack.enter_context(listen(net.host, address)))
            readers.append(stack.enter_context(datagrams(net.host, address)))
        for sock in (*listeners, *readers):
            for target in (*MARTIANS4, *MARTIANS6):
                ip = IPv6(src=address6_of(0), dst=target) if ":" in target else IP(src=address4_of(0), dst=target)
                port = port_of(sock)
                tap.send(ethernet(ip / TCP(sport=4000, dport=port, flags="S", seq=1)))
                tap.send(ethernet(ip / UDP(sport=4000, dport=port) / b"martian"))
        # Frames of a link are taken in order: when this one is there, the others have been looked at.
        for reader, gateway in zip(readers, (GATEWAY4, GATEWAY6), strict=True):
            ip = IPv6(src=address6_of(0), dst=gateway) if ":" in gateway else IP(src=address4_of(0), dst=gateway)
            tap.send(ethernet(ip / UDP(sport=4001, dport=port_of(reader)) / b"by the gateway"))
            assert reader.recv(64) == b"by the gateway"
            assert not is_readable(reader)
        # A connect() that was begun within the host has ended as well: the loopback does not wait.
        for listener in listeners:
            assert not is_readable(listener, 0.1)
        assert not [flow for flow in net.flows_of(address4_of(0)) if ":4000" in flow["guest"]]


FORGED4 = ("198.51.100.1", "203.0.113.1", "127.0.0.1", "0.0.0.0", "192.168.5.255", "192.168.5.0", "224.0.0.1")
FORGED6 = ("2001:db8:1::1", "::1", "::ffff:192.168.5.20", "ff02::1", "fd00:c0a8:6::1")


def forged() -> list[tuple[str, Any]]:
    """Packets of guest 0 with a source that is not its own."""
    return [
        *((source, IP(src=source, dst=GATEWAY4)) for source in FORGED4),
        *((source, IPv6(src=source, dst=GATEWAY6)) for source in FORGED6),
        ("gateway", IP(src=GATEWAY4, dst=HOST4)),
        ("gateway6", IPv6(src=GATEWAY6, dst=HOST6)),
        ("other", IP(src=address4_of(1), dst=HOST4)),
        ("other6", IPv6(src=address6_of(1), dst=HOST6)),
    ]


@pytest.mark.parametrize(("_name", "packet"), [pytest.param(*case, id=case[0]) for case in forged()])
def test_a_source_that_is_not_its_own_is_dropped_and_counted(
    net: Net, guest: TapNamespace, other: TapNamespace, tap: socket.socket, _name: str, packet: Any
) -> None:
    with (
        Echo(net, other, HOST4) as echo,
        Echo(net, other, HOST6) as echo6,
        datagrams(net.host, "127.0.0.1") as reader,
        datagrams(net.host, "::1") as reader6,
        datagrams(net.host, HOST4) as reader_outside,
        datagrams(net.host, HOST6) as reader6_outside,
    ):
        echo.round_trip()  # so that the other guest's address is known to be its own
        echo6.round_trip()
        readers = (reader, reader6, reader_outside, reader6_outside)
        before = net.drops("source_not_its_own") + net.drops("ipv4_malformed") + net.drops("ipv6_malformed")
        payloads = [UDP(sport=5000, dport=port_of(sock)) / b"forged" for sock in readers]
        payloads.append(TCP(sport=5000, dport=port_of(reader), flags="S"))
        payloads.append(ICMPv6EchoRequest() if packet.version == 6 else ICMP())
        for payload in payloads:
            tap.send(ethernet(packet / payload))

        def counted() -> bool:
            now = net.drops("source_not_its_own") + net.drops("ipv4_malformed") + net.drops("ipv6_malformed")
            return now >= before + len(payloads)

        wait_until(counted, "all of them to be counted")
        assert not any(is_readable(sock) for sock in readers)
        assert echo.median() < 0.1, "its owner has it still"
        assert echo6.median() < 0.1


def lies() -> list[Any]:
    """What guest 0 would have to say to be taken for the gateway, or for guest 1 by the gateway."""
    found: list[Any] = []
    for operation in (1, 2):
        found.append(ARP(op=operation, hwsrc=mac_of(0), psrc=GATEWAY4, hwdst=mac_of(1), pdst=address4_of(1)))
        found.append(ARP(op=operation, hwsrc=mac_of(0), psrc=GATEWAY4, hwdst=mac_of(1), pdst=GATEWAY4))
        found.append(ARP(op=operation, hwsrc=mac_of(0), psrc=address4_of(1), hwdst=GATEWAY_MAC, pdst=GATEWAY4))
    for target, taught in ((GATEWAY6, address6_of(1)), (address6_of(1), GATEWAY6)):
        for source in (target, address6_of(0)):
            advertisement = ICMPv6ND_NA(tgt=target, R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac_of(0))
            found.append(IPv6(src=source, dst=taught, hlim=255) / advertisement)
            found.append(IPv6(src=source, dst=taught, hlim=255) / IPv6ExtHdrHopByHop() / advertisement)
    return found


@pytest.mark.parametrize("family", (4, 6))
def test_nobody_is_talked_into_another_guests_or_the_gateways_address(
    net: Net, guest: TapNamespace, other: TapNamespace, tap: socket.socket, family: int
) -> None:
    address, gateway = (HOST4, GATEWAY4) if family == 4 else (HOST6, GATEWAY6)
    with Echo(net, other, address) as echo:
        echo.round_trip()
        for lie in lies():
            for target in (GATEWAY_MAC, mac_of(1), "ff:ff:ff:ff:ff:ff"):
                tap.send(ethernet(lie, target=target))
        guest.run("ping", "-n", "-c", "1", "-W", "5", gateway)  # behind all of them
        assert max(echo.round_trip() for _ in range(25)) < 0.5, "another guest was misled"
        mac = json.loads(other.ip("-j", "neigh", "show", gateway))[0]["lladdr"]
        assert mac == GATEWAY_MAC
    addresses = next(entry["addresses"] for entry in net.status()["guests"] if entry["mac"] == mac_of(1))
    assert (address4_of(1) if family == 4 else address6_of(1)) in addresses
    with Echo(net, other, address) as echo:
        assert echo.median() < 0.1


# ---- broken streams ----


@pytest.mark.parametrize("length", (0, 13, 65550, 70000, 0xFFFFFFFF))
def test_a_bad_frame_length_ends_that_link_alone(net: Net, other: TapNamespace, length: int) -> None:
    said = f"bad frame length {length}:"
    before = net.netstack.log.count(said)
    hello = ethernet(ARP(op=1, hwsrc=mac_of(9), psrc=address4_of(9), pdst=GATEWAY4), source=mac_of(9))
    with Echo(net, other, HOST4) as echo, net.plug() as link:
        link.sendall(frame(hello) + struct.pack(">I", length) + b"rest")
        with contextlib.suppress(ConnectionResetError):  # it did not read the rest
            while link.recv(1 << 16):
                pass
        wait_until(lambda: net.netstack.log.count(said) == before + 1, "one line in the log")
        assert echo.median() < 0.1
    assert net.netstack.log.count(said) == before + 1


def test_random_bytes_end_a_link_at_most(net: Net, other: TapNamespace) -> None:
    noise = random.Random(14)
    with Echo(net, other, HOST4) as echo:
        for number in range(60):
            with net.plug() as link, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if number % 3 == 0:
                    data = noise.randbytes(noise.choice((1, 3, 4, 5, 100, 70000, 1 << 20)))
                else:  # frames of a right length, with something inside that might be anything, or nearly right
                    data = b"".join(frame(nonsense(noise)) for _ in range(200))
                link.sendall(data)
                if number % 2:
                    link.shutdown(socket.SHUT_WR)
                    while link.recv(1 << 16):
                        pass
        assert echo.median() < 0.1
    wait_until(lambda: len(net.status()["links"]) <= 2, "the links to be gone")


def nonsense(noise: random.Random) -> bytes:
    """A frame with random contents, half of the time behind right-looking beginnings."""
    body = noise.randbytes(noise.randrange(14, 1600))
    mac = bytes.fromhex(GATEWAY_MAC.replace(":", ""))
    source = bytes.fromhex(mac_of(noise.randrange(10, 200)).replace(":", ""))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: body,
        lambda: mac + source + noise.choice((b"\x08\x00", b"\x86\xdd", b"\x08\x06", b"\x81\x00")) + body,
        lambda: mac + source + b"\x08\x00" + bytes(IP(src="192.168.5.77", dst=HOST4, proto=body[0]) / body),
        lambda: mac + source + b"\x86\xdd" + bytes(IPv6(src="fd00:c0a8:5::77", dst=GATEWAY6, nh=body[0]) / body),
        lambda: (
            mac
            + source
            + b"\x08\x00"
            + bytes(IP(src="192.168.5.77", dst=GATEWAY4) / UDP(dport=noise.choice((53, 67, 123))) / body)
        ),
        lambda: mac + source + b"\x08\x00" + bytes(IP(src="192.168.5.77", dst=HOST4, flags="MF", frag=body[1]) / body),
    )
    return noise.choice(kinds)()[:65549]


# ---- guests that do not listen ----


@pytest.mark.slow
def test_a_guest_that_never_reads_its_connections(net: Net, guest: TapNamespace, other: TapNamespace) -> None:
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(Echo(net, other, HOST4))
        before = net.netstack.memory()
        for _ in range(40):
            _, theirs = stack.enter_context(net.pair(guest, HOST4, receive_buffer=4096))
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(bytes(MEGABYTE))
        assert echo.median() < 0.1
        assert net.netstack.memory() - before < 32 * MEGABYTE
        # The same guest is served on a connection that it does read.
        with Echo(net, guest, HOST4) as own:
            assert own.median() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("target", (mac_of(8), "ff:ff:ff:ff:ff:ff"), ids=("unicast", "broadcast"))
def test_a_link_that_is_not_read_costs_a_bounded_queue(
    net: Net, guest: TapNamespace, other: TapNamespace, tap: socket.socket, target: str
) -> None:
    """Its frames are dropped and counted; those who are on the same switch do not wait for it."""
    hello = ethernet(ARP(op=1, hwsrc=mac_of(8), psrc=address4_of(8), pdst=GATEWAY4), source=mac_of(8))
    flood = ethernet(b"\0" * 9000, target=target)
    # An ethertype for experiments (IEEE 802): nobody answers it.
    flood = flood[:12] + b"\x88\xb5" + flood[14:]
    with Echo(net, other, HOST4) as echo, net.plug() as deaf:
        before = net.netstack.memory()
        deaf.sendall(frame(hello))

        def find() -> dict[str, Any] | None:
            links = [link for link in net.status()["links"] if link["connected"]]
            where = {entry["mac"]: entry["link"] for entry in net.status()["guests"]}
            return next((link for link in links if link["name"] == where.get(mac_of(8))), None)

        wait_until(find, "netstack to know the guest that will not read")

        def send() -> None:
            for _ in range(FLOOD // len(flood)):
                tap.sendall(flood)

        sender = threading.Thread(target=send)
        sender.start()
        times = [echo.round_trip()]
        while sender.is_alive():
            times.append(echo.round_trip())
        sender.join()
        assert sorted(times)[len(times) // 2] < 0.05

        def dropped() -> bool:
            link = find()
            return link is not None and link["drops_to_guest"] > 0

        wait_until(dropped, "frames to be dropped and counted")
        assert net.netstack.memory() - before < 24 * MEGABYTE
        assert echo.median() < 0.05
    memory_settles(net, before + 16 * MEGABYTE, "when it is gone")
