"""ICMP of guests: the gateway's own answers, ping flows on a fake host, errors. scapy reads what guests get."""

from __future__ import annotations

import errno

import pytest
from scapy.layers.inet import ICMP, IP, ICMPerror
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6

from netstack.core.icmp import IcmpLayer, PingFlow, write_request
from netstack.core.ports import FAILED, READABLE, SocketError
from netstack.core.udp import write_packet
from netstack.wire import icmp
from netstack.wire.icmp import NO_ROUTE, PROHIBITED, TOO_BIG, TTL_EXCEEDED, write_echo, write_echo6
from netstack.wire.ipv4 import parse_ipv4
from netstack.wire.ipv6 import parse_ipv6
from tests.core.ip_fakes import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    LINK_LOCAL6,
    MAC,
    ROUTER4,
    ROUTER6,
    WORLD4,
    WORLD6,
    FakeDatagramSocket,
    FakeLink,
    FakeStack,
    addresses,
    in_buffer,
)

GUEST_LINK_LOCAL6 = bytes.fromhex("fe80000000000000505400fffe123456")
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
FAMILIES = pytest.mark.parametrize(("guest", "world"), ((GUEST4, WORLD4), (GUEST6, WORLD6)), ids=("ipv4", "ipv6"))
IDENT = 0x1234


class Bench:
    """One stack, its ICMP and one link."""

    def __init__(self) -> None:
        self.stack = FakeStack()
        self.icmp = IcmpLayer(self.stack)
        self.link = FakeLink()
        self.now = 1000.0

    def receive(self, packet: bytes, *, link: FakeLink | None = None, whole: bool = True) -> None:
        """A packet from a guest, as the stack hands it on."""
        buffer, start, end = in_buffer(packet, before=18)
        if packet[0] >> 4 == 4:
            parsed4 = parse_ipv4(buffer, start, end)
            assert parsed4 is not None
            self.icmp.on_icmp4(link or self.link, MAC, parsed4, buffer, self.now, whole=whole)
        else:
            parsed6 = parse_ipv6(buffer, start, end)
            assert parsed6 is not None
            self.icmp.on_icmp6(link or self.link, MAC, parsed6, buffer, self.now, whole=whole)

    def ping(
        self,
        src: bytes,
        dst: bytes,
        sequence: int = 1,
        payload: bytes = b"abc",
        *,
        ident: int = IDENT,
        ttl: int = 64,
        link: FakeLink | None = None,
        whole: bool = True,
    ) -> bytes:
        packet = write_request(src, dst, ident, sequence, payload, ttl)
        self.receive(packet, link=link, whole=whole)
        return packet

    def flow(self, src: bytes, ident: int = IDENT) -> PingFlow:
        return self.icmp.pings.flows[src, ident]

    def sock(self, src: bytes, ident: int = IDENT) -> FakeDatagramSocket:
        sock = self.flow(src, ident).sock
        assert isinstance(sock, FakeDatagramSocket)
        return sock

    def ready(self, src: bytes, events: int = READABLE) -> None:
        self.stack.poller.ready(self.sock(src).fd, self.now, events)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def dissect(packet: bytes) -> IP | IPv6:
    """What scapy reads, after it confirmed every checksum by computing it anew."""
    kind = IP if packet[0] >> 4 == 4 else IPv6
    anew = kind(packet)
    for layer, name in ((IP, "chksum"), (ICMP, "chksum"), (ICMPv6EchoReply, "cksum"), (ICMPv6TimeExceeded, "cksum")):
        if anew.haslayer(layer):
            delattr(anew[layer], name)
    assert bytes(anew) == packet
    return kind(packet)


def message(world: bytes, guest: bytes, ident: int, sequence: int, payload: bytes, *, reply: bool) -> bytes:
    """An echo message as a ping socket hands it out or takes it."""
    if len(world) == 4:
        return write_echo(ident, sequence, payload, reply=reply)
    return write_echo6(world, guest, ident, sequence, payload, reply=reply)


