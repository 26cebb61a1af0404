"""ARP for IPv4 over Ethernet (RFC 826)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer

# RFC 826, "Packet format", with the lengths of Ethernet and IPv4:
#   u16      hardware type (1: Ethernet)
#   u16      protocol type (0x0800: IPv4)
#   u8       length of a hardware address (6)
#   u8       length of a protocol address (4)
#   u16      operation
#   6 bytes  sender's hardware address
#   4 bytes  sender's protocol address
#   6 bytes  target's hardware address
#   4 bytes  target's protocol address
_PACKET = Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)

LENGTH = 28
REQUEST = 1
REPLY = 2


class Arp(NamedTuple):
    """A request or a reply. In a probe the sender's address is 0.0.0.0 (RFC 5227 1.1)."""

    operation: int
    sender_mac: bytes
    sender_address: bytes
    target_mac: bytes
    target_address: bytes


def parse_arp(buffer: Buffer, start: int, end: int) -> Arp | None:
    """Untrusted. None unless it is a request or a reply for IPv4 over Ethernet. Padding behind it is ignored."""
    if end - start < LENGTH:
        return None
    hardware, protocol, mac_length, address_length, operation, *addresses = _PACKET.unpack_from(buffer, start)
    if (hardware, protocol, mac_length, address_length) != _ETHERNET_IPV4 or operation not in (REQUEST, REPLY):
        return None
    return Arp(operation, *addresses)


def write_arp(
    operation: int, sender_mac: bytes, sender_address: bytes, target_mac: bytes, target_address: bytes
) -> bytes:
    """The 28 bytes behind the Ethernet header. In a request the target's MAC is not known: six zeros are usual."""
    return _PACKET.pack(*_ETHERNET_IPV4, operation, sender_mac, sender_address, target_mac, target_address)
