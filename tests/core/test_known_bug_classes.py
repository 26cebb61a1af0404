"""What other user-mode networks got wrong, by class, through the whole stack: libslirp's security record and passt's.

Python does not read beyond a buffer by itself, but a length that is believed still shows other guests' bytes, keeps
memory or ends the process. World.feed puts marked bytes around each frame and writes over all of it afterwards, so that
an answer with such bytes is a leak.
"""

from __future__ import annotations

import struct
import time

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netstack.wire.arp import write_arp
from netstack.wire.ipv4 import write_ipv4
from tests.fakes import FakeLink
from tests.frames import ip_frame, tcp_frame, udp_frame
from tests.script import Talk, established, seg
from tests.world import GATEWAY4, GATEWAY6, GUEST4, GUEST6, GUEST_MAC, WORLD4, WORLD6, World

MARKS = (b"\xdd\xdd\xdd", b"\xee\xee\xee", b"\xcc\xcc\xcc")


class Bench:
    """A gateway with its services and one guest that may send anything."""

    def __init__(self) -> None:
        self.world = World()
        self.services = self.world.add_services()
        self.link: FakeLink = self.world.add_link()

    def send(self, *frames: bytes) -> list[bytes]:
        """The answers, which show nothing of what lies around the frames."""
        self.world.receive(self.link, *frames)
        answers = self.world.take(self.link)
        for answer in answers:
            assert not any(mark in answer for mark in MARKS), "shows memory that is not the guest's"
        return answers

    @property
    def drops(self) -> dict[str, int]:
        return self.world.drops

    def still_works(self) -> None:
        """Whatever was sent, the next connection is as good as the first."""
        self.world.take(self.link)
        established(talk=Talk(world=self.world, link=self.link, guest_port=50_000))

    def raw(self, packet: Packet) -> bytes:
        """scapy's frame, with exactly the fields it was told, lies included."""
        return self.world.mac + GUEST_MAC + (b"\x08\0" if packet.version == 4 else b"\x86\xdd") + bytes(packet)


@pytest.fixture
def bench() -> Bench:
    return Bench()


GATEWAY_MAC = bytes.fromhex("5255c0a80502")

SAMPLES = {
    "tcp": tcp_frame(GATEWAY_MAC, GUEST_MAC, GUEST4, WORLD4, (1000, 80), 1, 0, 2, 65535, b"", b"\2\4\5\xb4"),
    "udp": udp_frame(GATEWAY_MAC, GUEST_MAC, GUEST4, WORLD4, (1000, 53), b"question"),
    "icmp": ip_frame(GATEWAY_MAC, GUEST_MAC, GUEST4, GATEWAY4, 1, b"\x08\0\0\0\0\1\0\1payload!"),
    "dhcp": udp_frame(
        b"\xff" * 6,
        GUEST_MAC,
        bytes(4),
        b"\xff" * 4,
        (68, 67),
        b"\1\1\6\0" + b"\1\2\3\4" + bytes(20) + GUEST_MAC + bytes(10 + 192) + b"\x63\x82\x53\x63\x35\1\1\xff",
    ),
    "arp": b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + write_arp(1, GUEST_MAC, GUEST4, bytes(6), GATEWAY4),
    "tcp6": tcp_frame(GATEWAY_MAC, GUEST_MAC, GUEST6, WORLD6, (1000, 80), 1, 0, 2, 65535),
    "udp6": udp_frame(GATEWAY_MAC, GUEST_MAC, GUEST6, WORLD6, (1000, 53), b"question"),
    "icmp6": ip_frame(GATEWAY_MAC, GUEST_MAC, GUEST6, GATEWAY6, 58, b"\x80\0\0\0\0\1\0\1payload!"),
}


# ---- short headers: CVE-2020-29129, CVE-2020-29130, CVE-2021-3592, CVE-2021-3593, CVE-2021-3594, CVE-2021-3595


@pytest.mark.parametrize("name", SAMPLES)
def test_every_prefix_of_every_kind_of_frame(bench: Bench, name: str) -> None:
    """Cut short anywhere, the frame is dropped and counted; nothing behind its end is looked at."""
    whole = SAMPLES[name]
    for size in range(len(whole)):
        before = sum(bench.drops.values())
        answers = bench.send(whole[:size])
        assert answers == [] or name == "tcp6", (size, answers)
        # Behind the Ethernet header a padded frame may be complete; what is not complete is counted.
        assert sum(bench.drops.values()) == before + 1, size
    assert bench.world.host.opened == []
    bench.still_works()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_prefix_padded_to_a_whole_frame(bench: Bench, name: str) -> None:
    """The lengths inside say more than there is, and behind it there is something."""
    whole = SAMPLES[name]
    for size in range(14, len(whole)):
        bench.send(whole[:size].ljust(len(whole), b"\xff"))
    bench.still_works()


