"""The vhost-user link against a front-end that does what a test says."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from netstack.core.ports import Offload
from netstack.vde import vhost_user_messages as wire
from netstack.vde.vhost_user_device import FEATURES, PROTOCOL
from netstack.vde.vhost_user_messages import Request
from tests.rim.vhost_bench import LEGACY, LINUX, PLAIN, Bench
from tests.rim.vhost_front import GUEST, INDIRECT, MEMORY, NEED_REPLY, NEXT, USER, WRITE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (memfd, eventfd)")

HEADER = bytes(12)


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = descriptors()
    made = Bench()
    yield made
    made.close()
    assert descriptors() == before, "descriptors are left open"


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def frame(size: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + seed) & 0xFF for i in range(size))


# ---- negotiation


def test_the_order_in_which_qemu_asks(bench: Bench) -> None:
    front = bench.front
    front.send(Request.GET_FEATURES)
    bench.run()
    offered = front.reply_u64(Request.GET_FEATURES)
    assert offered == FEATURES
    assert (
        offered & (1 << 32 | 1 << 30 | 1 << 15 | 1 << 28 | 1 << 29) == 1 << 32 | 1 << 30 | 1 << 15 | 1 << 28 | 1 << 29
    )
    front.send(Request.GET_PROTOCOL_FEATURES)
    bench.run()
    assert front.reply_u64(Request.GET_PROTOCOL_FEATURES) == PROTOCOL == 1 << 0 | 1 << 3 | 1 << 4 | 1 << 13 | 1 << 15
    front.send_u64(Request.SET_PROTOCOL_FEATURES, PROTOCOL)
    front.send(Request.GET_QUEUE_NUM)
    bench.run()
    assert front.reply_u64(Request.GET_QUEUE_NUM) == 1
    front.send(Request.GET_MAX_MEM_SLOTS)
    bench.run()
    assert front.reply_u64(Request.GET_MAX_MEM_SLOTS) >= 8
    front.send(Request.SET_OWNER)
    for index in (0, 1):
        front.send_u64(Request.SET_VRING_CALL, index, [(front.rx, front.tx)[index].call])
        front.send_u64(Request.SET_VRING_ERR, index, [(front.rx, front.tx)[index].call])
    front.enable()
    front.enable()
    front.send_u64(Request.SET_FEATURES, PLAIN)
    front.send(Request.ADD_MEM_REG, front.region(), [front.memfd], NEED_REPLY)
    bench.run()
    assert front.reply_u64(Request.ADD_MEM_REG) == 0
    assert not bench.link.up
    front.set_ring(front.rx)
    front.set_ring(front.tx)
    bench.run()
    assert bench.link.up
    assert bench.ups
    assert not bench.closed


def test_an_mtu_beyond_the_link_is_refused_and_nothing_else_happens(bench: Bench) -> None:
    front = bench.front
    front.send_u64(Request.SET_PROTOCOL_FEATURES, PROTOCOL)
    for mtu, answer in ((1500, 0), (65520, 0), (65521, 1), (20, 1)):
        front.send_u64(Request.NET_SET_MTU, mtu, flags=NEED_REPLY)
        bench.run()
        assert front.reply_u64(Request.NET_SET_MTU) == answer
    assert not bench.closed


def test_messages_that_come_in_pieces_are_put_together(bench: Bench) -> None:
    front = bench.front
    message = struct.pack("=IIIQ", Request.SET_FEATURES, 1, 8, PLAIN) + struct.pack("=III", Request.GET_FEATURES, 1, 0)
    for i in range(len(message)):
        front.sock.send(message[i : i + 1])
        bench.run()
    assert front.reply_u64(Request.GET_FEATURES) == FEATURES


def test_what_the_driver_takes_is_what_the_link_offers(bench: Bench) -> None:
    front = bench.front
    assert bench.link.offload == Offload(checksum=False, tso4=False, tso6=False, uso=False)
    bench.start(LINUX)
    assert bench.link.offload == Offload(checksum=True, tso4=True, tso6=True, uso=True)
    bench.stop()
    front.send_u64(Request.SET_FEATURES, PLAIN | wire.GUEST_CSUM | wire.GUEST_TSO4)
    bench.run()
    assert bench.link.offload == Offload(checksum=True, tso4=True, tso6=False, uso=False)
    front.send_u64(Request.SET_FEATURES, PLAIN | wire.GUEST_TSO4)  # against the rules: it needs GUEST_CSUM
    bench.run()
    assert bench.link.offload == Offload(checksum=False, tso4=False, tso6=False, uso=False)


# ---- from the guest


def test_a_frame_from_the_guest(bench: Bench) -> None:
    bench.start()
    front = bench.front
    head = front.transmit(HEADER + frame(60))
    front.tx.notify()
    bench.run()
    assert bench.stack.frames == [frame(60)]
    assert front.tx.take_used() == [(head, 0)]
    assert bench.link.frames_from_guest == 1
    assert bench.link.bytes_from_guest == 60


@pytest.mark.parametrize("indirect", (False, True))
@pytest.mark.parametrize("cuts", ((12,), (5, 12, 13, 40), (12, 66), (30,)))
def test_a_frame_may_lie_in_any_pieces(bench: Bench, cuts: tuple[int, ...], indirect: bool) -> None:
    bench.start()
    for size in (60, 1514, 9000, 65549):
        whole = b"\1\2\3\4\5\6\7\x08\x09\x0a\0\0" + frame(size)
        edges = (0, *cuts, len(whole))
        bench.front.data = 0x10000
        bench.front.transmit(*(whole[a:b] for a, b in pairwise(edges)), indirect=indirect)
        bench.front.tx.notify()
        bench.run()
        assert bench.stack.frames == [frame(size)]
        assert bench.stack.headers == [whole[:12]]
        bench.stack.frames.clear()
        bench.stack.headers.clear()
        for head, _ in bench.front.tx.take_used():
            assert head not in bench.front.tx.free
        bench.front.tx.free = list(range(16))
    assert bench.stack.scattered == 2  # the large ones
    assert not bench.stack.views
    assert not bench.closed


def test_small_and_large_frames_keep_their_order(bench: Bench) -> None:
    bench.start()
    sizes = (60, 20000, 60, 61, 30000, 40000, 62)
    for i, size in enumerate(sizes):
        bench.front.transmit(HEADER + frame(size, i))
    bench.front.tx.notify()
    bench.run()
    assert bench.stack.frames == [frame(size, i) for i, size in enumerate(sizes)]
    assert len(bench.front.tx.take_used()) == len(sizes)


def test_a_driver_from_before_version_1_has_a_shorter_header(bench: Bench) -> None:
    bench.start(LEGACY)
    bench.front.transmit(b"0123456789" + frame(60))
    bench.front.transmit(b"0123456789" + frame(20000))
    bench.front.transmit(b"0123456789", frame(70))
    bench.front.tx.notify()
    bench.run()
    assert bench.stack.frames == [frame(60), frame(20000), frame(70)]
    assert bench.stack.headers == [b"0123456789\0\0"] * 3
    bench.front.post(2, 100)
    bench.front.rx.notify()
    bench.link.queue_frame(b"abcdefghij\0\0" + frame(60), None)
    bench.link.queue_frame(b"abcdefghij\0\0" + frame(20), frame(30))
    bench.run()
    assert bench.front.received() == [b"abcdefghij" + frame(60), b"abcdefghij" + frame(20) + frame(30)]


def test_work_of_one_wakeup_is_bounded_and_nothing_is_left(bench: Bench) -> None:
    made = Bench(size=1024)
    try:
        made.start()
        for _ in range(1000):
            made.front.transmit(HEADER + frame(60))
        made.front.tx.notify()
        most = 0
        while made.poller.step():
            fresh, made.stack.frames = len(made.stack.frames), []
            most = max(most, fresh)
        assert 0 < most <= 256
        assert len(made.front.tx.take_used()) == 1000
    finally:
        made.close()


def test_bytes_of_one_wakeup_are_bounded_too() -> None:
    made = Bench(size=256)
    try:
        made.start()
        for i in range(200):
            made.front.tx.describe(i, GUEST + made.front.data, 12 + 65000, 0)
            made.front.tx.offer(i)
        made.front.tx.notify()
        most = 0
        while made.poller.step():
            most = max(most, len(made.stack.frames))
            made.stack.frames.clear()
        assert 0 < most <= 17
        assert len(made.front.tx.take_used()) == 200
    finally:
        made.close()


def test_a_kick_that_comes_while_we_work_is_not_lost(bench: Bench) -> None:
    """The driver looks at avail_event before we have written it, and does not kick."""
    bench.start()
    front = bench.front
    late = [HEADER + frame(61), HEADER + frame(62)]

    def send_late() -> None:
        if late:
            front.transmit(late.pop())

    bench.stack.on_frame = send_late
    front.transmit(HEADER + frame(60))
    front.tx.notify()
    bench.run()
    assert sorted(map(len, bench.stack.frames)) == [60, 61, 62]
    assert front.tx.avail_event == 3


def test_a_disabled_ring_is_emptied_and_nothing_passes(bench: Bench) -> None:
    bench.start()
    bench.front.enable(0)
    bench.front.post(1)
    head = bench.front.transmit(HEADER + frame(60))
    bench.front.tx.notify()
    bench.run()
    assert bench.front.tx.take_used() == [(head, 0)]
    assert not bench.stack.frames
    assert not bench.link.up
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert not bench.front.received()
    assert bench.link.drops_to_guest == 1


# ---- to the guest


def test_a_frame_to_the_guest(bench: Bench) -> None:
    bench.start()
    bench.front.post(3)
    bench.link.queue_frame(bytearray(HEADER + frame(60)))
    bench.link.queue_frame(HEADER + frame(14), frame(1500))
    assert bench.front.received() == []  # not before flush()
    bench.run()
    assert bench.front.frames() == [(bytes(10) + b"\1\0", frame(60)), (bytes(10) + b"\1\0", frame(14) + frame(1500))]
    assert bench.front.rx.interrupts()
    assert bench.link.backlog == 0


def test_a_large_frame_fills_as_many_buffers_as_it_needs(bench: Bench) -> None:
    bench.start()
    bench.front.post(16, 5000)
    bench.link.queue_frame(HEADER + frame(54), frame(65000))
    bench.run()
    ((header, whole),) = bench.front.frames()
    assert header[10] == 14
    assert whole == frame(54) + frame(65000)


def test_buffers_smaller_than_a_header_are_filled_too(bench: Bench) -> None:
    bench.start()
    bench.front.post(16, 11)
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    whole = b"".join(bench.front.received())
    assert whole == bytes(10) + b"\7\0" + frame(60)


def test_bursts(bench: Bench) -> None:
    bench.start()
    bench.front.post(4)
    frames = np.arange(4 * 100, dtype=np.uint8).reshape(4, 100)
    frames[:, :12] = 0
    bench.link.queue_burst(frames)
    bench.run()
    assert [whole for _, whole in bench.front.frames()] == [bytes(row[12:]) for row in frames]


def test_frames_wait_for_buffers_in_their_order(bench: Bench) -> None:
    bench.start()
    for i in range(5):
        bench.link.queue_frame(HEADER + frame(60, i))
    bench.run()
    assert bench.link.backlog == 5 * 72
    for expected in ([0, 1], [2, 3, 4]):
        bench.front.post(len(expected))
        bench.front.rx.notify()
        bench.run()
        assert [whole for _, whole in bench.front.frames()] == [frame(60, i) for i in expected]
    assert bench.link.backlog == 0


def test_a_guest_without_buffers_costs_a_bounded_queue(bench: Bench) -> None:
    bench.start()
    for _ in range(100):
        bench.link.queue_frame(HEADER, bytes(65000))
    assert bench.link.congested
    assert bench.link.drops_to_guest > 30
    assert bench.link.backlog <= (4 << 20) + 70000
    drained: list[float] = []

    class Waiter:
        def on_drained(self, now: float) -> None:
            drained.append(now)

    bench.link.wait_drained(Waiter())
    bench.run()
    assert not drained
    for _ in range(200):
        bench.front.data = 0x10000
        bench.front.post(len(bench.front.rx.free), 65536)
        bench.front.rx.notify()
        bench.run()
        if not bench.front.received():
            break
    assert drained == [1.0]
    assert bench.link.backlog == 0


def test_without_mergeable_buffers_what_fits_into_none_is_dropped(bench: Bench) -> None:
    bench.start(PLAIN)
    bench.front.post(2)
    bench.link.queue_frame(HEADER + frame(14), frame(3000))
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert bench.front.received() == [bytes(10) + b"\1\0" + frame(60)]


def test_a_frame_larger_than_all_of_the_guests_buffers_does_not_stop_the_others(bench: Bench) -> None:
    bench.start()
    bench.front.post(16, 100)
    bench.front.rx.notify()
    bench.link.queue_frame(HEADER + frame(14), frame(3000))
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert [whole for _, whole in bench.front.frames()] == [frame(60)]


@pytest.mark.parametrize("features", (PLAIN, LINUX))
def test_a_frame_that_fits_no_buffers_is_counted(bench: Bench, features: int) -> None:
    bench.start(features)
    bench.front.post(16, 100)
    bench.front.rx.notify()
    bench.link.queue_frame(HEADER + frame(14), frame(3000))
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert bench.link.drops_to_guest == 1
    assert len(bench.front.received()) == 1


def test_data_is_received_into_no_more_pieces_than_the_kernel_takes() -> None:
    made = Bench(size=2048)
    ours, theirs = socket.socketpair()
    try:
        made.start()
        made.front.post(1500, 20)
        theirs.send(frame(10000))
        pieces = made.link.reserve(66, 28000)
        assert ours.recvmsg_into(pieces)[0] == 10000
        made.link.commit(HEADER + frame(54), 10000)
        made.run()
        assert made.front.frames() == [(bytes(10) + (504).to_bytes(2, "little"), frame(54) + frame(10000))]
    finally:
        made.close()
        ours.close()
        theirs.close()


@pytest.mark.parametrize("start", (0, 65500))
def test_many_buffers_are_taken_at_once(start: int) -> None:
    """Over the ends of the ring and of its indices, and of different lengths."""
    made = Bench(size=64)
    try:
        front = made.front
        for ring in (front.rx, front.tx):
            ring.next = ring.seen = start
            ring.put16(ring.available + 2, start)
            ring.put16(ring.used + 2, start)
        made.start(base=start)
        base = front.data
        for round_ in range(12):
            for i in range(len(front.rx.free)):
                at = base + 1700 * front.rx.free[0]
                front.rx.add([(at, 1500 + 100 * (i % 3))], WRITE)
            front.rx.notify()
            made.run()
            pieces = made.link.reserve(66, 40000)
            assert sum(map(len, pieces)) == 40000
            payload = frame(40000, round_)
            at = 0
            for piece in pieces:
                piece[:] = payload[at : at + len(piece)]
                at += len(piece)
            made.link.commit(HEADER + frame(54), 40000)
            made.link.queue_frame(HEADER + frame(60))
            made.run()
            assert [whole for _, whole in front.frames()] == [frame(54) + payload, frame(60)]
        assert made.stop()[0] == front.rx.seen & 0xFFFF
    finally:
        made.close()


@pytest.mark.parametrize(
    ("address", "length", "flags", "why"),
    (
        (GUEST + MEMORY - 100, 1526, WRITE, "outside of the guest's memory"),
        ((1 << 64) - 1, 1526, WRITE, "outside of the guest's memory"),
        (GUEST, 0xFFFFFFFF, WRITE, "outside of the guest's memory"),
        (GUEST, 1526, 0, "wrong direction"),
        (GUEST, 0, WRITE, "a descriptor of no bytes"),
        (GUEST, 1526, WRITE | INDIRECT, "an indirect table"),
        (GUEST, 1526, WRITE | NEXT, "descriptor 65 in a table of 64"),
    ),
)
def test_one_bad_buffer_among_many(address: int, length: int, flags: int, why: str) -> None:
    made = Bench(size=64)
    try:
        made.start()
        made.front.post(60)
        made.front.rx.describe(40, address, length, flags, 65)
        made.link.queue_frame(HEADER + frame(60))
        made.link.flush()
        assert why in made.why_closed()
    finally:
        made.close()


def test_a_buffer_number_beyond_the_ring_among_many() -> None:
    made = Bench(size=64)
    try:
        made.start()
        made.front.post(60)
        made.front.rx.offer(64)
        made.link.queue_frame(HEADER + frame(60))
        made.link.flush()
        assert "descriptor 64 in a ring of 64" in made.why_closed()
    finally:
        made.close()


def test_data_is_received_straight_into_the_guests_memory(bench: Bench) -> None:
    bench.start()
    bench.front.post(10, 1000)
    pieces = bench.link.reserve(66, 3000)
    assert [len(piece) for piece in pieces] == [934, 1000, 1000, 66]
    at = 0
    for piece in pieces:
        piece[:] = frame(3000)[at : at + len(piece)]
        at += len(piece)
    bench.link.commit(HEADER + frame(54), 2500)
    bench.link.reserve(66, 3000)
    bench.link.commit(b"", 0)
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    (header, whole), (_, second) = bench.front.frames()
    assert header[10] == 3
    assert whole == frame(54) + frame(3000)[:2500]
    assert second == frame(60)


def test_there_is_nothing_to_receive_into_while_frames_wait(bench: Bench) -> None:
    bench.start()
    assert bench.link.reserve(66, 3000) == []
    bench.link.queue_frame(HEADER + frame(60))
    bench.front.post(1)
    assert bench.link.reserve(66, 3000) == []
    drained: list[float] = []

    class Waiter:
        def on_drained(self, now: float) -> None:
            drained.append(now)
            if not bench.link.reserve(66, 3000):
                bench.link.wait_drained(self)
            bench.link.commit(b"", 0)

    bench.link.wait_drained(Waiter())
    bench.front.rx.notify()
    bench.run()
    assert len(bench.front.frames()) == 1
    bench.front.post(4)
    bench.front.rx.notify()
    bench.run()
    assert drained[-1] == 1.0
    assert not bench.link._waiters


# ---- suppression of notifications


def test_the_guest_is_interrupted_only_where_it_asks(bench: Bench) -> None:
    bench.start()
    front = bench.front
    front.post(8)
    front.rx.interrupts()
    front.rx.set_used_event(1000)
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert front.rx.interrupts() == 1, "the first one always: the event may have been meant for who was here before us"
    front.rx.set_used_event(3)
    for interrupted in (0, 0, 1, 0):
        bench.link.queue_frame(HEADER + frame(60))
        bench.run()
        assert front.rx.interrupts() == interrupted, front.rx.used_index


def test_without_event_idx_flags_say_it(bench: Bench) -> None:
    bench.start(LINUX & ~wire.EVENT_IDX)
    front = bench.front
    front.post(8)
    front.rx.interrupts()
    front.rx.set_flags(1)
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert front.rx.interrupts() == 0
    front.rx.set_flags(0)
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert front.rx.interrupts() == 1
    assert front.tx.wants_kick == 0
    assert front.rx.wants_kick == 1  # nobody waits for buffers


def test_rings_run_over_the_end_of_their_indices(bench: Bench) -> None:
    front = bench.front
    start = 65530
    for ring in (front.rx, front.tx):
        ring.next = ring.seen = start
        ring.put16(ring.available + 2, start)
        ring.put16(ring.used + 2, start)
    bench.start(base=start)
    for i in range(20):
        front.data = 0x10000
        front.post(1)
        front.rx.notify()
        bench.link.queue_frame(HEADER + frame(60, i))
        head = front.transmit(HEADER + frame(70, i))
        front.tx.notify()
        bench.run()
        assert [whole for _, whole in front.frames()] == [frame(60, i)]
        assert front.tx.take_used() == [(head, 0)]
        front.tx.free.append(head)
    assert bench.stack.frames == [frame(70, i) for i in range(20)]
    assert bench.stop() == [(start + 20) & 0xFFFF] * 2


# ---- life


def test_a_reboot_begins_again_with_other_features(bench: Bench) -> None:
    bench.start()
    front = bench.front
    front.post(5)
    bench.link.queue_frame(HEADER + frame(60))
    front.transmit(HEADER + frame(60))
    front.tx.notify()
    bench.run()
    assert bench.stop() == [1, 1]  # four buffers were looked at, and not used
    assert not bench.link.up
    bench.link.queue_frame(HEADER + frame(60))
    assert bench.link.drops_to_guest == 1
    for ring in (front.rx, front.tx):
        ring.next = ring.seen = 0
        ring.free = list(range(16))
        front.memory[ring.descriptors : ring.end] = bytes(ring.end - ring.descriptors)
        ring.interrupts()
    front.data = 0x20000
    bench.stack.frames.clear()
    bench.start(PLAIN)
    assert len(bench.ups) == 2
    front.post(2)
    bench.link.queue_frame(HEADER + frame(60, 9))
    front.transmit(HEADER + frame(60, 8))
    front.tx.notify()
    bench.run()
    assert front.received() == [bytes(10) + b"\1\0" + frame(60, 9)]
    assert bench.stack.frames == [frame(60, 8)]


def test_buffers_looked_at_and_not_used_are_there_after_a_restart(bench: Bench) -> None:
    bench.start()
    bench.front.post(5)
    for i in range(2):
        bench.link.queue_frame(HEADER + frame(60, i))
    bench.run()
    base, _ = bench.stop()
    assert base == 2
    bench.front.set_ring(bench.front.rx, base)
    bench.run()
    bench.link.queue_frame(HEADER + frame(60, 2))
    bench.run()
    assert [whole for _, whole in bench.front.frames()] == [frame(60, i) for i in range(3)]


def test_what_was_there_before_us_is_seen_without_a_kick(bench: Bench) -> None:
    """netstack was restarted, and QEMU has connected again: the guest has kicked our predecessor."""
    front = bench.front
    front.transmit(HEADER + frame(60))
    bench.start()
    assert bench.stack.frames == [frame(60)]


def test_memory_that_is_added_and_removed_while_rings_run(bench: Bench) -> None:
    bench.start()
    front = bench.front
    more = os.memfd_create("more")
    os.ftruncate(more, 1 << 20)
    os.pwrite(more, HEADER + frame(100), 0)
    region = front.region(guest=GUEST + MEMORY, size=1 << 20, user=USER + (1 << 32))
    front.send(Request.ADD_MEM_REG, region, [more])
    bench.run()
    front.tx.describe(0, GUEST + MEMORY, 112, 0)
    front.tx.offer(0)
    front.tx.notify()
    bench.run()
    assert bench.stack.frames == [frame(100)]
    # A frame over the border of two regions, which lie side by side in the guest only.
    os.pwrite(more, frame(100)[40:], 0)
    front.memory[MEMORY - 52 :] = HEADER + frame(40)
    front.tx.describe(1, GUEST + MEMORY - 52, 112, 0)
    front.tx.offer(1)
    front.tx.notify()
    bench.run()
    assert bench.stack.frames[1:] == [frame(100)]
    front.send(Request.REM_MEM_REG, region)
    bench.run()
    assert not bench.closed
    front.tx.describe(2, GUEST + MEMORY, 112, 0)
    front.tx.offer(2)
    front.tx.notify()
    assert "outside of the guest's memory" in bench.why_closed()
    os.close(more)


def test_a_ring_whose_memory_is_taken_away_rests_until_there_is_some_again(bench: Bench) -> None:
    bench.start()
    front = bench.front
    front.send(Request.REM_MEM_REG, front.region())
    bench.run()
    assert not bench.link.up
    front.transmit(HEADER + frame(60))
    front.tx.notify()
    front.post(1)
    bench.run()
    assert not bench.stack.frames
    front.send(Request.ADD_MEM_REG, front.region(), [front.memfd])
    bench.run()
    assert bench.stack.frames == [frame(60)]
    bench.link.queue_frame(HEADER + frame(60))
    bench.run()
    assert len(front.frames()) == 1


def test_memory_that_could_become_shorter_is_told_of_once() -> None:
    for sealed in (True, False):
        made = Bench(sealed=sealed)
        told: list[int] = []
        made.link.on_unsealed = lambda told=told: told.append(1)
        made.start()
        made.front.set_memory()
        made.run()
        assert told == ([] if sealed else [1])
        made.close()


def test_memory_in_a_file_is_told_of_too(bench: Bench, tmp_path: Path) -> None:
    told: list[int] = []
    bench.link.on_unsealed = lambda: told.append(1)
    with (tmp_path / "memory").open("w+b") as file:
        file.truncate(MEMORY)
        bench.front.send(Request.ADD_MEM_REG, bench.front.region(), [file.fileno()])
        bench.run()
    assert told == [1]
    assert not bench.closed


def test_a_front_end_that_enables_nothing(bench: Bench) -> None:
    """Without the protocol's own features rings are enabled when they start."""
    front = bench.front
    front.send(Request.SET_OWNER)
    front.send_u64(Request.SET_FEATURES, wire.VERSION_1)
    front.set_memory()
    front.set_ring(front.rx)
    front.set_ring(front.tx)
    front.transmit(HEADER + frame(60))
    bench.run()
    assert bench.link.up
    assert bench.stack.frames == [frame(60)]


