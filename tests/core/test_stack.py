"""The stack as a whole: fast path and slow road agree, batches, services, capture, links that come and go."""

from __future__ import annotations

import errno
import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest

from netstack.core.ports import Buffer, Handler, TcpServiceCall
from netstack.core.stack import ACK_DELAY
from netstack.core.tcp import TcpFlow
from tests.fakes import FakeLink, FakeSocket, oserror
from tests.frames import Seg, read_segment, udp_frame
from tests.script import Talk, established, seg
from tests.world import GATEWAY4, GUEST4, GUEST_MAC, OTHER4, OTHER_MAC, WORLD4, World


class SlowLink(FakeLink):
    """Its frames never take the fast path."""

    @property
    def macs_high(self) -> int:
        return -1

    @macs_high.setter
    def macs_high(self, value: int) -> None: ...

    @property
    def known_macs(self) -> set[tuple[int, int]]:
        return set()

    @known_macs.setter
    def known_macs(self, value: set[tuple[int, int]]) -> None: ...


def _slow_world() -> World:
    world = World()
    link = SlowLink()
    world.links.append(link)
    world.stack.add_link(link, world.now)
    world.stack.flush()
    world.take(link)
    return world


def _tricky(chance: random.Random, talk: Talk) -> Seg:
    data = chance.randbytes(chance.choice((0, 0, 1, 100, 1460)))
    flags = chance.choice(("A", "A", "A", "PA", "PA", "FA", "R", "S", "SA", "UA", "P", "", "FPUA"))
    return seg(
        flags,
        seq=chance.choice((None, None, None, talk.next + chance.randint(-2000, 70_000))),
        ack=chance.choice((None, None, talk.heard + chance.randint(-100, 100))),
        win=chance.choice((None, 0, 1, 100, 65535)),
        data=data,
    )


@pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))
@pytest.mark.parametrize("seed", range(8))
def test_the_fast_path_is_the_slow_road(ipv6: bool, seed: int) -> None:
    """It may be left out, never needed: the same frames, the same effects."""
    talks = [established(talk=Talk(world=world, ipv6=ipv6)) for world in (World(), _slow_world())]
    results = []
    for talk in talks:
        chance = random.Random(seed)
        link, world = talk.link, talk.world
        for _ in range(150):
            if talk.state == "CLOSED":
                break
            if chance.random() < 0.2:
                talk.host.sends(chance.randbytes(3000))
            if chance.random() < 0.1:
                talk.host.room = chance.choice((None, 0, 500))
            frames = [bytearray(talk.frame(_tricky(chance, talk))) for _ in range(chance.randint(1, 4))]
            if chance.random() < 0.1:
                frames[0][chance.randrange(14, len(frames[0]))] ^= 1 << chance.randrange(8)
            if chance.random() < 0.1:
                del frames[-1][chance.randrange(14, len(frames[-1])) :]
            world.receive(link, *map(bytes, frames))
            if chance.random() < 0.2:
                world.advance(world.now + chance.choice((ACK_DELAY, 0.3, 3.0)))
        sock = world.host.sockets[0]
        drops = dict(world.drops)
        results.append((link.frames, bytes(sock.taken), talk.state, drops, world.host.opened, world.now))
    assert results[0] == results[1]
    fast, slow = (talk.world.stack.counters for talk in talks)
    assert slow.frames_slow == slow.frames_from_guest == fast.frames_from_guest
    assert fast.frames_slow < fast.frames_from_guest / 2


def test_the_established_flow_takes_the_fast_path() -> None:
    talk = established()
    before = talk.world.stack.counters.frames_slow
    for _ in range(10):
        talk.guest(seg("PA", data=b"hello"))
        talk.host.sends(b"answer")
        talk.settle()
        talk.received()
    assert talk.world.stack.counters.frames_slow == before


def test_several_guests_on_one_link_all_take_the_fast_path() -> None:
    world = World()
    link = world.add_link()
    talks = [
        established(talk=Talk(world=world, link=link)),
        established(talk=Talk(world=world, link=link, mac=OTHER_MAC, guest=OTHER4)),
    ]
    before = world.stack.counters.frames_slow
    world.receive(link, *[talk.frame(seg("PA", data=b"x")) for talk in talks * 3])
    assert world.stack.counters.frames_slow == before
    assert [bytes(talk.host.taken) for talk in talks] == [b"xxx", b"xxx"]


