"""Windows: RFC 9293 3.8.6 and its silly window syndromes, RFC 7323 2.3; what ends that do not read may cost."""

from __future__ import annotations

import itertools
import random

import pytest

from netstack.core import tcp_output
from netstack.core.flows import Limits
from netstack.core.ports import READABLE, WRITABLE
from netstack.core.stack import ACK_DELAY
from netstack.core.tcp import OUT_OF_ORDER_OVERHEAD, TcpFlow
from netstack.core.tcp_output import RCV_INITIAL, RCV_MAXIMUM
from netstack.core.timers import NEVER
from tests.script import Talk, close_wait, established, seg
from tests.world import World

M = 0xFFFFFFFF


def _edge(talk: Talk) -> int:
    return (talk.flow.rcv_adv - talk.flow.rcv_nxt) & M


def _fill(talk: Talk, size: int = 1460) -> bytes:
    """The guest sends until its window is closed; returns what it sent."""
    sent = b""
    while room := _edge(talk):
        data = random.Random(len(sent)).randbytes(min(size, room))
        sent += data
        talk.guest(seg("A", data=data))
        talk.received()
    return sent


# ---- the window that we advertise


def test_the_window_shrinks_by_what_the_host_did_not_take_and_opens_again() -> None:
    """RFC 9293 3.8.6: RCV.WND; the right edge does not move left."""
    talk = established(scale=None)
    talk.host.room = 0
    talk.guest(seg("A", data=bytes(10_000)))
    talk.expect(seg("A", ack=10_001, win=55_535))
    talk.host.room = None
    talk.settle()
    talk.expect(seg("A", ack=10_001, win=65_535))


def test_a_full_window_is_closed_and_reopened_by_a_window_update() -> None:
    talk = established(scale=None)
    talk.host.room = 0
    sent = _fill(talk)
    assert len(sent) == 65535
    talk.guest(seg("A", data=b"more"))
    talk.expect(seg("A", ack=65536, win=0))
    talk.host.room = None
    talk.settle()
    talk.expect(seg("A", ack=65536, win=65535))
    talk.host.takes(sent)


def test_the_guests_probe_of_our_zero_window_is_answered() -> None:
    """RFC 9293 3.8.6.1, 3.10.7.4: an empty segment before the window, or one byte of data in it."""
    talk = established(scale=None)
    talk.host.room = 0
    _fill(talk)
    talk.guest(seg("A", seq=talk.next - 1))
    talk.expect(seg("A", ack=65536, win=0))
    talk.guest(seg("A", seq=talk.next, data=b"?"))
    talk.expect(seg("A", ack=65536, win=0))
    assert talk.world.stack.bytes_for_host == 65535


def test_little_room_is_not_told() -> None:
    """RFC 9293 3.8.6.2.2, MUST-39: the window grows by a segment, or half of it, or not at all."""
    talk = established(scale=None, mss=1460)
    talk.host.room = 0
    _fill(talk)
    for _ in range(14):
        talk.host.room = 100
        talk.settle()
        talk.wait(0.2)  # answers to probes are limited in number
        talk.silence()
        talk.guest(seg("A", seq=talk.next - 1))
        talk.expect(seg("A", win=0))
    talk.host.room = 3000
    talk.settle()
    talk.expect(seg("A", win=4400))


def test_the_window_grows_while_the_host_keeps_up() -> None:
    """From evidence: batches that fill half of it, taken at once by the host; to RCV_MAXIMUM and no further."""
    talk = established(mtu=65520, mss=65480, scale=7)
    assert talk.flow.rcv_limit == RCV_INITIAL
    limits = []
    for _ in range(12):
        room = _edge(talk)
        pieces = []
        while room > 0:
            pieces.append(seg("A", data=bytes(min(room, 60_000))))
            room -= 60_000
        talk.guest(*pieces)
        (got,) = talk.received()
        limits.append(talk.flow.rcv_limit)
        assert got.win << 8 <= talk.flow.rcv_limit
    assert limits[-1] == RCV_MAXIMUM
    assert limits == sorted(limits)