def test_a_new_way_to_call_is_tried_at_once(bench: Bench) -> None:
    """What was said on the last one nobody may have heard."""
    bench.start()
    bench.front.rx.interrupts()
    bench.front.send_u64(Request.SET_VRING_CALL, 0, [bench.front.rx.call])
    bench.run()
    assert bench.front.rx.interrupts() == 1


def test_what_was_done_is_seen_when_a_ring_gets_another_address(bench: Bench) -> None:
    bench.start()
    front = bench.front
    front.post(2)
    bench.link.queue_frame(HEADER + frame(60))  # written, and not yet to be seen
    front.set_address(front.rx)
    bench.run()
    assert [whole for _, whole in front.frames()] == [frame(60)]
    assert front.rx.interrupts()
    assert bench.link.up
    bench.link.queue_frame(HEADER + frame(61))
    bench.run()
    assert [whole for _, whole in front.frames()] == [frame(61)]


def test_reset_device_ends_all_rings(bench: Bench) -> None:
    bench.start()
    bench.front.send(Request.RESET_DEVICE)
    bench.run()
    assert not bench.link.up
    bench.front.start(LINUX)
    bench.run()
    assert bench.link.up
    assert not bench.closed


def test_the_front_end_leaves(bench: Bench) -> None:
    bench.start()
    bench.front.sock.shutdown(socket.SHUT_RDWR)
    bench.run()
    assert bench.closed == ["front-end closed the connection"]
    assert not bench.poller.handlers


