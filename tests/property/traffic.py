"""Real traffic of guests, made by scapy, and ways to damage it."""

from __future__ import annotations

from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptElapsedTime,
    DHCP6OptIA_NA,
    DHCP6OptOptReq,
    DHCP6OptServerId,
)
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    RouterAlert,
    fragment6,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.ntp import NTP
from scapy.packet import Packet, Raw

MAC, OTHER, GATEWAY = "52:54:00:12:34:56", "52:54:00:ab:cd:ef", "52:55:c0:a8:05:02"
ALL = "ff:ff:ff:ff:ff:ff"
GUEST4, OTHER4, GATEWAY4, DNS4, WORLD4 = "192.168.5.15", "192.168.5.16", "192.168.5.2", "192.168.5.3", "198.51.100.7"
GUEST6, OTHER6, GATEWAY6, WORLD6 = "fd00:c0a8:5::15", "fd00:c0a8:5::16", "fd00:c0a8:5::2", "2001:db8::7"
LOCAL6 = "fe80::5054:ff:fe12:3456"


def _frames() -> list[bytes]:
    up = Ether(dst=GATEWAY, src=MAC)
    all_ = Ether(dst=ALL, src=MAC)
    ip, ip6 = IP(src=GUEST4, dst=WORLD4), IPv6(src=GUEST6, dst=WORLD6)
    options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
    udp = UDP(sport=1000, dport=53) / DNS(rd=1, qd=DNSQR(qname="example.org"))
    chaddr = bytes.fromhex(MAC.replace(":", ""))
    wishes = ("param_req_list", [1, 3, 6, 12, 15, 26, 28, 42, 51, 54, 58, 59, 119, 121])
    bootp = (
        IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / BOOTP(chaddr=chaddr, xid=7, flags=0x8000)
    )
    solicit = IPv6(src=LOCAL6, dst="ff02::1:2") / UDP(sport=546, dport=547)
    duid = DHCP6OptClientId(duid=DUID_LL(lladdr=MAC))
    groups = Ether(dst="33:33:00:00:00:16", src=MAC)
    packets: list[Packet] = [
        up / ip / TCP(sport=40000, dport=80, flags="S", seq=1, options=options),
        up / ip6 / TCP(sport=40000, dport=80, flags="S", seq=1, options=options),
        up / ip / TCP(sport=40000, dport=80, flags="PA", seq=2, ack=1) / Raw(b"GET / HTTP/1.1\r\n\r\n"),
        up / ip / TCP(sport=40000, dport=80, flags="FA", seq=2, ack=1),
        up / ip / TCP(sport=40000, dport=80, flags="R", seq=2),
        up / ip / udp,
        up / ip6 / udp,
        up / IP(src=GUEST4, dst=DNS4) / udp,
        up / IP(src=GUEST4, dst=GATEWAY4) / UDP(sport=1000, dport=123) / NTP(version=4, mode=3),
        up / IP(src=GUEST4, dst=GATEWAY4) / ICMP(id=1, seq=1) / Raw(b"ping"),
        up / IP(src=GUEST4, dst=WORLD4, ttl=1) / ICMP(id=1, seq=1) / Raw(b"ping"),
        up / IPv6(src=GUEST6, dst=GATEWAY6) / ICMPv6EchoRequest(data=b"ping"),
        up / IPv6(src=GUEST6, dst=WORLD6) / ICMPv6EchoRequest(data=b"ping"),
        up / ip / ICMP(type=3, code=3) / IP(src=WORLD4, dst=GUEST4) / UDP(sport=53, dport=1000) / Raw(b"quoted"),
        up / ip6 / ICMPv6PacketTooBig(mtu=1280) / IPv6(src=WORLD6, dst=GUEST6) / UDP(sport=53, dport=1000),
        all_ / bootp / DHCP(options=[("message-type", "discover"), ("hostname", b"guest"), wishes, "end"]),
        all_ / bootp / DHCP(options=[("message-type", "request"), ("requested_addr", GUEST4), wishes, "end"]),
        all_ / bootp / DHCP(options=[("message-type", "release"), ("server_id", GATEWAY4), "end"]),
        groups
        / solicit
        / DHCP6_Solicit(trid=1)
        / duid
        / DHCP6OptIA_NA(iaid=1)
        / DHCP6OptOptReq()
        / DHCP6OptElapsedTime(),
        groups
        / solicit
        / DHCP6_Request(trid=2)
        / duid
        / DHCP6OptServerId(duid=DUID_LL(lladdr=GATEWAY))
        / DHCP6OptIA_NA(),
        groups / IPv6(src="::", dst="ff02::1:ff12:3456", hlim=255) / ICMPv6ND_NS(tgt=LOCAL6),
        groups / IPv6(src=LOCAL6, dst="ff02::2", hlim=255) / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=MAC),
        up / IPv6(src=LOCAL6, dst=GATEWAY6, hlim=255) / ICMPv6ND_NS(tgt=GATEWAY6) / ICMPv6NDOptSrcLLAddr(lladdr=MAC),
        groups / IPv6(src=GUEST6, dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt=GUEST6) / ICMPv6NDOptDstLLAddr(lladdr=MAC),
        groups
        / IPv6(src=LOCAL6, dst="ff02::16", hlim=1)
        / IPv6ExtHdrHopByHop(options=[RouterAlert(), PadN()])
        / ICMPv6MLReport2(),
        up / ip6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(type=4) / udp,
        up / ip6 / IPv6ExtHdrFragment(nh=17) / udp,
        all_ / ARP(op=1, hwsrc=MAC, psrc=GUEST4, pdst=GATEWAY4),
        all_ / ARP(op=1, hwsrc=MAC, psrc="0.0.0.0", pdst=GUEST4),
        up / ARP(op=2, hwsrc=MAC, psrc=GUEST4, hwdst=GATEWAY, pdst=GATEWAY4),
        Ether(dst=OTHER, src=MAC) / IP(src=GUEST4, dst=OTHER4) / ICMP() / Raw(b"to my neighbor"),
        Ether(dst="01:00:5e:00:00:fb", src=MAC)
        / IP(src=GUEST4, dst="224.0.0.251")
        / UDP(sport=5353, dport=5353)
        / DNS(),
        Ether(dst="01:00:5e:00:00:16", src=MAC) / IP(src=GUEST4, dst="224.0.0.22", proto=2) / Raw(b"\x22" + bytes(15)),
        up / Dot1Q(vlan=5) / ip / udp,
        up / IP(src=GUEST4, dst=WORLD4, proto=132) / Raw(b"sctp" * 4),
        up / IP(src=GUEST4, dst=WORLD4, options=[b"\x94\x04\0\0"]) / udp,
    ]
    big = IP(src=GUEST4, dst=WORLD4, id=77, flags=0) / UDP(sport=1000, dport=2000) / Raw(bytes(3000))
    packets += [up / each for each in fragment(big, 1480)]
    big6 = IPv6(src=GUEST6, dst=WORLD6) / IPv6ExtHdrFragment(id=78) / UDP(sport=1000, dport=2000) / Raw(bytes(3000))
    packets += [up / each for each in fragment6(big6, 1480)]
    return [bytes(packet) for packet in packets]


FRAMES = _frames()

# Where a length, a type or a fragment offset stands: behind the Ethernet header.
_FIELDS = tuple(range(12, 60))


@st.composite
def damaged_frames(draw: st.DrawFn) -> bytes:
    """A frame of real traffic: bytes changed, cut short, with something behind it, or with a piece of another."""
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for at in draw(st.lists(st.sampled_from(_FIELDS) | st.integers(0, len(frame) - 1), max_size=3)):
        if at < len(frame):
            frame[at] = draw(st.integers(0, 255) | st.sampled_from((0, 1, 0x45, 0x60, 0x7F, 0x80, 0xFF)))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        del frame[draw(st.integers(0, len(frame))) :]
    elif kind == 1:
        frame += draw(st.binary(max_size=40))
    elif kind == 2:
        other = draw(st.sampled_from(FRAMES))
        at = draw(st.integers(0, min(len(frame), len(other))))
        frame[at:] = other[at:]
    return bytes(frame)


def batches() -> st.SearchStrategy[list[bytes]]:
    """What one read of a link may give."""
    frame = st.one_of(st.sampled_from(FRAMES), damaged_frames(), damaged_frames(), st.binary(max_size=200))
    return st.lists(frame, max_size=8)
