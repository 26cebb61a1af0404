"""Answers that netstack makes itself: for its own names, /etc/hosts, special names and mDNS.

dnslib builds each, once; what it built is kept without the parts that belong to one query (ID, RD and CD, and the name
as the guest spelt it), so that the next guest that asks the same is answered by putting three pieces of bytes together.
dnslib takes some 150 us, and what it kept 4. It is kept away from what guests send: names come from
netstack.dns.message, as labels.

A name that exists without records of the type asked for gets an empty answer (NODATA), never NXDOMAIN: musl takes that
for the whole name (RFC 2308 2.1, RFC 8020). Both carry an SOA, which says for how long that may be remembered
(RFC 2308 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from netstack.dns.message import (
    AA,
    CD,
    MAX_UDP,
    NOERROR,
    QR,
    RA,
    RD,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_PTR,
    Question,
    find_opt,
    flags_of,
)

if TYPE_CHECKING:
    import dnslib

Labels = tuple[bytes, ...]
"""A name, in lower case."""

Records = tuple[tuple[int, Any], ...]
"""(type, data): packed addresses for A and AAAA, labels for PTR and NS, bytes for TXT and all others."""

TYPE_NS: Final = 2
TYPE_CNAME: Final = 5
TYPE_SOA: Final = 6
TYPE_TXT: Final = 16

# Guests come and go and files are edited, so nobody should remember our names for long; Lima's figure.
TTL: Final = 5

# RFC 6303 3: the mailbox of a zone that nobody keeps.
_NOBODY = (b"nobody", b"invalid")

# Answers that are kept, of some 100 bytes each. A guest chooses the names, so there must be an end.
_MAX_KEPT = 4096


class AnswerWriter:
    """Writes answers. One serves all sources of local names."""

    def __init__(self) -> None:
        self._kept: dict[object, bytes] = {}

    def write(
        self,
        query: bytes,
        question: Question,
        rcode: int,
        records: Records = (),
        *,
        zone: Labels | None = None,
        ttl: int = TTL,
        negative_ttl: int = TTL,
    ) -> bytes:
        """Answer a query that was read by parse_question. zone is who says no, where there are no records."""
        opt = find_opt(query, question)
        do = None if opt is None else opt.dnssec_ok
        key = (question.labels, question.type, question.class_, rcode, records, zone, ttl, negative_ttl, do)
        body = self._kept.get(key)
        if body is None:
            if len(self._kept) >= _MAX_KEPT:
                # The oldest: names that are asked for often are built again, once.
                del self._kept[next(iter(self._kept))]
            body = self._kept[key] = _build(
                question, rcode, records, zone or question.labels[1:], ttl, negative_ttl, do
            )
        flags = QR | AA | RA | flags_of(query) & (RD | CD) | rcode
        end = question.end
        return b"%b%b%b%b%b" % (query[:2], flags.to_bytes(2, "big"), body[4:12], query[12:end], body[end:])

    def addresses(
        self, query: bytes, question: Question, found: Iterable[bytes], *, zone: Labels | None = None, ttl: int = TTL
    ) -> bytes:
        """Answer with those of a name's addresses that have the type asked for, maybe none."""
        return self.write(query, question, NOERROR, address_records(question, found), zone=zone, ttl=ttl)

    def names(self, query: bytes, question: Question, found: Iterable[Labels], *, zone: Labels | None = None) -> bytes:
        """Answer a reverse query with names; a query of another type for the same name with none."""
        asked = question.type in (TYPE_PTR, TYPE_ANY)
        return self.write(query, question, NOERROR, tuple((TYPE_PTR, n) for n in found) if asked else (), zone=zone)


def address_records(question: Question, found: Iterable[bytes]) -> Records:
    """Those of the packed addresses that a question asks for, IPv4 before IPv6."""
    kept = tuple(found)
    return tuple(
        (kind, packed)
        for kind, size in ((TYPE_A, 4), (TYPE_AAAA, 16))
        if question.type in (kind, TYPE_ANY)
        for packed in kept
        if len(packed) == size
    )


def to_labels(name: str | bytes) -> Labels:
    """The labels of a dotted ASCII name in any case, with or without the last dot."""
    text = name.encode("ascii") if isinstance(name, str) else name
    return tuple(text.rstrip(b".").lower().split(b".")) if text.rstrip(b".") else ()


def _build(
    question: Question, rcode: int, records: Records, zone: Labels, ttl: int, negative_ttl: int, do: bool | None
) -> bytes:
    # It takes 25 ms to import, and netstack starts without.
    import dnslib

    # As labels: a str would go through the idna codec, which raises.
    owner = dnslib.DNSLabel(question.labels)
    answer = dnslib.DNSRecord(dnslib.DNSHeader(id=0, rcode=rcode), q=dnslib.DNSQuestion(owner, question.type, 1))
    for kind, data in records:
        answer.add_answer(dnslib.RR(owner, kind, rdata=_rdata(kind, data), ttl=ttl))
    if not answer.rr:
        soa = dnslib.SOA(dnslib.DNSLabel(zone), dnslib.DNSLabel(_NOBODY), (1, 3600, 600, 86400, negative_ttl))
        answer.add_auth(dnslib.RR(dnslib.DNSLabel(zone), TYPE_SOA, rdata=soa, ttl=negative_ttl))
    if do is not None:
        # RFC 6891 7: an OPT for an OPT; RFC 3225 3: with the DO bit as it came.
        answer.add_ar(dnslib.EDNS0(flags="do" if do else "", udp_len=MAX_UDP))
    return bytes(answer.pack())


def _rdata(kind: int, data: Any) -> dnslib.RD:
    import dnslib

    if kind == TYPE_A:
        return dnslib.A(tuple(data))
    if kind == TYPE_AAAA:
        return dnslib.AAAA(tuple(data))
    if kind == TYPE_PTR:
        return dnslib.PTR(dnslib.DNSLabel(data))
    if kind == TYPE_NS:
        return dnslib.NS(dnslib.DNSLabel(data))
    if kind == TYPE_SOA:
        return dnslib.SOA(dnslib.DNSLabel(data), dnslib.DNSLabel(_NOBODY), (1, 3600, 600, 86400, TTL))
    return dnslib.RD(data)