# ---- violations: each ends the link, with a reason


def test_messages_that_cannot_be(bench: Bench) -> None:
    bad: list[tuple[bytes, str]] = [
        (struct.pack("=III", 1, 2, 0), "no vhost-user request of version 1"),
        (struct.pack("=III", 1, 5, 0), "no vhost-user request"),
        (struct.pack("=III", 1, 1, 1 << 31), "at most"),
        (struct.pack("=III", 99, 1, 0), "none that was agreed upon"),
        (struct.pack("=III", 22, 1, 0), "none that was agreed upon"),
        (struct.pack("=III", Request.SET_FEATURES, 1, 4) + bytes(4), "a payload of 4 bytes"),
        (struct.pack("=IIIQ", Request.SET_FEATURES, 1, 8, 1 << 26), "were not offered"),
        (struct.pack("=IIIQ", Request.SET_PROTOCOL_FEATURES, 1, 8, 1 << 1), "were not offered"),
        (struct.pack("=IIIII", Request.SET_VRING_NUM, 1, 8, 2, 16), "ring 2: there are 2"),
        (struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0), "0 descriptors in place of an eventfd"),
        (struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0x100), "would have to be polled"),
        (struct.pack("=IIIII", Request.SET_MEM_TABLE, 1, 8, 9, 0), "at most 8"),
        (struct.pack("=IIIII", Request.SET_MEM_TABLE, 1, 8, 1, 0), "in 8 bytes"),
        (struct.pack("=IIIQQQQQ", Request.ADD_MEM_REG, 1, 40, 0, 0, 4096, 0, 0), "with 0 descriptors"),
        (struct.pack("=IIIQQQQQ", Request.REM_MEM_REG, 1, 40, 0, 0, 4096, 0, 0), "no memory region"),
    ]
    for message, why in bad:
        made = Bench()
        made.front.sock.send(message)
        assert why in made.why_closed(), message
        made.close()


