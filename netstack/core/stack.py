"""The stack: frames of guests in, calls on host sockets out, and back.

Theory of operation
-------------------
The rim calls, and the stack never waits:

    receive_frames(link, buffer, spans, now)   a link read a batch of frames into its buffer
    handler.on_ready(events, now)              the poller found a host socket ready; flows are handlers themselves
    handle_timers(now)                         the deadline of next_deadline() has come
    end_round(now)                             a round of the poller is over: links are flushed

A batch is what one read of a link gave. Its frames are only looked at one after the other; each flow that they touch
is in `touched` once, and does its work when the batch ends (TcpFlow.finish_batch): one write to the host, one decision
about an ACK. Views into the link's buffer live no longer than that.

The fast path (`_receive`) takes IPv4 without options and IPv6 without extension headers, TCP, for a flow that exists,
from a guest that the switch knows on this link. It is one `unpack_from` over Ethernet, IP and TCP, one dict look-up,
one call. The two MACs are unpacked as integers of 8 and 4 bytes and compared with those of the last frame that took the
slow road (`core.ingress`) and was for us: no bytes objects, no look at the switch. Long runs of frames that are alike
are taken at once (`core.runs`). Anything else takes the slow road, which is correct for every frame; the fast paths may
only be left out, never be needed.

Everything a guest can make the stack keep is bounded: flows by `Limits`, what is in flight and what waits for the host
by one budget each, neighbors, MACs, fragments by their owners.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from netstack.core.addresses import Addresses
from netstack.core.budget import Budgets
from netstack.core.chunks import CHUNK, LARGE_CHUNK, Chunks
from netstack.core.counters import Counters
from netstack.core.flows import FlowKey, FlowTable, Limits, flow_key
from netstack.core.forwards import Pending, find_key
from netstack.core.headers import FRAME4, FRAME6, SMALLEST4, SMALLEST6
from netstack.core.icmp import IcmpLayer
from netstack.core.ingress import Ingress, Packet
from netstack.core.neighbors import Neighbor, Neighbors
from netstack.core.ports import Buffer, Events, Host, HostSocket, Link, Poller, TcpServiceCall, UdpService
from netstack.core.reassembly import Reassembly, fragment
from netstack.core.refusals import EXHAUSTED, TCP_PROBLEMS
from netstack.core.runs import Run, Runs
from netstack.core.switch import Switch
from netstack.core.tcp import SYN_SENT, TIME_WAIT, TcpFlow
from netstack.core.timers import NEVER, Timers
from netstack.core.udp import UdpFlows
from netstack.core.udp_forwards import UdpForwards
from netstack.core.udp_services import QuickAnswer, UdpServices
from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, MIN_FRAME
from netstack.wire.icmp import NO_ROUTE, Problem, write_error
from netstack.wire.ipv4 import PROTOCOL_TCP, PROTOCOL_UDP, write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.tcp import RST, SYN, Tcp, TcpOptions, write_tcp
from netstack.wire.udp import write_udp
from netstack.wire.virtio_net import GSO_TYPE_BEFORE

# How long an ACK of less than two full segments waits for data of the host to ride on (delayed ACK, RFC 9293 3.8.6.3,
# which allows 0.5 s). A request's answer comes within 0.1 ms when its server is on the host; a separate ACK cost a
# fifth of the round trip. Short, because a guest that uses Nagle's algorithm and writes twice waits for it.
ACK_DELAY = 0.002

# Ethernet, IPv6, and TCP with all its options: more than this of a large frame is payload.
LARGEST_HEADERS = 14 + 40 + 60

_EVIL = SYN | RST  # flags that never take the fast path: options to read, or the end


class TcpService(Protocol):
    """A TCP service of the gateway: the flow's host side is one end of a socketpair."""

    def open(self, call: TcpServiceCall) -> HostSocket | None:
        """A connected socket whose other end the service reads; None when it takes no more connections."""


class TcpInterceptor(TcpService, Protocol):
    """A TCP service that stands in for peers of a guest: the host's proxy is to be used for them."""

    def wants(self, address: bytes, port: int) -> bool:
        """Whether a new connection to this peer is to be served. Called for each: quick, and never raises."""
        ...


