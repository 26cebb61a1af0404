"""Frames for tests: guests' frames made, ours taken apart, and scapy as the independent judge of both."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from ipaddress import ip_address

from scapy.layers.inet import ICMP, IP, TCP, UDP, in4_chksum
from scapy.layers.inet6 import IPv6, in6_chksum
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import checksum

from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, MIN_FRAME, write_ethernet
from netstack.wire.ipv4 import write_ipv4
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.tcp import ACK, FIN, PSH, RST, SYN, URG, parse_options, parse_tcp, write_tcp
from netstack.wire.udp import write_udp

FLAGS = {"F": FIN, "S": SYN, "R": RST, "P": PSH, "A": ACK, "U": URG}
TCP_PROTOCOL = 6


@dataclass
class Seg:
    """A TCP segment of a script. None: as it should be (guest), or whatever it is (expected)."""

    flags: str
    seq: int | None = None
    ack: int | None = None
    win: int | None = None
    data: bytes | None = None
    mss: int | None = None
    scale: int | None = None
    options: bytes | None = field(default=None, repr=False)

    @property
    def bits(self) -> int:
        """The flags as the header has them."""
        return sum(FLAGS[letter] for letter in self.flags)


def letters(bits: int) -> str:
    """Flags as a script writes them."""
    return "".join(letter for letter in "SFRPAU" if bits & FLAGS[letter])


def ip_frame(
    dst_mac: bytes, src_mac: bytes, src: bytes, dst: bytes, protocol: int, body: bytes, ttl: int = 64
) -> bytes:
    """An Ethernet frame around one IP packet, not padded: virtio guests do not."""
    if len(src) == 4:
        head = write_ethernet(dst_mac, src_mac, ETHERTYPE_IPV4) + write_ipv4(src, dst, protocol, len(body), ttl=ttl)
    else:
        head = write_ethernet(dst_mac, src_mac, ETHERTYPE_IPV6) + write_ipv6(src, dst, protocol, len(body), ttl=ttl)
    return head + body


def tcp_frame(
    dst_mac: bytes,
    src_mac: bytes,
    src: bytes,
    dst: bytes,
    ports: tuple[int, int],
    seq: int,
    ack: int,
    bits: int,
    window: int,
    data: bytes = b"",
    options: bytes = b"",
    ttl: int = 64,
) -> bytes:
    """A guest's TCP segment as a frame."""
    body = write_tcp(src, dst, *ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, bits, window, data, options)
    return ip_frame(dst_mac, src_mac, src, dst, TCP_PROTOCOL, body, ttl)


def udp_frame(
    dst_mac: bytes, src_mac: bytes, src: bytes, dst: bytes, ports: tuple[int, int], payload: bytes, ttl: int = 64
) -> bytes:
    """A guest's datagram as a frame."""
    return ip_frame(dst_mac, src_mac, src, dst, 17, write_udp(src, dst, *ports, payload), ttl)


def syn_options(mss: int | None, scale: int | None) -> bytes:
    """MSS and window scale, as Linux orders them."""
    options = b"" if mss is None else struct.pack("!BBH", 2, 4, mss)
    return options if scale is None else options + bytes((1, 3, 3, scale))


@dataclass
class Received:
    """A TCP segment that the stack sent to a guest."""

    src: bytes
    dst: bytes
    src_port: int
    dst_port: int
    seq: int
    ack: int
    bits: int
    win: int
    data: bytes
    mss: int | None
    scale: int | None


def read_segment(frame: bytes) -> Received | None:
    """The TCP segment of a frame of ours; None when it is something else."""
    ethertype = int.from_bytes(frame[12:14], "big")
    if ethertype == ETHERTYPE_IPV4 and frame[23] == TCP_PROTOCOL:
        start, end = 34, 14 + int.from_bytes(frame[16:18], "big")
        src, dst = frame[26:30], frame[30:34]
    elif ethertype == ETHERTYPE_IPV6 and frame[20] == TCP_PROTOCOL:
        start, end = 54, 54 + int.from_bytes(frame[18:20], "big")
        src, dst = frame[22:38], frame[38:54]
    else:
        return None
    tcp = parse_tcp(frame, start, end)
    assert tcp is not None
    options = parse_options(frame, tcp.options_start, tcp.payload_start)
    return Received(
        src,
        dst,
        tcp.src_port,
        tcp.dst_port,
        tcp.seq,
        tcp.ack,
        tcp.flags,
        tcp.window,
        frame[tcp.payload_start : end],
        options.mss,
        options.window_scale,
    )


def judge(frame: bytes) -> None:
    """Assert that scapy finds nothing wrong with a frame that leaves: length, checksums, padding, no unknown rest."""
    assert len(frame) >= MIN_FRAME, f"a frame of {len(frame)} bytes"
    ether = Ether(frame)
    if ether.type == ETHERTYPE_IPV4:
        ip = ether[IP]
        size = 14 + ip.len
        assert ip.version == 4
        assert checksum(frame[14 : 14 + 4 * ip.ihl]) == 0, "IPv4 header checksum"
        body = frame[14 + 4 * ip.ihl : size]
        if not ip.frag and not ip.flags.MF:
            if ip.proto in (6, 17):
                assert ip.haslayer(TCP if ip.proto == 6 else UDP)
                assert in4_chksum(ip.proto, ip, body) == 0, f"checksum of {ip.summary()}"
            elif ip.proto == 1:
                assert ip.haslayer(ICMP)
                assert checksum(body) == 0, f"checksum of {ip.summary()}"
    elif ether.type == ETHERTYPE_IPV6:
        ip = ether[IPv6]
        size = 54 + ip.plen
        assert ip.version == 6
        if ip.nh in (6, 17, 58):
            assert not isinstance(ip.payload, Raw), ip.summary()
            assert in6_chksum(ip.nh, ip, frame[54:size]) == 0, f"checksum of {ip.summary()}"
    else:
        assert ether.type == 0x0806, f"ethertype {ether.type:#x}"
        assert ether[ARP].hwlen == 6
        size = 42
    assert size <= len(frame), "cut short"
    assert len(frame) == max(size, MIN_FRAME), "more than padding behind the packet"
    assert not any(frame[size:]), "padding that is not zero shows memory"


def spell(address: bytes) -> str:
    """An address for people."""
    return str(ip_address(address))
