"""Who may send what, and where it goes: spoofed sources, martian destinations, protected ports, drop reasons."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ParamProblem, IPv6
from scapy.layers.l2 import Ether

from netstack.core.ports import Datagram
from netstack.wire.arp import write_arp
from netstack.wire.ipv6 import write_ipv6
from netstack.wire.ndp import write_neighbor_advertisement
from tests.frames import ip_frame, tcp_frame, udp_frame
from tests.script import Talk, established, seg
from tests.world import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    GUEST_MAC,
    OTHER4,
    OTHER6,
    OTHER_MAC,
    WORLD4,
    WORLD6,
    World,
)

SYN, ACK = 0x02, 0x10
FAMILIES = pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))

# Where no guest may go: what the host's kernel would take for itself, for its own wire, or for many.
MARTIANS4 = (
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "192.168.5.0",
    "192.168.5.77",
    "192.168.5.255",
)
MARTIANS6 = (
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "fe80::1",
    "ff02::1",
    "ff05::1:3",
    "fd00:c0a8:5::77",
)


def _syn(world: World, src: bytes, dst: bytes, *, mac: bytes = GUEST_MAC, port: int = 80) -> bytes:
    return tcp_frame(world.mac, mac, src, dst, (40000, port), 1, 0, SYN, 65535)


def _packed(text: str) -> bytes:
    return ip_address(text).packed


# ---- martian destinations


@pytest.mark.parametrize("address", MARTIANS4 + MARTIANS6)
def test_no_guest_reaches_a_martian(address: str) -> None:
    """Neither by TCP, UDP nor echo; the host is never asked for such a socket."""
    world = World()
    link = world.add_link()
    dst = _packed(address)
    src = GUEST4 if len(dst) == 4 else GUEST6
    echo = b"\x08\0\0\0\0\1\0\1hello!" if len(dst) == 4 else b"\x80\0\0\0\0\1\0\1hello!"
    for frame in (
        _syn(world, src, dst),
        udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 53), b"?"),
        udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 9999), b"?"),
        ip_frame(world.mac, GUEST_MAC, src, dst, 1 if len(dst) == 4 else 58, echo),
    ):
        world.receive(link, frame)
    assert world.host.opened == []
    assert sum(world.drops.values()) + world.stack.counters.group_packets >= 3
    assert len(world.stack.flows) == 0


@FAMILIES
def test_the_gateway_is_the_hosts_loopback(ipv6: bool) -> None:
    world = World()
    link = world.add_link()
    src, dst = (GUEST6, GATEWAY6) if ipv6 else (GUEST4, GATEWAY4)
    loopback = bytes(15) + b"\1" if ipv6 else bytes((127, 0, 0, 1))
    world.receive(link, _syn(world, src, dst))
    world.receive(link, udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 9999), b"?"))
    assert world.host.opened[0] == ("tcp", loopback, 80)
    assert [(kind, port) for kind, _, port in world.host.opened] == [("tcp", 80), ("udp", 40000)]
    assert [(sent.address, sent.port) for sent in world.host.datagrams[0].sent] == [(loopback, 9999)]


@FAMILIES
def test_without_host_loopback_the_gateway_is_unreachable(ipv6: bool) -> None:
    """ICMP, not a reset: "Network is unreachable" (slirp4netns's test test-slirp4netns-disable-host-loopback)."""
    world = World(host_loopback=False)
    link = world.add_link()
    src, dst = (GUEST6, GATEWAY6) if ipv6 else (GUEST4, GATEWAY4)
    for frame in (_syn(world, src, dst), udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 9999), b"?")):
        world.receive(link, frame)
        (answer,) = world.take(link)
        if ipv6:
            assert Ether(answer)[ICMPv6DestUnreach].code == 0
        else:
            assert (Ether(answer)[ICMP].type, Ether(answer)[ICMP].code) == (3, 0)
    assert world.host.opened == []


