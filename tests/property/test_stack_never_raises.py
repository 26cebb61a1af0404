"""Any frames, in any order, at any time: no exception leaves the stack, what leaves it is right, and nothing is lost.

World.check() holds the invariants after each step, and scapy judges every frame that the gateway sends.
"""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstack.core.tcp import CLOSED
from netstack.vde.stream import StreamLink
from netstack.wire.ethernet import MAX_FRAME
from tests.fakes import FakeLink, FakePoller
from tests.property.traffic import FRAMES, batches, damaged_frames
from tests.script import Talk, closing, established, fin_wait_1, fin_wait_2, last_ack, seg, time_wait
from tests.world import OTHER_MAC, World

MACS = bytes.fromhex("5255c0a80502 525400123456")


def _gateway() -> tuple[World, FakeLink, FakeLink]:
    world = World()
    world.add_services()
    one, two = world.add_link("one"), world.add_link("two", mtu=9000)
    return world, one, two


def _nothing_is_left(world: World) -> None:
    """An hour later, with guests that are gone: no flow, no socket, no byte, no datagram in pieces."""
    for link in list(world.links):
        if not link.closed:
            world.remove_link(link)
    for sock in world.host.open_sockets():
        sock.room = None
    world.settle()
    world.advance(world.now + 3600)
    stack = world.stack
    assert len(stack.flows) == 0
    assert stack.bytes_in_flight == stack.bytes_for_host == stack.bytes_out_of_order == 0
    assert not list(world.host.open_sockets())
    assert all(sock.is_closed() for sock in world.host.datagrams)
    assert not world.poller.handlers
    assert stack.reassembly.cost == 0
    assert len(stack.udp) == 0


@given(steps=st.lists(st.tuples(st.booleans(), batches(), st.sampled_from((0.0, 0.002, 0.3, 5.0, 61.0))), max_size=8))
@example(steps=[(True, FRAMES, 0.0), (False, FRAMES, 1.0), (True, list(reversed(FRAMES)), 40.0)])
def test_any_traffic(steps: list[tuple[bool, list[bytes], float]]) -> None:
    """Random bytes, real traffic and damaged real traffic, from two guests."""
    world, one, two = _gateway()
    frames = 0
    for first, batch, seconds in steps:
        link = one if first else two
        world.receive(link, *[frame if first else _of_the_other(frame) for frame in batch])
        frames += len(batch)
        world.advance(world.now + seconds)
        for each in (one, two):
            world.take(each)
    assert world.stack.counters.frames_from_guest == frames
    _nothing_is_left(world)


def _of_the_other(frame: bytes) -> bytes:
    """The same from another MAC."""
    return frame[:6] + OTHER_MAC + frame[12:] if len(frame) >= 12 else frame


@given(payloads=st.lists(st.binary(max_size=1500), max_size=10), ethertype=st.sampled_from((0x0800, 0x86DD, 0x0806)))
def test_random_bytes_behind_a_good_ethernet_header(payloads: list[bytes], ethertype: int) -> None:
    world, link, _ = _gateway()
    world.receive(link, *[MACS + ethertype.to_bytes(2, "big") + payload for payload in payloads])
    _nothing_is_left(world)


@given(body=st.binary(max_size=300), ipv6=st.booleans(), protocol=st.sampled_from((0, 1, 2, 6, 17, 43, 44, 51, 58, 60)))
def test_random_bytes_behind_a_good_ip_header(body: bytes, ipv6: bool, protocol: int) -> None:
    world, link, _ = _gateway()
    if ipv6:
        head = b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes((protocol, 255))
        head += bytes.fromhex("fd00c0a8000500000000000000000015 20010db8000000000000000000000007")
        frame = MACS + b"\x86\xdd" + head + body
    else:
        head = b"\x45\0" + (20 + len(body)).to_bytes(2, "big") + b"\0\1\0\0" + bytes((64, protocol)) + b"\0\0"
        frame = MACS + b"\x08\0" + head + bytes((192, 168, 5, 15, 198, 51, 100, 7)) + body
    world.receive(link, frame)
    _nothing_is_left(world)


# ---- sequences of segments that are nearly right


@st.composite
def segments(draw: st.DrawFn) -> dict[str, Any]:
    """A segment, by how far it is from what it should be."""
    near = st.sampled_from((0, 0, 0, 0, 1, -1, 2, 100, -100, 1460, 65535, 70_000, -70_000, 1 << 31, (1 << 31) - 1))
    return {
        "flags": draw(
            st.sampled_from(("A", "A", "PA", "PA", "FA", "FPA", "R", "RA", "S", "SA", "", "F", "SF", "SFRPAU"))
        ),
        "seq": draw(near),
        "ack": draw(near),
        "win": draw(st.sampled_from((None, None, 0, 1, 100, 65535))),
        "size": draw(st.sampled_from((0, 0, 0, 1, 10, 1459, 1460))),
    }


HOST_EVENTS = (
    "send",
    "send much",
    "close",
    "break",
    "full",
    "some room",
    "room",
    "nothing",
    "link stuck",
    "link drained",
)


@st.composite
def steps_of_tcp(draw: st.DrawFn) -> list[tuple[list[dict[str, Any]], str, float]]:
    step = st.tuples(
        st.lists(segments(), max_size=5),
        st.sampled_from(HOST_EVENTS),
        st.sampled_from((0.0, 0.0, 0.0, 0.002, 0.25, 1.0, 30.0, 400.0)),
    )
    return draw(st.lists(step, max_size=12))


