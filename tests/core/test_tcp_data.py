"""Data in both directions: RFC 9293 3.4, 3.8.6.3, 3.10.7.4; RFC 5681 4.2; short writes and errors of host sockets."""

from __future__ import annotations

import errno
import itertools
import random

import pytest

from netstack.core import stack as stack_module
from netstack.core.chunks import CHUNK, LARGE_CHUNK
from netstack.core.ports import READABLE, WRITABLE
from tests.script import Talk, close_wait, established, fin_wait_2, seg

ACK_DELAY = stack_module.ACK_DELAY


# ---- guest to host


def test_data_in_order_reaches_the_host_at_once() -> None:
    talk = established()
    talk.guest(seg("PA", data=b"hello "), seg("PA", data=b"world"))
    talk.host.takes(b"hello world")
    assert talk.host.calls == 1  # one call for the batch


def test_one_ack_for_a_batch() -> None:
    """RFC 9293 3.8.6.3: at least every second full segment is acknowledged; a batch counts as one arrival."""
    talk = established(mss=100)
    talk.guest(*[seg("A", data=b"x" * 100)] * 10)
    talk.expect(seg("A", seq=1, ack=1001, data=b""))
    talk.silence()


def test_the_ack_of_little_data_is_delayed() -> None:
    """RFC 9293 3.8.6.3: by less than 0.5 s."""
    talk = established()
    talk.guest(seg("PA", data=b"?"))
    talk.silence()
    assert ACK_DELAY < 0.5
    talk.at(ACK_DELAY)
    talk.expect(seg("A", seq=1, ack=2, data=b""))
    talk.at(10)
    talk.silence()


def test_the_ack_rides_on_the_answer() -> None:
    talk = established()
    talk.guest(seg("PA", data=b"ping"))
    talk.host.takes(b"ping")
    talk.host.sends(b"pong")
    talk.settle()
    talk.expect(seg("PA", seq=1, ack=5, data=b"pong"))
    talk.guest(seg("A"))
    talk.at(1)
    talk.silence()


def test_late_acks_of_many_flows_share_one_deadline() -> None:
    first = established()
    second = established(talk=Talk(world=first.world, guest_port=40001))
    first.world.feed(first.link, first.frame(seg("PA", data=b"1")), second.frame(seg("PA", data=b"2")))
    first.world.end_round()
    first.world.advance(first.world.now + ACK_DELAY)
    assert len(first.world.take(first.link)) == 2


def test_a_flow_that_ended_owes_no_late_ack() -> None:
    talk = established()
    talk.guest(seg("PA", data=b"?"), seg("R"))
    assert talk.state == "CLOSED"
    talk.wait(1)
    talk.silence()


def test_a_segment_out_of_order_is_kept_and_answered_at_once() -> None:
    """RFC 5681 4.2: an immediate duplicate ACK, and an immediate ACK when the gap is filled."""
    talk = established()
    talk.guest(seg("PA", seq=6, data=b"world"))
    talk.expect(seg("A", ack=1))
    talk.host.takes(b"")
    talk.guest(seg("PA", seq=1, data=b"hello"))
    talk.expect(seg("A", ack=11))
    talk.host.takes(b"helloworld")
    assert talk.flow.out_of_order is None


def test_three_segments_behind_a_gap_are_three_duplicate_acks() -> None:
    """RFC 5681 3.2: that is what makes the guest send the missing one again; also when they came in one batch."""
    talk = established()
    talk.guest(*[seg("A", seq=101 + 10 * i, data=b"0123456789") for i in range(5)])
    talk.expect(seg("A", ack=1), seg("A", ack=1), seg("A", ack=1))
    talk.silence()


def test_order_within_one_batch_does_not_matter() -> None:
    talk = established()
    talk.guest(seg("A", seq=11, data=b"second"), seg("A", seq=1, data=b"the first "), seg("A", seq=17, data=b" third"))
    talk.host.takes(b"the first second third")
    assert talk.expect(seg("A", ack=23))[-1].ack