def test_memory_that_cannot_be(bench: Bench) -> None:
    front = bench.front
    reader, writer = os.pipe()
    cases = [
        ({"size": MEMORY + 4096}, front.memfd, "in a file of"),
        ({"offset": 4096}, front.memfd, "in a file of"),
        ({"offset": 1 << 63, "size": 1 << 63}, front.memfd, "in a file of"),
        ({"guest": (1 << 64) - 4096, "size": 8192}, front.memfd, "a memory region of"),
        ({"user": (1 << 64) - 4096, "size": 8192}, front.memfd, "a memory region of"),
        ({}, reader, "is no file"),
    ]
    for fields, fd, why in cases:
        made = Bench()
        made.front.send(Request.ADD_MEM_REG, made.front.region(**fields), [fd])
        assert why in made.why_closed(), fields
        made.close()
    for fields in ({"user": 0}, {"guest": 0, "size": GUEST + 4096}, {"guest": GUEST + MEMORY}):
        made = Bench()
        made.front.send(Request.ADD_MEM_REG, made.front.region(), [made.front.memfd])
        made.front.send(Request.ADD_MEM_REG, made.front.region(**fields), [made.front.memfd])
        assert "overlap" in made.why_closed()
        made.close()
    os.close(reader)
    os.close(writer)


