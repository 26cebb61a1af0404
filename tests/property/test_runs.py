"""Runs may only be left out, never be needed: with and without them the same reaches the host and the guest.

Two worlds see the same frames. One is told, as a stream link tells it, where frames of one size lie one behind the
other, the other takes frame by frame. Guests send in bulk, over several flows, both families, TCP and UDP; some of it
is lost, repeated, reordered or damaged.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netstack.core.runs import MINIMUM, Run
from netstack.core.tcp import TcpFlow
from netstack.core.udp import write_packet
from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, write_ethernet
from tests.fakes import FakeSocket
from tests.frames import syn_options, tcp_frame
from tests.world import GUEST4, GUEST6, GUEST_MAC, WORLD4, WORLD6, World

M = 0xFFFFFFFF
SYN, ACK, PSH, FIN = 2, 16, 8, 1
MSS = 100

# Of each flow: whether it is IPv6, and its guest's port. The first number wraps around soon.
FLOWS = ((False, 4000, 0xFFFFF000), (False, 4001, 7), (True, 4000, 0x7FFFFF00), (True, 4001, 0))


class Side:
    """A world with one guest, its connections open, and one UDP socket for each family."""

    def __init__(self, *, told: bool) -> None:
        self.told = told
        self.world = World(oracle=False)
        self.link = self.world.add_link(mtu=1500)
        self.seq: list[int] = []
        self.iss: list[int] = []
        self.acked: list[int] = []
        self.flows: list[TcpFlow] = []
        for number in range(len(FLOWS)):
            self._open(number)

    def segment(self, number: int, seq: int, ack: int, bits: int, data: bytes = b"", options: bytes = b"") -> bytes:
        ipv6, port, _ = FLOWS[number]
        src, dst = (GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4)
        return tcp_frame(self.world.mac, GUEST_MAC, src, dst, (port, 80), seq, ack, bits, 60000, data, options)

    def _open(self, number: int) -> None:
        isn = FLOWS[number][2]
        self.world.receive(self.link, self.segment(number, isn, 0, SYN, options=syn_options(MSS, 7)))
        flow = list(self.world.stack.flows.tcp.values())[-1]
        self.flows.append(flow)
        self.seq.append(isn + 1)
        self.iss.append(flow.snd_nxt)
        self.acked.append(0)
        self.world.receive(self.link, self.segment(number, isn + 1, flow.snd_nxt, ACK))
        assert isinstance(flow.sock, FakeSocket)
        flow.sock.sends(b"x" * 20 * MSS)
        self.world.settle()

    def receive(self, frames: list[bytes]) -> int:
        """One batch, as a stream link lays it out; in how many runs."""
        buffer = bytearray()
        spans: list[int] = []
        for frame in frames:
            buffer += len(frame).to_bytes(4, "big") + frame
            spans += [len(buffer) - len(frame), len(buffer)]
        runs = find_runs([len(frame) for frame in frames]) if self.told else []
        buffer += bytes(64)
        self.world.stack.receive_frames(self.link, memoryview(buffer), spans, self.world.now, runs)
        buffer[:] = b"\xcc" * len(buffer)
        self.world.end_round()
        self.world.settle()
        return len(runs)

    def outcome(self) -> object:
        """Everything that is to be seen from outside, and the connections' variables."""
        host = self.world.host
        return (
            [(bytes(sock.taken), sock.shut, sock.closed) for sock in host.sockets],
            [sock.sent for sock in host.datagrams],
            [
                (flow.state, flow.rcv_nxt, flow.snd_una, flow.snd_wnd, flow.dup_acks, flow.bytes_from_guest)
                for flow in self.flows
            ],
            self.world.take(self.link),
            self.world.drops,
        )


def find_runs(sizes: list[int]) -> list[Run]:
    runs = []
    first = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] != sizes[first]:
            if i - first >= MINIMUM:
                runs.append((first, i - first, sizes[first] + 4))
            first = i
    return runs


burst = st.tuples(
    st.sampled_from(("data", "data", "data", "acks", "udp")),
    st.integers(0, len(FLOWS) - 1),
    st.integers(1, 45),
    st.sampled_from((0, 0, 0, FIN)),
)
damage = st.tuples(
    st.sampled_from(("lose", "repeat", "swap", "change", "cut")),
    st.integers(0, 200),
    st.integers(0, 79),
    st.integers(0, 255),
)


