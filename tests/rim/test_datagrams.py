"""The host's UDP sockets, and UDP flows upon them, in a small internet of namespaces."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from netstack.core.ports import SocketError
from netstack.core.udp import UdpFlows
from netstack.host.datagrams import AddressNames, HostDatagramSocket, open_udp
from netstack.wire.icmp import TOO_BIG, TTL_EXCEEDED
from tests.core.ip_fakes import GATEWAY4, GATEWAY6, GUEST4, GUEST6, MAC, FakeLink
from tests.lab.namespaces import (
    FAR4,
    FAR6,
    FAR_MTU,
    PROHIBITED4,
    PROHIBITED6,
    ROUTER4,
    ROUTER6,
    UNREACHABLE4,
    UNREACHABLE6,
    World,
)
from tests.rim.inside import RealStack, call_inside, echo_socket, is_ready, packed, wait_readable

pytestmark = [pytest.mark.needs("root", "netns", "ip"), pytest.mark.slow]

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
FAR = {4: FAR4, 6: FAR6}
ROUTER = {4: ROUTER4, 6: ROUTER6}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
IP_RECVTTL = 12  # include/uapi/linux/in.h; not in Python's socket module
VERSIONS = pytest.mark.parametrize("version", (4, 6), ids=("ipv4", "ipv6"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        world.check_isolation()
        yield world


Opener = Callable[..., HostDatagramSocket]


@pytest.fixture
def open_inside(world: World) -> Iterator[Opener]:
    """Opens UDP sockets on the world's host, and closes them in the end."""
    names = AddressNames()
    with contextlib.ExitStack() as stack:

        def open_one(version: int, port: int = 0) -> HostDatagramSocket:
            sock = call_inside(world.host, lambda: open_udp(names, packed(LOOPBACK[version]), port))
            stack.callback(sock.close)
            return sock

        yield open_one


def is_merging(sock: HostDatagramSocket) -> bool:
    return bool(sock._merging)


def wait_error(sock: HostDatagramSocket) -> SocketError:
    assert wait_readable(sock, 0) & select.POLLERR
    error = sock.receive_error()
    assert error is not None
    return error


def test_names_are_kept_both_ways_and_bounded() -> None:
    names = AddressNames()
    for text in ("192.168.5.15", "fd00::15", "::1", "255.255.255.255"):
        assert names.name(packed(text)) == text
        assert names.address(text) == packed(text)
    assert names.address("fe80::1%eth0") == packed("fe80::1")
    for number in range(20_000):
        address = number.to_bytes(4, "big")
        assert names.address(names.name(address)) == address
    assert len(names._names) <= 8192
    assert len(names._addresses) <= 8192


@VERSIONS
@pytest.mark.parametrize("size", (0, 1, 1000, 60_000))
def test_there_and_back(world: World, open_inside: Opener, version: int, size: int) -> None:
    sock = open_inside(version)
    payload = bytes(size)
    buffer = memoryview(bytearray(65536))
    with echo_socket(world.host, FAMILY[version], LOOPBACK[version]) as peer:
        port = peer.getsockname()[1]
        sock.send_to(memoryview(payload), packed(LOOPBACK[version]), port, 64, True)
        received, source = peer.recvfrom(65536)
        assert received == payload
        peer.sendto(b"answer", source)
        wait_readable(sock)
        assert sock.receive_from(buffer) == (6, 6, packed(LOOPBACK[version]), port)
        assert bytes(buffer[:6]) == b"answer"
        peer.sendto(b"", source)
        wait_readable(sock)
        assert sock.receive_from(buffer) == (0, 0, packed(LOOPBACK[version]), port)
        with pytest.raises(BlockingIOError):
            sock.receive_from(buffer)
        assert sock.receive_error() is None


