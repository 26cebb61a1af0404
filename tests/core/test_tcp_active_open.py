"""Connections that the host opens toward a guest (forwards): RFC 9293 3.5 figures 6 and 7, 3.10.1, 3.10.7.3."""

from __future__ import annotations

import errno

import pytest

from netstack.core.flows import Limits
from netstack.core.tcp import TcpFlow
from netstack.wire.arp import parse_arp, write_arp
from netstack.wire.icmp import PORT_UNREACHABLE, write_error
from netstack.wire.ipv4 import PROTOCOL_TCP, write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.tcp import SYN, write_tcp
from tests.fakes import FakeSocket
from tests.frames import read_segment
from tests.script import Talk, established, seg
from tests.world import GUEST4, GUEST6, WORLD4, WORLD6, World

FAMILIES = pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))


class Forward:
    """One connection of the host's, on its way to a guest."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.sock: FakeSocket = talk.world.host.accepted()
        self.ends: list[tuple[TcpFlow | None, int]] = []
        talk._sock = self.sock

    def open(self) -> None:
        talk = self.talk
        talk.world.stack.open_to_guest(
            self.sock,
            talk.address,
            talk.port,
            talk.peer,
            talk.peer_port,
            lambda flow, error: self.ends.append((flow, error)),
            talk.world.now,
        )
        talk.world.end_round()
        talk.world.settle()

    @property
    def errors(self) -> list[int]:
        return [error for _, error in self.ends]


def _forward(talk: Talk | None = None, *, known: bool = True, ipv6: bool = False) -> Forward:
    talk = talk or Talk(ipv6=ipv6, guest_port=8080, peer_port=50_000)
    if known:
        talk.world.stack.neighbors.learn(talk.link, talk.mac, talk.address, talk.world.now)
    forward = Forward(talk)
    forward.open()
    return forward


@FAMILIES
def test_a_guest_that_accepts(ipv6: bool) -> None:
    """Nothing is read from the host before the guest answered."""
    forward = _forward(ipv6=ipv6)
    talk = forward.talk
    forward.sock.sends(b"early")
    talk.settle()
    talk.expect(seg("S", seq=0, mss=1440 if ipv6 else 1460, scale=8, win=65535))
    assert talk.state == "SYN_SENT"
    assert forward.sock.inbox == b"early"
    talk.guest(seg("SA", mss=1460, scale=7))
    assert talk.state == "ESTABLISHED"
    assert forward.errors == [0]
    talk.expect(seg("A", seq=1, ack=1, data=b""), seg("PA", seq=1, ack=1, data=b"early"))
    talk.guest(seg("PA", data=b"hello"))
    forward.sock.takes(b"hello")
    assert (talk.flow.snd_shift, talk.flow.rcv_shift) == (7, 8)


def test_the_ack_of_the_syn_ack_does_not_wait_for_data() -> None:
    """RFC 9293 3.5: the guest is in SYN-RECEIVED until it comes."""
    forward = _forward()
    forward.talk.expect(seg("S"))
    forward.talk.guest(seg("SA", mss=1460))
    forward.talk.expect(seg("A", seq=1, ack=1))


@FAMILIES
def test_a_guest_that_refuses(ipv6: bool) -> None:
    """RFC 9293 3.10.7.3: RST with an acceptable ACK."""
    forward = _forward(ipv6=ipv6)
    forward.talk.expect(seg("S"))
    forward.talk.guest(seg("RA", seq=0, ack=1))
    assert forward.talk.state == "CLOSED"
    assert forward.errors == [errno.ECONNREFUSED]
    assert forward.sock.was_reset
    forward.talk.silence()


def test_a_forged_refusal_is_not_believed() -> None:
    """RFC 9293 3.10.7.3, first and second: without an ACK of our SYN it is nothing."""
    forward = _forward()
    talk = forward.talk
    talk.expect(seg("S"))
    talk.guest(seg("R", seq=0), seg("RA", seq=0, ack=0), seg("RA", seq=0, ack=2), seg("RA", seq=0, ack=-1))
    talk.silence()
    assert talk.state == "SYN_SENT"


@pytest.mark.parametrize("ack", (0, 2, 100_000))
def test_a_syn_ack_of_something_else_is_reset(ack: int) -> None:
    """RFC 9293 3.10.7.3, first: <SEQ=SEG.ACK><CTL=RST>."""
    forward = _forward()
    forward.talk.expect(seg("S"))
    forward.talk.guest(seg("SA", seq=0, ack=ack))
    forward.talk.expect(seg("R", seq=ack))
    assert forward.talk.state == "SYN_SENT"


def test_a_guest_that_is_silent() -> None:
    """RFC 9293 3.8.3: the SYN again, and again; after two minutes the host's peer is told."""
    forward = _forward()
    talk = forward.talk
    talk.expect(seg("S", seq=0))
    for again in (1, 3, 7, 15, 31, 63):
        talk.at(again)
        talk.expect(seg("S", seq=0))
    talk.at(126)
    talk.silence()
    talk.world.advance(talk.started + 127)
    assert talk.state == "CLOSED"
    assert forward.errors == [errno.ETIMEDOUT]
    assert forward.sock.was_reset
    talk.received()


