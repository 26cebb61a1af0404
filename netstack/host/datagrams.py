"""The host's UDP sockets, as `core.ports.DatagramSocket`: non-blocking, unconnected, errors included.

Linux: IP_RECVERR makes the kernel keep, in a queue of the socket, every ICMP error that one of its datagrams provoked,
with the address of whoever sent it (ip(7), net/ipv4/ip_sockglue.c: ip_icmp_error); recvmsg(MSG_ERRQUEUE) takes them
out. It also makes an unconnected socket report such an error by the errno of its next call.

macOS: there is no such queue, and unconnected sockets learn nothing of ICMP errors (in_pcb.c notifies connected ones).

The constants below are Linux' and not in Python's `socket`, or not before 3.14.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Sequence
from struct import Struct
from typing import TYPE_CHECKING

from netstack.core.ports import Buffer, SocketError

if TYPE_CHECKING:
    from netstack.host.batches import BatchReceiver, CallerReceiver

_LINUX = sys.platform == "linux"

# include/uapi/linux/in.h
_IP_MTU_DISCOVER = 10
_IP_RECVERR = 11
_IP_PMTUDISC_DONT = 0
_IP_PMTUDISC_DO = 2
# include/uapi/linux/in6.h
_IPV6_MTU_DISCOVER = 23
_IPV6_RECVERR = 25
# include/linux/socket.h
_MSG_ERRQUEUE = 0x2000
# macOS: bsd/netinet/in.h, bsd/netinet6/in6.h
_MACOS_IP_DONTFRAG = 28
_MACOS_IPV6_DONTFRAG = 62

# include/uapi/linux/udp.h
UDP_SEGMENT = 103
UDP_GRO = 104

# struct sock_extended_err (include/uapi/linux/errqueue.h), host byte order; behind it the offender's sockaddr:
#   u32 errno | u8 origin | u8 type | u8 code | u8 padding | u32 info (an MTU) | u32 data
_EXTENDED_ERROR = Struct("=IBBBxI4x")
_ORIGIN_ICMP = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
_OFFENDER4 = slice(_EXTENDED_ERROR.size + 4, _EXTENDED_ERROR.size + 8)  # sockaddr_in.sin_addr
_OFFENDER6 = slice(_EXTENDED_ERROR.size + 8, _EXTENDED_ERROR.size + 24)  # sockaddr_in6.sin6_addr
_ERROR_SPACE = socket.CMSG_SPACE(_EXTENDED_ERROR.size + 28)
# Of the datagram that failed: an ICMP error quotes at most 576 bytes (RFC 1812 4.3.2.3) or 1280 (RFC 4443 2.4).
_QUOTE = 1280

# include/uapi/asm-generic/socket.h
_SO_RCVBUFFORCE = 33

# Control message with the size of merged datagrams: an int.
_SEGMENT_SPACE = socket.CMSG_SPACE(4)
# Receptions after which it shows whether merging, or receiving by the dozen, pays.
_TRIAL = 256
# What one call of recvmmsg() may take, of batches.COUNT; the same where the kernel merges.
_BATCH = 64
_MERGED_LIMIT = 4
# From how many datagrams on one call for all of them is better than one for each.
_BATCH_PAYS_FROM = 8

# Room for a burst that arrives while the guest's link is busy. Linux grants at most net.core.rmem_max, 208 KiB unless
# tuned; macOS kern.ipc.maxsockbuf.
_RECEIVE_BUFFER = 1 << 20
# macOS refuses datagrams beyond the send buffer, 9,216 bytes unless raised (net.inet.udp.maxdgram).
_SEND_BUFFER = 1 << 17

# Addresses kept in each direction, some 200 bytes each.
_NAMES = 8192


class AddressNames:
    """Addresses as bytes and as the strings that Python's sockets want: a bounded cache, one for all sockets."""

    __slots__ = ("_addresses", "_caller_receiver", "_names", "_receiver")

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._addresses: dict[str, bytes] = {}
        self._receiver: BatchReceiver | None = None
        self._caller_receiver: CallerReceiver | None = None

    def receiver(self) -> BatchReceiver | None:
        """What receives many datagrams in one call, one for all sockets; None where the system cannot."""
        if self._receiver is None:
            from netstack.host.batches import BatchReceiver, make_receiver  # ctypes: 10 ms to import, and few need it

            self._receiver = make_receiver(BatchReceiver)
        return self._receiver

    def caller_receiver(self) -> CallerReceiver | None:
        """The same for the sockets of forwards."""
        if self._caller_receiver is None:
            from netstack.host.batches import CallerReceiver, make_receiver

            self._caller_receiver = make_receiver(CallerReceiver)
        return self._caller_receiver

    def name(self, address: bytes) -> str:
        """192.168.5.15 for its four bytes."""
        name = self._names.get(address)
        if name is None:
            if len(self._names) >= _NAMES:
                self._names.clear()
            name = self._names[address] = socket.inet_ntop(_family(address), address)
        return name

    def address(self, name: str) -> bytes:
        """The reverse of name(), for what the kernel reports; a zone (fe80::1%eth0) is cut off."""
        address = self._addresses.get(name)
        if address is None:
            if len(self._addresses) >= _NAMES:
                self._addresses.clear()
            family = socket.AF_INET6 if ":" in name else socket.AF_INET
            address = self._addresses[name] = socket.inet_pton(family, name.partition("%")[0])
        return address


