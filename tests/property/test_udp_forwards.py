"""UDP forwards under whatever callers and guests do, in any order: nothing raises, and no table keeps what is over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netstack.core.flows import Limits
from netstack.core.ports import Caller, SocketError
from netstack.core.udp_endpoint import write_packet
from netstack.wire.icmp import PORT_UNREACHABLE, write_error
from tests.core.ip_fakes import GATEWAY4, GATEWAY6, GUEST4, GUEST6, WORLD4, WORLD6
from tests.core.test_udp_forwards import LOOPBACK4, LOOPBACK6, PORT, Bench
from tests.world import GUEST_MAC, OTHER_MAC

LOCAL = (b"", bytes((198, 51, 100, 1)))
CALLERS: list[Caller] = [
    (address, port, local, 0)
    for address in (WORLD4, WORLD6, LOOPBACK4, LOOPBACK6, bytes((127, 0, 0, 9)))
    for port in (0, 53, 40000, 40001)
    for local in LOCAL
]
PEERS = (WORLD4, GATEWAY4, WORLD6, GATEWAY6)
PORTS = st.sampled_from((0, 53, 40000, 40001, 32769))
PAYLOADS = st.sampled_from((b"", b"x", b"y" * 60, b"z" * 1472, b"w" * 4000))

STEPS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(CALLERS), st.lists(PAYLOADS, max_size=4)),
    st.tuples(st.just("answer"), st.sampled_from(PEERS), PORTS, PAYLOADS, st.sampled_from((0, 1, 2, 64))),
    st.tuples(st.just("refuse"), st.sampled_from(PEERS), PORTS),
    st.tuples(st.just("noise"), st.binary(min_size=20, max_size=90)),
    st.tuples(st.just("error"), st.sampled_from(CALLERS), st.sampled_from((0, 3, 5)), st.binary(max_size=30)),
    st.tuples(st.just("failure"), st.sampled_from((11, 90, 101, 111))),
    st.tuples(st.just("move"), st.sampled_from((GUEST4, GUEST6, None)), st.booleans()),
    st.tuples(st.just("congested"), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from((0.5, 5.0, 40.0, 200.0))),
    st.tuples(st.just("unplug")),
    st.tuples(st.just("close")),
)


def check(bench: Bench) -> None:
    """What is true at any time."""
    table = bench.stack.udp_forwards
    listed = [flow for forward in table.forwards for flow in forward]
    assert {id(flow) for flow in listed} == {id(flow) for flow in table.flows.values()}
    assert len(listed) <= 6
    for flow in listed:
        assert table.flows[flow.key] is flow.entry.callers[flow.caller] is flow
        assert not flow.closed
    for forward in table.forwards:
        for port in forward.ports:
            assert set(port.callers.values()) <= set(listed)
            assert set(port.last_of.values()) <= set(port.callers.values())
    live = {id(flow) for flow in (*listed, *bench.stack.udp)}
    assert all(id(path.flow) in live for path in bench.stack.udp.paths.values())
    traffic = bench.forward.traffic()
    assert traffic.total >= traffic.open == len(bench.forward)


def act(bench: Bench, step: tuple[object, ...]) -> None:
    match step:
        case ("call", tuple() as caller, list() as payloads):
            if not bench.sock.closed:
                bench.sock.incoming.extend((payload, caller) for payload in payloads)
        case ("answer", bytes() as peer, int() as port, bytes() as payload, int() as ttl):
            guest = GUEST4 if len(peer) == 4 else GUEST6
            bench.send(write_packet(guest, PORT, peer, port, payload, ttl))
        case ("refuse", bytes() as peer, int() as port):
            guest = GUEST4 if len(peer) == 4 else GUEST6
            error = write_error(guest, write_packet(peer, port, guest, PORT, b"x", 64), PORT_UNREACHABLE)
            assert error is not None
            bench.send(error)
        case ("noise", bytes() as noise):
            kind = b"\x86\xdd" if noise[0] >> 4 == 6 else b"\x08\x00"
            bench.receive(bench.link, bench.mac + GUEST_MAC + kind + noise)
        case ("error", tuple() as caller, int() as code, bytes() as quote):
            bench.sock.errors.append(SocketError(111, caller[0], caller[1], caller[0], code, 4, 1400, quote))
            if not bench.sock.closed:
                bench.port.on_ready(8, bench.now)
        case ("failure", int() as number):
            for reply in bench.sock.replies.values():
                reply.failures.append(OSError(number, "as told"))
        case ("move", (bytes() | None) as guest, bool() as other):
            bench.guest = guest
            if guest is not None:
                bench.stack.neighbors.learn(bench.link, OTHER_MAC if other else GUEST_MAC, guest, bench.now)
        case ("congested", bool() as congested):
            bench.link.congested = congested
            if not congested:
                bench.link.drain(bench.now)
        case ("wait", float() as seconds):
            bench.advance(bench.now + seconds)
        case ("unplug",):
            bench.remove_link(bench.link)
            bench.link = bench.add_link("again")
            bench.arrive(GUEST4)
        case ("close",):
            bench.forward.close(bench.now)
    if not bench.sock.closed:
        bench.serve()
    else:
        bench.stack.end_round(bench.now)
    bench.take(bench.link)


@given(st.lists(STEPS, min_size=1, max_size=25))
def test_nothing_raises_and_nothing_is_left_over(steps: list[tuple[object, ...]]) -> None:
    bench = Bench(limits=Limits(udp_flows=6, udp_flows_per_guest=5))
    bench.oracle = False
    bench.add_services()
    bench.arrive(GUEST6)
    for step in steps:
        act(bench, step)
        check(bench)
    bench.forward.close(bench.now)
    assert not bench.stack.udp_forwards.flows
    assert bench.sock.closed
