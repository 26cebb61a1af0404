"""What guests can make us keep is bounded, whatever they do, and other guests go on meanwhile.

Limits are small here, so that hypothesis comes to them; the numbers of a real stack are tried in test_tcp_window.
"""

from __future__ import annotations

import gc
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from netstack.core.flows import Limits
from netstack.core.ports import WRITABLE
from tests.fakes import FakeLink
from tests.frames import tcp_frame, udp_frame
from tests.property.traffic import FRAMES, damaged_frames
from tests.script import Talk, established, seg
from tests.world import GUEST4, GUEST_MAC, OTHER4, OTHER_MAC, WORLD4, World

SMALL = Limits(
    tcp_flows=40,
    tcp_flows_per_guest=30,
    udp_flows=20,
    udp_flows_per_guest=15,
    ping_flows=8,
    in_flight_bytes=200_000,
    for_host_bytes=200_000,
    out_of_order_bytes=50_000,
    reassembly_bytes=40_000,
    neighbors=16,
    icmp_errors_per_second=50,
)


def _assert_bounded(world: World, limits: Limits) -> None:
    stack = world.stack
    assert len(stack.flows) <= limits.tcp_flows
    assert len(stack.udp) <= limits.udp_flows
    assert len(stack.icmp.pings) <= limits.ping_flows
    assert stack.bytes_in_flight <= limits.in_flight_bytes
    assert stack.bytes_out_of_order <= limits.out_of_order_bytes
    # One write that the host does not take may go beyond it, and ends that flow.
    assert stack.bytes_for_host <= limits.for_host_bytes
    assert stack.reassembly.cost <= limits.reassembly_bytes
    assert len(stack.neighbors.all()) <= limits.neighbors
    assert len(stack.switch.macs()) <= 4096
    assert len(stack.chunks) <= 32
    assert len(stack.large_chunks) <= 8
    assert len(stack.timers) <= 3000


def _copy(limits: Limits) -> Limits:
    return Limits(**{name: getattr(limits, name) for name in Limits.__slots__})


ACTIONS = (
    "syn",
    "syn of another address",
    "data",
    "data out of order",
    "ack nothing, host sends",
    "host does not take",
    "datagram",
    "ping",
    "fragment",
    "damaged",
    "half close",
    "time",
)


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.integers(0, 60), st.integers(1, 1400)), min_size=10, max_size=60
    ),
    damaged=st.lists(damaged_frames(), min_size=1, max_size=5),
)
@settings(max_examples=40)
def test_nothing_grows_beyond_its_limit(actions: list[tuple[str, int, int]], damaged: list[bytes]) -> None:
    """One guest does everything that costs memory, in any order; another one works on throughout."""
    world = World(limits=_copy(SMALL), oracle=False)
    world.add_services()
    link, other = world.add_link("one", mtu=9000), world.add_link("two")
    talks: dict[int, Talk] = {}
    for n, (action, which, size) in enumerate(actions):
        _act(world, link, talks, action, which, size, damaged)
        _assert_bounded(world, SMALL)
        world.take(link)
        if n % 10 == 9:
            _another_guest_works(world, other, 20_000 + n)
    _assert_bounded(world, SMALL)


def _act(
    world: World, link: FakeLink, talks: dict[int, Talk], action: str, which: int, size: int, damaged: list[bytes]
) -> None:
    talk = talks.get(which)
    alive = talk is not None and talk.state == "ESTABLISHED"
    if action.startswith("syn") or not alive:
        guest = GUEST4 if action == "syn" else GUEST4[:3] + bytes((100 + which,))
        talk = talks[which] = Talk(world=world, link=link, guest=guest, guest_port=1000 + which)
        world.receive(link, talk.frame(seg("S", mss=8960, scale=7)))
        if talk.state == "SYN_RECEIVED":
            talk.iss = talk.flow.iss
            talk.heard = 1
            world.receive(link, talk.frame(seg("A")))
        return
    assert talk is not None
    sock = talk.host
    if action == "data":
        world.receive(link, *[talk.frame(seg("A", data=bytes(size)))] * 3)
    elif action == "data out of order":
        for i in range(5):
            world.receive(link, talk.frame(seg("A", seq=talk.next + 2 + i, data=bytes(size))))
    elif action == "ack nothing, host sends":
        if not sock.eof:
            sock.sends(bytes(50_000))
    elif action == "host does not take":
        sock.room = 0
        for _ in range(10):
            if talk.state == "ESTABLISHED":
                world.receive(link, talk.frame(seg("A", data=bytes(8000))))
    elif action == "datagram":
        world.receive(link, udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (3000 + which, size), bytes(size)))
    elif action == "ping":
        echo = b"\x08\0\0\0" + which.to_bytes(2, "big") + bytes(10)
        world.receive(link, world.mac + GUEST_MAC + b"\x08\0" + _ipv4(WORLD4, 1, echo))
    elif action == "fragment":
        world.receive(link, world.mac + GUEST_MAC + b"\x08\0" + _ipv4(WORLD4, 17, bytes(size & ~7), which, more=True))
    elif action == "damaged":
        world.receive(link, *damaged)
    elif action == "half close":
        world.receive(link, talk.frame(seg("FA")))
    elif action == "time":
        world.advance(world.now + size / 100)
    world.settle()