@FAMILIES
def test_a_protected_port_is_refused(ipv6: bool) -> None:
    """The API listens on the host's loopback: a guest that asks the gateway for it is refused, and only there."""
    world = World()
    world.stack.protect_port(7777)
    link = world.add_link()
    src, dst, far = (GUEST6, GATEWAY6, WORLD6) if ipv6 else (GUEST4, GATEWAY4, WORLD4)
    world.receive(link, _syn(world, src, dst, port=7777))
    (answer,) = world.take(link)
    assert Ether(answer)["TCP"].flags == "RA"
    world.receive(link, udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 7777), b"?"))
    assert world.host.opened == []
    world.take(link)
    world.receive(link, _syn(world, src, far, port=7777))
    assert world.host.opened == [("tcp", far, 7777)]


@FAMILIES
def test_the_dns_address_has_no_other_ports(ipv6: bool) -> None:
    world = World()
    link = world.add_link()
    src = GUEST6 if ipv6 else GUEST4
    dst = world.stack.addresses.dns6 if ipv6 else world.stack.addresses.dns
    world.receive(link, _syn(world, src, dst, port=22))
    (answer,) = world.take(link)
    assert Ether(answer)["TCP"].flags == "RA"
    world.receive(link, udp_frame(world.mac, GUEST_MAC, src, dst, (40000, 22), b"?"))
    assert world.host.opened == []
    assert world.drops == {"udp_no_service": 1}


# ---- sources


@pytest.mark.parametrize(
    "source",
    (
        "192.168.5.2",  # the gateway's
        "192.168.5.3",  # its DNS address
        "192.168.5.0",
        "192.168.5.255",
        "10.0.0.1",
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "198.51.100.7",
        "fd00:c0a8:5::2",
        "fd00:c0a8:5::3",
        "fe80::5055:c0ff:fea8:502",
        "2001:db8::1",
        "::",
        "::1",
        "ff02::1",
        "::ffff:192.168.5.15",
    ),
)
def test_sources_that_no_guest_can_have(source: str) -> None:
    world = World()
    link = world.add_link()
    src = _packed(source)
    dst = WORLD4 if len(src) == 4 else WORLD6
    world.receive(link, _syn(world, src, dst), udp_frame(world.mac, GUEST_MAC, src, dst, (1, 2), b"?"))
    assert world.host.opened == []
    assert world.drops["source_not_its_own"] + world.drops.get("ipv6_malformed", 0) == 2
    assert world.take(link) == []


def _two_guests(ipv6: bool = False) -> tuple[World, Talk, bytes, bytes]:
    """A guest with a connection; another one on a link of its own, known too."""
    world = World()
    talk = established(talk=Talk(world=world, link=world.add_link("one"), ipv6=ipv6))
    other = world.add_link("two")
    address, dst = (OTHER6, WORLD6) if ipv6 else (OTHER4, WORLD4)
    world.receive(other, _syn(world, address, dst, mac=OTHER_MAC))
    world.take(other)
    return world, talk, address, dst


@FAMILIES
def test_another_guests_address_is_dropped_and_counted(ipv6: bool) -> None:
    """From its own link, with its own MAC: neither a new flow nor a word in one that is there."""
    world, talk, _, dst = _two_guests(ipv6)
    thief = world.links[1]
    opened = len(world.host.opened)
    before = world.drops.get("source_not_its_own", 0)
    world.receive(thief, _syn(world, talk.address, dst, mac=OTHER_MAC, port=81))
    forged = Talk(world=world, link=thief, mac=OTHER_MAC, guest=talk.address, peer=talk.peer)
    forged.iss, forged.next, forged.heard = talk.iss, 1, 1
    world.receive(thief, forged.frame(seg("PA", data=b"forged")), forged.frame(seg("R")))
    assert world.drops["source_not_its_own"] == before + 3
    assert len(world.host.opened) == opened
    assert talk.state == "ESTABLISHED"
    talk.host.takes(b"")
    talk.guest(seg("PA", data=b"real"))
    talk.host.takes(b"real")


