"""IPv4 headers (RFC 791)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, sum_words

# RFC 791 3.1:
#   u8       version (4 bits), header length in 32-bit words (4 bits)
#   u8       type of service: DSCP (6 bits, RFC 2474), ECN (2 bits, RFC 3168)
#   u16      total length, header included
#   u16      identification
#   u16      0, DF, MF (3 bits), fragment offset in units of 8 bytes (13 bits)
#   u8       time to live
#   u8       protocol
#   u16      header checksum
#   4 bytes  source
#   4 bytes  destination
_HEADER = Struct("!BBHHHBBH4s4s")
_PARSED = Struct("!BBHHHBB2x4s4s")

HEADER_LENGTH = 20
MAX_PACKET = 65535

PROTOCOL_ICMP = 1
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17

BROADCAST = b"\xff" * 4
UNSPECIFIED = bytes(4)

_DONT_FRAGMENT = 0x4000
_MORE_FRAGMENTS = 0x2000
_OFFSET_MASK = 0x1FFF


class Ipv4(NamedTuple):
    """The first eleven fields are those of Ipv6, in the same order. Offsets count from the beginning of the buffer."""

    src: bytes
    dst: bytes
    protocol: int
    ttl: int
    tos: int
    ident: int
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int  # in bytes
    payload_start: int
    payload_end: int  # by the total length: what follows it in the frame is padding
    header_start: int


def parse_ipv4(buffer: Buffer, start: int, end: int, *, quoted: bool = False) -> Ipv4 | None:
    """Untrusted. None when the header is cut short or its lengths lie. Options are skipped.

    `quoted`: the packet stands inside an ICMP error, where it may be cut short behind its header; payload_end is then
    whatever is there.
    """
    available = end - start
    if available < HEADER_LENGTH:
        return None
    version_length, tos, total, ident, fragment, ttl, protocol, src, dst = _PARSED.unpack_from(buffer, start)
    header = (version_length & 0x0F) << 2
    if version_length >> 4 != 4 or header < HEADER_LENGTH or header > available or total < header:
        return None
    if total > available:
        if not quoted:
            return None
        total = available
    offset = (fragment & _OFFSET_MASK) << 3
    # A fragment that ends beyond the largest packet cannot be part of one (the "ping of death").
    if offset + total > MAX_PACKET:
        return None
    return Ipv4(
        src,
        dst,
        protocol,
        ttl,
        tos,
        ident,
        bool(fragment & _DONT_FRAGMENT),
        bool(fragment & _MORE_FRAGMENTS),
        offset,
        start + header,
        start + total,
        start,
    )


def write_ipv4(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload_length: int,
    *,
    ttl: int = 64,
    tos: int = 0,
    ident: int = 0,
    dont_fragment: bool = True,
    more_fragments: bool = False,
    fragment_offset: int = 0,
) -> bytes:
    """The 20-byte header with its checksum. `fragment_offset` is in bytes, a multiple of 8."""
    fragment = fragment_offset >> 3
    if dont_fragment:
        fragment |= _DONT_FRAGMENT
    if more_fragments:
        fragment |= _MORE_FRAGMENTS
    total = HEADER_LENGTH + payload_length
    header = _HEADER.pack(0x45, tos, total, ident, fragment, ttl, protocol, 0, src, dst)
    return header[:10] + finish(sum_words(header)).to_bytes(2, "big") + header[12:]
