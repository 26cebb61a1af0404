"""The ports of the core: what it asks of the rim, and what the rim may ask of it.

The core never imports trio, socket, select or time. It is handed objects of these shapes: the host's poller and sockets
(`netstack.host`) and the links of guests (`netstack.vde`). Tests hand it fakes of the same shapes.

Addresses are `bytes` (4 for IPv4, 16 for IPv6), MACs are `bytes` of 6, times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

# Readiness bits: the values of EPOLLIN, EPOLLOUT, EPOLLERR and EPOLLHUP (include/uapi/linux/eventpoll.h), so that on
# Linux a poller passes the kernel's mask on as it is.
READABLE = 0x001
WRITABLE = 0x004
FAILED = 0x008
HUNG_UP = 0x010
# EPOLLRDHUP: with READABLE, the peer will send no more, so that behind what there is to read is the end. A hint, which
# comes without being asked for, or not at all.
PEER_CLOSED = 0x2000

SHUT_WR = 1  # socket.SHUT_WR, the same on every system netstack runs on (POSIX names it, all give it 1)

# What one call of DatagramSocket.send_segments() takes: UDP_MAX_SEGMENTS of kernels before 6.9 (include/linux/udp.h),
# and what fits into one IP packet of either family.
MAX_SEGMENTS = 64
MAX_SEGMENTS_BYTES = 65000

# One frame, or a part of one, ready to be sent.
Buffer = bytes | bytearray | memoryview


class Handler(Protocol):
    """Whatever a poller wakes when its file descriptor is ready."""

    def on_ready(self, events: int, now: float) -> None:
        """Do a bounded amount of work for these readiness bits."""


class Poller(Protocol):
    """The one owner of fd -> handler. Level-triggered."""

    def register(self, fd: int, handler: Handler, events: int) -> None:
        """Begin to watch fd."""

    def modify(self, fd: int, events: int) -> None:
        """Change the events of interest; FAILED and HUNG_UP are always reported."""

    def unregister(self, fd: int) -> None:
        """Stop to watch fd; must come before its close()."""


class HostSocket(Protocol):
    """A non-blocking host socket; the subset of `socket.socket` that flows use. BlockingIOError means try later."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def send(self, data: Any, /) -> int: ...
    def sendmsg(self, buffers: Sequence[Any], /) -> int: ...
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int: ...
    def recvmsg_into(self, buffers: list[memoryview], /) -> tuple[int, Any, int, Any]: ...


