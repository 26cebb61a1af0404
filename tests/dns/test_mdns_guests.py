"""Multicast questions of guests: what is answered, what is not, and any bytes (rule 58)."""

from __future__ import annotations

from typing import Any

import dns.flags
import dns.message
import dns.rrset
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netstack.core.ports import Datagram
from netstack.dns.answers import Labels
from netstack.dns.mdns import Found, Mdns
from netstack.dns.mdns_guests import MAX_QUESTIONS, GuestMdns
from netstack.dns.message import TYPE_A, TYPE_PTR
from tests.dns.nameserver import make_query

FOUND: dict[tuple[Labels, int], Found] = {
    ((b"printer", b"local"), TYPE_A): Found(
        True, ((TYPE_A, bytes((192, 0, 2, 1))), (TYPE_A, bytes((192, 0, 2, 2)))), 9
    ),
    ((b"_ipp", b"_tcp", b"local"), TYPE_PTR): Found(True, ((TYPE_PTR, (b"Bob", b"_ipp", b"_tcp", b"local")),), 9),
    ((b"many", b"local"), TYPE_A): Found(True, tuple((TYPE_A, bytes((10, 0, 0, n))) for n in range(64)), 9),
    ((b"empty", b"local"), TYPE_A): Found(True),
}


class Guests:
    """The service, with what it has sent. Nobody is asked: names are those of FOUND."""

    def __init__(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        async def lookup(self: Mdns, labels: Labels, kind: int) -> Found | None:
            await trio.lowlevel.checkpoint()
            known: Found = FOUND.get((labels, kind), Found(False))
            return known

        monkeypatch.setattr(Mdns, "lookup", lookup)
        self.sent: list[tuple[bytes, bool]] = []
        mdns = Mdns(nursery, is_routed=lambda labels: labels[-2:] == (b"corp", b"local"))
        self.service = GuestMdns(
            mdns, nursery, lambda datagram, payload, to_group: self.sent.append((payload, to_group))
        )

    async def ask(self, message: bytes, port: int = 5353) -> list[tuple[dns.message.Message, bool]]:
        link: Any = "link"
        self.sent.clear()
        self.service.on_datagram(Datagram(message, link, b"", b"", port, b"", 5353), 0.0)
        await trio.testing.wait_all_tasks_blocked()
        return [(dns.message.from_wire(payload), to_group) for payload, to_group in self.sent]


@pytest.fixture
def guests(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Guests:
    return Guests(nursery, monkeypatch)


async def test_rule_58_an_answer_to_the_group_has_neither_id_nor_question(guests: Guests) -> None:
    ((answer, to_group),) = await guests.ask(make_query("Printer.local"))
    assert (to_group, answer.id, answer.question) == (True, 0, [])
    assert answer.flags == dns.flags.QR | dns.flags.AA
    assert sorted(record.to_text() for record in answer.answer[0]) == ["192.0.2.1", "192.0.2.2"]


async def test_rule_58_an_answer_to_another_port_has_both(guests: Guests) -> None:
    ((answer, to_group),) = await guests.ask(make_query("printer.local", ident=0x4711), port=40000)
    assert (to_group, answer.id, len(answer.question)) == (False, 0x4711, 1)
    ((answer, _),) = await guests.ask(make_query("_ipp._tcp.local", "PTR"), port=40000)
    assert answer.answer[0][0].to_text() == "Bob._ipp._tcp.local."


@pytest.mark.parametrize("name", ("nobody.local", "empty.local", "git.corp.local", "printer.example", "local"))
async def test_nothing_is_said_of_other_names(guests: Guests, name: str) -> None:
    assert await guests.ask(make_query(name)) == []


async def test_answers_and_announcements_are_for_guests(guests: Guests) -> None:
    query = make_query("printer.local")
    assert await guests.ask(query[:2] + b"\x84" + query[3:]) == []
    probe = dns.message.from_wire(query)
    probe.authority.append(dns.rrset.from_text("printer.local.", 120, "IN", "A", "192.0.2.3"))
    assert await guests.ask(probe.to_wire()) == []
    assert len(await guests.ask(query.replace(b"\0\1\0\1", b"\0\1\x80\1"))) == 1  # an answer by unicast is asked for


async def test_questions_are_bounded_and_a_long_answer_is_cut_between_records(guests: Guests) -> None:
    query = make_query("printer.local")
    many = query[:4] + (100).to_bytes(2, "big") + query[6:12] + query[12:] * 100
    assert len(await guests.ask(many)) == MAX_QUESTIONS
    ((answer, _),) = await guests.ask(make_query("many.local"))
    assert 30 < len(answer.answer[0]) <= 64
    assert len(guests.sent[0][0]) <= 1400


@given(st.binary(max_size=80), st.integers(0, 40))
def test_any_bytes(tail: bytes, keep: int) -> None:
    service = GuestMdns(Mdns(nursery=None), None, lambda *_: None)  # type: ignore[arg-type] # nothing is claimed
    service.mdns.enabled = False
    link: Any = "link"
    for message in (tail, make_query("printer.local")[:keep] + tail):
        service.on_datagram(Datagram(message, link, b"", b"", 5353, b"", 5353), 0.0)
