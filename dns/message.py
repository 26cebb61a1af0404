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

from collections.abc import Sequence
from struct import Struct, error
from typing import NamedTuple

_HEADER = Struct("!HHHHHH")
_QUESTION_TAIL = Struct("!HH")
# of a record, behind the name: type, class, TTL, length of the data
_RECORD_TAIL = Struct("!HHIH")
_OPTION = Struct("!HH")

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
TYPE_CNAME = 5
TYPE_SOA = 6
TYPE_PTR = 12
TYPE_TXT = 16
TYPE_SIG = 24  # as the last record: a signature of the message (RFC 2931)
TYPE_AAAA = 28
TYPE_OPT = 41
TYPE_RRSIG = 46
TYPE_TSIG = 250
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

# What we say that we take from nameservers by UDP: the figure of the DNS flag day 2020, which fits into any path.
UPSTREAM_UDP = 1232

# The records that are looked at for an OPT; queries have one or two (OPT and TSIG).
_MAX_ADDITIONAL = 16

# RFC 8914 5.2: why there is no better answer. Its text is for people, and short, so that it fits into 512 bytes.
EDE_OTHER = 0
EDE_STALE = 3
EDE_CACHED = 13
EDE_BLOCKED = 15
EDE_STALE_NXDOMAIN = 19
EDE_NO_AUTHORITY = 22
EDE_NETWORK = 23
EDE_INVALID_DATA = 24
OPTION_EDE = 15
_MAX_TEXT = 120

Ede = tuple[int, str]
"""An extended DNS error: its code and a text."""


class Question(NamedTuple):
    """The one question of a query."""

    labels: tuple[bytes, ...]
    """The name, in lower case, for comparisons."""
    type: int
    class_: int
    end: int
    """Where the question section ends."""
    name: bytes = b""
    """The name as on the wire, in lower case: the shortest thing to look it up by."""


class Opt(NamedTuple):
    """The OPT record of a query (RFC 6891 6.1.3)."""

    udp_size: int
    version: int
    dnssec_ok: bool


class Query(NamedTuple):
    """A standard query with one question, of a guest."""

    wire: bytes
    question: Question
    opt: Opt | None
    flags: int
    signed: bool
    """TSIG or SIG(0) at its end: it can be passed on, but not changed (RFC 8945 5.2, RFC 2931)."""
    tcp: bool = False
    guest: bytes | str = b""
    """Who asked, for the log: an address, or the name of a link."""
    link: object = None
    """What tells guests apart for bounds, where the query is on its way: an address could be anybody's."""

    @property
    def dnssec_ok(self) -> bool:
        return self.opt is not None and self.opt.dnssec_ok


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
    if len(message) < HEADER_LENGTH or message[4] or message[5] != 1:
        return None
    # Lengths are below 64, so that lower() leaves them alone; those that are not are refused, changed or not.
    lowered = message[: HEADER_LENGTH + _MAX_NAME + 4].lower()
    labels = []
    position = HEADER_LENGTH
    try:
        while length := lowered[position]:
            start = position + 1
            position = start + length
            if length > 63 or position - HEADER_LENGTH >= _MAX_NAME:
                return None
            labels.append(lowered[start:position])
        kind, class_ = _QUESTION_TAIL.unpack_from(message, position + 1)
    except (IndexError, error):
        return None
    return Question(tuple(labels), kind, class_, position + 5, lowered[HEADER_LENGTH : position + 1])


def parse_query(message: bytes, *, tcp: bool = False, guest: bytes | str = b"") -> Query | int | None:
    """Read a message that should be a standard query with one question. Untrusted.

    Gives the rcode where it is to be refused (the question can be read, or is left out of the answer), and None where
    silence is the answer: what is no query. Answering answers, two servers would go on for ever.
    """
    if len(message) < HEADER_LENGTH:
        return None
    flags = message[2] << 8 | message[3]
    if flags & QR:
        return None
    if flags & OPCODE:
        return NOTIMP
    question = parse_question(message)
    if question is None:
        return FORMERR  # RFC 9619: a query has one question
    if message[6:12] == b"\0\0\0\0\0\0":
        return Query(message, question, None, flags, False, tcp, guest)
    opt, opts, signed = _read_additional(message, question)
    if opts != (opt is not None):
        return FORMERR  # two (RFC 6891 6.1.1), or what cannot be read
    if opt is not None and opt.version:
        return BADVERS
    return Query(message, question, opt, flags, signed, tcp, guest)


