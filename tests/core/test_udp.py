"""UDP flows on a fake host: mapping, filtering, errors, time, caps. scapy is the oracle for what guests get."""

from __future__ import annotations

import errno

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPerror, UDPerror
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6

from netstack.core.datagrams import BURST
from netstack.core.flows import flow_key
from netstack.core.ports import FAILED, READABLE, SocketError
from netstack.core.udp import UdpFlow, UdpPath, write_packet
from netstack.wire import icmp
from netstack.wire.icmp import NO_ROUTE, PORT_UNREACHABLE, TOO_BIG, TTL_EXCEEDED
from tests.core.ip_fakes import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    LINK_LOCAL6,
    LOOPBACK4,
    LOOPBACK6,
    MAC,
    ROUTER4,
    ROUTER6,
    WORLD4,
    WORLD6,
    FakeDatagramSocket,
    FakeLink,
    FakeStack,
    in_buffer,
)

FAMILIES = pytest.mark.parametrize(("guest", "world"), ((GUEST4, WORLD4), (GUEST6, WORLD6)), ids=("ipv4", "ipv6"))


class Bench:
    """One stack, its UDP flows and one link."""

    def __init__(self) -> None:
        self.stack = FakeStack()
        self.udp = self.stack.udp
        self.link = FakeLink()
        self.now = 1000.0

    def send(
        self,
        src: bytes,
        src_port: int,
        dst: bytes,
        dst_port: int,
        payload: bytes = b"hello",
        *,
        ttl: int = 64,
        dont_fragment: bool = True,
        link: FakeLink | None = None,
        mac: bytes = MAC,
    ) -> None:
        buffer, start, end = in_buffer(payload)
        on_link = link or self.link
        self.udp.on_datagram(
            on_link, mac, src, src_port, dst, dst_port, buffer, start, end, ttl, dont_fragment, self.now
        )

    def flow(self, src: bytes, port: int) -> UdpFlow:
        return self.udp.flows[src, port]

    def sock(self, src: bytes, port: int) -> FakeDatagramSocket:
        sock = self.flow(src, port).sock
        assert isinstance(sock, FakeDatagramSocket)
        return sock

    def ready(self, src: bytes, port: int, events: int = READABLE) -> None:
        self.stack.poller.ready(self.sock(src, port).fd, self.now, events)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def dissect(packet: bytes) -> IP | IPv6:
    """What scapy reads, after it confirmed every checksum by computing it anew."""
    kind = IP if packet[0] >> 4 == 4 else IPv6
    anew = kind(packet)
    for layer in (IP, UDP, ICMP):
        if anew.haslayer(layer):
            del anew[layer].chksum
    assert bytes(anew) == packet
    return kind(packet)


@FAMILIES
@pytest.mark.parametrize("payload", (b"", b"x", b"hello", bytes(range(256)) * 8), ids=len)
def test_there_and_back(bench: Bench, guest: bytes, world: bytes, payload: bytes) -> None:
    bench.send(guest, 4000, world, 7, payload)
    [(family, port, sock)] = bench.stack.fake_host.udp
    assert (family, port) == (guest, 4000)
    [sent] = sock.sent
    assert (sent.payload, sent.address, sent.port, sent.ttl, sent.dont_fragment) == (payload, world, 7, 63, True)
    sock.incoming.append((payload, world, 7))
    bench.ready(guest, 4000)
    [(link, mac, packet)] = bench.stack.packets
    assert link is bench.link
    assert mac == MAC
    back = dissect(packet)
    assert (back[UDP].sport, back[UDP].dport) == (7, 4000)
    assert bytes(back[UDP].payload) == payload
    assert packet == write_packet(world, 7, guest, 4000, payload, 64)
    assert not bench.stack.drops
    flow = bench.flow(guest, 4000)
    assert (flow.bytes_from_guest, flow.bytes_to_guest) == (len(payload), len(payload))


def test_one_socket_for_all_peers_of_an_endpoint(bench: Bench) -> None:
    """RFC 4787 REQ-1."""
    for last in range(1, 30):
        bench.send(GUEST4, 4000, WORLD4[:3] + bytes((last,)), 1000 + last)
    assert len(bench.stack.fake_host.udp) == len(bench.udp) == 1
    bench.send(GUEST4, 4001, WORLD4, 7)
    assert len(bench.stack.fake_host.udp) == 2


def test_any_port_of_an_asked_address_may_answer_and_no_other_address(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 69)
    sock = bench.sock(GUEST4, 4000)
    sock.incoming.extend([(b"tftp", WORLD4, 32000), (b"stranger", ROUTER4, 69)])
    bench.ready(GUEST4, 4000)
    [packet] = bench.stack.taken()
    assert dissect(packet)[UDP].sport == 32000
    assert bench.stack.drops == {"udp_unsolicited": 1}
    bench.send(GUEST4, 4000, ROUTER4, 69)
    sock.incoming.append((b"no stranger now", ROUTER4, 69))
    bench.ready(GUEST4, 4000)
    assert len(bench.stack.taken()) == 1


