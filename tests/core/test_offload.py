"""Links with virtio-net headers: what is left to the guest, what guests leave to us, and what they leave to each other.

Frames toward such links are taken apart by scapy (tests/virtio_guest.py) and judged like all others.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether

from netstack.core import offload
from netstack.core.ports import Datagram, Offload
from netstack.wire.virtio_net import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    HEADER,
    HEADER_LENGTH,
    NEEDS_CSUM,
    VirtioNet,
)
from tests.fakes import FakeLink, OffloadFrame
from tests.frames import judge, tcp_frame, udp_frame
from tests.script import Talk, established, seg
from tests.virtio_guest import leave_undone, take_apart
from tests.world import GUEST4, GUEST6, GUEST_MAC, OTHER4, OTHER6, OTHER_MAC, WORLD4, WORLD6, World

ALL = Offload(checksum=True, tso4=True, tso6=True, uso=True)
CHECKSUM = Offload(checksum=True, tso4=False, tso6=False, uso=False)
NONE = Offload(checksum=False, tso4=False, tso6=False, uso=False)

BOTH_FAMILIES = pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))


def talk_on(given: Offload, *, ipv6: bool = False, mtu: int = 1500) -> Talk:
    """An established connection of a guest with a wide window, on a link with these offloads."""
    world = World()
    link = world.add_link(mtu=mtu, offload=given)
    return established(talk=Talk(world=world, link=link, ipv6=ipv6), mss=mtu - (60 if ipv6 else 40), window=32_000)


# ---- toward the guest ----


@BOTH_FAMILIES
def test_data_of_the_host_leaves_in_frames_of_many_segments(ipv6: bool) -> None:
    talk = talk_on(ALL, ipv6=ipv6)
    data = bytes(range(256)) * 800
    talk.host.sends(data)
    talk.settle()
    frames = talk.world.take(talk.link)
    assert len(frames) == 4, "204,800 bytes in frames of up to 64 KiB"
    pieces = []
    for frame in frames:
        assert isinstance(frame, OffloadFrame)
        assert frame.header.gso_type == (GSO_TCPV6 if ipv6 else GSO_TCPV4)
        assert frame.header.gso_size == talk.flow.mss
        pieces += [Ether(each)[TCP] for each in take_apart(frame)]
    assert b"".join(bytes(piece.payload) for piece in pieces) == data
    assert all(piece.seq == (before.seq + len(before.payload)) % 2**32 for before, piece in pairwise(pieces))
    assert ["P" in piece.flags for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_what_fits_one_segment_asks_for_its_checksum_alone() -> None:
    talk = talk_on(ALL)
    talk.host.sends(b"x" * 1000)
    talk.settle()
    (frame,) = talk.world.take(talk.link)
    assert isinstance(frame, OffloadFrame)
    assert frame.header == VirtioNet(NEEDS_CSUM, GSO_NONE, 54, 0, 34, 16, 0)


def test_short_segments_are_complete() -> None:
    """A checksum of some bytes costs less than to say that it is missing."""
    talk = talk_on(ALL)
    talk.host.sends(b"hello")
    talk.settle()
    (frame,) = talk.world.take(talk.link)
    assert isinstance(frame, OffloadFrame)
    assert not any(frame.header)
    judge(frame)


@pytest.mark.parametrize("given", (CHECKSUM, NONE), ids=("checksum", "nothing"))
def test_no_link_is_sent_what_it_does_not_take(given: Offload) -> None:
    talk = talk_on(given)
    talk.host.sends(bytes(100_000))
    talk.settle()
    for frame in talk.world.take(talk.link):
        assert isinstance(frame, OffloadFrame)
        assert frame.header.gso_type == GSO_NONE
        assert given.checksum or not any(frame.header)


def test_a_driver_that_negotiates_anew_is_asked_anew() -> None:
    talk = talk_on(ALL)
    talk.link.offload = NONE
    talk.host.sends(bytes(20_000))
    talk.settle()
    frames = talk.world.take(talk.link)
    assert len(frames) == 14
    assert not any(any(frame.header) for frame in frames if isinstance(frame, OffloadFrame))


def test_what_was_lost_is_sent_again_as_segments() -> None:
    talk = talk_on(ALL)
    talk.host.sends(bytes(30_000))
    talk.settle()
    talk.world.take(talk.link)
    talk.wait(3.0)
    again = talk.world.take(talk.link)
    assert again
    assert all(len(frame) <= 1514 for frame in again)


def test_the_windows_edge_is_kept() -> None:
    talk = talk_on(ALL)
    talk.guest(seg("A", win=10_000 >> 7))
    talk.host.sends(bytes(100_000))
    talk.settle()
    assert sum(len(frame) - 54 for frame in talk.world.take(talk.link)) <= 10_000


# ---- from the guest ----


@BOTH_FAMILIES
def test_a_segment_of_64_kib_is_a_segment(ipv6: bool) -> None:
    talk = talk_on(ALL, ipv6=ipv6)
    data = bytes(range(250)) * 200
    whole = talk.frame(seg("PA", data=data))
    talk.world.receive(talk.link, leave_undone(whole, 1440))
    talk.host.takes(data)
    assert not talk.drops


@BOTH_FAMILIES
@pytest.mark.parametrize("times", (1, 2), ids=("slow road", "known path"))
def test_a_run_of_datagrams_in_one_frame_reaches_the_host_as_datagrams(ipv6: bool, times: int) -> None:
    world = World()
    link = world.add_link(offload=ALL)
    payloads = [bytes((i,)) * 1200 for i in range(5)] + [b"short"]
    src, dst = (GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4)
    frame = udp_frame(world.mac, GUEST_MAC, src, dst, (5000, 6000), b"".join(payloads))
    for _ in range(times):
        world.receive(link, leave_undone(frame, 1200))
    (sock,) = world.host.datagrams
    assert [sent.payload for sent in sock.sent] == payloads * times
    assert not world.drops


def test_a_run_for_a_service_is_taken_apart() -> None:
    world = World()
    link = world.add_link(offload=ALL)
    heard: list[bytes] = []

    def serve(datagram: Datagram, now: float) -> None:
        heard.append(datagram.payload)

    world.stack.register_udp(7, serve)
    gateway = world.stack.addresses.gateway
    frame = udp_frame(world.mac, GUEST_MAC, GUEST4, gateway, (5000, 7), b"a" * 600 + b"b" * 600 + b"c")
    world.receive(link, leave_undone(frame, 600))
    assert heard == [b"a" * 600, b"b" * 600, b"c"]


def test_a_frame_that_would_be_too_many_datagrams_is_dropped() -> None:
    world = World()
    link = world.add_link(offload=ALL)
    frame = udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (5000, 6000), bytes(1000))
    world.receive(link, leave_undone(frame, 1))
    assert world.drops == {"offload_malformed": 1}
    assert not world.host.datagrams


def test_a_large_frame_does_not_say_what_the_guest_takes_and_a_large_packet_does() -> None:
    world = World()
    link = world.add_link(mtu=9000, offload=ALL)
    frame = udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (5000, 6000), bytes(8000))
    world.receive(link, leave_undone(frame, 1000))
    assert world.stack.neighbors.mtu_of(GUEST4) == 1500
    world.receive(link, udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (5001, 6000), bytes(8000)))
    assert world.stack.neighbors.mtu_of(GUEST4) == 8028


# ---- datagrams toward the guest ----


@BOTH_FAMILIES
def test_a_run_of_datagrams_from_the_host_is_one_frame(ipv6: bool) -> None:
    world = World()
    link = world.add_link(offload=ALL)
    src, dst = (GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4)
    world.receive(link, udp_frame(world.mac, GUEST_MAC, src, dst, (5000, 6000), b"ask"))
    (sock,) = world.host.datagrams
    payloads = [bytes((i,)) * 1100 for i in range(20)] + [b"last"]
    sock.incoming.append((b"".join(payloads), dst, 6000, 1100))  # as the kernel merges them
    (handler,) = [each for fd, each in world.poller.handlers.items() if fd == sock.fd]
    handler.on_ready(1, world.now)
    world.end_round()
    frames = world.take(link)
    assert len(frames) == 1
    assert isinstance(frames[0], OffloadFrame)
    assert [bytes(Ether(each)[UDP].payload) for each in take_apart(frames[0])] == payloads


# ---- between guests ----


class Bench:
    """A guest on a link with offload, and one on another link."""

    def __init__(self, theirs: Offload | None, mtu: int = 1500) -> None:
        self.world = World()
        self.one = self.world.add_link("one", offload=ALL)
        self.two = self.world.add_link("two", mtu=mtu, offload=theirs)
        hello = udp_frame(b"\xff" * 6, OTHER_MAC, OTHER4, b"\xff" * 4, (9, 9), b"here")
        self.world.receive(self.two, hello)
        self.world.take(self.one)

    def send(self, *frames: bytes) -> list[bytes]:
        self.world.receive(self.one, *frames)
        return self.world.take(self.two)


def tcp_between(size: int, *, ipv6: bool = False, flags: int = 0x19) -> bytes:
    src, dst = (GUEST6, OTHER6) if ipv6 else (GUEST4, OTHER4)
    data = bytes(i * 7 % 256 for i in range(size))
    return tcp_frame(OTHER_MAC, GUEST_MAC, src, dst, (1000, 2000), 0xFFFFF000, 77, flags, 500, data, b"\1\1\1\0")


def udp_between(size: int, *, ipv6: bool = False) -> bytes:
    src, dst = (GUEST6, OTHER6) if ipv6 else (GUEST4, OTHER4)
    return udp_frame(OTHER_MAC, GUEST_MAC, src, dst, (1000, 2000), bytes(i * 3 % 256 for i in range(size)))


@BOTH_FAMILIES
@pytest.mark.parametrize("theirs", (None, NONE, CHECKSUM), ids=("plain", "nothing", "checksum"))
def test_segments_are_cut_for_a_guest_that_does_not_do_it_itself(ipv6: bool, theirs: Offload | None) -> None:
    whole = tcp_between(10_000, ipv6=ipv6, flags=0x99)  # FIN, PSH, ACK, CWR
    got = Bench(theirs).send(leave_undone(whole, 1400))
    for frame in got:
        judge(frame)
        assert theirs is None or not any(frame.header)  # type: ignore[attr-defined]
    pieces = [Ether(frame)[TCP] for frame in got]
    assert [len(piece.payload) for piece in pieces] == [1400] * 7 + [200]
    assert b"".join(bytes(piece.payload) for piece in pieces) == bytes(Ether(whole)[TCP].payload)
    assert [piece.seq for piece in pieces] == [(0xFFFFF000 + 1400 * i) % 2**32 for i in range(8)]
    assert [str(piece.flags) for piece in pieces] == ["AC", *["A"] * 6, "FPA"]  # RFC 3168 6.1.2


def test_the_packets_of_one_frame_are_numbered() -> None:
    got = Bench(None).send(leave_undone(tcp_between(3000), 1000))
    assert [Ether(frame).id for frame in got] == [0, 1, 2]


@BOTH_FAMILIES
def test_datagrams_are_cut_too(ipv6: bool) -> None:
    whole = udp_between(2500, ipv6=ipv6)
    got = Bench(None).send(leave_undone(whole, 1000))
    for frame in got:
        judge(frame)
    assert b"".join(bytes(Ether(frame)[UDP].payload) for frame in got) == bytes(Ether(whole)[UDP].payload)
    assert [Ether(frame)[UDP].len for frame in got] == [1008, 1008, 508]


def test_what_the_other_link_takes_goes_on_as_it_is_behind_a_header_of_our_own() -> None:
    left = leave_undone(tcp_between(10_000), 1400)
    # What we have no need to trust is not passed on: a lie about the length, DATA_VALID, a number of buffers.
    lying = OffloadFrame(left)
    lying.header = left.header._replace(header_length=9, flags=3, buffers=77)
    (got,) = Bench(ALL).send(lying)
    assert isinstance(got, OffloadFrame)
    assert got == left
    assert got.header == left.header


@pytest.mark.parametrize("make", (tcp_between, udp_between))
@BOTH_FAMILIES
def test_a_checksum_is_completed_for_a_guest_that_does_not_do_it_itself(make: object, ipv6: bool) -> None:
    whole = make(301, ipv6=ipv6)  # type: ignore[operator]
    assert Bench(None).send(leave_undone(whole)) == [whole]


def test_behind_a_vlan_tag_frames_are_finished_as_well() -> None:
    ether = Ether(tcp_between(2000))
    tagged = Ether(dst=ether.dst, src=ether.src) / Dot1Q(vlan=0) / ether.payload
    got = Bench(None).send(leave_undone(bytes(tagged), 1000))
    assert len(got) == 2
    for frame in got:
        judge(frame[:12] + frame[16:])


@BOTH_FAMILIES
@pytest.mark.parametrize("between", (tcp_between, udp_between))
def test_behind_a_vlan_tag_a_checksum_is_completed(between: object, ipv6: bool) -> None:
    ether = Ether(between(700, ipv6=ipv6))  # type: ignore[operator]
    tagged = Ether(dst=ether.dst, src=ether.src) / Dot1Q(vlan=0) / ether.payload
    (frame,) = Bench(None).send(leave_undone(bytes(tagged)))
    judge(frame[:12] + frame[16:])


@pytest.mark.parametrize("theirs", (None, NONE, ALL), ids=("plain", "nothing", "all"))
def test_a_checksum_cannot_change_who_a_guest_says_that_it_is(theirs: Offload | None) -> None:
    """An ARP answer whose last bytes have the checksum become the gateway's address, once it has been looked at."""
    bench = Bench(theirs)
    gateway, innocent = bench.world.stack.addresses.gateway, bytes((198, 51, 100, 7))
    arp = bytes.fromhex("0001080006040002") + GUEST_MAC + innocent + OTHER_MAC + OTHER4
    left = OffloadFrame(OTHER_MAC + GUEST_MAC + b"\x08\x06" + arp + bytes(18))
    assert left[28:32] == innocent != gateway
    for start, offset in ((14, 16), (28, 2)):
        left.header = VirtioNet(NEEDS_CSUM, GSO_NONE, 0, 0, start, offset, 0)
        assert bench.send(left) == []
    assert bench.world.drops == {"offload_malformed": 2}