def test_more_memory_regions_than_there_are_slots(bench: Bench) -> None:
    for i in range(65):
        region = bench.front.region(guest=i << 20, size=4096, user=i << 20)
        bench.front.send(Request.ADD_MEM_REG, region, [bench.front.memfd])
        bench.run()
    assert "more than 64" in bench.why_closed()


def test_more_descriptors_than_allowed_are_closed_and_end_the_link(bench: Bench) -> None:
    bench.front.send(Request.SET_OWNER, fds=[bench.front.memfd] * 9)
    assert "more than 8 descriptors" in bench.why_closed()


def test_descriptors_that_nobody_asked_for_are_closed(bench: Bench) -> None:
    bench.front.send(Request.SET_OWNER, fds=[bench.front.memfd] * 3)
    bench.run()
    assert not bench.closed


def test_what_is_kicked_must_be_an_eventfd(bench: Bench) -> None:
    bench.front.send_u64(Request.SET_VRING_CALL, 0, [bench.front.memfd])
    assert "no eventfd" in bench.why_closed()


@pytest.mark.parametrize(
    ("size", "shift", "why"),
    (
        (0, 0, "power of 2"),
        (15, 0, "power of 2"),
        (65536, 0, "power of 2"),
        (16, 1, "not aligned"),
        (16, 2, "not aligned"),
    ),
)
def test_rings_that_cannot_be(bench: Bench, size: int, shift: int, why: str) -> None:
    bench.front.rx.size = size
    bench.front.rx.descriptors += shift
    bench.front.start(LINUX)
    assert why in bench.why_closed()


