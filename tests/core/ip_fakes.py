"""A stack, a host and a link for the tests of UDP, ICMP and reassembly: they record, and do what the test says."""

from __future__ import annotations

import errno
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

from netstack.core.addresses import Addresses
from netstack.core.counters import Counters
from netstack.core.flows import Limits
from netstack.core.ports import (
    MAX_SEGMENTS,
    MAX_SEGMENTS_BYTES,
    READABLE,
    Buffer,
    Capture,
    DatagramListener,
    DrainWaiter,
    Events,
    Handler,
    Host,
    HostSocket,
    Link,
    Offload,
    SocketError,
)
from netstack.core.reassembly import fragment
from netstack.core.timers import Timers
from netstack.core.udp import UdpFlows
from netstack.wire.icmp import Problem, write_error
from netstack.wire.ipv4 import PROTOCOL_UDP, write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.udp import write_udp

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

GUEST4 = bytes((192, 168, 5, 15))
GATEWAY4 = bytes((192, 168, 5, 2))
WORLD4 = bytes((198, 51, 100, 7))
ROUTER4 = bytes((203, 0, 113, 1))
GUEST6 = bytes.fromhex("fd00c0a8000500000000000000000015")
GATEWAY6 = bytes.fromhex("fd00c0a8000500000000000000000002")
LINK_LOCAL6 = bytes.fromhex("fe800000000000005055c0fffea80502")  # of the gateway
WORLD6 = bytes.fromhex("20010db8000000000000000000000007")
ROUTER6 = bytes.fromhex("20010db8000000000000000000000001")
LOOPBACK4 = bytes((127, 0, 0, 1))
LOOPBACK6 = bytes(15) + b"\1"
MAC = bytes.fromhex("525400123456")


class FakeLink:
    """A link on which only bursts are queued: FakeStack keeps the other packets."""

    def __init__(self, name: str = "link") -> None:
        self.name = name
        self.mtu = 65520
        self.prefix = 4
        self.backlog = 0
        self.congested = False
        self.macs_high = self.macs_low = 0
        self.known_macs: set[tuple[int, int]] = set()
        self.interface = 0
        self.capture: Capture | None = None
        self.offload: Offload | None = None
        self.direct = False
        self.waiters: list[DrainWaiter] = []
        self.bursts: list[NDArray[uint8]] = []

    def forget_macs(self) -> None:
        raise NotImplementedError

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        buffer[: self.prefix] = frame_length.to_bytes(self.prefix, "big")

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        raise NotImplementedError

    def queue_burst(self, frames: NDArray[uint8]) -> None:
        self.bursts.append(frames)

    def flush(self) -> None:
        raise NotImplementedError

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        raise NotImplementedError

    def commit(self, head: Buffer, length: int) -> None:
        raise NotImplementedError

    def wait_drained(self, waiter: DrainWaiter) -> None:
        self.waiters.append(waiter)

    def drain(self, now: float) -> None:
        self.congested = False
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.on_drained(now)


@dataclass
class Sent:
    """One datagram that the core gave to the host."""

    payload: bytes
    address: bytes
    port: int
    ttl: int
    dont_fragment: bool


