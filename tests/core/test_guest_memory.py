"""Links whose frames stay in the guest's memory: large ones that come in pieces, and data received straight into it."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.core.ports import Buffer, Offload
from netstack.core.tcp_output import held_bytes
from netstack.wire.virtio_net import GSO_TCPV4, GSO_TCPV6, HEADER
from tests.fakes import FakeLink, FakeSocket
from tests.frames import Seg
from tests.script import Talk, established, seg
from tests.world import World

ALL = Offload(checksum=True, tso4=True, tso6=True, uso=True)
HEADER_LENGTH = 12


class MemoryLink(FakeLink):
    """A guest with `room` bytes of buffers to receive into, in pieces of 1,000 bytes."""

    def __init__(self) -> None:
        super().__init__("memory", 1500, offload=ALL)
        self.direct = True
        self.room = 1 << 30
        self.reserved: list[memoryview] | None = None
        self.committed = 0

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        assert self.reserved is None, "reserved twice"
        assert limit > 0
        room = min(limit, self.room - header)
        if room <= 0:
            return []
        sizes = [1000] * (room // 1000) + [room % 1000] * bool(room % 1000)
        self.reserved = [memoryview(bytearray(size)) for size in sizes]
        return list(self.reserved)

    def commit(self, head: Buffer, length: int) -> None:
        assert self.reserved is not None, "committed and not reserved"
        data = b"".join(self.reserved)
        assert length <= len(data)
        self.reserved = None
        if length:
            self.room -= len(head) + length
            self.committed += length
            self.queue_frame(bytes(head) + data[:length])

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        assert self.reserved is None, "queued while something is reserved"
        super().queue_frame(head, payload)

    def refill(self, now: float, room: int = 1 << 30) -> None:
        self.room = room
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.on_drained(now)


def connected(**how: object) -> tuple[Talk, MemoryLink]:
    world = World(oracle=False)
    link = MemoryLink()
    world.links.append(link)
    world.stack.add_link(link, world.now)
    world.stack.flush()
    world.take(link)
    return established(talk=Talk(world=world, link=link, **how), scale=7), link  # type: ignore[arg-type]


def send_scattered(talk: Talk, segment: Seg, cuts: list[int]) -> None:
    """The guest sends one frame that lies in pieces; its memory is used for something else afterwards."""
    memory = bytearray(talk.frame(segment))
    edges = sorted({0, len(memory), *(cut for cut in cuts if cut < len(memory))})
    pieces = [memoryview(memory)[a:b] for a, b in pairwise(edges)]
    stack = talk.world.stack
    stack.receive_scattered(talk.link, bytes(HEADER_LENGTH), pieces, talk.world.now)
    stack.end_batch(talk.world.now)
    memory[:] = b"\xcc" * len(memory)
    talk.world.end_round()
    talk.settle()


# ---- from the guest


@pytest.mark.parametrize("ipv6", (False, True))
@pytest.mark.parametrize("cuts", ([], [54], [74], [200], [14, 34, 54, 74, 90], [20000, 40000], [1]))
def test_a_frame_in_pieces(ipv6: bool, cuts: list[int]) -> None:
    talk, _ = connected(ipv6=ipv6)
    data = bytes(i * 7 & 0xFF for i in range(60000))
    talk.guest(seg("A", data=b"before"))
    batches = talk.world.stack.counters.batches
    send_scattered(talk, seg("PA", data=data), cuts)
    talk.host.takes(b"before" + data)
    talk.expect(seg("A", ack=60007))
    assert talk.world.stack.counters.batches == batches + 1
    talk.guest(seg("A", data=b"after"))
    talk.host.takes(b"after")
    assert talk.flow.bytes_from_guest == 60011


@given(st.lists(st.integers(1, 9000), max_size=8), st.sampled_from(("A", "PA", "FA", "RA", "S", "UA")), st.booleans())
def test_pieces_or_whole_is_the_same(cuts: list[int], flags: str, early: bool) -> None:
    states = []
    for scattered in (True, False):
        talk, _ = connected()
        segment = seg(flags, data=bytes(9000), seq=2) if early else seg(flags, data=bytes(9000))
        if scattered:
            send_scattered(talk, segment, cuts)
        else:
            talk.guest(segment)
        flows = [
            (flow.rcv_nxt, flow.state, flow.snd_una, flow.to_host_bytes, len(flow.out_of_order or ()))
            for flow in talk.world.stack.flows
        ]
        states.append((flows, dict(talk.drops), bytes(talk.host.taken)))
    assert states[0] == states[1]


def test_what_the_host_does_not_take_is_kept_as_it_was() -> None:
    talk, _ = connected()
    talk.host.room = 10000
    data = bytes(i * 7 & 0xFF for i in range(60000))
    send_scattered(talk, seg("PA", data=data), [54, 30000])
    talk.host.takes(data[:10000])
    talk.host.room = None
    talk.settle()
    talk.host.takes(data[10000:])


def test_bytes_behind_the_packet_are_none_of_it() -> None:
    talk, _ = connected()
    memory = bytearray(talk.frame(seg("A", data=bytes(9000)))) + b"\xdd" * 100
    stack = talk.world.stack
    stack.receive_scattered(talk.link, bytes(HEADER_LENGTH), [memoryview(memory)], talk.world.now)
    stack.end_batch(talk.world.now)
    talk.host.takes(bytes(9000))


def test_no_more_than_the_window_is_taken() -> None:
    talk, _ = connected()
    talk.host.room = 0
    for _ in range(2):
        send_scattered(talk, seg("A", data=bytes(40000)), [54])
    assert talk.flow.to_host_bytes == 65535


def test_a_frame_of_another_guest_or_of_no_flow_takes_the_slow_road() -> None:
    talk, _ = connected()
    frame = bytearray(talk.frame(seg("A", data=bytes(9000))))
    stack = talk.world.stack
    for change in (6, 26, 34):  # its MAC, its address, its port
        memory = bytearray(frame)
        memory[change + 1] ^= 0x40
        slow = stack.counters.frames_slow
        stack.receive_scattered(talk.link, bytes(HEADER_LENGTH), [memoryview(memory)], talk.world.now)
        stack.end_batch(talk.world.now)
        assert stack.counters.frames_slow == slow + 1
    assert not talk.host.taken


# ---- to the guest


def read_all(talk: Talk, link: MemoryLink, wanted: int) -> bytes:
    """As a guest that acknowledges everything at once."""
    got = b""
    for _ in range(1000):
        frames = talk.world.take(link)
        for each in frames:
            assert HEADER.size == HEADER_LENGTH
            start = 74 if talk.flow.writer.ipv6 else 54
            got += bytes(each[start:])
        if len(got) >= wanted:
            return got
        talk.heard = 1 + len(got)
        talk.world.receive(link, talk.frame(seg("A")))
    raise AssertionError(f"{len(got)} of {wanted} bytes")


@pytest.mark.parametrize("ipv6", (False, True))
def test_bulk_data_is_received_into_the_guests_memory(ipv6: bool) -> None:
    talk, link = connected(ipv6=ipv6)
    data = bytes(i * 11 & 0xFF for i in range(1_000_000))
    talk.host.sends(data)
    talk.settle()
    assert read_all(talk, link, len(data)) == data
    assert link.committed > 400_000, "much of it"


def test_what_was_received_in_place_can_be_sent_again() -> None:
    talk, link = connected()
    data = bytes(i * 11 & 0xFF for i in range(400_000))
    talk.host.sends(data)
    talk.settle()
    assert link.committed
    first = talk.world.take(link)
    kinds = {frame.header.gso_type for frame in first if len(frame) > 1600}  # type: ignore[attr-defined]
    assert kinds == {GSO_TCPV4}
    assert GSO_TCPV6 not in kinds
    talk.wait(1.5)  # nothing is acknowledged
    again = talk.world.take(link)
    assert again
    assert bytes(again[0][54:]) == data[: len(again[0]) - 54]


def test_no_more_is_kept_for_retransmission_than_is_counted() -> None:
    """Where the host had less than there was room for, the guest's unused memory is not kept with it."""
    talk, link = connected()
    talk.host.sends(bytes(400_000))
    talk.settle()
    for _ in range(4):
        talk.host.sends(bytes(7_000))
        talk.settle()
    assert link.committed
    kept = [memoryview(view.obj).nbytes for _, view in talk.flow.rtx]
    assert sum(kept) == held_bytes(talk.flow)