@VERSIONS
def test_the_port_is_kept_where_it_is_free(world: World, open_inside: Opener, version: int) -> None:
    first = open_inside(version, 40123)
    second = open_inside(version, 40123)
    with echo_socket(world.host, FAMILY[version], LOOPBACK[version]) as peer:
        ports = []
        for sock in (first, second):
            sock.send_to(b"x", packed(LOOPBACK[version]), peer.getsockname()[1], 64, True)
            ports.append(peer.recvfrom(10)[1][1])
    assert ports[0] == 40123
    assert ports[1] not in (0, 40123)
    other_family = open_inside(10 - version, 40123)  # IPv6 sockets take no IPv4 port
    assert other_family.fileno() >= 0


@VERSIONS
def test_the_ttl_is_what_was_asked(world: World, open_inside: Opener, version: int) -> None:
    sock = open_inside(version)
    with echo_socket(world.host, FAMILY[version], LOOPBACK[version]) as peer:
        if version == 4:
            peer.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        else:
            peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        for ttl in (64, 64, 5, 255, 64):
            sock.send_to(b"x", packed(LOOPBACK[version]), peer.getsockname()[1], ttl, ttl == 5)
            [(_, _, data)] = peer.recvmsg(10, 100)[1]
            assert int.from_bytes(data[:4], "little") == ttl


@VERSIONS
def test_a_closed_port_is_an_error_in_the_queue_and_an_echo_of_it(
    world: World, open_inside: Opener, version: int
) -> None:
    sock = open_inside(version)
    loopback = packed(LOOPBACK[version])
    sock.send_to(b"knock", loopback, 9, 64, True)
    assert wait_readable(sock, 0) & select.POLLERR
    with pytest.raises(ConnectionRefusedError):  # the echo: it concerns the first datagram, and loses the second
        sock.send_to(b"second", loopback, 9, 64, True)
    error = wait_error(sock)
    kind, code = (3, 3) if version == 4 else (1, 4)
    assert error == SocketError(errno.ECONNREFUSED, loopback, 9, loopback, kind, code, 0, b"knock")
    assert sock.receive_error() is None


@VERSIONS
def test_a_router_that_drops_for_the_ttl_is_named(world: World, open_inside: Opener, version: int) -> None:
    sock = open_inside(version)
    sock.send_to(b"probe", packed(FAR[version]), 33434, 1, True)
    error = wait_error(sock)
    assert error.offender == packed(ROUTER[version])
    assert (error.icmp_type, error.icmp_code) == ((11, 0) if version == 4 else (3, 0))
    assert (error.destination, error.port, error.payload) == (packed(FAR[version]), 33434, b"probe")


@pytest.mark.parametrize(
    ("address", "kind", "code"),
    ((UNREACHABLE4, 3, 1), (PROHIBITED4, 3, 13), (UNREACHABLE6, 1, None), (PROHIBITED6, 1, 1)),
)
def test_what_routers_say(world: World, open_inside: Opener, address: str, kind: int, code: int | None) -> None:
    version = 6 if ":" in address else 4
    sock = open_inside(version)
    deadline = time.monotonic() + 10
    error = None
    while error is None:
        # Linux, as a router, says so once a second at most (net.ipv4.route.error_cost).
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            sock.send_to(b"probe", packed(address), 7, 64, True)
        if is_ready(sock, 0, 0.2):
            error = sock.receive_error()
    assert error.offender == packed(ROUTER[version])
    assert error.icmp_type == kind
    if code is not None:  # over IPv6, kernels differ in what they call an unreachable route
        assert error.icmp_code == code


@VERSIONS
def test_the_path_mtu_is_found_and_then_known(world: World, open_inside: Opener, version: int) -> None:
    """DF: first a router complains, and from then on the host's kernel itself."""
    sock = open_inside(version)
    far = packed(FAR[version])
    with echo_socket(world.far, FAMILY[version], FAR[version], 7000 + version) as peer:
        payload = bytes(1440 - (0 if version == 4 else 20))
        sock.send_to(payload, far, 7000 + version, 64, True)
        error = wait_error(sock)
        assert (error.errno, error.offender, error.mtu) == (errno.EMSGSIZE, packed(ROUTER[version]), FAR_MTU)
        deadline = time.monotonic() + 10
        while True:  # the error's echo may come first, once
            assert time.monotonic() < deadline
            with pytest.raises(OSError) as failure:
                sock.send_to(payload, far, 7000 + version, 64, True)
            assert failure.value.errno == errno.EMSGSIZE
            local = sock.receive_error()
            if local is not None and local.offender is None:
                break
        assert (local.errno, local.mtu, local.icmp_type) == (errno.EMSGSIZE, FAR_MTU, -1)
        # Without DF the kernel cuts it up.
        sock.send_to(payload, far, 7000 + version, 64, False)
        assert len(peer.recv(65536)) == len(payload)