@FAMILIES
def test_another_mac_on_the_same_link_is_dropped_and_counted(ipv6: bool) -> None:
    """Several guests may sit behind one link; the fast path tells them apart as well."""
    world = World()
    link = world.add_link()
    talk = established(talk=Talk(world=world, link=link, ipv6=ipv6))
    address, dst = (OTHER6, WORLD6) if ipv6 else (OTHER4, WORLD4)
    world.receive(link, _syn(world, address, dst, mac=OTHER_MAC))
    world.take(link)
    forged = Talk(world=world, link=link, mac=OTHER_MAC, guest=talk.address, peer=talk.peer)
    forged.iss, forged.next, forged.heard = talk.iss, 1, 1
    world.receive(link, forged.frame(seg("PA", data=b"forged")))
    talk.host.takes(b"")
    assert world.drops["source_not_its_own"] == 1
    for mac, payload in ((GUEST_MAC, b"a real question"),) * 2 + ((OTHER_MAC, b"a forged question"),):
        world.receive(link, udp_frame(world.mac, mac, talk.address, talk.peer, (1000, 53), payload))
    assert [sent.payload for sent in world.host.datagrams[0].sent] == [b"a real question"] * 2
    assert world.drops["source_not_its_own"] == 2


def test_flows_end_when_their_address_changes_hands() -> None:
    """A new machine with an old address: its segments do not belong into the connections of the one before it."""
    talk = established()
    sock = talk.host
    world = talk.world
    world.stack.neighbors.owner_of = lambda address: OTHER_MAC
    new = Talk(world=world, link=talk.link, mac=OTHER_MAC)
    new.guest(seg("S", mss=1460))
    assert sock.was_reset
    new.expect(seg("SA", ack=1))


def test_the_address_of_a_lease_is_its_owners_only() -> None:
    """What the leases say is stronger than what guests say, also when the owner was never heard."""
    world = World()
    world.stack.neighbors.owner_of = lambda address: GUEST_MAC if address == GUEST4 else None
    link = world.add_link()
    world.receive(link, _syn(world, GUEST4, WORLD4, mac=OTHER_MAC))
    assert world.host.opened == []
    assert world.drops == {"source_not_its_own": 1}
    world.receive(link, _syn(world, GUEST4, WORLD4))
    assert world.host.opened == [("tcp", WORLD4, 80)]


def test_an_address_that_was_never_leased_is_free_again_after_a_while() -> None:
    world = World()
    link = world.add_link()
    world.receive(link, _syn(world, GUEST4, WORLD4))
    world.advance(world.now + 59)
    world.receive(link, _syn(world, GUEST4, WORLD4, mac=OTHER_MAC, port=81))
    assert len(world.host.opened) == 1
    world.advance(world.now + 2)
    world.receive(link, _syn(world, GUEST4, WORLD4, mac=OTHER_MAC, port=81))
    assert len(world.host.opened) == 2


@pytest.mark.parametrize(
    "source", (b"\x01\0\x5e\0\0\1", b"\xff" * 6, bytes(6), bytes.fromhex("5255c0a80502")), ids=bytes.hex
)
def test_sources_that_no_frame_can_have(source: bytes) -> None:
    """Groups, nobody, and the gateway itself."""
    world = World()
    link = world.add_link()
    world.receive(link, _syn(world, GUEST4, WORLD4, mac=source))
    assert world.drops == {"ethernet_bad_source": 1}
    assert world.stack.switch.macs() == {}


def test_a_link_local_source_speaks_only_to_the_gateway() -> None:
    """RFC 4291 2.5.6; who tries to reach the world is told why it cannot be (RFC 4443 3.1)."""
    world = World()
    link = world.add_link()
    src = _packed("fe80::1234")
    world.receive(link, _syn(world, src, WORLD6))
    assert world.host.opened == []
    assert world.drops == {"beyond_scope": 1}
    (frame,) = link.frames
    assert (frame[54], frame[55]) == (1, 2), "destination unreachable, beyond scope of source address"
    world.receive(link, _syn(world, src, world.stack.addresses.link_local))
    assert world.host.opened == [("tcp", bytes(15) + b"\1", 80)]