def _ipv4(dst: bytes, protocol: int, body: bytes, ident: int = 0, *, more: bool = False) -> bytes:
    total = 20 + len(body)
    flags = 0x2000 if more else 0x4000
    return (
        b"\x45\0"
        + total.to_bytes(2, "big")
        + ident.to_bytes(2, "big")
        + flags.to_bytes(2, "big")
        + bytes((64, protocol))
        + b"\0\0"
        + GUEST4
        + dst
        + body
    )


def _another_guest_works(world: World, link: FakeLink, port: int) -> None:
    """A whole request and answer, while the first guest holds what it may hold."""
    world.take(link)
    talk = established(talk=Talk(world=world, link=link, mac=OTHER_MAC, guest=OTHER4, guest_port=port))
    talk.guest(seg("PA", data=b"request"))
    talk.host.takes(b"request")
    talk.host.sends(b"answer" * 100)
    talk.host.closes()
    talk.settle()
    got = talk.received()
    assert b"".join(each.data for each in got) == b"answer" * 100
    talk.guest(seg("FA"))
    talk.received()


def test_memory_comes_back() -> None:
    """Thousands of connections that came and went leave nothing behind."""
    world = World(oracle=False)
    link = world.add_link()

    def come_and_go(count: int) -> None:
        for n in range(count):
            port = 1024 + n % 60_000
            isn = n * 1000
            world.feed(link, tcp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (port, 80), isn, 0, 2, 65535))
            flow = next(iter(world.stack.flows))
            flow.on_ready(WRITABLE, world.now)
            world.feed(
                link,
                tcp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (port, 80), isn + 1, flow.iss + 1, 0x18, 65535, b"hi"),
                tcp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (port, 80), isn + 3, flow.iss + 1, 0x04, 65535),
            )
            world.stack.flush()
            link.frames.clear()
            world.host.sockets.clear()
            world.events.opened.clear()
            world.host.opened.clear()
            world.now += 0.01
            world.stack.handle_timers(world.now)

    come_and_go(2000)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    come_and_go(5000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(world.stack.flows) == 0
    # The heap of timers keeps cancelled entries up to its sweep, 1,024 at least, and with them closed flows.
    assert grown < 1_000_000, f"{grown} bytes"


def test_a_flood_from_one_guest_costs_no_more_than_its_limits() -> None:
    """Every frame of the corpus, from a thousand addresses: all tables fill up and stay full."""
    world = World(limits=_copy(SMALL), oracle=False)
    world.add_services()
    link, other = world.add_link("one"), world.add_link("two")
    for n in range(1000):
        frames = []
        for frame in FRAMES:
            changed = bytearray(frame)
            if changed[12:14] == b"\x08\0" and changed[26:30] == GUEST4:
                changed[29] = 20 + n % 200
                changed[34:36] = (1000 + n).to_bytes(2, "big")
            elif changed[12:14] == b"\x86\xdd" and changed[22] == 0xFD:
                changed[36:38] = n.to_bytes(2, "big")
            frames.append(bytes(changed))
        world.feed(link, *frames)
        if n % 100 == 0:
            world.end_round()
            world.settle()
            world.take(link)
            _assert_bounded(world, SMALL)
            _another_guest_works(world, other, 30_000 + n)
        else:
            world.stack.flush()
            link.frames.clear()
            other.frames.clear()
    assert world.drops["tcp_flows_of_guest"] > 0
    assert world.drops["udp_flow_evicted"] > 0