def test_a_ring_outside_of_memory(bench: Bench) -> None:
    bench.front.rx.used = MEMORY - 64
    bench.front.start(LINUX)
    assert "outside of the guest's memory" in bench.why_closed()


def test_a_ring_without_address_or_memory(bench: Bench) -> None:
    bench.front.send_u64(Request.SET_VRING_KICK, 0, [bench.front.rx.kick])
    assert "before ring 0 has an address" in bench.why_closed()


def test_features_do_not_change_under_a_running_ring(bench: Bench) -> None:
    bench.start()
    bench.front.send_u64(Request.SET_FEATURES, PLAIN)
    assert "SET_FEATURES while a ring runs" in bench.why_closed()


def _describe(bench: Bench, which: str) -> str:
    """Offer a chain that breaks the rules; which of them, as the reason must name it."""
    tx = bench.front.tx
    data = GUEST + bench.front.data
    match which:
        case "head":
            tx.offer(16)
            return "descriptor 16 in a ring of 16"
        case "next":
            tx.describe(0, data, 60, NEXT, 16)
            tx.offer(0)
            return "descriptor 16 in a table of 16"
        case "loop":
            tx.describe(0, data, 60, NEXT, 1)
            tx.describe(1, data, 60, NEXT, 0)
            tx.offer(0)
            return "a chain of more than 16"
        case "address":
            tx.describe(0, GUEST + MEMORY - 10, 60, 0)
            tx.offer(0)
            return "outside of the guest's memory"
        case "below":
            tx.describe(0, GUEST - 1, 60, 0)
            tx.offer(0)
            return "outside of the guest's memory"
        case "wraps":
            tx.describe(0, (1 << 64) - 1, 0xFFFFFFFF, 0)
            tx.offer(0)
            return "outside of the guest's memory"
        case "direction":
            tx.describe(0, data, 60, WRITE)
            tx.offer(0)
            return "wrong direction"
        case "long":
            tx.describe(0, data, 70000, 0)
            tx.offer(0)
            return "a frame of 70000 bytes"
        case "short":
            tx.describe(0, data, 20, 0)
            tx.offer(0)
            return "a frame of 20 bytes"
        case "empty":
            tx.describe(0, data, 0, 0)
            tx.offer(0)
            return "a descriptor of no bytes"
        case "empty in a chain":
            tx.describe(0, data, 60, NEXT, 1)
            tx.describe(1, data, 0, 0)
            tx.offer(0)
            return "a descriptor of no bytes"
        case "empty in a table":
            struct.pack_into("<QIHH", bench.front.memory, bench.front.data, data, 0, 0, 0)
            tx.describe(0, data, 16, INDIRECT)
            tx.offer(0)
            return "a descriptor of no bytes"
        case "table":
            tx.describe(0, data, 24, INDIRECT)
            tx.offer(0)
            return "an indirect table of 24 bytes"
        case "no table":
            tx.describe(0, data, 0, INDIRECT)
            tx.offer(0)
            return "an indirect table of 0 bytes"
        case "huge table":
            tx.describe(0, data, 1025 * 16, INDIRECT)
            tx.offer(0)
            return "an indirect table of 16400 bytes"
        case "table and next":
            tx.describe(0, data, 16, INDIRECT | NEXT, 1)
            tx.offer(0)
            return "an indirect table of 16 bytes"
        case "nested":
            struct.pack_into("<QIHH", bench.front.memory, bench.front.data, data, 16, INDIRECT, 0)
            tx.describe(0, data, 16, INDIRECT)
            tx.offer(0)
            return "an indirect table within a chain"
        case "table loop":
            struct.pack_into("<QIHH", bench.front.memory, bench.front.data, data, 16, NEXT, 0)
            tx.describe(0, data, 16, INDIRECT)
            tx.offer(0)
            return "a chain of more than 1"
    raise AssertionError(which)


