"""The host's ping sockets, as `core.ports.DatagramSocket`: echo requests and replies without privilege.

Messages are whole ICMP messages, from their type on; ports are 0. The caller may use any identifier: a reply comes with
another one, and the caller knows by the socket whose it is.

Linux (net/ipv4/ping.c): the kernel puts in an identifier of the socket's own and the checksum, and hands out the
replies that carry it, without an IP header. Groups outside net.ipv4.ping_group_range may not open such sockets; it is
per network namespace, is for both families, and may keep out root.

macOS (bsd/netinet/ip_icmp.c: icmp_dgram_send): anybody may open them. The kernel touches neither identifier nor
checksum, hands every reply to every such socket, and leaves the IP header in front of IPv4 ones.
"""

from __future__ import annotations

import errno
import secrets
import socket
import sys

from netstack.core.ports import Buffer
from netstack.host.datagrams import AddressNames, HostDatagramSocket
from netstack.wire.icmp import HEADER_LENGTH, write_echo

_LINUX = sys.platform == "linux"

# How many strangers' replies are passed over in one call, so that it ends.
_FOREIGN = 64


class MacosPingSocket(HostDatagramSocket):
    """Does what Linux' kernel does; a plain HostDatagramSocket serves there."""

    __slots__ = ("_ident",)

    def __init__(self, sock: socket.socket, names: AddressNames) -> None:
        super().__init__(sock, names)
        self._ident = secrets.randbits(16)

    def send_to(self, payload: Buffer, address: bytes, port: int, ttl: int, dont_fragment: bool) -> None:
        if len(payload) < HEADER_LENGTH:
            raise OSError(errno.EINVAL, "too short for an ICMP message")
        if len(address) == 4:
            sequence = payload[6] << 8 | payload[7]
            message = write_echo(self._ident, sequence, payload[HEADER_LENGTH:], reply=False)
        else:  # ICMPv6: the checksum is the kernel's (RFC 3542 3.1)
            message = bytes(payload[:4]) + self._ident.to_bytes(2, "big") + bytes(payload[6:])
        super().send_to(message, address, port, ttl, dont_fragment)

    def receive_from(self, buffer: memoryview) -> tuple[int, int, bytes, int]:
        for _ in range(_FOREIGN):
            length, _, address, port = super().receive_from(buffer)
            start = (buffer[0] & 0x0F) << 2 if len(address) == 4 and length else 0
            message = bytes(buffer[start:length])
            if message[4:6] == self._ident.to_bytes(2, "big"):
                buffer[: len(message)] = message
                return len(message), len(message), address, port
        raise BlockingIOError(errno.EAGAIN, "only replies to others")


def open_ping(names: AddressNames, address: bytes) -> HostDatagramSocket:
    """A ping socket of the family of `address`.

    Raises PermissionError where ping sockets are forbidden, OSError when the host does not have them or this family.
    """
    if len(address) == 4:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    else:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
    try:
        return (HostDatagramSocket if _LINUX else MacosPingSocket)(sock, names)
    except BaseException:
        sock.close()
        raise