def test_a_guest_without_room_is_waited_for() -> None:
    talk, link = connected()
    link.room = 200_000
    data = bytes(i * 13 & 0xFF for i in range(600_000))
    talk.host.sends(data)
    talk.settle()
    assert link.waiters == [talk.flow]
    before = len(talk.host.inbox)
    talk.settle()
    assert len(talk.host.inbox) == before, "what there is no room for stays with the host"
    link.refill(talk.world.now)
    talk.world.end_round()
    talk.settle()
    assert read_all(talk, link, len(data)) == data


@pytest.mark.parametrize("how", ("eof", "error"))
def test_the_hosts_end_is_seen_there_too(how: str) -> None:
    talk, link = connected()
    talk.host.sends(bytes(300_000))
    if how == "eof":
        talk.host.closes()
        talk.settle()
        read_all(talk, link, 300_000)
        assert talk.state == "FIN_WAIT_1"
    else:
        talk.settle()
        talk.host.breaks(errno.ECONNRESET)
        talk.settle()
        assert talk.state == "CLOSED"
    assert link.reserved is None


def test_little_data_is_not_worth_it() -> None:
    talk, link = connected()
    for _ in range(5):
        talk.host.sends(b"x" * 500)
        talk.settle()
    assert len(talk.world.take(link)) == 5
    assert not link.committed
    assert isinstance(talk.host, FakeSocket)