def find_opt(message: bytes, question: Question) -> Opt | None:
    """The OPT record of a query. Untrusted: None when there is none that can be reached."""
    return _read_additional(message, question)[0]


def _read_additional(message: bytes, question: Question) -> tuple[Opt | None, int, bool]:
    """The first OPT of a query, how many there are, and whether a signature ends it. Untrusted.

    Where the records cannot be read, there are -1.
    """
    _, _, _, answers, authorities, additionals = _HEADER.unpack_from(message)
    # IXFR has an authority record, and is refused. With others the answer is simply that of a client without EDNS.
    if answers or authorities:
        return None, 0, False
    found = None
    opts = 0
    kind = 0
    position = question.end
    for _ in range(min(additionals, _MAX_ADDITIONAL)):
        after_name = skip_name(message, position)
        if after_name is None or after_name + _RECORD_TAIL.size > len(message):
            return found, -1, False
        kind, class_, ttl, length = _RECORD_TAIL.unpack_from(message, after_name)
        if kind == TYPE_OPT and message[position] == 0:
            opts += 1
            found = found or Opt(class_, ttl >> 16 & 0xFF, bool(ttl & 0x8000))
        position = after_name + _RECORD_TAIL.size + length
        if position > len(message):
            return found, -1, False
    return found, opts, kind in (TYPE_TSIG, TYPE_SIG)


def skip_name(message: bytes, position: int) -> int | None:
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


def cut_text(text: str) -> str:
    """The text of an extended error, as far as it is passed on: whole characters, since RFC 8914 2 wants UTF-8."""
    return text.encode("utf-8", "replace")[:_MAX_TEXT].decode("utf-8", "ignore")


def write_opt(opt: Opt, rcode: int = NOERROR, ede: Sequence[Ede] = ()) -> bytes:
    """The OPT record that answers an OPT: version 0, our own size, the DO bit copied (RFC 6891 7, RFC 3225 3)."""
    options = b""
    for code, text in ede:
        data = code.to_bytes(2, "big") + cut_text(text).encode()
        options += _OPTION.pack(OPTION_EDE, len(data)) + data
    ttl = rcode >> 4 << 24 | (0x8000 if opt.dnssec_ok else 0)
    return b"\0" + _RECORD_TAIL.pack(TYPE_OPT, MAX_UDP, ttl, len(options)) + options


def write_error(query: bytes, rcode: int, ede: Sequence[Ede] = ()) -> bytes:
    """An answer without records: the query's ID, opcode, RD and CD, its question if it can be read, an OPT for an OPT.

    Untrusted: query needs 12 bytes, and any 12 will do.
    """
    question = parse_question(query)
    opt = find_opt(query, question) if question is not None else None
    flags = QR | RA | flags_of(query) & (OPCODE | RD | CD) | rcode & RCODE
    head = _HEADER.pack(message_id(query), flags, question is not None, 0, 0, opt is not None)
    tail = query[HEADER_LENGTH : question.end] if question is not None else b""
    return head + tail + (write_opt(opt, rcode, ede) if opt is not None else b"")


def write_query(query: Query, *, edns: bool) -> bytes:
    """The query as we send it: the guest's question, letter for letter, and an OPT of our own (RFC 6891 6.1.1, 7).

    What the guest's OPT says is for us: its size, and options such as cookies, which a server must not see that the
    guest does not talk to (RFC 7873 5.2). The ID is 0.
    """
    if query.signed:
        return b"\0\0" + query.wire[2:]
    flags = query.flags & (RD | AD | CD)
    head = _HEADER.pack(0, flags, 1, 0, 0, edns) + query.wire[HEADER_LENGTH : query.question.end]
    if not edns:
        return head
    return head + b"\0" + _RECORD_TAIL.pack(TYPE_OPT, UPSTREAM_UDP, 0x8000 if query.dnssec_ok else 0, 0)


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
