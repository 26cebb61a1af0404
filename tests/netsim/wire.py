"""Two stacks and a bad wire between them, in virtual time: every run with the same seed is the same run.

One stack is the gateway. The other one plays the guest: what the gateway takes for a guest's address is the second
stack's "world", so that its forwards (`open_to_guest`) are the guest's connections. Both ends of a connection are then
our TCP, each with a host socket of its own (tests.fakes), and what goes in at one must come out at the other.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from ipaddress import IPv4Network

import dpkt

from netstack.core.addresses import Addresses
from netstack.core.stack import Stack
from netstack.core.tcp import STATE_NAMES
from tests.core.ip_fakes import GUEST4, WORLD4, addresses
from tests.fakes import FakeHost, FakeLink, FakePoller, FakeSocket
from tests.world import GUEST_MAC

GUEST_PORT, PEER_PORT = 40000, 80


@dataclass(frozen=True)
class Conditions:
    """What a wire does to frames."""

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # this part of the frames comes up to a millisecond late
    delay: float = 0.0001  # seconds, one way
    bits_per_second: float = 1e10
    queue: int = 1_000_000  # frames that wait for the wire; more are dropped, as a tap's queue does
    dead: tuple[float, float] = (0.0, 0.0)  # nothing arrives between these times


class Side:
    """One stack with one link and at most one connection."""

    def __init__(self, where: Addresses, mtu: int, now: float) -> None:
        self.host = FakeHost()
        self.poller = FakePoller()
        self.stack = Stack(where, self.host, self.poller, secret=b"a secret")
        self.link = FakeLink("wire", mtu)
        self.stack.add_link(self.link, 0.0)
        self.stack.flush()
        self.link.frames.clear()
        self.sent = 0

    @property
    def sock(self) -> FakeSocket:
        return self.host.sockets[0]

    def receive(self, frames: list[bytes], now: float) -> None:
        buffer = b"".join(frames)
        spans = []
        at = 0
        for frame in frames:
            spans += [at, at + len(frame)]
            at += len(frame)
        self.stack.receive_frames(self.link, memoryview(buffer), spans, now)
        self.stack.end_round(now)

    def dispatch(self, now: float) -> None:
        """Everything that is ready at this moment."""
        for _ in range(100_000):
            ready = self.poller.ready(list(self.host.open_sockets()))
            if not ready:
                return
            for _, handler, events in ready:
                handler.on_ready(events, now)
            self.stack.end_round(now)
        raise AssertionError("a busy loop")

    @property
    def state(self) -> str:
        for flow in self.stack.flows:
            return STATE_NAMES[flow.state]
        return "CLOSED"


@dataclass
class Result:
    """What a simulation gives."""

    seconds: float
    frames_up: int
    frames_down: int
    retransmits: int
    timeouts: int
    states: str
    frames: list[tuple[float, bytes]] = field(default_factory=list, repr=False)


class Simulation:
    """One connection, opened by the guest; `up` and `down` are what each side's host says before it closes."""

    def __init__(self, conditions: Conditions, mtu: int, up: bytes, down: bytes, seed: int, *, record: bool) -> None:
        self.now = 1000.0
        self.began = self.now
        self.conditions = conditions
        self.chance = random.Random(seed)
        self.up, self.down = up, down
        self.gateway = Side(addresses(), mtu, self.now)
        guest = Addresses(
            GUEST_MAC,
            IPv4Network("198.51.100.0/24"),
            WORLD4[:3] + b"\x01",
            WORLD4[:3] + b"\x02",
            addresses().subnet6,
            addresses().gateway6,
            addresses().dns6,
        )
        self.guest = Side(guest, mtu, self.now)
        self.guest.stack.neighbors.learn(self.guest.link, self.gateway.stack.mac, WORLD4, self.now)
        self.events: list[tuple[float, int, Side, bytes]] = []  # (when, order, to whom, frame)
        self.order = itertools.count()
        self.free_at = {id(self.guest): 0.0, id(self.gateway): 0.0}
        self.record = record
        self.recorded: list[tuple[float, bytes]] = []
        self.opened: list[int] = []

    def run(self, limit: float = 600.0) -> Result:
        """Until both sides are done. AssertionError when they never are, or when bytes are not what was sent."""
        sock = self.guest.host.accepted()
        sock.inbox += self.up
        sock.closes()
        self.guest.stack.open_to_guest(
            sock, WORLD4, PEER_PORT, GUEST4, GUEST_PORT, lambda flow, error: self.opened.append(error), self.now
        )
        self.guest.stack.end_round(self.now)
        fed = False
        while not self._done():
            self._transmit()
            self._next()
            if self.gateway.host.sockets and not fed:
                fed = True
                self.gateway.sock.inbox += self.down
                self.gateway.sock.closes()
            for side in (self.gateway, self.guest):
                side.dispatch(self.now)
            assert self.now - self.began < limit, f"not done: {self.gateway.state}, {self.guest.state}"
        assert self.opened == [0]
        assert bytes(self.gateway.sock.taken) == self.up, "what arrived at the host is not what the guest sent"
        assert bytes(self.guest.sock.taken) == self.down, "what arrived at the guest is not what the host sent"
        for side in (self.gateway, self.guest):
            assert side.sock.closed
            assert not side.sock.was_reset
        for side in (self.gateway, self.guest):
            assert side.stack.bytes_in_flight == side.stack.bytes_for_host == side.stack.bytes_out_of_order == 0
        counters = [side.stack.counters for side in (self.gateway, self.guest)]
        return Result(
            self.now - self.began,
            self.guest.sent,
            self.gateway.sent,
            sum(each.tcp_retransmits for each in counters),
            sum(each.tcp_timeouts for each in counters),
            f"{self.gateway.state} {self.guest.state}",
            self.recorded,
        )

    def _done(self) -> bool:
        """Nothing is left but TIME-WAIT."""
        return bool(self.gateway.host.sockets) and {self.gateway.state, self.guest.state} <= {"CLOSED", "TIME_WAIT"}

    def _transmit(self) -> None:
        """Put what both sides have sent on the wire."""
        conditions, chance = self.conditions, self.chance
        for side, other in ((self.guest, self.gateway), (self.gateway, self.guest)):
            frames, side.link.frames = side.link.frames, []
            for frame in frames:
                side.sent += 1
                if self.record:
                    self.recorded.append((self.now, frame))
                busy = len(frame) * 8 / conditions.bits_per_second
                start = max(self.now, self.free_at[id(side)])
                if (start - self.now) / busy > conditions.queue:
                    continue
                self.free_at[id(side)] = start + busy
                at = start + busy + conditions.delay
                if conditions.dead[0] <= at - self.began < conditions.dead[1] or chance.random() < conditions.loss:
                    continue
                if chance.random() < conditions.reordering:
                    at += chance.random() * 0.001
                heapq.heappush(self.events, (at, next(self.order), other, frame))
                if chance.random() < conditions.duplication:
                    heapq.heappush(self.events, (at + chance.random() * 0.0005, next(self.order), other, frame))

    def _next(self) -> None:
        """Go to the next moment at which something happens: frames arrive, or a timer is due."""
        deadlines = [side.stack.next_deadline() for side in (self.gateway, self.guest)]
        arrival = self.events[0][0] if self.events else float("inf")
        at = min(arrival, *deadlines)
        assert at < float("inf"), f"nothing will ever happen: {self.gateway.state}, {self.guest.state}"
        self.now = max(self.now, at)
        for side, deadline in zip((self.gateway, self.guest), deadlines, strict=True):
            if deadline <= self.now:
                side.stack.handle_timers(self.now)
                side.stack.end_round(self.now)
        # A read gives what has arrived meanwhile: 20 us of it, a wakeup's time.
        batches: dict[int, tuple[Side, list[bytes]]] = {}
        while self.events and self.events[0][0] <= self.now + 0.00002:
            _, _, side, frame = heapq.heappop(self.events)
            batches.setdefault(id(side), (side, []))[1].append(frame)
        for side, frames in batches.values():
            side.receive(frames, self.now)


def write_pcap(path: str, result: Result) -> None:
    """What went over the wire, lost or not, for wireshark."""
    with open(path, "wb") as file:  # noqa: PTH123
        writer = dpkt.pcap.Writer(file, snaplen=65549)
        for at, frame in result.frames:
            writer.writepkt(frame, ts=at)