class NeighborDiscovery(Protocol):
    """Router and neighbor discovery, wired in by the gateway."""

    def on_packet(self, link: Link, mac: bytes, packet: Packet, body: bytes, now: float) -> None: ...
    def solicit(self, address: bytes, link: Link | None) -> None: ...


class _LateAcks:
    """The deadline of the ACKs in stack.ack_later: one for all, so that a request costs no timer of its own."""

    __slots__ = ("heap_at", "stack", "timer_at")

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.timer_at = self.heap_at = NEVER

    def on_timer(self, now: float) -> None:
        later, self.stack.ack_later = self.stack.ack_later, []
        for flow in later:
            flow.send_late_ack()


class Stack:
    """One network: its links, flows, neighbors and services."""

    def __init__(
        self,
        addresses: Addresses,
        host: Host,
        poller: Poller,
        *,
        limits: Limits | None = None,
        events: Events | None = None,
        secret: bytes = b"",
        on_earlier: Callable[[float], None] | None = None,
    ) -> None:
        """`secret` keys the initial sequence numbers (RFC 6528); `on_earlier` is told of earlier deadlines."""
        self.addresses = addresses
        self.mac = addresses.mac
        self.host = host
        self.poller = poller
        self.limits = limits or Limits()
        self.events = events
        self.counters = Counters()
        self.timers = Timers(on_earlier)
        self.switch = Switch(self.mac, self.counters)
        self.flows = FlowTable(self.limits)
        self.neighbors = Neighbors(self, addresses, self.limits.neighbors)
        self.reassembly = Reassembly(self)
        self.udp = UdpFlows(self)
        self.udp_services = UdpServices(self)
        self.udp_forwards = UdpForwards(self)
        self.forward_pending = Pending(self.limits)
        self.icmp = IcmpLayer(self)
        self.discovery: NeighborDiscovery | None = None
        self.touched: list[TcpFlow] = []
        self.ack_later: list[TcpFlow] = []
        self.chunks = Chunks(CHUNK, CHUNK >> 1)  # what flows read into from the host
        self.large_chunks = Chunks(LARGE_CHUNK, LARGE_CHUNK >> 2)
        self.read_at_large = 0  # bytes that were read into large chunks in this round
        self.budgets = Budgets(self.limits)
        self._late_acks = _LateAcks(self)
        self._ingress = Ingress(self)
        self._runs = Runs(self, self._receive)
        self._secret = secret
        self._tcp_services: dict[tuple[bytes, int], TcpService] = {}
        self._interceptors: dict[int, TcpInterceptor] = {}
        self._protected: set[int] = set()
        self.blocked_udp: frozenset[int] = frozenset()
        # Guests that seek() is asking for, by address, and who waits for them.
        self._sought: dict[bytes, dict[TcpFlow, None]] = {}
        # Of each link: how many ICMP errors it may still be sent, as of when.
        self._errors: dict[Link, tuple[float, float]] = {}
        self._ident = 0
        self._made_ports = 0  # how often open_to_guest() was asked: where a search for a port begins
        self.now = 0.0  # of the last call from the rim; for what has no `now` at hand

    # ---- from guests -----------------------------------------------------------------------------------------------

    def receive_frames(
        self, link: Link, buffer: memoryview, spans: Sequence[int], now: float, runs: Sequence[Run] = ()
    ) -> None:
        """Take a batch of frames: buffer[spans[0]:spans[1]], buffer[spans[2]:spans[3]], ... Untrusted.

        `runs`: which of them have one size and lie at equal distances (see `core.runs`). The buffer may be reused when
        this returns.
        """
        self.now = now
        counters = self.counters
        counters.batches += 1
        counters.frames_from_guest += len(spans) >> 1
        capture = link.capture
        if capture is None:
            if runs:
                self._runs.receive(link, buffer, spans, runs, now)
            else:
                self._receive(link, buffer, spans, now)
        else:
            counters.take_note()
            for i in range(0, len(spans), 2):
                self._receive(link, buffer, spans[i : i + 2], now)
                frame = buffer[spans[i] : spans[i + 1]]
                reason = counters.take_note()
                comment = f"drop: {reason}" if reason else None
                capture.frame(link.interface, (frame,), to_guest=False, comment=comment)
        self._end_batch(now)

    def _receive(self, link: Link, buffer: memoryview, spans: Sequence[int], now: float) -> None:
        unpack4 = FRAME4.unpack_from
        find = self.flows.tcp.get
        find_path = self.udp.paths.get
        quick_ports = self.udp_services.quick_ports
        macs_high = link.macs_high
        macs_low = link.macs_low
        offload = link.offload is not None
        slow = 0
        each = iter(spans)
        for start, end in zip(each, each, strict=True):
            size = end - start
            if size >= SMALLEST4:
                (
                    high,
                    low,
                    ethertype,
                    version,
                    total,
                    offset,
                    protocol,
                    addresses,
                    ports,
                    seq,
                    ack,
                    data,
                    flags,
                    window,
                ) = unpack4(buffer, start)
                if (high == macs_high and low == macs_low) or (high, low) in link.known_macs:
                    if ethertype == 0x0800:
                        if protocol == PROTOCOL_TCP and version == 0x45 and not offset & 0x3FFF:
                            flow = find((addresses, ports))
                            if flow is not None and flow.link is link and low == flow.mac_low and not flags & _EVIL:
                                first = start + 34 + (data >> 4 << 2)
                                last = start + 14 + total
                                if first <= last <= end and data >= 0x50:
                                    flow.on_segment(seq, ack, flags, window, buffer, first, last, now)
                                    continue
                        elif (
                            protocol == PROTOCOL_UDP
                            and version == 0x45
                            and not offset & 0x3FFF
                            and not (offload and buffer[start - GSO_TYPE_BEFORE])  # several datagrams in one frame
                        ):
                            path = find_path((addresses, ports))
                            if path is None:
                                if ports & 0xFFFF in quick_ports:
                                    first = start + 42
                                    last = start + 34 + (seq >> 16)
                                    if first <= last <= start + 14 + total <= end and self.udp_services.receive(
                                        link, high, low, addresses, ports, buffer, first, last, now
                                    ):
                                        continue
                            elif path.flow.link is link and low == path.mac_low:
                                # What would be SEG.SEQ are u16 length, u16 checksum.
                                last = start + 34 + (seq >> 16)
                                ttl = buffer[start + 22]
                                if ttl > 1 and start + 42 <= last <= start + 14 + total <= end:
                                    path.send(buffer[start + 42 : last], ttl, bool(offset & 0x4000), now)
                                    continue
                    elif ethertype == 0x86DD and size >= SMALLEST6 and self._receive6(link, buffer, start, end, now):
                        continue
            slow += 1
            self._ingress.on_frame(link, buffer, start, end, now)
            macs_high = link.macs_high
            macs_low = link.macs_low
        self.counters.frames_slow += slow

    def _receive6(self, link: Link, buffer: memoryview, start: int, end: int, now: float) -> bool:
        """The fast path of IPv6; False: take the slow road."""
        high, low, _, version, length, protocol, addresses, ports, seq, ack, data, flags, window = FRAME6.unpack_from(
            buffer, start
        )
        if version >> 4 != 6:
            return False
        if protocol == PROTOCOL_UDP:
            if link.offload is not None and buffer[start - GSO_TYPE_BEFORE]:
                return False
            path = self.udp.paths.get((addresses, ports))
            last = start + 54 + (seq >> 16)
            if not start + 62 <= last <= start + 54 + length <= end:
                return False
            if path is None and ports & 0xFFFF in self.udp_services.quick_ports:
                return self.udp_services.receive(link, high, low, addresses, ports, buffer, start + 62, last, now)
            hops = buffer[start + 21]
            if path is None or path.flow.link is not link or low != path.mac_low or hops < 2:
                return False
            path.send(buffer[start + 62 : last], hops, True, now)
            return True
        if protocol != PROTOCOL_TCP or flags & _EVIL:
            return False
        flow = self.flows.tcp.get((addresses, ports))
        if flow is None or flow.link is not link or low != flow.mac_low:
            return False
        first = start + 54 + (data >> 4 << 2)
        last = start + 54 + length
        if data < 0x50 or not first <= last <= end:
            return False
        flow.on_segment(seq, ack, flags, window, buffer, first, last, now)
        return True

    def receive_scattered(self, link: Link, header: bytes, pieces: list[memoryview], now: float) -> None:
        """Take one large frame that lies in pieces in the guest's own memory, behind its virtio-net header. Untrusted.

        The guest may change it all the while: headers are copied and read once, and what has to be read otherwise
        is copied as a whole. Payload is not read here at all; views of it stay in use until end_batch(). Where the
        headers are in the first piece and a flow is expecting just this, it costs no copy.
        """
        self.now = now
        counters = self.counters
        if link.capture is None and self._receive_large(link, bytes(pieces[0][:LARGEST_HEADERS]), pieces, now):
            counters.batches += 1
            counters.frames_from_guest += 1
            return
        frame = b"".join((header, *pieces))
        self.receive_frames(link, memoryview(frame), (len(header), len(frame)), now)

    def _receive_large(self, link: Link, head: bytes, pieces: list[memoryview], now: float) -> bool:
        """The fast path of large frames, TCP with data; False: take another road."""
        if len(head) < SMALLEST4:
            return False
        high, low, ethertype, version, total, offset, protocol, addresses, ports, seq, ack, data, flags, window = (
            FRAME4.unpack_from(head)
        )
        if (high != link.macs_high or low != link.macs_low) and (high, low) not in link.known_macs:
            return False
        key: FlowKey = (addresses, ports)
        if ethertype == ETHERTYPE_IPV4:
            if version != 0x45 or offset & 0x3FFF:
                return False
            first = 34 + (data >> 4 << 2)
            last = 14 + total
        elif ethertype == ETHERTYPE_IPV6 and len(head) >= SMALLEST6:
            _, _, _, version, total, protocol, addresses6, ports, seq, ack, data, flags, window = FRAME6.unpack_from(
                head
            )
            if version >> 4 != 6:
                return False
            key = (addresses6, ports)
            first = 54 + (data >> 4 << 2)
            last = 54 + total
        else:
            return False
        flow = self.flows.tcp.get(key)
        if (
            protocol != PROTOCOL_TCP
            or flow is None
            or flow.link is not link
            or low != flow.mac_low
            or flags & _EVIL
            or data < 0x50
            or first > len(head)
            or last != sum(map(len, pieces))  # padding is for small frames
        ):
            return False
        views = pieces[1:]
        if first < len(pieces[0]):
            views.insert(0, pieces[0][first:])
        return flow.on_large_segment(seq, ack, flags, window, views, last - first)

    def end_batch(self, now: float) -> None:
        """Nothing refers to what receive_scattered() was given when this returns."""
        self._end_batch(now)

    def _end_batch(self, now: float) -> None:
        touched = self.touched
        if touched:
            self.touched = []
            for flow in touched:
                flow.finish_batch(now)

    # ---- time ------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When handle_timers() is next needed."""
        return self.timers.next_deadline()

    def handle_timers(self, now: float) -> None:
        """Run what is due."""
        self.now = now
        self.timers.run(now)

    def end_round(self, now: float) -> None:
        """Hand all queued frames to the kernel; ACKs that wait for data to ride on get their deadline."""
        if self.ack_later and self._late_acks.timer_at == NEVER:
            self.timers.arm(self._late_acks, now + ACK_DELAY)
        self.flush()

    def flush(self) -> None:
        """Hand all queued frames to the kernel: one call a link."""
        for link in tuple(self.switch.links):  # a link that fails closes, and leaves the list
            link.flush()
        self.chunks.recycle()
        self.large_chunks.recycle()
        self.read_at_large = 0

    @property
    def bytes_in_flight(self) -> int:
        """Bytes sent to guests and not acknowledged."""
        return self.budgets.in_flight.used

    @property
    def bytes_for_host(self) -> int:
        """Bytes accepted from guests that host sockets have not taken yet."""
        return self.budgets.for_host.used

    @property
    def bytes_out_of_order(self) -> int:
        """Bytes of guests' segments that wait for one before them, and what each of these costs besides."""
        return self.budgets.out_of_order.used

    # ---- links -----------------------------------------------------------------------------------------------------

    def add_link(self, link: Link, now: float) -> None:
        """A guest, or a segment of guests, is attached: tell it who the gateway is, and look for those we have lost."""
        self.switch.add(link)
        self.greet(link, now)

    def greet(self, link: Link, now: float) -> None:
        """A guest on this link has begun to listen."""
        self.neighbors.announce(link)
        for flow in self.flows:
            if flow.link_lost:
                self.seek(flow, now)

    def remove_link(self, link: Link, now: float) -> None:
        """It is gone. Its flows end soon unless their guest comes back, on whatever link."""
        self.switch.remove(link)
        self.neighbors.forget_link(link)
        self.budgets.forget(link)
        self._errors.pop(link, None)
        self.udp.close_link(link, now)
        self.udp_forwards.close_link(link, now)
        self.icmp.close_link(link, now)
        self.reassembly.forget_link(link)
        for flow in self.flows:
            if flow.link is link:
                flow.on_link_lost(now)

    def seek(self, flow: TcpFlow, now: float) -> None:
        """Ask on all links for a guest whose link was lost: on its new one it may have nothing to say by itself."""
        waiting = self._sought.get(flow.guest)
        if waiting is not None:
            waiting[flow] = None
            return
        self._sought[flow.guest] = {flow: None}
        self.neighbors.resolve(flow.guest, functools.partial(self._on_sought, flow.guest), now)

    def _on_sought(self, guest: bytes, neighbor: Neighbor | None, now: float) -> None:
        for flow in self._sought.pop(guest, ()):
            if neighbor is not None and flow.link_lost:
                flow.on_guest_found(neighbor, now)

    def move_flow(self, flow: TcpFlow, link: Link, mac: bytes) -> bool:
        """A flow's segment came over another link. True when its guest is there now."""
        neighbor = self.neighbors.find(flow.guest)
        if mac != flow.mac or neighbor is None or neighbor.link is not link:
            return False
        flow.move_to(link)
        return True

    # ---- toward guests ---------------------------------------------------------------------------------------------

    def send_frame(
        self, link: Link, dst_mac: bytes, ethertype: int, packet: Buffer, tail: Buffer | None = None
    ) -> None:
        """One Ethernet frame from the gateway; `tail` must not change any more."""
        prefix = link.prefix
        head = bytearray(prefix)
        head += dst_mac
        head += self.mac
        head += ethertype.to_bytes(2, "big")
        head += packet
        size = len(head) - prefix + (len(tail) if tail is not None else 0)
        if size < MIN_FRAME:
            if tail is not None:
                head += tail
                tail = None
            head += bytes(MIN_FRAME - size)
            size = MIN_FRAME
        link.write_prefix(head, size)
        link.queue_frame(head, tail)

    def send_ip(self, link: Link, mac: bytes, packet: Buffer, payload: Buffer | None = None) -> None:
        """One IP packet to this guest; `payload`, where given, is its tail."""
        self.send_frame(link, mac, ETHERTYPE_IPV4 if packet[0] >> 4 == 4 else ETHERTYPE_IPV6, packet, payload)

    def send_transport(
        self, link: Link, mac: bytes, src: bytes, dst: bytes, protocol: int, body: bytes, *, ttl: int = 64
    ) -> None:
        """A transport header and payload in as many IP packets as the guest's MTU asks for."""
        if len(dst) == 4:
            head = write_ipv4(src, dst, protocol, len(body), ttl=ttl)
        else:
            head = write_ipv6(src, dst, protocol, len(body), ttl=ttl)
        mtu = min(self.neighbors.mtu_of(dst), link.mtu)
        if len(head) + len(body) <= mtu:
            self.send_ip(link, mac, head + body)
            return
        self._ident = self._ident + 1 & 0xFFFFFFFF
        for packet in fragment(head + body, mtu, self._ident):
            self.send_ip(link, mac, packet)

    def send_udp(
        self,
        link: Link,
        mac: bytes,
        src: bytes,
        src_port: int,
        dst: bytes,
        dst_port: int,
        payload: Buffer,
        *,
        ttl: int = 64,
    ) -> None:
        """One UDP datagram to a guest, fragmented to its MTU where needed."""
        body = write_udp(src, dst, src_port, dst_port, payload)
        self.send_transport(link, mac, src, dst, PROTOCOL_UDP, body, ttl=ttl)

    def send_error(
        self, link: Link, mac: bytes, src: bytes | None, packet: Buffer, problem: Problem, parameter: int = 0
    ) -> None:
        """An ICMP error about this packet of the guest's, from `src`; None: from the gateway's address of its family.

        Nothing is sent where RFC 1122 3.2.2 or RFC 4443 2.4 forbid an error, or when the link has had too many (2.4 f).
        """
        rate = self.limits.icmp_errors_per_second
        left, at = self._errors.get(link, (float(rate), 0.0))
        left = min(float(rate), left + (self.now - at) * rate)
        if left < 1.0:
            self.counters.drop("icmp_errors_limited")
            return
        if src is None:
            src = self.addresses.router_for(bytes(packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]))
        error = write_error(src, packet, problem, parameter)
        if error is not None:
            self._errors[link] = (left - 1.0, self.now)
            self.counters.icmp_errors_sent += 1
            self.send_ip(link, mac, error)

    # ---- addresses -------------------------------------------------------------------------------------------------

    def to_host(self, dst: bytes) -> bytes | None:
        """Where the host must send for this destination of a guest's; None when that is not allowed."""
        return self.addresses.to_host(dst)

    def from_host(self, address: bytes) -> bytes:
        """The address by which guests know this address of the host's side."""
        return self.addresses.from_host(address)

    def guest_mtu(self, address: bytes) -> int:
        """The largest IP packet that this guest is known to take."""
        return self.neighbors.mtu_of(address)

    def is_gateway(self, address: bytes) -> bool:
        """Whether this is one of the gateway's own addresses, its DNS and link-local addresses included."""
        return address in self.addresses.own

    # ---- services --------------------------------------------------------------------------------------------------

    def register_udp(
        self,
        port: int,
        service: UdpService,
        *,
        addresses: Iterable[bytes] | None = None,
        quick: QuickAnswer | None = None,
    ) -> None:
        """Have datagrams to this port answered: at these addresses, or at any of the gateway's and any group.

        With addresses, `quick` may answer some of them without a Datagram (`core.udp_services`).
        """
        self.udp_services.register(port, service, addresses, quick)

    def register_tcp(self, port: int, service: TcpService, *, addresses: Iterable[bytes]) -> None:
        """Have connections to this port of these addresses of the gateway served."""
        for address in addresses:
            self._tcp_services[address, port] = service

    def intercept_tcp(self, port: int, service: TcpInterceptor | None) -> None:
        """Have new connections of guests to this port of the world served here, where the service wants them.

        None: they go to their peers again. Connections to the gateway's own addresses, and to where a guest may not go,
        are never intercepted. Such a connection is accepted before anybody knows whether its peer would.
        """
        if service is None:
            self._interceptors.pop(port, None)
        else:
            self._interceptors[port] = service

    def block_udp(self, ports: Iterable[int]) -> None:
        """Refuse guests' datagrams to these ports of the world, as closed ports do (ICMP); all others are as before."""
        blocked = frozenset(ports)
        if blocked != self.blocked_udp:
            self.blocked_udp = blocked
            self.udp.forget_paths()

    def replace_socket(self, call: TcpServiceCall, old: HostSocket, new: HostSocket, early: bytes, now: float) -> bool:
        """Let a guest's connection to a service go on with another host socket. See TcpFlow.replace_socket.

        False: it cannot now, nothing has changed, and `new` is still the caller's.
        """
        flow = self.flows.tcp.get(flow_key(call.guest, call.guest_port, call.address, call.port))
        return flow is not None and flow.replace_socket(old, new, early, now)

    def reset_service(self, call: TcpServiceCall, old: HostSocket, now: float) -> None:
        """End a guest's connection to a service with RST, if its host side still is `old`."""
        flow = self.flows.tcp.get(flow_key(call.guest, call.guest_port, call.address, call.port))
        if flow is not None and flow.sock is old:
            flow.abort(now, "service refused", tell_guest=True)
            self.end_round(now)

    def protect_port(self, port: int) -> None:
        """No guest reaches this port of the host's loopback: the API listens there."""
        self._protected.add(port)

    def is_protected(self, port: int) -> bool:
        return port in self._protected

    def on_ndp(self, link: Link, mac: bytes, packet: Packet, buffer: memoryview, now: float) -> None:
        """Router or neighbor discovery from a guest. Untrusted."""
        if self.discovery is None:
            self.counters.drop("not_forwarded")
        else:
            self.discovery.on_packet(link, mac, packet, bytes(buffer[packet.payload_start : packet.payload_end]), now)

    def solicit(self, address: bytes, link: Link | None) -> None:
        """Ask for the guest with this IPv6 address."""
        if self.discovery is not None:
            self.discovery.solicit(address, link)

    # ---- TCP -------------------------------------------------------------------------------------------------------

    def initial_sequence(self, key: FlowKey, now: float) -> int:
        """ISS by RFC 6528: a clock of 4 us, and a keyed hash of the connection."""
        text = repr(key).encode()
        value = int.from_bytes(hashlib.blake2s(text, key=self._secret[:32], digest_size=4).digest(), "big")
        return (int(now * 250_000) + value) & 0xFFFFFFFF

    def connect_flow(self, flow: TcpFlow, segment: Tcp, options: TcpOptions, original: Buffer, now: float) -> None:
        """A guest's SYN: begin to connect for it. `original` is its packet, for an error about it."""
        dst = flow.peer
        port = flow.peer_port
        service = self._tcp_services.get((dst, port))
        if service is None and self._interceptors:
            service = self._find_interceptor(dst, port)
        sock: HostSocket | None = None
        error = 0
        connected = service is not None
        if service is not None:
            sock = service.open(TcpServiceCall(flow.link, flow.guest, flow.guest_port, dst, port))
        elif dst not in (self.addresses.dns, self.addresses.dns6) and not (
            dst in self.addresses.own and port in self._protected
        ):
            target = self.addresses.to_host(dst)
            if target is None:
                self.counters.drop("tcp_no_route")
                self.send_error(flow.link, flow.mac, None, original, NO_ROUTE)
                return
            try:
                sock = self.host.open_tcp(target, port)
                connected = target != dst and self.host.is_connected(sock)  # the host's loopback
            except OSError as failure:
                error = failure.errno or 0
                if error in EXHAUSTED:
                    self._tell_exhausted(error)
        flow.take_syn(segment.seq, segment.window, options.mss, options.window_scale)
        if sock is None:
            self.refuse_tcp(flow, error, now)
            return
        self.flows.add(flow)
        try:
            flow.open_from_guest(sock, connected=connected, now=now)
        except OSError as failure:  # the poller's own limits: ENOMEM, or ENOSPC of fs.epoll.max_user_watches
            self._tell_exhausted(failure.errno or 0)
            self.refuse_tcp(flow, 0, now)

    def _find_interceptor(self, dst: bytes, port: int) -> TcpService | None:
        interceptor = self._interceptors.get(port)
        if interceptor is None or dst in self.addresses.own or self.addresses.to_host(dst) is None:
            return None
        return interceptor if interceptor.wants(dst, port) else None

    def _tell_exhausted(self, error: int) -> None:
        """What a guest asked for is refused for a reason that only the host's administrator can mend."""
        self.counters.drop("tcp_host_exhausted")
        if self.events is not None:
            self.events.warning(
                f"tcp_host_exhausted {error}",
                "the host has nothing left for further connections; they are refused",
                error=os.strerror(error),
            )

    def refuse_tcp(self, flow: TcpFlow, error: int, now: float) -> None:
        """connect() failed: the guest hears what the host heard. RST for a refusal, else the ICMP error that fits."""
        self.counters.tcp_refused += 1
        problem = TCP_PROBLEMS.get(error)
        src, dst = flow.guest, flow.peer
        if problem is None:
            self.counters.tcp_resets_sent += 1
            flow.send_refusal()
        else:
            syn = write_tcp(src, dst, flow.guest_port, flow.peer_port, flow.irs, 0, SYN, 0)
            head = (write_ipv4 if len(src) == 4 else write_ipv6)(src, dst, PROTOCOL_TCP, len(syn))
            self.send_error(flow.link, flow.mac, None, head + syn, problem)
        flow.abort(now, "refused", tell_guest=False)

    def open_to_guest(
        self,
        sock: HostSocket,
        guest: bytes,
        guest_port: int,
        peer: bytes,
        peer_port: int,
        on_opened: Callable[[TcpFlow | None, int], object],
        now: float,
    ) -> None:
        """Open a connection toward a guest for `sock`, as if from peer:peer_port; 0: from any port.

        on_opened(flow, 0) when the guest accepted. On failure on_opened(None or the flow, errno), and the socket is
        reset then, unless the answer is True: the caller has taken it back. Nothing is read from the socket before.
        Where the guest has a connection with the same four numbers, another port is taken for peer_port, unless that
        one has ended and only waits (TIME-WAIT): the caller's system has given the port away again, and so it is over
        for both.
        """

        def resolved(neighbor: Neighbor | None, now: float) -> None:
            error = errno.EHOSTUNREACH
            if neighbor is not None:
                error = self._open_to_neighbor(sock, neighbor, guest_port, peer, peer_port, on_opened, now)
            if error and not on_opened(None, error):
                self.host.reset(sock)

        self.neighbors.resolve(guest, resolved, now)

    def _open_to_neighbor(
        self,
        sock: HostSocket,
        neighbor: Neighbor,
        guest_port: int,
        peer: bytes,
        peer_port: int,
        on_opened: Callable[[TcpFlow | None, int], object],
        now: float,
    ) -> int:
        guest = neighbor.address
        key = flow_key(guest, guest_port, peer, peer_port)
        old = self.flows.tcp.get(key)
        if old is not None and old.state == TIME_WAIT:
            old.make_way(now)
        elif old is not None or not peer_port:
            self._made_ports += 1
            found = find_key(self.flows, guest, guest_port, peer, self._made_ports)
            if found is None:
                return errno.EADDRINUSE
            key, peer_port = found
        if self.flows.refusal(neighbor.link) is not None:
            waiting = self.flows.oldest_time_wait(neighbor.link)
            if waiting is None:
                return errno.ENOBUFS
            waiting.make_way(now)
        flow = TcpFlow(self, neighbor.link, neighbor.mac, key, guest, guest_port, peer, peer_port, now)
        self.flows.add(flow)
        flow.open_to_guest(sock, on_opened, now)
        return 0

    def on_syn_refused(self, guest: bytes, guest_port: int, peer: bytes, peer_port: int, seq: int) -> bool:
        """A guest answers our SYN with ICMP "unreachable", as its packet filter may (RFC 1122 4.2.3.9). Untrusted.

        False when there is no such SYN: its sequence number says that the guest, or nobody, has seen it.
        """
        flow = self.flows.tcp.get(flow_key(guest, guest_port, peer, peer_port)) if len(guest) == len(peer) else None
        if flow is None or flow.state != SYN_SENT or flow.iss != seq:
            return False
        flow.abort(self.now, "refused", tell_guest=False, error=errno.ECONNREFUSED)
        return True

    def on_flow_opened(self, flow: TcpFlow) -> None:
        """ESTABLISHED."""
        self.counters.tcp_opened += 1
        events = self.events
        if events is not None and events.debug:
            events.flow_opened("tcp", *flow.endpoints())

    def on_flow_closed(self, flow: TcpFlow, why: str) -> None:
        """CLOSED: it leaves the table."""
        self.flows.remove(flow)
        self.counters.tcp_closed += 1
        if flow.forward is not None:
            flow.forward.on_flow_closed(flow)
        events = self.events
        if events is not None and events.debug:
            events.flow_closed("tcp", *flow.endpoints(), why, flow.bytes_from_guest, flow.bytes_to_guest)