@VERSIONS
@pytest.mark.parametrize("last", (1200, 7))
def test_segments_leave_in_one_call(open_inside: Opener, world: World, version: int, last: int) -> None:
    sock = open_inside(version)
    assert sock.segments
    payloads = [bytes((number,)) * 1200 for number in range(40)]
    payloads.append(b"z" * last)
    with echo_socket(world.host, FAMILY[version], LOOPBACK[version]) as peer:
        port = peer.getsockname()[1]
        sock.send_segments([memoryview(each) for each in payloads], 1200, packed(LOOPBACK[version]), port, 64, True)
        assert [peer.recv(65536) for _ in payloads] == payloads


@VERSIONS
def test_segments_beyond_the_paths_mtu_are_refused_as_a_whole(open_inside: Opener, world: World, version: int) -> None:
    """On this the core relies: it tries again one by one."""
    sock = open_inside(version)
    for dont_fragment in (True, False):
        with pytest.raises(OSError) as failure:
            sock.send_segments([bytes(2000)] * 4, 2000, packed(ROUTER[version]), 9, 64, dont_fragment)
        assert failure.value.errno in (errno.EINVAL, errno.EMSGSIZE)


@VERSIONS
def test_merged_datagrams_are_told_apart(open_inside: Opener, world: World, version: int) -> None:
    """The kernel merges what was sent as segments, once it has been asked to."""
    sender, receiver = open_inside(version), open_inside(version, 40200)
    loopback = packed(LOOPBACK[version])
    buffer = memoryview(bytearray(65536))
    sender.send_to(b"before", loopback, 40200, 64, True)
    receiver.expect_bursts()
    payloads = [bytes((number,)) * 1000 for number in range(20)] + [b"end"]
    sender.send_segments(payloads, 1000, loopback, 40200, 64, True)
    received: list[bytes] = []
    calls = 0
    while len(received) < 1 + len(payloads):
        wait_readable(receiver)
        length, segment, address, _ = receiver.receive_from(buffer)
        assert address == loopback
        calls += 1
        received += [bytes(buffer[at : min(at + segment, length)]) for at in range(0, length, segment)]
    assert received == [b"before", *payloads]
    assert calls < len(received)


def test_merging_is_given_up_where_nothing_is_merged(open_inside: Opener) -> None:
    sender, receiver = open_inside(4), open_inside(4, 40201)
    buffer = memoryview(bytearray(65536))
    receiver.expect_bursts()
    assert is_merging(receiver)
    for number in range(300):
        sender.send_to(number.to_bytes(2, "big"), packed("127.0.0.1"), 40201, 64, True)
        wait_readable(receiver)
        assert receiver.receive_from(buffer)[:2] == (2, 2)
        assert bytes(buffer[:2]) == number.to_bytes(2, "big")
        with contextlib.suppress(BlockingIOError):
            receiver.receive_from(buffer)
            pytest.fail("there was only one")
    assert not is_merging(receiver)
    receiver.expect_bursts()
    assert not is_merging(receiver)