def _advertisement(target: bytes, extensions: bytes = b"", first: int = 58) -> bytes:
    """Ethertype, and an IPv6 packet to all nodes with a neighbor advertisement from a guest's link-local address."""
    src, dst = _packed("fe80::66"), _packed("ff02::1")
    body = write_neighbor_advertisement(src, dst, target, target_mac=OTHER_MAC, solicited=False)
    return b"\x86\xdd" + write_ipv6(src, dst, first, len(extensions + body), ttl=255) + extensions + body


_OPTIONS = bytes((60, 0, 1, 4, 0, 0, 0, 0))  # destination options: PadN, and more of them behind it
_LAST_OPTIONS = bytes((58, 0, 1, 4, 0, 0, 0, 0))


@pytest.mark.parametrize("tags", (b"", b"\x81\0\0\0", b"\x88\xa8\0\0\x81\0\0\0"), ids=("plain", "tag", "tags"))
@pytest.mark.parametrize(
    ("body", "dropped"),
    (
        (b"\x08\x06" + write_arp(2, OTHER_MAC, GATEWAY4, GUEST_MAC, GUEST4), True),
        (b"\x08\x06" + write_arp(2, OTHER_MAC, GUEST4, GUEST_MAC, GUEST4), True),
        (b"\x08\x06" + write_arp(2, OTHER_MAC, OTHER4, GUEST_MAC, GUEST4), False),
        (_advertisement(GATEWAY6), True),
        (_advertisement(GUEST6), True),
        (_advertisement(OTHER6), False),
        (_advertisement(GATEWAY6, _LAST_OPTIONS, 60), True),
        (_advertisement(GATEWAY6, _OPTIONS * 8 + _LAST_OPTIONS, 60), True),
        (_advertisement(OTHER6, _OPTIONS + _LAST_OPTIONS, 60), False),
    ),
    ids=(
        "arp-gateway",
        "arp-lease",
        "arp-own",
        "na-gateway",
        "na-lease",
        "na-own",
        "na-options",
        "na-many",
        "na-honest",
    ),
)
def test_guests_do_not_lie_to_each_other_about_who_is_where(tags: bytes, body: bytes, dropped: bool) -> None:
    """Neither about the gateway's addresses nor about leased ones, in whatever a kernel looks through."""
    world = World()
    world.stack.neighbors.owner_of = lambda address: GUEST_MAC if address in (GUEST4, GUEST6) else None
    link, victim = world.add_link("link"), world.add_link("victim")
    for dst in (b"\xff" * 6, GUEST_MAC):
        world.receive(link, dst + OTHER_MAC + tags + body)
    assert len(world.take(victim)) == (0 if dropped else 2)


# ---- what cannot be read, or is not for us


@pytest.mark.parametrize(
    ("body", "reason"),
    (
        (b"\x08\x00", "ipv4_malformed"),
        (b"\x08\x00" + b"\x45" * 10, "ipv4_malformed"),
        (b"\x86\xdd" + b"\x60" * 39, "ipv6_malformed"),
        (b"\x08\x06" + b"\0" * 27, "arp_malformed"),
        (b"\x88\xcc" + b"\0" * 46, "ethertype_unknown"),
        (b"\x81\x00\x00\x05\x08\x00" + b"\x45" * 46, "ethertype_unknown"),
        (b"\x00\x20" + b"\0" * 46, "ethertype_unknown"),
    ),
)
def test_frames_that_are_dropped_and_why(body: bytes, reason: str) -> None:
    world = World()
    link = world.add_link()
    world.receive(link, world.mac + GUEST_MAC + body)
    assert world.drops == {reason: 1}
    assert world.take(link) == []


@pytest.mark.parametrize("size", range(14))
def test_frames_without_a_whole_header(size: int) -> None:
    world = World()
    link = world.add_link()
    world.receive(link, bytes(size))
    assert world.drops == {"ethernet_short": 1}


