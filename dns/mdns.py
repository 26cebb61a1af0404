"""Names of the host's neighbors: multicast DNS, as one who asks once and listens a little (RFC 6762 5.1).

Theory of operation
-------------------
A guest's question for a name in .local, or for the reverse name of a link-local address, becomes an *exchange*: the
question goes to 224.0.0.251 and ff02::fb at port 5353, on every interface of the host that may have neighbors, and once
more after a second. It leaves from a fresh port, so responders answer to that port, with our ID and the question, and
with TTLs of at most ten seconds (RFC 6762 6.7); some answer to the group all the same, and are heard too.

A and AAAA are asked together, whichever the guest wants: only so can "there is no such address" be told from "there is
no such name", which matters to musl (RFC 2308 2.1). What comes back counts when it comes from port 5353 of an address
on that interface's network. The first answer ends the wait; a responder's NSEC record says at once which types there
are not (RFC 6762 6.1); where the name has shown that it exists, other types get a short grace; after two seconds
without a word there is no such name. Questions for services (PTR) are collected for a second: several may answer.

Answers are kept for as long as they say, ten seconds at most, and the lack of one for five; the same question from
several guests is one exchange. All of it is bounded.

Names that a unicast route claims (a company's corp.local) are not ours (rule 42 of the routing).
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import trio

from netstack.dns.answers import TYPE_CNAME, TYPE_NS, AnswerWriter, Labels
from netstack.dns.interfaces import Interface, list_interfaces
from netstack.dns.mdns_sockets import PORT, Place, open_places
from netstack.dns.message import (
    CLASS_IN,
    HEADER_LENGTH,
    NOERROR,
    NXDOMAIN,
    OPCODE,
    QR,
    RCODE,
    SERVFAIL,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_PTR,
    Question,
    flags_of,
    parse_question,
    write_error,
)
from netstack.dns.records import Record, read_all, read_name
from netstack.dns.special import is_link_local_reverse

AGAIN: Final = 1.0
DEADLINE: Final = 2.0
COLLECT: Final = 1.0
GRACE: Final = 0.3

MAX_TTL: Final = 10  # RFC 6762 6.7
NEGATIVE_TTL: Final = 5

MAX_EXCHANGES: Final = 32  # each has a handful of sockets
MAX_OF_GUEST: Final = 8  # of these
MAX_KEPT: Final = 512
MAX_RECORDS: Final = 64
MAX_SIZE: Final = 16 << 10  # bytes of their data

_INTERFACES_FOR = 5.0  # seconds for which the list of interfaces is good

_TYPE_SRV = 33
_TYPE_NSEC = 47
_CLASS = 0x7FFF  # the top bit says "forget what you had" (RFC 6762 10.2)
_LOCAL = b"local"
_ADDRESSES = (TYPE_A, TYPE_AAAA)


class Found(NamedTuple):
    """What an exchange found for one type."""

    exists: bool
    """Whether there is such a name."""
    records: tuple[tuple[int, Any], ...] = ()
    ttl: int = NEGATIVE_TTL


class _Exchange:
    """One name that is being asked for."""

    def __init__(self, labels: Labels, types: Sequence[int]) -> None:
        self.labels = labels
        self.types = tuple(types)
        self.found: dict[int, dict[tuple[int, Any], int]] = {}
        self.absent: set[int] = set()
        self.size = 0
        self.over = False
        self.changed = trio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    @property
    def exists(self) -> bool:
        return bool(self.found or self.absent)

    def is_settled(self, kind: int) -> bool:
        """Whether no better answer for this type can come."""
        if self.over or kind in self.absent:
            return True
        if kind == TYPE_AAAA and self._only_link_local():
            return self.is_settled(TYPE_A)
        return kind in self.found and kind not in (TYPE_PTR, TYPE_ANY)

    def result(self, kind: int) -> Found:
        records = self.found.get(kind)
        if not records:
            return Found(self.exists)
        kept = tuple(records)
        if kind == TYPE_AAAA:
            usable = tuple(record for record in kept if not _is_link_local(record[1]))
            # A link-local address is of no use without its interface, which DNS cannot say; better than none at all.
            kept = usable or (() if TYPE_A in self.found else kept)
        return Found(True, kept, min(records.values()) if kept else NEGATIVE_TTL)

    def on_message(self, message: bytes, records: Sequence[Record]) -> None:
        """Take what a reply says of our name. Untrusted."""
        names = {self.labels}
        for record in records:
            if record.type == TYPE_CNAME and record.labels in names and len(names) < 8:
                target = read_name(message, record.at)
                if target is not None:
                    names.add(tuple(label.lower() for label in target[0]))
        count = 0
        for record in records:
            if record.labels not in names or record.class_ & _CLASS != CLASS_IN or not record.ttl:
                continue  # a TTL of zero says goodbye (RFC 6762 10.1)
            count += 1
            if count > MAX_RECORDS:
                break  # to read the names in their data takes time
            if record.type == _TYPE_NSEC:
                self._on_nsec(message, record)
                continue
            for kind in self.types:
                if kind in (record.type, TYPE_ANY):
                    data = _read_data(message, record)
                    known = self.found.setdefault(kind, {}) if data is not None else {}
                    if data is not None and len(known) < MAX_RECORDS and self.size < MAX_SIZE:
                        self.size += len(record.data)
                        known[record.type, data] = min(record.ttl, MAX_TTL)

    def _on_nsec(self, message: bytes, record: Record) -> None:
        # RFC 6762 6.1: the next name is the name itself, and one block of at most 32 bytes says which types there are.
        name = read_name(message, record.at)
        if name is None:
            return
        blocks = message[name[1] : record.at + len(record.data)]
        if len(blocks) < 2 or blocks[0] or len(blocks) != 2 + blocks[1]:
            return
        for kind in self.types:
            byte = 2 + (kind >> 3)
            if kind < 256 and kind != TYPE_ANY and (byte >= len(blocks) or not blocks[byte] & 0x80 >> (kind & 7)):
                self.absent.add(kind)

    def _only_link_local(self) -> bool:
        records = self.found.get(TYPE_AAAA)
        return bool(records) and all(_is_link_local(data) for _, data in records or ())


@dataclass(slots=True)
class Mdns:
    """Asks the host's neighbors.

    nursery runs the exchanges. is_routed says whether a unicast route claims a name. interfaces gives those to ask on.
    """

    nursery: trio.Nursery
    writer: AnswerWriter = field(default_factory=AnswerWriter)
    is_routed: Callable[[Labels], bool] = lambda labels: False
    interfaces: Callable[[], list[Interface]] = list_interfaces
    enabled: bool = True
    counters: dict[str, int] = field(
        default_factory=lambda: {"mdns_queries": 0, "mdns_replies": 0, "mdns_refused": 0, "mdns_failed": 0}
    )
    _running: dict[tuple[Labels, tuple[int, ...]], _Exchange] = field(init=False, default_factory=dict)
    _kept: dict[tuple[Labels, int], tuple[float, Found]] = field(init=False, default_factory=dict)
    _interfaces: list[Interface] = field(init=False, default_factory=list)
    _interfaces_until: float = field(init=False, default=float("-inf"))
    _looking: trio.Lock = field(init=False, default_factory=trio.Lock)
    _of_guest: Counter[object] = field(init=False, default_factory=Counter)

    def claims(self, question: Question) -> bool:
        """Whether a query is one for mDNS."""
        labels = question.labels
        if not self.enabled or question.class_ != CLASS_IN:
            return False
        if labels[-1:] == (_LOCAL,):
            return len(labels) > 1 and not self.is_routed(labels)
        return labels[-1:] == (b"arpa",) and is_link_local_reverse(labels) and not self.is_routed(labels)

    async def answer(self, query: bytes, question: Question, guest: object = None) -> bytes:
        """Answer a query that is claimed, of a guest or, with None, our own. It takes two seconds at most."""
        found = await self.lookup(question.labels, question.type, guest)
        if found is None:
            return write_error(query, SERVFAIL)
        labels = question.labels
        zone = labels[-1:] if labels[-1] == _LOCAL else labels[-4:] if labels[-2] == b"in-addr" else labels[-5:]
        return self.writer.write(
            query,
            question,
            NOERROR if found.exists else NXDOMAIN,
            found.records,
            zone=zone,
            ttl=found.ttl,
            negative_ttl=NEGATIVE_TTL,
        )

    async def lookup(self, labels: Labels, kind: int, guest: object = None) -> Found | None:
        """Find the records of one type of a name; None when too many names are being looked for, by all or a guest."""
        now = trio.current_time()
        kept = self._kept.get((labels, kind))
        if kept is not None and now < kept[0]:
            return kept[1]._replace(ttl=max(1, int(kept[0] - now)))
        types = _ADDRESSES if kind in _ADDRESSES else (kind,)
        exchange = self._running.get((labels, types))
        if exchange is None:
            of_guest = self._of_guest[guest] if guest is not None else 0
            if len(self._running) >= MAX_EXCHANGES or of_guest >= MAX_OF_GUEST:
                self.counters["mdns_refused"] += 1
                return None
            exchange = self._running[labels, types] = _Exchange(labels, types)
            self._of_guest[guest] += 1
            self.nursery.start_soon(self._run, exchange, guest)
        with trio.CancelScope() as patience:
            while not exchange.is_settled(kind):
                if exchange.exists and patience.deadline == float("inf"):
                    patience.deadline = trio.current_time() + (COLLECT if kind in (TYPE_PTR, TYPE_ANY) else GRACE)
                await exchange.changed.wait()
        found = exchange.result(kind)
        self._keep(labels, kind, found)
        return found

    def flush(self) -> int:
        """Forget what is known; how much that was."""
        count = len(self._kept)
        self._kept.clear()
        return count

    def _keep(self, labels: Labels, kind: int, found: Found) -> None:
        self._kept.pop((labels, kind), None)
        if len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[labels, kind] = (trio.current_time() + found.ttl, found)

    # ---- on the wire -----------------------------------------------------------------------------------------------

    async def _run(self, exchange: _Exchange, guest: object) -> None:
        self.counters["mdns_queries"] += 1
        try:
            with trio.move_on_after(DEADLINE), contextlib.ExitStack() as stack:
                idents = {kind: secrets.randbits(16) for kind in exchange.types}
                # Sockets to ask from, and where that is possible others that hear what is said to the group.
                places = open_places(await self._list_interfaces(), stack)
                if places:
                    await self._talk(exchange, places, idents)
        except Exception:
            # What goes wrong with one name must not end the network of all guests.
            self.counters["mdns_failed"] += 1
        finally:
            exchange.over = True
            self._of_guest[guest] -= 1
            if not self._of_guest[guest]:
                del self._of_guest[guest]
            self._running.pop((exchange.labels, exchange.types), None)
            exchange.tell()

    async def _talk(self, exchange: _Exchange, places: Sequence[Place], idents: dict[int, int]) -> None:
        queries = [_write_query(exchange.labels, kind, ident) for kind, ident in idents.items()]
        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(self._listen, exchange, place, frozenset(idents.values()), nursery.cancel_scope)
            while True:
                for place in places:
                    if place.group is not None:
                        for query in queries:
                            with contextlib.suppress(OSError):  # an interface may be down by now
                                await place.sock.sendto(query, place.group)
                await trio.sleep(AGAIN)
                if exchange.exists:
                    break
            nursery.cancel_scope.cancel()

    async def _listen(
        self, exchange: _Exchange, place: Place, idents: frozenset[int], exchange_scope: trio.CancelScope
    ) -> None:
        while True:
            try:
                message, source = await place.sock.recvfrom(9000)  # RFC 6762 17
            except OSError:
                # The host's answer to what was sent (ICMP): others may still answer.
                await trio.sleep(0.05)
                continue
            if source[1] != PORT or not place.interface.has(source[0]) or not _is_reply(message):
                continue
            if place.group is not None and not _is_for(message, idents, exchange.labels):
                continue
            records = read_all(message)
            if records is not None:
                self.counters["mdns_replies"] += 1
                exchange.on_message(message, records)
                exchange.tell()
                if all(exchange.is_settled(kind) for kind in exchange.types):
                    exchange_scope.cancel()

    async def _list_interfaces(self) -> list[Interface]:
        """The interfaces of these seconds. To find them takes milliseconds, which nobody else should wait for."""
        async with self._looking:
            now = trio.current_time()
            if now >= self._interfaces_until:
                try:
                    self._interfaces = await trio.to_thread.run_sync(self.interfaces, abandon_on_cancel=True)
                except OSError:  # out of descriptors, above all
                    self._interfaces = []
                    self.counters["mdns_failed"] += 1
                self._interfaces_until = now + _INTERFACES_FOR
            return self._interfaces


def _write_query(labels: Labels, kind: int, ident: int) -> bytes:
    name = b"".join(bytes([len(label)]) + label for label in labels)
    return struct.pack("!HHHHHH", ident, 0, 1, 0, 0, 0) + name + struct.pack("!xHH", kind, CLASS_IN)


def _is_reply(message: bytes) -> bool:
    return len(message) >= HEADER_LENGTH and flags_of(message) & (QR | OPCODE | RCODE) == QR


def _is_for(message: bytes, idents: frozenset[int], labels: Labels) -> bool:
    """Whether a reply to our own port has one of our IDs and our question (RFC 6762 6.7)."""
    asked = parse_question(message)
    return int.from_bytes(message[:2], "big") in idents and asked is not None and asked.labels == labels


def _read_data(message: bytes, record: Record) -> Any:
    """A record's data, with the names in it spelt out; None when it is malformed. Untrusted."""
    if record.type in (TYPE_PTR, TYPE_NS, _TYPE_SRV, TYPE_CNAME):
        before = 6 if record.type == _TYPE_SRV else 0
        name = read_name(message, record.at + before)
        if name is None or name[1] != record.at + len(record.data):
            return None
        if record.type in (TYPE_PTR, TYPE_NS):
            return name[0]
        wire = b"".join(bytes([len(label)]) + label for label in name[0]) + b"\0"
        return record.data[:before] + wire
    if record.type in _ADDRESSES and len(record.data) != (4 if record.type == TYPE_A else 16):
        return None
    return record.data


def _is_link_local(packed: bytes) -> bool:
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
