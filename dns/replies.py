"""What a nameserver said: read once, kept as bytes, and written for each guest that asks.

Theory of operation
-------------------
A reply is walked once, record by record, without following a name: that gives where the TTLs are, for how long it may
be kept (RFC 2308), and where the OPT is, which is between the nameserver and us and does not go further (RFC 6891
6.1.1). The rest stays as it came, to the byte: `Reply.body` is everything behind the question but the OPT.

The answer to a guest is then its own ID and its own question, letter for letter, our flags, and that body, whose TTLs
are written down by its age: as compression pointers count from the start of the message, and the question has the
length that it had, they still lead where they did. Guests that sent an OPT get one from us, at the end.

What is too long for UDP leaves with the TC bit and as many whole records as fit, for resolvers that have no TCP and
take what they get (musl before 1.2.4, busybox); sets of records other than addresses stay whole or are left out
(RFC 2181 9). Additional records may be missing without a word.

Cost is bounded by the length of the message: each byte is looked at once. Replies with very many records are skimmed,
and not kept (the longest, 64 KiB with 5,957 records, takes some 2 ms).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct, error
from typing import NamedTuple

from netstack.dns.message import (
    AD,
    CD,
    HEADER_LENGTH,
    NOERROR,
    NXDOMAIN,
    OPTION_EDE,
    QR,
    RA,
    RCODE,
    RD,
    TC,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_CNAME,
    TYPE_OPT,
    TYPE_RRSIG,
    TYPE_SIG,
    TYPE_SOA,
    TYPE_TSIG,
    Ede,
    Query,
    Question,
    cut_text,
    write_opt,
)

_HEADER = Struct("!HHHHHH")
_COUNTS = Struct("!HHHH")
_TAIL = Struct("!HHIH")

# RFC 8767 4 caps at days; resolvers at a day (unbound, systemd-resolved two hours). RFC 2308 5: 1 to 3 hours. Seconds.
MAX_TTL = 86400
MAX_NEGATIVE_TTL = 3600

_MAX_EDE = 4  # that are passed on

# Records, from which on a reply is only skimmed: 5 us a record would be 30 ms for the longest.
_MANY = 800


class Record(NamedTuple):
    """Where one record is in a message, and the little that matters of it."""

    start: int
    type: int
    class_: int
    ttl: int
    data: int
    """Where its data begins; the TTL is six bytes before."""
    end: int


class Reply:
    """One reply of a nameserver, read. `flags` are only AD and TC, as they may be passed on."""

    __slots__ = (
        "_aged",
        "_offsets",
        "_ttls",
        "body",
        "counts",
        "ede",
        "flags",
        "lifetime",
        "positive",
        "question_end",
        "rcode",
    )

    def __init__(self, body: bytes, question_end: int, counts: tuple[int, int, int], flags: int, rcode: int) -> None:
        self.body = bytearray(body)
        self.question_end = question_end
        self.counts = counts
        self.flags = flags
        self.rcode = rcode
        """With the upper bits that were in the OPT."""
        self.ede: tuple[Ede, ...] = ()
        """What the nameserver had to say about it (RFC 8914)."""
        self.lifetime = 0
        """For how many seconds it may be kept; 0 where it may not."""
        self.positive = False
        """Whether it has what was asked for."""
        # Where TTLs are, and what they were: arrays, because a reply may have thousands, and the cache keeps it.
        self._offsets = array("I")
        self._ttls = array("I")
        self._aged = 0

    @property
    def size(self) -> int:
        """How many bytes it keeps."""
        texts = sum(4 * len(text) for _, text in self.ede)  # as Python keeps them, at most
        return len(self.body) + 2 * self._ttls.itemsize * len(self._ttls) + texts

    def write(self, query: Query, age: int = 0, *, stale_ttl: int | None = None, ede: Sequence[Ede] = ()) -> bytes:
        """The answer to a query with the same question, `age` seconds after the reply came.

        stale_ttl is what all records are given instead, where the reply has outlived them (RFC 8767 4).
        """
        aged = -1 if stale_ttl is not None else age
        if aged != self._aged:
            self._aged = aged
            for offset, ttl in zip(self._offsets, self._ttls):
                if stale_ttl is not None:
                    ttl = stale_ttl
                elif ttl:
                    ttl = max(ttl - age, 1)  # never 0 while it is valid: some take that for "do not use"
                self.body[offset : offset + 4] = ttl.to_bytes(4, "big")
        wire, question, opt, asked, *_ = query
        flags = QR | RA | asked & (RD | CD) | self.flags | self.rcode & RCODE
        if flags & AD and not (asked & AD or (opt is not None and opt.dnssec_ok)):
            flags &= ~AD  # RFC 6840 5.7: only for those who can know what it means
        an, ns, ar = self.counts
        head = wire[:2] + flags.to_bytes(2, "big") + _COUNTS.pack(1, an, ns, ar + (opt is not None))
        message = head + wire[HEADER_LENGTH : question.end] + self.body
        return message if opt is None else message + write_opt(opt, self.rcode, ede or self.ede)


def parse_reply(wire: bytes, question: Question, *, trust_ad: bool = False) -> Reply | None:
    """Read what is known to answer a question (`is_answer_to`). Untrusted: None when it cannot be read to its end."""
    _, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(wire)
    kept = flags & (TC | AD if trust_ad else TC)
    if not questions:
        return Reply(b"", question.end, (0, 0, 0), kept, flags & RCODE)
    start = question.end
    if answers + authorities > _MANY:
        return _parse_long(wire, question, kept)
    records = walk(wire, start, answers + authorities + additionals)
    if records is None:
        return None
    end = records[-1].end if records else start
    rcode = flags & RCODE
    opt = next((i for i, r in enumerate(records) if r.type == TYPE_OPT and i >= answers + authorities), None)
    body = wire[start:end]
    ede: tuple[Ede, ...] = ()
    if opt is not None:
        found = records[opt]
        rcode |= found.ttl >> 24 << 4
        ede = _read_ede(wire[found.data : found.end])
        behind = records[opt + 1 :]
        if all(_can_move(wire, record, found.start) for record in behind):
            body = wire[start : found.start] + wire[found.end : end]
            gap = found.end - found.start
            moved = [Record(r.start - gap, r.type, r.class_, r.ttl, r.data - gap, r.end - gap) for r in behind]
        else:
            # A name in them may point at one that would move; all are extra, and guests can ask for them.
            body = wire[start : found.start]
            moved = []
        records = records[:opt] + moved
        additionals = len(records) - answers - authorities
    reply = Reply(body, start, (answers, authorities, additionals), kept, rcode)
    reply.ede = ede
    _set_lifetime(reply, wire, question, records)
    return reply


def _parse_long(wire: bytes, question: Question, kept: int) -> Reply | None:
    """Read a reply with so many records that it is passed on as it is, but for its OPT, and not kept. Untrusted."""
    _, flags, _, answers, authorities, additionals = _HEADER.unpack_from(wire)
    middle = _skip(wire, question.end, answers + authorities)
    extra = walk(wire, middle, additionals) if middle is not None and additionals <= _MANY else None
    if middle is None or extra is None:
        return None
    number = next((i for i, record in enumerate(extra) if record.type == TYPE_OPT), len(extra))
    end = extra[number].start if number < len(extra) else extra[-1].end if extra else middle
    rcode = flags & RCODE | (extra[number].ttl >> 24 << 4 if number < len(extra) else 0)
    reply = Reply(wire[question.end : end], question.end, (answers, authorities, number), kept, rcode)
    reply.positive = reply.rcode == NOERROR and answers > 0
    return reply


def _skip(wire: bytes, position: int, count: int) -> int | None:
    """Where so many records end. Untrusted: None when one of them does not fit."""
    size = len(wire)
    try:
        for _ in range(count):
            while length := wire[position]:
                if length >= 0xC0:
                    position += 1
                    break
                if length > 63:
                    return None
                position += length + 1
            position += 11 + (wire[position + 9] << 8 | wire[position + 10])
    except IndexError:
        return None
    return position if position <= size else None


def walk(wire: bytes, position: int, count: int, limit: int = 65535) -> list[Record] | None:
    """The next `count` records, from `position` on, but none behind the first that ends beyond `limit`.

    Untrusted: None when one of them does not fit, or its name is bad. A name's pointer must lead to before that name
    (RFC 1035 4.1.4: a prior occurrence), so there are no loops.
    """
    records: list[Record] = []
    size = len(wire)
    unpack = _TAIL.unpack_from
    add = records.append
    make = Record._make
    try:
        for _ in range(count):
            start = position
            while length := wire[position]:
                if length >= 0xC0:
                    if (length & 0x3F) << 8 | wire[position + 1] >= start:
                        return None
                    position += 1
                    break
                if length > 63:
                    return None
                position += length + 1
            position += 1
            kind, class_, ttl, length = unpack(wire, position)
            data = position + 10
            position = data + length
            if position > size:
                return None
            add(make((start, kind, class_, ttl, data, position)))
            if position > limit:
                break
    except (IndexError, error):
        return None
    return records


def _can_move(wire: bytes, record: Record, limit: int) -> bool:
    """Whether a record can be moved from behind `limit`: an address, with a name that points to before it."""
    owner = wire[record.start]
    if record.type not in (TYPE_A, TYPE_AAAA):
        return False
    return owner >= 0xC0 and (owner & 0x3F) << 8 | wire[record.start + 1] < limit


def _read_ede(options: bytes) -> tuple[Ede, ...]:
    """The extended errors among the options of an OPT. Untrusted."""
    found: list[Ede] = []
    position = 0
    while position + 4 <= len(options) and len(found) < _MAX_EDE:
        code = int.from_bytes(options[position : position + 2], "big")
        length = int.from_bytes(options[position + 2 : position + 4], "big")
        data = options[position + 4 : position + 4 + length]
        position += 4 + length
        if code == OPTION_EDE and len(data) == length >= 2:
            text = data[2:].decode("utf-8", "replace").rstrip("\0")
            found.append((int.from_bytes(data[:2], "big"), cut_text(text)))
    return tuple(found)


def _set_lifetime(reply: Reply, wire: bytes, question: Question, records: list[Record]) -> None:
    """Note where the TTLs are, and for how long the reply may be kept."""
    answers, authorities, _ = reply.counts
    first_extra = answers + authorities
    start = question.end
    body = reply.body
    reply.positive = reply.rcode == NOERROR and any(
        question.type in (record.type, TYPE_ANY) for record in records[:answers]
    )
    lifetime = MAX_TTL
    denial = None
    smallest: dict[tuple[int, int, int], int] = {}
    owners: dict[bytes, int] = {question.name: HEADER_LENGTH}
    ttls: list[tuple[tuple[int, int, int], int, int]] = []
    signed = False
    for number, record in enumerate(records):
        ttl = record.ttl
        if ttl & 0x80000000:
            ttl = 0  # RFC 2181 8
        if record.type in (TYPE_TSIG, TYPE_SIG):
            signed = True
        if record.type == TYPE_SOA and answers <= number < first_extra and record.end - record.data >= 20:
            minimum = int.from_bytes(wire[record.end - 4 : record.end], "big")
            ttl = denial = min(ttl, 0 if minimum & 0x80000000 else minimum)
        # The same name is the same place, most often that of the question. Sets that are spelt in two ways keep theirs.
        # Looked up in the body: what was behind the OPT is not in the message where the record says.
        at = record.start - start
        owner = body[at]
        if owner >= 0xC0:
            place = (owner & 0x3F) << 8 | body[at + 1]
        else:
            place = owners.setdefault(bytes(body[at : record.data - 10 - start]).lower(), record.start)
        # RFC 2181 5.2: the TTLs of a set are equal. Signatures go by what they sign (RFC 4034 3).
        key = (place, record.type, record.class_) if record.type != TYPE_RRSIG else (record.start, record.type, 0)
        known = smallest.get(key)
        if known is None or ttl < known:
            smallest[key] = ttl
        ttls.append((key, record.data - 6, number))
    for key, offset, number in ttls:
        ttl = smallest[key]
        if number < first_extra or ttl:
            lifetime = min(lifetime, ttl)
        offset -= start
        reply._offsets.append(offset)
        reply._ttls.append(ttl)
        # Written as they are now: write() looks at them again when they are older.
        reply.body[offset : offset + 4] = ttl.to_bytes(4, "big")
    if reply.flags & TC or signed:
        return
    if reply.positive:
        reply.lifetime = lifetime
    elif denial is not None and reply.rcode in (NOERROR, NXDOMAIN):
        # RFC 2308 5: without an SOA it is not known for how long it holds.
        reply.lifetime = min(lifetime, denial, MAX_NEGATIVE_TTL)
    elif reply.rcode == NOERROR and answers and all(record.type == TYPE_CNAME for record in records[:answers]):
        # An alias whose target has nothing of the type, by a server that says no more about it: as briefly as failures.
        reply.lifetime = min(lifetime, 5)


def truncate(answer: bytes, query: Query, limit: int) -> bytes:
    """An answer in no more than `limit` bytes (at least 512): whole records, and TC where some are missing that count.

    The answer may be our own, and then it is sound; a nameserver's was read by parse_reply.
    """
    end = query.question.end
    _, flags, _, answers, authorities, additionals = _HEADER.unpack_from(answer)
    tail = write_opt(query.opt) if query.opt is not None else b""
    room = limit - len(tail)
    records = walk(answer, end, answers + authorities + additionals, room) or []
    kept = 0
    while kept < len(records) and records[kept].end <= room and records[kept].type != TYPE_OPT:
        kept += 1
    kept = min(kept, answers + authorities)
    if kept < answers:
        flags |= TC
        kept = _whole_sets(answer, records, kept) if kept < len(records) else kept
    elif kept < answers + authorities and (not answers or query.dnssec_ok):
        # The authority section is what a denial is about; for others it is a courtesy, unless it proves something.
        flags |= TC
        kept = answers
    cut = records[kept - 1].end if kept else end
    counts = _COUNTS.pack(1, min(kept, answers), max(kept - answers, 0), bool(tail))
    head: bytes = answer[:2] + flags.to_bytes(2, "big") + counts
    return head + query.wire[HEADER_LENGTH:end] + answer[end:cut] + tail


def _whole_sets(answer: bytes, records: list[Record], kept: int) -> int:
    """How many records to keep of an answer section so that no set but those of addresses is cut in two."""
    cut = records[kept]
    if cut.type in (TYPE_A, TYPE_AAAA):
        return kept
    owner = answer[cut.start : cut.data - 10]
    while kept:
        last = records[kept - 1]
        if last.type != cut.type or answer[last.start : last.data - 10] != owner:
            break
        kept -= 1
    return kept
