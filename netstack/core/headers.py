"""Ethernet, IP and TCP header of a frame in one unpack, as the fast paths of the stack take them.

What would be SEG.SEQ are, of UDP, u16 length and u16 checksum.
"""

from __future__ import annotations

import struct

# MACs 8+4 | ethertype 2 | version+IHL 1 | TOS | total length 2 | identification | flags+offset 2 | TTL | protocol 1 |
# checksum | both addresses 8 | both ports 4 | SEG.SEQ 4 | SEG.ACK 4 | data offset 1 | flags 1 | SEG.WND 2
FRAME4 = struct.Struct("!QIHBxHxxHxBxxQIIIBBH")
# MACs 8+4 | ethertype 2 | version, class, label | payload length 2 | next header 1 | hop limit | both addresses 32 |
# TCP
FRAME6 = struct.Struct("!QIHBxxxHBx32sIIIBBH")
SMALLEST4 = 54
SMALLEST6 = 74
