"""The virtio-net header that stands before each frame on links with offload (virtio 1.2 section 5.1.6).

It says what the sender left for somebody else to do: a checksum to be completed, a packet to be cut into segments. The
same twelve bytes come from a tap with IFF_VNET_HDR (12 by TUNSETVNETHDRSZ, little-endian by TUNSETVNETLE) and from the
rings of a virtio-net device of version 1.

NEEDS_CSUM: the checksum field at csum_start + csum_offset holds the sum of the pseudo-header, folded and not
complemented; the sum from csum_start to the end of the frame, complemented, is to be put there. Offsets count from the
first byte of the Ethernet frame.

gso_type other than NONE: headers of hdr_len bytes, and a payload to be cut into pieces of gso_size bytes. The checksum
is then always left to be completed, over pseudo-headers whose length is that of the whole.

Twelve zero bytes ask for nothing.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer

# virtio 1.2 section 5.1.6:
#   u8   flags
#   u8   gso_type
#   le16 hdr_len      Ethernet, IP and TCP or UDP header together; a hint only
#   le16 gso_size     payload bytes of each segment
#   le16 csum_start
#   le16 csum_offset
#   le16 num_buffers  toward the guest: how many of its buffers hold the frame; from it: 0
HEADER = Struct("<BBHHHHH")
HEADER_LENGTH = 12
GSO_TYPE_BEFORE = 11  # so far before the frame stands gso_type

NEEDS_CSUM = 1
DATA_VALID = 2  # the checksum was verified by whoever had the frame before

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5  # datagrams of equal size, both families (UDP_SEGMENT)
GSO_ECN = 0x80  # with TCP: the first segment alone carries CWR

# Where the checksum field stands in the transport's header.
TCP_CHECKSUM = 16
UDP_CHECKSUM = 6


class VirtioNet(NamedTuple):
    """What the sender of a frame left to be done."""

    flags: int
    gso_type: int
    header_length: int
    gso_size: int
    csum_start: int
    csum_offset: int
    buffers: int


def parse_virtio_net(buffer: Buffer, start: int) -> VirtioNet:
    """The header at `start`, as it is: any twelve bytes are one. Untrusted."""
    return VirtioNet._make(HEADER.unpack_from(buffer, start))


def write_virtio_net(
    flags: int, gso_type: int, header_length: int, gso_size: int, csum_start: int, csum_offset: int
) -> bytes:
    """The header, for one buffer."""
    return HEADER.pack(flags, gso_type, header_length, gso_size, csum_start, csum_offset, 0)
