"""Names that the user gives: wildcards, aliases, the API's names before those of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

import dns.message
import dns.rcode
import pytest

from netstack.dns.answers import Labels
from netstack.dns.message import REFUSED, parse_question, write_error
from netstack.dns.names import MAX_NAMES, Entry, ExtraNames, merge_entries, parse_entry
from tests.dns.local_answers import ask, check, texts
from tests.dns.nameserver import make_answer, make_query

GATEWAY = ip_address("192.168.5.2").packed


def names(entries: Mapping[str, str | list[str]]) -> ExtraNames:
    source = ExtraNames(find_local=lambda labels: (GATEWAY,) if labels == (b"host", b"internal") else None)
    source.configure(merge_entries(parse_entry(name, value) for name, value in entries.items()))
    return source


SOURCE = names(
    {
        "app.test": "192.0.2.1",
        "*.app.test": ["192.0.2.2", "2001:db8::2"],
        "*.deep.app.test": "192.0.2.3",
        "exact.app.test": "192.0.2.4",
        "Upper.Test.": "192.0.2.5",
        "alias.test": "app.test",
        "wild-alias.test": "any.app.test",
        "host-alias.test": "host.internal",
        "twice.test": "alias.test",
        "one.test": "two.test",
        "two.test": "one.test",
        "self.test": "self.test",
        "away.test": "git.corp.example",
        "away-twice.test": "away.test",
        "*.away.test": "git.corp.example",
    }
)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    (
        ("app.test", "A", ["192.0.2.1"]),
        ("APP.tesT", "A", ["192.0.2.1"]),
        ("x.app.test", "A", ["192.0.2.2"]),
        ("x.app.test", "AAAA", ["2001:db8::2"]),
        ("y.x.app.test", "A", ["192.0.2.2"]),  # any depth
        ("x.deep.app.test", "A", ["192.0.2.3"]),  # the longer wildcard
        ("deep.app.test", "A", ["192.0.2.2"]),
        ("exact.app.test", "A", ["192.0.2.4"]),  # the name before the wildcard
        ("x.exact.app.test", "A", ["192.0.2.2"]),
        ("upper.test", "A", ["192.0.2.5"]),
        ("alias.test", "A", ["192.0.2.1"]),
        ("twice.test", "A", ["192.0.2.1"]),
        ("wild-alias.test", "A", ["192.0.2.2"]),
        ("host-alias.test", "A", ["192.168.5.2"]),
        # NODATA, never NXDOMAIN.
        ("app.test", "AAAA", []),
        ("x.deep.app.test", "AAAA", []),
        ("app.test", "MX", []),
        ("away.test", "MX", []),
        ("host-alias.test", "AAAA", []),
        # Aliases in a circle.
        ("one.test", "A", []),
        ("self.test", "AAAA", []),
    ),
)
def test_names_wildcards_and_aliases(name: str, kind: str, expected: list[str]) -> None:
    assert texts(ask(SOURCE.answer, name, kind)) == expected


@pytest.mark.parametrize(
    "name", ("test", "notapp.test", "xapp.test", "app.test.example", "away.test", "x.away.test", ".")
)
def test_other_names_are_left_to_others(name: str) -> None:
    assert ask(SOURCE.answer, name) is None


def test_reverse_names_of_names_but_not_of_wildcards() -> None:
    assert texts(ask(SOURCE.answer, "1.2.0.192.in-addr.arpa", "PTR")) == ["app.test."]
    assert ask(SOURCE.answer, "2.2.0.192.in-addr.arpa", "PTR") is None


def test_the_apis_names_go_before_the_settings_and_can_be_taken_away() -> None:
    source = names({"a.test": "192.0.2.1"})
    source.add(dict[Labels, Entry | None]([parse_entry("a.test", "192.0.2.9"), parse_entry("*.b.test", "192.0.2.8")]))
    assert texts(ask(source.answer, "a.test")) == ["192.0.2.9"]
    assert texts(ask(source.answer, "x.b.test")) == ["192.0.2.8"]
    assert source.describe() == [
        {"name": "a.test", "value": "192.0.2.9", "source": "api"},
        {"name": "*.b.test", "value": "192.0.2.8", "source": "api"},
        {"name": "a.test", "value": "192.0.2.1", "source": "config"},
    ]
    source.configure({})
    assert texts(ask(source.answer, "a.test")) == ["192.0.2.9"]
    source.add({(b"a", b"test"): None, (b"never", b"test"): None})
    assert ask(source.answer, "a.test") is None


def test_too_many_names_are_refused_and_none_of_them_added() -> None:
    source = ExtraNames()
    entries: dict[Labels, Entry | None] = {(b"n%d" % n, b"test"): Entry((GATEWAY,)) for n in range(MAX_NAMES + 1)}
    with pytest.raises(ValueError, match="more than 10000"):
        source.add(entries)
    assert not source.added


@pytest.mark.parametrize(
    ("name", "value", "words"),
    (
        ("a..test", "192.0.2.1", "must be a host name"),
        ("", "192.0.2.1", "must be a host name"),
        ("*", "192.0.2.1", "must be a host name"),
        ("a.*.test", "192.0.2.1", "must be a host name"),
        ("ü.test", "192.0.2.1", "xn--"),
        ("x.netstack.internal", "192.0.2.1", "the guests'"),
        ("a.test", "192.0.2", "is no address"),
        ("a.test", "fe80::1%eth0", "is no address"),
        ("a.test", [], "needs an address"),
        ("a.test", ["192.0.2.1", "b.test"], "is no address"),
        ("a.test", "*.b.test", "must be a host name"),
        ("a." * 127 + "test", "192.0.2.1", "must be a host name"),
    ),
)
def test_what_cannot_be_used_is_refused_with_words(name: str, value: str | list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_entry(name, value)


async def follow(name: str, kind: str, behave: object) -> dns.message.Message:
    query = make_query(name, kind, use_edns=0)
    question = parse_question(query)
    assert question is not None
    assert SOURCE.target(question) == (b"git", b"corp", b"example")

    async def resolve(asked: bytes) -> bytes:
        assert dns.message.from_wire(asked).question[0].to_text() == f"git.corp.example. IN {kind}"
        assert callable(behave)
        return behave(asked)  # type: ignore[no-any-return]

    wire = await SOURCE.follow(query, question, resolve)
    if dns.message.from_wire(wire).rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return check(query, wire)
    return dns.message.from_wire(wire)


@pytest.mark.parametrize("name", ("away.test", "away-twice.test", "sub.away.test"))
async def test_an_alias_of_a_name_elsewhere_has_its_addresses(name: str) -> None:
    chain = ("git.corp.example. 300 IN CNAME real.corp.example.", "real.corp.example. 20 IN A 192.0.2.77")
    answer = await follow(name, "A", lambda asked: make_answer(asked, *chain))
    assert texts(answer) == ["192.0.2.77"]
    assert answer.answer[0].ttl == 20


async def test_what_is_said_of_the_target_is_said_of_the_alias() -> None:
    assert texts(await follow("away.test", "AAAA", make_answer)) == []
    assert (await follow("away.test", "A", lambda asked: make_answer(asked, rcode=3))).rcode() == dns.rcode.NXDOMAIN
    assert (await follow("away.test", "A", lambda asked: write_error(asked, REFUSED))).rcode() == dns.rcode.REFUSED
    broken = await follow("away.test", "A", lambda asked: make_answer(asked)[:7] + b"\xff" + make_answer(asked)[8:])
    assert broken.rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize(
    ("name", "kind"), (("app.test", "A"), ("away.test", "MX"), ("one.test", "A"), ("x.example", "A"))
)
def test_nothing_else_has_a_target(name: str, kind: str) -> None:
    question = parse_question(make_query(name, kind))
    assert question is not None
    assert SOURCE.target(question) is None
