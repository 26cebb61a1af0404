"""Which address is whose: the gateway's, a guest's, the host's, the world's."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

LOOPBACK4 = b"\x7f\0\0\1"
LOOPBACK6 = bytes(15) + b"\1"
UNSPECIFIED4 = bytes(4)
UNSPECIFIED6 = bytes(16)
BROADCAST4 = b"\xff" * 4
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")

# ::/96 (RFC 4291 2.5.5.1: "IPv4-compatible", and :: and ::1) and ::ffff:0:0/96: a host's socket takes the latter for
# IPv4.
_LOW = bytes(12)
_MAPPED = bytes(10) + b"\xff\xff"


def link_local(mac: bytes) -> bytes:
    """The IPv6 link-local address of a MAC: fe80::/64 and the modified EUI-64 (RFC 4291 appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:6]


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of one network. Packed: 4 or 16 bytes."""

    mac: bytes
    subnet: IPv4Network
    gateway: bytes
    dns: bytes
    subnet6: IPv6Network
    gateway6: bytes
    dns6: bytes
    host_loopback: bool = True
    borrowed: set[bytes] = field(default_factory=set)
    """The host's own addresses, while a guest has them (`address = "host"`): its owner alone may send from them."""
    link_local: bytes = field(init=False)
    own: frozenset[bytes] = field(init=False)  # every unicast address the gateway answers to
    _network: int = field(init=False)
    _mask: int = field(init=False)
    _broadcast: bytes = field(init=False)
    _prefix6: bytes = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "link_local", link_local(self.mac))
        put(self, "own", frozenset((self.gateway, self.dns, self.gateway6, self.dns6, self.link_local)))
        put(self, "_network", int(self.subnet.network_address))
        put(self, "_mask", int(self.subnet.netmask))
        put(self, "_broadcast", self.subnet.broadcast_address.packed)
        put(self, "_prefix6", self.subnet6.network_address.packed[:8])

    def in_subnet(self, address: bytes) -> bool:
        """Whether the address belongs to this network (IPv6: its /64, or link-local)."""
        if len(address) == 4:
            return int.from_bytes(address, "big") & self._mask == self._network
        return address[:8] == self._prefix6 or is_link_local6(address)

    def may_be_guest(self, src: bytes) -> bool:
        """Whether a guest may send from this address at all."""
        if src in self.own or not self.in_subnet(src):
            return src in self.borrowed
        return len(src) == 16 or src not in (self._broadcast, self.subnet.network_address.packed)

    def is_group(self, dst: bytes) -> bool:
        """Broadcast of this network, limited broadcast, or multicast."""
        if len(dst) == 4:
            return dst[0] >= 224 or dst == self._broadcast
        return dst[0] == 0xFF

    def to_host(self, dst: bytes) -> bytes | None:
        """Where the host's socket must send for this destination; None where a guest may not go.

        The gateway is the host's loopback. What the host's kernel would take for itself or for its own wire, without
        the guest being allowed to name it, is refused: 127/8, 0/8, multicast, the IPv4-mapped and -compatible IPv6
        addresses (`::ffff:127.0.0.1` is the host's loopback), link-local IPv6, and this network.
        """
        if len(dst) == 4:
            if dst == self.gateway:
                return LOOPBACK4 if self.host_loopback else None
            if dst[0] in (0, 127) or dst[0] >= 224 or self.in_subnet(dst):
                return None
            return dst
        if dst in (self.gateway6, self.link_local):
            return LOOPBACK6 if self.host_loopback else None
        if dst[0] == 0xFF or dst[:12] in (_LOW, _MAPPED) or self.in_subnet(dst):
            return None
        return dst

    def from_host(self, address: bytes) -> bytes:
        """The peer's address as a guest may see it: the host's loopback is the gateway."""
        if len(address) == 4:
            return self.gateway if address[0] == 127 else address
        return self.gateway6 if address == LOOPBACK6 else address

    def caller(self, address: bytes, length: int) -> bytes:
        """As whom a guest, whose own address has `length` bytes, sees a caller of the host's: as itself, if it can be.

        It cannot where the guest's own system would take the address for something else: its loopback, its own link,
        which is also where this network's addresses are, a group, the other family, or the guest itself, which has the
        host's address.
        """
        if len(address) != length:
            special = True
        elif length == 4:
            special = address[0] in (0, 127) or address[0] >= 224 or address[:2] == b"\xa9\xfe"
        else:
            special = address[0] == 0xFF or address[:12] in (_LOW, _MAPPED)
        if special or self.in_subnet(address) or address in self.borrowed:
            return self.gateway if length == 4 else self.gateway6
        return address

    def router_for(self, address: bytes) -> bytes:
        """The gateway's address of that family, as the source of errors."""
        if len(address) == 4:
            return self.gateway
        return self.link_local if is_link_local6(address) else self.gateway6


def is_link_local6(address: bytes) -> bool:
    """fe80::/10."""
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80
