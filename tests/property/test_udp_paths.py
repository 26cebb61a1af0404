"""The stack's fast path for UDP may only be left out, never be needed: with and without it, the same leaves the host.

Two stacks see the same frames, well-formed and damaged. One of them forgets its paths before each frame, and so takes
the slow road every time.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netstack.core.ports import Buffer
from netstack.core.stack import Stack
from netstack.core.udp import write_packet
from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, write_ethernet
from tests.core.ip_fakes import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    MAC,
    WORLD4,
    WORLD6,
    FakeDatagramSocket,
    FakeHost,
    FakeLink,
    FakePoller,
    addresses,
)


class QuietLink(FakeLink):
    """Takes frames for the guest, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        self.frames.append(bytes(head) + bytes(payload or b""))

    def flush(self) -> None:
        pass

    def forget_macs(self) -> None:
        self.macs_high = self.macs_low = 0
        self.known_macs.clear()


class Side:
    """One stack with its host and one guest's link."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.host.segments = True
        self.stack = Stack(addresses(), self.host, FakePoller())
        self.link = QuietLink()
        self.stack.add_link(self.link, 0.0)

    def receive(self, frames: list[bytes], now: float) -> None:
        buffer = memoryview(b"".join(frames))
        spans: list[int] = []
        for frame in frames:
            at = spans[-1] if spans else 0
            spans += [at, at + len(frame)]
        self.stack.receive_frames(self.link, buffer, spans, now)

    def outcome(self) -> object:
        """Everything that is to be seen from outside."""
        sockets: list[tuple[bytes, int, FakeDatagramSocket]] = self.host.udp
        sent = [(family, port, sock.sent) for family, port, sock in sockets]
        flows = sorted((flow.guest, flow.port, flow.bytes_from_guest, sorted(flow.asked)) for flow in self.stack.udp)
        return sent, flows, self.link.frames, self.stack.counters.drops


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A datagram of a guest that speaks to few peers, so that its paths are used; some with a lie in the header."""
    ipv6 = draw(st.booleans())
    src = GUEST6 if ipv6 else GUEST4
    dst = draw(st.sampled_from((WORLD6, GATEWAY6) if ipv6 else (WORLD4, GATEWAY4)))
    ports = draw(st.sampled_from(((4000, 7), (4000, 8), (4001, 7), (4000, 53))))
    size = draw(st.sampled_from((0, 1, 12, 13, 100, 100, 100, 100)))
    ttl = draw(st.sampled_from((64, 64, 64, 2, 1, 0)))
    packet = bytearray(write_packet(src, ports[0], dst, ports[1], draw(st.binary(min_size=size, max_size=size)), ttl))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 47), st.integers(0, 255)), max_size=1)):
        if at < len(packet):
            packet[at] = value
    if not ipv6 and draw(st.booleans()):
        packet[6] ^= 0x40  # DF
    mac = addresses().mac
    frame = write_ethernet(mac, MAC, ETHERTYPE_IPV6 if ipv6 else ETHERTYPE_IPV4) + bytes(packet)
    return (frame + draw(st.binary(max_size=6)))[: draw(st.one_of(st.none(), st.integers(14, len(frame))))]


@given(st.lists(st.tuples(st.lists(frames(), min_size=1, max_size=12), st.sampled_from((0.0, 0.5, 3.0))), max_size=6))
def test_the_fast_path_and_the_slow_road_do_the_same(batches: list[tuple[list[bytes], float]]) -> None:
    fast, slow = Side(), Side()
    now = 1000.0
    # Both have spoken to each peer once, so that there are paths.
    opening = [
        write_ethernet(addresses().mac, MAC, ETHERTYPE_IPV4) + write_packet(GUEST4, 4000, WORLD4, 7, b"a" * 100, 64),
        write_ethernet(addresses().mac, MAC, ETHERTYPE_IPV6) + write_packet(GUEST6, 4000, WORLD6, 7, b"a" * 100, 64),
    ]
    for batch, passed in [(opening, 0.0), *batches]:
        now += passed
        fast.receive(batch, now)
        for frame in batch:
            slow.stack.udp.forget_paths()
            slow.receive([frame], now)
        assert fast.outcome() == slow.outcome()