def _family(address: bytes) -> socket.AddressFamily:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


class HostDatagramSocket:
    """A `DatagramSocket` around a real one."""

    __slots__ = (
        "_batch",
        "_calls",
        "_dont_fragment",
        "_few",
        "_ipv6",
        "_limit",
        "_merged",
        "_merging",
        "_names",
        "_receive",
        "_send",
        "_sock",
        "_ttl",
        "batches",
        "segments",
    )

    def __init__(self, sock: socket.socket, names: AddressNames) -> None:
        """Takes the socket over, and makes it non-blocking."""
        sock.setblocking(False)
        self._sock = sock
        self._names = names
        self._send = sock.sendto
        self._receive = sock.recvfrom_into
        self._ipv6 = sock.family == socket.AF_INET6
        self._ttl = -1
        self.segments = _LINUX and sock.proto in (0, socket.IPPROTO_UDP)
        self._merging: bool | None = None  # None: not tried yet
        self._calls = self._merged = 0
        self.batches = False
        self._batch: BatchReceiver | None = None
        self._limit = _BATCH
        self._few = 0
        self._dont_fragment: bool | None = None
        if _LINUX:
            if self._ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def bound_port(self) -> int:
        port: int = self._sock.getsockname()[1]
        return port

    def send_to(self, payload: Buffer, address: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        if ttl != self._ttl:
            self._set_ttl(ttl)
        if dont_fragment is not self._dont_fragment:
            self._set_dont_fragment(dont_fragment)
        self._send(payload, (self._names.name(address), port))

    def send_segments(
        self, payloads: Sequence[Buffer], segment: int, address: bytes, port: int, ttl: int, dont_fragment: bool
    ) -> None:
        if ttl != self._ttl:
            self._set_ttl(ttl)
        if dont_fragment is not self._dont_fragment:
            self._set_dont_fragment(dont_fragment)
        control = ((socket.IPPROTO_UDP, UDP_SEGMENT, segment.to_bytes(2, sys.byteorder)),)
        self._sock.sendmsg(payloads, control, 0, (self._names.name(address), port))

    def receive_from(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        if self._merging:
            return self._receive_merged(buffer)
        length, peer = self._receive(buffer)
        return length, length, self._names.address(peer[0]), peer[1]

    def expect_bursts(self) -> None:
        if self.batches:
            return
        if self._merging is None:
            self._merging = False
            if self.segments:
                with contextlib.suppress(OSError):  # kernels before 5.0
                    self._sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
                    self._merging = True
        if self._batch is None and self.segments:
            self._batch = self._names.receiver()
        self.batches = self._batch is not None
        self._few = 0

    def receive_batch(self, buffer: memoryview, take: Callable[[int, int, bytes, int], None]) -> int:
        assert self._batch is not None
        count, merged = self._batch.receive(self._sock.fileno(), self._limit, buffer, take)
        self._note_batch(count, merged)
        return count

    def _note_batch(self, count: int, merged: bool) -> None:
        """Whether receiving by the dozen goes on to pay."""
        # What is merged may be 64 KiB each, and one turn should not fill the guest's link.
        self._limit = _MERGED_LIMIT if merged else min(_BATCH, self._limit * 2)
        if merged or count >= _BATCH_PAYS_FROM:
            self._few = 0
        else:
            self._few += 1
            self.batches = self._few < _TRIAL

    def _receive_merged(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        """Receive with the segments' size in a control message, which costs 0.4 us more than receiving without."""
        try:
            length, ancillary, _, peer = self._sock.recvmsg_into((buffer,), _SEGMENT_SPACE)
        except BlockingIOError:
            if self._calls >= _TRIAL:
                self._stop_merging_unless_it_pays()
            raise
        segment = length
        self._calls += 1
        for level, kind, data in ancillary:
            if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                segment = int.from_bytes(data[:4], sys.byteorder)
                self._merged += 1
        return length, segment, self._names.address(peer[0]), peer[1]

    def _stop_merging_unless_it_pays(self) -> None:
        """Nothing is in the queue: the moment to go back. Senders and devices on the way may not merge at all."""
        if self._merged * 4 < self._calls:
            self._merging = False
            self._sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
            # What came in between may be merged, and without the option the kernel does not say so: lose it.
            with contextlib.suppress(OSError):
                while True:
                    self._sock.recv(1)
        self._calls = self._merged = 0

    def receive_error(self) -> SocketError | None:
        if not _LINUX:
            return None
        try:
            payload, ancillary, _, peer = self._sock.recvmsg(_QUOTE, _ERROR_SPACE, _MSG_ERRQUEUE)
        except OSError:
            return None  # EAGAIN: empty. Anything else tells of no datagram either.
        for level, kind, data in ancillary:
            if (level, kind) not in _ERROR_MESSAGES or len(data) < _EXTENDED_ERROR.size:
                continue
            code, origin, icmp_type, icmp_code, info = _EXTENDED_ERROR.unpack_from(data)
            offender = None
            if origin in _ORIGIN_ICMP:
                offender = data[_OFFENDER6] if self._ipv6 else data[_OFFENDER4]
            else:
                icmp_type = icmp_code = -1
            destination, port = self._names.address(peer[0]), peer[1]
            return SocketError(code, destination, port, offender, icmp_type, icmp_code, info, payload)
        return None

    def _set_ttl(self, ttl: int) -> None:
        if self._ipv6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        else:
            self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        self._ttl = ttl

    def _set_dont_fragment(self, dont_fragment: bool) -> None:
        if _LINUX:
            value = (
                _IP_PMTUDISC_DO if dont_fragment else _IP_PMTUDISC_DONT
            )  # the values of IPV6_PMTUDISC_* are the same
            if self._ipv6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, value)
            else:
                self._sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, value)
        elif self._ipv6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, _MACOS_IPV6_DONTFRAG, int(dont_fragment))
        else:
            self._sock.setsockopt(socket.IPPROTO_IP, _MACOS_IP_DONTFRAG, int(dont_fragment))
        self._dont_fragment = dont_fragment


_ERROR_MESSAGES = frozenset(((socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR)))


def set_receive_buffer(sock: socket.socket, size: int = _RECEIVE_BUFFER) -> None:
    """Room for bursts; beyond net.core.rmem_max only root gets it."""
    if _LINUX:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except OSError:
            pass
        else:
            return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def open_udp(names: AddressNames, address: bytes, port: int) -> HostDatagramSocket:
    """A UDP socket of the family of `address`, bound to `port` where that is free, else to another.

    Raises OSError: no descriptors, or the host does not have this family.
    """
    family = _family(address)
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other family has sockets of its own
        set_receive_buffer(sock)
        if not _LINUX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        any_address = "::" if family == socket.AF_INET6 else "0.0.0.0"
        try:
            sock.bind((any_address, port))
        except OSError:  # EADDRINUSE, or EACCES for a privileged port
            sock.bind((any_address, 0))
        return HostDatagramSocket(sock, names)
    except BaseException:
        sock.close()
        raise
