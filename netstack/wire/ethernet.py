"""Ethernet II frames, without preamble and FCS, and the multicast addresses that IP maps to."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer

# IEEE 802.3 3.1.1 with a type field (3.2.6); RFC 894 for IPv4, RFC 2464 for IPv6:
#   6 bytes  destination
#   6 bytes  source
#   u16      ethertype
_HEADER = Struct("!6s6sH")

HEADER_LENGTH = 14
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV6 = 0x86DD
BROADCAST = b"\xff" * 6

# IEEE 802.3 4A.4.2: minFrameSize is 64 with the FCS. Shorter frames are padded, because drivers of real hardware drop
# them.
MIN_FRAME = 60
# The largest IP packet (RFC 791 3.1, total length) and its header; QEMU's own buffers take 69,632 bytes.
MAX_FRAME = 65535 + HEADER_LENGTH


class Ethernet(NamedTuple):
    """Where a frame goes, where it comes from, and where in the buffer what it carries begins."""

    dst: bytes
    src: bytes
    ethertype: int
    payload_start: int


def parse_ethernet(buffer: Buffer, start: int, end: int) -> Ethernet | None:
    """Untrusted. None when the header is cut short. VLAN tags are not looked into: 0x8100 is then the ethertype."""
    if end - start < HEADER_LENGTH:
        return None
    dst, src, ethertype = _HEADER.unpack_from(buffer, start)
    return Ethernet(dst, src, ethertype, start + HEADER_LENGTH)


def write_ethernet(dst: bytes, src: bytes, ethertype: int) -> bytes:
    """The 14-byte header. The frame is to be padded to MIN_FRAME by whoever joins it with the payload."""
    return _HEADER.pack(dst, src, ethertype)


def is_multicast(mac: bytes) -> bool:
    """Whether the group bit is set (IEEE 802.3 3.2.3): true for broadcast as well."""
    return bool(mac[0] & 1)


def multicast_mac(address: bytes) -> bytes:
    """The MAC of an IP multicast address: its low 23 bits (RFC 1112 6.4) or its low 32 bits (RFC 2464 7)."""
    if len(address) == 4:
        return bytes((0x01, 0x00, 0x5E, address[1] & 0x7F, address[2], address[3]))
    return b"\x33\x33" + address[12:]


def format_mac(mac: bytes) -> str:
    """As 52:54:00:12:34:56."""
    return mac.hex(":")


def parse_mac(text: str) -> bytes:
    """Six pairs of hexadecimal digits with colons or dashes between. For what people write: raises ValueError."""
    pairs = text.strip().replace("-", ":").split(":")
    if len(pairs) != 6 or not all(1 <= len(pair) <= 2 and pair.isalnum() for pair in pairs):
        raise ValueError(f"{text!r} is not a MAC address such as 52:54:00:12:34:56")
    try:
        return bytes(int(pair, 16) for pair in pairs)
    except ValueError:
        raise ValueError(f"{text!r} is not a MAC address such as 52:54:00:12:34:56") from None