@FAMILIES
def test_a_protocol_that_we_do_not_speak_is_told_so(ipv6: bool) -> None:
    """RFC 1122 3.2.2.1: protocol unreachable; RFC 4443 3.4: parameter problem, unrecognized next header, at byte 6."""
    world = World()
    link = world.add_link()
    src, dst = (GUEST6, WORLD6) if ipv6 else (GUEST4, WORLD4)
    world.receive(link, ip_frame(world.mac, GUEST_MAC, src, dst, 132, b"sctp" * 5))
    (answer,) = world.take(link)
    if ipv6:
        problem = Ether(answer)[ICMPv6ParamProblem]
        assert (problem.code, problem.ptr) == (1, 6)
        assert Ether(answer)[IPv6].src == "fd00:c0a8:5::2"
    else:
        assert (Ether(answer)[ICMP].type, Ether(answer)[ICMP].code) == (3, 2)
        assert Ether(answer)[IP].src == "192.168.5.2"
    assert world.drops == {"protocol_unknown": 1}


def test_errors_are_limited() -> None:
    """RFC 1812 4.3.2.8, RFC 4443 2.4 (f)."""
    world = World(oracle=False)
    link = world.add_link()
    frame = ip_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, 132, b"sctp" * 5)
    for _ in range(15):
        world.receive(link, *[frame] * 100)
    assert len(world.take(link)) == world.stack.limits.icmp_errors_per_second == 1000
    assert world.drops["icmp_errors_limited"] == 500
    world.advance(world.now + 0.1)
    world.receive(link, *[frame] * 150)
    assert len(world.take(link)) == 100


def test_the_errors_of_one_guest_are_not_taken_from_anothers() -> None:
    world = World(oracle=False)
    noisy, quiet = world.add_link(), world.add_link("quiet")
    frame = ip_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, 132, b"sctp" * 5)
    for _ in range(15):
        world.receive(noisy, *[frame] * 100)
    world.receive(quiet, ip_frame(world.mac, OTHER_MAC, _packed("192.168.5.16"), WORLD4, 132, b"sctp" * 5))
    assert len(world.take(quiet)) == 1


def _from_a_server(kind: str) -> bytes:
    """What only the gateway may say to guests."""
    other = _packed("192.168.5.16")
    local = _packed("fe80::1234")
    every = b"\x33\x33\0\0\0\1"
    if kind == "dhcp":
        return ip_frame(b"\xff" * 6, OTHER_MAC, other, b"\xff" * 4, 17, b"\0\x43\0\x44\0\x10\0\0" + bytes(8))
    if kind == "dhcp with options":
        packet = b"\x46\0\0\x28\0\0\0\0\x40\x11\0\0" + other + b"\xff" * 4 + b"\1" * 4
        return b"\xff" * 6 + OTHER_MAC + b"\x08\0" + packet + b"\0\x43\0\x44\0\x10\0\0" + bytes(8)
    if kind == "dhcpv6":
        return ip_frame(every, OTHER_MAC, local, _packed("ff02::1"), 17, b"\x02\x23\x02\x22\0\x10\0\0" + bytes(8))
    first = {"router advertisement": 134, "redirect": 137}[kind]
    return ip_frame(every, OTHER_MAC, local, _packed("ff02::1"), 58, bytes((first, 0, 0, 0)) + bytes(36))


@pytest.mark.parametrize("kind", ("dhcp", "dhcp with options", "dhcpv6", "router advertisement", "redirect"))
def test_a_guest_cannot_play_the_gateway_to_others(kind: str) -> None:
    """One answer of a DHCP server, one router advertisement (RFC 6105), and what others send goes through it."""
    world = World(oracle=False)
    rogue, victim = world.add_link(), world.add_link("victim")
    world.receive(rogue, _from_a_server(kind))
    assert world.take(victim) == []
    assert world.drops["source_not_its_own"] == 1


