"""Callers of UDP forwards: the sockets that they send to, and the flow of each. The theory is in core.udp_forwards."""

from __future__ import annotations

import functools
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from netstack.core.datagram_table import LARGEST
from netstack.core.datagrams import BURST, PROBLEMS, RESOLUTION, take_errors
from netstack.core.flows import FlowKey
from netstack.core.ports import FAILED, READABLE, Buffer, Caller, DatagramListener, Link, SocketError
from netstack.core.udp import DNS_PORT, IDLE_DNS
from netstack.core.udp_endpoint import UdpEndpoint, UdpPath, write_packet

if TYPE_CHECKING:
    from netstack.core.neighbors import Neighbor
    from netstack.core.udp_forwards import UdpForward, UdpForwards

# Until a guest has answered: Linux' net.netfilter.nf_conntrack_udp_timeout.
IDLE_UNANSWERED: Final = 30.0

# What waits while nobody answers for a guest, for seconds, is dropped at once, or the guest would get it when it comes,
# minutes old. The kernel holds some 6,000 small datagrams; this is 10 ms of work.
_WAITING: Final = 8192


class CallerFlow(UdpEndpoint):
    """One caller of a forwarded port."""

    __slots__ = ("answered", "caller", "entry", "key", "path", "refused_at", "seen_as", "seen_port")

    table: UdpForwards

    def __init__(
        self, entry: UdpPort, caller: Caller, neighbor: Neighbor, key: FlowKey, seen_as: bytes, seen_port: int
    ) -> None:
        timeout = IDLE_DNS if entry.guest_port == DNS_PORT else IDLE_UNANSWERED
        super().__init__(entry.table, neighbor.link, neighbor.mac, neighbor.address, entry.guest_port, timeout)
        self.entry = entry
        self.caller = caller
        self.key = key
        self.seen_as = seen_as  # the guest knows the caller by this address and port
        self.seen_port = seen_port
        self.sock = entry.sock.reply_socket(caller)
        self.peer = caller[:2]
        self.asked[caller[0]] = seen_as
        self.path = UdpPath(self, seen_as, caller[0], caller[1])
        self.answered = False
        self.refused_at = 0.0

    def follow(self, link: Link, mac: bytes) -> None:
        """The guest is on another link, or has another network card."""
        if link is not self.link:
            self.entry.leave(self.link)  # the other one may not be congested
        self.link = link
        self.mac = mac
        self.path = UdpPath(self, self.seen_as, self.caller[0], self.caller[1])

    def drain_errors(self) -> tuple[int, int]:
        """The socket is that of all callers, and so is its queue."""
        return self.entry.drain_errors()

    def relay(self, error: SocketError) -> None:
        """Tell the guest what became of its answer."""
        if len(self.guest) == len(self.caller[0]):
            self._relay(error)
            return
        # The caller is of the other family, and so is the ICMP error: say the same in the guest's.
        problem = PROBLEMS.get(error.errno)
        if problem is not None:
            packet = self.rebuild(self.seen_as, 0, error.payload, 1)
            self.stack.send_error(self.link, self.mac, self.seen_as, packet, problem)

    def rebuild(self, dst: bytes, port: int, payload: Buffer, ttl: int) -> bytes:
        """The guest has sent to the address and port by which it knows the caller."""
        return write_packet(self.guest, self.port, self.seen_as, self.seen_port, payload, ttl)