def test_several_gaps_filled_in_any_order() -> None:
    chance = random.Random(1)
    for _ in range(20):
        talk = established()
        data = chance.randbytes(3000)
        cuts = sorted({0, 3000, *chance.sample(range(1, 3000), 20)})
        pieces = [(a, b) for a, b in itertools.pairwise(cuts)]
        chance.shuffle(pieces)
        while pieces:
            batch = [pieces.pop() for _ in range(min(len(pieces), chance.randint(1, 4)))]
            talk.guest(*[seg("A", seq=1 + a, data=data[a:b]) for a, b in batch])
            talk.received()
        talk.host.takes(data)
        assert talk.flow.out_of_order is None


@pytest.mark.parametrize("batch", (True, False), ids=("one batch", "one by one"))
def test_overlapping_segments_give_each_byte_once(batch: bool) -> None:
    """RFC 9293 3.10.7.4, seventh: a segment that is partly old or partly new counts where it is new."""
    talk = established()
    data = bytes(range(200))
    spans = ((0, 50), (20, 80), (0, 90), (100, 150), (120, 200), (80, 130), (60, 200), (0, 200))
    segments = [seg("A", seq=1 + a, data=data[a:b]) for a, b in spans]
    if batch:
        talk.guest(*segments)
    else:
        for segment in segments:
            talk.guest(segment)
            talk.received()
    talk.host.takes(data)


def test_a_duplicate_is_acknowledged_and_dropped() -> None:
    """RFC 9293 3.10.7.4, first: not acceptable, so an ACK, at once."""
    talk = established()
    talk.guest(seg("A", data=b"once"))
    talk.wait(0.01)
    talk.expect(seg("A", ack=5))
    talk.guest(seg("A", seq=1, data=b"once"))
    talk.expect(seg("A", ack=5))
    talk.host.takes(b"once")


def test_data_beyond_the_window_is_cut_off() -> None:
    """RFC 9293 3.10.7.4: what lies beyond RCV.WND is not taken."""
    talk = established(scale=None, mtu=65520, mss=65480)
    talk.guest(seg("A", data=b"a" * 60000), seg("A", seq=60001, data=b"b" * 10000))
    talk.expect(seg("A", ack=65536))
    talk.host.takes(b"a" * 60000 + b"b" * 5535)


def test_a_segment_wholly_beyond_the_window_is_only_answered() -> None:
    talk = established()
    talk.guest(seg("A", seq=1 + 65535, data=b"far"))
    talk.expect(seg("A", ack=1))
    assert talk.flow.out_of_order is None
    talk.guest(seg("A", seq=65535, data=b"last"))
    talk.expect(seg("A", ack=1))
    assert talk.flow.out_of_order
    assert [len(data) for _, data in talk.flow.out_of_order] == [1]


def test_urgent_data_is_data() -> None:
    """RFC 6093: the pointer is not looked at, wherever it points (libslirp: CVE-2026-9539)."""
    talk = established()
    frame = bytearray(talk.frame(seg("PAU", data=b"urgent")))
    frame[14 + 20 + 18 : 14 + 20 + 20] = b"\xff\xff"
    talk.world.receive(talk.link, bytes(frame))
    talk.host.takes(b"urgent")
    talk.wait(0.01)
    talk.expect(seg("A", ack=7))


def test_a_segment_without_ack_is_dropped() -> None:
    """RFC 9293 3.10.7.4, fifth."""
    talk = established()
    talk.guest(seg("P", data=b"no ack"))
    talk.silence()
    talk.host.takes(b"")
    assert talk.drops == {"tcp_no_ack": 1}


