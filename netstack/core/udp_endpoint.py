"""One UDP endpoint of a guest: datagrams into a host socket by the batch, and frames to the guest by the run.

What `core.udp` (guests that ask the world) and `core.udp_forwards` (callers of the host's ports) have in common is the
hot path of both, and it is here. Who owns the socket, and how one conversation is told from another, is theirs.

Datagrams of one size to one peer, as of a stream, are held back until the batch of frames at hand ends, and leave in
one call, which the kernel takes apart (UDP_SEGMENT: 0.5 us a datagram in place of 3.3 with a call for each, over the
loopback). Toward the guest, a run of datagrams of one size becomes frames by array arithmetic (`core.udp_bursts`),
others by one packed header and one checksum each.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import Struct
from typing import Any, ClassVar, Protocol

import numpy as np

from netstack.core.datagrams import BUSY, RESOLUTION, DatagramFlow, Owner
from netstack.core.ports import MAX_SEGMENTS, MAX_SEGMENTS_BYTES, Buffer, Link
from netstack.core.udp_bursts import PAYS_FROM, queue_run, write_burst
from netstack.wire.checksum import sum_words
from netstack.wire.ipv4 import PROTOCOL_UDP, write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.udp import write_udp

_TTL = 64

# IPv4: version+IHL+TOS 2 | total length 2 | identification 2, DF 2, TTL 1, protocol 1 | checksum 2 | addresses 8
# UDP: source port 2 | destination port 2 | length 2 | checksum 2
_HEADERS4 = Struct("!2sH6sH8sHHHH")
_FIRST4 = b"\x45\x00"
# An atomic datagram: DF and identification 0 (RFC 6864 4.1).
_MIDDLE4 = bytes((0, 0, 0x40, 0, _TTL, PROTOCOL_UDP))
FIXED_SUM4 = 0x4500 + 0x4000 + (_TTL << 8 | PROTOCOL_UDP)
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


class UdpTable(Owner, Protocol):
    """What owns UDP endpoints."""

    scratch: memoryview  # what was received last
    # (peer, guest) -> both as they stand in the header toward the guest, the sum of the fixed part of its IPv4
    # header, the sum of the pseudo-header without the length
    pairs: dict[tuple[bytes, bytes], tuple[bytes, int, int]]

    def remember_pair(self, src: bytes, guest: bytes) -> tuple[bytes, int, int]:
        """Compute and keep the constant parts of the headers of what comes from this address to this guest."""
        ...

    def remember_asked(self, flow: Any, target: bytes, dst: bytes) -> None:
        """The guest has sent to `dst`, which is `target` on the host's side."""


class UdpEndpoint(DatagramFlow):
    """One UDP endpoint of a guest, and a host socket through which it is reached and reaches others."""

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
        "udp",
    )

    protocol: ClassVar[str] = "udp"

    def __init__(self, table: UdpTable, link: Link, mac: bytes, guest: bytes, port: int, timeout: float) -> None:
        super().__init__(table, link, mac, guest, port, timeout)
        self.udp = table
        # Who may answer: its address on the host's side -> the one that the guest asked, which differs for the gateway.
        self.asked: dict[bytes, bytes] = {}
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

    def deliver(self, start: int, end: int, size: int, src: bytes, port: int, mtu: int) -> None:
        """Send to the guest the datagrams in scratch[start:end], of `size` bytes each, the last perhaps shorter.

        They come from src:port, as the guest sees it, in packets of at most `mtu` bytes.
        """
        self.bytes_to_guest += end - start
        overhead = 28 if len(src) == 4 else 48
        offload = self.link.offload
        if offload is not None and offload.uso and end - start > size and 0 < size <= mtu - overhead:
            if end - start >= size * PAYS_FROM:
                self.sock.expect_bursts()
            run = self.udp.scratch[start:end]
            queue_run(self.link, self.mac, self.stack.mac, src, port, self.guest, self.port, run, size)
            return
        if end - start >= size * PAYS_FROM and 0 < size <= mtu - overhead:
            self.sock.expect_bursts()
            whole = (end - start) // size * size
            payload = np.frombuffer(self.udp.scratch, np.uint8, whole, start)
            self.link.queue_burst(
                write_burst(self.link, self.mac, self.stack.mac, src, port, self.guest, self.port, payload, size)
            )
            start += whole
        elif start == end:
            self._deliver_one(self.udp.scratch[:0], src, port, mtu)
            return
        for at in range(start, end, size):
            self._deliver_one(self.udp.scratch[at : min(at + size, end)], src, port, mtu)

    def _deliver_one(self, payload: memoryview, src: bytes, port: int, mtu: int) -> None:
        table = self.udp
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

    def __init__(self, flow: UdpEndpoint, dst: bytes, target: bytes, port: int) -> None:
        self.flow = flow
        self.mac_low = int.from_bytes(flow.mac[2:], "big")  # as the fast path has it at hand (Stack._receive)
        self._dst = dst
        self._target = target
        self._port = port

    def send(self, payload: memoryview, ttl: int, dont_fragment: bool, now: float) -> None:
        """Like UdpFlows.on_datagram(), for a TTL of 2 or more. Untrusted."""
        flow = self.flow
        if now - flow.used_at >= RESOLUTION:
            flow.udp.touch(flow, now)
        if flow.asked.get(self._target) != self._dst:
            flow.udp.remember_asked(flow, self._target, self._dst)
        flow.send(payload, self._dst, self._target, self._port, ttl - 1, dont_fragment)

    def send_run(self, payload: memoryview, size: int, ttl: int, dont_fragment: bool, now: float) -> None:
        """The same for datagrams of `size` bytes each, that lie one behind the other. Untrusted."""
        flow = self.flow
        if now - flow.used_at >= RESOLUTION:
            flow.udp.touch(flow, now)
        if flow.asked.get(self._target) != self._dst:
            flow.udp.remember_asked(flow, self._target, self._dst)
        flow.send_run(payload, size, self._dst, self._target, self._port, ttl - 1, dont_fragment)