class UdpPort:
    """One socket of the host, and the port of a guest that it leads to."""

    def __init__(self, forward: UdpForward, sock: DatagramListener, guest_port: int) -> None:
        self.forward = forward
        self.table = forward.table
        self.stack = forward.table.stack
        self.sock = sock
        self.guest_port = guest_port
        self.callers: dict[Caller, CallerFlow] = {}
        # By address and port alone: what an error is about. Of several the last one.
        self.last_of: dict[tuple[bytes, int], CallerFlow] = {}
        self.closed = False
        self._watched = self._paused = False
        self._waits_for: Link | None = None  # which is congested
        self._mtu = 0
        self._neighbor: Neighbor | None = None
        self._guest: bytes | None = None
        self._guest_due = 0.0

    def start(self) -> None:
        """Begin to take datagrams. Raises OSError when the poller has no more room."""
        self.stack.poller.register(self.sock.fileno(), self, READABLE)
        self._watched = True

    # --- from callers

    def on_ready(self, events: int, now: float) -> None:
        """Pass on what has come, up to BURST datagrams."""
        if events & FAILED:
            self.drain_errors()
        if not events & READABLE or self.closed or self._paused:
            return
        if now >= self._guest_due or self._guest is None:
            self._find_guest(now)
        if self._guest is None:
            self._drop_all(f"the guest of {self.forward.name} is not there")
            return
        neighbor = self.stack.neighbors.current(self._guest, now)
        if neighbor is None:
            self._pause()
            self.stack.neighbors.resolve(self._guest, functools.partial(self._on_resolved, self._guest), now)
            return
        self._neighbor = neighbor
        if self._wait_for(neighbor.link):
            return
        self._mtu = min(neighbor.mtu, neighbor.link.mtu)
        self._receive(now)
        if not self.closed:
            self._wait_for(neighbor.link)

    def _find_guest(self, now: float) -> None:
        guest = self.forward.find_guest(4 if len(self.sock.address) == 4 else 6, now)
        if guest != self._guest:
            # Flows to where the guest was would be kept alive by their callers for ever.
            for flow in [flow for flow in self.callers.values() if flow.guest != guest]:
                self.table.close(flow, now, "guest moved")
        self._guest = guest
        self._guest_due = now + RESOLUTION

    def _on_resolved(self, guest: bytes, neighbor: Neighbor | None, now: float) -> None:
        if self.closed:
            return
        self._resume()
        if neighbor is None:
            self._drop_all(f"nobody answers at {ip_address(guest)}", _WAITING)

    def _drop_all(self, words: str, most: int = BURST) -> None:
        """Take what is there off the socket, up to `most` datagrams: the guest cannot have it."""
        scratch = self.table.scratch
        for _ in range(most):
            try:
                self.sock.receive_caller(scratch)
            except BlockingIOError:
                return
            except OSError:
                self.drain_errors()
                continue
            self.stack.counters.drop("udp_forward_no_guest")
            self.forward.done.refused += 1
            self.forward.done.last_error = words

    def _receive(self, now: float) -> None:
        """Receive into one buffer, and pass on as one run what has come from one caller in one size."""
        scratch = self.table.scratch
        if self.sock.batches:
            try:
                self.sock.receive_callers(scratch, functools.partial(self._take_batch, now))
            except OSError:
                self.drain_errors()
            return
        last = len(scratch) - LARGEST
        receive = self.sock.receive_caller
        start = end = size = 0
        caller: Caller | None = None
        for _ in range(BURST):
            try:
                length, each, from_ = receive(scratch[end:] if end else scratch)
            except BlockingIOError:
                break
            except OSError:
                self.drain_errors()  # the echo of an ICMP error; its substance is in the queue
                continue
            # After one that is shorter than the others nothing may follow.
            if caller is not None and end > start and (each != size or from_ != caller or (end - start) % size):
                self._take(start, end, size, caller, now)
                start = end
            size, caller = each, from_
            end += length
            if not length:
                self._take(start, end, size, caller, now)
            if end > last:
                break
        if end > start and caller is not None:
            self._take(start, end, size, caller, now)

    def _take_batch(self, now: float, length: int, size: int, caller: Caller) -> None:
        self._take(0, length, size, caller, now)

    def _take(self, start: int, end: int, size: int, caller: Caller, now: float) -> None:
        """Pass scratch[start:end] on: datagrams of one caller, of `size` bytes each, the last perhaps shorter."""
        neighbor = self._neighbor
        assert neighbor is not None
        flow = self.callers.get(caller)
        if flow is None:
            flow = self.table.open(self, caller, neighbor, now)
            if flow is None:
                return
        elif now - flow.used_at >= RESOLUTION:
            self.table.touch(flow, now)
        if flow.link is not neighbor.link or flow.mac != neighbor.mac:
            flow.follow(neighbor.link, neighbor.mac)
        flow.deliver(start, end, size, flow.seen_as, flow.seen_port, self._mtu)

    # --- waiting

    def _wait_for(self, link: Link) -> bool:
        """While the link is congested, leave what comes in the socket's buffer."""
        if not link.congested:
            return False
        self._waits_for = link
        self._pause()
        link.wait_drained(self)
        return True

    def on_drained(self, now: float) -> None:
        self._waits_for = None
        self._resume()

    def leave(self, link: Link) -> None:
        """The guest is not behind this link any more."""
        if self._waits_for is link:
            self.on_drained(0.0)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self.stack.poller.modify(self.sock.fileno(), 0)

    def _resume(self) -> None:
        if self._paused and not self.closed:
            self._paused = False
            self.stack.poller.modify(self.sock.fileno(), READABLE)

    # --- errors and the end

    def drain_errors(self) -> tuple[int, int]:
        """Pass on what is in the error queue: how many ICMP errors; the MTU for which the host refused a send, or 0."""
        return take_errors(self.sock, self._relay)

    def _relay(self, error: SocketError) -> None:
        flow = self.last_of.get((error.destination, error.port))
        if flow is not None:
            flow.relay(error)

    def close(self, now: float, why: str) -> None:
        """Close the socket, and end the flows of its callers."""
        if self.closed:
            return
        self.closed = True
        for flow in list(self.callers.values()):
            self.table.close(flow, now, why)
        if self._watched:
            self.stack.poller.unregister(self.sock.fileno())
        self.sock.close()