def test_a_batch_of_many_flows_is_one_write_and_one_ack_each() -> None:
    world = World()
    link = world.add_link()
    talks = [established(talk=Talk(world=world, link=link, guest_port=port), mss=100) for port in range(1, 6)]
    frames = [talk.frame(seg("A", data=bytes(100))) for _ in range(4) for talk in talks]
    calls = [talk.host.calls for talk in talks]
    world.receive(link, *frames)
    assert [talk.host.calls - before for talk, before in zip(talks, calls)] == [1] * 5
    acks = [read_segment(frame) for frame in world.take(link)]
    assert [each.ack - talk.isn & 0xFFFFFFFF for each, talk in zip(acks, talks) if each] == [401] * 5


def test_the_buffer_may_be_reused_when_the_batch_is_over() -> None:
    """What is kept is copied; World.feed overwrites its buffer."""
    talk = established()
    talk.host.room = 3
    talk.guest(seg("A", seq=7, data=b"world!"), seg("A", seq=1, data=b"hello "))
    talk.received()
    talk.host.room = None
    talk.settle()
    talk.host.takes(b"hello world!")


class Service:
    """A TCP service of the gateway."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls: list[TcpServiceCall] = []
        self.full = False

    def open(self, call: TcpServiceCall) -> FakeSocket | None:
        self.calls.append(call)
        if self.full:
            return None
        sock = self.world.host.accepted()
        sock.address = b"service"
        return sock


def test_a_tcp_service_of_the_gateway() -> None:
    """No second code path: the service's side is a socket like any other."""
    world = World()
    service = Service(world)
    world.stack.register_tcp(53, service, addresses=[world.stack.addresses.dns])
    talk = established(talk=Talk(world=world, peer=world.stack.addresses.dns, peer_port=53))
    assert world.host.opened == []
    assert [(call.guest, call.guest_port, call.address, call.port) for call in service.calls] == [
        (GUEST4, 40000, talk.peer, 53)
    ]
    talk.guest(seg("PA", data=b"question"))
    talk.host.takes(b"question")
    talk.host.sends(b"answer")
    talk.settle()
    talk.expect(seg("PA", data=b"answer"))


def test_a_tcp_service_that_takes_no_more() -> None:
    world = World()
    service = Service(world)
    service.full = True
    world.stack.register_tcp(53, service, addresses=[world.stack.addresses.dns])
    talk = Talk(world=world, peer=world.stack.addresses.dns, peer_port=53)
    talk.guest(seg("S"))
    assert [each.bits for each in talk.received()] == [0x14]
    assert len(world.stack.flows) == 0


def test_a_poller_that_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """epoll_ctl() fails with ENOSPC at fs.epoll.max_user_watches: that connection is refused, and nothing is left."""
    world = World()

    def register(fd: int, handler: Handler, events: int) -> None:
        raise oserror(errno.ENOSPC)

    monkeypatch.setattr(world.poller, "register", register)
    talk = Talk(world=world)
    talk.guest(seg("S"))
    assert [each.bits for each in talk.received()] == [0x14]
    assert len(world.stack.flows) == 0
    assert list(world.host.open_sockets()) == []
    assert world.drops == {"tcp_host_exhausted": 1}


def test_a_link_that_fails_while_flushed_does_not_keep_the_others_from_it() -> None:
    world = World()
    links = [world.add_link(str(i)) for i in range(3)]
    world.receive(links[0], udp_frame(b"\xff" * 6, GUEST_MAC, GUEST4, b"\xff" * 4, (1, 2), b"to all"))
    for link in links:
        world.take(link)
    failing = links[1]

    def fail() -> None:
        failing.close()
        world.stack.remove_link(failing, world.now)

    failing.on_flush = fail
    world.feed(links[0], udp_frame(b"\xff" * 6, GUEST_MAC, GUEST4, b"\xff" * 4, (1, 2), b"to all"))
    world.end_round()
    assert world.stack.switch.links == [links[0], links[2]]
    assert len(world.take(links[2])) == 1


class FailingLink(FakeLink):
    """Its socket breaks when the first frame is written, which a full queue does at once."""

    world: World
    armed = False

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        super().queue_frame(head, payload)
        if self.armed:
            self.armed = False
            self.world.remove_link(self)


