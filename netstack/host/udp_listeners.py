"""The sockets of UDP forwards: bound to a port of the host, and answering from the address that was asked.

Theory of operation
-------------------
A socket that is bound to one address sends from there. One that is bound to all of them would send from whatever
address the route back prefers, and the caller, who asked another one, drops the answer. So such a socket has the kernel
say with each datagram which of the host's addresses was meant (IP_PKTINFO of ip(7), IPV6_RECVPKTINFO of RFC 3542), and
says the same when it answers. Both are control messages, which cost 1 us a datagram; by the dozen (`host.batches`), or
merged by the kernel (UDP_GRO), they cost nothing to speak of.

A datagram to a group (ff02::1 reaches every host) was meant for no address; what answers it is the kernel's to choose.

IPv6 sockets take IPv6 alone, so that an IPv4 caller has its own address and not ::ffff:192.0.2.1: who wants both
families opens two.

No socket here shares its port (SO_REUSEADDR, SO_REUSEPORT): on Linux either lets another program take the datagrams.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Final

from netstack.core.addresses import UNSPECIFIED4, UNSPECIFIED6
from netstack.core.ports import Buffer, Caller, DatagramSocket, SocketError
from netstack.core.udp_endpoint import write_packet
from netstack.host.datagrams import (
    UDP_GRO,
    UDP_SEGMENT,
    AddressNames,
    HostDatagramSocket,
    set_receive_buffer,
)
from netstack.wire.icmp import write_refusal

if TYPE_CHECKING:
    from netstack.host.batches import CallerReceiver

# include/uapi/linux/in.h; macOS: bsd/netinet/in.h, where it is also what asks for it
_IP_PKTINFO: Final = 8 if sys.platform == "linux" else 26
# include/uapi/linux/in6.h, as in Python's socket where that has them
_IPV6_RECVPKTINFO: Final[int] = getattr(socket, "IPV6_RECVPKTINFO", 49 if sys.platform == "linux" else 61)
_IPV6_PKTINFO: Final[int] = getattr(socket, "IPV6_PKTINFO", 50 if sys.platform == "linux" else 46)

# struct in_pktinfo: int interface | our address | destination of the header
_PKTINFO4: Final = Struct("=I4s4s")
# struct in6_pktinfo (RFC 3542 6.1): our address | unsigned interface
_PKTINFO6: Final = Struct("=16sI")
# All callers share it. On Linux a datagram of 200 bytes takes 1,280 bytes, of twice what is asked for (socket(7)), so
# this is room for a fifth of a second of 30,000 a second.
_RECEIVE_BUFFER: Final = 4 << 20

_SPACE: Final = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_PKTINFO6.size)

_Control = tuple[tuple[int, int, bytes], ...]

# So often a port is looked for that is free in both families, where the kernel chooses it.
_PAIRS: Final = 16

# The host has no IPv6, or it is switched off.
_NO_FAMILY: Final = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))


class UdpListener(HostDatagramSocket):
    """A `core.ports.DatagramListener` around a real socket."""

    __slots__ = ("_callers", "_everywhere", "address", "port")

    def __init__(self, sock: socket.socket, names: AddressNames) -> None:
        """Takes a bound socket over."""
        super().__init__(sock, names)
        name = sock.getsockname()
        self.address = names.address(name[0])
        self.port: int = name[1]
        self._everywhere = self.address in (UNSPECIFIED4, UNSPECIFIED6)
        self._callers: CallerReceiver | None = None
        if self._everywhere:
            if self._ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)

    def receive_caller(self, buffer: memoryview) -> tuple[int, int, Caller]:
        if not self._everywhere and not self._merging:
            length, peer = self._receive(buffer)
            return length, length, (self._names.address(peer[0]), peer[1], b"", _zone_of(peer))
        length, ancillary, _, peer = self._sock.recvmsg_into((buffer,), _SPACE)
        segment = length
        local = b""
        for level, kind, data in ancillary:
            if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                segment = int.from_bytes(data[:4], sys.byteorder)
            elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                local = data[4:8]
            elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO and data[0] != 0xFF:
                local = data[:16]
        return length, segment, (self._names.address(peer[0]), peer[1], local, _zone_of(peer))

    def expect_bursts(self) -> None:
        super().expect_bursts()
        if self._callers is None:
            self._callers = self._names.caller_receiver()
        self.batches = self._callers is not None

    def receive_callers(self, buffer: memoryview, take: Callable[[int, int, Caller], None]) -> int:
        assert self._callers is not None
        count, merged = self._callers.receive(self._sock.fileno(), self._limit, buffer, take)
        self._note_batch(count, merged)
        return count

    def reply_socket(self, caller: Caller) -> DatagramSocket:
        address, port, local, zone = caller
        text = self._names.name(address)
        name = (text, port, 0, zone) if zone else (text, port)
        control: _Control = ()
        if len(local) == 4:
            control = ((socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, local, UNSPECIFIED4)),)
        elif local:
            control = ((socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO6.pack(local, zone)),)
        return _ReplySocket(self, name, control)

    def send_reply(
        self,
        payloads: Sequence[Buffer],
        name: tuple[str | int, ...],
        control: _Control,
        ttl: int,
        dont_fragment: bool,
    ) -> None:
        """Send one datagram; or, with UDP_SEGMENT in `control`, several."""
        if ttl != self._ttl:
            self._set_ttl(ttl)
        if dont_fragment is not self._dont_fragment:
            self._set_dont_fragment(dont_fragment)
        if control:
            self._sock.sendmsg(payloads, control, 0, name)
        else:
            self._send(payloads[0], name)

    def refuse(self, caller: Caller) -> bool:
        """An ICMP error as the kernel sends it for a closed port. Only who may open raw sockets can (CAP_NET_RAW)."""
        address, port, local, zone = caller
        meant = local or self.address
        message = write_refusal(write_packet(address, port, meant, self.port, b"", 64))
        family, protocol = (
            (socket.AF_INET6, socket.IPPROTO_ICMPV6) if self._ipv6 else (socket.AF_INET, socket.IPPROTO_ICMP)
        )
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_RAW, protocol) as sock:
            sock.setblocking(False)
            scope = (0, zone) if self._ipv6 else ()
            sock.bind((self._names.name(meant), 0, *scope))
            sock.sendto(message, (self._names.name(address), 0, *scope))
            return True
        return False


class _ReplySocket:
    """The way to one caller: a `core.ports.DatagramSocket` that sends through the listener, and never receives."""

    __slots__ = ("_control", "_listener", "_name", "batches", "segments")

    def __init__(self, listener: UdpListener, name: tuple[str | int, ...], control: _Control) -> None:
        self._listener = listener
        self._name = name
        self._control = control
        self.segments = listener.segments
        self.batches = False

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        """The listener closes when its forward ends."""

    def bound_port(self) -> int:
        return self._listener.port

    def send_to(self, payload: Buffer, address: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        self._listener.send_reply((payload,), self._name, self._control, ttl, dont_fragment)

    def send_segments(
        self, payloads: Sequence[Buffer], segment: int, address: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        cut = (socket.IPPROTO_UDP, UDP_SEGMENT, segment.to_bytes(2, sys.byteorder))
        self._listener.send_reply(payloads, self._name, (*self._control, cut), ttl, dont_fragment)

    def receive_from(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        raise BlockingIOError

    def expect_bursts(self) -> None:
        self._listener.expect_bursts()

    def receive_batch(self, buffer: memoryview, take: Callable[[int, int, bytes, int], None]) -> int:
        return 0

    def receive_error(self) -> SocketError | None:
        return self._listener.receive_error()


def _zone_of(name: tuple[str | int, ...]) -> int:
    """The interface of a link-local caller, as recvfrom(2) names it."""
    zone = name[3] if len(name) > 3 else 0
    return zone if isinstance(zone, int) else 0


def open_udp_listeners(names: AddressNames, host: str, port: int) -> list[UdpListener]:
    """Sockets that are bound to this address of the host and this port; 0 takes a free one.

    One, but for "::" one of each family that the host has. Raises OSError: EADDRINUSE, EACCES for a privileged port,
    EADDRNOTAVAIL for an address that is not the host's.
    """
    if host != "::":
        return [_open(names, host, port)]
    for _ in range(_PAIRS - 1):
        try:
            return _open_both(names, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise
    return _open_both(names, port)


def _open_both(names: AddressNames, port: int) -> list[UdpListener]:
    try:
        first = _open(names, "::", port)
    except OSError as error:
        if error.errno not in _NO_FAMILY:
            raise
        return [_open(names, "0.0.0.0", port)]
    try:
        return [first, _open(names, "0.0.0.0", first.port)]
    except OSError:
        first.close()
        raise


def _open(names: AddressNames, host: str, port: int) -> UdpListener:
    ipv6 = ":" in host
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        set_receive_buffer(sock, _RECEIVE_BUFFER)
        # getaddrinfo() reads the zone of a link-local address, fe80::1%eth0.
        sock.bind(socket.getaddrinfo(host, port, sock.family, flags=socket.AI_NUMERICHOST)[0][4])
        return UdpListener(sock, names)
    except BaseException:
        sock.close()
        raise
