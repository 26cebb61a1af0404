"""AAAA records for names that have A records only: DNS64 (RFC 6147, row 38), an option that is off by default.

For guests on a host whose network speaks IPv6 alone and reaches the rest by a NAT64, where the host's own nameserver is
not a DNS64 already. `[dns] dns64` is the NAT64's prefix, most often 64:ff9b::/96 (RFC 6052).

    AAAA    asked of the host's nameservers; what they have is the answer. Where the name is there and has none (those
            within ::ffff:0:0/96 do not count, 5.1.4), its A records are asked for, and become AAAA records, with the
            aliases that led there; the TTL is the smaller one (5.1.7)
    PTR     of an address with the prefix: an alias to the name below in-addr.arpa, and what that has (5.3.1)

Guests that check signatures themselves (DO and CD) get what is there (5.5). With the well-known prefix no private IPv4
address is made into an IPv6 one (RFC 6052 3.1). Names that are known here are not looked at.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Network
from struct import Struct

from netstack.dns.message import (
    CD,
    CLASS_IN,
    NOERROR,
    QR,
    RA,
    RD,
    TYPE_A,
    TYPE_AAAA,
    TYPE_CNAME,
    TYPE_PTR,
    TYPE_SOA,
    Query,
    Question,
    message_id,
    rcode_of,
    write_opt,
)
from netstack.dns.prefixes import is_private
from netstack.dns.records import read_all, read_answers, read_name
from netstack.dns.reverse import parse_reverse

_HEADER = Struct("!HHHHHH")
_TAIL = Struct("!HHIH")

_WELL_KNOWN = IPv6Network("64:ff9b::/96")
_MAPPED = bytes(10) + b"\xff\xff"

# RFC 6147 5.1.7: where the negative answer has no SOA.
_MAX_TTL = 600

Ask = Callable[[bytes], Awaitable[bytes]]


class Dns64:
    """Makes AAAA records below one prefix."""

    def __init__(self, prefix: IPv6Network) -> None:
        self.prefix = prefix
        self._packed = prefix.network_address.packed

    def wants(self, query: Query) -> bool:
        """Whether the answer may have to be made here."""
        question = query.question
        if question.class_ != CLASS_IN or query.signed or not query.flags & RD:
            return False
        if question.type == TYPE_AAAA:
            return not (query.dnssec_ok and query.flags & CD)
        return question.type == TYPE_PTR and self._inner_of(question) is not None

    async def answer(self, query: Query, ask: Ask) -> bytes:
        """Find the answer. ask() gives that of the host's nameservers, whole, to the bytes of a query."""
        if query.question.type == TYPE_PTR:
            return await self._answer_reverse(query, ask)
        answer = await ask(query.wire)
        ttl = _find_lack(answer, query.question)
        if ttl is None:
            return answer
        found = await ask(_ask_for(query, query.question.name, TYPE_A))
        records = read_answers(found, query.question.end) if rcode_of(found) == NOERROR else None
        made = []
        for record in records or ():
            if record.type == TYPE_CNAME:
                target = read_name(found, record.at)
                if target is not None:
                    made.append(_write(record.labels, TYPE_CNAME, record.ttl, _join(target[0])))
            elif record.type == TYPE_A and len(record.data) == 4 and self._may_embed(record.data):
                made.append(_write(record.labels, TYPE_AAAA, min(record.ttl, ttl), self.embed(record.data)))
        if not any(kind == TYPE_AAAA for kind, _ in made):
            return answer
        return _finish(query, [record for _, record in made])

    def embed(self, packed: bytes) -> bytes:
        """The IPv6 address that stands for an IPv4 one (RFC 6052 2.2); the bits 64 to 71 are left out."""
        length = self.prefix.prefixlen // 8
        body = self._packed[:length] + packed
        if length < 9:
            body = body[:8] + b"\0" + body[8:]
        return body.ljust(16, b"\0")

    def _inner_of(self, question: Question) -> bytes | None:
        """The IPv4 address within the address whose name is asked for, if it is one of ours. Untrusted."""
        packed = parse_reverse(question.labels)
        length = self.prefix.prefixlen // 8
        if packed is None or len(packed) != 16 or packed[:length] != self._packed[:length]:
            return None
        rest = packed[length:] if length >= 9 else packed[length:8] + packed[9:]
        return rest[:4]

    def _may_embed(self, packed: bytes) -> bool:
        return self.prefix != _WELL_KNOWN or not is_private(IPv4Address(packed))

    async def _answer_reverse(self, query: Query, ask: Ask) -> bytes:
        inner = self._inner_of(query.question)
        assert inner is not None  # wants() has looked
        labels = tuple(ipaddress.ip_address(inner).reverse_pointer.encode().split(b"."))
        name = _join(labels)
        asked = _ask_for(query, name, TYPE_PTR)
        found = await ask(asked)
        records = read_answers(found, 12 + len(name) + 4) if rcode_of(found) == NOERROR else None
        made = [_write(query.question.labels, TYPE_CNAME, _MAX_TTL, name)[1]]
        for record in records or ():
            target = read_name(found, record.at) if record.type in (TYPE_PTR, TYPE_CNAME) else None
            if target is not None:
                made.append(_write(record.labels, record.type, record.ttl, _join(target[0]))[1])
        return _finish(query, made)


def _find_lack(answer: bytes, question: Question) -> int | None:
    """For how long it is known that a name has no AAAA; None where it has one, or is not there. Untrusted."""
    if len(answer) < question.end or rcode_of(answer) != NOERROR:
        return None
    records = read_all(answer)
    if records is None:
        return None
    ttl = _MAX_TTL
    for record in records:
        if record.type == TYPE_AAAA and record.data[:12] != _MAPPED:
            return None
        if record.type == TYPE_SOA:
            ttl = record.ttl
    return ttl


def _ask_for(query: Query, name: bytes, kind: int) -> bytes:
    """The bytes of a query of our own, with the guest's flags."""
    return _HEADER.pack(0, query.flags & (RD | CD), 1, 0, 0, 0) + name + kind.to_bytes(2, "big") + b"\0\1"


def _join(labels: tuple[bytes, ...]) -> bytes:
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def _write(labels: tuple[bytes, ...], kind: int, ttl: int, data: bytes) -> tuple[int, bytes]:
    return kind, _join(labels) + _TAIL.pack(kind, CLASS_IN, ttl, len(data)) + data


def _finish(query: Query, records: list[bytes]) -> bytes:
    """The answer; made here, it has no AD bit (RFC 6147 5.5)."""
    flags = QR | RA | query.flags & (RD | CD)
    head = _HEADER.pack(message_id(query.wire), flags, 1, len(records), 0, query.opt is not None)
    tail = write_opt(query.opt) if query.opt is not None else b""
    return head + query.wire[12 : query.question.end] + b"".join(records) + tail