@pytest.mark.parametrize(
    ("guest", "gateway"),
    (
        (GUEST4, GATEWAY4),
        (GUEST4, addresses().dns),
        (GUEST6, GATEWAY6),
        (GUEST6, addresses().dns6),
        (GUEST_LINK_LOCAL6, LINK_LOCAL6),
    ),
)
@pytest.mark.parametrize("host_loopback", (True, False))
def test_the_gateway_answers_for_itself(bench: Bench, guest: bytes, gateway: bytes, host_loopback: bool) -> None:
    bench.stack.addresses = addresses(host_loopback=host_loopback)
    bench.ping(guest, gateway, 7, b"payload", ttl=1)
    [packet] = bench.stack.taken()
    read = dissect(packet)
    if len(guest) == 4:
        echo = read[ICMP]
        assert (echo.type, echo.code) == (0, 0)
    else:
        echo = read[ICMPv6EchoReply]
    assert (echo.id, echo.seq) == (IDENT, 7)
    assert packet.endswith(b"payload")
    assert (packet[12:16], packet[16:20]) == (gateway, guest) or (packet[8:24], packet[24:40]) == (gateway, guest)
    assert not bench.stack.fake_host.ping


def test_all_nodes_are_answered_from_a_unicast_address(bench: Bench) -> None:
    """RFC 4443 4.2."""
    bench.ping(GUEST_LINK_LOCAL6, ALL_NODES)
    bench.ping(GUEST6, ALL_NODES)
    assert [packet[8:24] for packet in bench.stack.taken()] == [LINK_LOCAL6, GATEWAY6]