def test_a_guest_in_bulk_gets_an_ack_for_every_fourth_segment() -> None:
    """Each wakes the process of its network card, and it has half a megabyte in flight."""
    talk = established(mtu=65520, mss=65480, scale=7)
    while talk.flow.rcv_limit < RCV_MAXIMUM:
        room = _edge(talk)
        talk.guest(*[seg("A", data=bytes(min(65_480, room - at))) for at in range(0, room, 65_480)])
        talk.received()
    done = talk.flow.rcv_nxt
    talk.guest(*[seg("A", data=bytes(65_480))] * 3)
    talk.silence()
    talk.guest(seg("A", data=bytes(65_480)))
    (ack,) = talk.received()
    assert talk.flow.rcv_nxt == done + 4 * 65_480
    assert ack.win << 8 == RCV_MAXIMUM
    talk.guest(*[seg("A", data=bytes(65_480))] * 3)
    talk.silence()
    talk.world.advance(talk.world.now + ACK_DELAY)
    assert len(talk.received()) == 1


def test_the_window_does_not_grow_while_the_host_lags() -> None:
    talk = established(mtu=65520, mss=65480, scale=7)
    talk.host.room = 60_000
    talk.guest(seg("A", data=bytes(65_000)))
    talk.received()
    assert talk.flow.rcv_limit == RCV_INITIAL


def test_the_window_does_not_grow_without_scale() -> None:
    """RFC 7323 2.2: 16 bits are all there is."""
    talk = established(mtu=65520, mss=65480, scale=None)
    for _ in range(4):
        talk.guest(seg("A", data=bytes(60_000)), seg("A", data=bytes(_edge(talk) - 60_000)))
        assert [each.win for each in talk.received()] == [65535]
    assert talk.flow.rcv_limit == RCV_INITIAL


def test_a_loss_halves_the_window_but_takes_nothing_back() -> None:
    """Its cause may be that the guest's own queue overflowed. RFC 9293 3.8.6: do not shrink the window."""
    talk = established(mtu=65520, mss=65480, scale=7)
    talk.flow.rcv_limit = 1 << 19
    talk.guest(seg("A", data=bytes(65_000)))
    talk.received()
    edge = talk.flow.rcv_adv
    talk.guest(seg("A", seq=talk.next + 1000, data=b"gap"))
    talk.received()
    assert talk.flow.rcv_limit < 1 << 19
    assert talk.flow.rcv_adv == edge


def test_windows_are_told_in_units_that_never_promise_more() -> None:
    """RFC 7323 2.4: rounding down, so the edge that the guest sees is never beyond ours."""
    talk = established(scale=7)
    talk.host.room = 0
    for size in (1, 255, 256, 257, 1000, 1459):
        talk.guest(seg("A", data=bytes(size)))
        talk.wait(0.01)
        (got,) = talk.received()
        assert got.win << 8 <= _edge(talk) < (got.win + 1) << 8


# ---- the window of the guest


def test_a_probe_timer_with_nothing_left_to_send_ends() -> None:
    """The window opened, and what the host had was sent at once: the next deadline is only the keep-alive."""
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(1500))
    talk.settle()
    talk.received()
    talk.guest(seg("A", win=0))
    talk.wait(0.1)
    talk.guest(seg("A", win=1000))
    talk.expect(seg("PA", seq=1001))
    talk.guest(seg("A"))
    talk.wait(100)
    talk.silence()
    assert talk.flow.rtx_at == NEVER


def test_a_host_that_broke_while_the_window_was_closed() -> None:
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(5000))
    talk.settle()
    talk.received()
    talk.guest(seg("A", win=0))
    talk.host.breaks()
    talk.settle()
    talk.guest(seg("A", win=1000))
    talk.expect(seg("RA", seq=1001))
    assert talk.state == "CLOSED"


def test_data_waits_for_the_guests_window_and_goes_when_it_opens() -> None:
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(2500))
    talk.settle()
    talk.expect(seg("A", seq=1), seg("PA", seq=501))
    talk.window = 0
    talk.guest(seg("A"))
    talk.silence()
    talk.window = 1000
    talk.guest(seg("A"))
    talk.expect(seg("A", seq=1001), seg("PA", seq=1501))