def test_what_is_remembered_of_the_asked_is_bounded_and_the_newest_stay(bench: Bench) -> None:
    peers = [(0xC6330000 + number).to_bytes(4, "big") for number in range(3000)]
    for peer in peers:
        bench.send(GUEST4, 4000, peer, 6881)
    asked = bench.flow(GUEST4, 4000).asked
    assert list(asked) == peers[-1024:]
    for port in range(5000, 5080):
        for peer in peers[:1024]:
            bench.send(GUEST4, port, peer, 6881)
    assert sum(len(flow.asked) for flow in bench.udp) <= 65536 + len(bench.udp)
    assert all(peers[1023] in flow.asked for flow in bench.udp if flow.port >= 5000)
    bench.udp.close_all(bench.now)
    bench.send(GUEST4, 4000, WORLD4, 1)
    bench.send(GUEST4, 4000, ROUTER4, 1)
    assert list(bench.flow(GUEST4, 4000).asked) == [WORLD4, ROUTER4]


@pytest.mark.parametrize(
    ("guest", "gateway", "loopback"),
    ((GUEST4, GATEWAY4, LOOPBACK4), (GUEST6, GATEWAY6, LOOPBACK6), (GUEST6, LINK_LOCAL6, LOOPBACK6)),
)
def test_the_gateway_is_the_hosts_loopback(bench: Bench, guest: bytes, gateway: bytes, loopback: bytes) -> None:
    bench.send(guest, 4000, gateway, 7, ttl=1)  # it has arrived, so the TTL does not matter
    sock = bench.sock(guest, 4000)
    assert (sock.sent[0].address, sock.sent[0].ttl) == (loopback, 1)
    sock.incoming.append((b"answer", loopback, 7))
    bench.ready(guest, 4000)
    [packet] = bench.stack.taken()
    assert packet == write_packet(gateway, 7, guest, 4000, b"answer", 64)


