"""Loss on the way to the guest: RFC 6298 (timer), RFC 5681 3.2 (fast retransmit), RFC 6582 (partial ACKs)."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.frames import Received
from tests.script import Talk, close_wait, established, seg

M = 0xFFFFFFFF


def _seqs(talk: Talk, got: list[Received]) -> list[int]:
    """Relative sequence numbers of segments with data or FIN."""
    return [(each.seq - (talk.iss or 0)) & M for each in got if each.data or each.bits & 1]


def _sent(talk: Talk, size: int) -> bytes:
    """The host sends so much, and none of it arrives."""
    data = random.Random(size).randbytes(size)
    talk.host.sends(data)
    talk.settle()
    talk.received()
    talk.heard = 1
    return data


# ---- the timer


def test_what_is_not_acknowledged_is_sent_again_after_the_rto() -> None:
    """RFC 6298 5.4: the earliest segment."""
    talk = established(mss=1000)
    data = _sent(talk, 3000)
    rto = talk.flow.rto
    talk.at(rto - 0.01)
    talk.silence()
    talk.at(rto)
    (got,) = talk.expect(seg("PA", seq=1, ack=1))
    assert got.data == data[:1000]
    assert talk.world.stack.counters.tcp_retransmits == 1
    assert talk.world.stack.counters.tcp_timeouts == 1


def test_the_timer_backs_off_and_gives_up() -> None:
    """RFC 6298 5.5: doubled each time; RFC 9293 3.8.3: R2 at least 100 s."""
    talk = established(mss=1000)
    sock = talk.host
    _sent(talk, 1000)
    times = [talk.world.now]
    while talk.state != "CLOSED":
        talk.world.advance(talk.world.stack.next_deadline())
        for each in talk.received():
            if each.data:
                times.append(talk.world.now)
            elif each.bits == 0x14:
                assert (each.seq - talk.iss) & M == 1001  # type: ignore[operator]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[:6] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    assert max(gaps) == pytest.approx(60)
    assert len(gaps) == 12
    assert talk.world.now - times[0] > 100
    assert sock.was_reset
    assert talk.world.stack.bytes_in_flight == 0


def test_an_ack_of_new_data_restarts_the_timer() -> None:
    """RFC 6298 5.3."""
    talk = established(mss=1000)
    _sent(talk, 3000)
    talk.at(0.15)
    talk.guest(seg("A", ack=1001))
    talk.at(0.34)
    talk.silence()
    talk.wait(1.0)
    assert _seqs(talk, talk.received())[0] == 1001


def test_when_all_is_acknowledged_the_timer_stops() -> None:
    """RFC 6298 5.2."""
    talk = established(mss=1000)
    _sent(talk, 3000)
    talk.guest(seg("A", ack=3001))
    talk.at(250)
    talk.silence()


def test_rtt_is_measured_and_bounded() -> None:
    """RFC 6298 2.2, 2.3, with Linux' minimum of 200 ms and a maximum of 60 s (2.5)."""
    talk = established()
    assert talk.flow.rto == 0.2
    for i, (rtt, _) in enumerate(((0.4, None), (0.4, None), (0.4, None))):
        talk.host.sends(b"x")
        talk.settle()
        talk.expect(seg("PA", seq=1 + i))
        talk.wait(rtt if talk.flow.rto > rtt else 0.1)
        talk.guest(seg("A"))
    assert 0.05 < talk.flow.srtt < 0.4


def test_karn() -> None:
    """RFC 6298 section 3: what was sent twice is not measured."""
    talk = established(mss=1000)
    before = talk.flow.srtt
    _sent(talk, 1000)
    talk.at(0.3)
    assert _seqs(talk, talk.received()) == [1]
    talk.at(0.35)
    talk.guest(seg("A", ack=1001))
    assert talk.flow.srtt == before