def test_a_guest_that_nobody_knows_is_asked_for() -> None:
    """RFC 826: who has this address; the SYN leaves when somebody answers."""
    forward = _forward(known=False)
    talk = forward.talk
    (frame,) = talk.world.take(talk.link)
    assert frame[:6] == b"\xff" * 6
    arp = parse_arp(frame, 14, 42)
    assert arp is not None
    assert (arp.operation, arp.target_address) == (1, GUEST4)
    talk.at(1)
    assert len(talk.world.take(talk.link)) == 1
    answer = write_arp(2, talk.mac, GUEST4, talk.world.mac, talk.world.stack.addresses.gateway)
    talk.world.receive(talk.link, talk.world.mac + talk.mac + b"\x08\x06" + answer)
    talk.expect(seg("S", seq=0))
    talk.guest(seg("SA", mss=1460))
    assert forward.errors == [0]


def test_a_guest_that_does_not_exist() -> None:
    """Four questions, a second apart, then the host's connection is reset."""
    forward = _forward(known=False)
    talk = forward.talk
    asked = len(talk.world.take(talk.link))
    for second in range(1, 6):
        talk.world.advance(talk.started + second)
        asked += len(talk.world.take(talk.link))
    assert asked == 4
    assert forward.ends == [(None, errno.EHOSTUNREACH)]
    assert forward.sock.was_reset
    assert talk.world.stack.next_deadline() > talk.world.now


def test_an_address_of_no_guest_is_not_asked_for() -> None:
    forward = _forward(Talk(guest=bytes((203, 0, 113, 5)), guest_port=80, peer_port=50_000), known=False)
    assert forward.ends == [(None, errno.EHOSTUNREACH)]
    assert not forward.talk.world.take(forward.talk.link)


def test_the_same_connection_twice() -> None:
    first = _forward()
    first.talk.expect(seg("S"))
    second = _forward(first.talk)
    (syn,) = [each for frame in first.talk.world.take(first.talk.link) if (each := read_segment(frame)) is not None]
    assert (syn.dst_port, syn.src) == (first.talk.port, first.talk.peer)
    assert 32768 <= syn.src_port <= 60999
    assert not second.ends
    assert not first.sock.closed


@FAMILIES
def test_the_same_connection_again_when_the_first_has_ended(ipv6: bool) -> None:
    """The caller's system has given the port away a second time, so it is over for both (RFC 9293 3.6.1)."""
    first = _forward(ipv6=ipv6)
    talk = first.talk
    talk.expect(seg("S"))
    talk.guest(seg("SA", mss=1440))
    talk.expect(seg("A"))
    first.sock.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=1))
    talk.guest(seg("FA", ack=2))
    talk.expect(seg("A", seq=2, ack=2))
    assert talk.state == "TIME_WAIT"
    second = _forward(talk)
    (syn,) = [each for frame in talk.world.take(talk.link) if (each := read_segment(frame)) is not None]
    assert (syn.src_port, syn.dst_port) == (talk.peer_port, talk.port)
    assert talk.state == "SYN_SENT"
    assert not second.ends


def test_a_caller_who_gives_up_before_the_guest_has_answered() -> None:
    forward = _forward()
    talk = forward.talk
    talk.expect(seg("S"))
    forward.sock.breaks()
    talk.at(1)
    talk.expect(seg("S"), seg("RA", seq=1))
    assert forward.errors == [errno.ECONNABORTED]
    assert talk.state == "CLOSED"