@FAMILIES
def test_what_is_not_allowed_is_unreachable(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.stack.denied.add(world)
    bench.send(guest, 4000, world, 7)
    [error] = bench.stack.taken_errors()
    assert error.problem == NO_ROUTE
    assert error.packet == write_packet(guest, 4000, world, 7, b"hello", 64)
    assert error.written is not None
    assert bench.stack.drops == {"udp_denied": 1}
    assert not bench.stack.fake_host.udp  # nothing was opened for it


@FAMILIES
def test_the_gateway_is_the_first_hop(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.send(guest, 4000, world, 33434, ttl=1)
    [error] = bench.stack.taken_errors()
    assert (error.src, error.problem) == (None, TTL_EXCEEDED)
    assert error.written is not None
    assert bench.stack.drops == {"udp_ttl_exceeded": 1}
    bench.send(guest, 4000, world, 33435, ttl=2)
    assert bench.sock(guest, 4000).sent[0].ttl == 1


@pytest.mark.parametrize(
    ("guest", "world", "router", "kind", "code"),
    (
        (GUEST4, WORLD4, ROUTER4, icmp.TIME_EXCEEDED, 0),
        (GUEST4, WORLD4, WORLD4, icmp.UNREACHABLE, 3),
        (GUEST4, WORLD4, ROUTER4, icmp.UNREACHABLE, 13),
        (GUEST6, WORLD6, ROUTER6, icmp.TIME_EXCEEDED6, 0),
        (GUEST6, WORLD6, WORLD6, icmp.UNREACHABLE6, 4),
    ),
)
def test_icmp_errors_come_from_the_offender_and_name_the_flow(
    bench: Bench, guest: bytes, world: bytes, router: bytes, kind: int, code: int
) -> None:
    bench.send(guest, 4000, world, 33440, b"probe", ttl=3)
    sock = bench.sock(guest, 4000)
    sock.errors.append(SocketError(errno.EHOSTUNREACH, world, 33440, router, kind, code, 0, b"probe"))
    sock.incoming.append(OSError(errno.EHOSTUNREACH, "the echo"))
    bench.ready(guest, 4000, READABLE | FAILED)
    [error] = bench.stack.taken_errors()
    assert error.src == router
    assert error.packet == write_packet(guest, 4000, world, 33440, b"probe", 1)
    assert error.written is not None
    at = 20 if len(guest) == 4 else 40
    assert error.written[at : at + 2] == bytes((kind, code))
    assert not bench.stack.packets


def test_the_quoted_datagram_reads_well(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 33440, b"probe")
    sock = bench.sock(GUEST4, 4000)
    sock.errors.append(SocketError(errno.EHOSTUNREACH, WORLD4, 33440, ROUTER4, 11, 0, 0, b"probe"))
    bench.ready(GUEST4, 4000, FAILED)
    [error] = bench.stack.taken_errors()
    assert error.written is not None
    read = dissect(error.written)
    assert (read[ICMP].type, read[ICMP].code) == (11, 0)
    assert (read[IPerror].src, read[IPerror].dst) == ("192.168.5.15", "198.51.100.7")
    assert (read[UDPerror].sport, read[UDPerror].dport) == (4000, 33440)


def test_an_error_from_the_hosts_loopback_comes_from_the_gateway(bench: Bench) -> None:
    bench.send(GUEST4, 4000, GATEWAY4, 9)
    sock = bench.sock(GUEST4, 4000)
    sock.errors.append(SocketError(errno.ECONNREFUSED, LOOPBACK4, 9, LOOPBACK4, 3, 3, 0, b"hello"))
    bench.ready(GUEST4, 4000, FAILED)
    [error] = bench.stack.taken_errors()
    assert error.src == GATEWAY4
    assert error.packet == write_packet(GUEST4, 4000, GATEWAY4, 9, b"hello", 1)


@pytest.mark.parametrize(("kind", "code"), ((icmp.SOURCE_QUENCH, 0), (icmp.REDIRECT, 1), (8, 0)))
def test_other_icmp_messages_are_not_relayed(bench: Bench, kind: int, code: int) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.sock(GUEST4, 4000).errors.append(SocketError(0, WORLD4, 7, ROUTER4, kind, code, 0, b"hello"))
    bench.ready(GUEST4, 4000, FAILED)
    assert not bench.stack.errors


def test_a_send_that_echoes_an_earlier_error_is_tried_once_more(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7, b"first")
    sock = bench.sock(GUEST4, 4000)
    sock.errors.append(SocketError(errno.ECONNREFUSED, WORLD4, 7, WORLD4, 3, 3, 0, b"first"))
    sock.failures.append(ConnectionRefusedError(errno.ECONNREFUSED, "the echo"))
    bench.send(GUEST4, 4000, ROUTER4, 9, b"second")
    assert [sent.payload for sent in sock.sent] == [b"first", b"second"]
    [error] = bench.stack.taken_errors()
    assert error.packet == write_packet(GUEST4, 4000, WORLD4, 7, b"first", 1)
    assert not bench.stack.drops


def test_a_pending_too_big_of_an_earlier_datagram_is_not_this_ones(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7, b"a" * 1400)
    sock = bench.sock(GUEST4, 4000)
    sock.errors.append(SocketError(errno.EMSGSIZE, WORLD4, 7, ROUTER4, 3, 4, 1300, b"a" * 500))
    sock.failures.append(OSError(errno.EMSGSIZE, "the echo"))
    bench.send(GUEST4, 4000, WORLD4, 7, b"small")
    assert sock.sent[-1].payload == b"small"
    [error] = bench.stack.taken_errors()
    assert (error.src, error.parameter) == (ROUTER4, 1300)
    assert error.written is not None
    read = dissect(error.written)
    assert (read[ICMP].type, read[ICMP].code, read[ICMP].nexthopmtu) == (3, 4, 1300)


@pytest.mark.parametrize(
    ("code", "problem"),
    (
        (errno.ENETUNREACH, NO_ROUTE),
        (errno.EHOSTUNREACH, icmp.HOST_UNREACHABLE),
        (errno.ECONNREFUSED, PORT_UNREACHABLE),
        (errno.EPERM, icmp.PROHIBITED),
        (errno.EACCES, icmp.PROHIBITED),
    ),
)
@FAMILIES
def test_what_the_host_refuses_at_once(
    bench: Bench, guest: bytes, world: bytes, code: int, problem: icmp.Problem
) -> None:
    bench.send(guest, 4000, world, 7)
    sock = bench.sock(guest, 4000)
    sock.failures.append(OSError(code, "no"))
    bench.send(guest, 4000, world, 7, b"again")
    [error] = bench.stack.taken_errors()
    assert (error.src, error.problem) == (None, problem)
    assert error.written is not None
    assert bench.stack.drops == {"udp_host_refused": 1}


def test_a_failure_that_no_router_has_words_for_is_counted(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.sock(GUEST4, 4000).failures.append(OSError(errno.EINVAL, "port 0"))
    bench.send(GUEST4, 4000, WORLD4, 0)
    assert not bench.stack.errors
    assert bench.stack.drops == {"udp_host_refused": 1}


def test_too_big_for_the_hosts_path(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    sock = bench.sock(GUEST4, 4000)
    sock.failures.append(OSError(errno.EMSGSIZE, "too long"))
    sock.errors.append(SocketError(errno.EMSGSIZE, WORLD4, 0, None, -1, -1, 1420))
    bench.send(GUEST4, 4000, WORLD4, 7, bytes(8000))
    [error] = bench.stack.taken_errors()
    assert (error.src, error.problem, error.parameter) == (None, TOO_BIG, 1420)
    assert bench.stack.drops == {"udp_too_big": 1}
    assert len(sock.sent) == 1


def test_too_big_over_ipv6_names_no_less_than_1280(bench: Bench) -> None:
    bench.send(GUEST6, 4000, WORLD6, 7)
    sock = bench.sock(GUEST6, 4000)
    sock.failures.append(OSError(errno.EMSGSIZE, "too long"))
    bench.send(GUEST6, 4000, WORLD6, 7, bytes(1200))  # where the host says no MTU
    [error] = bench.stack.taken_errors()
    assert error.written is not None
    assert dissect(error.written)[ICMPv6PacketTooBig].mtu == 1280


def test_too_big_without_an_mtu_guesses_the_next_smaller_plateau(bench: Bench) -> None:
    """RFC 1191 7.1: as on hosts without an error queue."""
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.sock(GUEST4, 4000).failures.append(OSError(errno.EMSGSIZE, "too long"))
    bench.send(GUEST4, 4000, WORLD4, 7, bytes(8000 - 28))
    [error] = bench.stack.taken_errors()
    assert error.parameter == 4352


@pytest.mark.parametrize("code", (errno.EAGAIN, errno.ENOBUFS))
def test_a_full_queue_of_the_host_loses_the_datagram(bench: Bench, code: int) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.sock(GUEST4, 4000).failures.append(OSError(code, "full"))
    bench.send(GUEST4, 4000, WORLD4, 7, b"lost")
    bench.send(GUEST4, 4000, WORLD4, 7, b"next")
    assert [sent.payload for sent in bench.sock(GUEST4, 4000).sent] == [b"hello", b"next"]
    assert bench.stack.drops == {"udp_host_queue_full": 1}
    assert not bench.stack.errors


@FAMILIES
def test_frames_over_the_guests_mtu_are_fragmented(bench: Bench, guest: bytes, world: bytes) -> None:
    bench.stack.mtu = 1500
    bench.send(guest, 4000, world, 7)
    payload = bytes(range(256)) * 20
    sock = bench.sock(guest, 4000)
    for _ in range(2):
        sock.incoming.append((payload, world, 7))
    bench.ready(guest, 4000)
    packets = bench.stack.taken()
    assert len(packets) == 8
    assert max(map(len, packets)) <= 1500
    idents = {packet[4:6] if len(guest) == 4 else packet[44:48] for packet in packets}
    assert len(idents) == 2
    overhead = 20 if len(guest) == 4 else 48
    datagram = b"".join(packet[overhead:] for packet in packets[:4])
    whole = write_packet(world, 7, guest, 4000, payload, 64)
    assert datagram == whole[20 if len(guest) == 4 else 40 :]


def test_large_packets_are_given_in_two_pieces_that_do_not_change(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    sock = bench.sock(GUEST4, 4000)
    sock.incoming.append((b"a" * 9000, WORLD4, 7))
    sock.incoming.append((b"b" * 9000, WORLD4, 7))
    bench.ready(GUEST4, 4000)
    assert [bytes(dissect(packet)[UDP].payload) for packet in bench.stack.taken()] == [b"a" * 9000, b"b" * 9000]


def test_one_wakeup_does_a_bounded_amount_of_work(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    sock = bench.sock(GUEST4, 4000)
    sock.incoming.extend((bytes((65 + number % 2,)) * (1 + number % 2), WORLD4, 7) for number in range(BURST + 10))
    bench.ready(GUEST4, 4000)
    assert len(bench.stack.taken()) == BURST
    bench.ready(GUEST4, 4000)
    assert len(bench.stack.taken()) == 10


def test_a_congested_link_leaves_datagrams_in_the_sockets_buffer(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    sock = bench.sock(GUEST4, 4000)
    sock.incoming.append((b"later", WORLD4, 7))
    bench.link.congested = True
    bench.ready(GUEST4, 4000)
    assert not bench.stack.packets
    assert bench.stack.poller.events[sock.fd] == 0
    bench.link.drain(bench.now)
    assert bench.stack.poller.events[sock.fd] == READABLE
    bench.ready(GUEST4, 4000)
    assert len(bench.stack.taken()) == 1


def test_a_flow_that_was_closed_while_it_waited_is_not_touched_again(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.link.congested = True
    bench.ready(GUEST4, 4000)
    bench.udp.close_all(bench.now)
    bench.link.drain(bench.now)
    assert not bench.stack.poller.events


def test_a_guest_that_moves_to_another_link_is_found_there(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    sock = bench.sock(GUEST4, 4000)
    bench.link.congested = True
    bench.ready(GUEST4, 4000)
    other, mac = FakeLink("other"), bytes(6)
    bench.send(GUEST4, 4000, WORLD4, 7, link=other, mac=mac)
    assert bench.stack.poller.events[sock.fd] == READABLE
    sock.incoming.append((b"x", WORLD4, 7))
    bench.ready(GUEST4, 4000)
    [(link, to_mac, _)] = bench.stack.packets
    assert link is other
    assert to_mac == mac
    bench.udp.close_link(bench.link, bench.now)
    assert len(bench.udp) == 1
    bench.udp.close_link(other, bench.now)
    assert len(bench.udp) == 0
    assert sock.is_closed()


class TestTime:
    def test_two_minutes_idle(self, bench: Bench) -> None:
        """RFC 4787 REQ-5."""
        bench.send(GUEST4, 4000, WORLD4, 7)
        sock = bench.sock(GUEST4, 4000)
        bench.stack.advance(1120.0)
        assert not sock.is_closed()
        bench.stack.advance(1123.0)
        assert sock.is_closed()
        assert not bench.stack.poller.handlers
        assert not bench.stack.timers.next_deadline() < float("inf")
        assert bench.stack.recorded.lines == [
            ("opened", "udp", "192.168.5.15:4000", "198.51.100.7:7"),
            ("closed", "udp", "192.168.5.15:4000", "198.51.100.7:7", "idle", 5, 0),
        ]

    def test_either_direction_keeps_it(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        sock = bench.sock(GUEST4, 4000)
        for round_ in range(1, 8):
            bench.now = 1000.0 + 100 * round_
            bench.stack.advance(bench.now)
            if round_ % 2:
                bench.send(GUEST4, 4000, WORLD4, 7)
            else:
                sock.incoming.append((b"x", WORLD4, 7))
                bench.ready(GUEST4, 4000)
        assert not sock.is_closed()
        bench.stack.advance(bench.now + 123)
        assert sock.is_closed()

    def test_a_flow_that_only_asked_for_names_is_short(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 53)
        bench.send(GUEST4, 4001, WORLD4, 53)
        bench.send(GUEST4, 4001, WORLD4, 123)
        bench.stack.advance(1009.0)
        assert len(bench.udp) == 2
        bench.stack.advance(1012.0)
        assert [flow.port for flow in bench.udp] == [4001]
        bench.stack.advance(1123.0)
        assert len(bench.udp) == 0


class TestCaps:
    def test_least_recently_used_goes_first(self, bench: Bench) -> None:
        bench.stack.limits.udp_flows_per_guest = 3
        for port in (1, 2, 3):
            bench.now += 2
            bench.send(GUEST4, port, WORLD4, 7)
        bench.now += 2
        bench.send(GUEST4, 1, WORLD4, 7)
        bench.send(GUEST4, 4, WORLD4, 7)
        assert {flow.port for flow in bench.udp} == {1, 3, 4}
        assert bench.stack.drops == {"udp_flow_evicted": 1}

    def test_one_guest_cannot_evict_anothers(self, bench: Bench) -> None:
        bench.stack.limits.udp_flows = 20
        bench.stack.limits.udp_flows_per_guest = 20
        victim = FakeLink("victim")
        bench.send(GUEST4, 1, WORLD4, 7, link=victim)
        bench.now += 10
        for number in range(200):  # from as many addresses as it likes
            bench.send(GUEST4[:3] + bytes((20 + number % 100,)), 1000 + number, WORLD4, 7)
        assert (GUEST4, 1) in bench.udp.flows
        assert len(bench.udp) == 20

    def test_a_late_guest_gets_its_share_of_a_full_table(self, bench: Bench) -> None:
        bench.stack.limits.udp_flows = 20
        for port in range(20):
            bench.send(GUEST4, port, WORLD4, 7)
        late = FakeLink("late")
        for port in range(30):
            bench.send(GUEST4[:3] + b"\x20", port, WORLD4, 7, link=late)
        assert len(bench.udp) == 20
        assert sum(flow.link is late for flow in bench.udp) == 10

    def test_no_descriptor_left_takes_one_of_the_guests_own(self, bench: Bench) -> None:
        bench.send(GUEST4, 1, WORLD4, 7)
        bench.stack.fake_host.failures.append(OSError(errno.EMFILE, "no descriptors"))
        bench.send(GUEST4, 2, WORLD4, 7)
        assert [flow.port for flow in bench.udp] == [2]
        assert len(bench.sock(GUEST4, 2).sent) == 1

    def test_no_descriptor_at_all_loses_the_datagram(self, bench: Bench) -> None:
        bench.stack.fake_host.failures.append(OSError(errno.EMFILE, "no descriptors"))
        bench.send(GUEST4, 2, WORLD4, 7)
        assert len(bench.udp) == 0
        assert bench.stack.drops == {"udp_no_socket": 1}

    def test_a_limit_of_nothing_is_survived(self, bench: Bench) -> None:
        bench.stack.limits.udp_flows = bench.stack.limits.udp_flows_per_guest = 0
        for port in range(5):
            bench.send(GUEST4, port, WORLD4, 7)
        assert len(bench.udp) == 1


def test_a_host_without_ipv6_is_a_network_that_cannot_be_reached(bench: Bench) -> None:
    bench.stack.fake_host.failures.append(OSError(errno.EAFNOSUPPORT, "no IPv6"))
    bench.send(GUEST6, 4000, WORLD6, 7)
    [error] = bench.stack.taken_errors()
    assert error.problem == NO_ROUTE
    assert len(bench.udp) == 0


def test_errors_from_guests_are_counted(bench: Bench) -> None:
    bench.send(GUEST4, 4000, WORLD4, 7)
    bench.udp.on_error_from_guest(GUEST4, 4000, WORLD4, 7, refused=True)
    bench.udp.on_error_from_guest(GUEST4, 4001, WORLD4, 7, refused=True)
    assert bench.stack.drops == {"udp_refused_by_guest": 1, "icmp_error_from_guest": 1}


class TestBatches:
    """Datagrams of one batch of frames, on a host that takes several in one call."""

    @pytest.fixture
    def bench(self) -> Bench:
        bench = Bench()
        bench.stack.fake_host.segments = True
        return bench

    def sent(self, bench: Bench, port: int = 4000) -> list[bytes]:
        return [sent.payload for sent in bench.sock(GUEST4, port).sent]

    def test_a_stream_leaves_in_one_call_when_the_batch_ends(self, bench: Bench) -> None:
        payloads = [bytes((number,)) * 1200 for number in range(30)]
        for payload in payloads:
            bench.send(GUEST4, 4000, WORLD4, 7, payload)
        assert not self.sent(bench)
        bench.stack.end_batch(bench.now)
        assert self.sent(bench) == payloads
        assert bench.sock(GUEST4, 4000).calls == 1
        assert bench.flow(GUEST4, 4000).bytes_from_guest == 36_000
        bench.stack.end_batch(bench.now)
        assert bench.sock(GUEST4, 4000).calls == 1

    def test_order_is_kept_whatever_changes(self, bench: Bench) -> None:
        """Another size, peer, port, TTL or DF begins another call; a shorter one ends one; an empty one goes alone."""
        steps: list[tuple[bytes, int, bytes, int, bool]] = [
            (WORLD4, 7, b"aaaa", 64, True),
            (WORLD4, 7, b"bbbb", 64, True),
            (WORLD4, 7, b"cc", 64, True),
            (WORLD4, 7, b"dd", 64, True),
            (WORLD4, 7, b"eeee", 64, True),
            (WORLD4, 7, b"", 64, True),
            (WORLD4, 7, b"ffff", 64, True),
            (WORLD4, 8, b"gggg", 64, True),
            (ROUTER4, 8, b"hhhh", 64, True),
            (ROUTER4, 8, b"iiii", 63, True),
            (ROUTER4, 8, b"jjjj", 63, False),
            (ROUTER4, 8, b"kkkk", 63, False),
        ]
        for dst, port, payload, ttl, dont_fragment in steps:
            bench.send(GUEST4, 4000, dst, port, payload, ttl=ttl, dont_fragment=dont_fragment)
        bench.stack.end_batch(bench.now)
        sock = bench.sock(GUEST4, 4000)
        got = [(sent.address, sent.port, sent.payload, sent.ttl + 1, sent.dont_fragment) for sent in sock.sent]
        assert got == steps
        assert sock.calls == 9  # abc d e "" f g h i jk

    def test_the_bounds_of_one_call(self, bench: Bench) -> None:
        for _ in range(130):
            bench.send(GUEST4, 4000, WORLD4, 7, bytes(100))
        bench.stack.end_batch(bench.now)
        assert bench.sock(GUEST4, 4000).calls == 3
        for _ in range(50):
            bench.send(GUEST4, 4001, WORLD4, 7, bytes(8000))
        bench.stack.end_batch(bench.now)
        assert bench.sock(GUEST4, 4001).calls == 7
        bench.send(GUEST4, 4002, WORLD4, 7, bytes(65507))
        assert bench.sock(GUEST4, 4002).calls == 1

    @pytest.mark.parametrize("code", (errno.EINVAL, errno.EMSGSIZE, errno.EIO))
    def test_where_the_kernel_will_not_they_go_one_by_one(self, bench: Bench, code: int) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7, b"first")
        bench.stack.end_batch(bench.now)
        sock = bench.sock(GUEST4, 4000)
        sock.segment_failures.append(OSError(code, "not in this way"))
        for _ in range(2):
            for number in range(10):
                bench.send(GUEST4, 4000, WORLD4, 7, bytes((number,)) * 2000)
            bench.stack.end_batch(bench.now)
        assert [payload[0] for payload in self.sent(bench)[1:]] == [*range(10), *range(10)]
        assert sock.calls == 1 + 1 + 20  # and it is not tried again for this size
        bench.send(GUEST4, 4000, WORLD4, 7, b"small")
        bench.send(GUEST4, 4000, WORLD4, 7, b"again")
        bench.stack.end_batch(bench.now)
        assert sock.calls == 22 + (2 if code == errno.EIO else 1)

    def test_the_echo_of_an_earlier_error_loses_nothing(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7, b"first")
        bench.stack.end_batch(bench.now)
        sock = bench.sock(GUEST4, 4000)
        sock.segment_failures.append(OSError(errno.ECONNREFUSED, "the echo"))
        sock.errors.append(SocketError(errno.ECONNREFUSED, WORLD4, 7, WORLD4, 3, 3, 0, b"first"))
        for number in range(5):
            bench.send(GUEST4, 4000, WORLD4, 7, bytes((number,)))
        bench.ready(GUEST4, 4000, FAILED)
        bench.stack.end_batch(bench.now)
        assert len(self.sent(bench)) == 6
        assert len(bench.stack.taken_errors()) == 1

    def test_a_full_queue_loses_the_call(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7, b"first")
        bench.stack.end_batch(bench.now)
        bench.sock(GUEST4, 4000).segment_failures.append(BlockingIOError(errno.EAGAIN, "full"))
        for _ in range(5):
            bench.send(GUEST4, 4000, WORLD4, 7)
        bench.stack.end_batch(bench.now)
        assert bench.stack.drops == {"udp_host_queue_full": 5}

    def test_a_flow_that_is_evicted_sends_what_it_has(self, bench: Bench) -> None:
        bench.stack.limits.udp_flows_per_guest = 1
        bench.send(GUEST4, 4000, WORLD4, 7, b"one")
        bench.send(GUEST4, 4000, WORLD4, 7, b"two")
        sock = bench.sock(GUEST4, 4000)
        bench.send(GUEST4, 4001, WORLD4, 7, b"three")
        assert [sent.payload for sent in sock.sent] == [b"one", b"two"]
        bench.stack.end_batch(bench.now)
        assert self.sent(bench, 4001) == [b"three"]


class TestBursts:
    """Runs of datagrams of one size toward a guest."""

    def frames(self, bench: Bench) -> list[bytes]:
        """Every frame of every burst, without the link's prefix, which must tell its length."""
        frames = []
        for burst in bench.link.bursts:
            for row in burst:
                assert int.from_bytes(row[:4].tobytes(), "big") == len(row) - 4
                frames.append(row[4:].tobytes())
        return frames

    @FAMILIES
    @pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 17, 18, 19, 100, 101, 1200, 1471, 1472 - 20))
    @pytest.mark.parametrize("merged", (False, True))
    def test_each_frame_is_what_it_would_have_been_alone(
        self, bench: Bench, guest: bytes, world: bytes, size: int, merged: bool
    ) -> None:
        bench.stack.mtu = 1520
        bench.send(guest, 4000, world, 7)
        sock = bench.sock(guest, 4000)
        payloads = [bytes((number * 7 + at * 13) & 0xFF for at in range(size)) for number in range(40)]
        payloads[3] = b"\xff" * size
        payloads[4] = bytes(size)
        if merged:
            sock.incoming.append((b"".join(payloads), world, 7, size))
        else:
            sock.incoming.extend((payload, world, 7) for payload in payloads)
        bench.ready(guest, 4000)
        ethertype = b"\x08\0" if len(guest) == 4 else b"\x86\xdd"
        expected = [
            MAC + bench.stack.mac + ethertype + write_packet(world, 7, guest, 4000, payload, 64) for payload in payloads
        ]
        assert self.frames(bench) == [frame.ljust(60, b"\0") for frame in expected]
        assert not bench.stack.packets
        assert sock.bursts_expected
        assert bench.flow(guest, 4000).bytes_to_guest == 40 * size

    def test_what_is_no_run_goes_alone_and_in_order(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        bench.send(GUEST4, 4000, ROUTER4, 7)
        sock = bench.sock(GUEST4, 4000)
        items: list[tuple[bytes, bytes, int]] = [
            (b"a", WORLD4, 7),
            (b"", WORLD4, 7),
            (b"", WORLD4, 7),
            (b"b", WORLD4, 8),
            (b"c", ROUTER4, 8),
            (b"dd", ROUTER4, 8),
            (b"e", ROUTER4, 8),
        ]
        sock.incoming.extend(items)
        bench.ready(GUEST4, 4000)
        assert bench.stack.taken() == [
            write_packet(peer, port, GUEST4, 4000, payload, 64) for payload, peer, port in items
        ]
        assert not bench.link.bursts
        assert not sock.bursts_expected

    def test_a_run_between_others_and_a_shorter_last_one(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        sock = bench.sock(GUEST4, 4000)
        sock.incoming.append((b"alone", WORLD4, 7))
        sock.incoming.append((b"m" * (20 * 100 + 30), WORLD4, 7, 100))  # what the kernel merged: the last is shorter
        sock.incoming.append((b"n" * 100, WORLD4, 7))
        bench.ready(GUEST4, 4000)
        assert [len(frame) for frame in self.frames(bench)] == [142] * 20
        assert [packet[28:] for packet in bench.stack.taken()] == [b"alone", b"m" * 30, b"n" * 100]

    def test_a_run_over_the_guests_mtu_is_fragmented(self, bench: Bench) -> None:
        bench.stack.mtu = 1000
        bench.send(GUEST4, 4000, WORLD4, 7)
        bench.sock(GUEST4, 4000).incoming.append((bytes(30 * 1200), WORLD4, 7, 1200))
        bench.ready(GUEST4, 4000)
        assert not bench.link.bursts
        assert len(bench.stack.taken()) == 60

    def test_strangers_runs_are_dropped(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        bench.sock(GUEST4, 4000).incoming.append((bytes(2000), ROUTER4, 7, 100))
        bench.ready(GUEST4, 4000)
        assert not bench.link.bursts
        assert not bench.stack.packets
        assert bench.stack.drops == {"udp_unsolicited": 1}

    def test_the_buffer_holds_what_one_wakeup_takes(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        sock = bench.sock(GUEST4, 4000)
        sock.incoming.extend([(bytes(60_000), WORLD4, 7, 1000)] * 10)
        for _ in range(10):
            bench.ready(GUEST4, 4000)
        assert sum(len(burst) for burst in bench.link.bursts) == 600
        assert not sock.incoming


class TestPaths:
    """What the stack's fast path finds: both endpoints -> the flow."""

    def path(self, bench: Bench, guest: bytes, port: int, peer: bytes, peer_port: int) -> UdpPath | None:
        return bench.udp.paths.get(flow_key(guest, port, peer, peer_port))

    @FAMILIES
    def test_a_path_sends_like_the_slow_road(self, bench: Bench, guest: bytes, world: bytes) -> None:
        gateway = GATEWAY4 if len(guest) == 4 else GATEWAY6
        for dst in (world, gateway):
            bench.send(guest, 4000, dst, 7, ttl=64)
            path = self.path(bench, guest, 4000, dst, 7)
            assert path is not None
            path.send(memoryview(b"hello"), 64, True, bench.now)
        sent = bench.sock(guest, 4000).sent
        assert sent[0] == sent[1]
        assert sent[2] == sent[3]
        assert bench.flow(guest, 4000).bytes_from_guest == 20

    def test_a_path_keeps_its_flow_in_use(self, bench: Bench) -> None:
        bench.send(GUEST4, 4000, WORLD4, 7)
        path = self.path(bench, GUEST4, 4000, WORLD4, 7)
        assert path is not None
        path.send(memoryview(b"x"), 64, True, 1100.0)
        bench.stack.advance(1200.0)
        assert len(bench.udp) == 1

    def test_there_is_none_for_what_was_refused_or_has_ended(self, bench: Bench) -> None:
        bench.stack.denied.add(ROUTER4)
        bench.send(GUEST4, 4000, ROUTER4, 7)
        bench.send(GUEST4, 4000, WORLD4, 7, ttl=1)
        assert not bench.udp.paths
        bench.send(GUEST4, 4000, WORLD4, 7)
        bench.send(GUEST4, 4000, WORLD4, 8)
        assert len(bench.udp.paths) == 2
        bench.udp.close_all(bench.now)
        assert not bench.udp.paths

    def test_there_is_none_where_the_link_turned_out_to_be_gone(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The guest is to hear of a refusal, and its link closes at that moment."""
        bench.send(GUEST4, 4000, WORLD4, 7)
        bench.sock(GUEST4, 4000).failures.append(OSError(errno.EHOSTUNREACH, "no"))
        monkeypatch.setattr(bench.stack, "send_error", lambda *_: bench.udp.close_link(bench.link, bench.now))
        bench.send(GUEST4, 4000, WORLD4, 8)
        assert not bench.udp.flows
        assert not bench.udp.paths

    def test_an_answer_is_let_in_as_long_as_the_guest_asks(self, bench: Bench) -> None:
        """Also when so many others were asked in between that the first is forgotten."""
        bench.send(GUEST4, 4000, WORLD4, 7)
        path = self.path(bench, GUEST4, 4000, WORLD4, 7)
        assert path is not None
        for number in range(2000):
            bench.send(GUEST4, 4000, (0xC6330000 + number).to_bytes(4, "big"), 6881)
        assert WORLD4 not in bench.flow(GUEST4, 4000).asked
        path.send(memoryview(b"x"), 64, True, bench.now)
        bench.sock(GUEST4, 4000).incoming.append((b"answer", WORLD4, 7))
        bench.ready(GUEST4, 4000)
        assert len(bench.stack.taken()) == 1

    def test_they_are_bounded(self, bench: Bench) -> None:
        for number in range(40_000):
            bench.send(GUEST4, 4000 + number % 10, WORLD4, number)
            assert len(bench.udp.paths) <= 16384
        assert sum(len(flow.path_keys) for flow in bench.udp) == len(bench.udp.paths)
