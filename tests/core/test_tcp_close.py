"""Closing: RFC 9293 3.6, figures 12 and 13, and 3.10.7.4, eighth. Half close in both directions."""

from __future__ import annotations

import errno
import random

import pytest

from netstack.core.ports import SHUT_WR
from netstack.core.tcp import TIME_WAIT_SECONDS
from tests.script import Talk, close_wait, closing, established, fin_wait_1, fin_wait_2, last_ack, seg, time_wait


def test_the_guest_closes_first() -> None:
    """ESTABLISHED - CLOSE_WAIT - LAST_ACK - CLOSED."""
    talk = last_ack()
    talk.guest(seg("A", ack=2))
    talk.silence()
    assert talk.state == "CLOSED"
    assert talk.host.closed
    assert not talk.host.was_reset


def test_the_host_closes_first() -> None:
    """ESTABLISHED - FIN_WAIT_1 - FIN_WAIT_2 - TIME_WAIT - CLOSED."""
    talk = time_wait()
    talk.wait(TIME_WAIT_SECONDS - 0.1)
    assert talk.state == "TIME_WAIT"
    talk.wait(0.1)
    assert talk.state == "CLOSED"
    talk.silence()


def test_both_close_at_once() -> None:
    """RFC 9293 figure 13: FIN_WAIT_1 - CLOSING - TIME_WAIT - CLOSED."""
    talk = closing()
    talk.guest(seg("A", ack=2))
    assert talk.state == "TIME_WAIT"
    talk.wait(TIME_WAIT_SECONDS)
    assert talk.state == "CLOSED"
    talk.silence()


def test_fin_and_ack_of_ours_in_one_segment() -> None:
    """FIN_WAIT_1 - TIME_WAIT."""
    talk = fin_wait_1()
    talk.guest(seg("FA", ack=2))
    talk.expect(seg("A", seq=2, ack=2))
    assert talk.state == "TIME_WAIT"
    assert talk.host.closed


def test_the_guest_closes_and_goes_on_receiving() -> None:
    """Half close, guest first: the host hears FIN, and answers at leisure."""
    talk = close_wait()
    data = random.Random(4).randbytes(200_000)
    talk.host.sends(data)
    got = b""
    talk.settle()
    while piece := talk.data():
        got += piece
        talk.guest(seg("A"))
    assert got == data
    assert talk.state == "CLOSE_WAIT"
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=200_001, ack=2))
    talk.guest(seg("A"))
    assert talk.state == "CLOSED"


def test_the_host_is_shut_down_only_once() -> None:
    """The peer answers a half close and closes while the guest's window lets the answer out slowly.

    The host's socket is in TCP_CLOSE then, with data that is still to be read, and a second shutdown() would fail.
    """
    talk = close_wait(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(5000))
    talk.host.closes()
    talk.settle()
    got = talk.data()
    for _ in range(4):
        talk.guest(seg("A"))
        got += b"".join(each.data for each in talk.received())
    assert got == bytes(5000)
    talk.guest(seg("A"))
    assert talk.state == "LAST_ACK"
    talk.expect(seg("FA", seq=5001, ack=2))
    talk.guest(seg("A"))
    assert talk.state == "CLOSED"
    assert not talk.host.was_reset


def test_the_host_closes_and_goes_on_receiving() -> None:
    """Half close, host first."""
    talk = fin_wait_2()
    data = random.Random(5).randbytes(10_000)
    for at in range(0, 10_000, 1000):
        talk.guest(seg("A", data=data[at : at + 1000]))
        talk.received()
    talk.host.takes(data)
    assert not talk.host.closed
    talk.guest(seg("FA"))
    talk.expect(seg("A", seq=2, ack=10_002))
    assert talk.state == "TIME_WAIT"
    assert talk.host.closed
    assert not talk.host.was_reset


def test_the_last_data_and_fin_come_together() -> None:
    talk = established()
    talk.guest(seg("A", data=b"abc"), seg("FPA", data=b"def"))
    talk.host.takes(b"abcdef")
    assert talk.host.shut
    talk.expect(seg("A", ack=8))
    assert talk.state == "CLOSE_WAIT"