def bulk(side: Side, kind: str, number: int, count: int, end: int) -> list[bytes]:
    """What a guest sends in one go; moves its numbers."""
    ipv6, port, _ = FLOWS[number]
    if kind == "udp":
        src, dst = (GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4)
        ethernet = write_ethernet(side.world.mac, GUEST_MAC, ETHERTYPE_IPV6 if ipv6 else ETHERTYPE_IPV4)
        return [ethernet + write_packet(src, port, dst, 7, bytes((i,)) * MSS, 64) for i in range(count)]
    frames = []
    for i in range(count):
        if kind == "data":
            bits = ACK | (PSH if i % 7 == 6 else 0) | (end if i == count - 1 else 0)
            ack = side.iss[number] + side.acked[number]
            frames.append(side.segment(number, side.seq[number], ack, bits, bytes((i + number,)) * MSS))
            side.seq[number] += MSS + bool(bits & FIN)
        else:
            side.acked[number] = min(side.acked[number] + MSS // 2, 20 * MSS)
            frames.append(side.segment(number, side.seq[number], side.iss[number] + side.acked[number], ACK))
    return frames


def spoil(frames: list[bytes], how: str, where: int, at: int, value: int) -> None:
    where %= len(frames)
    if how == "lose":
        del frames[where]
    elif how == "repeat":
        frames.insert(where, frames[where])
    elif how == "swap":
        frames[where - 1], frames[where] = frames[where], frames[where - 1]
    elif how == "cut":
        frames[where] = frames[where][: max(at, 14)]
    else:
        changed = bytearray(frames[where])
        changed[at % len(changed)] = value
        frames[where] = bytes(changed)


@given(st.lists(st.tuples(st.lists(burst, min_size=1, max_size=4), st.lists(damage, max_size=2)), max_size=5))
def test_with_and_without_runs_the_same_happens(
    batches: list[tuple[list[tuple[str, int, int, int]], list[tuple[str, int, int, int]]]],
) -> None:
    told, untold = Side(told=True), Side(told=False)
    for bursts, damages in batches:
        frames: list[list[bytes]] = []
        for side in (told, untold):
            made: list[bytes] = []
            for kind, number, count, end in bursts:
                made += bulk(side, kind, number, count, end)
            for how, where, at, value in damages:
                if made:
                    spoil(made, how, where, at, value)
            frames.append(made)
        assert frames[0] == frames[1]
        if frames[0]:
            told.receive(frames[0])
            untold.receive(frames[1])
        assert told.outcome() == untold.outcome()


def test_a_bulk_transfer_is_taken_in_runs() -> None:
    """Or the test above shows nothing."""
    side = Side(told=True)
    before = side.world.stack.counters.frames_in_runs
    for number in range(len(FLOWS)):
        assert side.receive(bulk(side, "data", number, 40, 0)) == 1
        assert side.receive(bulk(side, "acks", number, 38, 0)) == 1
        assert side.receive(bulk(side, "udp", number, 40, 0)) == 1
        assert side.receive(bulk(side, "udp", number, 40, 0)) == 1
    # The first datagrams of a path take the slow road: two ports, two families.
    taken = side.world.stack.counters.frames_in_runs - before
    assert taken == len(FLOWS) * (40 + 38 + 40 + 40) - len(FLOWS) * 40
    assert sum(len(sock.sent) for sock in side.world.host.datagrams) == len(FLOWS) * 80


def test_packets_of_another_version_are_no_run() -> None:
    """What IPv6's ethertype stands before is looked at as closely as frame by frame."""
    told, untold = Side(told=True), Side(told=False)
    number = 2
    for side in (told, untold):
        assert FLOWS[number][0], "IPv6"
        frames = bulk(side, "data", number, 40, 0)
        side.receive([frame[:14] + bytes((frame[14] & 0x0F | 0x50,)) + frame[15:] for frame in frames])
    assert told.outcome() == untold.outcome()
    assert told.world.stack.counters.frames_in_runs == 0