def test_segments_too_large_for_the_other_link_are_dropped_with_a_word_to_the_sender() -> None:
    bench = Bench(None, mtu=1000)
    assert bench.send(leave_undone(tcp_between(5000), 1400)) == []
    assert bench.world.drops == {"frame_too_big_for_link": 1}
    (error,) = bench.world.take(bench.one)
    assert Ether(error).code == 4
    # Segments that fit are no reason for one, however large the frame is.
    assert len(bench.send(leave_undone(tcp_between(5000), 900))) == 6
    assert bench.world.take(bench.one) == []


@pytest.mark.parametrize(
    ("change", "why"),
    (
        ({"gso_size": 127}, "hundreds of segments"),
        ({"gso_size": 0}, "endless segments"),
        ({"gso_type": GSO_TCPV6}, "the other family"),
        ({"gso_type": GSO_UDP_L4}, "the other transport"),
        ({"gso_type": 3}, "UFO, which nobody offered"),
        ({"gso_type": GSO_TCPV4 | GSO_ECN}, "ECN, which nobody offered"),
        ({"flags": 0}, "segments without a checksum left"),
        ({"csum_start": 33}, "a checksum that begins elsewhere"),
        ({"csum_start": 65535}, "a checksum behind the end"),
        ({"csum_offset": 6}, "a checksum at UDP's place"),
        ({"csum_offset": 65535}, "a checksum behind the end"),
        ({"gso_type": GSO_NONE, "csum_start": 13}, "a checksum over Ethernet's header"),
        ({"gso_type": GSO_NONE, "csum_offset": 5000}, "a checksum behind the end"),
        ({"gso_type": GSO_NONE, "csum_offset": 6}, "a checksum at UDP's place"),
        ({"gso_type": GSO_NONE, "csum_start": 14, "csum_offset": 36}, "a checksum of more than TCP"),
    ),
)
def test_a_header_that_does_not_fit_its_frame_is_malformed(change: dict[str, int], why: str) -> None:
    left = leave_undone(tcp_between(4000), 1400)
    left.header = left.header._replace(**change)
    bench = Bench(None)
    assert bench.send(left) == [], why
    assert bench.world.drops == {"offload_malformed": 1}


