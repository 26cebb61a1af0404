"""mDNS where something is used up: descriptors, the exchanges of a guest, the patience for a neighbor's message."""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import dns.message
import dns.rcode
import trio
import trio.testing

from netstack.core.ports import Datagram
from netstack.dns.interfaces import Interface
from netstack.dns.mdns import MAX_OF_GUEST, Mdns, _Exchange
from netstack.dns.mdns_guests import GuestMdns
from netstack.dns.message import TYPE_A, TYPE_PTR, parse_question
from netstack.dns.records import read_all
from tests.dns.nameserver import make_query
from tests.dns.test_hostile_replies import PATIENCE

if TYPE_CHECKING:
    import pytest


async def ask(mdns: Mdns, name: str, guest: object = None) -> int:
    query = make_query(name)
    question = parse_question(query)
    assert question is not None
    return dns.message.from_wire(await mdns.answer(query, question, guest)).rcode()


async def test_without_descriptors_there_are_no_neighbors_and_the_network_goes_on(nursery: trio.Nursery) -> None:
    def interfaces() -> list[Interface]:
        raise OSError(errno.EMFILE, "Too many open files")

    mdns = Mdns(nursery, interfaces=interfaces)
    assert await ask(mdns, "printer.local") == dns.rcode.NXDOMAIN
    assert mdns.counters["mdns_failed"] == 1


async def test_a_bug_in_an_exchange_ends_nothing(nursery: trio.Nursery) -> None:
    def interfaces() -> list[Interface]:
        raise RuntimeError("a bug")

    mdns = Mdns(nursery, interfaces=interfaces)
    assert await ask(mdns, "printer.local") == dns.rcode.NXDOMAIN
    assert (mdns.counters["mdns_failed"], mdns._running) == (1, {})


async def test_a_bug_with_a_guests_question_ends_nothing(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lookup(*args: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Mdns, "lookup", lookup)
    service = GuestMdns(Mdns(nursery), nursery, lambda *_: None)
    link: Any = "link"
    service.on_datagram(Datagram(make_query("printer.local"), link, b"", b"", 5353, b"", 5353), 0.0)
    await trio.testing.wait_all_tasks_blocked()
    assert (service.counters["mdns_guest_failed"], service._asking) == (1, {})


async def test_interfaces_are_listed_in_a_thread_and_once_for_all_who_wait(nursery: trio.Nursery) -> None:
    threads = []

    def interfaces() -> list[Interface]:
        threads.append(threading.current_thread())
        time.sleep(0.05)
        return []

    mdns = Mdns(nursery, interfaces=interfaces)
    async with trio.open_nursery() as asking:
        for number in range(4):
            asking.start_soon(ask, mdns, f"n{number}.local")
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_one_guest_leaves_room_for_the_others(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = trio.Event()

    async def talk(*args: object) -> None:
        await gate.wait()

    place: Any = object()
    monkeypatch.setattr("netstack.dns.mdns.open_places", lambda *_: [place])
    monkeypatch.setattr(Mdns, "_talk", talk)
    mdns = Mdns(nursery, interfaces=list)
    for number in range(MAX_OF_GUEST):
        nursery.start_soon(ask, mdns, f"n{number}.local", "greedy")
    await trio.testing.wait_all_tasks_blocked()
    assert await ask(mdns, "one-more.local", "greedy") == dns.rcode.SERVFAIL
    assert mdns.counters["mdns_refused"] == 1
    nursery.start_soon(_set_later, gate)
    assert await ask(mdns, "printer.local", "modest") == dns.rcode.NXDOMAIN
    await trio.testing.wait_all_tasks_blocked()
    assert mdns._of_guest == {}


async def _set_later(gate: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    gate.set()


LONG = b"\1a" * 125 + b"\0"


def pointing(count: int, kind: int, data: bytes = b"") -> bytes:
    """A reply with a name of 125 labels, and records that point at it."""
    first = LONG + struct.pack("!HHIH", TYPE_A, 1, 10, 4) + bytes(4)
    others = (b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 10, len(data)) + data) * (count - 1)
    return struct.pack("!HHHHHH", 0, 0x8400, 0, count, 0, 0) + first + others


def test_names_that_all_point_at_a_long_one_take_no_time() -> None:
    questions = struct.pack("!HHHHHH", 0, 0x8400, 512, 0, 0, 0) + LONG + bytes(4) + b"\xc0\x0c\0\1\0\1" * 511
    for message in (pointing(510, TYPE_A), questions):
        best = 1.0
        for _ in range(3):
            began = time.perf_counter()
            read_all(message)
            best = min(best, time.perf_counter() - began)
        assert best < PATIENCE
    assert len(read_all(pointing(40, TYPE_A)) or ()) == 40


def test_of_the_records_of_one_message_only_so_many_are_looked_into() -> None:
    labels = (b"x", b"local")
    name = b"\1x\5local\0"
    first = name + struct.pack("!HHIH", TYPE_PTR, 1, 10, len(LONG)) + LONG
    at = 12 + len(first) - len(LONG)
    target = (0xC000 | at).to_bytes(2, "big")
    others = (b"\xc0\x0c" + struct.pack("!HHIH", TYPE_PTR, 1, 10, 2) + target) * 509
    message = struct.pack("!HHHHHH", 0, 0x8400, 0, 510, 0, 0) + first + others
    records = read_all(message)
    assert records is not None
    best = 1.0
    for _ in range(3):
        began = time.perf_counter()
        found = _Exchange(labels, (TYPE_PTR,))
        found.on_message(message, records)
        best = min(best, time.perf_counter() - began)
    assert best < PATIENCE
    assert len(found.result(TYPE_PTR).records) == 1
