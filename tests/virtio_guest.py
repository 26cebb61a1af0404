"""What a guest's kernel does with frames that were left undone, by scapy's arithmetic and not by ours; and its own."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import IP, TCP, UDP, in4_pseudoheader
from scapy.layers.inet6 import IPv6, in6_pseudoheader
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from netstack.wire.virtio_net import GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VirtioNet
from tests.fakes import OffloadFrame


def take_apart(frame: OffloadFrame) -> list[bytes]:
    """The frames for which this one stands; an AssertionError when its header says what is not so."""
    header = frame.header
    ether = Ether(bytes(frame))
    ip = ether[IPv6] if ether.haslayer(IPv6) else ether[IP]
    transport = ether[TCP] if ether.haslayer(TCP) else ether[UDP]
    network = len(frame) - len(bytes(ip))
    start = len(frame) - len(bytes(transport))
    assert header.flags == NEEDS_CSUM
    assert header.csum_start == start
    assert header.csum_offset == (16 if isinstance(transport, TCP) else 6)
    assert transport.chksum in _partial_sums(ip, transport), "the partial checksum"
    payload = bytes(transport.payload)
    if header.gso_type == GSO_NONE:
        assert header.gso_size == 0
        return [_rebuilt(ether, payload, 0, last=True)]
    if isinstance(transport, TCP):
        assert header.gso_type == (GSO_TCPV4 if isinstance(ip, IP) else GSO_TCPV6)
    else:
        assert header.gso_type == GSO_UDP_L4
    assert header.header_length == len(frame) - len(payload)
    assert len(payload) > header.gso_size > 0, "one packet, which needs no segmentation"
    assert len(frame) - network <= 65535
    return [
        _rebuilt(ether, payload[at : at + header.gso_size], at, last=at + header.gso_size >= len(payload))
        for at in range(0, len(payload), header.gso_size)
    ]


def leave_undone(frame: bytes, size: int = 0) -> OffloadFrame:
    """The frame as a kernel leaves it: its checksum partial; with `size`, to be cut into packets of so many bytes."""
    ether = Ether(frame)
    ip = ether[IPv6] if ether.haslayer(IPv6) else ether[IP]
    transport = ether[TCP] if ether.haslayer(TCP) else ether[UDP]
    start = len(frame) - len(bytes(transport))
    is_tcp = isinstance(transport, TCP)
    transport.chksum = _partial_sums(ip, transport)[0]
    left = OffloadFrame(bytes(ether))
    kind = (GSO_TCPV4 if isinstance(ip, IP) else GSO_TCPV6) if is_tcp else GSO_UDP_L4
    header_length = len(frame) - len(bytes(transport.payload))
    left.header = VirtioNet(NEEDS_CSUM, kind if size else GSO_NONE, header_length, size, start, 16 if is_tcp else 6, 0)
    return left


def _partial_sums(ip: Any, transport: Packet) -> tuple[int, ...]:
    """The sum of the pseudo-header, folded and not complemented; in both spellings where it is zero."""
    length = len(bytes(transport))
    protocol = 6 if isinstance(transport, TCP) else 17
    pseudo = in4_pseudoheader(protocol, ip, length) if isinstance(ip, IP) else in6_pseudoheader(protocol, ip, length)
    pseudo = bytes(pseudo)
    partial = 0xFFFF - checksum(pseudo)
    return (partial, 0xFFFF - partial) if partial in (0, 0xFFFF) else (partial,)


def _rebuilt(ether: Packet, payload: bytes, at: int, *, last: bool) -> bytes:
    """One packet of it, with lengths and checksums by scapy."""
    piece = ether.copy()
    ip = piece[IPv6] if piece.haslayer(IPv6) else piece[IP]
    transport = piece[TCP] if piece.haslayer(TCP) else piece[UDP]
    transport.remove_payload()
    transport.chksum = None
    if isinstance(ip, IP):
        ip.len = ip.chksum = None
    else:
        ip.plen = None
    if isinstance(transport, TCP):
        transport.seq = (transport.seq + at) & 0xFFFFFFFF
        if not last:
            transport.flags = str(transport.flags).replace("F", "").replace("P", "")
        if at:
            transport.flags = str(transport.flags).replace("C", "")
    else:
        transport.len = None
    return bytes(piece / Raw(payload))
