"""IPv6 headers and the walk through extension headers (RFC 8200)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer

# RFC 8200 3:
#   u32       version (4 bits), traffic class (8 bits), flow label (20 bits)
#   u16       payload length, extension headers included
#   u8        next header
#   u8        hop limit
#   16 bytes  source
#   16 bytes  destination
_HEADER = Struct("!IHBB16s16s")
# RFC 8200 4.5, the fragment header:
#   u8   next header
#   u8   reserved
#   u16  fragment offset in units of 8 bytes (13 bits), reserved (2 bits), M (1 bit)
#   u32  identification
_FRAGMENT = Struct("!BBHI")

HEADER_LENGTH = 40
FRAGMENT_HEADER_LENGTH = 8
# RFC 8200 5: every link carries packets of this size.
MIN_MTU = 1280
MAX_PAYLOAD = 65535

HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
AUTHENTICATION = 51
NO_NEXT_HEADER = 59
DESTINATION_OPTIONS = 60
EXTENSION_HEADERS = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS))

PROTOCOL_ICMPV6 = 58

UNSPECIFIED = bytes(16)

# RFC 8200 4.1 gives an order in which each header stands once and destination options twice: 6 with AH. Two to spare.
MAX_EXTENSION_HEADERS = 8


class Ipv6(NamedTuple):
    """The first eleven fields are those of Ipv4, in the same order. Offsets count from the beginning of the buffer.

    Of a fragment (more_fragments or fragment_offset), `protocol` is the fragment header's next header and payload_start
    lies right behind the fragment header: what follows is only to be read when it is whole again. `protocol` may then
    be another extension header. A fragment header around a whole packet (RFC 6946) is walked through like the others.
    """

    src: bytes
    dst: bytes
    protocol: int
    ttl: int  # the hop limit
    tos: int  # the traffic class
    ident: int
    dont_fragment: bool  # always: routers do not fragment IPv6
    more_fragments: bool
    fragment_offset: int  # in bytes
    payload_start: int
    payload_end: int  # by the payload length: what follows it in the frame is padding
    header_start: int
    protocol_at: int  # where the byte is that named `protocol`; less header_start, it is the pointer of an ICMPv6 error


def parse_ipv6(buffer: Buffer, start: int, end: int, *, quoted: bool = False) -> Ipv6 | None:
    """Untrusted. None when a header is cut short, a length lies, or an extension header asks for what we refuse.

    Refused: more than MAX_EXTENSION_HEADERS, routing headers of type 0 (RFC 5095) or with segments left (RFC 8200 4.4),
    hop-by-hop options anywhere but first (RFC 8200 4.1), options whose type says "discard if unknown" (RFC 8200 4.2),
    and jumbograms. `protocol` NO_NEXT_HEADER means that nothing follows.

    `quoted`: the packet stands inside an ICMP error, where it may be cut short behind its headers; payload_end is then
    whatever is there.
    """
    available = end - start - HEADER_LENGTH
    if available < 0:
        return None
    label, length, protocol, ttl, src, dst = _HEADER.unpack_from(buffer, start)
    if label >> 28 != 6 or length == 0:
        return None
    if length > available:
        if not quoted:
            return None
        length = available
    at = start + HEADER_LENGTH
    payload_end = at + length
    protocol_at = start + 6
    ident = fragment_offset = 0
    more_fragments = False
    headers = 0
    while protocol in EXTENSION_HEADERS:
        headers += 1
        # Each of them is at least 8 bytes long and begins with the next header and a length.
        if headers > MAX_EXTENSION_HEADERS or payload_end - at < 8:
            return None
        if protocol == FRAGMENT:
            next_protocol, _, fragment, ident = _FRAGMENT.unpack_from(buffer, at)
            size = FRAGMENT_HEADER_LENGTH
            fragment_offset = fragment & 0xFFF8
            more_fragments = bool(fragment & 1)
            # RFC 8200 4.5: a fragment that ends beyond the largest payload cannot be part of one.
            if fragment_offset + payload_end - at - size > MAX_PAYLOAD:
                return None
        else:
            next_protocol = buffer[at]
            # Beyond the first 8 bytes, RFC 8200 4.3 counts units of 8, and RFC 4302 2.2 units of 4.
            size = (buffer[at + 1] + 2) << 2 if protocol == AUTHENTICATION else (buffer[at + 1] + 1) << 3
            if size > payload_end - at or not _acceptable(buffer, protocol, at, at + size, headers):
                return None
        protocol = next_protocol
        protocol_at = at
        at += size
        if more_fragments or fragment_offset:
            break
    return Ipv6(
        src,
        dst,
        protocol,
        ttl,
        label >> 20 & 0xFF,
        ident,
        True,
        more_fragments,
        fragment_offset,
        at,
        payload_end,
        start,
        protocol_at,
    )


def _acceptable(buffer: Buffer, protocol: int, start: int, end: int, position: int) -> bool:
    """Whether an end node that knows no option and no routing type may go on past this extension header. Untrusted."""
    if protocol == ROUTING:
        # RFC 8200 4.4: u8 next header, u8 length, u8 routing type, u8 segments left.
        return buffer[start + 2] != 0 and buffer[start + 3] == 0
    if protocol == AUTHENTICATION:
        return True
    if protocol == HOP_BY_HOP and position != 1:
        return False
    # RFC 8200 4.2: options of u8 type, u8 length, data; Pad1 is a lone zero. The two highest bits of a type that is not
    # known tell what to do: 00 is skip, all else is discard. (Router Alert is 00; the jumbo payload of RFC 2675 is 11.)
    at = start + 2
    while at < end:
        kind = buffer[at]
        if kind >> 6:
            return False
        if kind == 0:
            at += 1
        elif at + 1 < end:
            at += 2 + buffer[at + 1]
        else:
            return False
    return at == end


def write_ipv6(
    src: bytes, dst: bytes, protocol: int, payload_length: int, *, ttl: int = 64, tos: int = 0, flow_label: int = 0
) -> bytes:
    """The 40-byte header; `ttl` is the hop limit, `tos` the traffic class."""
    return _HEADER.pack(6 << 28 | tos << 20 | flow_label, payload_length, protocol, ttl, src, dst)


def write_fragment_header(protocol: int, fragment_offset: int, more_fragments: bool, ident: int) -> bytes:
    """The 8-byte header that stands between the IPv6 header (whose protocol is FRAGMENT) and a piece of the payload.

    `fragment_offset` is in bytes, a multiple of 8; `protocol` is what the whole payload begins with.
    """
    return _FRAGMENT.pack(protocol, 0, fragment_offset & 0xFFF8 | more_fragments, ident)
