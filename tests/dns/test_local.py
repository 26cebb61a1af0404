"""The names that the gateway knows by itself, read by dnspython."""

from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.local import HOST_NAMES, LocalNames
from netstack.dns.message import parse_question
from tests.dns.nameserver import make_query

GATEWAY = ip_address("192.168.5.2").packed
GATEWAY6 = ip_address("fd00:c0a8:5::2").packed
DEBIAN = ip_address("192.168.5.15").packed
DEBIAN6 = ip_address("fd00:c0a8:5::15").packed
ALPINE = ip_address("192.168.5.16").packed

GUESTS = {"debian": (DEBIAN, DEBIAN6), "alpine": (ALPINE,)}
NAMES = {DEBIAN: "debian", DEBIAN6: "debian", ALPINE: "alpine"}

LOCAL = LocalNames(
    "netstack.internal",
    dict.fromkeys(HOST_NAMES, (GATEWAY, GATEWAY6)),
    (IPv4Network("192.168.5.0/24"), IPv6Network("fd00:c0a8:5::/64")),
    GUESTS.get,
    NAMES.get,
)


def ask_bytes(query: bytes) -> dns.message.Message | None:
    question = parse_question(query)
    assert question is not None
    answer = LOCAL.answer(query, question)
    if answer is None:
        return None
    found = dns.message.from_wire(answer)
    assert found.id == int.from_bytes(query[:2], "big")
    assert found.flags & dns.flags.QR
    assert found.flags & dns.flags.RA
    assert found.question == dns.message.from_wire(query).question
    return found


def ask(name: str, kind: str = "A", **settings: Any) -> dns.message.Message | None:
    return ask_bytes(make_query(name, kind, **settings))


def texts(answer: dns.message.Message | None) -> list[str]:
    assert answer is not None
    assert answer.rcode() == dns.rcode.NOERROR
    return sorted(record.to_text() for rrset in answer.answer for record in rrset)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_the_gateways_names(name: str) -> None:
    assert texts(ask(name)) == ["192.168.5.2"]
    assert texts(ask(name, "AAAA")) == ["fd00:c0a8:5::2"]
    assert texts(ask(name.upper())) == ["192.168.5.2"]
    assert texts(ask(name, "ANY")) == ["192.168.5.2", "fd00:c0a8:5::2"]


@pytest.mark.parametrize("kind", ("MX", "TXT", "HTTPS", "SOA", "TYPE65280", "SRV"))
def test_other_types_are_no_data_and_never_no_name(kind: str) -> None:
    answer = ask("host.lima.internal", kind)
    assert texts(answer) == []
    assert answer is not None
    # musl and systemd-resolved want the SOA of a zone above the name.
    assert answer.authority[0].name.to_text() == "lima.internal."
    assert answer.authority[0].ttl == 5


def test_guests() -> None:
    assert texts(ask("debian.netstack.internal")) == ["192.168.5.15"]
    assert texts(ask("Debian.NetStack.Internal", "AAAA")) == ["fd00:c0a8:5::15"]
    assert texts(ask("alpine.netstack.internal")) == ["192.168.5.16"]
    assert texts(ask("alpine.netstack.internal", "AAAA")) == []
    answer = ask("debian.netstack.internal")
    assert answer is not None
    assert answer.answer[0].ttl == 5


@pytest.mark.parametrize(
    "name", ("nobody.netstack.internal", "a.debian.netstack.internal", "_x._tcp.netstack.internal")
)
def test_unknown_names_of_our_domain_end_here(name: str) -> None:
    answer = ask(name)
    assert answer is not None
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert answer.authority[0].name.to_text() == "netstack.internal."


@pytest.mark.parametrize("name", ("netstack.internal", "docker.internal", "lima.internal"))
def test_names_above_ours_exist(name: str) -> None:
    assert texts(ask(name)) == []


@pytest.mark.parametrize(
    "name",
    (
        "example.test",
        ".",
        "internal",
        "xnetstack.internal",
        "other.docker.internal",
        "debian",
        "host.netstack.internal.example.test",
        r"\255.netstack.internal.x",
        "8.8.8.8.in-addr.arpa",
        "5.168.192.in-addr.arpa",
        "15.5.168.192.in-addr.arpa.example.test",
        "x.5.168.192.in-addr.arpa",
        "300.5.168.192.in-addr.arpa",
        r"\1785.5.168.192.in-addr.arpa",
        "1.ip6.arpa",
    ),
)
def test_other_names_are_for_others(name: str) -> None:
    assert ask(name) is None


def test_other_classes_are_for_others() -> None:
    query = bytearray(make_query("host.netstack.internal"))
    query[-1] = 3  # CHAOS
    question = parse_question(bytes(query))
    assert question is not None
    assert LOCAL.answer(bytes(query), question) is None


@pytest.mark.parametrize(
    ("address", "name"),
    (
        ("192.168.5.2", "host.netstack.internal."),
        ("fd00:c0a8:5::2", "host.netstack.internal."),
        ("192.168.5.15", "debian.netstack.internal."),
        ("fd00:c0a8:5::15", "debian.netstack.internal."),
    ),
)
def test_reverse_names(address: str, name: str) -> None:
    reverse = dns.reversename.from_address(address).to_text()
    assert texts(ask(reverse, "PTR")) == [name]
    assert texts(ask(reverse.upper(), "PTR")) == [name]
    assert texts(ask(reverse, "A")) == []


@pytest.mark.parametrize("address", ("192.168.5.99", "fd00:c0a8:5::99"))
def test_unknown_reverse_names_of_our_networks_end_here(address: str) -> None:
    answer = ask(dns.reversename.from_address(address).to_text(), "PTR")
    assert answer is not None
    assert answer.rcode() == dns.rcode.NXDOMAIN


def test_an_opt_is_answered_with_an_opt() -> None:
    answer = ask("host.netstack.internal", use_edns=0, payload=4096, want_dnssec=True)
    assert answer is not None
    assert answer.edns == 0
    assert answer.ednsflags & dns.flags.DO
    assert answer.payload >= 512
    answer = ask("host.netstack.internal")
    assert answer is not None
    assert answer.edns == -1


def test_rd_and_cd_come_back() -> None:
    for flags in (0, dns.flags.RD, dns.flags.CD, dns.flags.RD | dns.flags.CD):
        query = dns.message.make_query("host.netstack.internal", "A")
        query.flags = dns.flags.Flag(flags)
        answer = ask_bytes(query.to_wire())
        assert answer is not None
        assert answer.flags & (dns.flags.RD | dns.flags.CD) == flags


label = st.binary(min_size=1, max_size=63)


@given(
    st.lists(label, max_size=3),
    st.sampled_from(["netstack.internal", "in-addr.arpa", "ip6.arpa", ""]),
    st.integers(0, 65535),
)
def test_any_name_is_survived(labels: list[bytes], parent: str, kind: int) -> None:
    """Labels are any bytes at all: dots, NULs, not UTF-8, not what an idna codec likes."""
    parts = [*labels, *(part.encode() for part in parent.split(".") if part)]
    wire = b"".join(bytes((len(part),)) + part for part in parts) + b"\0"
    query = bytes.fromhex("123401000001000000000000") + wire + kind.to_bytes(2, "big") + b"\0\1"
    question = parse_question(query)
    assert question is not None
    answer = LOCAL.answer(query, question)
    if answer is not None:
        assert answer[12 : question.end] == query[12:]