@FAMILIES
def test_an_answer_larger_than_the_guests_mtu_is_fragmented(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.stack.mtu = 1500
    bench.ping(guest, GATEWAY4 if len(guest) == 4 else GATEWAY6, 1, bytes(4000))
    packets = bench.stack.taken()
    assert len(packets) == 3
    assert max(map(len, packets)) <= 1500


@FAMILIES
def test_the_world_answers_with_the_guests_identifier(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.ping(guest, world, 1, b"one")
    bench.ping(guest, world, 2, b"two")
    [sock] = bench.stack.fake_host.ping
    assert [(sent.address, sent.port, sent.ttl, sent.dont_fragment) for sent in sock.sent] == [(world, 0, 63, True)] * 2
    assert sock.sent[1].payload == message(guest, world, IDENT, 2, b"two", reply=False)
    sock.incoming.append((message(world, guest, 0x9999, 2, b"two", reply=True), world, 0))
    bench.ready(guest)
    [packet] = bench.stack.taken()
    read = dissect(packet)
    assert read.src != read.dst
    echo = read[ICMP] if len(guest) == 4 else read[ICMPv6EchoReply]
    assert (echo.id, echo.seq) == (IDENT, 2)
    assert packet.endswith(b"two")
    flow = bench.flow(guest)
    assert (flow.bytes_from_guest, flow.bytes_to_guest) == (22, 11)


def test_one_socket_for_each_guest_and_identifier(bench: Bench) -> None:
    bench.ping(GUEST4, WORLD4)
    bench.ping(GUEST4, ROUTER4)
    assert len(bench.stack.fake_host.ping) == 1
    bench.ping(GUEST4, WORLD4, ident=2)
    bench.ping(GUEST4[:3] + b"\x10", WORLD4)
    assert len(bench.stack.fake_host.ping) == len(bench.icmp.pings) == 3


@FAMILIES
def test_the_gateway_is_the_first_hop(bench: Bench, guest: bytes, world: bytes) -> None:
    packet = bench.ping(guest, world, 5, ttl=1)
    [error] = bench.stack.taken_errors()
    assert (error.src, error.problem, error.packet) == (None, TTL_EXCEEDED, packet)
    assert error.written is not None
    assert bench.stack.drops == {"ping_ttl_exceeded": 1}
    assert not bench.stack.fake_host.ping


@FAMILIES
def test_further_hops_are_the_routers_themselves(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.ping(guest, world, 5, ttl=3)
    sock = bench.sock(guest)
    assert sock.sent[0].ttl == 2
    router = ROUTER4 if len(guest) == 4 else ROUTER6
    kind = icmp.TIME_EXCEEDED if len(guest) == 4 else icmp.TIME_EXCEEDED6
    quoted = message(guest, world, 0x9999, 5, b"abc", reply=False)
    sock.errors.append(SocketError(errno.EHOSTUNREACH, world, 0, router, kind, 0, 0, quoted))
    sock.incoming.append(OSError(errno.EHOSTUNREACH, "the echo"))
    bench.ready(guest, READABLE | FAILED)
    [error] = bench.stack.taken_errors()
    assert error.src == router
    assert error.written is not None
    read = dissect(error.written)
    inner = read[ICMPerror] if len(guest) == 4 else read[ICMPv6TimeExceeded][ICMPv6EchoRequest]
    assert (inner.id, inner.seq) == (IDENT, 5)


def test_an_error_without_the_request_is_nothing_to_relay(bench: Bench) -> None:
    bench.ping(GUEST4, WORLD4)
    bench.sock(GUEST4).errors.append(SocketError(errno.EHOSTUNREACH, WORLD4, 0, ROUTER4, 11, 0, 0, b""))
    bench.ready(GUEST4, FAILED)
    assert not bench.stack.errors


@FAMILIES
def test_where_ping_sockets_are_forbidden(bench: Bench, guest: bytes, world: bytes) -> None:
    for sequence in range(3):
        bench.stack.fake_host.failures.append(PermissionError(errno.EACCES, "ping_group_range"))
        bench.ping(guest, world, sequence)
    errors = bench.stack.taken_errors()
    assert [error.problem for error in errors] == [PROHIBITED] * 3
    assert errors[0].written is not None
    at = 20 if len(guest) == 4 else 40
    assert tuple(errors[0].written[at : at + 2]) == ((3, 13) if len(guest) == 4 else (1, 1))
    assert bench.stack.drops == {"ping_forbidden": 3}
    assert bench.stack.recorded.warnings == {"ping_forbidden": 1}
    # The gateway answers nevertheless.
    bench.ping(guest, GATEWAY4 if len(guest) == 4 else GATEWAY6)
    assert len(bench.stack.taken()) == 1


def test_a_host_without_ping_sockets_or_without_the_family(bench: Bench) -> None:
    bench.stack.fake_host.failures.append(OSError(errno.EPROTONOSUPPORT, "no ping sockets"))
    bench.stack.fake_host.failures.append(OSError(errno.EAFNOSUPPORT, "no IPv6"))
    bench.ping(GUEST4, WORLD4)
    bench.ping(GUEST6, WORLD6)
    assert [error.problem for error in bench.stack.taken_errors()] == [PROHIBITED, NO_ROUTE]
    assert bench.stack.drops == {"ping_no_socket": 2}
    assert not bench.stack.recorded.warnings


@FAMILIES
def test_what_is_not_allowed_is_unreachable(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.stack.denied.add(world)
    packet = bench.ping(guest, world)
    [error] = bench.stack.taken_errors()
    assert (error.problem, error.packet) == (NO_ROUTE, packet)
    assert bench.stack.drops == {"ping_denied": 1}


def test_too_big_for_the_hosts_path(bench: Bench) -> None:
    bench.ping(GUEST4, WORLD4)
    sock = bench.sock(GUEST4)
    sock.failures.append(OSError(errno.EMSGSIZE, "too long"))
    sock.errors.append(SocketError(errno.EMSGSIZE, WORLD4, 0, None, -1, -1, 1400))
    packet = bench.ping(GUEST4, WORLD4, 9, bytes(2000))
    [error] = bench.stack.taken_errors()
    assert (error.problem, error.parameter) == (TOO_BIG, 1400)
    assert error.packet[20:] == packet[20:]


def test_what_came_in_pieces_may_leave_in_pieces(bench: Bench) -> None:
    bench.ping(GUEST6, WORLD6, whole=False)
    assert bench.sock(GUEST6).sent[0].dont_fragment is False


def test_an_echo_of_an_earlier_error_does_not_lose_the_next_request(bench: Bench) -> None:
    bench.ping(GUEST4, WORLD4, 1)
    sock = bench.sock(GUEST4)
    quoted = write_echo(0x9999, 1, b"abc", reply=False)
    sock.errors.append(SocketError(errno.EHOSTUNREACH, WORLD4, 0, ROUTER4, 3, 1, 0, quoted))
    sock.failures.append(OSError(errno.EHOSTUNREACH, "the echo"))
    bench.ping(GUEST4, WORLD4, 2)
    assert [sent.payload[7] for sent in sock.sent] == [1, 2]
    assert len(bench.stack.taken_errors()) == 1


@pytest.mark.parametrize("junk", (b"", b"\0\0\0", write_echo(1, 1, b"", reply=False)))
def test_only_echo_replies_are_passed_on(bench: Bench, junk: bytes) -> None:
    bench.ping(GUEST4, WORLD4)
    bench.sock(GUEST4).incoming.append((junk, WORLD4, 0))
    bench.ready(GUEST4)
    assert not bench.stack.packets
    assert bench.stack.drops == {"ping_unexpected": 1}


def test_a_minute_idle(bench: Bench) -> None:
    """RFC 5508 REQ-2."""
    bench.ping(GUEST4, WORLD4)
    sock = bench.sock(GUEST4)
    bench.stack.advance(1060.0)
    assert not sock.is_closed()
    bench.stack.advance(1062.0)
    assert sock.is_closed()


def test_one_guest_cannot_evict_anothers(bench: Bench) -> None:
    bench.stack.limits.ping_flows = 10
    victim = FakeLink("victim")
    bench.ping(GUEST4, WORLD4, link=victim)
    for ident in range(50):
        bench.ping(GUEST4[:3] + b"\x33", WORLD4, ident=ident)
    assert (GUEST4, IDENT) in bench.icmp.pings.flows
    assert len(bench.icmp.pings) == 10
    bench.icmp.close_link(victim, bench.now)
    assert len(bench.icmp.pings) == 9
    bench.icmp.close_all(bench.now)
    assert not bench.stack.poller.handlers


class TestErrorsFromGuests:
    @FAMILIES
    def test_about_a_datagram_of_a_flow(self, bench: Bench, guest: bytes, world: bytes) -> None:
        buffer, start, end = in_buffer(b"x")
        bench.stack.udp.on_datagram(bench.link, MAC, guest, 4000, world, 7, buffer, start, end, 64, True, bench.now)
        delivered = write_packet(world, 7, guest, 4000, b"answer", 64)
        error = icmp.write_error(guest, delivered, icmp.PORT_UNREACHABLE)
        assert error is not None
        bench.receive(error)
        assert bench.stack.drops == {"udp_refused_by_guest": 1}

    def test_about_anything_else(self, bench: Bench) -> None:
        for packet in (
            write_packet(WORLD4, 7, GUEST4, 4000, b"answer", 64),  # no such flow
            write_packet(WORLD4, 7, ROUTER4, 4000, b"answer", 64),  # was not sent to this guest
            write_request(WORLD4, GUEST4, 1, 1, b"", 64),
        ):
            error = icmp.write_error(GUEST4, packet, icmp.PORT_UNREACHABLE)
            assert error is not None
            moved = error[:12] + GUEST4 + error[16:]
            bench.receive(moved)
        assert bench.stack.drops == {"icmp_error_from_guest": 3}


@pytest.mark.parametrize("length", range(8))
@FAMILIES
def test_short_messages_are_dropped(bench: Bench, guest: bytes, world: bytes, length: int) -> None:
    """The class of libslirp's CVE-2020-10756: a length field that promises more than there is."""
    packet = write_request(guest, world, 1, 1, b"", 64)
    header = 20 if len(guest) == 4 else 40
    short = bytearray(packet[: header + length])
    if len(guest) == 4:
        short[2:4] = len(short).to_bytes(2, "big")
    else:
        short[4:6] = length.to_bytes(2, "big")
        if not length:
            return  # a jumbogram by its length; wire.ipv6 refuses that
    bench.receive(bytes(short))
    assert bench.stack.drops == {"icmp_malformed": 1}


def test_other_messages_are_dropped(bench: Bench) -> None:
    for kind in (ICMP(type=13), ICMP(type=0), ICMP(type=17)):
        bench.receive(bytes(IP(src="192.168.5.15", dst="192.168.5.2") / kind))
    bench.receive(bytes(IPv6(src="fd00:c0a8:5::15", dst="fd00:c0a8:5::2") / ICMPv6EchoReply()))
    assert bench.stack.drops == {"icmp_unsupported": 4}
    assert not bench.stack.packets