class DatagramSocket(Protocol):
    """A non-blocking host UDP or ping socket, not connected: one guest endpoint talks to many peers through it."""

    segments: bool  # whether there is send_segments()
    batches: bool  # whether receive_batch() pays at the moment

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def bound_port(self) -> int:
        """The port of the host that it has."""
        ...

    def send_to(self, payload: Buffer, address: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        """Send one datagram.

        Raises BlockingIOError when the kernel's queue is full, OSError (errno) when the host refuses it.
        """

    def send_segments(
        self, payloads: Sequence[Buffer], segment: int, address: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        """Send several datagrams to one peer in one call; all have `segment` bytes, but the last may be shorter.

        At most MAX_SEGMENTS and MAX_SEGMENTS_BYTES. Only where `segments` is true (Linux: UDP_SEGMENT). Raises like
        send_to(), and then none was sent; EINVAL, EMSGSIZE and EIO may mean that only this way is barred.
        """

    def receive_from(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        """Receive: how many bytes (bytes beyond the buffer are lost), of datagrams of how many, from where.

        Where the kernel merged several datagrams of one peer into one (Linux: UDP_GRO), all but the last have as many
        bytes as the second number says; otherwise both numbers are the same.
        Raises BlockingIOError when there is none.
        """
        ...

    def expect_bursts(self) -> None:
        """Datagrams of one size arrive by the dozen: have the kernel merge them, if it can."""

    def receive_batch(self, buffer: memoryview, take: Callable[[int, int, bytes, int], None]) -> int:
        """Receive several datagrams in one call; how many.

        For each run of them of one peer and one size, these lie one behind the other at the start of `buffer`, and
        take(length, size, address, port) is called. Only while `batches` is true. Raises OSError, but not
        BlockingIOError.
        """
        ...

    def receive_error(self) -> SocketError | None:
        """Take the next error off the socket's error queue (Linux IP_RECVERR); None when there is none."""


Caller = tuple[bytes, int, bytes, int]
"""Who sent to a port of the host: its address and port; the address that it sent to, b"" where the socket is bound to
one and knows; and the interface, where the caller's address is link-local, else 0."""


class DatagramListener(Protocol):
    """A non-blocking host UDP socket, bound to a port that others send to. It answers from where it was asked."""

    address: bytes  # where it is bound; unspecified: everywhere, of this family alone
    port: int
    batches: bool  # whether receive_callers() pays at the moment

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def receive_caller(self, buffer: memoryview) -> tuple[int, int, Caller]:
        """As DatagramSocket.receive_from()."""
        ...

    def receive_callers(self, buffer: memoryview, take: Callable[[int, int, Caller], None]) -> int:
        """As DatagramSocket.receive_batch(): take(length, size, caller) is called."""
        ...

    def receive_error(self) -> SocketError | None:
        """As DatagramSocket.receive_error()."""

    def reply_socket(self, caller: Caller) -> DatagramSocket:
        """What sends to this caller, whatever address and port its methods are given. Nothing is received from it."""
        ...

    def refuse(self, caller: Caller) -> bool:
        """Tell the caller by ICMP that nobody listens here. False: this process may not."""
        ...


@dataclass(slots=True)
class SocketError:
    """What the host's kernel learnt about a datagram that we sent: an ICMP error, or its own refusal."""

    errno: int
    destination: bytes  # where the datagram was sent
    port: int
    offender: bytes | None  # the router or host that sent the ICMP error; None when the kernel itself refused
    icmp_type: int  # in the numbering of the destination's family; -1 when the kernel itself refused
    icmp_code: int
    mtu: int  # for EMSGSIZE: the path MTU that the kernel knows, else 0
    payload: bytes = b""  # the first bytes of the datagram sent, as the kernel hands them back


class Host(Protocol):
    """The host's sockets."""

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        """Begin a non-blocking connect. Writable readiness tells its end. Raises OSError when it fails at once."""
        ...

    def is_connected(self, sock: HostSocket) -> bool:
        """Whether connect() has succeeded already, as over the loopback. False is not wrong where that is unknown."""
        ...

    def connect_error(self, sock: HostSocket) -> int:
        """SO_ERROR: 0 when the connect succeeded, else its errno."""
        ...

    def reset(self, sock: HostSocket) -> None:
        """Close so that the peer sees RST (SO_LINGER 0)."""

    def open_udp(self, address: bytes, port: int) -> DatagramSocket:
        """An unconnected UDP socket of the family of `address`, bound to `port` where free, else to any port."""
        ...

    def listen_udp(self, host: str, port: int) -> Sequence[DatagramListener]:
        """UDP sockets that are bound to this address of the host, as text, and this port; 0 takes a free one.

        One, but for "::" one of each family that the host has. Raises OSError.
        """
        ...

    def open_ping(self, address: bytes) -> DatagramSocket:
        """A ping socket (SOCK_DGRAM, IPPROTO_ICMP or ICMPV6) of the family of `address`.

        Raises PermissionError where the host forbids them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Offload:
    """What the far side of a link with virtio-net headers does for us (virtio 1.2 section 5.1.6; TUNSETOFFLOAD)."""

    checksum: bool  # takes frames whose TCP or UDP checksum is partial
    tso4: bool  # takes TCP packets of up to 65,535 bytes that are to be cut into segments; needs checksum
    tso6: bool
    uso: bool  # the same for UDP, of both families


class Link(Protocol):
    """One attachment of Ethernet. The stack asks it what it can do, never what it is."""

    name: str
    mtu: int  # the largest IP packet that may be sent over it
    prefix: (
        int  # bytes that stand before each Ethernet frame in the buffers given to queue_*: length prefix, vnet header
    )
    backlog: int  # bytes queued and not yet taken by the kernel
    congested: bool  # TCP flows stop reading from the host; the link calls on_drained() of its waiters later
    # The first 12 bytes (both MACs) of frames that need no look at the switch: sent to the gateway by a guest that is
    # known to be on this link. As two integers of 8 and 4 bytes: the pair of the last one, and all of them.
    macs_high: int
    macs_low: int
    known_macs: set[tuple[int, int]]
    interface: int  # the capture's number for it
    capture: Capture | None
    # Not None: each frame, in both directions, stands behind a virtio-net header of 12 bytes, which is the prefix
    # (`wire.virtio_net`); zeros ask for nothing. A driver may negotiate anew while the link lives: ask each time, but
    # whether there are such headers never changes.
    offload: Offload | None
    direct: bool  # whether there are reserve() and commit()

    def forget_macs(self) -> None:
        """Empty macs_high, macs_low and known_macs: a guest may have moved."""

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        """Fill buffer[:prefix] for a frame of frame_length bytes."""

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        """Queue one frame: `head` begins with the prefix; `payload` is its tail and must stay as it is until sent."""

    def queue_burst(self, frames: NDArray[uint8]) -> None:
        """Queue k frames of equal length: a C-contiguous (k, prefix + frame length) matrix."""

    def flush(self) -> None:
        """Hand what is queued to the kernel."""

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        """Where in the guest's own memory the next frame's payload may be received, up to `limit` bytes of it.

        The pieces lie `header` bytes, prefix included, behind the beginning of the guest's receive buffers. Empty:
        there is no room now. Only where `direct` is true; what is reserved must be committed before anything is queued.
        """
        ...

    def commit(self, head: Buffer, length: int) -> None:
        """The frame is complete: `head` (prefix and headers), `length` bytes in the pieces. 0 gives them back."""

    def wait_drained(self, waiter: DrainWaiter) -> None:
        """Have waiter.on_drained(now) called once when the link is no longer congested."""


class DrainWaiter(Protocol):
    """A flow that stopped because its guest's link was congested."""

    def on_drained(self, now: float) -> None: ...


class TimerOwner(Protocol):
    """What `core.timers.Timers` wakes. Both fields belong to Timers; start them with NEVER."""

    timer_at: float
    heap_at: float

    def on_timer(self, now: float) -> None: ...


@dataclass(slots=True)
class Datagram:
    """A UDP datagram from a guest to a service of the gateway."""

    payload: bytes
    link: Link
    mac: bytes  # the guest's
    src: bytes  # the guest's address; may be unspecified (DHCP)
    src_port: int
    dst: bytes  # what it sent to: a gateway address, broadcast or multicast
    dst_port: int


UdpService = Callable[[Datagram, float], None]


@dataclass(slots=True)
class TcpServiceCall:
    """A guest's connection to a TCP service of the gateway, for logs and limits."""

    link: Link  # limits go by it: a guest may have any number of addresses
    guest: bytes
    guest_port: int
    address: bytes
    port: int


class Events(Protocol):
    """Where the stack tells what happened, off the hot path: logs. Every method is cheap and never raises."""

    @property
    def debug(self) -> bool:
        """Whether per-flow lines are wanted at all."""
        ...

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None: ...
    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None: ...
    def warning(self, key: str, message: str, **fields: object) -> None:
        """A warning, rate-limited by its key."""

    def info(self, message: str, **fields: object) -> None: ...


class Capture(Protocol):
    """Where frames go in pcap debug mode."""

    def frame(self, interface: int, buffers: Sequence[Any], *, to_guest: bool, comment: str | None = None) -> None:
        """Record one frame, given in pieces, stamped with the wall clock's now."""
