"""Opening a connection: RFC 9293 3.5, 3.10.7.2 and 3.10.7.3, options of RFC 9293 3.7.1 and RFC 7323 2.2."""

from __future__ import annotations

import errno

import pytest
from scapy.layers.inet import ICMP, IP, TCPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.inet6 import TCPerror as TCPerror6
from scapy.layers.l2 import Ether

from netstack.core.ports import WRITABLE
from tests.script import Talk, established, seg

FAMILIES = pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))


@FAMILIES
def test_the_syn_is_answered_only_when_the_host_connected(ipv6: bool) -> None:
    """RFC 9293 3.10.7.2, with the SYN-ACK held back."""
    talk = Talk(ipv6=ipv6)
    talk.world.host.connects = False
    talk.guest(seg("S", mss=1460, scale=7))
    assert talk.state == "CONNECTING"
    assert talk.world.host.opened == [("tcp", talk.peer, 80)]
    assert talk.world.poller.events[talk.host.fd] == WRITABLE
    talk.at(60)
    talk.silence()
    talk.host.connected = True
    talk.settle()
    talk.expect(seg("SA", seq=0, ack=1, mss=1440 if ipv6 else 1460, scale=8, win=65535))
    assert talk.state == "SYN_RECEIVED"
    talk.guest(seg("A"))
    talk.silence()
    assert talk.state == "ESTABLISHED"
    assert talk.world.stack.counters.tcp_opened == 1


@FAMILIES
def test_a_refused_connection_is_refused(ipv6: bool) -> None:
    """RFC 9293 3.10.7.1: RST, acknowledging the SYN."""
    talk = Talk(ipv6=ipv6)
    talk.world.host.result = errno.ECONNREFUSED
    talk.guest(seg("S", mss=1460))
    got = talk.received()
    assert [(each.seq, each.ack, each.bits) for each in got] == [(0, (talk.isn + 1) & 0xFFFFFFFF, 0x14)]
    assert talk.state == "CLOSED"
    assert talk.world.stack.counters.tcp_refused == 1


def test_a_connection_refused_at_once() -> None:
    talk = Talk()
    talk.world.host.refusal = errno.ECONNREFUSED
    talk.guest(seg("S"))
    assert [each.bits for each in talk.received()] == [0x14]
    assert talk.state == "CLOSED"


@pytest.mark.parametrize(
    ("number", "code4", "code6"),
    (
        (errno.ENETUNREACH, 0, 0),
        (errno.EHOSTUNREACH, 1, 3),
        (errno.ETIMEDOUT, 1, 3),
        (errno.EACCES, 13, 1),
        (errno.EPERM, 13, 1),
    ),
)
@pytest.mark.parametrize("at_once", (False, True))
@FAMILIES
def test_an_unreachable_host_is_told_as_icmp(ipv6: bool, at_once: bool, number: int, code4: int, code6: int) -> None:
    """RFC 792, RFC 4443 3.1: and the error quotes the guest's SYN, so that its connect() fails with the right errno."""
    talk = Talk(ipv6=ipv6)
    if at_once:
        talk.world.host.refusal = number
    else:
        talk.world.host.result = number
    talk.guest(seg("S"))
    (frame,) = talk.world.take(talk.link)
    packet = Ether(frame)
    if ipv6:
        error = packet[ICMPv6DestUnreach]
        assert (packet[IPv6].dst, error.code) == ("fd00:c0a8:5::15", code6)
        quoted = error[TCPerror6]
    else:
        error = packet[ICMP]
        assert (packet[IP].dst, error.type, error.code) == ("192.168.5.15", 3, code4)
        quoted = error[TCPerror]
    assert (quoted.sport, quoted.dport, quoted.seq) == (40000, 80, talk.isn)
    assert talk.state == "CLOSED"


def test_errors_of_the_host_itself_are_resets() -> None:
    """No descriptors: nothing that a router would say."""
    talk = Talk()
    talk.world.host.refusal = errno.EMFILE
    talk.guest(seg("S"))
    assert [each.bits for each in talk.received()] == [0x14]


