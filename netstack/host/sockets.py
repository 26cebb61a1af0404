"""The host's sockets, as the core asks for them (`core.ports.Host`)."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Sequence
from ipaddress import IPv6Address

from netstack.core.ports import DatagramListener, DatagramSocket, HostSocket
from netstack.host.datagrams import AddressNames, open_udp
from netstack.host.ping import open_ping

# struct linger of SO_LINGER: on, 0 s. close() then sends RST (tcp(7), RFC 9293 3.10.5).
_LINGER = struct.pack("ii", 1, 0)

# connect() of a non-blocking socket; the result comes with writability (connect(2)).
_IN_PROGRESS = frozenset((0, errno.EINPROGRESS))

# Linux makes a socket non-blocking at once, without another call (socket(2)).
_NONBLOCK: int = getattr(socket, "SOCK_NONBLOCK", 0)
_STREAM = socket.SOCK_STREAM | _NONBLOCK

# The first byte of struct tcp_info is the state (linux/tcp.h); 1 is TCP_ESTABLISHED (net/tcp_states.h).
_TCP_INFO = socket.TCP_INFO if sys.platform == "linux" else -1
_ESTABLISHED = b"\x01"

# A guest's upload is written here in batches of up to 1 MiB; the kernel grows it by itself up to tcp_wmem, but a larger
# start saves the first short writes.
_SEND_BUFFER = 1 << 20


class HostSockets:
    """Opens ordinary sockets: what leaves through them is the host's own traffic."""

    def __init__(self) -> None:
        self._names = AddressNames()

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        """Begin a non-blocking connect to a packed address."""
        ipv6 = len(address) == 16
        sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, _STREAM)
        try:
            if not _NONBLOCK:
                sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            target = str(IPv6Address(address)) if ipv6 else socket.inet_ntoa(address)
            result = sock.connect_ex((target, port))
            if result not in _IN_PROGRESS:
                raise OSError(result, "connect")
        except BaseException:
            sock.close()
            raise
        return sock

    def is_connected(self, sock: HostSocket) -> bool:
        """One system call; the way over the poller takes two, and a round."""
        assert isinstance(sock, socket.socket)
        return _TCP_INFO >= 0 and sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1) == _ESTABLISHED

    def connect_error(self, sock: HostSocket) -> int:
        """SO_ERROR, cleared by reading it."""
        assert isinstance(sock, socket.socket)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def reset(self, sock: HostSocket) -> None:
        """Close with RST."""
        assert isinstance(sock, socket.socket)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        sock.close()

    def open_udp(self, address: bytes, port: int) -> DatagramSocket:
        """An unconnected UDP socket of the family of `address`, on `port` where that is free."""
        return open_udp(self._names, address, port)

    def listen_udp(self, host: str, port: int) -> Sequence[DatagramListener]:
        """UDP sockets bound to an address of the host; the module of its own is for those who forward."""
        from netstack.host.udp_listeners import open_udp_listeners

        return open_udp_listeners(self._names, host, port)

    def open_ping(self, address: bytes) -> DatagramSocket:
        """A ping socket of the family of `address`; PermissionError where the host forbids it."""
        return open_ping(self._names, address)
