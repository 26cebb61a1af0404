"""Keep-alive (RFC 9293 3.8.4), and guests whose link is lost."""

from __future__ import annotations

import pytest

from netstack.core.tcp import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, LINK_GRACE
from netstack.wire.arp import write_arp
from tests.script import Talk, established, fin_wait_2, seg
from tests.world import GUEST_MAC, OTHER_MAC


def test_a_silent_guest_is_probed_and_then_given_up() -> None:
    """RFC 9293 3.8.4: SEG.SEQ = SND.NXT - 1, and not one lost probe ends the connection (MUST-27)."""
    talk = established()
    sock = talk.host
    for i in range(KEEPALIVE_PROBES):
        at = KEEPALIVE_IDLE + i * KEEPALIVE_INTERVAL
        talk.at(at - 0.1)
        talk.silence()
        talk.at(at)
        talk.expect(seg("A", seq=0, ack=1, data=b""))
    talk.at(KEEPALIVE_IDLE + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL)
    talk.expect(seg("RA", seq=1, ack=1))
    assert talk.state == "CLOSED"
    assert sock.was_reset


@pytest.mark.parametrize("make", (established, fin_wait_2))
def test_a_guest_that_answers_stays_for_ever(make: type[Talk]) -> None:
    """No idle timeout kills a healthy connection."""
    talk = make()
    state = talk.state
    probes = 0
    while talk.world.now < talk.started + 24 * 3600:
        talk.world.now = max(talk.world.now, talk.flow.idle_at) + 0.005  # timers are late, by more than the RTT
        talk.world.advance(talk.world.now)
        for _ in talk.received():
            probes += 1
            talk.world.advance(talk.world.now + 0.0001)
            talk.guest(seg("A"))
        assert talk.state == state
    assert 250 <= probes <= 24 * 3600 / KEEPALIVE_IDLE


def test_a_guest_that_sends_is_not_probed() -> None:
    talk = established()
    for i in range(1, 20):
        talk.at(i * 100)
        talk.guest(seg("A", data=b"."))
        talk.wait(0.01)
        talk.expect(seg("A"))


def test_an_answer_after_some_probes_begins_anew() -> None:
    talk = established()
    talk.at(KEEPALIVE_IDLE + 2 * KEEPALIVE_INTERVAL + 1)
    talk.expect(seg("A", seq=0), seg("A", seq=0), seg("A", seq=0))
    talk.guest(seg("A"))
    heard = KEEPALIVE_IDLE + 2 * KEEPALIVE_INTERVAL + 1
    talk.at(heard + KEEPALIVE_IDLE - 1)
    talk.silence()
    talk.at(heard + KEEPALIVE_IDLE)
    talk.expect(seg("A", seq=0))


def test_a_guest_that_forgot_the_connection_resets_it() -> None:
    talk = established()
    talk.at(KEEPALIVE_IDLE)
    talk.expect(seg("A", seq=0))
    talk.guest(seg("R", seq=1))
    assert talk.state == "CLOSED"


# ---- the link is lost


def test_flows_end_when_the_guest_does_not_come_back() -> None:
    talk = established()
    sock = talk.host
    talk.at(10)
    talk.world.remove_link(talk.link)
    talk.world.advance(talk.started + 10 + LINK_GRACE - 0.1)
    assert talk.state == "ESTABLISHED"
    talk.world.advance(talk.started + 10 + LINK_GRACE)
    assert talk.state == "CLOSED"
    assert sock.was_reset


@pytest.mark.parametrize("lost_at", (1, 100, KEEPALIVE_IDLE - 20, KEEPALIVE_IDLE - 1, KEEPALIVE_IDLE + 45))
def test_a_lost_link_ends_flows_in_time_whenever_it_happens(lost_at: float) -> None:
    """Also when the keep-alive was due a moment later, and the guest was heard a moment before."""
    talk = established()
    talk.at(lost_at - 0.5)
    talk.received()
    talk.guest(seg("A"))
    talk.world.advance(talk.started + lost_at)
    talk.world.remove_link(talk.link)
    talk.world.advance(talk.world.now + LINK_GRACE - 0.1)
    assert talk.state == "ESTABLISHED"
    talk.world.advance(talk.world.now + 0.1)
    assert talk.state == "CLOSED"


@pytest.mark.parametrize("lost_while", ("CONNECTING", "SYN_RECEIVED"))
def test_connections_that_were_not_open_yet_end_with_the_link(lost_while: str) -> None:
    talk = Talk()
    talk.world.host.connects = lost_while != "CONNECTING"
    talk.guest(seg("S", mss=1460))
    assert talk.state == lost_while
    talk.world.remove_link(talk.link)
    assert talk.state == "CLOSED"


def _ask_for_gateway(talk: Talk) -> None:
    """An ARP request, as a guest sends it when its link is up again."""
    body = write_arp(1, talk.mac, talk.address, bytes(6), talk.world.stack.addresses.gateway)
    talk.world.receive(talk.link, talk.world.mac + talk.mac + b"\x08\x06" + body)
    assert talk.world.take(talk.link)


def _come_back(talk: Talk, after: float) -> None:
    talk.world.remove_link(talk.link)
    talk.world.advance(talk.world.now + after)
    talk.link = talk.world.add_link("again", mtu=talk.link.mtu)