def test_arp_in_a_short_frame(bench: Bench) -> None:
    """CVE-2020-29130: the target address would have been read behind the frame."""
    whole = SAMPLES["arp"]
    for size in range(14, len(whole)):
        assert bench.send(whole[:size]) == []
    assert len(bench.send(whole)) == 1


def test_ncsi_is_not_spoken(bench: Bench) -> None:
    """CVE-2020-29129: libslirp answers ethertype 0x88f8."""
    assert bench.send(bench.world.mac + GUEST_MAC + b"\x88\xf8" + bytes(46)) == []
    assert bench.drops == {"ethertype_unknown": 1}


# ---- lying lengths


@pytest.mark.parametrize("total", (0, 1, 19, 20, 27, 28, 37, 1500, 65535))
def test_the_total_length_of_ipv4_lies(bench: Bench, total: int) -> None:
    """CVE-2021-3594: a UDP header that is not inside of the packet."""
    frame = bytearray(SAMPLES["udp"])
    assert len(frame) == 50
    frame[16:18] = total.to_bytes(2, "big")
    if total == 36:
        return
    assert bench.send(bytes(frame)) == []
    reason = "udp_bad_length" if 20 <= total <= 36 else "ipv4_malformed"
    assert bench.drops == {reason: 1}


@pytest.mark.parametrize("ihl", range(16))
def test_the_header_length_of_ipv4_lies(bench: Bench, ihl: int) -> None:
    frame = bytearray(SAMPLES["udp"])
    frame[14] = 0x40 | ihl
    bench.send(bytes(frame))
    if ihl < 5 or ihl * 4 > 36:
        assert bench.drops == {"ipv4_malformed": 1}
        assert bench.world.host.opened == []


@pytest.mark.parametrize("length", (0, 1, 7, 17, 100, 65535))
@pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))
def test_the_length_of_udp_lies(bench: Bench, ipv6: bool, length: int) -> None:
    """CVE-2021-3593, CVE-2021-3594: less than a header, or more than the packet."""
    frame = bytearray(SAMPLES["udp6" if ipv6 else "udp"])
    at = 54 if ipv6 else 34
    frame[at + 4 : at + 6] = length.to_bytes(2, "big")
    assert bench.send(bytes(frame)) == []
    assert bench.drops == {"udp_bad_length": 1}
    assert bench.world.host.opened == []


@pytest.mark.parametrize("words", (0, 1, 4, 7, 15))
@pytest.mark.parametrize("name", ("tcp", "tcp6"))
def test_the_data_offset_of_tcp_lies(bench: Bench, name: str, words: int) -> None:
    frame = bytearray(SAMPLES[name])
    at = 54 if name == "tcp6" else 34
    frame[at + 12] = words << 4
    assert bench.send(bytes(frame)) == []
    assert bench.drops == {"tcp_malformed": 1}


def test_the_data_offset_of_tcp_lies_on_the_fast_path() -> None:
    talk = established()
    for words in (0, 1, 4, 9, 15):
        frame = bytearray(talk.frame(seg("PA", seq=1, data=b"hello")))
        frame[46] = words << 4
        talk.world.receive(talk.link, bytes(frame))
    talk.host.takes(b"")
    assert talk.drops == {"tcp_malformed": 5}
    talk.guest(seg("PA", seq=1, data=b"hello"))
    talk.host.takes(b"hello")