@given(
    st.tuples(*[st.integers(0, 255)] * 2, *[st.integers(0, 3000) | st.integers(0, 65535)] * 5),
    st.sampled_from((tcp_between(700), tcp_between(700, ipv6=True), udp_between(700), udp_between(700, ipv6=True))),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=6),
    st.integers(14, 900),
    st.sampled_from((GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, None)),
)
def test_no_header_and_no_frame_raises_or_becomes_many_packets(
    fields: tuple[int, ...], frame: bytes, damage: list[tuple[int, int]], length: int, kind: int | None
) -> None:
    damaged = bytearray(frame)
    for at, value in damage:
        damaged[at] = value
    if kind is not None:  # near to what is right
        start = 34 if frame[12] == 8 else 54
        offset = 16 if frame[23 if start == 34 else 20] == 6 else 6
        fields = (NEEDS_CSUM, kind, 0, fields[3], start, offset, 0)
    buffer = memoryview(HEADER.pack(*fields) + bytes(damaged[:length]))
    end = len(buffer)
    if offload.has_request(buffer, HEADER_LENGTH):
        request = offload.read_request(buffer, HEADER_LENGTH, end)
        if request is not None:
            whole = offload.fulfil(bytes(buffer[HEADER_LENGTH:]), request)
            assert 1 <= len(whole) <= max(offload.MAX_DATAGRAMS, 65535 // offload.MIN_SEGMENT + 1)
            assert sum(map(len, whole)) <= (end + 200) * len(whole)
            assert all(len(each) - request.network <= request.largest_packet for each in whole) or kind is None


def test_a_frame_that_is_flooded_is_finished_for_each_as_it_needs() -> None:
    world = World()
    one = world.add_link("one", offload=ALL)
    links: list[FakeLink] = [one, world.add_link("two", offload=ALL), world.add_link("three")]
    frame = udp_frame(b"\xff" * 6, GUEST_MAC, GUEST4, b"\xff" * 4, (9, 9), bytes(2000))
    world.receive(one, leave_undone(frame, 1000))
    assert [len(world.take(link)) for link in links] == [0, 1, 2]