def test_the_guest_comes_back_on_another_link_and_goes_on() -> None:
    talk = established()
    talk.host.sends(b"before")
    talk.settle()
    talk.expect(seg("PA", seq=1))
    _come_back(talk, 5)
    talk.guest(seg("A", data=b"here I am"))
    talk.host.takes(b"here I am")
    talk.wait(0.01)
    talk.expect(seg("A", ack=10))
    talk.host.sends(b"after")
    talk.settle()
    talk.expect(seg("PA", seq=7, data=b"after"))
    talk.guest(seg("A"))
    assert talk.world.stack.bytes_in_flight == 0
    talk.wait(LINK_GRACE + 1)
    assert talk.state == "ESTABLISHED"


@pytest.mark.parametrize("in_flight", (b"", b"what it had not got yet"), ids=("idle", "in flight"))
def test_a_guest_that_comes_back_and_has_nothing_to_say_is_asked_for(in_flight: bytes) -> None:
    """It only receives, so its kernel sends nothing by itself: not to us, and not to anybody."""
    talk = established()
    if in_flight:
        talk.host.sends(in_flight)
        talk.settle()
        talk.expect(seg("PA", seq=1))
    _come_back(talk, 5)  # the first question is asked here
    talk.wait(1.5)  # it has no address yet; and again
    asked = [frame for frame in talk.world.take(talk.link) if frame[12:14] == b"\x08\x06"]
    assert asked
    assert asked[-1][38:42] == talk.address
    answer = write_arp(2, talk.mac, talk.address, talk.world.mac, talk.world.stack.addresses.gateway)
    talk.world.receive(talk.link, talk.world.mac + talk.mac + b"\x08\x06" + answer)
    talk.wait(0.01)
    talk.expect(
        seg("PA", seq=1, data=in_flight) if in_flight else seg("A", seq=0), *([seg("A", seq=0)] if in_flight else [])
    )
    talk.guest(seg("A", ack=1 + len(in_flight)))
    talk.host.sends(b"after")
    talk.settle()
    talk.expect(seg("PA", seq=1 + len(in_flight), data=b"after"))


def test_a_lost_guest_is_asked_for_once_however_many_flows_it_has() -> None:
    talk = established()
    others = [established(world=talk.world, link=talk.link, guest_port=50_000 + i) for i in range(20)]
    _come_back(talk, 1)
    talk.wait(1.5)
    asked = [frame for frame in talk.world.take(talk.link) if frame[12:14] == b"\x08\x06"]
    assert len(asked) == 1
    assert len(others) == 20


def test_the_frames_of_a_flow_that_moved_fit_its_new_link() -> None:
    talk = established(mtu=9000, mss=8960)
    talk.world.remove_link(talk.link)
    talk.link = talk.world.add_link("smaller", mtu=1500, prefix=0)
    talk.guest(seg("A"))
    talk.host.sends(bytes(20_000))
    talk.settle()
    assert talk.data() == bytes(20_000)


def test_a_flow_that_waited_for_its_link_goes_on_over_the_next_one() -> None:
    talk = established()
    talk.link.stuck = talk.link.congested = True
    talk.host.sends(b"waits")
    talk.settle()
    assert talk.flow.waits_for_link
    _come_back(talk, 1)
    talk.guest(seg("A"))
    talk.expect(seg("PA", seq=1, data=b"waits"))


def test_another_guest_does_not_inherit_the_flows_of_a_lost_one() -> None:
    talk = established()
    talk.world.stack.neighbors.owner_of = lambda address: GUEST_MAC
    talk.world.remove_link(talk.link)
    talk.link = talk.world.add_link("thief")
    talk.mac = OTHER_MAC
    talk.guest(seg("A", data=b"mine now"))
    talk.host.takes(b"")
    assert talk.drops["source_not_its_own"] == 1
    assert talk.state == "ESTABLISHED"


def test_a_lost_guest_without_a_lease_may_be_replaced() -> None:
    """Then its connections end, and whoever has its address now gets nothing of them."""
    talk = established()
    sock = talk.host
    talk.world.remove_link(talk.link)
    talk.link = talk.world.add_link("new")
    talk.mac = OTHER_MAC
    talk.guest(seg("A", data=b"mine now"))
    talk.expect(seg("R", seq=1))
    sock.takes(b"")
    assert sock.was_reset


def test_a_guest_that_only_receives_comes_back() -> None:
    """A download: the guest owes nothing and so says nothing on this flow, but its ARP tells where it is now."""
    talk = established()
    talk.host.sends(b"one")
    talk.settle()
    talk.expect(seg("PA", seq=1))
    talk.guest(seg("A"))
    _come_back(talk, 2)
    talk.host.sends(b"two")
    talk.settle()
    _ask_for_gateway(talk)
    talk.world.advance(talk.world.now + 5)
    assert (b"two", 4) in [(each.data, (each.seq - (talk.iss or 0)) & 0xFFFFFFFF) for each in talk.received()]
    talk.guest(seg("A"))
    talk.world.advance(talk.world.now + LINK_GRACE * 2)
    assert talk.state == "ESTABLISHED"


def test_an_idle_flow_outlives_a_short_absence() -> None:
    """An idle login session: the guest is back and would answer, if it were asked."""
    talk = established()
    talk.at(10)
    _come_back(talk, 2)
    _ask_for_gateway(talk)
    for _ in range(100):
        talk.world.advance(talk.world.now + 1)
        for _ in talk.received():
            talk.guest(seg("A"))
    assert talk.state == "ESTABLISHED"