def test_what_guests_may_say_to_each_other_passes() -> None:
    """The clients' half of the same protocols; and UDP from a port that only looks like a server's in a fragment."""
    world = World(oracle=False)
    one, other = world.add_link(), world.add_link("other")
    src = _packed("192.168.5.16")
    world.receive(one, ip_frame(b"\xff" * 6, OTHER_MAC, src, b"\xff" * 4, 17, b"\0\x44\0\x43\0\x10\0\0" + bytes(8)))
    assert len(world.take(other)) == 1
    router = _packed("fe80::1234"), _packed("ff02::2")
    world.receive(one, ip_frame(b"\x33\x33\0\0\0\2", OTHER_MAC, *router, 58, b"\x85\0\0\0" + bytes(4)))
    assert len(world.take(other)) == 1


def test_multicast_and_broadcast_are_not_forwarded_to_the_host() -> None:
    world = World()
    link = world.add_link()
    world.receive(
        link,
        udp_frame(b"\x01\0\x5e\x7f\xff\xfa", GUEST_MAC, GUEST4, _packed("239.255.255.250"), (1900, 1900), b"M-SEARCH"),
        udp_frame(b"\xff" * 6, GUEST_MAC, GUEST4, _packed("192.168.5.255"), (137, 137), b"?"),
        udp_frame(b"\x33\x33\0\0\0\xfb", GUEST_MAC, GUEST6, _packed("ff02::fb"), (5353, 5353), b"?"),
        ip_frame(b"\x01\0\x5e\0\0\x16", GUEST_MAC, GUEST4, _packed("224.0.0.22"), 2, b"\x22\0\0\0\0\0\0\0"),
        ip_frame(b"\xff" * 6, GUEST_MAC, GUEST4, _packed("255.255.255.255"), 1, b"\x08\0\0\0\0\1\0\1"),
        _syn(world, GUEST4, _packed("192.168.5.255")),
    )
    assert world.host.opened == []
    assert world.drops == {"not_forwarded": 1}  # TCP
    assert world.stack.counters.group_packets == 5
    assert world.take(link) == []


@FAMILIES
@pytest.mark.parametrize("group", (b"\xff" * 6, b"\x01\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"), ids=bytes.hex)
def test_one_hosts_packets_in_a_frame_to_all_are_discarded(ipv6: bool, group: bytes) -> None:
    """RFC 1122 3.3.6 and 3.2.2: neither taken nor answered, whoever they are for."""
    world = World()
    link = world.add_link()
    src, other, far, gateway = (GUEST6, OTHER6, WORLD6, GATEWAY6) if ipv6 else (GUEST4, OTHER4, WORLD4, GATEWAY4)
    for dst in (other, far, gateway):
        world.receive(
            link,
            tcp_frame(group, GUEST_MAC, src, dst, (40000, 80), 1, 0, SYN, 65535),
            tcp_frame(group, GUEST_MAC, src, dst, (40000, 80), 1, 0, ACK, 65535),
            udp_frame(group, GUEST_MAC, src, dst, (40000, 9), b"?"),
            ip_frame(group, GUEST_MAC, src, dst, 132, b"sctp"),
        )
    assert world.host.opened == []
    assert world.take(link) == []
    assert world.stack.counters.group_packets == 12


def test_udp_services_are_found_by_address_and_port() -> None:
    world = World()
    link = world.add_link()
    asked: list[tuple[str, Datagram]] = []
    gateway, dns = world.stack.addresses.gateway, world.stack.addresses.dns
    world.stack.register_udp(53, lambda datagram, now: asked.append(("dns", datagram)), addresses=[dns])
    world.stack.register_udp(67, lambda datagram, now: asked.append(("dhcp", datagram)))
    send = [
        udp_frame(world.mac, GUEST_MAC, GUEST4, dns, (40000, 53), b"one"),
        udp_frame(world.mac, GUEST_MAC, GUEST4, gateway, (40000, 53), b"not a service here"),
        udp_frame(b"\xff" * 6, GUEST_MAC, bytes(4), b"\xff" * 4, (68, 67), b"two"),
        udp_frame(world.mac, GUEST_MAC, GUEST4, gateway, (68, 67), b"three"),
        udp_frame(world.mac, GUEST_MAC, GUEST4, WORLD4, (40000, 53), b"somebody else's"),
    ]
    world.receive(link, *send)
    assert [(name, each.payload, each.src, each.dst) for name, each in asked] == [
        ("dns", b"one", GUEST4, dns),
        ("dhcp", b"two", bytes(4), b"\xff" * 4),
        ("dhcp", b"three", GUEST4, gateway),
    ]
    assert (asked[0][1].mac, asked[0][1].src_port, asked[0][1].dst_port) == (GUEST_MAC, 40000, 53)
    assert sorted({sent.address for each in world.host.datagrams for sent in each.sent}) == [b"\x7f\0\0\1", WORLD4]