class FakeDatagramSocket:
    """A host socket whose other side is the test."""

    def __init__(self, fd: int, *, segments: bool = False) -> None:
        self.fd = fd
        self.sent: list[Sent] = []
        self.incoming: deque[tuple[bytes, bytes, int] | tuple[bytes, bytes, int, int] | OSError] = deque()
        self.errors: deque[SocketError] = deque()
        self.failures: deque[OSError | None] = deque()  # of the next sends
        self._closed = False
        self.segments = segments
        self.batches = False
        self.segment_failures: deque[OSError | None] = deque()
        self.bursts_expected = False
        self.calls = 0

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert not self._closed
        self._closed = True

    def is_closed(self) -> bool:
        return self._closed

    def bound_port(self) -> int:
        return self.fd  # any

    def send_to(self, payload: Buffer, address: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        assert not self._closed
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure
        self.calls += 1
        self.sent.append(Sent(bytes(payload), address, port, ttl, dont_fragment))

    def send_segments(
        self, payloads: Sequence[Buffer], segment: int, address: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        assert self.segments
        whole = b"".join(payloads)  # as the kernel takes it: where one ends does not matter
        datagrams = [whole[at : at + segment] for at in range(0, len(whole), segment)]
        assert 1 < len(datagrams) <= MAX_SEGMENTS
        assert len(whole) <= MAX_SEGMENTS_BYTES
        assert len(payloads) in (1, len(datagrams))
        self.calls += 1
        failure = self.segment_failures.popleft() if self.segment_failures else None
        if failure is not None:
            raise failure
        for payload in datagrams:
            self.sent.append(Sent(payload, address, port, ttl, dont_fragment))

    def expect_bursts(self) -> None:
        self.bursts_expected = True

    def receive_from(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        assert not self._closed
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        item = self.incoming.popleft()
        if isinstance(item, OSError):
            raise item
        payload, address, port, *segment = item
        assert len(buffer) >= 65536
        buffer[: len(payload)] = payload
        return len(payload), segment[0] if segment else len(payload), address, port

    def receive_batch(self, buffer: memoryview, take: Callable[[int, int, bytes, int], None]) -> int:
        """All that is there, in runs of one peer and size."""
        assert self.batches
        count = 0
        for (size, address, port), group in itertools.groupby(self._arrived(), lambda each: (len(each[0]), *each[1:])):
            payloads = [payload for payload, _, _ in group]
            count += len(payloads)
            whole = b"".join(payloads)
            buffer[: len(whole)] = whole
            take(len(whole), size, address, port)
        return count

    def _arrived(self) -> Iterator[tuple[bytes, bytes, int]]:
        while self.incoming:
            item = self.incoming.popleft()
            if isinstance(item, OSError):
                raise item
            yield item[0], item[1], item[2]

    def receive_error(self) -> SocketError | None:
        return self.errors.popleft() if self.errors else None


class FakeHost:
    """Opens fake sockets, or fails as told."""

    def __init__(self) -> None:
        self.udp: list[tuple[bytes, int, FakeDatagramSocket]] = []
        self.ping: list[FakeDatagramSocket] = []
        self.failures: deque[OSError] = deque()
        self.segments = False
        self._fd = 100

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        raise NotImplementedError

    def is_connected(self, sock: HostSocket) -> bool:
        raise NotImplementedError

    def connect_error(self, sock: HostSocket) -> int:
        raise NotImplementedError

    def reset(self, sock: HostSocket) -> None:
        raise NotImplementedError

    def open_udp(self, address: bytes, port: int) -> FakeDatagramSocket:
        sock = self._open()
        self.udp.append((address, port, sock))
        return sock

    def listen_udp(self, host: str, port: int) -> Sequence[DatagramListener]:
        raise NotImplementedError

    def open_ping(self, address: bytes) -> FakeDatagramSocket:
        sock = self._open()
        self.ping.append(sock)
        return sock

    def _open(self) -> FakeDatagramSocket:
        if self.failures:
            raise self.failures.popleft()
        self._fd += 1
        return FakeDatagramSocket(self._fd, segments=self.segments)


class FakePoller:
    """Keeps what is registered, strictly: registering twice or forgetting nothing is a mistake."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self.events: dict[int, int] = {}

    def register(self, fd: int, handler: Handler, events: int) -> None:
        assert fd not in self.handlers
        self.handlers[fd] = handler
        self.events[fd] = events

    def modify(self, fd: int, events: int) -> None:
        assert fd in self.handlers
        self.events[fd] = events

    def unregister(self, fd: int) -> None:
        del self.handlers[fd]
        del self.events[fd]

    def ready(self, fd: int, now: float, events: int = READABLE) -> None:
        self.handlers[fd].on_ready(events, now)


@dataclass
class SentError:
    """One ICMP error that the core asked for, and the packet that wire.icmp makes of it."""

    src: bytes | None
    packet: bytes
    problem: Problem
    parameter: int
    written: bytes | None


@dataclass
class FakeEvents:
    """Remembers what it was told."""

    debug: bool = True
    lines: list[tuple[Any, ...]] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None:
        self.lines.append(("opened", protocol, guest, peer))

    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None:
        self.lines.append(("closed", protocol, guest, peer, why, from_guest, to_guest))

    def warning(self, key: str, message: str, **fields: object) -> None:
        self.warnings[key] += 1

    def info(self, message: str, **fields: object) -> None:
        self.lines.append(("info", message))


def addresses(*, host_loopback: bool = True) -> Addresses:
    """The default network of interface.md."""
    return Addresses(
        bytes.fromhex("5255c0a80502"),
        IPv4Network("192.168.5.0/24"),
        GATEWAY4,
        GATEWAY4[:3] + b"\3",
        IPv6Network("fd00:c0a8:5::/64"),
        GATEWAY6,
        GATEWAY6[:15] + b"\3",
        host_loopback,
    )


class FakeStack:
    """Satisfies core.datagrams.Stack."""

    def __init__(self, host: Host | None = None) -> None:
        self.counters = Counters()
        self.timers = Timers()
        self.poller = FakePoller()
        self.fake_host = FakeHost()
        self.host: Host = host or self.fake_host
        self.recorded = FakeEvents()
        self.events: Events | None = self.recorded
        self.limits = Limits()
        self.mtu = 65520
        self.addresses = addresses()
        self.mac = self.addresses.mac
        self.touched: list[Any] = []
        self.denied: set[bytes] = set()
        self.blocked_udp: frozenset[int] = frozenset()
        self.udp = UdpFlows(self)
        self.ident = 0
        self.packets: list[tuple[Link, bytes, bytes]] = []
        self.errors: list[SentError] = []

    def on_syn_refused(self, guest: bytes, guest_port: int, peer: bytes, peer_port: int, seq: int) -> bool:
        return False  # no connections here

    def send_ip(self, link: Link, mac: bytes, packet: bytes, payload: Buffer | None = None) -> None:
        self.packets.append((link, mac, packet if payload is None else packet + bytes(payload)))

    def send_error(
        self, link: Link, mac: bytes, src: bytes | None, packet: Buffer, problem: Problem, parameter: int = 0
    ) -> None:
        packet = bytes(packet)
        sender = packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
        written = write_error(src or self.addresses.router_for(sender), packet, problem, parameter)
        self.errors.append(SentError(src, packet, problem, parameter, written))

    def send_udp(
        self, link: Link, mac: bytes, src: bytes, src_port: int, dst: bytes, dst_port: int, payload: Buffer
    ) -> None:
        body = write_udp(src, dst, src_port, dst_port, payload)
        self.send_transport(link, mac, src, dst, PROTOCOL_UDP, body)

    def send_transport(self, link: Link, mac: bytes, src: bytes, dst: bytes, protocol: int, body: bytes) -> None:
        head = (write_ipv4 if len(dst) == 4 else write_ipv6)(src, dst, protocol, len(body))
        self.ident += 1
        for packet in fragment(head + body, self.mtu, self.ident):
            self.send_ip(link, mac, packet)

    def to_host(self, dst: bytes) -> bytes | None:
        return None if dst in self.denied else self.addresses.to_host(dst)

    def from_host(self, address: bytes) -> bytes:
        return self.addresses.from_host(address)

    def guest_mtu(self, address: bytes) -> int:
        return self.mtu

    def is_gateway(self, address: bytes) -> bool:
        return address in self.addresses.own

    # --- for the tests

    @property
    def drops(self) -> Counter[str]:
        return Counter(self.counters.drops)

    def advance(self, now: float) -> None:
        """Let the timers run until `now`, as the rim would: at each deadline."""
        while self.timers.next_deadline() <= now:
            self.timers.run(self.timers.next_deadline())
        self.timers.run(now)

    def end_batch(self, now: float) -> None:
        """The batch of frames at hand is over."""
        touched, self.touched = self.touched, []
        for flow in touched:
            flow.finish_batch(now)

    def taken(self) -> list[bytes]:
        """The packets sent to guests since the last call."""
        packets, self.packets = self.packets, []
        return [packet for _, _, packet in packets]

    def taken_errors(self) -> list[SentError]:
        errors, self.errors = self.errors, []
        return errors


def in_buffer(payload: bytes, before: int = 42, after: int = 4) -> tuple[memoryview, int, int]:
    """The payload somewhere within a larger buffer, as it lies in a frame."""
    return memoryview(b"\xaa" * before + payload + b"\xbb" * after), before, before + len(payload)