@pytest.mark.parametrize(
    "which",
    (
        "head,next,loop,address,below,wraps,direction,long,short,empty,table,no table,huge table,table and next,"
        "nested,table loop,empty in a chain,empty in a table"
    ).split(","),
)
def test_a_driver_that_breaks_the_rules_of_the_ring(bench: Bench, which: str) -> None:
    bench.start()
    good = bench.front.transmit(HEADER + frame(60))
    bench.front.tx.notify()
    bench.run()
    assert good == 0
    why = _describe(bench, which)
    bench.front.tx.notify()
    assert why in bench.why_closed()
    assert bench.stack.frames == [frame(60)]  # what came before it stands


@pytest.mark.parametrize("index", (0, 1))
def test_more_buffers_than_the_ring_has(bench: Bench, index: int) -> None:
    bench.start()
    ring = (bench.front.rx, bench.front.tx)[index]
    ring.put16(ring.available + 2, 17)
    bench.link.queue_frame(HEADER + frame(60))
    ring.notify()
    assert "17 buffers available in a ring of 16" in bench.why_closed()


def test_a_driver_that_gives_its_buffers_again_and_again(bench: Bench) -> None:
    """Or we would keep more and more of them, and look for room in them for ever."""
    bench.start()
    bench.front.post(16, 100)
    assert sum(map(len, bench.link.reserve(66, 60000))) == 1600 - 66
    bench.link.commit(b"", 0)
    for head in range(16):
        bench.front.rx.offer(head)
    assert bench.link.reserve(66, 60000) == []
    bench.link.flush()
    assert "more buffers than the ring of 16 has entries" in bench.why_closed()


