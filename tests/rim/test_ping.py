"""The host's ping sockets, allowed and forbidden, and echo of guests upon them, in a small internet of namespaces."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from typing import Self

import pytest

from netstack.core.icmp import IcmpLayer, write_request
from netstack.host.datagrams import AddressNames, HostDatagramSocket
from netstack.host.ping import MacosPingSocket, open_ping
from netstack.wire.icmp import PROHIBITED, TTL_EXCEEDED, write_echo, write_echo6
from netstack.wire.ipv4 import parse_ipv4, write_ipv4
from netstack.wire.ipv6 import parse_ipv6
from tests.core.ip_fakes import GUEST4, GUEST6, MAC, FakeLink
from tests.lab.namespaces import FAR4, FAR6, FAR_MTU, ROUTER4, ROUTER6, UNREACHABLE4, UNREACHABLE6, World
from tests.rim.inside import RealStack, call_inside, packed, wait_readable

pytestmark = [pytest.mark.needs("root", "netns", "ip"), pytest.mark.slow]

FAR = {4: FAR4, 6: FAR6}
ROUTER = {4: ROUTER4, 6: ROUTER6}
UNREACHABLE = {4: UNREACHABLE4, 6: UNREACHABLE6}
VERSIONS = pytest.mark.parametrize("version", (4, 6), ids=("ipv4", "ipv6"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        world.check_isolation()
        yield world


def open_inside(world: World, version: int) -> HostDatagramSocket:
    names = AddressNames()
    return call_inside(world.host, lambda: open_ping(names, packed(FAR[version])))


@pytest.fixture
def sock(world: World, version: int) -> Iterator[HostDatagramSocket]:
    sock = open_inside(world, version)
    yield sock
    sock.close()


def request(version: int, sequence: int, payload: bytes = b"payload") -> bytes:
    if version == 4:
        return write_echo(0x1234, sequence, payload, reply=False)
    return write_echo6(GUEST6, packed(FAR6), 0x1234, sequence, payload, reply=False)


@VERSIONS
@pytest.mark.parametrize("far", (False, True), ids=("loopback", "far"))
def test_request_and_reply(sock: HostDatagramSocket, version: int, far: bool) -> None:
    address = packed(FAR[version] if far else {4: "127.0.0.1", 6: "::1"}[version])
    sock.send_to(request(version, 7), address, 0, 64, True)
    wait_readable(sock)
    buffer = memoryview(bytearray(65536))
    length, _, source, _ = sock.receive_from(buffer)
    assert source == address
    reply = bytes(buffer[:length])
    assert reply[0] == (0 if version == 4 else 129)
    assert reply[6:] == b"\0\7payload"


@VERSIONS
def test_time_exceeded_comes_with_the_request(sock: HostDatagramSocket, version: int) -> None:
    sock.send_to(request(version, 9), packed(FAR[version]), 0, 1, True)
    assert wait_readable(sock, 0) & select.POLLERR
    error = sock.receive_error()
    assert error is not None
    assert (error.offender, error.destination) == (packed(ROUTER[version]), packed(FAR[version]))
    assert (error.icmp_type, error.icmp_code) == ((11, 0) if version == 4 else (3, 0))
    assert error.payload[0] == (8 if version == 4 else 128)
    assert error.payload[6:] == b"\0\x09payload"


@VERSIONS
def test_where_ping_sockets_are_forbidden(version: int) -> None:
    with World(ping=False) as world, pytest.raises(PermissionError):
        open_inside(world, version)


class Guest:
    """A guest's ICMP, through the core, to the real sockets of the world's host."""

    def __init__(self, world: World, version: int) -> None:
        self.stack = RealStack(world.host)
        self.icmp = IcmpLayer(self.stack)
        self.link = FakeLink()
        self.version = version
        self.address = GUEST4 if version == 4 else GUEST6

    def ping(self, dst: bytes, sequence: int, payload: bytes = b"payload", ttl: int = 64, ident: int = 0x1234) -> None:
        packet = memoryview(write_request(self.address, dst, ident, sequence, payload, ttl))
        now = time.monotonic()
        if self.version == 4:
            parsed4 = parse_ipv4(packet, 0, len(packet))
            assert parsed4 is not None
            self.icmp.on_icmp4(self.link, MAC, parsed4, packet, now)
        else:
            parsed6 = parse_ipv6(packet, 0, len(packet))
            assert parsed6 is not None
            self.icmp.on_icmp6(self.link, MAC, parsed6, packet, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.icmp.close_all(time.monotonic())


@VERSIONS
def test_a_guest_pings_the_world(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        far = packed(FAR[version])
        for sequence in range(3):
            guest.ping(far, sequence, b"x" * 1000)
            guest.ping(far, sequence, b"other", ident=0x4321)
        guest.stack.pump(lambda: len(guest.stack.packets) == 6, "six replies")
        at = 20 if version == 4 else 40
        replies = sorted((packet[at + 4 : at + 8], packet[at + 8 :]) for packet in guest.stack.taken())
        assert replies == [
            (ident + bytes((0, sequence)), payload)
            for ident, payload in ((b"\x12\x34", b"x" * 1000), (b"\x43\x21", b"other"))
            for sequence in range(3)
        ]
        assert not guest.stack.drops


@VERSIONS
def test_traceroute_with_echo_requests(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        far = packed(FAR[version])
        for ttl in (1, 2, 3):
            guest.ping(far, ttl, ttl=ttl)
        guest.stack.pump(lambda: len(guest.stack.errors) == 2 and guest.stack.packets, "three answers")
        first, second = guest.stack.taken_errors()
        assert (first.src, first.problem) == (None, TTL_EXCEEDED)
        assert second.src == packed(ROUTER[version])
        at = 20 if version == 4 else 40
        # What is quoted carries the guest's identifier, so that the guest's traceroute knows its probe.
        assert second.written is not None
        quoted = second.written[at + 8 + at :]
        assert quoted[4:] == b"\x12\x34\0\2payload"
        [reply] = guest.stack.taken()
        assert reply[at + 4 :] == b"\x12\x34\0\3payload"


@VERSIONS
def test_an_unreachable_host_is_reported_by_its_router(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        # Again and again: Linux, as a router, says so once a second at most (net.ipv4.route.error_cost).
        guest.stack.pump(
            lambda: guest.stack.errors, "unreachable", again=lambda: guest.ping(packed(UNREACHABLE[version]), 1)
        )
        error, *_ = guest.stack.taken_errors()
        assert error.src == packed(ROUTER[version])
        assert error.problem[0] == 3 if version == 4 else error.problem[2] == 1
        guest.ping(packed(FAR[version]), 2)  # and the flow goes on
        guest.stack.pump(lambda: guest.stack.packets, "a reply")


@VERSIONS
def test_a_guest_finds_the_path_mtu_with_pings(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        guest.ping(packed(FAR[version]), 1, bytes(1430))
        guest.stack.pump(lambda: guest.stack.errors, "too big")
        assert guest.stack.taken_errors()[0].parameter == FAR_MTU


@VERSIONS
def test_a_host_that_forbids_pings_says_prohibited(version: int) -> None:
    with World(ping=False) as world, Guest(world, version) as guest:
        for sequence in range(3):
            guest.ping(packed(FAR[version]), sequence)
        assert [error.problem for error in guest.stack.taken_errors()] == [PROHIBITED] * 3
        assert guest.stack.drops == {"ping_forbidden": 3}
        assert guest.stack.recorded.warnings == {"ping_forbidden": 1}
        world.allow_ping(True)  # no restart is needed
        guest.ping(packed(FAR[version]), 4)
        guest.stack.pump(lambda: guest.stack.packets, "a reply")


class TestMacos:
    """The socket for macOS does what Linux' kernel does. A UDP socket stands for macOS' kernel here."""

    @pytest.fixture
    def kernel(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
            kernel.bind(("127.0.0.1", 0))
            kernel.settimeout(10)
            yield kernel

    @pytest.fixture
    def sock(self) -> Iterator[MacosPingSocket]:
        sock = MacosPingSocket(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), AddressNames())
        yield sock
        sock.close()

    def test_requests_get_an_identifier_and_a_checksum(self, kernel: socket.socket, sock: MacosPingSocket) -> None:
        port = kernel.getsockname()[1]
        sock.send_to(request(4, 7), packed("127.0.0.1"), port, 64, True)
        message = kernel.recv(2000)
        ident = int.from_bytes(message[4:6], "big")
        assert message == write_echo(ident, 7, b"payload", reply=False)
        sock.send_to(request(4, 8), packed("127.0.0.1"), port, 64, True)
        assert kernel.recv(2000)[4:6] == message[4:6]
        with pytest.raises(OSError):
            sock.send_to(b"short", packed("127.0.0.1"), port, 64, True)

    def test_only_its_own_replies_and_without_the_ip_header(self, kernel: socket.socket, sock: MacosPingSocket) -> None:
        sock.send_to(request(4, 7), packed("127.0.0.1"), kernel.getsockname()[1], 64, True)
        message, source = kernel.recvfrom(2000)
        ident = int.from_bytes(message[4:6], "big")
        own = write_echo(ident, 7, b"payload", reply=True)
        foreign = write_echo(ident ^ 1, 7, b"foreign", reply=True)
        header = write_ipv4(packed(FAR4), packed("198.51.100.1"), 1, len(own))
        for item in (b"", b"\x45", header + foreign, foreign, header + own):
            kernel.sendto(item, source)
        wait_readable(sock)
        buffer = memoryview(bytearray(65536))
        length, segment, address, _ = sock.receive_from(buffer)
        assert (length, segment, address) == (len(own), len(own), packed("127.0.0.1"))
        assert bytes(buffer[:length]) == own
        kernel.sendto(header + foreign, source)
        wait_readable(sock)
        with pytest.raises(BlockingIOError):
            sock.receive_from(buffer)