def test_sequence_numbers_wrap_around_in_both_directions() -> None:
    talk = Talk(isn=0xFFFFFFF0)
    talk.world.stack.initial_sequence = lambda key, now: 0xFFFFFFE0  # type: ignore[method-assign]
    established(talk=talk)
    data = bytes(range(256)) * 4
    talk.guest(*[seg("A", data=data[i : i + 100]) for i in range(0, 1000, 100)])
    talk.host.takes(data[:1000])
    talk.wait(0.01)
    talk.expect(seg("A", ack=1001))
    talk.host.sends(data)
    talk.settle()
    talk.expect(seg("PA", seq=1, data=data))
    talk.guest(seg("A"))
    assert talk.world.stack.bytes_in_flight == 0


def test_padding_behind_a_short_packet_is_not_data() -> None:
    """Ethernet's minimum of 60 bytes: the IP packet says where it ends."""
    talk = established()
    talk.world.receive(talk.link, talk.frame(seg("PA", data=b"x")) + b"\0" * 5)
    talk.host.takes(b"x")


# ---- the host's socket


def test_a_short_write_is_kept_and_written_later() -> None:
    talk = established()
    talk.host.room = 4
    talk.guest(seg("A", data=b"abc"), seg("A", data=b"defgh"))
    talk.host.takes(b"abcd")
    assert talk.world.stack.bytes_for_host == 4
    assert talk.world.poller.events[talk.host.fd] == READABLE | WRITABLE
    talk.guest(seg("A", data=b"ij"))
    talk.host.takes(b"")
    talk.host.room = 3
    talk.settle()
    talk.host.takes(b"efg")
    talk.host.room = None
    talk.settle()
    talk.host.takes(b"hij")
    assert talk.world.stack.bytes_for_host == 0
    assert talk.world.poller.events[talk.host.fd] == READABLE


def test_eagain_keeps_everything() -> None:
    talk = established()
    talk.host.room = 0
    talk.guest(seg("A", data=b"abc"))
    talk.host.takes(b"")
    assert talk.flow.to_host_bytes == 3
    talk.host.room = None
    talk.settle()
    talk.host.takes(b"abc")


@pytest.mark.parametrize("number", (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOBUFS))
def test_an_error_of_the_write_resets_the_guest(number: int) -> None:
    talk = established()
    talk.host.breaks(number)
    talk.world.feed(talk.link, talk.frame(seg("A", data=b"lost")))
    talk.world.end_round()
    talk.world.settle()
    talk.expect(seg("RA", seq=1, ack=5))
    assert talk.state == "CLOSED"
    assert talk.host.was_reset


def test_an_error_while_data_waits_for_the_host() -> None:
    talk = established()
    talk.host.room = 0
    talk.guest(seg("A", data=b"abc"))
    talk.host.breaks()
    talk.settle()
    talk.expect(seg("RA", ack=4))
    assert talk.world.stack.bytes_for_host == 0


@pytest.mark.parametrize("number", (errno.ECONNRESET, errno.ETIMEDOUT, errno.EIO))
def test_an_error_of_the_read_resets_the_guest(number: int) -> None:
    talk = established()
    talk.host.breaks(number)
    talk.settle()
    talk.expect(seg("RA", seq=1, ack=1))
    assert talk.state == "CLOSED"


def test_many_small_segments_are_one_gathered_write() -> None:
    """Beyond IOV_MAX the rest is written when the socket says that it has room."""
    talk = established(mss=1460)
    data = bytes(range(256)) * 5
    talk.guest(*[seg("A", data=data[i : i + 1]) for i in range(len(data))])
    talk.host.takes(data)
    talk.wait(0.01)
    talk.expect(seg("A", ack=1 + len(data)))


# ---- host to guest


def test_data_of_the_host_is_cut_to_segments() -> None:
    talk = established(mss=1000)
    data = random.Random(2).randbytes(3500)
    talk.host.sends(data)
    talk.settle()
    got = talk.expect(seg("A", seq=1), seg("A", seq=1001), seg("A", seq=2001), seg("PA", seq=3001))
    assert b"".join(each.data for each in got) == data
    talk.silence()
    assert talk.world.stack.bytes_in_flight == 3500
    talk.guest(seg("A"))
    assert talk.world.stack.bytes_in_flight == 0
    assert not talk.flow.rtx


@pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))
@pytest.mark.parametrize(("mtu", "mss"), ((576, 536), (1500, 1460), (9000, 8960), (65520, 65480)))
@pytest.mark.parametrize("prefix", (0, 4, 12))
def test_bursts_and_single_segments_carry_the_same(ipv6: bool, mtu: int, mss: int, prefix: int) -> None:
    """Whatever way frames are built: one by one, as a NumPy matrix, or by reference. scapy checks each."""
    talk = Talk(ipv6=ipv6)
    talk.world.remove_link(talk.link)
    talk.world.links.clear()
    talk.link = talk.world.add_link(mtu=mtu, prefix=prefix)
    established(talk=talk, mss=mss, scale=9)
    chance = random.Random(mtu)
    data = chance.randbytes(min(400_000, 40 * mss + 7))
    talk.host.sends(data)
    talk.settle()
    assert talk.data() == data
    talk.guest(seg("A"))
    assert talk.world.stack.bytes_in_flight == 0


@pytest.mark.parametrize("size", (0xFFFF, 0xFF00, 1, 2, 3, 1459, 1460, 1461, 5839, 5840, 5841))
def test_sums_of_all_ones_and_all_zeros(size: int) -> None:
    """RFC 1071: the two zeros of one's complement."""
    for byte in (b"\0", b"\xff"):
        talk = established(scale=7)
        talk.host.sends(byte * size)
        talk.settle()
        assert talk.data() == byte * size


def test_the_hosts_data_flows_while_the_guest_acknowledges() -> None:
    talk = established(mss=1460, scale=0, window=10_000)
    data = random.Random(3).randbytes(100_000)
    talk.host.sends(data)
    got = b""
    talk.settle()
    while True:
        piece = talk.data()
        if not piece:
            break
        assert len(piece) <= 10_000
        got += piece
        talk.guest(seg("A"))
    assert got == data
    assert not talk.host.inbox


def test_nothing_is_read_that_cannot_be_sent() -> None:
    """The host's own window closes when the guest's does."""
    talk = established(scale=0, window=3000)
    talk.host.sends(bytes(10_000))
    talk.settle()
    assert len(talk.data()) == 3000
    assert len(talk.host.inbox) == 7000
    assert not talk.world.poller.events[talk.host.fd] & READABLE


def test_an_acknowledgement_in_the_middle_of_a_segment() -> None:
    talk = established()
    talk.host.sends(b"0123456789")
    talk.settle()
    talk.expect(seg("PA", seq=1))
    talk.guest(seg("A", ack=5))
    assert talk.flow.snd_una == (talk.flow.iss + 5) & 0xFFFFFFFF
    talk.at(1.2)
    talk.expect(seg("PA", seq=5, data=b"456789"))


def test_chunks_are_used_again_only_when_nobody_needs_them() -> None:
    """A guest that acknowledges what still lies in its link's queue must not be shown the bytes of another flow."""
    talk = established(mtu=65520, mss=65480, scale=7)
    other = established(talk=Talk(world=talk.world, guest_port=40001), mss=65480, scale=7)
    talk.link.stuck = True
    talk.host.sends(b"a" * 300_000)
    talk.settle()
    talk.world.receive(talk.link, talk.frame(seg("A", ack=300_001)))
    assert talk.world.stack.bytes_in_flight == 0
    other.host.sends(b"b" * 2_500_000)  # several reads: the last ones into what is used again
    talk.settle()
    talk.link.stuck = False
    talk.world.end_round()
    payloads = [frame[54:] for frame in talk.world.take(talk.link)]
    # Whoever reads them now: the first flow's are whole.
    assert b"".join(payloads).count(b"a") == 300_000
    assert b"".join(payloads).count(b"b") == 2_500_000