def test_a_guest_slower_than_the_timer_does_not_get_everything_twice() -> None:
    """RFC 6298 5.5 to 5.7: the RTO stays doubled until something was measured that was sent once."""
    talk = established()
    sent = 0
    for _ in range(20):
        talk.host.sends(b"x")
        talk.settle()
        answer_at = talk.world.now + 0.5
        talk.world.advance(answer_at)
        sent += len(talk.received())
        talk.guest(seg("A"))
    assert sent <= 20 + 3
    assert talk.flow.rto > 0.5


def test_after_a_timeout_each_partial_ack_brings_the_next_two_segments() -> None:
    """RFC 6582 3.2 step 3, after RFC 6298: the whole flight was lost. Two, so that the guest does not delay its ACK."""
    talk = established(mss=1000)
    data = _sent(talk, 5000)
    talk.at(0.2)
    got = {1: talk.expect(seg("PA", seq=1))[0].data}
    for ack in (1001, 3001):
        talk.guest(seg("A", ack=ack))
        for each in talk.expect(seg("PA", seq=ack), seg("PA", seq=ack + 1000)):
            got[each.seq] = each.data
    talk.guest(seg("A", ack=5001))
    talk.silence()
    assert b"".join(got[at] for at in sorted(got)) == data
    assert not talk.flow.in_recovery


def test_after_a_timeout_a_full_ack_ends_the_recovery() -> None:
    """Only the first segment was lost: the guest had the rest."""
    talk = established(mss=1000)
    _sent(talk, 5000)
    talk.at(0.2)
    talk.expect(seg("PA", seq=1))
    talk.guest(seg("A", ack=5001))
    talk.silence()
    assert talk.world.stack.bytes_in_flight == 0
    talk.at(10)
    talk.silence()


def test_new_data_is_sent_during_a_recovery() -> None:
    """The link does not lose frames by itself, so there is no congestion window: only the guest's window holds us."""
    talk = established(mss=1000)
    _sent(talk, 2000)
    talk.at(0.2)
    talk.expect(seg("PA", seq=1))
    talk.host.sends(b"new")
    talk.settle()
    talk.expect(seg("PA", seq=2001, data=b"new"))


# ---- duplicate acknowledgements


def test_three_duplicate_acks_bring_the_missing_segment_at_once() -> None:
    """RFC 5681 3.2."""
    talk = established(mss=1000)
    data = _sent(talk, 5000)
    talk.guest(seg("A", ack=1))
    talk.guest(seg("A", ack=1))
    talk.silence()
    talk.guest(seg("A", ack=1))
    (got,) = talk.expect(seg("PA", seq=1))
    assert got.data == data[:1000]
    talk.guest(*[seg("A", ack=1)] * 5)
    talk.silence()
    assert talk.world.stack.counters.tcp_fast_retransmits == 1


def test_three_duplicate_acks_in_one_batch() -> None:
    talk = established(mss=1000)
    _sent(talk, 5000)
    talk.guest(*[seg("A", ack=1)] * 3)
    talk.expect(seg("PA", seq=1))


def test_duplicate_acks_behind_a_new_one_in_the_same_batch() -> None:
    """The first segments arrived, then there is a gap: no further batch need come before we see it."""
    talk = established(mss=1000)
    _sent(talk, 5000)
    talk.guest(seg("A", ack=2001), *[seg("A", ack=2001)] * 3)
    talk.expect(seg("PA", seq=2001))


def test_a_new_ack_behind_duplicates_in_the_same_batch() -> None:
    talk = established(mss=1000)
    _sent(talk, 5000)
    talk.guest(*[seg("A", ack=1)] * 3, seg("A", ack=5001))
    talk.silence()


def test_several_losses_in_one_flight() -> None:
    """RFC 6582: a partial ACK brings the next hole, without waiting for three duplicates again."""
    talk = established(mss=1000)
    _sent(talk, 10_000)
    talk.guest(*[seg("A", ack=2001)] * 4)
    talk.expect(seg("PA", seq=2001))
    talk.guest(seg("A", ack=5001))
    talk.expect(seg("PA", seq=5001), seg("PA", seq=6001))
    talk.guest(seg("A", ack=9001))
    talk.expect(seg("PA", seq=9001))
    talk.guest(seg("A", ack=10_001))
    talk.silence()
    assert not talk.flow.in_recovery