def test_a_zero_window_is_probed_with_backoff_for_ever_while_answered() -> None:
    """RFC 9293 3.8.6.1, MUST-37: as long as the probes are acknowledged, the connection stays; intervals double."""
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(5000))
    talk.settle()
    talk.received()
    talk.window = 0
    talk.guest(seg("A"))
    times = []
    while talk.world.now < talk.started + 6 * 3600:
        talk.world.advance(max(talk.world.now + 0.001, talk.world.stack.next_deadline()))
        for each in talk.received():
            assert (each.seq, each.data) == ((talk.flow.snd_una - 1) & M, b"")
            times.append(talk.world.now)
            talk.guest(seg("A"))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[:5] == pytest.approx([0.4, 0.8, 1.6, 3.2, 6.4], abs=0.1)
    assert max(gaps) <= 61
    assert gaps[-1] >= 30
    assert talk.state == "ESTABLISHED"
    talk.window = 1000
    talk.guest(seg("A"))
    talk.expect(seg("A", seq=1001), seg("PA", seq=1501))


def test_a_zero_window_of_a_silent_guest_ends() -> None:
    talk = established(scale=0, window=1000, mss=500)
    talk.host.sends(bytes(5000))
    talk.settle()
    talk.received()
    talk.window = 0
    talk.guest(seg("A"))
    talk.world.advance(talk.world.now + 1000)
    got = talk.received()
    assert got[-1].bits == 0x14
    assert 5 < len(got) < 40
    assert talk.state == "CLOSED"


def test_a_window_that_closes_over_data_in_flight() -> None:
    """RFC 9293 3.8.6: it should not shrink, and a sender must survive it (MUST-34). Probes, then the data again."""
    talk = established(scale=0, window=2000, mss=500)
    talk.host.sends(bytes(range(200)) * 10)
    talk.settle()
    talk.received()
    talk.guest(seg("A", ack=501, win=0))
    talk.silence()
    talk.wait(1.1)
    got = talk.received()
    assert got
    assert all(not each.data for each in got)
    talk.guest(seg("A", ack=501, win=0))
    talk.wait(100)
    talk.received()
    talk.guest(seg("A", ack=501, win=2000))
    (again,) = talk.received()  # at once: the guest dropped it, and the timer may be a minute away
    assert (again.seq - talk.flow.iss) & M == 501
    assert again.data == (bytes(range(200)) * 10)[500:1000]


def test_old_segments_do_not_change_the_window() -> None:
    """RFC 9293 3.10.7.4: SND.WL1 and SND.WL2."""
    talk = established(scale=0, window=5000)
    talk.guest(seg("A", data=b"abc", win=6000))
    talk.wait(0.01)
    talk.received()
    assert talk.flow.snd_wnd == 6000
    talk.guest(seg("A", seq=1, data=b"abc", win=1))
    talk.received()
    assert talk.flow.snd_wnd == 6000
    talk.guest(seg("A", win=7000))
    assert talk.flow.snd_wnd == 7000


def test_silly_windows_are_not_filled() -> None:
    """RFC 9293 3.8.6.2.1, MUST-38: not less than a segment or half the largest window, with something in flight."""
    talk = established(scale=0, window=4000, mss=1000)
    talk.host.sends(bytes(20_000))
    talk.settle()
    assert len(talk.data()) == 4000
    talk.guest(seg("A", ack=1001, win=3300))  # room for 300
    talk.silence()
    talk.guest(seg("A", ack=2001, win=3000))  # 1,000
    talk.expect(seg("PA", seq=4001))


def test_a_silly_window_with_nothing_in_flight_waits_for_the_override_timeout() -> None:
    """RFC 9293 3.8.6.2.1 (4): a window of one byte is not filled at once, but not left alone for ever."""
    talk = established(scale=0, window=4000, mss=1000)
    talk.host.sends(bytes(4000) + b"x" * 20)
    talk.settle()
    talk.received()
    talk.guest(seg("A", win=1))
    talk.silence()
    talk.wait(0.25)
    (got,) = talk.expect(seg("PA", seq=4001))
    assert got.data == b"x"
    talk.guest(seg("A", win=3))
    talk.silence()
    talk.wait(0.25)
    (got,) = talk.expect(seg("PA", seq=4002))
    assert got.data == b"xxx"
    talk.guest(seg("A", win=1000))
    talk.expect(seg("PA", seq=4005))


def test_a_guest_whose_windows_were_always_small() -> None:
    """Half the largest window ever seen is enough: a tiny stack with one small buffer is served at full speed."""
    talk = established(scale=0, window=100, mss=1000)
    talk.host.sends(bytes(1000))
    talk.settle()
    got = 0
    for _ in range(10):
        got += len(talk.data())
        talk.guest(seg("A"))
    assert got + len(talk.data()) == 1000


