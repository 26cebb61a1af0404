"""The few things about a DNS message that a relay must know: header, question, OPT, and how to say no (RFC 1035 4).

    0    ID 2
    2    flags 2: QR 0x8000, opcode 0x7800, AA 0x0400, TC 0x0200, RD 0x0100, RA 0x0080, AD 0x0020, CD 0x0010,
         rcode 0x000f
    4    QDCOUNT 2, ANCOUNT 2, NSCOUNT 2, ARCOUNT 2
    12   question: name, type 2, class 2; then records: name, type 2, class 2, TTL 4, length 2, data

Messages travel as raw bytes. They are not taken apart and put together again: that is how forwarders lose records of
types that they do not know, the OPT record, or the difference between "no such name" and "no such type".
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

_HEADER = Struct("!HHHHHH")
_QUESTION_TAIL = Struct("!HH")
# of a record, behind the name: type, class, TTL, length of the data
_RECORD_TAIL = Struct("!HHIH")

HEADER_LENGTH = 12

QR = 0x8000
OPCODE = 0x7800
AA = 0x0400
TC = 0x0200
RD = 0x0100
RA = 0x0080
AD = 0x0020
CD = 0x0010
RCODE = 0x000F

NOERROR = 0
FORMERR = 1
SERVFAIL = 2
NXDOMAIN = 3
NOTIMP = 4
REFUSED = 5
BADVERS = 16  # RFC 6891 9; the upper bits go into the OPT

TYPE_A = 1
TYPE_PTR = 12
TYPE_AAAA = 28
TYPE_OPT = 41
TYPE_IXFR = 251
TYPE_AXFR = 252
TYPE_ANY = 255

CLASS_IN = 1

# RFC 1035 2.3.4.
_MAX_NAME = 255

# RFC 1035 4.2.1: what every client takes by UDP.
MIN_UDP = 512

# RFC 9715 3.1: larger answers by UDP come to grief on the way. Here it also keeps them in one frame of a guest that
# stayed at an MTU of 1500.
MAX_UDP = 1400

# The records that are looked at for an OPT; queries have one or two (OPT and TSIG).
_MAX_ADDITIONAL = 16


class Question(NamedTuple):
    """The one question of a query."""

    labels: tuple[bytes, ...]
    """The name, in lower case, for comparisons."""
    type: int
    class_: int
    end: int
    """Where the question section ends."""


class Opt(NamedTuple):
    """The OPT record of a query (RFC 6891 6.1.3)."""

    udp_size: int
    version: int
    dnssec_ok: bool


def message_id(message: bytes) -> int:
    """The ID of a message of at least two bytes."""
    return int.from_bytes(message[:2], "big")


def with_id(message: bytes, ident: int) -> bytes:
    """The same message with another ID."""
    return ident.to_bytes(2, "big") + message[2:]


def flags_of(message: bytes) -> int:
    """The 16 bits of flags of a message of at least four bytes."""
    return int.from_bytes(message[2:4], "big")


def rcode_of(message: bytes) -> int:
    """The response code of a message of at least four bytes, without the upper bits that an OPT may hold."""
    return message[3] & RCODE


def parse_question(message: bytes) -> Question | None:
    """The question of a message that has exactly one. Untrusted: None otherwise.

    The name must be spelled out: nothing precedes it that a compression pointer could lead to.
    """
    if len(message) < HEADER_LENGTH or int.from_bytes(message[4:6], "big") != 1:
        return None
    labels = []
    position = HEADER_LENGTH
    while True:
        if position >= len(message):
            return None
        length = message[position]
        position += 1
        if length == 0:
            break
        label = message[position : position + length]
        if length > 63 or len(label) < length or position + length - HEADER_LENGTH >= _MAX_NAME:
            return None
        labels.append(label.lower())
        position += length
    if position + 4 > len(message):
        return None
    kind, class_ = _QUESTION_TAIL.unpack_from(message, position)
    return Question(tuple(labels), kind, class_, position + 4)


def find_opt(message: bytes, question: Question) -> Opt | None:
    """The OPT record of a query. Untrusted: None when there is none that can be reached."""
    _, _, _, answers, authorities, additionals = _HEADER.unpack_from(message)
    # Queries have no other records. Where they do, the answer is simply that of a client without EDNS.
    if answers or authorities:
        return None
    position = question.end
    for _ in range(min(additionals, _MAX_ADDITIONAL)):
        after_name = _skip_name(message, position)
        if after_name is None or after_name + _RECORD_TAIL.size > len(message):
            return None
        kind, class_, ttl, length = _RECORD_TAIL.unpack_from(message, after_name)
        if kind == TYPE_OPT and message[position] == 0:
            return Opt(class_, ttl >> 16 & 0xFF, bool(ttl & 0x8000))
        position = after_name + _RECORD_TAIL.size + length
    return None


def _skip_name(message: bytes, position: int) -> int | None:
    """Where the name that begins here ends. Untrusted. A pointer ends it, and is not followed."""
    while position < len(message):
        length = message[position]
        if length == 0:
            return position + 1
        if length >= 0xC0:
            return position + 2
        if length > 63:
            return None
        position += 1 + length
    return None


def udp_limit(opt: Opt | None) -> int:
    """How long an answer by UDP may be (RFC 6891 6.2.3: less than 512 counts as 512)."""
    return MIN_UDP if opt is None else min(max(opt.udp_size, MIN_UDP), MAX_UDP)


def write_error(query: bytes, rcode: int) -> bytes:
    """An answer without records: the query's ID, opcode, RD and CD, its question if it can be read, an OPT for an OPT.

    Untrusted: query needs 12 bytes, and any 12 will do.
    """
    question = parse_question(query)
    flags = QR | RA | flags_of(query) & (OPCODE | RD | CD) | rcode & RCODE
    return _write_empty(query, question, flags, rcode >> 4)


def write_truncated(query: bytes, answer: bytes) -> bytes:
    """Say that the answer is too long for UDP (TC): its flags and the question, no records (RFC 2181 9)."""
    return _write_empty(query, parse_question(query), flags_of(answer) | QR | TC)


def _write_empty(query: bytes, question: Question | None, flags: int, extended_rcode: int = 0) -> bytes:
    opt = find_opt(query, question) if question is not None else None
    head = _HEADER.pack(message_id(query), flags, question is not None, 0, 0, opt is not None)
    tail = query[HEADER_LENGTH : question.end] if question is not None else b""
    if opt is not None:
        # RFC 6891 7: an OPT is answered with an OPT; version 0, our own size, the DO bit copied (RFC 3225 3).
        ttl = extended_rcode << 24 | (0x8000 if opt.dnssec_ok else 0)
        tail += b"\0" + _RECORD_TAIL.pack(TYPE_OPT, MAX_UDP, ttl, 0)
    return head + tail


def is_answer_to(answer: bytes, query: bytes, question: Question) -> bool:
    """Whether a message can be the answer to a query that we sent (RFC 5452 9.1). Untrusted.

    The question must come back with it, in any case of letters. Servers that could not read the query leave it out.
    """
    if len(answer) < HEADER_LENGTH or answer[:2] != query[:2] or not answer[2] & 0x80:
        return False
    if answer[4:6] == b"\0\0":
        return rcode_of(answer) in (FORMERR, NOTIMP)
    asked = parse_question(answer)
    return asked is not None and asked == question


def with_question(answer: bytes, query: bytes, question: Question) -> bytes:
    """The answer with the question as the client wrote it, letter case included (RFC 4343 4.1)."""
    if answer[4:6] == b"\0\0":
        return answer
    return answer[:HEADER_LENGTH] + query[HEADER_LENGTH : question.end] + answer[question.end :]
