"""Resets: RFC 9293 3.5.2, 3.5.3 and 3.10.7.4, second; RFC 5961 3.2: only the exact sequence number resets."""

from __future__ import annotations

import pytest

from tests.script import Talk, close_wait, closing, established, fin_wait_1, fin_wait_2, last_ack, seg, time_wait

SYNCHRONIZED = (established, close_wait, last_ack, fin_wait_1, fin_wait_2, closing, time_wait)


@pytest.mark.parametrize("make", SYNCHRONIZED)
def test_an_exact_reset_ends_the_connection(make: type[Talk]) -> None:
    talk = make()
    sock = talk.host
    already_closed = sock.closed
    talk.guest(seg("R"))
    talk.silence()
    assert talk.state == "CLOSED"
    assert sock.closed
    assert sock.was_reset != already_closed  # the host's peer hears RST too, unless all was over


@pytest.mark.parametrize("make", SYNCHRONIZED)
@pytest.mark.parametrize("distance", (1, 1000, 65534))
def test_a_reset_elsewhere_in_the_window_is_challenged(make: type[Talk], distance: int) -> None:
    talk = make()
    if talk.flow.guest_fin:
        distance = min(distance, talk.flow.rcv_adv - talk.flow.rcv_nxt - 1)
        if distance < 1:
            return
    state = talk.state
    talk.guest(seg("R", seq=talk.next + distance))
    talk.expect(seg("A", ack=talk.next, data=b""))
    assert talk.state == state


@pytest.mark.parametrize("make", SYNCHRONIZED)
@pytest.mark.parametrize("distance", (-1, -70_000, 1 << 20, 1 << 31))
def test_a_reset_outside_the_window_is_nothing(make: type[Talk], distance: int) -> None:
    talk = make()
    state = talk.state
    talk.guest(seg("R", seq=talk.next + distance), seg("RA", seq=talk.next + distance))
    talk.silence()
    assert talk.state == state


def test_the_ack_field_of_a_reset_does_not_matter() -> None:
    """RFC 9293 3.10.7.4 checks only the sequence number in the synchronized states."""
    talk = established()
    talk.guest(seg("RA", ack=123456))
    assert talk.state == "CLOSED"


def test_a_reset_in_a_zero_window() -> None:
    """RFC 9293 3.8.6: RST at RCV.NXT is accepted even where no data is."""
    talk = established(scale=None, mss=1460)
    talk.host.room = 0
    while (talk.flow.rcv_adv - talk.flow.rcv_nxt) & 0xFFFFFFFF:
        talk.guest(seg("A", data=bytes(min(1460, (talk.flow.rcv_adv - talk.flow.rcv_nxt) & 0xFFFFFFFF))))
        talk.received()
    talk.guest(seg("R", seq=talk.next + 1))
    assert talk.state == "ESTABLISHED"
    talk.received()
    talk.guest(seg("R"))
    assert talk.state == "CLOSED"
    assert talk.world.stack.bytes_for_host == 0


def test_data_in_front_of_a_reset_in_one_batch() -> None:
    """RFC 9293 3.10.7.4: all that waits is flushed."""
    talk = established()
    talk.guest(seg("A", data=b"abc"), seg("R"))
    assert talk.state == "CLOSED"
    assert talk.host.was_reset
    talk.silence()


def test_segments_behind_a_reset_in_one_batch_meet_no_connection() -> None:
    talk = established()
    talk.guest(seg("R"), seg("A", data=b"late"))
    got = talk.received()
    assert [each.bits for each in got] == [0x04]


def test_a_reset_of_the_host_is_a_reset_for_the_guest() -> None:
    """RST both ways; its sequence number is exact, so that the guest need not challenge it."""
    talk = established()
    talk.host.sends(b"abc")
    talk.settle()
    talk.expect(seg("PA", seq=1, data=b"abc"))
    talk.host.breaks()
    talk.settle()
    talk.expect(seg("RA", seq=4, ack=1))
    assert talk.state == "CLOSED"
    assert talk.world.stack.bytes_in_flight == 0


def test_a_reset_in_syn_received() -> None:
    talk = Talk()
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA"))
    sock = talk.host
    talk.guest(seg("R", seq=1))
    assert talk.state == "CLOSED"
    assert sock.was_reset
    talk.silence()


def test_a_reset_with_data_out_of_order_and_unacknowledged() -> None:
    talk = established()
    talk.host.sends(bytes(5000))
    talk.settle()
    talk.received()
    talk.guest(seg("A", ack=1, seq=100, data=b"far"))
    talk.received()
    talk.guest(seg("R"))
    assert talk.state == "CLOSED"
    assert talk.world.stack.bytes_in_flight == 0
    assert len(talk.world.stack.flows) == 0


def test_the_guest_rebooted_and_begins_with_the_same_ports() -> None:
    """RFC 9293 figure 9: its SYN is answered with an ACK, its RST ends the old connection, its SYN opens a new one."""
    talk = established()
    sock = talk.host
    old_next = talk.next
    talk.guest(seg("S", seq=-1_000_000, mss=1460))
    talk.expect(seg("A", ack=old_next))
    talk.guest(seg("R", seq=old_next))
    assert talk.state == "CLOSED"
    assert sock.was_reset
    talk._sock = talk.iss = None
    talk.isn = (talk.isn - 1_000_000) & 0xFFFFFFFF
    talk.next = talk.heard = 0
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA", ack=1))