def test_a_duplicate_syn_while_connecting_waits_as_the_first_does() -> None:
    """RFC 9293 3.10.7.4 has no such state: nothing was promised yet."""
    talk = Talk()
    talk.world.host.connects = False
    talk.guest(seg("S", mss=1460))
    for again in (1, 3, 7):
        talk.at(again)
        talk.guest(seg("S", seq=0, mss=1460))
        talk.silence()
    assert len(talk.world.host.opened) == 1
    talk.host.connected = True
    talk.settle()
    talk.expect(seg("SA", seq=0, ack=1))


def test_a_new_attempt_while_connecting_takes_the_place_of_the_first() -> None:
    """Another ISN: the guest's first connect() timed out, its port is used again."""
    talk = Talk()
    talk.world.host.connects = False
    talk.guest(seg("S"))
    first = talk.host
    talk.isn += 5_000_000
    talk.guest(seg("S", seq=0))
    assert first.closed
    assert len(talk.world.host.opened) == 2
    talk._sock = None
    talk.host.connected = True
    talk.settle()
    talk.expect(seg("SA", ack=1))


def test_the_guest_gives_up_while_connecting() -> None:
    talk = Talk()
    talk.world.host.connects = False
    talk.guest(seg("S"))
    sock = talk.host
    talk.guest(seg("R", seq=1))
    assert talk.state == "CLOSED"
    assert sock.closed
    talk.silence()


def test_data_and_acks_while_connecting_mean_nothing() -> None:
    talk = Talk()
    talk.world.host.connects = False
    talk.guest(seg("S"))
    talk.guest(seg("A", seq=1, ack=77, data=b"too early"), seg("FA", seq=1), seg("R", seq=500))
    talk.silence()
    assert talk.state == "CONNECTING"
    talk.host.connected = True
    talk.settle()
    talk.expect(seg("SA", seq=0, ack=1))


def test_a_duplicate_syn_after_the_syn_ack_has_it_sent_again() -> None:
    """RFC 9293 3.10.7.4: the SYN-ACK was lost."""
    talk = Talk()
    talk.guest(seg("S", mss=1460, scale=2))
    talk.expect(seg("SA", seq=0, ack=1, scale=8))
    talk.guest(seg("S", seq=0, mss=1460, scale=2))
    talk.expect(seg("SA", seq=0, ack=1, scale=8))
    talk.guest(seg("A"))
    talk.silence()
    assert talk.state == "ESTABLISHED"


def test_the_syn_ack_is_sent_again_and_then_given_up() -> None:
    """RFC 9293 3.8.3: R2 of a SYN is at least three minutes on the internet; here as Linux does it, 127 s."""
    talk = Talk()
    talk.guest(seg("S"))
    talk.expect(seg("SA"))
    sock = talk.host
    for again in (1, 3, 7, 15, 31, 63):
        talk.at(again - 0.01)
        talk.silence()
        talk.at(again)
        talk.expect(seg("SA", seq=0, ack=1))
    talk.at(126.9)
    talk.silence()
    talk.at(127)
    talk.expect(seg("RA", seq=1, ack=1))
    assert talk.state == "CLOSED"
    assert sock.was_reset


def test_the_time_of_a_repeated_syn_ack_is_not_measured() -> None:
    """Karn's algorithm, RFC 6298 section 3."""
    talk = Talk()
    talk.guest(seg("S"))
    talk.expect(seg("SA"))
    talk.at(1)
    talk.expect(seg("SA"))
    talk.at(1.01)
    talk.guest(seg("A"))
    assert talk.state == "ESTABLISHED"
    assert talk.flow.srtt == 0.0


def test_the_time_of_a_syn_ack_that_the_guest_asked_for_again_is_not_measured() -> None:
    """RFC 6298 section 3: the ACK may be that of the first one."""
    talk = Talk()
    talk.guest(seg("S", seq=0, mss=1460))
    talk.expect(seg("SA"))
    talk.at(0.9)
    talk.guest(seg("S", seq=0, mss=1460))
    talk.expect(seg("SA"))
    talk.at(0.91)
    talk.next = 1
    talk.guest(seg("A", ack=1))
    assert talk.state == "ESTABLISHED"
    assert talk.flow.srtt == 0.0


