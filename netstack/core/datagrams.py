"""What UDP flows and ping flows have in common: one host socket per guest endpoint, errors, idle time, caps.

Theory of operation
-------------------
A `DatagramFlow` joins one endpoint of a guest, (address, port) or (address, echo identifier), to one unconnected host
socket, through which that endpoint talks to any number of peers (endpoint-independent mapping, RFC 4787 REQ-1). The
guest's datagrams go straight into the socket; what the socket receives goes to where the guest was last seen. There is
no queue on either side: the host's socket buffer is the queue toward the guest, and while the guest's link is congested
the flow does not read from it.

What the host learns of a datagram's fate comes back to the guest as the ICMP message that a router would have sent. It
comes on two ways: as the errno of the send itself, or later, through the socket's error queue. Both meet in one place
because of a fact about Linux: an ICMP error that has come in is also raised, once, by the *next* call on the socket,
which may concern another peer. So after a failed send the error queue is read first. If an ICMP error lay in it, the
errno was its echo, and the send is tried once more.

Counted as dropped (`protocol` is "udp" or "ping"): protocol_flow_evicted, protocol_no_socket, protocol_denied,
protocol_ttl_exceeded, protocol_too_big, protocol_host_queue_full, protocol_host_refused.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from netstack.core.ports import FAILED, READABLE, Buffer, DatagramSocket, Events, Host, Link, Poller, SocketError
from netstack.core.timers import NEVER, Timers
from netstack.wire.icmp import (
    HOST_UNREACHABLE,
    NO_ROUTE,
    PARAMETER_PROBLEM,
    PARAMETER_PROBLEM6,
    PORT_UNREACHABLE,
    PROHIBITED,
    TIME_EXCEEDED,
    TIME_EXCEEDED6,
    TOO_BIG,
    TOO_BIG6,
    UNREACHABLE,
    UNREACHABLE6,
    Problem,
)

# Datagrams read from one flow in one wakeup, then others get their turn: about one full link buffer at MTU 1500.
BURST = 64

# Errors taken off one socket's queue at a time. The kernel bounds the queue by the receive buffer.
_ERROR_BURST = 32

# How exact the order of use, and with it the idle time, is kept, in seconds.
RESOLUTION = 1.0

# RFC 1191 7.1: path MTUs met in practice. Used where the host says "too big" and does not say how big.
_PLATEAUS = (32000, 17914, 8166, 4352, 2002, 1492, 1280, 1006, 508, 296, 68)

# What errno of a send the guest is told in which words. Not in the table: nothing that a router would say.
PROBLEMS = {
    errno.ECONNREFUSED: PORT_UNREACHABLE,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.EHOSTDOWN: HOST_UNREACHABLE,
    errno.ENETUNREACH: NO_ROUTE,
    errno.ENETDOWN: NO_ROUTE,
    errno.EADDRNOTAVAIL: NO_ROUTE,  # IPv6: the host has no source address for this destination
    errno.EAFNOSUPPORT: NO_ROUTE,  # the host has no IPv6
    errno.EPERM: PROHIBITED,  # the host's packet filter
    # A "prohibit" route, a broadcast address of the host's network, or a kind of socket that the host forbids.
    errno.EACCES: PROHIBITED,
    errno.EPROTONOSUPPORT: PROHIBITED,
}

# The kernel has no room at the moment.
BUSY = frozenset((errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ENOMEM))

# The ICMP errors that are passed on: a source quench is obsolete (RFC 6633), a redirect is the host's own business.
_RELAYED4 = frozenset((UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM))
_RELAYED6 = frozenset((UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6, PARAMETER_PROBLEM6))


class Counters(Protocol):
    """Counts what was dropped, by reason."""

    def drop(self, reason: str, /) -> None: ...


class Limits(Protocol):
    """The caps that datagram flows obey."""

    @property
    def udp_flows(self) -> int: ...
    @property
    def udp_flows_per_guest(self) -> int: ...
    @property
    def ping_flows(self) -> int: ...


class Stack(Protocol):
    """What UDP and ICMP ask of the stack."""

    mac: bytes  # the gateway's
    blocked_udp: frozenset[int]  # ports of the world that guests' datagrams may not go to
    touched: list[Any]  # flows with a finish_batch(now), to be called when the batch of frames at hand ends

    @property
    def counters(self) -> Counters: ...
    @property
    def timers(self) -> Timers: ...
    @property
    def poller(self) -> Poller: ...
    @property
    def host(self) -> Host: ...
    @property
    def events(self) -> Events | None: ...
    @property
    def limits(self) -> Limits: ...

    def send_ip(self, link: Link, mac: bytes, packet: bytes, payload: Buffer | None = None) -> None:
        """One IP packet to this guest; `payload`, where given, is its tail."""

    def send_udp(
        self, link: Link, mac: bytes, src: bytes, src_port: int, dst: bytes, dst_port: int, payload: Buffer
    ) -> None:
        """One UDP datagram to this guest, fragmented to its MTU where needed."""

    def send_transport(self, link: Link, mac: bytes, src: bytes, dst: bytes, protocol: int, body: bytes) -> None:
        """A transport header and payload to this guest, fragmented to its MTU where needed."""

    def send_error(
        self, link: Link, mac: bytes, src: bytes | None, packet: Buffer, problem: Problem, parameter: int = 0
    ) -> None:
        """An ICMP error about this packet of the guest's, from `src`; None: from the gateway's address of its family.

        Sends nothing where wire.icmp.write_error forbids an error.
        """

    def to_host(self, dst: bytes) -> bytes | None:
        """Where the host must send for this destination of a guest's; None when that is not allowed."""

    def from_host(self, address: bytes) -> bytes:
        """The address by which guests know this address of the host's side."""
        ...

    def guest_mtu(self, address: bytes) -> int:
        """The largest IP packet that this guest is known to take."""
        ...

    def is_gateway(self, address: bytes) -> bool:
        """Whether this is one of the gateway's own addresses, its DNS and link-local addresses included."""
        ...


