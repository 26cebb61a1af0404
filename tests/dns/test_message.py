"""The little that is known about messages, against dnspython."""

import random

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.message import (
    BADVERS,
    FORMERR,
    MAX_UDP,
    SERVFAIL,
    Opt,
    find_opt,
    is_answer_to,
    parse_question,
    udp_limit,
    with_id,
    write_error,
)
from tests.dns.nameserver import address_of, make_query


@pytest.mark.parametrize(
    "name", (".", "a.test", "WwW.eXample.test", ".".join(["a" * 63] * 3 + ["b" * 61]), r"\000\255.x")
)
@pytest.mark.parametrize("kind", ("A", "AAAA", "HTTPS", "TYPE65280", "ANY"))
def test_questions_are_read(name: str, kind: str) -> None:
    query = make_query(name, kind)
    question = parse_question(query)
    assert question is not None
    expected = dns.message.from_wire(query).question[0]
    assert question.labels == tuple(label.lower() for label in expected.name.labels if label)
    assert (question.type, question.class_) == (expected.rdtype, expected.rdclass)
    assert question.end == len(query)
    assert parse_question(query + b"trailing") == question
    for end in range(len(query)):
        assert parse_question(query[:end]) is None


@pytest.mark.parametrize(
    "name",
    (
        b"\x40a\x00",  # a reserved label type
        b"\xc0\x0c",  # a pointer to itself
        b"\x01a\xc0\x0c",
        (b"\x3f" + b"a" * 63) * 4 + b"\x00",  # 257 bytes
        b"\x01" * 400,
    ),
)
def test_bad_names_are_refused(name: bytes) -> None:
    head = bytes.fromhex("123401000001000000000000")
    assert parse_question(head + name + b"\0\1\0\1") is None


@pytest.mark.parametrize("count", (0, 2, 0xFFFF))
def test_a_query_has_one_question(count: int) -> None:
    query = make_query()
    assert parse_question(query[:4] + count.to_bytes(2, "big") + query[6:]) is None


def test_opt() -> None:
    for query, expected in (
        (make_query(), None),
        (make_query(use_edns=0, payload=4096), Opt(4096, 0, False)),
        (make_query(use_edns=0, payload=1232, want_dnssec=True), Opt(1232, 0, True)),
        (make_query(use_edns=1, payload=0), Opt(0, 1, False)),
        (
            make_query(use_edns=0, options=[dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")]),
            Opt(1232, 0, False),
        ),
    ):
        question = parse_question(query)
        assert question is not None
        assert find_opt(query, question) == expected


def test_an_opt_need_not_be_last() -> None:
    query = make_query(use_edns=0, payload=2000)
    tsig = b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x02ab"
    question = parse_question(query)
    assert question is not None
    two = query[:10] + b"\0\2" + query[12:]
    assert find_opt(two + tsig, question) == Opt(2000, 0, False)
    first = two[: question.end] + tsig + two[question.end :]
    assert find_opt(first, question) == Opt(2000, 0, False)
    assert find_opt(first[:-12], question) is None


@pytest.mark.parametrize(
    ("size", "limit"), ((0, 512), (100, 512), (512, 512), (1232, 1232), (4096, MAX_UDP), (65535, MAX_UDP))
)
def test_how_long_an_answer_may_be(size: int, limit: int) -> None:
    assert udp_limit(Opt(size, 0, False)) == limit
    assert udp_limit(None) == 512


@pytest.mark.parametrize("rcode", (FORMERR, SERVFAIL, BADVERS))
def test_errors_are_read_by_others(rcode: int) -> None:
    query = make_query("WwW.example.test", ident=0xBEEF, use_edns=0, want_dnssec=True)
    answer = dns.message.from_wire(write_error(query, rcode))
    assert answer.id == 0xBEEF
    assert answer.rcode() == rcode
    assert answer.flags & (dns.flags.QR | dns.flags.RD | dns.flags.RA) == dns.flags.QR | dns.flags.RD | dns.flags.RA
    assert answer.question[0].name.to_text() == "WwW.example.test."
    assert answer.edns == 0
    assert answer.ednsflags & dns.flags.DO
    assert not answer.answer


def test_no_opt_for_who_sent_none() -> None:
    assert dns.message.from_wire(write_error(make_query(), SERVFAIL)).edns == -1


def test_the_opcode_comes_back() -> None:
    query = bytearray(make_query())
    query[2] |= 5 << 3  # UPDATE
    assert write_error(bytes(query), 4)[2] >> 3 & 15 == 5


def test_an_unreadable_question_is_left_out() -> None:
    answer = write_error(bytes.fromhex("123401000002000000000000") + b"\xff", FORMERR)
    assert answer == bytes.fromhex("123481810000000000000000")


def test_answers_are_recognised() -> None:
    query = make_query("www.Example.test")
    question = parse_question(query)
    assert question is not None
    good = address_of(query)
    assert is_answer_to(good, query, question)
    assert is_answer_to(address_of(make_query("WWW.example.TEST")), query, question)
    assert is_answer_to(bytes.fromhex("123481810000000000000000"), query, question)  # FORMERR without a question
    for bad in (
        query,  # our own, come back
        with_id(good, 0x4321),
        address_of(make_query("www.example.net")),
        address_of(make_query("www.Example.test", "AAAA")),
        good[:11],
        b"",
        bytes.fromhex("123481800000000000000000"),  # success without a question
        good[:4] + b"\0\2" + good[6:],
    ):
        assert not is_answer_to(bad, query, question)


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_survived(tail: bytes, whole: bool) -> None:
    query = (make_query()[:12] if whole else b"") + tail
    question = parse_question(query)
    if question is not None:
        find_opt(query, question)
    if len(query) >= 12:
        answer = write_error(query, SERVFAIL)
        assert answer[:2] == query[:2]
        assert answer[2] & 0x80


@pytest.mark.parametrize("seed", range(200))
def test_mutated_queries_are_survived(seed: int) -> None:
    chance = random.Random(seed)
    query = bytearray(make_query(use_edns=0, want_dnssec=True))
    for _ in range(chance.randrange(1, 6)):
        query[chance.randrange(len(query))] = chance.randrange(256)
    question = parse_question(bytes(query))
    if question is not None:
        find_opt(bytes(query), question)
        is_answer_to(bytes(query), bytes(query), question)
    write_error(bytes(query), SERVFAIL)
