"""Which of a guest's listening sockets get a port of the host, and which one: the rules of `[auto_publish]`.

Theory of operation
-------------------
A rule is a filter (protocol, port range, address that the socket is bound to, guest) and what to do with what passes:
give it a port of the host, or leave it alone (`ignore`). Rules are looked at in their order, and the first that matches
decides. Behind the user's rules comes one more, unless it was turned off: every port, at the host's 127.0.0.1, under
its own number.

Addresses match as users of Lima know it. A rule says `guest_ip`, 127.0.0.1 unless given:

    socket bound to      matches a rule with guest_ip
    0.0.0.0, ::          any                 (it answers at every address, so at the rule's too)
    ::1                  ::1, 127.0.0.1
    A                    A
    anything             0.0.0.0 or ::, unless guest_ip_must_be_zero says that the socket must be bound to just that

and an `ignore` rule for one address does not silence a socket that is bound to all of them, which is left to the next
rule. One that names no guest_ip has 0.0.0.0, and silences the port.

What no rule can allow: a port of the host below 1024, unless `privileged`; and a forward to a socket that cannot be
reached from outside of its guest (`Publication.reachable`), because it is bound to the guest's loopback.

UDP sockets cannot be told apart as listening or asking: whoever sends a query has one, for a moment. So the last rule
leaves alone UDP ports in the guest's ephemeral range, and those that only mean something on one's own wire; a rule of
the user's may name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple

IpAddress = IPv4Address | IPv6Address
Ports = tuple[int, int]  # the first and the last

ALL_PORTS: Ports = (1, 65535)
PRIVILEGED = 1024  # ports below belong to root (IANA's system ports, RFC 6335 6)
LOOPBACK = IPv4Address("127.0.0.1")
_LOOPBACK6 = IPv6Address("::1")
# net/ipv4/af_inet.c: the default of ip_local_port_range.
EPHEMERAL: Ports = (32768, 60999)
# DHCP clients, DHCPv6 clients, mDNS, LLMNR, SSDP: answers to a whole wire, of no use through a forward.
_WIRE_UDP = frozenset((68, 546, 5353, 5355, 1900))


class Listener(NamedTuple):
    """A socket of a guest that takes connections or datagrams."""

    protocol: Literal["tcp", "udp"]
    address: IpAddress
    port: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `[[auto_publish.rule]]`, checked."""

    protocol: Literal["tcp", "udp", "any"] = "any"
    guest: str = ""  # name of the guest; "": any
    guest_ip: IpAddress = LOOPBACK
    guest_ip_must_be_zero: bool = False
    guest_ports: Ports = ALL_PORTS
    host_ip: IpAddress = LOOPBACK
    host_ports: Ports = ALL_PORTS  # as many as guest_ports
    ignore: bool = False
    static: bool = False

    def matches(self, listener: Listener, guest: str) -> bool:
        """Whether this rule decides about this socket."""
        if self.protocol not in ("any", listener.protocol) or self.guest not in ("", guest):
            return False
        if not self.guest_ports[0] <= listener.port <= self.guest_ports[1]:
            return False
        bound = listener.address
        if bound.is_unspecified:
            # An address that is not silenced still answers.
            return not self.ignore or self.guest_ip.is_unspecified
        if bound == self.guest_ip:
            return True
        if self.guest_ip.is_unspecified:
            return not self.guest_ip_must_be_zero
        return bound == _LOOPBACK6 and self.guest_ip == LOOPBACK

    def host_port(self, guest_port: int) -> int:
        """The host's port for a port in our range."""
        return self.host_ports[0] + guest_port - self.guest_ports[0]


class Publication(NamedTuple):
    """What a listener gets: a place on the host, and the address of the guest's socket."""

    protocol: Literal["tcp", "udp"]
    host: IpAddress
    host_port: int
    guest: IpAddress  # unspecified: any address of the guest
    guest_port: int

    @property
    def reachable(self) -> bool:
        """Whether the guest's socket can be reached over its link."""
        return not self.guest.is_loopback

    @property
    def place(self) -> tuple[str, IpAddress, int]:
        """What only one can have: protocol, address and port on the host."""
        return self.protocol, self.host, self.host_port


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of a network, in their order."""

    rules: Sequence[Rule] = ()
    fallback: bool = True
    privileged: bool = False

    def decide(self, listener: Listener, guest: str, ephemeral: Ports = EPHEMERAL) -> Publication | str:
        """Where a socket of this guest is published, or in a few words why it is not."""
        rule = next((rule for rule in self.rules if rule.matches(listener, guest)), None)
        if rule is None:
            if not self.fallback:
                return "no rule of auto_publish matches"
            if not _FALLBACK.matches(listener, guest):
                return "bound to one address of the guest; a rule may name it as guest_ip"
            if listener.protocol == "udp" and listener.port in _WIRE_UDP:
                return "speaks to its own wire only"
            if listener.protocol == "udp" and ephemeral[0] <= listener.port <= ephemeral[1]:
                return "an ephemeral UDP port; a rule may name it"
            rule = _FALLBACK
        if rule.ignore:
            return "ignored by a rule"
        if rule.static:
            return "published by a static rule"
        port = rule.host_port(listener.port)
        if port < PRIVILEGED and not self.privileged:
            return f"port {port} is below {PRIVILEGED}, and auto_publish.privileged is off"
        return Publication(listener.protocol, rule.host_ip, port, listener.address, listener.port)

    def publish(self, listeners: Sequence[Listener], guest: str, ephemeral: Ports = EPHEMERAL) -> list[Publication]:
        """What is published of all these sockets: one for each place on the host.

        A service often has several sockets (IPv4 and IPv6, one for each address). Of these, one that answers at every
        address of the guest serves best, one of its loopback worst; IPv4 before IPv6, because every guest has it.
        """
        best: dict[tuple[str, IpAddress, int], Publication] = {}
        for listener in listeners:
            found = self.decide(listener, guest, ephemeral)
            if isinstance(found, Publication):
                known = best.get(found.place)
                if known is None or _rank(found) < _rank(known):
                    best[found.place] = found
        return list(best.values())

    def static_specs(self) -> list[str]:
        """The forwards of the static rules, as SPECs: they are there whether or not an agent says anything."""
        specs: list[str] = []
        for rule in self.rules:
            if rule.static and not rule.ignore:
                protocols = ("tcp", "udp") if rule.protocol == "any" else (rule.protocol,)
                specs += [_static_spec(rule, protocol) for protocol in protocols]
        return specs


_FALLBACK = Rule()


def _rank(publication: Publication) -> tuple[bool, bool, bool, int, int]:
    guest = publication.guest
    return (
        guest.is_loopback,
        not guest.is_unspecified,
        guest.version == 6,
        publication.guest_port,
        int(guest),
    )


def _static_spec(rule: Rule, protocol: str) -> str:
    def ports(of: Ports) -> str:
        return str(of[0]) if of[0] == of[1] else f"{of[0]}-{of[1]}"

    host = write_host(rule.host_ip)
    guest = rule.guest
    if not guest and not rule.guest_ip.is_loopback and not rule.guest_ip.is_unspecified:
        guest = write_host(rule.guest_ip)
    middle = f"{guest}:" if guest else ""
    return f"{host}:{ports(rule.host_ports)}:{middle}{ports(rule.guest_ports)}/{protocol}"


def write_host(address: IpAddress) -> str:
    """An address as a SPEC has it: IPv6 in brackets."""
    return f"[{address}]" if address.version == 6 else str(address)