@pytest.mark.parametrize("indirect", (False, True))
def test_a_chain_is_of_1024_descriptors_at_most(indirect: bool) -> None:
    """However long the ring is: each costs time."""
    made = Bench(size=4096)
    try:
        made.start()
        for count in (1024, 1025):
            at = made.front.data
            made.front.tx.add([(at, 1)] * count, indirect=at + 16 if indirect else 0)
            made.front.tx.notify()
            made.run()
            assert len(made.stack.frames) == 1
        assert made.why_closed()
    finally:
        made.close()


def test_pieces_of_one_wakeup_are_bounded_too() -> None:
    """Frames of one page or less, in pieces of a byte each."""
    made = Bench(size=256)
    try:
        made.start()
        front = made.front
        at = front.data + 16
        front.tx.add([(front.data, 1)] * 1024, indirect=at)
        for head in range(1, 100):
            front.tx.describe(head, GUEST + at, 16 * 1024, INDIRECT)
            front.tx.offer(head)
        front.tx.notify()
        most = 0
        while made.poller.step():
            most = max(most, len(made.stack.frames))
            made.stack.frames.clear()
        assert 0 < most <= 5
        assert len(front.tx.take_used()) == 100
    finally:
        made.close()


def test_a_first_buffer_too_small_for_headers_is_not_waited_for(bench: Bench) -> None:
    """Whoever waits for room behind them would wait for ever."""
    bench.start(PLAIN)
    bench.front.post(2, 50)
    assert bench.link.reserve(66, 1000) == []
    bench.link.flush()
    assert "too small for any frame" in bench.why_closed()


@pytest.mark.parametrize("size", (60, 20000))
def test_what_came_before_a_violation_stands(bench: Bench, size: int) -> None:
    bench.start()
    bench.front.transmit(HEADER + frame(size))
    bench.front.tx.offer(16)
    bench.front.tx.notify()
    assert "descriptor 16" in bench.why_closed()
    assert bench.stack.frames == [frame(size)]
    assert not bench.stack.views, "the batch has ended"


def test_indirect_tables_without_their_feature(bench: Bench) -> None:
    bench.start(PLAIN)
    bench.front.transmit(HEADER + frame(60), indirect=True)
    bench.front.tx.notify()
    assert "an indirect table" in bench.why_closed()


@pytest.mark.parametrize("how", ("queue", "burst", "reserve"))
def test_a_violation_that_the_stack_meets_closes_at_the_next_flush(bench: Bench, how: str) -> None:
    """The stack is in the middle of something, and must not find a closed link under its hands."""
    bench.start()
    bench.front.rx.describe(0, 0, 1526, WRITE)
    bench.front.rx.offer(0)
    if how == "queue":
        bench.link.queue_frame(HEADER + frame(60))
    elif how == "burst":
        bench.link.queue_burst(np.zeros((3, 80), dtype=np.uint8))
    else:
        assert bench.link.reserve(66, 1000) == []
    assert not bench.closed
    bench.link.queue_frame(HEADER + frame(60))
    bench.link.flush()
    assert "outside of the guest's memory" in bench.why_closed()


def test_receive_buffers_that_are_not_to_be_written(bench: Bench) -> None:
    bench.start()
    bench.front.rx.add([(bench.front.data, 1526)])
    bench.link.queue_frame(HEADER + frame(60))
    bench.link.flush()
    assert "wrong direction" in bench.why_closed()


def test_kicks_for_ever_cost_a_bounded_amount_and_no_more(bench: Bench) -> None:
    bench.start()
    for _ in range(1000):
        bench.front.tx.notify()
        bench.front.rx.notify()
        assert bench.poller.step() <= 2
    bench.run()
    assert not bench.closed
    assert not bench.stack.frames