def test_chunks_of_a_flow_that_moved_are_not_used_again() -> None:
    """The queue of the link that it came from may hold them still."""
    talk = established(mtu=65520, mss=65480, scale=7)
    talk.link.stuck = True
    talk.host.sends(b"a" * 300_000)
    talk.settle()
    before, there = talk.link, talk.world.add_link("there", mtu=65520)
    talk.world.stack.switch.remove(before)  # as if the guest had been silent there for a while
    talk.link = there
    talk.world.receive(there, talk.frame(seg("A", ack=300_001)))
    assert talk.world.stack.bytes_in_flight == 0
    talk.host.sends(b"b" * 2_500_000)
    talk.settle()
    before.drain(talk.world.now)
    assert b"".join(frame[54:] for frame in talk.world.take(before)).count(b"a") == 300_000


# ---- half open


def test_the_guest_sends_on_after_the_hosts_fin() -> None:
    talk = fin_wait_2()
    talk.guest(seg("A", data=b"still here"))
    talk.host.takes(b"still here")
    talk.wait(0.01)
    talk.expect(seg("A", seq=2, ack=11))
    assert talk.state == "FIN_WAIT_2"


def test_a_host_that_closed_for_good_resets_what_the_guest_still_sends() -> None:
    talk = fin_wait_2()
    talk.host.breaks(errno.EPIPE)
    talk.settle()
    talk.guest(seg("A", data=b"anyone?"))
    talk.expect(seg("RA", seq=2, ack=8))
    assert talk.state == "CLOSED"


def test_a_large_read_counts_the_whole_chunk_that_it_keeps() -> None:
    """Or a guest that acknowledges nothing could hold twice what the budget says."""
    talk = established(mss=1460, scale=7, window=8192)
    talk.host.sends(b"x" * 140_000)
    talk.settle()
    assert len(talk.flow.rtx) == 1
    assert talk.world.stack.bytes_in_flight == CHUNK
    talk.received()
    talk.guest(seg("A", ack=140_001))
    assert talk.world.stack.bytes_in_flight == 0


def test_a_large_read_of_large_frames_counts_the_whole_chunk_too() -> None:
    talk = established(mtu=65520, mss=65480, scale=7)
    talk.host.sends(b"x" * 300_000)
    talk.settle()
    assert len(talk.flow.rtx) == 1
    assert talk.world.stack.bytes_in_flight == LARGE_CHUNK
    talk.received()
    talk.guest(seg("A", ack=300_001))
    assert talk.world.stack.bytes_in_flight == 0


def test_flows_in_bulk_share_a_round() -> None:
    """Each reads 1 MiB in it as long as they are few; then it is 256 KiB, so that the others have their turn soon."""
    talk = established(mtu=65520, mss=65480, scale=7)
    flows = [
        talk,
        *(established(talk=Talk(world=talk.world, guest_port=40001 + i), mss=65480, scale=7) for i in range(5)),
    ]
    for one in flows:
        one.host.sends(b"x" * 1_100_000)
    for one in flows:
        one.flow.on_ready(READABLE, talk.world.now)
    sizes = [len(one.flow.rtx[0][1]) for one in flows]
    assert [size > CHUNK for size in sizes] == [True, True, True, False, False, False]


def test_a_guest_that_has_said_all_acknowledges_on_the_fast_path() -> None:
    """CLOSE_WAIT may last for gigabytes; data behind the guest's FIN is none."""
    talk = close_wait(mss=1000)
    talk.host.sends(b"x" * 3000)
    talk.settle()
    talk.received()
    assert talk.flow.fast
    talk.guest(seg("A", ack=3001))
    assert talk.world.stack.bytes_in_flight == 0
    talk.guest(seg("PA", ack=3001, data=b"beyond the end"))
    assert talk.state == "CLOSE_WAIT"
    assert not talk.host.taken
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=3001))
    talk.guest(seg("A", ack=3002))
    assert talk.state == "CLOSED"
