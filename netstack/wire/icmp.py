"""ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, and errors with their rules on when to send them and how much to quote.

Neighbor discovery is in ndp.py.

An error comes into being in one of two ways. The gateway itself has something to say about a packet of a guest's, which
lies before it: `write_error(gateway, packet, Problem...)`. Or the host's kernel reported an error on a flow: the packet
that the guest must have sent is built again with write_ipv4 or write_ipv6 and goes the same way, with the address of
whoever complained as the source.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, pseudo_sum, sum_words
from netstack.wire.ipv4 import HEADER_LENGTH as IPV4_HEADER_LENGTH
from netstack.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Ipv4, parse_ipv4, write_ipv4
from netstack.wire.ipv6 import EXTENSION_HEADERS, MIN_MTU, PROTOCOL_ICMPV6, Ipv6, parse_ipv6, write_ipv6
from netstack.wire.ipv6 import HEADER_LENGTH as IPV6_HEADER_LENGTH

# RFC 792, RFC 4443 2.1; the second line is what the messages here have in common, "rest of header" to RFC 792:
#   u8   type
#   u8   code
#   u16  checksum (of ICMPv6: with the pseudo-header)
#   u32  echo: u16 identifier, u16 sequence number; errors: a parameter, see _rest_of_error
_HEADER = Struct("!BBHI")
_PARSED = Struct("!BB2xI")
# The first bytes of UDP and TCP alike (RFC 768, RFC 9293 3.1):
#   u16  source port
#   u16  destination port
#   u32  TCP only: sequence number
_PORTS = Struct("!HH")
_SEQ = Struct("!4xI")

HEADER_LENGTH = 8

# RFC 792 and https://www.iana.org/assignments/icmp-parameters
ECHO_REPLY = 0
UNREACHABLE = 3
SOURCE_QUENCH = 4
REDIRECT = 5
ECHO_REQUEST = 8
TIME_EXCEEDED = 11
PARAMETER_PROBLEM = 12
FRAGMENTATION_NEEDED = 4  # a code of UNREACHABLE

# RFC 4443 and https://www.iana.org/assignments/icmpv6-parameters
UNREACHABLE6 = 1
TOO_BIG6 = 2
TIME_EXCEEDED6 = 3
PARAMETER_PROBLEM6 = 4
ECHO_REQUEST6 = 128
ECHO_REPLY6 = 129
REDIRECT6 = 137

ERRORS = frozenset((UNREACHABLE, SOURCE_QUENCH, REDIRECT, TIME_EXCEEDED, PARAMETER_PROBLEM))

# RFC 1812 4.3.2.3: as much of the packet as fits into an ICMP datagram of 576 bytes.
MAX_ERROR = 576
# RFC 4443 2.4 (c): as much as fits into the minimum IPv6 MTU.
MAX_ERROR6 = MIN_MTU

# RFC 1812 4.3.2.5: errors travel with the precedence "internetwork control".
_ERROR_TOS = 0xC0


class Problem(NamedTuple):
    """What is wrong with a packet, in the words of both families: ICMP type and code, ICMPv6 type and code."""

    type4: int
    code4: int
    type6: int
    code6: int


# RFC 792, RFC 1122 3.2.2.1, RFC 1812 5.2.7.1 | RFC 4443 3.1 to 3.4
NO_ROUTE = Problem(UNREACHABLE, 0, UNREACHABLE6, 0)
HOST_UNREACHABLE = Problem(UNREACHABLE, 1, UNREACHABLE6, 3)
PROTOCOL_UNREACHABLE = Problem(UNREACHABLE, 2, PARAMETER_PROBLEM6, 1)  # parameter (IPv6): where the next header stands
BEYOND_SCOPE = Problem(UNREACHABLE, 0, UNREACHABLE6, 2)  # a link-local source, a destination elsewhere
PORT_UNREACHABLE = Problem(UNREACHABLE, 3, UNREACHABLE6, 4)
PROHIBITED = Problem(UNREACHABLE, 13, UNREACHABLE6, 1)
TOO_BIG = Problem(UNREACHABLE, FRAGMENTATION_NEEDED, TOO_BIG6, 0)  # parameter: the MTU
TTL_EXCEEDED = Problem(TIME_EXCEEDED, 0, TIME_EXCEEDED6, 0)
REASSEMBLY_TIMEOUT = Problem(TIME_EXCEEDED, 1, TIME_EXCEEDED6, 1)
MALFORMED = Problem(PARAMETER_PROBLEM, 0, PARAMETER_PROBLEM6, 0)  # parameter: offset of the offending byte


class Icmp(NamedTuple):
    """One message of either family. Which fields mean something depends on the type, as the RFCs have it."""

    type: int
    code: int
    ident: int  # echo
    sequence: int  # echo
    parameter: int  # errors: the MTU of "too big", the pointer of "parameter problem", else 0
    payload_start: int  # echo data; of an error: the quoted packet, for parse_quoted
    payload_end: int


class Quoted(NamedTuple):
    """What an error quotes of the packet that it is about: as much as tells to which flow that belonged."""

    src: bytes
    dst: bytes
    protocol: int
    src_port: int  # of an echo: the identifier; 0 where the protocol has no ports
    dst_port: int
    seq: int  # of TCP: to be compared with what is in flight (RFC 5927 4.1); of an echo: the sequence number


def parse_icmp(buffer: Buffer, start: int, end: int) -> Icmp | None:
    """An ICMP message, in the payload of an IPv4 packet. Untrusted. None when it is cut short."""
    if end - start < HEADER_LENGTH:
        return None
    kind, code, rest = _PARSED.unpack_from(buffer, start)
    parameter = 0
    if kind == UNREACHABLE and code == FRAGMENTATION_NEEDED:
        parameter = rest & 0xFFFF  # RFC 1191 4; 0 from routers older than that
    elif kind == PARAMETER_PROBLEM:
        parameter = rest >> 24
    return Icmp(kind, code, rest >> 16, rest & 0xFFFF, parameter, start + HEADER_LENGTH, end)


def parse_icmp6(buffer: Buffer, start: int, end: int) -> Icmp | None:
    """An ICMPv6 message, in the payload of an IPv6 packet. Untrusted. None when it is cut short."""
    if end - start < HEADER_LENGTH:
        return None
    kind, code, rest = _PARSED.unpack_from(buffer, start)
    parameter = rest if kind in (TOO_BIG6, PARAMETER_PROBLEM6) else 0
    return Icmp(kind, code, rest >> 16, rest & 0xFFFF, parameter, start + HEADER_LENGTH, end)


def is_error(kind: int) -> bool:
    """Whether this type of ICMP message is an error (RFC 1122 3.2.2)."""
    return kind in ERRORS


def is_error6(kind: int) -> bool:
    """Whether this type of ICMPv6 message is an error (RFC 4443 2.1: the high bit is clear)."""
    return kind < 128


def parse_quoted(buffer: Buffer, start: int, end: int) -> Quoted | None:
    """The packet that an ICMP or ICMPv6 error is about (an Icmp's payload_start and payload_end). Untrusted.

    None unless it is the first fragment at least, with the 8 bytes behind its IP header that tell the flow (RFC 792).
    """
    packet = _parse_ip(buffer, start, end, quoted=True)
    if packet is None or packet.fragment_offset or packet.payload_end - packet.payload_start < 8:
        return None
    ipv4 = isinstance(packet, Ipv4)
    at = packet.payload_start
    src_port = dst_port = seq = 0
    if packet.protocol in (PROTOCOL_TCP, PROTOCOL_UDP):
        src_port, dst_port = _PORTS.unpack_from(buffer, at)
        if packet.protocol == PROTOCOL_TCP:
            (seq,) = _SEQ.unpack_from(buffer, at)
    elif packet.protocol == (PROTOCOL_ICMP if ipv4 else PROTOCOL_ICMPV6):
        kind, _, rest = _PARSED.unpack_from(buffer, at)
        if kind in ((ECHO_REQUEST, ECHO_REPLY) if ipv4 else (ECHO_REQUEST6, ECHO_REPLY6)):
            src_port, seq = rest >> 16, rest & 0xFFFF
    return Quoted(packet.src, packet.dst, packet.protocol, src_port, dst_port, seq)


def write_echo(ident: int, sequence: int, payload: Buffer, *, reply: bool) -> bytes:
    """An ICMP echo request or reply with its checksum, without an IP header."""
    header = _HEADER.pack(ECHO_REPLY if reply else ECHO_REQUEST, 0, 0, ident << 16 | sequence)
    return _finished(header, payload, 0)


def write_echo6(src: bytes, dst: bytes, ident: int, sequence: int, payload: Buffer, *, reply: bool) -> bytes:
    """An ICMPv6 echo request or reply with its checksum, without an IPv6 header."""
    header = _HEADER.pack(ECHO_REPLY6 if reply else ECHO_REQUEST6, 0, 0, ident << 16 | sequence)
    return _finished(header, payload, pseudo_sum(src, dst, PROTOCOL_ICMPV6, HEADER_LENGTH + len(payload)))


def _finished(header: bytes, payload: Buffer, total: int) -> bytes:
    total += sum_words(header) + sum_words(payload)
    return b"".join((header[:2], finish(total).to_bytes(2, "big"), header[4:], payload))


def may_answer_with_error(packet: Buffer) -> bool:
    """Whether an ICMP error may be sent about this IP packet (RFC 1122 3.2.2, RFC 4443 2.4 (e)). Untrusted.

    Not about an ICMP error or redirect, a fragment other than the first, anything sent to a multicast or broadcast
    address or from an address that is not one host's, and not about what cannot be read. That the frame itself came to
    a group address, or the packet to the broadcast address of a subnet, is for the caller to know.
    """
    return _answerable(packet) is not None


def _answerable(packet: Buffer) -> Ipv4 | Ipv6 | None:
    """The packet's header if an error may be sent about it. Untrusted."""
    ip = _parse_ip(packet, 0, len(packet))
    if ip is None or ip.fragment_offset or not _is_one_host(ip.src) or _is_group(ip.dst):
        return None
    # In the first fragment of several, an ICMPv6 error may hide behind a further extension header.
    if isinstance(ip, Ipv6) and ip.protocol in EXTENSION_HEADERS:
        return None
    if ip.protocol != (PROTOCOL_ICMP if isinstance(ip, Ipv4) else PROTOCOL_ICMPV6):
        return ip
    if ip.payload_start == ip.payload_end:
        return None
    kind = packet[ip.payload_start]
    if is_error(kind) if isinstance(ip, Ipv4) else (is_error6(kind) or kind == REDIRECT6):
        return None
    return ip


def write_error(src: bytes, packet: Buffer, problem: Problem, parameter: int = 0, *, ttl: int = 64) -> bytes | None:
    """The whole IP packet with an ICMP error about `packet`, from `src` to whoever sent that. Untrusted.

    `packet` is a whole IP packet and begins with the IP header; `src` is an address of the same family. `parameter` is
    what the problem says, or what else belongs into the rest of the header. None where no error may be sent.
    """
    ip = _answerable(packet)
    if ip is None or len(ip.src) != len(src):
        return None
    # What follows the packet in its frame is not a part of it and must not be quoted.
    length = ip.payload_end
    if isinstance(ip, Ipv4):
        quote = packet[: min(length, MAX_ERROR - IPV4_HEADER_LENGTH - HEADER_LENGTH)]
        rest = _rest_of_error(problem.type4, problem.code4, parameter)
        header = _HEADER.pack(problem.type4, problem.code4, 0, rest)
        message = _finished(header, quote, 0)
        return write_ipv4(src, ip.src, PROTOCOL_ICMP, len(message), ttl=ttl, tos=_ERROR_TOS) + message
    quote = packet[: min(length, MAX_ERROR6 - IPV6_HEADER_LENGTH - HEADER_LENGTH)]
    header = _HEADER.pack(problem.type6, problem.code6, 0, min(parameter, 0xFFFFFFFF))
    total = pseudo_sum(src, ip.src, PROTOCOL_ICMPV6, HEADER_LENGTH + len(quote))
    message = _finished(header, quote, total)
    return write_ipv6(src, ip.src, PROTOCOL_ICMPV6, len(message), ttl=ttl) + message


def write_refusal(datagram: bytes) -> bytes:
    """The ICMP message that says that this UDP datagram, a whole IP packet, found no one: without an IP header.

    For a raw socket, where the kernel puts in the checksum of ICMPv6 (RFC 3542 3.1), which is left out here.
    """
    if datagram[0] >> 4 == 4:
        header = _HEADER.pack(PORT_UNREACHABLE.type4, PORT_UNREACHABLE.code4, 0, 0)
        return _finished(header, datagram, 0)
    return _HEADER.pack(PORT_UNREACHABLE.type6, PORT_UNREACHABLE.code6, 0, 0) + datagram


def _rest_of_error(kind: int, code: int, parameter: int) -> int:
    """Where ICMP keeps its parameter; ICMPv6 uses all 32 bits for it."""
    if kind == UNREACHABLE and code == FRAGMENTATION_NEEDED:
        return min(parameter, 0xFFFF)  # RFC 1191 4: u16 unused, u16 next-hop MTU
    if kind == PARAMETER_PROBLEM:
        return min(parameter, 0xFF) << 24  # RFC 792: u8 pointer, 3 bytes unused
    return 0


def _parse_ip(buffer: Buffer, start: int, end: int, *, quoted: bool = False) -> Ipv4 | Ipv6 | None:
    """Untrusted."""
    if start >= end:
        return None
    if buffer[start] >> 4 == 4:
        return parse_ipv4(buffer, start, end, quoted=quoted)
    return parse_ipv6(buffer, start, end, quoted=quoted)


def _is_group(address: bytes) -> bool:
    """Multicast, or 240.0.0.0/4, which holds the limited broadcast address and no host (RFC 1112 4)."""
    return address[0] >= 224 if len(address) == 4 else address[0] == 0xFF


def _is_one_host(address: bytes) -> bool:
    """Whether a source address is some single host's that could be answered (RFC 1122 3.2.1.3, RFC 4291 2.5)."""
    if len(address) == 4:
        # 0.0.0.0/8 is "this network", 127.0.0.0/8 must never be seen on a link.
        return 0 < address[0] < 224 and address[0] != 127
    # The unspecified address and the loopback address differ from zero in the last bit only.
    return address[0] != 0xFF and (address[:15] != bytes(15) or address[15] > 1)
