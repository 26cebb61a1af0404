"""Which name a guest got which address for: kept for each guest, bounded, whatever the answers are like."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from dnslib import AAAA, CNAME, QTYPE, RR, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

import netstack
from netstack.control.log import Log
from netstack.gateway import answered_names
from netstack.gateway.answered_names import AnsweredNames
from tests.fakes import FakeLink
from tests.frames import udp_frame

if TYPE_CHECKING:
    from netstack.core.ports import Datagram

MACS = (b"\x52\x54\0\0\0\1", b"\x52\x54\0\0\0\2")
GUESTS = (bytes((192, 168, 5, 15)), bytes((192, 168, 5, 16)))
WEB = bytes((203, 0, 113, 1))


class Neighbors:
    def find(self, address: bytes) -> Any:
        return SimpleNamespace(mac=MACS[GUESTS.index(address)]) if address in GUESTS else None


def datagram(number: int = 0) -> Datagram:
    return cast("Datagram", SimpleNamespace(mac=MACS[number]))


def answer(name: str, *records: RR, kind: str = "A") -> bytes:
    message = DNSRecord.question(name, kind).reply()
    for record in records:
        message.add_answer(record)
    return bytes(message.pack())


@pytest.fixture
def names() -> AnsweredNames:
    return AnsweredNames(Neighbors())  # type: ignore[arg-type]


def test_the_name_that_was_asked_for_counts_and_not_the_end_of_its_aliases(names: AnsweredNames) -> None:
    records = (
        RR("Web.test", QTYPE.CNAME, rdata=CNAME("cdn.test")),
        RR("cdn.test", QTYPE.A, rdata=A("203.0.113.1")),
        RR("cdn.test", QTYPE.A, rdata=A("203.0.113.2")),
    )
    names.on_answer(datagram(), answer("Web.test", *records))
    assert names.find(GUESTS[0], WEB) == "web.test"
    assert names.find(GUESTS[0], bytes((203, 0, 113, 2))) == "web.test"


def test_what_one_guest_asked_is_nothing_to_another(names: AnsweredNames) -> None:
    record = RR("x", QTYPE.A, rdata=A("203.0.113.1"))
    names.on_answer(datagram(0), answer("one.test", record))
    names.on_answer(datagram(1), answer("two.test", record))
    assert [names.find(guest, WEB) for guest in GUESTS] == ["one.test", "two.test"]
    assert names.find(bytes((192, 168, 5, 99)), WEB) is None


def test_ipv6(names: AnsweredNames) -> None:
    names.on_answer(datagram(), answer("web.test", RR("web.test", QTYPE.AAAA, rdata=AAAA("2001:db8::1")), kind="AAAA"))
    assert names.find(GUESTS[0], bytes.fromhex("20010db8" + "00" * 11 + "01")) == "web.test"


def test_the_oldest_make_room(names: AnsweredNames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered_names, "_MAX_NAMES", 10)
    for number in range(30):
        names.on_answer(datagram(), answer("web.test", RR("web.test", QTYPE.A, rdata=A(f"203.0.113.{number}"))))
    assert len(names) == 10
    assert names.find(GUESTS[0], bytes((203, 0, 113, 29))) == "web.test"


def test_a_name_that_is_no_hosts_is_not_kept(names: AnsweredNames) -> None:
    for name in (b"a b.test", b"x\r\ny", b"*"):
        message = bytearray(answer("n.test", RR("n.test", QTYPE.A, rdata=A("203.0.113.1"))))
        message[12:14] = bytes((len(name),)) + name
        names.on_answer(datagram(), bytes(message))
    assert len(names) == 0


@given(st.binary(max_size=60), st.integers(0, 60))
def test_no_answer_raises(noise: bytes, at: int) -> None:
    names = AnsweredNames(Neighbors())  # type: ignore[arg-type]
    message = answer("web.test", RR("web.test", QTYPE.A, rdata=A("203.0.113.1")))
    names.on_answer(datagram(), message[:at] + noise + message[at:])
    names.on_answer(datagram(), message[:at] + noise)


async def test_who_wants_to_know_of_answers_hears_of_those_that_were_given_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another guest has asked already is answered by the stack's short way, which would tell nobody."""
    config = netstack.Config(network={"subnet": "192.168.5.0/24"}, dns={"source": "none"})
    async with netstack.open_network(config, log=Log("error")) as network:
        stack, link = network.stack, FakeLink()
        stack.add_link(link, time.monotonic())
        query = DNSRecord.question("gateway.netstack.internal")
        known = bytes(query.reply().pack())
        monkeypatch.setattr(network.dns.resolver, "remembered", lambda wire, guest: known)

        def ask(number: int) -> bool:
            """Whether it took the short way."""
            where = GUESTS[number], network.addresses.gateway
            frame = udp_frame(stack.mac, MACS[number], *where, (40000, 53), bytes(query.pack()))
            before = stack.counters.frames_slow
            stack.receive_frames(link, memoryview(frame), (0, len(frame)), time.monotonic())
            return stack.counters.frames_slow == before

        assert [ask(number) for number in (0, 1, 0, 1)] == [False, False, True, True]
        heard: list[bytes] = []
        network.dns.on_answer = lambda datagram, answer: heard.append(datagram.mac)
        assert not ask(0)
        assert not ask(1)
        assert heard == list(MACS)
        network.dns.on_answer = None
        assert ask(1)