@pytest.mark.parametrize(
    "options",
    (
        b"\2\0\0\0",
        b"\2\1\5\xb4",
        b"\2\xff\5\xb4",
        b"\3\3\xff\2",
        b"\xfe\0\xfe\0",
        b"\1\1\1\2",
        b"\2\4\0\0",
        b"\2\3\1\1",
        b"\x08\x0a\0\0",
        b"\xff" * 40,
        b"\1" * 40,
    ),
    ids=bytes.hex,
)
def test_the_length_of_a_tcp_option_lies(bench: Bench, options: bytes) -> None:
    """RFC 9293 3.2, MUST-7; an endless loop in others."""
    options = options.ljust(-(-len(options) // 4) * 4, b"\0")
    frame = tcp_frame(bench.world.mac, GUEST_MAC, GUEST4, WORLD4, (1000, 80), 1, 0, 2, 65535, b"", options)
    (answer,) = bench.send(frame)
    assert Ether(answer)["TCP"].flags == "SA"


@pytest.mark.parametrize("length", (1, 3, 7, 15, 17, 100, 1232, 65535))
def test_the_payload_length_of_ipv6_lies_about_icmpv6(bench: Bench, length: int) -> None:
    """CVE-2020-10756: an echo reply as long as the request claimed to be, with what lay behind it."""
    frame = bytearray(SAMPLES["icmp6"])
    assert len(frame) == 54 + 16
    frame[18:20] = length.to_bytes(2, "big")
    answers = bench.send(bytes(frame))
    if length > 16:
        assert answers == []
        assert bench.drops == {"ipv6_malformed": 1}
    elif length < 8:
        assert answers == []
        assert bench.drops == {"icmp_malformed": 1}
    else:
        assert Ether(answers[0])[IPv6].plen == length


def test_echo_replies_are_as_long_as_their_requests(bench: Bench) -> None:
    for size in (0, 1, 8, 1000, 1452):
        request = IPv6(src="fd00:c0a8:5::15", dst="fd00:c0a8:5::2") / ICMPv6EchoRequest(data=b"x" * size)
        (answer,) = bench.send(bench.raw(request))
        assert Ether(answer)[IPv6].plen == 8 + size


@pytest.mark.parametrize("size", (0, 1, 4, 7))
def test_neighbor_discovery_cut_short(bench: Bench, size: int) -> None:
    for kind in range(130, 145):
        body = (bytes((kind,)) + bytes(30))[:size] if size else b""
        if not body:
            continue
        frame = bytearray(ip_frame(bench.world.mac, GUEST_MAC, GUEST6, GATEWAY6, 58, body))
        frame[21] = 255
        assert bench.send(bytes(frame)) == []


@pytest.mark.parametrize("length", (0, 2, 31, 255))
def test_the_length_of_a_neighbor_discovery_option_lies(bench: Bench, length: int) -> None:
    """RFC 4861 4.6: a length of 0 must not be taken for an option; an endless loop in others."""
    body = b"\x87\0\0\0" + bytes(4) + GATEWAY6 + bytes((1, length)) + GUEST_MAC
    frame = bytearray(ip_frame(bench.world.mac, GUEST_MAC, GUEST6, GATEWAY6, 58, body))
    frame[21] = 255
    assert bench.send(bytes(frame)) == []
    assert bench.drops == {"ndp_malformed": 1}


# ---- DHCP options past the end: CVE-2017-11434, CVE-2021-3592


def _dhcp(options: bytes) -> bytes:
    payload = b"\1\1\6\0" + b"\1\2\3\4" + bytes(20) + GUEST_MAC + bytes(10 + 192) + b"\x63\x82\x53\x63" + options
    return udp_frame(b"\xff" * 6, GUEST_MAC, bytes(4), b"\xff" * 4, (68, 67), payload)


@pytest.mark.parametrize(
    "options",
    (
        b"",
        b"\x35",
        b"\x35\1",
        b"\x35\xff",
        b"\x35\0\xff",
        b"\x35\2\1\1\xff",
        b"\x35\1\xff\xff",
        b"\x35\1\1\x37",
        b"\x35\1\1\x37\xff",
        b"\x35\1\1\x37\xff\1\3\6",
        b"\x35\1\1\x0c\xffname",
        b"\x35\1\1\x32\2\1\1\xff",
        b"\x35\1\1\x3d\0\xff",
        b"\x35\1\3\x36\1\1\xff",
        b"\x35\1\1\x34\1\3\xff",
        b"\x35\1\1\x34\1\7\xff",
        b"\0" * 300,
        b"\x52\xff" * 100,
        b"\x79\xff" + b"\xff" * 255,
    ),
    ids=lambda options: options[:12].hex(),
)
def test_dhcp_options_past_the_end(bench: Bench, options: bytes) -> None:
    """An answer, or none; and it shows nothing that the guest did not send."""
    answers = bench.send(_dhcp(options), _dhcp(options + b"\xff"))
    for answer in answers:
        assert Ether(answer)[UDP].sport == 67
    bench.still_works()


def test_dhcp_cut_short_anywhere(bench: Bench) -> None:
    """CVE-2021-3592: a BOOTP packet shorter than its structure."""
    payload = _dhcp(b"\x35\1\1\x37\4\1\3\6\x0f\xff")[42:]
    for size in range(236):
        frame = udp_frame(b"\xff" * 6, GUEST_MAC, bytes(4), b"\xff" * 4, (68, 67), payload[:size])
        assert bench.send(frame) == []
    assert bench.services.dhcp.counters == {"dhcp_malformed": 236}


# ---- fragments: CVE-2018-11806, CVE-2019-14378, CVE-2019-15890, CVE-2020-1983


def _fragment4(bench: Bench, offset: int, more: bool, size: int, ident: int = 1) -> bytes:
    head = write_ipv4(
        GUEST4, WORLD4, 17, size, ident=ident, dont_fragment=False, more_fragments=more, fragment_offset=offset
    )
    body = (struct.pack("!HHHH", 1000, 53, size, 0) + b"f" * size)[:size]
    return bench.world.mac + GUEST_MAC + b"\x08\0" + head + body


def _fragment6(bench: Bench, offset: int, more: int, size: int, ident: int = 1) -> bytes:
    header = IPv6ExtHdrFragment(nh=17, offset=offset >> 3, m=more, id=ident)
    return bench.raw(IPv6(src="fd00:c0a8:5::15", dst="2001:db8::7") / header / Raw(b"f" * size))


def test_fragments_beyond_the_largest_packet(bench: Bench) -> None:
    """The "ping of death"."""
    bench.send(_fragment4(bench, 65528, False, 8), _fragment4(bench, 65528, True, 1480))
    bench.send(_fragment6(bench, 65528, 0, 16), _fragment6(bench, 65528, 1, 1024))
    assert bench.world.host.opened == []
    assert bench.world.stack.reassembly.cost < 10_000


@pytest.mark.parametrize("spans", (((0, 1480), (1472, 100)), ((0, 800), (0, 1480)), ((800, 800), (0, 1480), (808, 8))))
def test_overlapping_fragments(bench: Bench, spans: tuple[tuple[int, int], ...]) -> None:
    """RFC 5722, and the same for IPv4 here: the whole datagram goes."""
    for i, (offset, size) in enumerate(spans):
        more = i < len(spans) - 1 or offset == 0
        bench.send(_fragment4(bench, offset, more, size), _fragment6(bench, offset, int(more), size))
    assert bench.world.host.opened == []
    assert bench.drops["reassembly_overlap"] == 2


def test_endless_fragments_stay_within_their_budget(bench: Bench) -> None:
    """A million first pieces cost the budget and not more, and the work for each is bounded."""
    began = time.process_time()
    limit = bench.world.stack.limits.reassembly_bytes
    for ident in range(5000):
        bench.world.feed(
            bench.link, _fragment4(bench, 0, True, 1480, ident), _fragment4(bench, 2960, True, 1480, ident)
        )
        assert bench.world.stack.reassembly.cost <= limit
    assert bench.world.host.opened == []
    assert time.process_time() - began < 10
    bench.world.advance(bench.world.now + 120)
    assert bench.world.stack.reassembly.cost == 0


def test_a_datagram_of_tiny_fragments(bench: Bench) -> None:
    """8 bytes each: 8,191 pieces of one datagram; as many as a real guest never sends."""
    for offset in range(0, 65_000, 8):
        bench.world.feed(bench.link, _fragment4(bench, offset, True, 8))
    assert bench.world.stack.reassembly.cost < 200_000
    assert bench.drops["reassembly_too_many"] >= 1


def test_empty_fragments(bench: Bench) -> None:
    for offset in (0, 8, 65528):
        bench.send(_fragment4(bench, offset, True, 0), _fragment4(bench, offset, False, 0))
    assert bench.world.stack.reassembly.cost == 0


def test_first_fragments_without_a_whole_header(bench: Bench) -> None:
    """RFC 1858: the ports are in the second fragment."""
    bench.send(_fragment4(bench, 8, False, 8), _fragment4(bench, 0, True, 8))
    bench.world.take(bench.link)
    bench.still_works()


# ---- urgent data: CVE-2026-9539


@pytest.mark.parametrize("pointer", (0, 1, 5, 6, 0x7FFF, 0xFFFF))
def test_the_urgent_pointer_points_anywhere(pointer: int) -> None:
    """The guest's number, subtracted from a length, sent gigabytes of libslirp's heap to the host."""
    talk = established()
    for flags in ("PAU", "AU"):
        frame = bytearray(talk.frame(seg(flags, data=b"hello")))
        frame[52:54] = pointer.to_bytes(2, "big")
        talk.world.receive(talk.link, bytes(frame))
        talk.host.takes(b"hello")
    frame = bytearray(talk.frame(seg("AU")))
    frame[52:54] = pointer.to_bytes(2, "big")
    talk.world.receive(talk.link, bytes(frame))
    talk.host.takes(b"")


# ---- payloads are nobody's business: CVE-2019-6778, CVE-2019-9824, CVE-2020-7039, CVE-2020-8608 (tcp_emu)


@pytest.mark.parametrize("port", (21, 113, 513, 514, 543, 544, 6667, 6668, 7070))
@pytest.mark.parametrize(
    "payload", (b"40000,80\r\n", b"PORT 192,168,5,15,4,1\r\n", b"DCC CHAT chat 3232236815 1024\1", b"\r\n" * 1000)
)
def test_no_protocol_is_rewritten(port: int, payload: bytes) -> None:
    talk = established(peer_port=port)
    talk.guest(seg("PA", data=payload[:1400]))
    talk.host.takes(payload[:1400])
    talk.received()
    talk.host.sends(payload[:1400])
    talk.settle()
    talk.expect(seg("PA", data=payload[:1400]))


# ---- services that are not there: CVE-2020-7211, CVE-2021-3595, the TFTP use-after-free of 4.8.0


def test_there_is_no_tftp(bench: Bench) -> None:
    """Port 69 of the gateway is the host's port 69, like any other."""
    request = b"\0\1..\\..\\..\\..\\windows\\win.ini\0octet\0"
    assert bench.send(udp_frame(bench.world.mac, GUEST_MAC, GUEST4, GATEWAY4, (1000, 69), request)) == []
    assert [(each.address, each.port) for sock in bench.world.host.datagrams for each in sock.sent] == [
        (b"\x7f\0\0\1", 69)
    ]


# ---- uninitialised sockets: CVE-2014-3640; crashes that traffic can cause: passt's issues 25959 and 26073


def test_datagrams_to_and_from_port_0(bench: Bench) -> None:
    for ports in ((0, 0), (0, 53), (1000, 0)):
        for src, dst in ((GUEST4, WORLD4), (GUEST6, WORLD6), (GUEST4, GATEWAY4)):
            bench.send(udp_frame(bench.world.mac, GUEST_MAC, src, dst, ports, b"?"))
    bench.still_works()


def test_the_host_has_no_more_sockets(bench: Bench) -> None:
    bench.world.host.refusal = 24
    for name in ("tcp", "tcp6"):
        answers = bench.send(SAMPLES[name])
        assert [str(Ether(answer)["TCP"].flags) for answer in answers] == ["RA"]
    bench.world.host.refusal = 0
    bench.still_works()


def test_errors_about_errors_are_not_sent(bench: Bench) -> None:
    """RFC 1122 3.2.2: or two stacks would talk for ever."""
    inner = IP(src="192.168.5.15", dst="198.51.100.7") / UDP(sport=1000, dport=53)
    for kind in (3, 4, 5, 11, 12):
        packet = IP(src="192.168.5.15", dst="192.168.5.77") / ICMP(type=kind) / bytes(inner)
        assert bench.send(bench.raw(packet)) == []


@pytest.mark.parametrize("quoted", (b"", b"\x45", bytes(20), b"\x45" + bytes(19), b"\x4f" + b"\xff" * 60, b"\x60" * 48))
@pytest.mark.parametrize("kind", (3, 11, 12, 1, 2, 4))
def test_errors_of_guests_with_anything_inside(bench: Bench, kind: int, quoted: bytes) -> None:
    body = bytes((kind, 3)) + bytes(6) + quoted
    assert bench.send(ip_frame(bench.world.mac, GUEST_MAC, GUEST4, WORLD4, 1, body)) == []
    assert bench.send(ip_frame(bench.world.mac, GUEST_MAC, GUEST6, WORLD6, 58, body)) == []
    assert bench.world.host.opened == []
