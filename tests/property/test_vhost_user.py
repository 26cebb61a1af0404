"""The vhost-user link: whatever stands in the rings and in the messages, it raises nothing and goes on or closes.

And what is not hostile arrives as it was sent, in whatever pieces it lies.
"""

from __future__ import annotations

import os
import struct
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.vde.vhost_user_messages import Request
from tests.rim.vhost_bench import LEGACY, LINUX, PLAIN, Bench
from tests.rim.vhost_front import GUEST, INDIRECT, MEMORY, NEED_REPLY, USER, WRITE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (memfd, eventfd)")

SIZE = 8
DATA = 0x8000
TABLE = 0x7000
HEADER = bytes(12)

features = st.sampled_from((LINUX, PLAIN, LEGACY))

# Addresses that matter: data, tables, the rings themselves, edges, outside.
addresses = st.sampled_from(
    (
        *(0, GUEST - 1, GUEST, GUEST + 0x1000, GUEST + TABLE, GUEST + TABLE + 16, GUEST + DATA, GUEST + DATA + 4096),
        *(GUEST + MEMORY - 1, GUEST + MEMORY, USER, (1 << 64) - 1),
    )
)
lengths = st.sampled_from((0, 1, 11, 12, 16, 26, 60, 72, 128, 1514, 9000, 65561, 65562, 1 << 20, (1 << 32) - 1))
descriptor = st.tuples(addresses, lengths, st.integers(0, 7), st.integers(0, SIZE + 1))

ring_state = st.fixed_dictionaries(
    {
        "descriptors": st.lists(descriptor, min_size=1, max_size=SIZE),
        "table": st.lists(descriptor, max_size=8),
        "heads": st.lists(st.integers(0, SIZE + 1), max_size=SIZE),
        "more": st.integers(0, SIZE + 2),
        "flags": st.integers(0, 3),
        "event": st.integers(0, 65535),
    }
)


@given(features, st.lists(st.tuples(st.integers(0, 1), ring_state), min_size=1, max_size=5))
def test_any_state_of_the_rings(chosen: int, states: list[tuple[int, dict[str, object]]]) -> None:
    bench = Bench(size=SIZE)
    try:
        bench.start(chosen)
        for index, state in states:
            _write_state(bench, index, state)
            bench.front.rx.notify()
            bench.front.tx.notify()
            bench.link.queue_frame(bytearray(HEADER + bytes(60)))
            bench.link.queue_frame(HEADER + bytes(14), bytes(3000))
            if bench.link.reserve(66, 5000):
                bench.link.commit(HEADER + bytes(54), 5000 if bench.link._reserved else 0)
            bench.poller.run(bench.link.flush)
            assert not bench.stack.views
            if bench.link.closed:
                assert bench.closed[0].startswith("violation: ")
                assert not bench.poller.handlers
                break
    finally:
        bench.close()


def _write_state(bench: Bench, index: int, state: dict[str, object]) -> None:
    ring = (bench.front.rx, bench.front.tx)[index]
    descriptors = state["descriptors"]
    assert isinstance(descriptors, list)
    for i, (address, length, flags, following) in enumerate(descriptors):
        # Most of what is random ends at once: let some of it get further.
        ring.describe(i, address, length, flags & ~WRITE | (WRITE if not index and following & 1 else 0), following)
    table = state["table"]
    assert isinstance(table, list)
    for i, each in enumerate(table):
        struct.pack_into("<QIHH", bench.front.memory, TABLE + 16 * i, *each)
    heads = state["heads"]
    assert isinstance(heads, list)
    for head in heads:
        ring.offer(head)
    more, flags, event = state["more"], state["flags"], state["event"]
    assert isinstance(more, int)
    assert isinstance(flags, int)
    assert isinstance(event, int)
    ring.put16(ring.available + 2, ring.next + more)
    ring.set_flags(flags)
    ring.set_used_event(event)


@given(features, st.data())
def test_bytes_in_place_of_rings(chosen: int, data: st.DataObject) -> None:
    bench = Bench(size=SIZE)
    try:
        bench.start(chosen)
        front = bench.front
        start, end = front.rx.descriptors, front.tx.end
        for _ in range(3):
            noise = data.draw(st.binary(min_size=64, max_size=256))
            at = data.draw(st.integers(start, end - len(noise)))
            front.memory[at : at + len(noise)] = noise
            front.rx.notify()
            front.tx.notify()
            bench.link.queue_frame(bytearray(HEADER + bytes(60)))
            bench.poller.run(bench.link.flush)
    finally:
        bench.close()