@pytest.mark.parametrize("what", ("window", "data", "nothing outstanding"))
def test_what_is_no_duplicate_ack(what: str) -> None:
    """RFC 5681 section 2: outstanding data, no data, the same window."""
    talk = established(mss=1000)
    if what != "nothing outstanding":
        _sent(talk, 3000)
    for i in range(6):
        if what == "data":
            talk.guest(seg("A", ack=1, data=b"x"))
            talk.received()
        else:
            talk.guest(seg("A", ack=1, win=talk.window - i * (what == "window")))
    assert talk.world.stack.counters.tcp_fast_retransmits == 0


def test_the_retransmission_carries_the_ack_and_window_of_now() -> None:
    talk = established(mss=1000)
    _sent(talk, 1000)
    talk.guest(seg("A", data=b"hello", ack=1))
    talk.at(0.3)
    got = talk.received()
    assert [each.ack for each in got if each.data] == [(talk.isn + 6) & M]


def test_an_ack_beyond_the_retransmitted_segment_frees_everything() -> None:
    talk = established(mss=1000)
    data = _sent(talk, 100_000 if talk.flow.snd_wnd > 100_000 else 60_000)
    talk.at(0.2)
    talk.received()
    talk.guest(seg("A", ack=1 + len(data)))
    assert talk.world.stack.bytes_in_flight == 0
    assert not talk.flow.rtx


# ---- FIN


def test_fin_is_retransmitted_behind_the_data() -> None:
    talk = established(mss=1000)
    talk.host.sends(bytes(2000))
    talk.host.closes()
    talk.settle()
    assert _seqs(talk, talk.received()) == [1, 1001, 2001]
    talk.at(0.2)
    talk.expect(seg("PA", seq=1))
    talk.guest(seg("A", ack=1001))
    talk.expect(seg("PA", seq=1001), seg("FA", seq=2001))
    talk.guest(seg("A", ack=2002))
    assert talk.state == "FIN_WAIT_2"


def test_fin_after_a_half_close_is_retransmitted() -> None:
    talk = close_wait()
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=2))
    talk.wait(0.2)
    talk.expect(seg("FA", seq=1, ack=2))
    talk.guest(seg("A", ack=2))
    assert talk.state == "CLOSED"


# ---- everything at once


@pytest.mark.parametrize("seed", range(12))
def test_a_lossy_wire(seed: int) -> None:
    """Each segment to the guest is lost one time in five, each ACK too; all arrives, once, in order."""
    chance = random.Random(seed)
    talk = established(mss=1000, scale=2, window=chance.choice((1000, 3000, 16_000)))
    data = chance.randbytes(40_000)
    talk.host.sends(data)
    talk.host.closes()
    have: dict[int, bytes] = {}
    got = b""
    fin_at = -1
    talk.world.settle()
    for _ in range(5000):
        acks = 0
        for each in talk.received():
            if chance.random() < 0.2:
                continue
            at = (each.seq - (talk.iss or 0)) & M
            have[at] = max(have.get(at, b""), each.data, key=len)
            if each.bits & 1:
                fin_at = at + len(each.data)
            acks += 1
            while True:
                piece = next((s for s, d in have.items() if s <= 1 + len(got) < s + len(d)), None)
                if piece is None:
                    break
                got += have[piece][1 + len(got) - piece :]
        talk.heard = 1 + len(got) + (fin_at == 1 + len(got))
        acked = [seg("A", ack=talk.heard) for _ in range(acks) if chance.random() > 0.2]
        if acked:
            talk.world.receive(talk.link, *[talk.frame(each) for each in acked])
        else:
            talk.world.advance(max(talk.world.now, talk.world.stack.next_deadline()))
        if talk.state == "FIN_WAIT_2":
            break
    assert got == data
    assert talk.state == "FIN_WAIT_2"
    assert talk.world.now - talk.started < 300