def test_an_unspecified_source_may_only_ask_for_an_address() -> None:
    """DHCP comes from 0.0.0.0; nothing else does (RFC 1122 3.2.1.3)."""
    world = World()
    link = world.add_link()
    world.receive(
        link,
        udp_frame(world.mac, GUEST_MAC, bytes(4), WORLD4, (68, 53), b"?"),
        udp_frame(world.mac, GUEST_MAC, bytes(4), GATEWAY4, (68, 9), b"?"),
        udp_frame(world.mac, GUEST_MAC, bytes(16), WORLD6, (546, 53), b"?"),
    )
    assert world.host.opened == []
    assert world.drops == {"source_not_its_own": 3}


# ---- ARP


def test_arp_for_the_gateway_is_answered() -> None:
    world = World()
    link = world.add_link()
    request = write_arp(1, GUEST_MAC, GUEST4, bytes(6), GATEWAY4)
    world.receive(link, b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + request)
    (answer,) = world.take(link)
    arp = Ether(answer)["ARP"]
    assert (Ether(answer).dst, arp.op, arp.hwsrc, arp.psrc, arp.pdst) == (
        GUEST_MAC.hex(":"),
        2,
        world.mac.hex(":"),
        "192.168.5.2",
        "192.168.5.15",
    )


@pytest.mark.parametrize("wanted", ("192.168.5.77", "8.8.8.8", "192.168.5.15"))
def test_arp_for_others_is_not_answered(wanted: str) -> None:
    """No proxy ARP: guests answer for themselves."""
    world = World()
    link = world.add_link()
    request = write_arp(1, GUEST_MAC, GUEST4, bytes(6), _packed(wanted))
    world.receive(link, b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + request)
    assert world.take(link) == []


def test_arp_that_claims_the_gateways_address_is_told_of_the_conflict() -> None:
    """RFC 5227 2.1.1 and 2.4: a probe comes from 0.0.0.0, a claim from the address itself."""
    world = World()
    link = world.add_link()
    for sender in (bytes(4), GATEWAY4):
        world.receive(link, b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + write_arp(1, GUEST_MAC, sender, bytes(6), GATEWAY4))
        assert len(world.take(link)) == 1
    assert world.stack.neighbors.find(GATEWAY4) is None


def test_arp_in_the_name_of_another_mac_is_dropped() -> None:
    world = World()
    link = world.add_link()
    world.receive(link, b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + write_arp(1, OTHER_MAC, GUEST4, bytes(6), GATEWAY4))
    assert world.drops == {"arp_sender_mismatch": 1}
    assert world.stack.neighbors.find(GUEST4) is None


def test_arp_for_another_guests_address_is_dropped() -> None:
    world = World()
    link = world.add_link()
    world.receive(link, _syn(world, GUEST4, WORLD4))
    world.take(link)
    world.receive(link, b"\xff" * 6 + OTHER_MAC + b"\x08\x06" + write_arp(1, OTHER_MAC, GUEST4, bytes(6), GATEWAY4))
    assert world.drops == {"arp_not_its_address": 1}
    neighbor = world.stack.neighbors.find(GUEST4)
    assert neighbor is not None
    assert neighbor.mac == GUEST_MAC
