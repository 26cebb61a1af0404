"""UDP datagrams (RFC 768, RFC 8200 8.1)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, pseudo_sum, sum_words
from netstack.wire.ipv4 import PROTOCOL_UDP

# RFC 768:
#   u16  source port
#   u16  destination port
#   u16  length, header included
#   u16  checksum
_HEADER = Struct("!HHHH")

HEADER_LENGTH = 8


class Udp(NamedTuple):
    """Offsets count from the beginning of the buffer. A checksum of 0 means that there is none."""

    src_port: int
    dst_port: int
    checksum: int
    payload_start: int
    payload_end: int  # by the length field, which may stop short of the packet's end


def parse_udp(buffer: Buffer, start: int, end: int) -> Udp | None:
    """Untrusted. None when the header is cut short or its length lies (0, the jumbogram of RFC 2675, included)."""
    available = end - start
    if available < HEADER_LENGTH:
        return None
    src_port, dst_port, length, checksum = _HEADER.unpack_from(buffer, start)
    if length < HEADER_LENGTH or length > available:
        return None
    return Udp(src_port, dst_port, checksum, start + HEADER_LENGTH, start + length)


def write_udp(src: bytes, dst: bytes, src_port: int, dst_port: int, payload: Buffer) -> bytes:
    """A whole datagram with its checksum. The payload is at most 65,507 bytes over IPv4, 65,527 over IPv6."""
    length = HEADER_LENGTH + len(payload)
    total = pseudo_sum(src, dst, PROTOCOL_UDP, length) + src_port + dst_port + length + sum_words(payload)
    return _HEADER.pack(src_port, dst_port, length, finish(total)) + payload
