"""Asks a source of local names with dnspython's queries, and reads its answers with dnspython."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype

from netstack.dns.message import Question, parse_question
from tests.dns.nameserver import make_query

Answer = Callable[[bytes, Question], bytes | None]


def check(query: bytes, wire: bytes) -> dns.message.Message:
    """What every answer must be."""
    answer = dns.message.from_wire(wire)
    asked = dns.message.from_wire(query)
    # RFC 4343: the name comes back letter for letter.
    name = asked.question[0].name.to_wire() or b""
    assert wire[12 : 12 + len(name)] == query[12 : 12 + len(name)]
    assert answer.id == asked.id
    assert answer.question == asked.question
    assert answer.flags & dns.flags.QR
    assert answer.flags & dns.flags.RA
    assert not answer.flags & dns.flags.AD
    assert bool(answer.flags & dns.flags.RD) == bool(asked.flags & dns.flags.RD)
    assert answer.edns == asked.edns
    if not answer.answer:
        # RFC 2308 3: for how long the "no" may be remembered.
        assert [rrset.rdtype for rrset in answer.authority] == [dns.rdatatype.SOA]
    return answer


def ask(source: Answer, name: str, kind: str = "A", **settings: Any) -> dns.message.Message | None:
    query = make_query(name, kind, **settings)
    question = parse_question(query)
    assert question is not None
    wire = source(query, question)
    return None if wire is None else check(query, wire)


def texts(answer: dns.message.Message | None) -> list[str]:
    """The data of the records of an answer that found some, or found the name without any."""
    assert answer is not None
    assert answer.rcode() == dns.rcode.NOERROR
    return [record.to_text() for rrset in answer.answer for record in rrset]


def is_nxdomain(answer: dns.message.Message | None) -> bool:
    return answer is not None and answer.rcode() == dns.rcode.NXDOMAIN
