"""UDP forwards, without I/O: datagrams that come to a port of the host go on to a guest, and its answers back.

Theory of operation
-------------------
A `UdpForward` has one or more `UdpPort`s, each a bound socket of the host that leads to one port of a guest. UDP knows
no connections, so a caller is whoever sends: its address and port, and the address that it sent to, because the answer
has to come from there. Each caller is a `CallerFlow`, from its first datagram until nothing has gone either way for
some time: 30 s when the guest has never answered, 2 minutes when it has (RFC 4787 REQ-5), 10 s at port 53.

What the guest sees. The caller's own address where the guest can answer to it, else the gateway's (Addresses.caller),
and the caller's own port. Only where the guest has another caller that looks the same to it (two callers on the host's
loopback, 127.0.0.1 and 127.0.0.2, with one port) does the later one get another port.

The way back. A guest's datagram to what looks like a caller is looked up among the flows before anything else is done
with it: on the slow road by `UdpForwards.find`, and from then on by a path of the stack's fast path, as those of
`core.udp` are. So for as long as somebody calls from there, an answer leaves through the port that was called, even
where the guest has also asked that peer by itself: to the peer both are the port that it called.

Whom it is for is asked once a second, by name or lease, so a guest may reboot or change its address. Nothing is queued
here: while a guest is being looked for (ARP, neighbor discovery), or its link is congested, datagrams wait in the
socket's buffer, where the kernel bounds them. When nobody answers, what waits is dropped, and counted.

Errors. What the host learns about an answer (the caller is gone) reaches the guest as ICMP. The other way, when the
guest says that its port is closed, the caller should see the same; the host's kernel does not say it, as the forward's
socket is there, and we may where the process may open raw sockets (CAP_NET_RAW). Else the caller hears nothing.

Bounds: flows of all forwards, and of each, by the limits of UDP flows; the oldest go first, and before all others those
that the guest never answered, so that a stranger who invents addresses puts nobody out who is being talked to.

Counted as dropped, besides what `core.datagrams` lists: udp_forward_no_guest, udp_forward_flow_evicted,
udp_forward_no_port, udp_forward_refused (the guest's port is closed).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from netstack.core.addresses import is_link_local6
from netstack.core.datagrams import RESOLUTION, format_endpoint
from netstack.core.flows import FlowKey, flow_key
from netstack.core.forwards import FIRST_PORT, LAST_PORT, FindGuest, Traffic
from netstack.core.ports import Caller, DatagramListener, Link
from netstack.core.udp import DNS_PORT, IDLE
from netstack.core.udp_callers import CallerFlow, UdpPort
from netstack.core.udp_endpoint import write_packet
from netstack.wire.icmp import TTL_EXCEEDED

if TYPE_CHECKING:
    from netstack.core.neighbors import Neighbor
    from netstack.core.stack import Stack

# How many ports are tried for a caller that looks like another one.
_TRIES: Final = 256

# A caller is told at most so often, in seconds, that the guest's port is closed.
_REFUSALS: Final = 0.1


class UdpForward:
    """One forward: its sockets, and what they have in common. An `Engine` of core.forwards."""

    def __init__(
        self, table: UdpForwards, find_guest: FindGuest, *, as_gateway: bool = False, name: str = "this forward"
    ) -> None:
        """`as_gateway`: guests see the gateway's address in place of the caller's. `name`: for messages."""
        self.table = table
        self.find_guest = find_guest
        self.as_gateway = as_gateway
        self.name = name
        self.ports: list[UdpPort] = []
        self.done = Traffic()  # of the flows that have ended, and what concerns none
        # Of its callers, those that the guest never answered, and the others; least recently used first.
        self.asking: OrderedDict[FlowKey, CallerFlow] = OrderedDict()
        self.answered: OrderedDict[FlowKey, CallerFlow] = OrderedDict()
        table.forwards[self] = None

    def __len__(self) -> int:
        return len(self.asking) + len(self.answered)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[CallerFlow]:
        yield from self.asking.values()
        yield from self.answered.values()

    def add(self, sock: DatagramListener, guest_port: int) -> UdpPort:
        """Have what comes to this socket taken to this port of the guest. The socket is ours from now on."""
        port = UdpPort(self, sock, guest_port)
        self.ports.append(port)
        return port

    def start(self) -> None:
        """Begin to take datagrams. Raises OSError when the poller has no more room."""
        for port in self.ports:
            port.start()

    def traffic(self) -> Traffic:
        """What went through, as of now."""
        done = self.done
        return Traffic(
            open=len(self),
            total=done.total,
            refused=done.refused,
            bytes_from_guest=done.bytes_from_guest + sum(flow.bytes_from_guest for flow in self),
            bytes_to_guest=done.bytes_to_guest + sum(flow.bytes_to_guest for flow in self),
            last_error=done.last_error,
        )

    def close(self, now: float) -> None:
        """The forward ends, and with its sockets the flows of its callers, whose answers would have no way back."""
        for port in self.ports:
            port.close(now, "forward removed")
        self.table.forwards.pop(self, None)


class UdpForwards:
    """The callers of all UDP forwards of a stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.flows: dict[FlowKey, CallerFlow] = {}
        """By the addresses and ports of what the guest sends to them."""
        self.forwards: dict[UdpForward, None] = {}
        udp = stack.udp
        self.scratch = udp.scratch
        self.pairs = udp.pairs
        self.remember_pair = udp.remember_pair
        self._next = 0
        udp.on_refused = self.on_refused

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[CallerFlow]:
        return iter(self.flows.values())

    # --- from guests

    def find(self, src: bytes, src_port: int, dst: bytes, dst_port: int) -> CallerFlow | None:
        """The caller to whom a guest sends; None: it sends to somebody else."""
        return self.flows.get(flow_key(src, src_port, dst, dst_port)) if self.flows else None

    def on_datagram(
        self,
        flow: CallerFlow,
        link: Link,
        mac: bytes,
        payload: memoryview,
        ttl: int,
        dont_fragment: bool,
        now: float,
        segment: int,
    ) -> None:
        """A guest's datagram to a caller, on the slow road; the next one finds its path on the fast one. Untrusted.

        `segment`: as in UdpFlows.on_datagram().
        """
        if ttl <= 1 and flow.seen_as not in self.stack.addresses.own:
            self.stack.counters.drop("udp_ttl_exceeded")
            packet = write_packet(flow.guest, flow.port, flow.seen_as, flow.seen_port, payload, ttl)
            self.stack.send_error(link, mac, None, packet, TTL_EXCEEDED)
            return
        if flow.link is not link or flow.mac != mac:
            flow.follow(link, mac)
        if not flow.answered:
            self._note_answer(flow)
        self.stack.udp.add_path(flow.key, flow.path)
        if segment:
            flow.path.send_run(payload, segment, max(ttl, 2), dont_fragment, now)
        else:
            flow.path.send(payload, max(ttl, 2), dont_fragment, now)

    def on_refused(self, guest: bytes, port: int, peer: bytes, peer_port: int) -> bool:
        """A guest says by ICMP that this port of it is closed, about a datagram from `peer`. Untrusted.

        False: it came from none of our callers.
        """
        flow = self.find(guest, port, peer, peer_port)
        if flow is None:
            return False
        self.stack.counters.drop("udp_forward_refused")
        done = flow.entry.forward.done
        done.refused += 1
        done.last_error = f"{ip_address(guest)} refuses port {port}: nothing listens there"
        now = self.stack.now
        if now - flow.refused_at >= _REFUSALS:
            flow.refused_at = now
            flow.entry.sock.refuse(flow.caller)
        return True

    # --- flows

    def open(self, entry: UdpPort, caller: Caller, neighbor: Neighbor, now: float) -> CallerFlow | None:
        """A caller's first datagram. None: there is no port by which the guest could know it."""
        forward = entry.forward
        stack = self.stack
        guest = neighbor.address
        if forward.as_gateway or is_link_local6(guest):  # from there a guest answers to its own wire alone
            seen_as = stack.addresses.router_for(guest)
        else:
            seen_as = stack.addresses.caller(caller[0], len(guest))
        found = self._free_key(guest, entry.guest_port, seen_as, caller[1])
        if found is None:
            stack.counters.drop("udp_forward_no_port")
            return None
        self._make_room(forward, now)
        key, seen_port = found
        flow = CallerFlow(entry, caller, neighbor, key, seen_as, seen_port)
        flow.opened_at = flow.used_at = now
        self.flows[key] = entry.callers[caller] = forward.asking[key] = entry.last_of[caller[:2]] = flow
        stack.udp.paths.pop(key, None)  # the guest has asked this peer itself: from now on its datagrams are answers
        stack.timers.arm(flow, now + flow.timeout + RESOLUTION)
        forward.done.total += 1
        stack.counters.forwarded += 1
        events = stack.events
        if events is not None and events.debug:
            events.flow_opened("udp", format_endpoint(guest, flow.port), format_endpoint(*flow.peer))
        return flow

    def _free_key(self, guest: bytes, port: int, seen_as: bytes, wanted: int) -> tuple[FlowKey, int] | None:
        """The key of a new flow, with the port by which the guest will know the caller: its own, if that is free.

        At the gateway's address the ports of its services are theirs: the guest asks the resolver at port 53.
        """
        services = self.stack.udp_services
        own = seen_as in self.stack.addresses.own
        count = LAST_PORT - FIRST_PORT + 1
        for i in range(_TRIES + 1):
            seen_port = FIRST_PORT + (self._next + i) % count if i else wanted
            if not seen_port or (own and services.find(seen_as, seen_port) is not None):
                continue
            key = flow_key(guest, port, seen_as, seen_port)
            if key not in self.flows:
                if i:
                    self._next += i
                return key, seen_port
        return None

    def _make_room(self, forward: UdpForward, now: float) -> None:
        limits = self.stack.limits
        if len(forward) >= limits.udp_flows_per_guest:
            self._evict(forward, now)
        elif self.flows and len(self.flows) >= limits.udp_flows:
            most = max(self.forwards, key=len)
            self._evict(forward if len(forward) >= len(most) else most, now)

    def _evict(self, forward: UdpForward, now: float) -> None:
        self.stack.counters.drop("udp_forward_flow_evicted")
        self.close(next(iter(forward)), now, "evicted")

    def _note_answer(self, flow: CallerFlow) -> None:
        flow.answered = True
        if flow.port != DNS_PORT:
            flow.timeout = IDLE
        forward = flow.entry.forward
        del forward.asking[flow.key]
        forward.answered[flow.key] = flow

    def touch(self, flow: CallerFlow, now: float) -> None:
        """The flow is in use; to be called when its used_at is older than RESOLUTION."""
        flow.used_at = now
        forward = flow.entry.forward
        (forward.answered if flow.answered else forward.asking).move_to_end(flow.key)

    def remember_asked(self, flow: CallerFlow, target: bytes, dst: bytes) -> None:
        """There is one peer, and it is known."""

    def close(self, flow: CallerFlow, now: float, why: str) -> None:
        """End a flow. What it has sent is on its way."""
        if flow.closed:
            return
        flow.finish_batch(now)  # may find its link gone, and come here again
        if flow.closed:
            return
        flow.closed = True
        self.stack.timers.cancel(flow)
        entry = flow.entry
        forward = entry.forward
        del self.flows[flow.key]
        del (forward.answered if flow.answered else forward.asking)[flow.key]
        del entry.callers[flow.caller]
        if entry.last_of.get(flow.peer) is flow:
            del entry.last_of[flow.peer]
        path = self.stack.udp.paths.get(flow.key)
        if path is not None and path.flow is flow:
            del self.stack.udp.paths[flow.key]
        forward.done.bytes_from_guest += flow.bytes_from_guest
        forward.done.bytes_to_guest += flow.bytes_to_guest
        events = self.stack.events
        if events is not None and events.debug:
            guest, peer = format_endpoint(flow.guest, flow.port), format_endpoint(*flow.peer)
            events.flow_closed("udp", guest, peer, why, flow.bytes_from_guest, flow.bytes_to_guest)

    def close_link(self, link: Link, now: float) -> None:
        """The link is gone, and with it the guests behind it."""
        for forward in list(self.forwards):
            for port in forward.ports:
                port.leave(link)
        for flow in [flow for flow in self.flows.values() if flow.link is link]:
            self.close(flow, now, "link closed")

    def close_all(self, now: float) -> None:
        """The stack ends."""
        for forward in list(self.forwards):
            forward.close(now)
