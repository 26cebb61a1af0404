"""What a guest's agent says: the sockets that listen in its guest, and the ports that its rules hand on.

Theory of operation
-------------------
The agent is a shell script, so the work is done here: it sends lines as its kernel and its tools wrote them.

    hello 1 l 32768 60999 relay        once: version of this language, order of bytes, ephemeral ports, what else it can
    tcp 0F05A8C0:1F90                  /proc/net/tcp, and so on: address and port in hexadecimal
    udp6 00000000000000000000000000000000:0035
    iptables -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
    nft tcp dport 8080 dnat ip to 10.88.0.2:80
    .                                  the end of a list; "=" alone: the same list as before

Linux writes an address as words of 32 bits in the machine's own order (net/ipv4/tcp_ipv4.c: get_tcp4_sock), so the
agent says which that is: l(ittle) or b(ig) end first.

A rule of destination NAT makes a port of the guest lead elsewhere, as containers' published ports do: such a port
counts as a socket that listens, at the address that the rule is about or at all. Rules that only local programs meet
(chain OUTPUT), or that are about the loopback, are left out.

All of this is untrusted: a line that cannot be read is skipped, a list has at most MAX_LISTENERS entries and MAX_RULES
lines of rules, and a range of ports in a rule counts as far as there is room.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, NamedTuple

from netstack.control.auto_publish import EPHEMERAL, Listener, Ports

MAX_LISTENERS = 1024
MAX_RULES = 256  # each takes as long as a dozen sockets
MAX_LINE = 1024
VERSION = "1"

_SOCKET = re.compile(r"(tcp|udp)(6?) ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4})", re.ASCII)
_NFT_PORTS = re.compile(r"\b(tcp|udp) dport (\{[0-9, -]{1,400}\}|[0-9]{1,5}(?:-[0-9]{1,5})?)", re.ASCII)
_NFT_DESTINATION = re.compile(r"\bip6? daddr (!= )?([0-9a-fA-F.:/]{2,49})", re.ASCII)


class Hello(NamedTuple):
    """What an agent says first."""

    big_endian: bool = False
    ephemeral: Ports = EPHEMERAL
    relays: bool = False  # whether it can connect to sockets of its loopback for us


def parse_hello(line: str) -> Hello | None:
    """The agent's first line; None when it speaks another language. Untrusted."""
    words = line.split()
    if words[:2] != ["hello", VERSION] or len(words) < 3:
        return None
    ephemeral = EPHEMERAL
    if len(words) >= 5 and words[3].isascii() and words[4].isascii() and (words[3] + words[4]).isdigit():
        first, last = int(words[3][:6]), int(words[4][:6])
        if 1 <= first <= last <= 65535:
            ephemeral = first, last
    return Hello(words[2] == "b", ephemeral, "relay" in words[5:6])


def parse_report(lines: Iterable[str], hello: Hello) -> list[Listener]:
    """The sockets of one list, each once, in its order. Untrusted."""
    found: dict[Listener, None] = {}
    rules = 0
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind in ("tcp", "tcp6", "udp", "udp6"):
            listener = _parse_socket(line, hello.big_endian)
            if listener is not None:
                found[listener] = None
        elif (rules := rules + 1) > MAX_RULES:
            continue
        elif kind in ("iptables", "ip6tables"):
            found.update(dict.fromkeys(_parse_iptables(rest, kind == "ip6tables")))
        elif kind == "nft":
            found.update(dict.fromkeys(_parse_nft(rest)))
        if len(found) >= MAX_LISTENERS:
            break
    return list(found)[:MAX_LISTENERS]


def _parse_socket(line: str, big_endian: bool) -> Listener | None:
    match = _SOCKET.fullmatch(line)
    if match is None or len(match[3]) != (32 if match[2] else 8):
        return None
    port = int(match[4], 16)
    packed = bytes.fromhex(match[3])
    if not big_endian:
        packed = b"".join(packed[at : at + 4][::-1] for at in range(0, len(packed), 4))
    address: IPv4Address | IPv6Address
    if len(packed) == 4:
        address = IPv4Address(packed)
    else:
        address = IPv6Address(packed)
        address = address.ipv4_mapped or address
    return Listener("tcp" if match[1] == "tcp" else "udp", address, port) if port else None


def _parse_iptables(rule: str, ipv6: bool) -> Iterator[Listener]:
    """The ports of a line of iptables-save. Untrusted."""
    try:
        words = shlex.split(rule[:MAX_LINE])  # comments are in quotes, and may say anything
    except ValueError:
        return
    protocol = ports = destination = ""
    for at, word in enumerate(words[:-1]):
        negated = at > 0 and words[at - 1] == "!"
        if word == "-A" and words[at + 1] == "OUTPUT":
            return
        if negated:
            continue
        if word == "-p":
            protocol = words[at + 1]
        elif word in ("--dport", "--dports"):
            ports = words[at + 1].replace(":", "-")
        elif word == "-d":
            destination = words[at + 1]
    yield from _listeners(protocol, destination, ports, ipv6=ipv6)


def _parse_nft(rule: str) -> Iterator[Listener]:
    """The ports of a line of `nft list ruleset`. Untrusted."""
    found = _NFT_PORTS.search(rule)
    if found is None:
        return
    destination = ""
    for negation, address in _NFT_DESTINATION.findall(rule):
        if not negation:
            destination = address
    ipv6 = " ip6 " in f" {rule} "
    yield from _listeners(found[1], destination, found[2].strip("{} ").replace(" ", ""), ipv6=ipv6)


def _listeners(protocol: str, destination: str, ports: str, *, ipv6: bool) -> Iterator[Listener]:
    kind: Literal["tcp", "udp"]
    if protocol == "tcp":
        kind = "tcp"
    elif protocol == "udp":
        kind = "udp"
    else:
        return
    address: IPv4Address | IPv6Address = IPv6Address(0) if ipv6 else IPv4Address(0)
    if destination:
        text, _, length = destination.partition("/")
        try:
            address = ip_address(text)
        except ValueError:
            return
        if length not in ("", str(address.max_prefixlen)) or address.is_loopback:
            return
    for part in ports.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and first.isascii() and len(first) <= 5):
            continue
        if last and not (last.isdigit() and last.isascii() and len(last) <= 5):
            continue
        begin, end = int(first), int(last or first)
        for port in range(max(begin, 1), min(end, 65535, begin + MAX_LISTENERS) + 1):
            yield Listener(kind, address, port)