def test_the_hosts_last_data_and_fin() -> None:
    talk = established()
    talk.host.sends(b"goodbye")
    talk.host.closes()
    talk.settle()
    talk.expect(seg("PA", seq=1, data=b"goodbye"), seg("FA", seq=8))
    talk.guest(seg("A", ack=8))
    assert talk.state == "FIN_WAIT_1"
    talk.guest(seg("A", ack=9))
    assert talk.state == "FIN_WAIT_2"


def test_fin_reaches_the_host_behind_all_data() -> None:
    """The host's socket takes its time."""
    talk = established()
    talk.host.room = 2
    talk.guest(seg("FA", data=b"abcdef"))
    talk.expect(seg("A", ack=8))
    talk.host.takes(b"ab")
    assert not talk.host.shut
    talk.host.room = 4
    talk.settle()
    talk.host.takes(b"cdef")
    assert talk.host.shut


def test_fin_behind_a_gap_that_the_same_batch_fills() -> None:
    """RFC 9293 3.10.7.4: segments are put in order; nobody need send the FIN again."""
    talk = established()
    talk.guest(seg("A", seq=4, data=b"def"), seg("A", seq=1, data=b"abc"), seg("FA", seq=7))
    talk.host.takes(b"abcdef")
    assert talk.host.shut
    talk.expect(seg("A", ack=8))


def test_fin_behind_a_gap_is_not_taken() -> None:
    talk = established()
    talk.guest(seg("FA", seq=4))
    talk.expect(seg("A", ack=1))
    assert talk.state == "ESTABLISHED"
    talk.guest(seg("FA", seq=1, data=b"abc"))
    talk.expect(seg("A", ack=5))
    assert talk.state == "CLOSE_WAIT"


def test_fin_behind_a_gap_is_remembered() -> None:
    """RFC 9293 3.10.7.4: a FIN that overtook data need not come again when the gap is filled."""
    talk = established()
    talk.guest(seg("FA", seq=4, data=b"def"))
    talk.expect(seg("A", ack=1))
    talk.silence()
    assert talk.state == "ESTABLISHED"
    talk.guest(seg("A", seq=1, data=b"abc"))
    talk.host.takes(b"abcdef")
    assert talk.host.shut
    assert talk.state == "CLOSE_WAIT"
    talk.expect(seg("A", ack=8))
    talk.silence()
    assert talk.world.stack.bytes_out_of_order == 0


def test_a_remembered_fin_without_data_ends_what_the_host_ended_before() -> None:
    talk = fin_wait_2()
    talk.guest(seg("FA", seq=4, ack=2))
    talk.expect(seg("A", ack=1))
    talk.guest(seg("FA", seq=4, ack=2))
    talk.expect(seg("A", ack=1))
    talk.guest(seg("A", seq=1, ack=2, data=b"abc"))
    talk.host.takes(b"abc")
    talk.expect(seg("A", seq=2, ack=5))
    assert talk.state == "TIME_WAIT"
    assert talk.host.closed


@pytest.mark.parametrize("data", (b"abcd", b"abcdefgh"))
def test_a_remembered_fin_that_was_a_lie_is_forgotten(data: bytes) -> None:
    """The guest sends data beyond its FIN, into the gap before it."""
    talk = established()
    talk.guest(seg("FA", seq=4))
    talk.received()
    talk.guest(seg("A", seq=1, data=data))
    talk.host.takes(data)
    talk.received()
    assert talk.state == "ESTABLISHED"
    assert talk.world.stack.bytes_out_of_order == 0


def test_fin_outside_the_window_is_not_taken() -> None:
    talk = established(scale=None, mtu=65520, mss=65480)
    talk.host.room = 0
    talk.guest(seg("A", data=bytes(65480)), seg("FA", data=bytes(100)))
    assert talk.expect(seg("A"))[0].ack != 0
    assert talk.state == "ESTABLISHED"
    talk.received()