class Guest:
    """A guest's UDP, through the core, to the real sockets of the world's host."""

    def __init__(self, world: World, version: int) -> None:
        self.stack = RealStack(world.host)
        self.udp = UdpFlows(self.stack)
        self.link = FakeLink()
        self.address = GUEST4 if version == 4 else GUEST6

    def send(
        self, src_port: int, dst: bytes, dst_port: int, payload: bytes, ttl: int = 64, *, dont_fragment: bool = True
    ) -> None:
        buffer = memoryview(payload)
        self.udp.on_datagram(
            self.link,
            MAC,
            self.address,
            src_port,
            dst,
            dst_port,
            buffer,
            0,
            len(buffer),
            ttl,
            dont_fragment,
            time.monotonic(),
        )
        self.stack.end_batch(time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.udp.close_all(time.monotonic())


@VERSIONS
def test_traceroute(world: World, version: int) -> None:
    """Hop by hop: the gateway, the router, the machine behind it, each by its own address."""
    with Guest(world, version) as guest:
        for ttl in (1, 2, 3, 4):
            guest.send(50_000 + ttl, packed(FAR[version]), 33433 + ttl, b"probe", ttl)
        guest.stack.pump(lambda: len(guest.stack.errors) == 4, "four answers")
        answers = {
            int.from_bytes(error.packet[-11:-9], "big") - 33433: (error.src, tuple(error.problem))
            for error in guest.stack.errors
        }
        exceeded, closed = ((11, 0), (3, 3)) if version == 4 else ((3, 0), (1, 4))
        assert answers == {
            1: (None, tuple(TTL_EXCEEDED)),
            2: (packed(ROUTER[version]), exceeded * 2),
            3: (packed(FAR[version]), closed * 2),
            4: (packed(FAR[version]), closed * 2),
        }
        assert all(error.written is not None for error in guest.stack.errors)


@VERSIONS
def test_the_guest_learns_the_path_mtu(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        payload = bytes(1441 - (0 if version == 4 else 20))
        # Either the router says so or, when another test has asked it already, the host's own kernel.
        guest.send(51_000, packed(FAR[version]), 7007, payload)
        guest.stack.pump(lambda: guest.stack.errors, "too big")
        error = guest.stack.taken_errors()[0]
        assert error.parameter == FAR_MTU
        assert error.problem[:2] == TOO_BIG[:2] if version == 4 else error.problem[2:] == TOO_BIG[2:]
        assert error.written is not None


@VERSIONS
def test_the_gateway_is_the_hosts_loopback(world: World, version: int) -> None:
    with Guest(world, version) as guest:
        gateway = GATEWAY4 if version == 4 else GATEWAY6
        with echo_socket(world.host, FAMILY[version], LOOPBACK[version]) as peer:
            guest.send(52_000, gateway, peer.getsockname()[1], b"question")
            received, source = peer.recvfrom(100)
            assert (received, source[1]) == (b"question", 52_000)
            peer.sendto(b"answer", source)
            guest.stack.pump(lambda: guest.stack.packets, "an answer")
        [packet] = guest.stack.taken()
        assert packet.endswith(b"answer")
        assert gateway in (packet[12:16], packet[8:24])


def test_a_stranger_does_not_reach_the_guest(world: World) -> None:
    """The host's port is open to its whole network; the guest's is not."""
    with Guest(world, 4) as guest:
        with (
            echo_socket(world.host, socket.AF_INET, "127.0.0.1") as peer,
            echo_socket(world.router, socket.AF_INET, ROUTER4) as stranger,
        ):
            guest.send(53_000, GATEWAY4, peer.getsockname()[1], b"question")
            source = peer.recvfrom(100)[1]
            stranger.sendto(b"hello there", ("198.51.100.1", source[1]))
            guest.stack.pump(lambda: guest.stack.drops["udp_unsolicited"], "the stranger's datagram")
            peer.sendto(b"answer", source)
            guest.stack.pump(lambda: guest.stack.packets, "the answer")
        assert [packet[-6:] for packet in guest.stack.taken()] == [b"answer"]


def test_a_host_without_an_ipv6_route() -> None:
    with World(ipv6_route=False) as world, Guest(world, 6) as guest:
        guest.send(54_000, packed(FAR6), 7, b"x")
        [error] = guest.stack.taken_errors()
        assert tuple(error.problem[2:]) == (1, 0)


@VERSIONS
def test_many_datagrams_in_one_call(open_inside: Opener, world: World, version: int) -> None:
    """Runs of one peer and one size; the empty, the largest and another peer's among them."""
    receiver, other = open_inside(version, 40300), open_inside(version, 40301)
    sender = open_inside(version, 40302)
    loopback = packed(LOOPBACK[version])
    receiver.expect_bursts()
    assert receiver.batches
    sent: list[tuple[bytes, int]] = [(bytes((number,)) * 1000, 40302) for number in range(20)]
    sent += [(b"", 40302), (b"", 40302), (b"z" * 65000, 40302), (b"other", 40301), (b"again", 40302)]
    for payload, port in sent:
        (sender if port == 40302 else other).send_to(payload, loopback, 40300, 64, False)
    received: list[tuple[bytes, int]] = []
    runs = 0
    buffer = memoryview(bytearray(65536))

    def take(length: int, size: int, address: bytes, port: int) -> None:
        nonlocal runs
        runs += 1
        assert address == loopback
        whole = bytes(buffer[:length])
        received.extend((whole[at : at + size], port) for at in range(0, max(length, 1), max(size, 1)))

    count = 0
    while len(received) < len(sent):
        wait_readable(receiver)
        count += receiver.receive_batch(buffer, take)
    assert received == sent
    assert count == len(sent)
    assert runs <= 12
    assert receiver.receive_batch(buffer, take) == 0


@VERSIONS
def test_a_batch_tells_merged_datagrams_apart(open_inside: Opener, world: World, version: int) -> None:
    receiver, sender = open_inside(version, 40320), open_inside(version)
    loopback = packed(LOOPBACK[version])
    receiver.expect_bursts()
    payloads = [bytes((number,)) * 1000 for number in range(20)] + [b"end"]
    sender.send_to(b"before", loopback, 40320, 64, True)
    sender.send_segments(payloads, 1000, loopback, 40320, 64, True)
    sender.send_to(b"behind", loopback, 40320, 64, True)
    buffer = memoryview(bytearray(65536))
    received: list[bytes] = []
    runs: list[tuple[int, int]] = []

    def take(length: int, size: int, address: bytes, port: int) -> None:
        runs.append((length, size))
        received.extend(bytes(buffer[at : min(at + size, length)]) for at in range(0, length, size))

    while len(received) < 2 + len(payloads):
        wait_readable(receiver)
        receiver.receive_batch(buffer, take)
    assert received == [b"before", *payloads, b"behind"]
    assert (20_003, 1000) in runs
    assert receiver._limit < 64  # what is merged is much at once


@VERSIONS
def test_batches_end_when_datagrams_come_one_by_one(open_inside: Opener, world: World, version: int) -> None:
    receiver, sender = open_inside(version, 40310), open_inside(version)
    receiver.expect_bursts()
    buffer = memoryview(bytearray(65536))
    got: list[int] = []
    for _ in range(300):
        if not receiver.batches:
            break
        sender.send_to(b"one", packed(LOOPBACK[version]), 40310, 64, False)
        wait_readable(receiver)
        receiver.receive_batch(buffer, lambda length, size, address, port: got.append(length))
    assert not receiver.batches
    assert got == [3] * 256
    receiver.expect_bursts()
    assert receiver.batches


@VERSIONS
def test_an_error_in_a_batch_is_told_as_such(open_inside: Opener, world: World, version: int) -> None:
    """The echo of an ICMP error: its substance is in the error queue."""
    sock = open_inside(version)
    sock.expect_bursts()
    sock.send_to(b"nobody there", packed(LOOPBACK[version]), 9, 64, True)
    assert wait_error(sock).errno == errno.ECONNREFUSED
    sock.send_to(b"nobody there", packed(LOOPBACK[version]), 9, 64, True)
    buffer = memoryview(bytearray(65536))
    with pytest.raises(ConnectionRefusedError):
        sock.receive_batch(buffer, lambda length, size, address, port: None)
