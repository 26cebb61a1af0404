"""UDP of the guests to the world outside: endpoint-independent mapping (RFC 4787).

Theory of operation
-------------------
Each guest endpoint (address, port) has one `UdpFlow` with one host socket, bound to the same port where that is free
(RFC 4787 REQ-1, REQ-3); `core.datagrams` says how flows live.

Toward the host, the hot path is one look-up in a dict: `paths`, from both endpoints to the flow. Datagrams of one size
to one peer, as of a stream, are held back until the batch of frames at hand ends, and leave in one call, which the
kernel takes apart (UDP_SEGMENT: 0.5 us a datagram in place of 3.3 with a call for each, over the loopback). Toward the
guest, what a wakeup finds is received into one buffer, where the kernel may have merged datagrams of one size (UDP_GRO:
0.1 in place of 1.3 us) or handed over several in one call (recvmmsg: 0.7 us); such runs become frames by array
arithmetic (`core.udp_bursts`), others by one packed header and one checksum each.

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

import errno
import functools
from collections.abc import Sequence
from struct import Struct
from typing import ClassVar

import numpy as np

from netstack.core.datagram_table import LARGEST, DatagramFlows
from netstack.core.datagrams import BURST, BUSY, RESOLUTION, DatagramFlow, Stack
from netstack.core.flows import FlowKey, flow_key
from netstack.core.ports import MAX_SEGMENTS, MAX_SEGMENTS_BYTES, Buffer, DatagramSocket, Link
from netstack.core.udp_bursts import PAYS_FROM, queue_run, write_burst
from netstack.wire.checksum import pseudo_sum, sum_words
from netstack.wire.icmp import NO_ROUTE, TTL_EXCEEDED
from netstack.wire.ipv4 import PROTOCOL_UDP, write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.udp import write_udp

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

_TTL = 64

# IPv4: version+IHL+TOS 2 | total length 2 | identification 2, DF 2, TTL 1, protocol 1 | checksum 2 | addresses 8
# UDP: source port 2 | destination port 2 | length 2 | checksum 2
_HEADERS4 = Struct("!2sH6sH8sHHHH")
_FIRST4 = b"\x45\x00"
# An atomic datagram: DF and identification 0 (RFC 6864 4.1).
_MIDDLE4 = bytes((0, 0, 0x40, 0, _TTL, PROTOCOL_UDP))
_FIXED_SUM4 = 0x4500 + 0x4000 + (_TTL << 8 | PROTOCOL_UDP)
# IPv6: version, class, label 4 | payload length 2 | next header, hop limit 2 | addresses 32 | UDP as above
_HEADERS6 = Struct("!4sH2s32sHHHH")
_FIRST6 = b"\x60\x00\x00\x00"
_MIDDLE6 = bytes((PROTOCOL_UDP, _TTL))

# Up to this size a packet is one piece of memory: copying it is cheaper than sending two pieces.
_JOINED = 2048


def write_packet(src: bytes, src_port: int, dst: bytes, dst_port: int, payload: Buffer, ttl: int) -> bytes:
    """A whole IP packet with one UDP datagram, whatever its size."""
    datagram = write_udp(src, dst, src_port, dst_port, payload)
    if len(dst) == 4:
        return write_ipv4(src, dst, PROTOCOL_UDP, len(datagram), ttl=ttl) + datagram
    return write_ipv6(src, dst, PROTOCOL_UDP, len(datagram), ttl=ttl) + datagram


class UdpFlow(DatagramFlow):
    """One UDP endpoint of a guest."""

    __slots__ = (
        "_dont_fragment",
        "_dst",
        "_largest_segment",
        "_pending",
        "_pending_bytes",
        "_port",
        "_segment",
        "_target",
        "_ttl",
        "asked",
        "path_keys",
    )

    protocol: ClassVar[str] = "udp"
    table: UdpFlows

    def __init__(self, table: UdpFlows, link: Link, mac: bytes, guest: bytes, port: int) -> None:
        super().__init__(table, link, mac, guest, port, IDLE_DNS)
        # Who may answer: its address on the host's side -> the one that the guest asked, which differs for the gateway.
        self.asked: dict[bytes, bytes] = {}
        self.path_keys: set[FlowKey] = set()  # of its paths in table.paths
        # Datagrams of the batch at hand that will leave in one call, and what they have in common.
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._segment = 0
        self._dst = self._target = b""
        self._port = self._ttl = 0
        self._dont_fragment = False
        self._largest_segment = MAX_SEGMENTS_BYTES  # what is larger goes alone

    # --- from the guest

    def send(self, payload: memoryview, dst: bytes, target: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        """Send one datagram, at once or with its like when the batch ends."""
        size = len(payload)
        self.bytes_from_guest += size
        pending = self._pending
        if pending:
            if (
                0 < size <= self._segment
                and dst == self._dst
                and port == self._port
                and ttl == self._ttl
                and dont_fragment is self._dont_fragment
                and len(pending) < MAX_SEGMENTS
                and self._pending_bytes + size <= MAX_SEGMENTS_BYTES
            ):
                pending.append(payload)
                self._pending_bytes += size
                if size < self._segment:  # none may follow a shorter one
                    self.flush()
                return
            self.flush()
        if self.sock.segments and 0 < size <= self._largest_segment:
            self._pending = [payload]
            self._pending_bytes = self._segment = size
            self._dst, self._target, self._port = dst, target, port
            self._ttl, self._dont_fragment = ttl, dont_fragment
            self.stack.touched.append(self)
        else:
            self._send_one(payload, dst, target, port, ttl, dont_fragment)

    def finish_batch(self, now: float) -> None:
        """The batch of frames ends, and with it the views into its buffer."""
        if self._pending:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        pending = self._pending
        self._pending = []
        dst, target, port, ttl, dont_fragment = self._dst, self._target, self._port, self._ttl, self._dont_fragment
        if len(pending) > 1 and self._send_segments(
            pending, len(pending), self._segment, target, port, ttl, dont_fragment
        ):
            return
        for payload in pending:
            self._send_one(payload, dst, target, port, ttl, dont_fragment)

    def send_run(
        self, payload: memoryview, size: int, dst: bytes, target: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        """Send datagrams of `size` bytes each, the last perhaps shorter, that lie one behind the other."""
        if self._pending:
            self.flush()
        self.bytes_from_guest += len(payload)
        step = min(MAX_SEGMENTS, MAX_SEGMENTS_BYTES // size) * size
        for at in range(0, len(payload), step or size):
            part = payload[at : at + (step or size)]
            count = -(-len(part) // size)
            if (
                count > 1
                and self.sock.segments
                and size <= self._largest_segment
                and self._send_segments((part,), count, size, target, port, ttl, dont_fragment)
            ):
                continue
            for first in range(0, len(part), size):
                self._send_one(part[first : first + size], dst, target, port, ttl, dont_fragment)

    def _send_segments(
        self,
        payloads: Sequence[Buffer],
        count: int,
        segment: int,
        target: bytes,
        port: int,
        ttl: int,
        dont_fragment: bool,
    ) -> bool:
        """Send `count` datagrams in one call; False: they must go one by one."""
        try:
            self.sock.send_segments(payloads, segment, target, port, ttl, dont_fragment)
        except OSError as error:
            if error.errno in BUSY:
                for _ in range(count):
                    self.stack.counters.drop("udp_host_queue_full")
                return True
            # Larger than the path's MTU, which the kernel does not do in this way, or a device that cannot do it; or
            # the echo of an ICMP error. One by one it will turn out.
            if error.errno in (errno.EINVAL, errno.EMSGSIZE):
                self._largest_segment = min(self._largest_segment, segment - 1)
            elif error.errno == errno.EIO:
                self._largest_segment = 0
            return False
        return True

    def _send_one(self, payload: Buffer, dst: bytes, target: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        try:
            self.sock.send_to(payload, target, port, ttl, dont_fragment)
        except OSError as error:
            self.on_send_error(error, payload, dst, target, port, ttl, dont_fragment)

    # --- from the host

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
        """Send to the guest the datagrams in scratch[start:end], of `size` bytes each, the last perhaps shorter."""
        src = self.asked.get(address)
        if src is None:
            self.stack.counters.drop("udp_unsolicited")
            return
        self.bytes_to_guest += end - start
        overhead = 28 if len(src) == 4 else 48
        offload = self.link.offload
        if offload is not None and offload.uso and end - start > size and 0 < size <= mtu - overhead:
            if end - start >= size * PAYS_FROM:
                self.sock.expect_bursts()
            run = self.table.scratch[start:end]
            queue_run(self.link, self.mac, self.stack.mac, src, port, self.guest, self.port, run, size)
            return
        if end - start >= size * PAYS_FROM and 0 < size <= mtu - overhead:
            self.sock.expect_bursts()
            whole = (end - start) // size * size
            payload = np.frombuffer(self.table.scratch, np.uint8, whole, start)
            self.link.queue_burst(
                write_burst(self.link, self.mac, self.stack.mac, src, port, self.guest, self.port, payload, size)
            )
            start += whole
        elif start == end:
            self._deliver_one(self.table.scratch[:0], src, port, mtu)
            return
        for at in range(start, end, size):
            self._deliver_one(self.table.scratch[at : min(at + size, end)], src, port, mtu)

    def _deliver_one(self, payload: memoryview, src: bytes, port: int, mtu: int) -> None:
        table = self.table
        guest = self.guest
        pair = table.pairs.get((src, guest))
        if pair is None:
            pair = table.remember_pair(src, guest)
        addresses, fixed_sum, pseudo = pair
        guest_port = self.port
        size = len(payload) + 8
        # The length counts twice: in the pseudo-header and in the header.
        check = 65535 - (pseudo + size + size + port + guest_port + sum_words(payload)) % 65535
        if len(guest) == 4:
            total = size + 20
            field = 65535 - (fixed_sum + total) % 65535
            head = _HEADERS4.pack(_FIRST4, total, _MIDDLE4, field, addresses, port, guest_port, size, check)
        else:
            total = size + 40
            head = _HEADERS6.pack(_FIRST6, size, _MIDDLE6, addresses, port, guest_port, size, check)
        if total > mtu:
            self.stack.send_udp(self.link, self.mac, src, port, guest, guest_port, payload)
        elif total <= _JOINED:
            self.stack.send_ip(self.link, self.mac, head + payload)
        else:
            # A copy, because the link may keep it until the kernel takes it, and scratch is used again at once.
            self.stack.send_ip(self.link, self.mac, head, bytes(payload))

    # --- errors

    def as_asked(self, address: bytes) -> bytes:
        return self.asked.get(address) or super().as_asked(address)

    def rebuild(self, dst: bytes, port: int, payload: Buffer, ttl: int) -> bytes:
        return write_packet(self.guest, self.port, dst, port, payload, ttl)


class UdpPath:
    """One guest endpoint and one peer that it is allowed to reach: what the stack's fast path finds for a frame."""

    __slots__ = ("_dst", "_port", "_target", "flow", "mac_low")

    def __init__(self, flow: UdpFlow, dst: bytes, target: bytes, port: int) -> None:
        self.flow = flow
        self.mac_low = int.from_bytes(flow.mac[2:], "big")  # as the fast path has it at hand (Stack._receive)
        self._dst = dst
        self._target = target
        self._port = port

    def send(self, payload: memoryview, ttl: int, dont_fragment: bool, now: float) -> None:
        """Like UdpFlows.on_datagram(), for a TTL of 2 or more. Untrusted."""
        flow = self.flow
        if now - flow.used_at >= RESOLUTION:
            flow.table.touch(flow, now)
        if flow.asked.get(self._target) != self._dst:
            flow.table.remember_asked(flow, self._target, self._dst)
        flow.send(payload, self._dst, self._target, self._port, ttl - 1, dont_fragment)

    def send_run(self, payload: memoryview, size: int, ttl: int, dont_fragment: bool, now: float) -> None:
        """The same for datagrams of `size` bytes each, that lie one behind the other. Untrusted."""
        flow = self.flow
        if now - flow.used_at >= RESOLUTION:
            flow.table.touch(flow, now)
        if flow.asked.get(self._target) != self._dst:
            flow.table.remember_asked(flow, self._target, self._dst)
        flow.send_run(payload, size, self._dst, self._target, self._port, ttl - 1, dont_fragment)


