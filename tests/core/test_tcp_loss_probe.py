"""Tail loss probes (RFC 8985 section 7): the end of a burst is lost, and nothing behind it says so."""

from __future__ import annotations

import random

import pytest

from tests.frames import Received
from tests.script import Talk, established, seg

M = 0xFFFFFFFF
SOON = 0.02  # the least that a probe waits


def _measured(*, round_trip: float = 0.004) -> Talk:
    """A connection whose round trip time is known, with nothing in flight."""
    talk = established(mss=1000)
    talk.host.sends(b"x" * 1000)
    talk.settle()
    talk.expect(seg("PA", seq=1))
    talk.wait(round_trip)
    talk.guest(seg("A", ack=1001))
    assert talk.flow.srtt == pytest.approx(round_trip)
    return talk


def _sends(talk: Talk, size: int) -> bytes:
    """The host sends so much, and the guest gets none of it."""
    data = random.Random(size).randbytes(size)
    talk.host.sends(data)
    talk.settle()
    talk.received()
    talk.heard = 1001
    talk.started = talk.world.now
    return data


def _seqs(talk: Talk, got: list[Received]) -> list[int]:
    return [(each.seq - (talk.iss or 0)) & M for each in got if each.data]


def test_a_silent_guest_is_probed_long_before_the_rto() -> None:
    talk = _measured()
    data = _sends(talk, 3000)
    talk.at(SOON - 0.001)
    talk.silence()
    talk.at(SOON)
    (got,) = talk.expect(seg("PA", seq=1001, ack=1))
    assert got.data == data[:1000]
    assert talk.world.stack.counters.tcp_loss_probes == 1
    assert talk.world.stack.counters.tcp_timeouts == 0
    assert talk.flow.rto < 1.0


def test_a_round_trip_that_is_long_is_waited_for_twice() -> None:
    talk = _measured(round_trip=0.05)
    _sends(talk, 3000)
    talk.at(0.099)
    talk.silence()
    talk.at(0.1)
    assert _seqs(talk, talk.received()) == [1001]


def test_one_probe_and_then_the_rto() -> None:
    """RFC 8985 7.3: no second probe; RFC 6298 5.5 takes over from there."""
    talk = _measured()
    _sends(talk, 3000)
    talk.at(SOON + talk.flow.rto - 0.001)
    assert _seqs(talk, talk.received()) == [1001]
    talk.at(SOON + 2 * talk.flow.rto)
    assert _seqs(talk, talk.received()) == [1001]
    assert talk.world.stack.counters.tcp_loss_probes == 1
    assert talk.world.stack.counters.tcp_timeouts == 1


def test_the_probe_that_was_all_that_was_missing_ends_it() -> None:
    talk = _measured()
    _sends(talk, 3000)
    talk.at(SOON)
    talk.received()
    talk.guest(seg("A", ack=4001))
    talk.silence()
    talk.wait(5.0)
    talk.silence()
    assert talk.world.stack.bytes_in_flight == 0
    assert talk.world.stack.counters.tcp_timeouts == 0


def test_when_nothing_behind_the_probe_has_arrived_all_of_it_is_sent_again_at_once() -> None:
    talk = _measured()
    data = _sends(talk, 6000)
    talk.at(SOON)
    got = talk.received()
    for _ in range(10):
        if not got:
            break
        talk.heard = (got[-1].seq - (talk.iss or 0) + len(got[-1].data)) & M
        talk.guest(seg("A"))
        data_again = talk.received()
        got = data_again
        for each in data_again:
            at = ((each.seq - (talk.iss or 0)) & M) - 1001
            assert each.data == data[at : at + 1000]
    assert talk.world.stack.bytes_in_flight == 0
    assert talk.world.now - talk.started < 0.03
    assert talk.world.stack.counters.tcp_timeouts == 0


def test_a_late_acknowledgement_of_more_than_the_probe_resends_nothing() -> None:
    """The guest only did not run for a while."""
    talk = _measured()
    _sends(talk, 6000)
    talk.at(SOON)
    talk.received()
    talk.guest(seg("A", ack=3001))
    talk.silence()
    talk.guest(seg("A", ack=7001))
    talk.silence()
    assert talk.world.stack.counters.tcp_retransmits == 1


def test_a_single_segment_is_not_probed_for() -> None:
    """The guest may delay its acknowledgement by 40 to 200 ms (RFC 8985 7.2: WCDelAckT)."""
    talk = _measured()
    _sends(talk, 1000)
    talk.at(talk.flow.rto - 0.001)
    talk.silence()
    talk.at(talk.flow.rto)
    assert _seqs(talk, talk.received()) == [1001]
    assert talk.world.stack.counters.tcp_loss_probes == 0


def test_what_is_still_queued_on_the_link_is_not_sent_twice() -> None:
    talk = _measured()
    talk.link.stuck = True
    _sends(talk, 3000)
    talk.at(SOON + 0.1)
    talk.link.stuck = False
    talk.link.flush()
    assert _seqs(talk, talk.received()) == [1001, 2001, 3001]
    assert talk.world.stack.counters.tcp_retransmits == 0