def test_a_link_that_fails_under_a_syn_ack_takes_the_flow_along() -> None:
    """The flow is gone when its segment "was sent": it must not get a timer any more (World.check)."""
    world = World()
    link = FailingLink()
    link.world = world
    world.links.append(link)
    world.stack.add_link(link, world.now)
    world.stack.flush()
    world.take(link)
    world.host.connects = False
    talk = Talk(world=world, link=link)
    talk.guest(seg("S", mss=1460))
    talk.host.connected = True
    link.armed = True
    talk.settle()
    assert talk.state == "CLOSED"
    assert world.stack.next_deadline() > world.now + 1e9


class Recorder:
    """A capture that keeps what it is given."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bool, str | None]] = []

    def frame(self, interface: int, buffers: Sequence[Any], *, to_guest: bool, comment: str | None = None) -> None:
        self.frames.append((b"".join(bytes(each) for each in buffers), to_guest, comment))


def test_the_capture_says_what_was_dropped_and_why() -> None:
    world = World()
    link = world.add_link()
    talk = established(talk=Talk(world=world, link=link))
    link.capture = recorder = Recorder()
    good = talk.frame(seg("PA", data=b"hello"))
    bad = world.mac + GUEST_MAC + b"\x08\x00" + bytes(40)
    world.receive(link, good, bad, good[:40])
    assert [(frame, comment) for frame, _, comment in recorder.frames] == [
        (good, None),
        (bad, "drop: ipv4_malformed"),
        (good[:40], "drop: ipv4_malformed"),
    ]
    talk.host.takes(b"hello")


def test_counters_and_events() -> None:
    talk = established()
    talk.guest(seg("PA", data=b"12345"))
    talk.host.sends(b"123")
    talk.settle()
    talk.received()
    talk.guest(seg("R"))
    counters = talk.world.stack.counters.as_dict()
    assert counters["tcp_opened"] == counters["tcp_closed"] == 1
    assert counters["frames_from_guest"] == 4
    assert talk.world.events.opened == [("tcp", "192.168.5.15:40000", "198.51.100.7:80")]
    assert list(talk.world.events.closed) == [("tcp", "guest reset")]


def test_next_deadline_is_never_later_than_what_is_due() -> None:
    talk = established()
    talk.host.sends(b"x")
    talk.settle()
    talk.received()
    assert talk.world.stack.next_deadline() <= talk.flow.rtx_at
    talk.guest(seg("A"))
    talk.world.advance(talk.world.now + 250)
    assert talk.world.stack.next_deadline() <= talk.flow.idle_at


def test_frames_to_a_guest_are_padded() -> None:
    world = World()
    link = world.add_link()
    world.stack.send_frame(link, GUEST_MAC, 0x0806, bytes(28))
    world.stack.send_ip(link, GUEST_MAC, b"\x45" + bytes(19), b"12345")
    world.stack.flush()
    frames, link.frames = link.frames, []
    assert [len(frame) for frame in frames] == [60, 60]
    assert frames[1][34:39] == b"12345"


@pytest.mark.parametrize("size", (0, 1, 1472, 1473, 8000, 65507))
def test_datagrams_larger_than_the_guests_mtu_are_fragmented(size: int) -> None:
    world = World()
    link = world.add_link()
    world.stack.send_udp(link, GUEST_MAC, WORLD4, 53, GUEST4, 1000, bytes(size))
    world.stack.flush()
    frames = world.take(link)
    assert len(frames) == -(-(size + 8) // 1480)
    assert all(len(frame) <= 1514 for frame in frames)


def test_the_host_sees_the_gateway_as_its_loopback() -> None:
    talk = established(talk=Talk(peer=GATEWAY4))
    assert talk.world.host.opened == [("tcp", b"\x7f\0\0\1", 80)]


def test_connections_leave_no_reference_cycles() -> None:
    """The process looks for them seldom (cli.serving): what ends must go by itself."""
    world = World(oracle=False)
    world.add_link()
    gc.collect()
    gc.disable()
    try:
        for port in range(20):
            talk = established(talk=Talk(world=world, guest_port=1000 + port))
            talk.guest(seg("PA", data=b"?"))
            talk.host.sends(b"answer")
            talk.host.closes()
            talk.settle()
            talk.received()
            talk.guest(seg("FA", ack=8))
            talk.received()
            assert talk.state == "TIME_WAIT"
        world.advance(world.now + 300)
        assert not world.stack.flows.tcp
        world._edges.clear()  # the test's own notes
        del talk
        assert not [each for each in gc.get_objects() if type(each) is TcpFlow and each.stack is world.stack]
    finally:
        gc.enable()
