"""What is kept of a nameserver's reply: the texts of its errors, and the TTLs behind its OPT."""

from __future__ import annotations

import struct

import dns.message

from netstack.dns.message import Opt, Query, parse_query, write_opt
from netstack.dns.replies import Reply, parse_reply
from tests.dns.nameserver import make_query

QUERY = make_query(use_edns=0)


def record(owner: bytes, kind: int, ttl: int, data: bytes, class_: int = 1) -> bytes:
    return owner + struct.pack("!HHIH", kind, class_, ttl, len(data)) + data


def read(*additional: bytes) -> tuple[Query, Reply]:
    """A reply with one address, and these records behind it."""
    query = parse_query(QUERY)
    assert isinstance(query, Query)
    head = QUERY[:2] + b"\x81\x80\0\1\0\1\0\0" + len(additional).to_bytes(2, "big") + QUERY[12 : query.question.end]
    wire = head + record(b"\xc0\x0c", 1, 3600, bytes(4)) + b"".join(additional)
    reply = parse_reply(wire, query.question)
    assert reply is not None
    return query, reply


def error(text: bytes) -> bytes:
    return record(b"\0", 41, 0, struct.pack("!HHH", 15, len(text) + 2, 3) + text, 1232)


def test_a_long_text_of_an_error_is_cut_and_counted() -> None:
    query, plain = read(error(b""))
    query, reply = read(error("\N{GRINNING FACE}".encode() + b"x" * 60000))
    ((code, text),) = reply.ede
    assert code == 3
    assert text == "\N{GRINNING FACE}" + "x" * 116
    assert reply.size >= plain.size + len(text.encode())
    assert text.encode() in reply.write(query)


def test_the_text_of_an_error_is_cut_between_characters() -> None:
    text = "x" * 119 + "\N{EURO SIGN}"
    wire = write_opt(Opt(1232, 0, dnssec_ok=False), ede=((0, text),))
    assert wire.endswith(b"x" * 119)
    assert wire[11:17] == struct.pack("!HHH", 15, 121, 0)
    _, reply = read(error(text.encode()))
    assert reply.ede == ((3, "x" * 119),)


def test_records_behind_the_opt_have_the_ttl_of_their_set() -> None:
    query, reply = read(
        error(b""),
        record(b"\xc0\x10", 1, 50, bytes((192, 0, 2, 1))),
        record(b"\xc0\x10", 1, 20, bytes((192, 0, 2, 2))),
        record(b"\xc0\x18", 1, 70, bytes((192, 0, 2, 3))),
    )
    additional = dns.message.from_wire(reply.write(query)).additional
    assert sorted((rrset.ttl, len(rrset)) for rrset in additional) == [(20, 2), (70, 1)]
    # Both of the set have it, written down one by one.
    assert reply.write(query).count(b"\0\1\0\1\0\0\0\x14") == 2
