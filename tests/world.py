"""A whole stack between fakes, with a clock, and a list of what must be true after every step."""

from __future__ import annotations

from collections import Counter

from netstack.core.dhcp import DhcpServer
from netstack.core.dhcpv6 import Dhcpv6Server
from netstack.core.flows import Limits
from netstack.core.leases import LeaseTable
from netstack.core.ndp import NdpResponder
from netstack.core.ports import Handler, Offload
from netstack.core.sntp import SntpServer
from netstack.core.stack import Stack
from netstack.core.tcp import CLOSED, STATE_NAMES, TcpFlow
from netstack.core.tcp_output import held_bytes
from netstack.core.timers import NEVER
from netstack.gateway.services import AddressServices
from netstack.wire.ethernet import MIN_FRAME
from netstack.wire.virtio_net import HEADER, HEADER_LENGTH
from tests.core.ip_fakes import GATEWAY4, GATEWAY6, GUEST4, GUEST6, WORLD4, WORLD6, addresses
from tests.fakes import FakeEvents, FakeHost, FakeLink, FakePoller, FakeSocket, OffloadFrame
from tests.frames import judge
from tests.virtio_guest import take_apart

__all__ = ["GATEWAY4", "GATEWAY6", "GUEST4", "GUEST6", "GUEST_MAC", "OTHER_MAC", "WORLD4", "WORLD6", "World"]

GUEST_MAC = bytes.fromhex("525400123456")
OTHER_MAC = bytes.fromhex("525400abcdef")
OTHER4 = bytes((192, 168, 5, 16))
OTHER6 = GUEST6[:15] + b"\x16"

M = 0xFFFFFFFF