def test_the_guests_fin_again_is_acknowledged_again() -> None:
    """RFC 9293 3.10.7.4, first: the sequence number lies behind; our ACK was lost."""
    talk = close_wait()
    talk.guest(seg("FA", seq=1))
    talk.expect(seg("A", seq=1, ack=2))
    assert talk.state == "CLOSE_WAIT"


def test_data_behind_the_guests_fin_is_ignored() -> None:
    """RFC 9293 3.10.7.4, seventh: this should not occur; the segment text is ignored."""
    talk = close_wait()
    talk.guest(seg("A", data=b"zombie"))
    talk.received()
    talk.host.takes(b"")
    assert talk.state == "CLOSE_WAIT"


@pytest.mark.parametrize("make", (fin_wait_1, closing, last_ack))
def test_our_fin_is_sent_again_until_acknowledged(make: type[Talk]) -> None:
    talk = make()
    for _ in range(3):
        talk.world.advance(talk.flow.rtx_at)
        talk.expect(seg("FA", seq=1))
    talk.guest(seg("A", ack=2))
    talk.silence()
    assert talk.state == {"fin_wait_1": "FIN_WAIT_2", "closing": "TIME_WAIT", "last_ack": "CLOSED"}[make.__name__]


def test_fin_that_is_never_acknowledged_ends_in_a_reset() -> None:
    talk = fin_wait_1()
    talk.world.advance(talk.world.now + 1000)
    got = talk.received()
    assert got[-1].bits == 0x14
    assert [each.bits for each in got].count(0x11) == 12
    assert talk.state == "CLOSED"


def test_fin_has_all_its_tries_after_a_window_that_was_closed_for_long() -> None:
    talk = established()
    talk.guest(seg("A", win=0))
    talk.host.sends(b"x")
    talk.settle()
    for _ in range(9):
        talk.world.advance(talk.flow.rtx_at)
        talk.expect(seg("A", seq=0))
        talk.guest(seg("A", win=0))
    talk.host.inbox.clear()
    talk.host.closes()
    talk.guest(seg("A"))
    talk.settle()
    talk.world.advance(talk.world.now + 1000)
    assert [each.bits for each in talk.received()].count(0x11) == 13


def test_an_ack_of_the_data_only_is_not_one_of_the_fin() -> None:
    talk = fin_wait_1()
    talk.guest(seg("A", ack=1))
    assert talk.state == "FIN_WAIT_1"


def test_time_wait_acknowledges_the_fin_again_and_begins_anew() -> None:
    """RFC 9293 3.10.7.4, eighth: restart the 2 MSL timeout."""
    talk = time_wait()
    talk.wait(1.5)
    talk.guest(seg("FA", seq=1, ack=2))
    talk.expect(seg("A", seq=2, ack=2))
    talk.wait(1.5)
    assert talk.state == "TIME_WAIT"
    talk.wait(0.5)
    assert talk.state == "CLOSED"


def test_time_wait_is_reopened_by_a_new_syn() -> None:
    """RFC 9293 3.10.7.4 and RFC 1122 4.2.2.13: a SYN beyond the last sequence number opens anew."""
    talk = time_wait()
    talk.isn = (talk.isn + 10_000) & 0xFFFFFFFF
    talk.next = talk.heard = 0
    talk._sock = talk.iss = None
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA", ack=1))
    assert talk.state == "SYN_RECEIVED"
    assert len(talk.world.host.opened) == 2


def test_time_wait_is_not_reopened_by_an_old_syn() -> None:
    """It may be a delayed duplicate: an ACK, and the guest's own TCP decides."""
    talk = time_wait()
    talk.guest(seg("S", seq=-1000))
    talk.expect(seg("A", seq=2, ack=2))
    assert talk.state == "TIME_WAIT"


def test_time_wait_that_is_reopened_still_delivers_what_the_host_has_not_taken() -> None:
    talk = fin_wait_2()
    talk.host.room = 0
    talk.guest(seg("FA", ack=2, data=b"late"))
    talk.received()
    assert talk.state == "TIME_WAIT"
    old = talk.host
    talk.isn = (talk.isn + 10_000) & 0xFFFFFFFF
    talk.next = talk.heard = 0
    talk._sock = talk.iss = None
    talk.guest(seg("S", mss=1460))
    talk.expect(seg("SA", ack=1))
    old.room = None
    talk.settle()
    old.takes(b"late")
    assert old.closed
    assert not old.was_reset