@FAMILIES
@pytest.mark.parametrize(("off", "state"), ((0, "CLOSED"), (1, "SYN_SENT")), ids=("our SYN", "another"))
def test_a_packet_filter_of_the_guest_that_answers_with_icmp(ipv6: bool, off: int, state: str) -> None:
    """RFC 1122 4.2.3.9: port unreachable aborts a connection that is being opened; RFC 5927 4.1: if it quotes it."""
    forward = _forward(ipv6=ipv6)
    talk = forward.talk
    talk.expect(seg("S"))
    addresses = talk.peer, talk.address
    assert talk.iss is not None
    syn = write_tcp(*addresses, talk.peer_port, talk.port, (talk.iss + off) & 0xFFFFFFFF, 0, SYN, 65535)
    packet = (write_ipv6 if ipv6 else write_ipv4)(*addresses, PROTOCOL_TCP, len(syn)) + syn
    error = write_error(talk.address, packet, PORT_UNREACHABLE)
    assert error is not None
    kind = b"\x86\xdd" if ipv6 else b"\x08\x00"
    talk.world.receive(talk.link, talk.world.mac + talk.mac + kind + error)
    assert talk.state == state
    assert forward.errors == ([errno.ECONNREFUSED] if state == "CLOSED" else [])
    assert talk.drops.get("icmp_error_from_guest", 0) == off


def test_no_room_in_the_table() -> None:
    world = World(limits=Limits(tcp_flows=1))
    talk = established(talk=Talk(world=world))
    forward = _forward(Talk(world=world, link=talk.link, guest_port=8080, peer_port=50_000))
    assert [flow for flow, _ in forward.ends] == [None]
    assert forward.sock.was_reset


def test_both_open_at_once() -> None:
    """RFC 9293 figure 7: SYN_SENT - SYN_RECEIVED - ESTABLISHED."""
    forward = _forward()
    talk = forward.talk
    talk.expect(seg("S", seq=0))
    talk.guest(seg("S", mss=1460, scale=3))
    assert talk.state == "SYN_RECEIVED"
    talk.expect(seg("SA", seq=0, ack=1, scale=8))
    # The guest's own SYN-ACK lies before the window: it is answered, and neither of the two waits for ever.
    talk.guest(seg("SA", seq=0, ack=1, mss=1460, scale=3))
    talk.expect(seg("A", seq=1, ack=1))
    talk.guest(seg("A", seq=1, ack=1))
    assert talk.state == "ESTABLISHED"
    assert forward.errors == [0]
    talk.received()
    forward.sock.sends(b"both")
    talk.settle()
    talk.expect(seg("PA", seq=1, ack=1, data=b"both"))


def test_the_guests_answer_without_window_scale() -> None:
    """RFC 7323 2.2: we offered it, the guest did not answer it."""
    forward = _forward()
    forward.talk.expect(seg("S", scale=8))
    forward.talk.guest(seg("SA", mss=1460, win=1000))
    assert (forward.talk.flow.snd_shift, forward.talk.flow.rcv_shift) == (0, 0)
    assert forward.talk.flow.snd_wnd == 1000
    forward.talk.expect(seg("A", seq=1, ack=1, win=65535))


def test_the_hosts_peer_closes_before_the_guest_answered() -> None:
    forward = _forward()
    talk = forward.talk
    talk.expect(seg("S"))
    forward.sock.closes()
    talk.settle()
    talk.guest(seg("SA", mss=1460))
    assert talk.state == "FIN_WAIT_1"
    talk.expect(seg("A", seq=1, ack=1), seg("FA", seq=1, ack=1))


def test_the_guests_link_is_lost_before_it_answered() -> None:
    forward = _forward()
    forward.talk.expect(seg("S"))
    forward.talk.world.remove_link(forward.talk.link)
    assert forward.talk.state == "CLOSED"
    assert len(forward.errors) == 1
    assert forward.errors != [0]
    assert forward.sock.was_reset


@FAMILIES
def test_a_guest_closes_a_connection_that_the_host_opened(ipv6: bool) -> None:
    forward = _forward(ipv6=ipv6)
    talk = forward.talk
    talk.expect(seg("S"))
    talk.guest(seg("SA", mss=1460, scale=7))
    talk.expect(seg("A", seq=1, ack=1))
    talk.guest(seg("PA", data=b"bye"), seg("FA"))
    talk.received()
    forward.sock.takes(b"bye")
    forward.sock.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=5))
    talk.guest(seg("A"))
    assert talk.state == "CLOSED"
    assert (talk.address, talk.peer) == ((GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4))