class World:
    """The rim's part: hands frames in, dispatches readiness, runs timers; and checks."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        host_loopback: bool = True,
        now: float = 1000.0,
        oracle: bool = True,
    ) -> None:
        """`oracle`: show every frame that leaves to scapy, a millisecond each."""
        self.host = FakeHost()
        self.poller = FakePoller()
        self.events = FakeEvents()
        self.stack = Stack(
            addresses(host_loopback=host_loopback),
            self.host,
            self.poller,
            limits=limits,
            events=self.events,
            secret=b"a secret",
        )
        self.now = now
        self.oracle = oracle
        self.links: list[FakeLink] = []
        self._judged: dict[FakeLink, int] = {}
        self._edges: dict[int, tuple[TcpFlow, int, int]] = {}

    @property
    def mac(self) -> bytes:
        return self.stack.mac

    @property
    def drops(self) -> dict[str, int]:
        return self.stack.counters.drops

    def add_link(
        self, name: str = "link", mtu: int = 1500, prefix: int = 4, offload: Offload | None = None
    ) -> FakeLink:
        """A link; what the gateway announces on it is taken away at once."""
        link = FakeLink(name, mtu, prefix, offload)
        self.links.append(link)
        self.stack.add_link(link, self.now)
        self.stack.flush()
        self.take(link)
        return link

    def add_services(self) -> AddressServices:
        """The gateway's own services over UDP, as the gateway wires them, but without chance and without a host."""
        where = self.stack.addresses
        leases = LeaseTable(
            where.subnet.network_address.packed,
            where.subnet.prefixlen,
            reserved=(where.gateway, where.dns),
            prefix6=where.subnet6.network_address.packed,
        )
        prefix = where.subnet6.network_address.packed
        own = (where.link_local, where.gateway6, where.dns6)
        return AddressServices(
            self.stack,
            DhcpServer(leases, where.gateway, dns=(where.dns,), mtu=1500, domain="test", ntp=(where.gateway,)),
            Dhcpv6Server(leases, where.mac, dns=(where.dns6,)),
            NdpResponder(where.mac, where.link_local, own, prefix, lambda: 0.5, mtu=1500, dns=(where.dns6,)),
            SntpServer(lambda: 1e9),
        )

    def remove_link(self, link: FakeLink) -> None:
        link.close()
        self.stack.remove_link(link, self.now)
        self.end_round()

    # ---- what the rim calls

    def feed(self, link: FakeLink, *frames: bytes) -> None:
        """One batch, without what follows it. The buffer is overwritten afterwards, as a link's is.

        On links with offload an OffloadFrame stands behind its own header, others behind one that asks for nothing.
        """
        buffer = bytearray(b"\xee" * 8)
        spans = []
        for frame in frames:
            if isinstance(frame, OffloadFrame):
                buffer += HEADER.pack(*frame.header)
            elif link.offload is not None:
                buffer += bytes(HEADER_LENGTH)
            spans += [len(buffer), len(buffer) + len(frame)]
            buffer += frame
            buffer += b"\xdd" * 3
        self.stack.receive_frames(link, memoryview(buffer), spans, self.now)
        buffer[:] = b"\xcc" * len(buffer)

    def end_round(self) -> None:
        self.stack.end_round(self.now)

    def receive(self, link: FakeLink, *frames: bytes) -> None:
        """One batch, and everything that follows at this moment."""
        self.feed(link, *frames)
        self.end_round()
        self.settle()

    def settle(self) -> None:
        """Dispatch readiness until nothing more is ready."""
        while True:
            ready = self.poller.ready(list(self.host.open_sockets()))
            if not ready:
                break
            before = self._picture(ready)
            for fd, handler, events in ready:
                if self.poller.handlers.get(fd) is handler:
                    handler.on_ready(events, self.now)
            self.end_round()
            assert self._picture(self.poller.ready(list(self.host.open_sockets()))) != before, "a busy loop"
        self.check()

    def _picture(self, ready: list[tuple[int, Handler, int]]) -> object:
        """What changes when a wakeup does anything at all."""
        sockets = tuple((sock.fd, len(sock.inbox), len(sock.taken), sock.closed) for sock in self.host.sockets)
        frames = tuple(len(link.frames) + link.backlog for link in self.links)
        return [(fd, events) for fd, _, events in ready], dict(self.poller.events), sockets, frames

    def advance(self, to: float) -> None:
        """Let time go by until `to`, running timers when they are due, and what follows."""
        turns = 0
        while (deadline := self.stack.next_deadline()) <= to:
            self.now = max(self.now, deadline)
            self.stack.handle_timers(self.now)
            self.end_round()
            self.settle()
            turns += 1
            assert turns < 100_000, "timers that never end"
        self.now = max(self.now, to)
        self.settle()

    def take(self, link: FakeLink) -> list[bytes]:
        """The frames that a guest received since the last time."""
        frames, link.frames = link.frames, []
        self._judge(link, frames, self._judged.pop(link, 0))
        return frames

    # ---- invariants

    def _judge(self, link: FakeLink, frames: list[bytes], seen: int) -> None:
        for sent in frames[seen:]:
            # Taking a frame apart and showing it to scapy are one: without the oracle such frames go unseen.
            if isinstance(sent, OffloadFrame) and any(sent.header[:2]):
                whole = [each.ljust(MIN_FRAME, b"\0") for each in take_apart(sent)] if self.oracle else []
            else:
                whole = [sent]
            for frame in whole:
                assert len(frame) - 14 <= link.mtu, "larger than the link's MTU"
                if self.oracle and frame[6:12] == self.mac:  # what guests send to each other may be anything
                    judge(frame)

    def check(self) -> None:
        """What is true whatever happened."""
        stack = self.stack
        flows = set(stack.flows.tcp.values())
        handlers = {fd: each for fd, each in self.poller.handlers.items() if isinstance(each, TcpFlow)}
        lingering = {flow for flow in handlers.values() if flow not in flows}
        for flow in lingering:
            assert flow.state == CLOSED
            assert flow.to_host, "a closed flow is in the poller"
        assert stack.bytes_in_flight == sum(map(held_bytes, flows))
        assert stack.bytes_in_flight <= stack.limits.in_flight_bytes
        assert stack.bytes_for_host == sum(flow.to_host_bytes for flow in flows | lingering)
        assert not stack.touched
        sockets: set[FakeSocket] = set()
        for key, flow in stack.flows.tcp.items():
            assert flow.key == key
            self._check_flow(flow)
        for flow in flows | lingering:
            assert flow.to_host_bytes == sum(map(len, flow.to_host or ()))
            assert flow.state == CLOSED or not flow.batch
            if isinstance(flow.sock, FakeSocket):
                sockets.add(flow.sock)
                assert not flow.sock.closed
                assert (handlers.get(flow.fd) is flow) == (flow.interest >= 0)
                if flow.interest >= 0:
                    assert self.poller.events[flow.fd] == flow.interest
        assert sockets == set(self.host.open_sockets()) - self.forwards, "a host socket without a flow"
        for at, _, owner in stack.timers.entries():
            if owner.heap_at == at and isinstance(owner, TcpFlow):
                assert owner in flows | lingering, "a closed flow has a timer"
        assert stack.flows._of_link == Counter(flow.link for flow in flows | lingering)
        for link in self.links:
            self._judge(link, link.frames, self._judged.get(link, 0))
            self._judged[link] = len(link.frames)

    @property
    def forwards(self) -> set[FakeSocket]:
        """Accepted sockets that wait for their guest to be found."""
        return {sock for sock in self.host.open_sockets() if not sock.address} - {
            flow.sock for flow in self.stack.flows.tcp.values() if isinstance(flow.sock, FakeSocket)
        }

    def _check_flow(self, flow: TcpFlow) -> None:
        name = STATE_NAMES[flow.state]
        assert flow.state != CLOSED
        # RFC 9293 3.3.1, figure 3; the FIN takes one number behind the data.
        in_flight = (flow.snd_nxt - flow.snd_una) & M
        assert in_flight < 1 << 31, name
        at = None
        for seq, view in flow.rtx:
            assert at is None or at == seq, "a hole in what may have to be sent again"
            at = (seq + len(view)) & M
        if at is not None:
            assert (at + flow.fin_sent) & M == flow.snd_nxt
        # What we promised is never taken back (3.8.6.2.2), nor do we take more than we promised.
        assert (flow.rcv_adv - flow.rcv_nxt) & M < 1 << 31, name
        known = self._edges.get(id(flow))
        if known is not None and known[0] is flow and known[2] == flow.irs:
            assert (flow.rcv_adv - known[1]) & M < 1 << 31, "the window's right edge moved left"
        self._edges[id(flow)] = (flow, flow.rcv_adv, flow.irs)
        # Whoever has something unacknowledged, or waits for a window, has a deadline.
        deadline = flow.rtx_at if flow.rtx_at < flow.idle_at else flow.idle_at
        assert flow.timer_at <= deadline
        if in_flight and name not in ("CONNECTING", "TIME_WAIT"):
            assert flow.rtx_at != NEVER, f"{name}: {in_flight} in flight and no timer"
        if flow.stalled and flow.sending and not in_flight and not flow.waits_for_link:
            assert flow.rtx_at != NEVER, f"{name}: stalled for ever"