# ---- what may be kept


def test_many_guests_that_never_acknowledge_stay_within_the_budget() -> None:
    """20,000 flows of data that nobody acknowledges: bytes_in_flight, checked after each step, is bounded."""
    limits = Limits(in_flight_bytes=1 << 20)
    world = World(limits=limits, oracle=False)
    talks = [established(talk=Talk(world=world, guest_port=port), scale=7, window=60_000) for port in range(1000, 1200)]
    for talk in talks:
        talk.host.sends(bytes(50_000))
    world.settle()
    assert 450_000 < world.stack.bytes_in_flight <= 1 << 19  # one link gets half, see core.budget
    world.take(talks[0].link)
    # Those that were held back go on when others acknowledge.
    first = talks[0]
    world.receive(first.link, first.frame(seg("A", ack=50_001, win=500)))
    world.advance(world.now + 0.5)
    assert world.take(first.link)
    for talk in talks:
        world.receive(talk.link, talk.frame(seg("R", seq=1)))
    assert world.stack.bytes_in_flight == 0


def test_twenty_thousand_flows_that_never_acknowledge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 2, "Bad input". To check every flow at each step would take minutes; the budget is looked at instead."""
    budget = 1 << 20
    world = World(limits=Limits(in_flight_bytes=budget), oracle=False)
    link = world.add_link()
    talk = Talk(world=world, link=link)
    stack = world.stack
    for n in range(20_000):
        talk.port, talk.next, talk.iss, talk._sock = 1024 + n, 0, None, None
        world.feed(link, talk.frame(seg("S", mss=1460, scale=7)))
        flow, sock = talk.flow, talk.host
        flow.on_ready(WRITABLE, world.now)
        talk.iss = flow.iss
        world.feed(link, talk.frame(seg("A", ack=1)))
        sock.sends(bytes(1000))
        flow.on_ready(READABLE, world.now)
        assert stack.bytes_in_flight <= budget
        if n % 1000 == 0:
            stack.flush()
            link.frames.clear()
    assert len(stack.flows) == 20_000
    assert sum(len(view) for flow in stack.flows for _, view in flow.rtx) == stack.bytes_in_flight > budget * 0.4
    stack.flush()
    link.frames.clear()
    # Nearly all are held back by the budget. That each of them looks for room again must not take the processor.
    looks = 0
    look = tcp_output.pump

    def pump(flow: TcpFlow, now: float, *, override: bool = False) -> None:
        nonlocal looks
        looks += 1
        look(flow, now, override=override)

    monkeypatch.setattr(tcp_output, "pump", pump)
    end = world.now + 4
    while (deadline := stack.next_deadline()) <= end:
        stack.handle_timers(deadline)
    assert 19_000 < looks <= 4 * 11_000


def test_hosts_that_do_not_read_stay_within_the_budget() -> None:
    """What guests send for them is kept up to Limits.for_host_bytes."""
    limits = Limits(for_host_bytes=1 << 20)
    world = World(limits=limits, oracle=False)
    talks = [established(talk=Talk(world=world, guest_port=port), scale=7) for port in range(1000, 1040)]
    for talk in talks:
        talk.host.room = 0
        for _ in range(50):
            if talk.state != "ESTABLISHED" or not _edge(talk):
                break
            world.receive(talk.link, talk.frame(seg("A", data=bytes(1460))))
            assert world.stack.bytes_for_host <= 1 << 20
        world.take(talk.link)
    assert world.stack.bytes_for_host > 450_000  # one link gets half, see core.budget
    for sock in list(world.host.open_sockets()):
        sock.room = None
    world.settle()
    assert world.stack.bytes_for_host == 0


def test_small_pieces_for_a_host_that_does_not_read_are_kept_together() -> None:
    """One object for each byte would cost forty times what the budget counts."""
    talk = established()
    talk.host.room = 0
    for _ in range(100):
        talk.guest(*[seg("A", data=b"x")] * 50)
        talk.received()
    assert talk.flow.to_host_bytes == 5000
    assert talk.flow.to_host is not None
    assert len(talk.flow.to_host) <= 5
    talk.host.room = None
    talk.settle()
    talk.host.takes(b"x" * 5000)


def test_small_pieces_that_the_guest_does_not_acknowledge_are_kept_together() -> None:
    talk = established()
    data = random.Random(6).randbytes(3000)
    for at in range(len(data)):
        talk.host.sends(data[at : at + 1])
        talk.world.settle()
    assert [len(each.data) for each in talk.received()] == [1] * 3000
    assert sum(len(view) for _, view in talk.flow.rtx) == 3000
    assert len(talk.flow.rtx) <= 5
    talk.guest(seg("A", ack=1501))
    talk.wait(1.5)
    got = talk.received()
    assert len(got[0].data) > 500
    assert got[0].data == data[1500 : 1500 + len(got[0].data)]


def test_segments_out_of_order_stay_within_their_budget() -> None:
    """Each flow may keep 256 segments; those of many flows have one budget."""
    limits = Limits(out_of_order_bytes=200_000)
    world = World(limits=limits, oracle=False)
    talks = [
        established(talk=Talk(world=world, guest_port=port, mtu=65520), scale=7, mss=1460) for port in range(1000, 1040)
    ]
    for talk in talks:
        for i in range(20):
            world.receive(talk.link, talk.frame(seg("A", seq=100 + i, data=bytes(1400))))
            held = sum(
                len(data) + OUT_OF_ORDER_OVERHEAD for flow in world.stack.flows for _, data in flow.out_of_order or ()
            )
            assert held == world.stack.bytes_out_of_order <= 200_000
    assert world.stack.bytes_out_of_order > 75_000  # one link gets half, see core.budget
    assert world.drops["tcp_out_of_order_full"] > 0
    world.take(talks[0].link)
    for talk in talks:
        world.receive(talk.link, talk.frame(seg("A", seq=1, data=bytes(99))))
    assert world.stack.bytes_out_of_order == 0
    for talk in talks:
        world.receive(talk.link, talk.frame(seg("A", seq=10_000, data=bytes(99))))
    assert world.stack.bytes_out_of_order == (99 + OUT_OF_ORDER_OVERHEAD) * len(talks)
    for talk in talks:
        world.receive(talk.link, talk.frame(seg("R", seq=world_next(talk))))
    assert world.stack.bytes_out_of_order == 0


def test_small_segments_out_of_order_are_counted_as_what_they_cost() -> None:
    """256 segments of one byte in each of thousands of flows: a hundred times the payload."""
    world = World(limits=Limits(out_of_order_bytes=100_000), oracle=False)
    talks = [established(talk=Talk(world=world, guest_port=port)) for port in range(1000, 1010)]
    for talk in talks:
        world.receive(talk.link, *[talk.frame(seg("A", seq=3 + 2 * i, data=b"x")) for i in range(200)])
    assert sum(len(flow.out_of_order or ()) for flow in world.stack.flows) <= 500
    assert world.drops["tcp_out_of_order_full"] > 0


def world_next(talk: Talk) -> int:
    return (talk.flow.rcv_nxt - talk.isn) & M


def test_a_fin_gives_back_what_was_out_of_order() -> None:
    talk = established()
    talk.guest(seg("A", seq=500, data=b"far"))
    talk.received()
    talk.guest(seg("FA", seq=1))
    talk.received()
    assert talk.state == "CLOSE_WAIT"
    assert talk.world.stack.bytes_out_of_order == 0


def test_window_updates_stop_with_the_guests_fin() -> None:
    talk = close_wait()
    talk.host.sends(b"abc")
    talk.settle()
    talk.expect(seg("PA", seq=1, ack=2))


# ---- the guest's link


def test_a_congested_link_stops_the_reading_and_a_drained_one_resumes_it() -> None:
    """Nothing is lost: the host's TCP slows down."""
    talk = established()
    talk.link.congested = talk.link.stuck = True
    talk.host.sends(b"abc")
    talk.settle()
    talk.silence()
    assert talk.host.inbox == b"abc"
    assert talk.link.waiters == [talk.flow]
    talk.host.sends(b"def")
    talk.settle()
    talk.link.drain(talk.world.now)
    talk.world.end_round()
    talk.expect(seg("PA", seq=1, data=b"abcdef"))
    talk.settle()
    assert talk.flow.interest & 1


def test_a_flow_that_ended_while_it_waited_for_its_link() -> None:
    talk = established()
    talk.link.congested = True
    talk.host.sends(b"abc")
    talk.settle()
    talk.guest(seg("R"))
    talk.link.drain(talk.world.now)
    talk.world.check()
    assert talk.state == "CLOSED"