def test_the_handshake_gives_the_first_rtt() -> None:
    """RFC 6298 2.2: RTO is SRTT + 4 RTTVAR, three times the first measurement, within its bounds."""
    talk = Talk()
    talk.guest(seg("S"))
    talk.expect(seg("SA"))
    talk.at(0.1)
    talk.guest(seg("A"))
    assert talk.flow.srtt == pytest.approx(0.1)
    assert talk.flow.rto == pytest.approx(0.3)


@FAMILIES
@pytest.mark.parametrize(
    ("mtu", "offered", "wanted4", "wanted6"),
    (
        (1500, 1460, 1460, 1440),
        (1500, None, 536, 1220),  # RFC 9293 3.7.1: SHOULD-5, MUST-15 of RFC 8200
        (1500, 0, 536, 1220),  # names no segment: as if it were not there
        (1500, 65495, 1460, 1440),  # the link carries no more
        (1500, 10, 48, 48),  # Linux TCP_MIN_SND_MSS
        (1500, 1459, 1456, 1440),  # whole words, for the sums of bursts
        (65520, 65480, 65480, 65460),
    ),
)
def test_the_mss_that_we_send_by(ipv6: bool, mtu: int, offered: int | None, wanted4: int, wanted6: int) -> None:
    talk = established(mss=offered, ipv6=ipv6, mtu=mtu)
    wanted = min(wanted6, (offered or 1 << 16) & ~3) if ipv6 else wanted4
    wanted = max(wanted, 48)
    assert talk.flow.mss == wanted
    talk.host.sends(bytes(3 * wanted))
    talk.settle()
    sizes = [len(each.data) for each in talk.received()]
    if 3 * wanted < 65535:
        assert sizes == [wanted] * 3
    else:
        assert max(sizes) == wanted


@pytest.mark.parametrize("mtu", (576, 1500, 9000, 65520, 65535))
@FAMILIES
def test_the_mss_that_we_announce_is_what_the_link_brings(ipv6: bool, mtu: int) -> None:
    talk = Talk(ipv6=ipv6, mtu=mtu)
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA", mss=mtu - (60 if ipv6 else 40)))


def test_no_window_scale_unless_both_have_it() -> None:
    """RFC 7323 2.2: not offered, not answered; windows are then as they stand, in both directions."""
    talk = established(scale=None)
    assert (talk.flow.snd_shift, talk.flow.rcv_shift) == (0, 0)
    assert talk.flow.snd_wnd == 65535
    talk.guest(seg("A", data=b"x" * 10))
    talk.wait(0.01)
    talk.expect(seg("A", ack=11, win=65525))  # no gain worth telling: RFC 9293 3.8.6.2.2
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA", scale=-1, win=65535))


@pytest.mark.parametrize(("offered", "used"), ((0, 0), (7, 7), (14, 14), (15, 14), (255, 14)))
def test_the_guests_window_scale(offered: int, used: int) -> None:
    """RFC 7323 2.3: more than 14 counts as 14; the window of a SYN is never scaled (2.2)."""
    talk = Talk()
    talk.guest(seg("S", win=1000, mss=1460, scale=offered))
    assert talk.flow.snd_wnd == 1000
    talk.expect(seg("SA", scale=8, win=65535))
    talk.guest(seg("A", win=10))
    assert talk.flow.snd_shift == used
    assert talk.flow.snd_wnd == 10 << used


def test_data_may_come_with_the_handshakes_last_ack() -> None:
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA"))
    talk.guest(seg("PA", data=b"GET /"))
    assert talk.state == "ESTABLISHED"
    talk.host.takes(b"GET /")
    talk.wait(0.01)
    talk.expect(seg("A", ack=6))


