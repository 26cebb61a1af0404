"""The gateway as a router and a neighbor, with a clock and a known source of chance."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
)

from netstack.core.ndp import NdpMessage, NdpResponder
from netstack.wire.ndp import solicited_node

MAC = bytes.fromhex("525400123456")
MAC_TEXT = "52:54:00:12:34:56"
GATEWAY_MAC = bytes.fromhex("5255c0a80502")
LINK_LOCAL = bytes.fromhex("fe800000000000005055c0fffea80502")
PREFIX = bytes.fromhex("fd00c0a800050000") + bytes(8)
GATEWAY = PREFIX[:15] + b"\x02"
DNS = PREFIX[:15] + b"\x03"
GUEST = bytes.fromhex("fe80000000000000505400fffe123456")
UNSPECIFIED = bytes(16)
ALL_NODES = bytes.fromhex("ff02") + bytes(13) + b"\x01"
ALL_ROUTERS = bytes.fromhex("ff02") + bytes(13) + b"\x02"
ALL_NODES_MAC = bytes.fromhex("333300000001")

Responder = Callable[..., NdpResponder]


class Recorder:
    """A responder, and what it told others."""

    def __init__(self, chance: float = 0.5, **settings: object) -> None:
        self.neighbors: list[tuple[bytes, bytes]] = []
        self.drops: list[str] = []
        self.ndp = NdpResponder(
            GATEWAY_MAC,
            LINK_LOCAL,
            frozenset((LINK_LOCAL, GATEWAY, DNS)),
            PREFIX,
            lambda: chance,
            mtu=65520,
            dns=(DNS,),
            search=("netstack.internal",),
            on_neighbor=lambda address, mac, now: self.neighbors.append((address, mac)),
            drop=self.drops.append,
            **settings,  # type: ignore[arg-type]
        )

    def hear(
        self, body: bytes, *, src: bytes = GUEST, dst: bytes = ALL_ROUTERS, hop_limit: int = 255, now: float = 0.0
    ) -> list[NdpMessage]:
        return self.ndp.on_icmp6(src, dst, hop_limit, body, MAC, now)


RS = bytes(ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=MAC_TEXT))
RS_UNSPECIFIED = bytes(ICMPv6ND_RS())


def ns(target: str, *, mac: str | None = MAC_TEXT) -> bytes:
    message = ICMPv6ND_NS(tgt=target)
    return bytes(message / ICMPv6NDOptSrcLLAddr(lladdr=mac) if mac else message)


def test_a_solicitation_is_answered_to_who_asked() -> None:
    recorder = Recorder()
    (answer,) = recorder.hear(RS)
    assert answer[:3] == (LINK_LOCAL, GUEST, MAC)
    packet = ICMPv6ND_RA(answer.body)
    assert (packet.M, packet.O, packet.routerlifetime) == (1, 1, 1800)
    assert packet[ICMPv6NDOptMTU].mtu == 65520
    prefix = packet[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00:c0a8:5::", 64, 1, 1)
    assert packet[ICMPv6NDOptRDNSS].dns == ["fd00:c0a8:5::3"]
    assert packet[ICMPv6NDOptDNSSL].searchlist == ["netstack.internal."]
    assert recorder.neighbors == [(GUEST, MAC)]


def test_without_a_route_the_gateway_is_no_default_router() -> None:
    recorder = Recorder(is_router=False, managed=False)
    (answer,) = recorder.hear(RS)
    packet = ICMPv6ND_RA(answer.body)
    assert (packet.M, packet.routerlifetime) == (0, 0)
    assert packet[ICMPv6NDOptPrefixInfo].prefix == "fd00:c0a8:5::"


def test_the_schedule() -> None:
    """RFC 4861 6.2.4: three at most 16 s apart, then 200 to 600 s."""
    ndp = Recorder(chance=0.5).ndp
    now, sent = 100.0, []
    for _ in range(6):
        (message,) = ndp.on_timer(now)
        assert message[:3] == (LINK_LOCAL, ALL_NODES, ALL_NODES_MAC)
        assert ndp.on_timer(now) == []
        sent.append(now)
        now = ndp.due_at
    assert [later - at for at, later in itertools.pairwise(sent)] == [16, 16, 16, 400, 400]


@pytest.mark.parametrize(("chance", "wait"), ((0.0, 200.0), (0.999999, 600.0)))
def test_the_wait_is_random(chance: float, wait: float) -> None:
    ndp = Recorder(chance=chance).ndp
    for _ in range(5):
        at = max(ndp.due_at, 0.0)
        ndp.on_timer(at)
    assert ndp.due_at - at == pytest.approx(wait, rel=1e-3)


def test_news_is_told_soon_but_not_more_than_every_three_seconds() -> None:
    recorder = Recorder()
    ndp = recorder.ndp
    for _ in range(5):
        last = max(ndp.due_at, 0.0)
        ndp.on_timer(last)
    ndp.is_router = False
    ndp.announce(last + 1.0)
    assert ndp.on_timer(last + 1.0) == []
    assert ndp.due_at == last + 3.0
    (message,) = ndp.on_timer(last + 3.0)
    assert ICMPv6ND_RA(message.body).routerlifetime == 0
    assert ndp.due_at == last + 19.0
    ndp.announce(last + 10.0)
    assert ndp.due_at == last + 10.0


def test_solicitations_without_an_address_are_answered_to_all_and_rarely() -> None:
    recorder = Recorder()
    # Not the answer to this one guest's frame, which goes to its link alone: due at once, on all links.
    assert recorder.hear(RS_UNSPECIFIED, src=UNSPECIFIED, now=50.0) == []
    assert recorder.ndp.due_at <= 50.0
    (answer,) = recorder.ndp.on_timer(50.0)
    assert answer[1:3] == (ALL_NODES, ALL_NODES_MAC)
    sent = 0
    for step in range(1, 300):
        now = 50.0 + step / 10
        assert recorder.hear(RS_UNSPECIFIED, src=UNSPECIFIED, now=now) == []
        sent += len(recorder.ndp.on_timer(now))
    assert sent == 9  # in 29.9 s
    assert recorder.neighbors == []


@pytest.mark.parametrize(
    ("target", "address"),
    (("fd00:c0a8:5::2", GATEWAY), ("fd00:c0a8:5::3", DNS), ("fe80::5055:c0ff:fea8:502", LINK_LOCAL)),
)
def test_our_addresses_are_answered_for(target: str, address: bytes) -> None:
    recorder = Recorder()
    (answer,) = recorder.hear(ns(target), dst=solicited_node(address))
    assert answer[:3] == (address, GUEST, MAC)
    packet = ICMPv6ND_NA(answer.body)
    assert (packet.R, packet.S, packet.O, packet.tgt) == (1, 1, 1, target)
    assert packet[ICMPv6NDOptDstLLAddr].lladdr == "52:55:c0:a8:05:02"
    assert recorder.neighbors == [(GUEST, MAC)]
    # Unreachability detection asks without a MAC, straight at us.
    assert recorder.hear(ns(target, mac=None), dst=address) == [answer]


def test_other_addresses_are_not_answered_for() -> None:
    recorder = Recorder()
    assert recorder.hear(ns("fd00:c0a8:5::15"), dst=solicited_node(PREFIX[:15] + b"\x15")) == []
    assert recorder.drops == []


def test_a_guest_that_would_take_our_address_is_told() -> None:
    recorder = Recorder()
    (answer,) = recorder.hear(ns("fd00:c0a8:5::2", mac=None), src=UNSPECIFIED, dst=solicited_node(GATEWAY))
    assert answer[:3] == (GATEWAY, ALL_NODES, ALL_NODES_MAC)
    assert ICMPv6ND_NA(answer.body).S == 0
    assert recorder.neighbors == []


def test_advertisements_teach() -> None:
    recorder = Recorder()
    body = bytes(ICMPv6ND_NA(tgt="fd00:c0a8:5::15", S=1) / ICMPv6NDOptDstLLAddr(lladdr=MAC_TEXT))
    assert recorder.hear(body, dst=LINK_LOCAL) == []
    assert recorder.hear(bytes(ICMPv6ND_NA(tgt="fd00:c0a8:5::15", S=1)), dst=LINK_LOCAL) == []
    assert recorder.neighbors == [(PREFIX[:15] + b"\x15", MAC)] * 2


@pytest.mark.parametrize(
    ("body", "src", "reason"),
    (
        (bytes(ICMPv6ND_NA(tgt="fd00:c0a8:5::2")), GUEST, "ndp_malformed"),  # our own address
        (bytes(ICMPv6ND_NA(tgt="fe80::1") / ICMPv6NDOptDstLLAddr(lladdr="52:54:00:00:00:01")), GUEST, "ndp_malformed"),
        (ns("fd00:c0a8:5::2", mac="52:54:00:00:00:01"), GUEST, "ndp_malformed"),  # for another guest
        (ns("fd00:c0a8:5::2"), GATEWAY, "ndp_malformed"),  # in our name
        (RS, LINK_LOCAL, "ndp_malformed"),
        (RS, ALL_NODES, "ndp_malformed"),  # a group is nobody
        (RS[:-8] + b"\x01\x00" + RS[-6:], GUEST, "ndp_malformed"),
        (bytes(ICMPv6ND_RA()), GUEST, "ndp_router_advertisement"),
        (b"", GUEST, "ndp_malformed"),
        (b"\x89" + bytes(39), GUEST, "ndp_malformed"),  # a redirect
    ),
)
def test_what_is_dropped_and_counted(body: bytes, src: bytes, reason: str) -> None:
    recorder = Recorder()
    assert recorder.hear(body, src=src, dst=LINK_LOCAL) == []
    assert recorder.drops == [reason]
    assert recorder.neighbors == []


@pytest.mark.parametrize("body", (RS, ns("fd00:c0a8:5::2"), bytes(ICMPv6ND_NA(tgt="fe80::1"))))
def test_what_crossed_a_router_is_a_forgery(body: bytes) -> None:
    recorder = Recorder()
    assert recorder.hear(body, dst=LINK_LOCAL, hop_limit=254) == []
    assert recorder.drops == ["ndp_hop_limit"]
    assert recorder.neighbors == []


def test_probes() -> None:
    ndp = Recorder().ndp
    target = PREFIX[:15] + b"\x15"
    message = ndp.probe(target)
    assert message[:3] == (LINK_LOCAL, solicited_node(target), bytes.fromhex("3333ff000015"))
    packet = ICMPv6ND_NS(message.body)
    assert packet.tgt == "fd00:c0a8:5::15"
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == "52:55:c0:a8:05:02"
    assert ndp.probe(target, MAC)[1:3] == (target, MAC)


def test_all_addresses_are_advertised() -> None:
    messages = Recorder().ndp.advertise_addresses()
    assert {message.src for message in messages} == {LINK_LOCAL, GATEWAY, DNS}
    for message in messages:
        assert message[1:3] == (ALL_NODES, ALL_NODES_MAC)
        assert (ICMPv6ND_NA(message.body).S, ICMPv6ND_NA(message.body).O) == (0, 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([RS, RS_UNSPECIFIED, ns("fd00:c0a8:5::2"), bytes(ICMPv6ND_NA(tgt="fe80::1"))]),
            st.binary(max_size=30),
            st.integers(0, 40),
            st.sampled_from([GUEST, UNSPECIFIED, ALL_NODES]),
            st.sampled_from([LINK_LOCAL, ALL_NODES, solicited_node(GATEWAY)]),
        ),
        max_size=20,
    )
)
def test_any_messages_are_survived(steps: list[tuple[bytes, bytes, int, bytes, bytes]]) -> None:
    recorder = Recorder()
    for step, (body, patch, at, src, dst) in enumerate(steps):
        mutated = body[:at] + patch + body[at + len(patch) :]
        for message in recorder.hear(mutated, src=src, dst=dst, now=float(step)):
            assert len(message.src) == len(message.dst) == 16
            assert len(message.dst_mac) == 6


def search_lists(message: NdpMessage) -> dict[int, list[str]]:
    """The search lists of an advertisement, by lifetime."""
    found: dict[int, list[str]] = {}
    option = ICMPv6ND_RA(message.body).payload
    while option:
        if isinstance(option, ICMPv6NDOptDNSSL):
            found[option.lifetime] = option.searchlist
        option = option.payload
    return found


def test_search_domains_that_vanish_are_told_with_a_lifetime_of_0() -> None:
    """RFC 8106 5.2: guests would keep them for 1,800 s. As often as other news is told, then no more."""
    ndp = Recorder().ndp
    now = 100.0
    for _ in range(4):
        (message,) = ndp.on_timer(now)
        now = ndp.due_at
    ndp.set_search(("corp.example", "netstack.internal"), now)
    (message,) = ndp.on_timer(ndp.due_at)
    assert search_lists(message) == {1800: ["corp.example.", "netstack.internal."]}
    now = ndp.due_at - 10
    ndp.set_search(("netstack.internal",), now)
    for _ in range(3):
        (message,) = ndp.on_timer(ndp.due_at)
        assert search_lists(message) == {1800: ["netstack.internal."], 0: ["corp.example."]}
    (message,) = ndp.on_timer(ndp.due_at)
    assert search_lists(message) == {1800: ["netstack.internal."]}


def test_a_search_domain_that_comes_back_is_not_withdrawn() -> None:
    ndp = Recorder().ndp
    ndp.on_timer(100.0)
    ndp.set_search(("a.example",), 200.0)
    ndp.set_search(("b.example", "netstack.internal"), 201.0)
    (message,) = ndp.on_timer(ndp.due_at)
    assert search_lists(message) == {1800: ["b.example.", "netstack.internal."], 0: ["a.example."]}
