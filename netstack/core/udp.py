"""UDP of the guests to the world outside: endpoint-independent mapping (RFC 4787).

Theory of operation
-------------------
Each guest endpoint (address, port) has one `UdpFlow` with one host socket, bound to the same port where that is free
(RFC 4787 REQ-1, REQ-3); `core.datagrams` says how flows live.

Toward the host, the hot path is one look-up in a dict: `paths`, from both endpoints to the flow. Toward the guest, what
a wakeup finds is received into one buffer, where the kernel may have merged datagrams of one size (UDP_GRO: 0.1 in
place of 1.3 us) or handed over several in one call (recvmmsg: 0.7 us). How datagrams get on and off the wire is in
`core.udp_endpoint`.

Who may answer: any port of any address that the guest has sent to through this flow (address-dependent filtering,
RFC 4787 REQ-8). The host's port is open to the host's whole network, and a guest that has sent one datagram has not
asked to be reached by everybody; hole punching works all the same. What a flow remembers of whom it asked is bounded,
the oldest go first.

The gateway is a router to its guests: it takes one off the TTL, and answers when none is left, so it is the first hop
of a traceroute. It is the end of the path for what is sent to itself, that is, to the host's loopback. A datagram with
DF set, or over IPv6 one that the guest itself did not fragment, must not be fragmented by the host either.

Counted as dropped, besides what `core.datagrams` lists: udp_unsolicited (from an address never asked),
udp_refused_by_guest (the guest answered our datagram with an ICMP error).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from netstack.core.datagram_table import LARGEST, DatagramFlows
from netstack.core.datagrams import BURST, RESOLUTION, Stack
from netstack.core.flows import FlowKey, flow_key
from netstack.core.ports import DatagramSocket, Link
from netstack.core.udp_endpoint import FIXED_SUM4, UdpEndpoint, UdpPath, write_packet
from netstack.wire.checksum import pseudo_sum, sum_words
from netstack.wire.icmp import NO_ROUTE, PORT_UNREACHABLE, TTL_EXCEEDED
from netstack.wire.ipv4 import PROTOCOL_UDP

__all__ = ["IDLE", "IDLE_DNS", "UdpFlow", "UdpFlows", "UdpPath", "write_packet"]

# RFC 4787 REQ-5: a mapping must not expire in less than two minutes.
IDLE = 120.0
# A query and its answer: libslirp's figure for port 53 (so_expire of udp.c), twice the resolver's usual timeout.
IDLE_DNS = 10.0
DNS_PORT = 53

# How many addresses are remembered as asked: of one flow (a BitTorrent node's contacts within a minute), and of all.
_ASKED_PER_FLOW = 1024
_ASKED = 65536

# Paths known to the stack's fast path, of all flows: some 500 bytes each.
_PATHS = 16384

# Address pairs whose sums are kept: some 300 bytes each.
_PAIRS = 4096


class UdpFlow(UdpEndpoint):
    """One UDP endpoint of a guest, with a host socket of its own."""

    __slots__ = ("path_keys",)

    table: UdpFlows

    def __init__(self, table: UdpFlows, link: Link, mac: bytes, guest: bytes, port: int) -> None:
        super().__init__(table, link, mac, guest, port, IDLE_DNS)
        self.path_keys: set[FlowKey] = set()  # of its paths in table.paths

    def receive(self, mtu: int, now: float) -> None:
        """Receive into one buffer, and pass on as one run what has come from one peer in one size."""
        scratch = self.table.scratch
        if self.sock.batches:
            try:
                self.sock.receive_batch(scratch, functools.partial(self._deliver_batch, mtu))
            except OSError:
                self.drain_errors()
            return
        last = len(scratch) - LARGEST
        receive_from = self.sock.receive_from
        start = end = size = port = 0
        address = b""
        for _ in range(BURST):
            try:
                length, each, from_, from_port = receive_from(scratch[end:] if end else scratch)
            except BlockingIOError:
                break
            except OSError:
                self.drain_errors()  # the echo of an ICMP error; its substance is in the queue
                continue
            # After one that is shorter than the others nothing may follow.
            if end > start and (each != size or from_port != port or from_ != address or (end - start) % size):
                self._deliver(start, end, size, address, port, mtu)
                start = end
            size, address, port = each, from_, from_port
            end += length
            if not length:
                self._deliver(start, end, size, address, port, mtu)
            if end > last:
                break
        if end > start:
            self._deliver(start, end, size, address, port, mtu)

    def _deliver_batch(self, mtu: int, length: int, size: int, address: bytes, port: int) -> None:
        self._deliver(0, length, size, address, port, mtu)

    def _deliver(self, start: int, end: int, size: int, address: bytes, port: int, mtu: int) -> None:
        src = self.asked.get(address)
        if src is None:
            self.stack.counters.drop("udp_unsolicited")
            return
        self.deliver(start, end, size, src, port, mtu)


class UdpFlows(DatagramFlows[UdpFlow]):
    """All UDP flows, and what they share."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack, "udp")
        self._asked = 0  # the sum of len(flow.asked)
        # Whether an endpoint of a guest that refuses a peer's datagrams has done so to the caller of a forward.
        self.on_refused: Callable[[bytes, int, bytes, int], bool] = lambda *_: False
        # (peer, guest) -> both as they stand in the header toward the guest, the sum of the fixed part of its IPv4
        # header, the sum of the pseudo-header without the length
        self.pairs: dict[tuple[bytes, bytes], tuple[bytes, int, int]] = {}
        # For the stack's fast path: what went the slow road once. Without it everything works, only slower.
        self.paths: dict[FlowKey, UdpPath] = {}

    def limit(self) -> int:
        return self.stack.limits.udp_flows

    def share(self) -> int:
        return self.stack.limits.udp_flows_per_guest

    def open_socket(self, flow: UdpFlow) -> DatagramSocket:
        return self.stack.host.open_udp(flow.guest, flow.port)

    def on_datagram(
        self,
        link: Link,
        mac: bytes,
        src: bytes,
        src_port: int,
        dst: bytes,
        dst_port: int,
        buffer: memoryview,
        start: int,
        end: int,
        ttl: int,
        dont_fragment: bool,
        now: float,
        segment: int = 0,
    ) -> None:
        """A guest's datagram to the world, payload at buffer[start:end]. Untrusted.

        `dst` is a unicast address outside the guests' network, or the gateway's. `dont_fragment` of IPv6
        is whether it came as one packet. With `segment` the payload is that of several datagrams, of `segment` bytes
        each, the last perhaps shorter.
        """
        payload = buffer[start:end]
        target = self.stack.to_host(dst)
        if target is None:
            self.stack.counters.drop("udp_denied")
            packet = write_packet(src, src_port, dst, dst_port, payload, ttl)
            self.stack.send_error(link, mac, None, packet, NO_ROUTE)
            return
        if dst_port in self.stack.blocked_udp and target == dst:
            self.stack.counters.drop("udp_blocked")
            packet = write_packet(src, src_port, dst, dst_port, payload, ttl)
            self.stack.send_error(link, mac, dst, packet, PORT_UNREACHABLE)
            return
        if ttl > 1:
            ttl -= 1
        elif target == dst:
            self.stack.counters.drop("udp_ttl_exceeded")
            packet = write_packet(src, src_port, dst, dst_port, payload, ttl)
            self.stack.send_error(link, mac, None, packet, TTL_EXCEEDED)
            return
        else:
            ttl = 1  # it has arrived: the host's loopback is the gateway itself
        flow = self.flows.get((src, src_port))
        if flow is None:
            flow = UdpFlow(self, link, mac, src, src_port)
            if not self.add(flow, dst, dst_port, payload, now):
                return
        elif flow.link is not link:
            self.move(flow, link)
        flow.mac = mac
        if now - flow.used_at >= RESOLUTION:
            self.touch(flow, now)
        if dst_port != DNS_PORT:
            flow.timeout = IDLE
        if flow.asked.get(target) != dst:
            self.remember_asked(flow, target, dst)
        key = flow_key(src, src_port, dst, dst_port)
        self.add_path(key, UdpPath(flow, dst, target, dst_port))
        flow.path_keys.add(key)
        # Last: an error that goes to the guest may find its link gone, and close this flow.
        if segment:
            flow.send_run(payload, segment, dst, target, dst_port, ttl, dont_fragment)
        else:
            flow.send(payload, dst, target, dst_port, ttl, dont_fragment)

    def add_path(self, key: FlowKey, path: UdpPath) -> None:
        """From now on datagrams with this key take the stack's fast path."""
        if len(self.paths) >= _PATHS:
            self.forget_paths()
        self.paths[key] = path

    def forget_paths(self) -> None:
        """Have every datagram take the slow road again: there are too many paths, or what is allowed has changed."""
        self.paths.clear()
        for flow in self.flows.values():
            flow.path_keys.clear()

    def give_way(self, port: int, now: float) -> bool:
        """A forward wants this port of the host: close what has it as the source port of a guest's; whether any did.

        The guest's next datagram leaves from another port, as it would have from the beginning.
        """
        found = [flow for flow in self.flows.values() if flow.port == port and flow.sock.bound_port() == port]
        for flow in found:
            self.close(flow, now, "port is forwarded")
        return bool(found)

    def on_error_from_guest(self, guest: bytes, port: int, peer: bytes, peer_port: int, *, refused: bool) -> None:
        """A guest sent an ICMP error about a datagram from `peer` to this endpoint of it. Untrusted.

        Nothing follows from it, but for callers of forwards that are `refused`: the peer cannot be told, and that the
        guest's socket is closed does not tell whether it will be opened again, so the flow stays until it is idle.
        """
        if refused and self.on_refused(guest, port, peer, peer_port):
            return
        known = (guest, port) in self.flows
        self.stack.counters.drop("udp_refused_by_guest" if known else "icmp_error_from_guest")

    def close(self, flow: UdpFlow, now: float, why: str) -> None:
        if not flow.closed:
            flow.finish_batch(now)
            self._asked -= len(flow.asked)
            for key in flow.path_keys:
                self.paths.pop(key, None)
        super().close(flow, now, why)

    def remember_pair(self, src: bytes, guest: bytes) -> tuple[bytes, int, int]:
        """Compute and keep the constant parts of the headers of what comes from this address to this guest."""
        if len(self.pairs) >= _PAIRS:
            self.pairs.clear()
        fixed_sum = FIXED_SUM4 + sum_words(src) + sum_words(guest)
        pair = self.pairs[src, guest] = (src + guest, fixed_sum, pseudo_sum(src, guest, PROTOCOL_UDP, 0))
        return pair

    def remember_asked(self, flow: UdpFlow, target: bytes, dst: bytes) -> None:
        asked = flow.asked
        if target not in asked:
            if asked and (len(asked) >= _ASKED_PER_FLOW or self._asked >= _ASKED):
                del asked[next(iter(asked))]
            else:
                self._asked += 1
        asked[target] = dst
