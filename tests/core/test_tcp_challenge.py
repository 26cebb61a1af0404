"""Challenge ACKs and their limit: RFC 5961 3.2, 4.2, 5.2 and 7, RFC 9293 3.10.7.4."""

from __future__ import annotations

import pytest

from netstack.core.tcp import _CHALLENGE_ACKS
from tests.frames import Seg
from tests.script import established, seg


def test_a_syn_in_the_window_is_challenged() -> None:
    """RFC 5961 4.2, whatever its sequence number."""
    talk = established()
    talk.guest(seg("S", seq=100))
    talk.expect(seg("A", seq=1, ack=1))
    talk.guest(seg("SA", seq=1, ack=1))
    talk.expect(seg("A", seq=1, ack=1))
    assert talk.state == "ESTABLISHED"


def test_an_ack_of_what_was_never_sent() -> None:
    """RFC 9293 3.10.7.4, fifth: an ACK back, and the segment is dropped with its data."""
    talk = established()
    talk.guest(seg("A", ack=2, data=b"forged"))
    talk.expect(seg("A", seq=1, ack=1))
    talk.host.takes(b"")


def test_an_ack_from_long_ago() -> None:
    """RFC 5961 5.2: older than the largest window that there was."""
    talk = established()
    talk.guest(seg("A", ack=-70_000, data=b"forged"))
    talk.expect(seg("A", seq=1, ack=1))
    talk.host.takes(b"")


def test_an_old_ack_within_the_window_still_brings_data() -> None:
    talk = established()
    talk.host.sends(b"abc")
    talk.settle()
    talk.expect(seg("PA", seq=1))
    talk.guest(seg("A", ack=4))
    talk.guest(seg("A", ack=2, data=b"reordered"))
    talk.host.takes(b"reordered")
    assert talk.flow.snd_una == (talk.flow.iss + 4) & 0xFFFFFFFF


def test_challenge_acks_are_limited() -> None:
    """RFC 5961 section 7."""
    talk = established()
    sent = 0
    for _ in range(50):
        talk.guest(seg("S", seq=100))
        sent += len(talk.received())
    assert sent == _CHALLENGE_ACKS
    assert talk.drops == {"tcp_challenge_limited": 50 - _CHALLENGE_ACKS}
    talk.wait(1)
    talk.guest(seg("S", seq=100))
    talk.expect(seg("A", seq=1, ack=1))


@pytest.mark.parametrize("seq", (-5, 100_000_000))
def test_acks_outside_the_window_are_answered_in_a_limited_number(seq: int) -> None:
    """Two ends that do not agree on the numbers would answer each other's ACKs for ever."""
    talk = established()
    sent = 0
    for _ in range(50):
        talk.guest(seg("A", seq=seq))
        sent += len(talk.received())
    assert sent == _CHALLENGE_ACKS
    assert talk.drops == {"tcp_challenge_limited": 50 - _CHALLENGE_ACKS}


@pytest.mark.parametrize("segment", (seg("A", seq=-5, data=b"abc"), seg("FA", seq=-5)))
def test_data_and_fin_outside_the_window_are_always_answered(segment: Seg) -> None:
    """They ask for an answer that was lost, and an ACK is not answered with them."""
    talk = established()
    for _ in range(50):
        talk.guest(segment)
        talk.expect(seg("A", seq=1, ack=1))


def test_a_batch_of_challenges_is_answered_once() -> None:
    talk = established()
    talk.guest(*[seg("S", seq=100)] * 5)
    talk.expect(seg("A", seq=1, ack=1))
    talk.silence()


def test_data_goes_on_while_challenges_are_limited() -> None:
    talk = established()
    for _ in range(20):
        talk.guest(seg("R", seq=100))
        talk.received()
    talk.guest(seg("A", data=b"real"))
    talk.host.takes(b"real")
    talk.wait(0.01)
    talk.expect(seg("A", ack=5))