class Owner(Protocol):
    """What flows belong to."""

    @property
    def stack(self) -> Stack: ...

    def touch(self, flow: Any, now: float) -> None:
        """The flow is in use; to be called when its used_at is older than RESOLUTION."""

    def close(self, flow: Any, now: float, why: str) -> None:
        """End the flow and forget it."""


class ErrorQueue(Protocol):
    """A socket, as far as its errors go."""

    def receive_error(self) -> SocketError | None: ...


def take_errors(sock: ErrorQueue, relay: Callable[[SocketError], None]) -> tuple[int, int]:
    """Have `relay` pass on the ICMP errors of a socket: how many; the MTU for which the host refused a send, or 0."""
    relayed = mtu = 0
    for _ in range(_ERROR_BURST):
        error = sock.receive_error()
        if error is None:
            break
        if error.offender is not None:
            relayed += 1
            relay(error)
        elif error.errno == errno.EMSGSIZE:
            mtu = error.mtu
    return relayed, mtu


class DatagramFlow:
    """One guest endpoint and its host socket. Subclasses know the protocol."""

    __slots__ = (
        "_waiting",
        "bytes_from_guest",
        "bytes_to_guest",
        "closed",
        "guest",
        "heap_at",
        "link",
        "mac",
        "opened_at",
        "peer",
        "port",
        "sock",
        "stack",
        "table",
        "timeout",
        "timer_at",
        "used_at",
    )

    protocol: ClassVar[str]

    def __init__(self, table: Owner, link: Link, mac: bytes, guest: bytes, port: int, timeout: float) -> None:
        self.table = table
        self.stack = table.stack
        self.link = link  # where the guest was last seen
        self.mac = mac
        self.guest = guest
        self.port = port  # of echo: the identifier
        self.timeout = timeout  # seconds without a datagram in either direction
        self.sock: DatagramSocket
        self.peer: tuple[bytes, int] = (b"", 0)  # the first one, for lists and logs
        self.closed = False
        self.opened_at = self.used_at = 0.0
        self.timer_at = self.heap_at = NEVER
        self.bytes_from_guest = 0
        self.bytes_to_guest = 0
        self._waiting = False

    def receive(self, mtu: int, now: float) -> None:
        """Pass on what the socket has received, in packets of at most `mtu` bytes: a bounded amount of it."""
        raise NotImplementedError

    def rebuild(self, dst: bytes, port: int, payload: Buffer, ttl: int) -> bytes:
        """The IP packet by which the guest must have sent this, to be quoted in an ICMP error. b"" when unknown."""
        raise NotImplementedError

    def as_asked(self, address: bytes) -> bytes:
        """The address by which the guest knows this address on the host's side."""
        return self.stack.from_host(address)

    # --- from the host

    def on_ready(self, events: int, now: float) -> None:
        """Pass on what has come from the host, up to BURST datagrams."""
        if events & FAILED:
            self.drain_errors()
        if not events & READABLE or self.closed:
            return
        if self._wait_for_link():
            return
        if now - self.used_at >= RESOLUTION:
            self.table.touch(self, now)
        self.receive(min(self.stack.guest_mtu(self.guest), self.link.mtu), now)
        self._wait_for_link()

    def _wait_for_link(self) -> bool:
        """While the link is congested, leave what comes in the socket's buffer, where the kernel bounds it."""
        if not self.link.congested:
            return False
        if not self._waiting:
            self._waiting = True
            self.stack.poller.modify(self.sock.fileno(), 0)
            self.link.wait_drained(self)
        return True

    def on_drained(self, now: float) -> None:
        if self._waiting:
            self._waiting = False
            if not self.closed:
                self.stack.poller.modify(self.sock.fileno(), READABLE)

    def drain_errors(self) -> tuple[int, int]:
        """Pass on what is in the error queue: how many ICMP errors; the MTU for which the host refused a send, or 0."""
        return take_errors(self.sock, self._relay)

    def _relay(self, error: SocketError) -> None:
        """Send an ICMP error on to the guest, from the address of whoever sent it."""
        offender = error.offender
        assert offender is not None
        relayed = _RELAYED4 if len(self.guest) == 4 else _RELAYED6
        if error.icmp_type not in relayed or len(offender) != len(self.guest):
            return
        stack = self.stack
        # The packet had its last hop before it when a router dropped it for its TTL; otherwise nobody looks.
        packet = self.rebuild(self.as_asked(error.destination), error.port, error.payload, 1)
        if packet:
            kind, code = error.icmp_type, error.icmp_code
            problem = Problem(kind, code, kind, code)
            stack.send_error(self.link, self.mac, self.as_asked(offender), packet, problem, error.mtu)

    # --- from the guest, off the hot path

    def on_send_error(
        self, error: OSError, payload: Buffer, dst: bytes, target: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        """A send failed: try once more where that was another datagram's fault, else tell the guest."""
        if error.errno in BUSY:
            self.stack.counters.drop(f"{self.protocol}_host_queue_full")
            return
        relayed, mtu = self.drain_errors()
        if relayed and not mtu:
            try:
                self.sock.send_to(payload, target, port, ttl, dont_fragment)
            except OSError as second:
                error = second
                mtu = self.drain_errors()[1]
            else:
                return
        self.refuse(error.errno or 0, mtu, dst, port, payload, ttl)

    def refuse(
        self, code: int, mtu: int, dst: bytes, port: int, payload: Buffer, ttl: int, reason: str = "host_refused"
    ) -> None:
        """Count, and tell the guest why the host did not take its datagram."""
        stack = self.stack
        packet = self.rebuild(dst, port, payload, ttl)
        if code == errno.EMSGSIZE:
            stack.counters.drop(f"{self.protocol}_too_big")
            if not mtu:
                mtu = next((plateau for plateau in _PLATEAUS if plateau < len(packet)), _PLATEAUS[-1])
            # RFC 8200 5: no path has less over IPv6.
            stack.send_error(self.link, self.mac, None, packet, TOO_BIG, mtu if len(dst) == 4 else max(mtu, 1280))
            return
        stack.counters.drop(f"{self.protocol}_{reason}")
        problem = PROBLEMS.get(code)
        if problem is not None:
            stack.send_error(self.link, self.mac, None, packet, problem)

    # --- time

    def on_timer(self, now: float) -> None:
        due = self.used_at + self.timeout + RESOLUTION
        if due <= now:
            self.table.close(self, now, "idle")
        else:
            self.stack.timers.arm(self, due)


def format_endpoint(address: bytes, port: int) -> str:
    """For lists and logs: 192.168.5.15:53, [fd00::15]:53."""
    text = str(ipaddress.ip_address(address)) if address else ""
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"