def test_time_wait_ends_without_reset_while_the_host_is_slow() -> None:
    """The flow is over for the guest; what it sent still reaches the host, then FIN."""
    talk = fin_wait_2()
    talk.host.room = 1
    talk.guest(seg("FA", ack=2, data=b"last words"))
    talk.received()
    sock = talk.host
    talk.wait(TIME_WAIT_SECONDS + 1)
    assert talk.state == "CLOSED"
    assert talk.world.stack.bytes_for_host == 9
    sock.room = None
    talk.settle()
    sock.takes(b"last words")
    assert sock.closed
    assert not sock.was_reset
    assert talk.world.stack.bytes_for_host == 0


def test_a_slow_host_that_breaks_after_the_end_is_forgotten() -> None:
    talk = fin_wait_2()
    talk.host.room = 0
    talk.guest(seg("FA", ack=2, data=b"last words"))
    talk.received()
    sock = talk.host
    talk.wait(TIME_WAIT_SECONDS + 1)
    sock.breaks()
    talk.settle()
    assert sock.closed
    assert talk.world.stack.bytes_for_host == 0
    talk.silence()


def test_a_slow_host_and_last_ack() -> None:
    talk = established()
    talk.host.room = 0
    talk.guest(seg("FA", data=b"abc"))
    talk.expect(seg("A", ack=5))
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=5))
    sock = talk.host
    talk.guest(seg("A", ack=2))
    assert talk.state == "CLOSED"
    assert not sock.closed
    sock.room = None
    talk.settle()
    sock.takes(b"abc")
    assert sock.closed


def test_shutdown_of_a_host_that_is_gone_resets_the_guest() -> None:
    talk = established()
    talk.host.error = errno.ECONNRESET
    talk.host.dead = True
    talk.world.feed(talk.link, talk.frame(seg("FA")))
    talk.world.end_round()
    talk.settle()
    talk.received()
    assert talk.state == "CLOSED"
    assert SHUT_WR == 1


def test_a_broken_host_does_not_keep_us_awake_while_the_guest_has_no_room() -> None:
    """FAILED and HUNG_UP are always reported: the socket leaves the poller until the guest has room (no busy loop)."""
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(3000))
    talk.settle()
    talk.received()
    talk.host.shut = True
    talk.host.closes()  # both directions have ended: HUNG_UP, and 2,000 bytes are still to be read
    talk.settle()
    assert talk.host.fd not in talk.world.poller.handlers
    got = 1000
    while talk.state == "ESTABLISHED":
        talk.guest(seg("A"))
        got += sum(len(each.data) for each in talk.received())
    assert got == 3000
    assert talk.state == "FIN_WAIT_1"


def test_a_host_that_takes_nothing_is_given_up_after_the_guest_closed() -> None:
    """The guest is done; its last bytes wait for a host that does not read. After LINGER the socket is closed."""
    talk = established()
    talk.host.room = 0
    talk.guest(seg("A", data=b"the last words"))
    talk.received()
    talk.guest(seg("FA", seq=15))
    talk.host.closes()
    talk.settle()
    talk.received()
    talk.guest(seg("A", seq=16, ack=2))
    assert talk.state == "CLOSED"
    assert not talk.host.closed
    talk.wait(59)
    assert not talk.host.closed
    talk.wait(2)
    assert talk.host.closed
    assert talk.world.stack.bytes_for_host == 0


def test_the_hosts_last_data_and_its_fin_leave_together() -> None:
    """One wakeup, and one call of the link, where a server answers and closes."""
    talk = established()
    talk.host.sends(b"bye")
    talk.host.closes()
    flushes: list[int] = []
    talk.link.on_flush = lambda: flushes.append(talk.link.backlog) if talk.link.backlog else None
    talk.settle()
    talk.expect(seg("PA", seq=1, data=b"bye"), seg("FA", seq=4))
    assert len(flushes) == 1
