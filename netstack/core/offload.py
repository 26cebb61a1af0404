"""What one guest left to be done to a frame, done for another: checksums and segmentation (virtio 1.2 5.1.6.2).

Theory of operation
-------------------
Toward the gateway nothing is to be done: nobody verifies checksums, and a TCP segment of 64 KiB is a segment. But a
frame that the switch passes on to another guest goes to a link that may take less. `read_request` looks at the
virtio-net header in front of it and at the frame itself, and gives a `Request` of what is true of both; the switch
then sends the frame with a header of our own making where the other link takes it (`write_request`), or has `fulfil`
make whole frames of it.

A guest can write anything into that header. What does not fit the frame is malformed and goes nowhere; no field is
passed on that was not checked; and a frame becomes a bounded number of frames: segments of TCP have MIN_SEGMENT bytes
or more, runs of UDP are MAX_DATAGRAMS at most.

Checksums need no addresses: the field holds the sum of the pseudo-header, which differs between the whole and its parts
in the length alone. So neither IPv6's routing header nor anything else between the addresses and the transport matters.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, sum_words
from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from netstack.wire.ipv4 import PROTOCOL_TCP, PROTOCOL_UDP, Ipv4, parse_ipv4
from netstack.wire.ipv6 import Ipv6, parse_ipv6
from netstack.wire.virtio_net import (
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    HEADER_LENGTH,
    NEEDS_CSUM,
    TCP_CHECKSUM,
    UDP_CHECKSUM,
    VirtioNet,
    parse_virtio_net,
    write_virtio_net,
)

if TYPE_CHECKING:
    from netstack.core.ports import Offload

# A link of the least MTU that IPv4 hosts must take, 576 (RFC 1122 3.3.2), leaves four times as much.
MIN_SEGMENT = 128
MAX_DATAGRAMS = 128  # UDP_MAX_SEGMENTS since Linux 6.9 (include/linux/udp.h); it was 64 before

# What may stand before the ethertype: IEEE 802.1Q and 802.1ad tags. A kernel leaves frames with them undone as well.
_TAGS = (0x8100, 0x88A8)
_MAX_TAGS = 2

_U16 = Struct("!H")
_U32 = Struct("!I")
_CWR = 0x80  # on the first segment alone (RFC 3168 6.1.2)
_ENDS = 0x09  # FIN and PSH: on the last segment alone


class Request(NamedTuple):
    """What a frame lacks. Offsets count from its first byte, and have been checked against it."""

    gso_type: int  # GSO_NONE: it lacks its checksum only
    gso_size: int
    csum_start: int  # where a segmented frame is concerned: where TCP or UDP begins
    csum_offset: int
    network: int  # where IP begins
    payload: int  # where that begins which is to be cut
    end: int

    @property
    def largest_packet(self) -> int:
        """Bytes of the largest IP packet that it will be on a wire."""
        if self.gso_type == GSO_NONE:
            return self.end - self.network
        return min(self.payload + self.gso_size, self.end) - self.network


def has_request(buffer: Buffer, start: int) -> bool:
    """Whether the header before the frame at `start` asks for anything. Untrusted."""
    return bool(buffer[start - HEADER_LENGTH] & NEEDS_CSUM or buffer[start - HEADER_LENGTH + 1])


def read_request(buffer: memoryview, start: int, end: int) -> Request | None:
    """What the header before this frame asks for; None when that does not fit the frame. Untrusted."""
    header = parse_virtio_net(buffer, start - HEADER_LENGTH)
    size = end - start
    if not header.flags & NEEDS_CSUM or header.csum_start < 14 or header.csum_start + header.csum_offset + 2 > size:
        return None  # whoever leaves segments to be cut leaves the checksum as well (virtio 1.2 5.1.6.2.1)
    return _read_packet(header, buffer, start, end)


def _read_packet(header: VirtioNet, buffer: memoryview, start: int, end: int) -> Request | None:
    """Whatever is asked for, the frame is an unfragmented packet of TCP or UDP, and the checksum is that one's own.

    A checksum anywhere else would be two bytes of the guest's choice, written after the frame was looked at.
    """
    at = start + 12
    (ethertype,) = _U16.unpack_from(buffer, at)
    for _ in range(_MAX_TAGS):
        if ethertype in _TAGS and end - at >= 6:
            at += 4
            (ethertype,) = _U16.unpack_from(buffer, at)
    at += 2
    packet: Ipv4 | Ipv6 | None
    kind = header.gso_type  # GSO_ECN is in no link's offer, so a type with it is unknown here
    if ethertype == ETHERTYPE_IPV4 and kind in (GSO_NONE, GSO_TCPV4, GSO_UDP_L4):
        packet = parse_ipv4(buffer, at, end)
    elif ethertype == ETHERTYPE_IPV6 and kind in (GSO_NONE, GSO_TCPV6, GSO_UDP_L4):
        packet = parse_ipv6(buffer, at, end)
    else:
        return None
    if packet is None or packet.more_fragments or packet.fragment_offset:
        return None
    transport = packet.payload_start
    room = packet.payload_end - transport
    if header.csum_start != transport - start:
        return None
    if packet.protocol == PROTOCOL_UDP:
        if kind not in (GSO_NONE, GSO_UDP_L4) or header.csum_offset != UDP_CHECKSUM or room < 8:
            return None
    elif packet.protocol != PROTOCOL_TCP or kind == GSO_UDP_L4 or header.csum_offset != TCP_CHECKSUM or room < 20:
        return None
    if kind == GSO_NONE:
        return Request(GSO_NONE, 0, header.csum_start, header.csum_offset, 14, 0, end - start)
    if kind == GSO_UDP_L4:
        length = 8
        if not header.gso_size or room - length > header.gso_size * MAX_DATAGRAMS:
            return None
    else:
        length = buffer[transport + 12] >> 4 << 2
        if not 20 <= length <= room or header.gso_size < MIN_SEGMENT:
            return None
    return Request(
        kind,
        header.gso_size,
        header.csum_start,
        header.csum_offset,
        at - start,
        header.csum_start + length,
        packet.payload_end - start,
    )


def takes(offload: Offload | None, request: Request) -> bool:
    """Whether a link takes such a frame as it is."""
    if offload is None or not offload.checksum:
        return False
    kind = request.gso_type
    if kind == GSO_NONE:
        return True
    return offload.tso4 if kind == GSO_TCPV4 else offload.tso6 if kind == GSO_TCPV6 else offload.uso


def write_request(request: Request) -> bytes:
    """The virtio-net header for a link that takes the frame."""
    return write_virtio_net(
        NEEDS_CSUM, request.gso_type, request.payload, request.gso_size, request.csum_start, request.csum_offset
    )


def fulfil(frame: bytes, request: Request) -> list[bytes]:
    """The whole frames that this one stands for, nothing left to be done. Untrusted."""
    if request.gso_type == GSO_NONE:
        return [_complete(frame, request)]
    return _segments(frame, request)


def _complete(frame: bytes, request: Request) -> bytes:
    """The frame with its checksum: over everything from csum_start on, the partial sum in the field included."""
    done = bytearray(frame)
    start = request.csum_start
    _U16.pack_into(done, start + request.csum_offset, finish(sum_words(frame[start:])))
    return bytes(done)


def _segments(frame: bytes, request: Request) -> list[bytes]:
    transport = request.csum_start
    check_at = transport + request.csum_offset
    network = request.network
    payload = request.payload
    size = request.gso_size
    end = request.end
    is_tcp = request.gso_type != GSO_UDP_L4
    ipv4 = frame[network] >> 4 == 4
    (pseudo,) = _U16.unpack_from(frame, check_at)
    pseudo -= end - transport  # without the length
    (seq,) = _U32.unpack_from(frame, transport + 4)
    (ident,) = _U16.unpack_from(frame, network + 4)
    flags = frame[transport + 13]
    segments = []
    # A frame without payload is one segment.
    for number, at in enumerate(range(payload, max(end, payload + 1), size)):
        stop = min(at + size, end)
        piece = bytearray(frame[:payload])
        piece += frame[at:stop]
        length = len(piece) - transport
        if ipv4:
            _U16.pack_into(piece, network + 2, len(piece) - network)
            # Not atomic, perhaps: each packet is one that may be fragmented on its own (RFC 6864 4).
            _U16.pack_into(piece, network + 4, (ident + number) & 0xFFFF)
            _U16.pack_into(piece, network + 10, 0)
            _U16.pack_into(piece, network + 10, finish(sum_words(piece[network:transport])))
        else:
            _U16.pack_into(piece, network + 4, len(piece) - network - 40)
        if is_tcp:
            _U32.pack_into(piece, transport + 4, (seq + number * size) & 0xFFFFFFFF)
            keep = 0xFF if stop == end else 0xFF & ~_ENDS
            piece[transport + 13] = flags & (keep if not number else keep & ~_CWR)
        else:
            _U16.pack_into(piece, transport + 4, length)
        _U16.pack_into(piece, check_at, 0)
        _U16.pack_into(piece, check_at, finish(sum_words(piece[transport:]) + (pseudo + length) % 65535))
        segments.append(bytes(piece))
    return segments