words = st.one_of(st.integers(0, 300), st.sampled_from((GUEST, USER, MEMORY, 1 << 30, 1 << 32, (1 << 64) - 1)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from((*Request, 6, 7, 22, 24, 39, 99)),
            st.sampled_from((0, NEED_REPLY)),
            st.one_of(
                st.binary(max_size=64),
                st.lists(words, max_size=6).map(lambda values: struct.pack(f"={len(values)}Q", *values)),
                st.tuples(st.integers(0, 3), st.sampled_from((0, 1, 8, 16, 65536))).map(
                    lambda pair: struct.pack("=II", *pair)
                ),
            ),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_messages(messages: list[tuple[int, int, bytes, list[int]]], running: bool) -> None:
    bench = Bench(size=SIZE)
    nothing = os.open("/dev/null", os.O_RDWR)
    try:
        if running:
            bench.start(LINUX)
        front = bench.front
        own = (front.memfd, front.rx.kick, front.tx.call, nothing)
        for request, flags, payload, fds in messages:
            try:
                front.send(request, payload, [own[i] for i in fds], flags)
            except (BrokenPipeError, ConnectionResetError):
                assert bench.link.closed
                break
            bench.poller.run(bench.link.flush)
            bench.link.queue_frame(bytearray(HEADER + bytes(60)))
            if bench.link.closed:
                break
    finally:
        os.close(nothing)
        bench.close()


@given(
    features,
    st.lists(st.tuples(st.integers(14, 20000), st.lists(st.integers(1, 20000), max_size=5)), min_size=1, max_size=6),
    st.booleans(),
)
def test_what_the_guest_sends_arrives(chosen: int, frames: list[tuple[int, list[int]]], tables: bool) -> None:
    bench = Bench(size=64)
    try:
        bench.start(chosen)
        header = 12 if chosen != LEGACY else 10
        sent = []
        for number, (size, cuts) in enumerate(frames):
            whole = bytes((i * 31 + number) & 0xFF for i in range(header + size))
            edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
            pieces = [whole[a:b] for a, b in pairwise(edges)]
            bench.front.transmit(*pieces, indirect=tables and chosen == LINUX)
            sent.append((whole[:header] + bytes(12 - header), whole[header:]))
        bench.front.tx.notify()
        bench.run()
        assert list(zip(bench.stack.headers, bench.stack.frames, strict=True)) == sent
        assert len(bench.front.tx.take_used()) == len(frames)
        assert not bench.closed
    finally:
        bench.close()


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.booleans(), st.integers(0, 3999)), min_size=1, max_size=8),
    st.lists(st.integers(12, 3000), min_size=1, max_size=60),
)
def test_what_the_guest_is_sent_arrives(frames: list[tuple[int, bool, int]], buffers: list[int]) -> None:
    """In buffers of any size, posted one after the other; half of the payloads are received in place."""
    bench = Bench(size=64)
    try:
        bench.start(LINUX)
        sent = []
        for length in buffers:
            bench.front.post(1, length)
        for number, (size, direct, less) in enumerate(frames):
            head = bytes((i * 5 + number) & 0xFF for i in range(54))
            payload = bytes((i * 7 + number) & 0xFF for i in range(size))
            if direct:
                pieces = bench.link.reserve(66, size)
                room = sum(map(len, pieces))
                if not room:
                    continue
                taken = max(1, min(room, size - less % size))
                at = 0
                for piece in pieces:
                    part = payload[at : min(at + len(piece), taken)]
                    piece[: len(part)] = part
                    at += len(part)
                bench.link.commit(HEADER + head, taken)
                sent.append(head + payload[:taken])
            else:
                bench.link.queue_frame(HEADER + head, payload)
                sent.append(head + payload)
        got: list[bytes] = []
        for _ in range(200):
            bench.front.rx.notify()
            bench.run()
            fresh = bench.front.frames()
            got += [whole for _, whole in fresh]
            if not bench.link.backlog:
                break
            bench.front.data = DATA + 0x10000
            bench.front.post(min(len(bench.front.rx.free), 40), 3000)
        assert got == sent
    finally:
        bench.close()


def test_the_faults_of_one_guest_are_its_own() -> None:
    """Two links of one poller: one breaks all rules, the other goes on."""
    bad, good = Bench(size=SIZE), Bench(size=SIZE)
    try:
        good.start()
        bad.start()
        bad.front.tx.describe(0, GUEST + DATA, 16, INDIRECT)
        bad.front.tx.offer(0)
        bad.front.tx.notify()
        bad.run()
        assert bad.link.closed
        good.front.transmit(HEADER + bytes(60))
        good.front.tx.notify()
        good.run()
        assert good.stack.frames == [bytes(60)]
    finally:
        bad.close()
        good.close()