class UdpFlows(DatagramFlows[UdpFlow]):
    """All UDP flows, and what they share."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack, "udp")
        self._asked = 0  # the sum of len(flow.asked)
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
        if len(self.paths) >= _PATHS:
            self.forget_paths()
        key = flow_key(src, src_port, dst, dst_port)
        self.paths[key] = UdpPath(flow, dst, target, dst_port)
        flow.path_keys.add(key)
        # Last: an error that goes to the guest may find its link gone, and close this flow.
        if segment:
            flow.send_run(payload, segment, dst, target, dst_port, ttl, dont_fragment)
        else:
            flow.send(payload, dst, target, dst_port, ttl, dont_fragment)

    def forget_paths(self) -> None:
        """Have every datagram take the slow road again: there are too many paths, or what is allowed has changed."""
        self.paths.clear()
        for flow in self.flows.values():
            flow.path_keys.clear()

    def on_error_from_guest(self, guest: bytes, port: int) -> None:
        """A guest sent an ICMP error about a datagram that went to this endpoint of it. Untrusted.

        Nothing follows from it: the peer cannot be told, and that the guest's socket is closed does not tell whether
        it will be opened again, so the flow stays until it is idle.
        """
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
        fixed_sum = _FIXED_SUM4 + sum_words(src) + sum_words(guest)
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