def _host_event(talk: Talk, event: str) -> None:
    sock = talk.host
    if event.startswith("link"):
        if event == "link stuck":
            talk.link.stuck = talk.link.congested = True
        else:
            talk.link.drain(talk.world.now)
            talk.world.end_round()
        return
    if sock.closed:
        return
    if event.startswith("send") and not sock.eof and not sock.dead:
        sock.sends(bytes(300_000 if "much" in event else 100))
    elif event == "close" and not sock.dead:
        sock.closes()
    elif event == "break":
        sock.breaks(errno.ECONNRESET)
    elif event in ("full", "some room", "room"):
        sock.room = {"full": 0, "some room": 700, "room": None}[event]


STARTS = (established, fin_wait_1, fin_wait_2, closing, last_ack, time_wait)


@pytest.mark.parametrize("make", STARTS, ids=lambda make: make.__name__)
@given(steps=steps_of_tcp(), ipv6=st.booleans(), scale=st.sampled_from((None, 0, 7)), mss=st.sampled_from((None, 1460)))
def test_any_segments_on_a_connection(
    make: Any, steps: list[tuple[list[dict[str, Any]], str, float]], ipv6: bool, scale: int | None, mss: int | None
) -> None:
    """From each state: any flags, sequence numbers, windows and sizes, while the host does what it likes."""
    talk: Talk = make(ipv6=ipv6, scale=scale, mss=mss)
    world = talk.world
    for each, event, seconds in steps:
        frames = []
        for want in each:
            seq = None if want["seq"] == 0 else talk.next + want["seq"]
            ack = talk.heard + want["ack"]
            frames.append(talk.frame(seg(want["flags"], seq=seq, ack=ack, win=want["win"], data=bytes(want["size"]))))
        world.receive(talk.link, *frames)
        _host_event(talk, event)
        world.settle()
        world.advance(world.now + seconds)
        world.check()
    talk.link.stuck = False
    world.end_round()
    world.take(talk.link)
    _nothing_is_left(world)
    assert talk.state == "CLOSED"
    assert CLOSED == 0


@given(frames=st.lists(damaged_frames(), max_size=20), at=st.integers(0, 19))
def test_a_damaged_guest_does_not_disturb_another(frames: list[bytes], at: int) -> None:
    """The other one's connection goes on, byte by byte."""
    world, one, two = _gateway()
    talk = established(talk=Talk(world=world, link=two, mac=OTHER_MAC, guest=bytes((192, 168, 5, 16))))
    for i, frame in enumerate(frames):
        if frame[6:12] == OTHER_MAC:
            continue
        world.receive(one, frame)
        if i == at:
            world.advance(world.now + 1)
        world.take(two)
        world.receive(two, talk.frame(seg("PA", data=b"%d" % i)))
        talk.host.takes(b"%d" % i)


# ---- split anywhere is whole


class StreamEnd:
    """The socket of a stream link; gives what the test puts in, in the pieces that it was put in."""

    family = -1

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = False

    def setblocking(self, flag: bool) -> None: ...
    def setsockopt(self, *_: object) -> None: ...

    def fileno(self) -> int:
        return 5

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.pieces.pop(0)
        assert len(piece) <= len(buffer)
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.closed = True


def _read(pieces: list[bytes]) -> tuple[list[bytes], str]:
    """The frames that a stream link finds, and why it closed."""
    frames: list[bytes] = []
    closed: list[str] = []

    def receive(link: Any, buffer: memoryview, spans: Any, now: float) -> None:
        frames.extend(bytes(buffer[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True))

    sock = StreamEnd()
    link = StreamLink("link", sock, 1500, FakePoller(), receive)  # type: ignore[arg-type]
    link.on_closed = closed.append
    sock.pieces = pieces
    while sock.pieces and not link.closed:
        link.on_ready(1, 0.0)
    assert link.frames_from_guest == len(frames)
    assert link.bytes_from_guest == sum(map(len, frames))
    return frames, "".join(closed)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of framed frames, perhaps with a bad length or cut off, and the same in pieces."""
    stream = b""
    lengths = st.integers(14, 200) | st.sampled_from((14, 1514, 9014, MAX_FRAME))
    for size in draw(st.lists(lengths, max_size=12)):
        stream += size.to_bytes(4, "big") + bytes((size & 0xFF,)) * size
    ending = draw(st.integers(0, 3))
    if ending == 1:
        stream += draw(st.sampled_from((0, 13, MAX_FRAME + 1, 0xFFFFFFFF))).to_bytes(4, "big") + bytes(20)
    elif ending == 2:
        stream = stream[: draw(st.integers(0, len(stream)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return stream, [piece for piece in pieces if piece]


@given(streams())
def test_split_anywhere_is_whole(stream_and_pieces: tuple[bytes, list[bytes]]) -> None:
    stream, pieces = stream_and_pieces
    whole = _read([stream[i : i + 500_000] for i in range(0, len(stream), 500_000)])
    assert _read(pieces) == whole
    if len(stream) < 2000:
        assert _read([stream[i : i + 1] for i in range(len(stream))]) == whole


@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=10))
def test_a_stream_of_anything(data: bytes, cuts: list[int]) -> None:
    """A wrong length ends the link and nothing else."""
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(borders) if a < b]
    frames, why = _read(pieces)
    at = 0
    for frame in frames:
        assert data[at : at + 4] == len(frame).to_bytes(4, "big")
        assert data[at + 4 : at + 4 + len(frame)] == frame
        at += 4 + len(frame)
    if why:
        assert not 14 <= int.from_bytes(data[at : at + 4], "big") <= MAX_FRAME
        assert why == f"bad frame length {int.from_bytes(data[at : at + 4], 'big')}: must be 14 to {MAX_FRAME}"
