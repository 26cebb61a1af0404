"""Guests that ask by multicast: the answers of the host's neighbors for them (rule 58).

systemd's resolver, and libc with nss-mdns, ask for names in .local at 224.0.0.251 and ff02::fb, port 5353, and never at
a nameserver. The switch carries that to the other guests. Here it is looked at, too: each question is asked on the
host's networks (netstack.dns.mdns), and what is found goes back to the guest that asked: by multicast as a response
(RFC 6762 6), or to its port where that is not 5353 (6.7).

Nothing is said for names that are not found: other guests may have them. Nothing is answered by itself, and nothing of
the guests is told on the host's networks. A message has eight questions at most, and a guest eight on their way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING, Final

from netstack.core.ports import Datagram, Link
from netstack.dns.answers import Labels
from netstack.dns.mdns import Found, Mdns
from netstack.dns.mdns_sockets import PORT
from netstack.dns.message import CLASS_IN, HEADER_LENGTH, MAX_UDP, OPCODE, QR, Question, flags_of
from netstack.dns.records import read_name

if TYPE_CHECKING:
    import trio

# Packed, as guests' datagrams have them.
GROUPS: Final = (bytes((224, 0, 0, 251)), bytes((0xFF, 2)) + bytes(13) + b"\xfb")

MAX_QUESTIONS: Final = 8

_QUESTION_TAIL = Struct("!HH")
_HEADER_TAIL = Struct("!HHHHH")
_RECORD_TAIL = Struct("!HHIH")
_MAX_BODY = MAX_UDP - 300  # less the header and a question
_CLASS = 0x7FFF  # the top bit asks for an answer by unicast (RFC 6762 5.4)
_RESPONSE_FLAGS = 0x8400  # RFC 6762 18.2, 18.4: QR and AA


@dataclass(slots=True)
class GuestMdns:
    """Answers multicast questions of guests.

    send(datagram, payload, to_group) sends an answer to the guest that a datagram came from: to the group that it
    asked, or to the port from which it asked.
    """

    mdns: Mdns
    nursery: trio.Nursery
    send: Callable[[Datagram, bytes, bool], None]
    counters: Counter[str] = field(default_factory=Counter)
    _asking: Counter[Link] = field(init=False, default_factory=Counter)

    def on_datagram(self, datagram: Datagram, now: float) -> None:
        """Take a datagram from a guest to port 5353. Untrusted."""
        message = bytes(datagram.payload)
        # Responses are for guests; a guest that claims a name asks with records in it (RFC 6762 8.1), and asks guests.
        if len(message) < HEADER_LENGTH or flags_of(message) & (QR | OPCODE) or message[8:10] != b"\0\0":
            return
        position = HEADER_LENGTH
        for _ in range(min(int.from_bytes(message[4:6], "big"), MAX_QUESTIONS)):
            name = read_name(message, position)
            if name is None or name[1] + _QUESTION_TAIL.size > len(message):
                self.counters["mdns_malformed"] += 1
                return
            kind, class_ = _QUESTION_TAIL.unpack_from(message, name[1])
            position = name[1] + _QUESTION_TAIL.size
            labels = tuple(label.lower() for label in name[0])
            question = Question(labels, kind, class_ & _CLASS, position)
            if not self.mdns.claims(question):
                continue
            if self._asking[datagram.link] >= MAX_QUESTIONS:
                self.counters["mdns_refused"] += 1
                continue
            self._asking[datagram.link] += 1
            self.nursery.start_soon(self._answer, datagram, message[:2], labels, kind)

    async def _answer(self, datagram: Datagram, ident: bytes, labels: Labels, kind: int) -> None:
        try:
            found = await self.mdns.lookup(labels, kind)
            if found is None or not found.records:
                return
            to_group = datagram.src_port == PORT
            payload = _write(labels, kind, b"\0\0" if to_group else ident, found, with_question=not to_group)
            self.counters["mdns_answers_to_guests"] += 1
            self.send(datagram, payload, to_group)
        except Exception:
            # What goes wrong with one question must not end the network of all guests.
            self.counters["mdns_guest_failed"] += 1
        finally:
            self._asking[datagram.link] -= 1
            if not self._asking[datagram.link]:
                del self._asking[datagram.link]


def _write(labels: Labels, kind: int, ident: bytes, found: Found, *, with_question: bool) -> bytes:
    """A response, without compression; the question comes back only in those to other ports (RFC 6762 6, 6.7)."""
    name = _to_wire(labels)
    body = b""
    count = 0
    for type_, data in found.records:
        rdata = data if isinstance(data, bytes) else _to_wire(data)
        record = name + _RECORD_TAIL.pack(type_, CLASS_IN, found.ttl, len(rdata)) + rdata
        if count and len(body) + len(record) > _MAX_BODY:
            break
        body += record
        count += 1
    question = name + _QUESTION_TAIL.pack(kind, CLASS_IN) if with_question else b""
    return ident + _HEADER_TAIL.pack(_RESPONSE_FLAGS, with_question, count, 0, 0) + question + body


def _to_wire(labels: Labels) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