def test_fin_may_come_with_the_handshakes_last_ack() -> None:
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA"))
    talk.guest(seg("FPA", data=b"bye"))
    assert talk.state == "CLOSE_WAIT"
    talk.host.takes(b"bye")
    assert talk.host.shut
    talk.expect(seg("A", ack=5))


@pytest.mark.parametrize("ack", (0, 2, 1_000_000, -5))
def test_a_wrong_ack_of_the_syn_ack_is_reset(ack: int) -> None:
    """RFC 9293 3.10.7.4, fifth, SYN-RECEIVED: <SEQ=SEG.ACK><CTL=RST>, and the connection waits on."""
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA"))
    talk.guest(seg("A", ack=ack))
    talk.expect(seg("R", seq=ack))
    assert talk.world.stack.counters.tcp_resets_sent == 1
    assert talk.state == "SYN_RECEIVED"
    talk.guest(seg("A", ack=1))
    assert talk.state == "ESTABLISHED"


def test_the_host_breaks_between_connect_and_the_guests_ack() -> None:
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA"))
    talk.host.breaks()
    talk.settle()
    talk.silence()
    talk.guest(seg("A"))
    talk.expect(seg("RA", seq=1, ack=1))
    assert talk.state == "CLOSED"


def test_a_segment_for_no_connection_is_reset() -> None:
    """RFC 9293 3.10.7.1: the sequence number is what the segment acknowledges."""
    talk = Talk()
    talk.guest(seg("A", seq=100, ack=5000, data=b"who?"))
    (got,) = talk.received()
    assert (got.bits, got.seq) == (0x04, 5000)
    assert talk.drops == {"tcp_no_flow": 1}


def test_a_segment_for_no_connection_without_ack_is_reset() -> None:
    """RFC 9293 3.10.7.1: <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>."""
    talk = Talk()
    talk.guest(seg("F", seq=100, data=b"who?"))
    (got,) = talk.received()
    assert (got.bits, got.seq, got.ack) == (0x14, 0, (talk.isn + 105) & 0xFFFFFFFF)


def test_a_reset_for_no_connection_is_not_answered() -> None:
    """RFC 9293 3.10.7.1, or two stacks would reset each other for ever."""
    talk = Talk()
    talk.guest(seg("R", seq=1), seg("RA", seq=1, ack=7), seg("SR", seq=1), seg("SRA", seq=1))
    talk.silence()


def test_syn_ack_for_no_connection_is_reset() -> None:
    talk = Talk()
    talk.guest(seg("SA", seq=1, ack=7))
    assert [(each.bits, each.seq) for each in talk.received()] == [(0x04, 7)]


@pytest.mark.parametrize(("guest_port", "peer_port"), ((0, 80), (40000, 0)))
def test_port_0_is_nobodys(guest_port: int, peer_port: int) -> None:
    talk = Talk(guest_port=guest_port, peer_port=peer_port)
    talk.guest(seg("S"))
    talk.silence()
    assert not talk.world.host.opened
    assert talk.drops == {"tcp_malformed": 1}


def test_initial_sequence_numbers_differ_by_connection_and_grow_with_time() -> None:
    """RFC 6528, RFC 9293 3.4.1: a keyed hash, and a clock of 4 us."""
    stack = Talk().world.stack
    one = stack.initial_sequence((1, 2), 1000.0)
    assert one != stack.initial_sequence((1, 3), 1000.0)
    assert (stack.initial_sequence((1, 2), 1001.0) - one) & 0xFFFFFFFF == 250_000
    other = Talk().world.stack
    other._secret = b"another secret"
    assert one != other.initial_sequence((1, 2), 1000.0)


def test_a_syn_with_a_ttl_of_1_expires_here() -> None:
    """Traceroute with TCP finds the gateway: RFC 1812 5.3.1."""
    talk = Talk()
    frame = bytearray(talk.frame(seg("S")))
    frame[22] = 1
    talk.world.receive(talk.link, bytes(frame))
    (answer,) = talk.world.take(talk.link)
    assert (Ether(answer)[ICMP].type, Ether(answer)[ICMP].code) == (11, 0)
    assert not talk.world.host.opened
