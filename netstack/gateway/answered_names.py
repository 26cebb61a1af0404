"""Which name our DNS gave a guest which address for: what a connection without a name of its own is about.

Kept only while somebody asks for it: while TLS connections of guests are intercepted (`proxy.transparent`). A guest is
its MAC, since it may ask over IPv4 and connect over IPv6. The oldest entries make room; an answer that is older than
that is not missed, because it only matters where a ClientHello has no name in it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from netstack.dns.message import CLASS_IN, TYPE_A, TYPE_AAAA, parse_question
from netstack.dns.records import read_answers

if TYPE_CHECKING:
    from netstack.core.neighbors import Neighbors
    from netstack.core.ports import Datagram

# Some 300 bytes each.
_MAX_NAMES: Final = 8192
# Of one answer: real ones have a dozen.
_MAX_RECORDS: Final = 32

_LABEL = re.compile(rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


class AnsweredNames:
    """The last names, by guest and address."""

    def __init__(self, neighbors: Neighbors) -> None:
        self._neighbors = neighbors
        self._names: OrderedDict[tuple[bytes, bytes], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def on_answer(self, datagram: Datagram, answer: bytes) -> None:
        """An answer goes to a guest: to this query. Untrusted: an upstream made it."""
        question = parse_question(answer)
        if question is None or question.type not in (TYPE_A, TYPE_AAAA) or not question.labels:
            return
        if not all(map(_LABEL.fullmatch, question.labels)):
            return
        size = 4 if question.type == TYPE_A else 16
        name = b".".join(question.labels).decode("ascii")
        names = self._names
        for record in (read_answers(answer, question.end) or ())[:_MAX_RECORDS]:
            if record.type == question.type and record.class_ == CLASS_IN and len(record.data) == size:
                key = (datagram.mac, record.data)
                names[key] = name
                names.move_to_end(key)
        while len(names) > _MAX_NAMES:
            names.popitem(last=False)

    def find(self, guest: bytes, address: bytes) -> str | None:
        """The name by which the guest at this address asked for that address, both packed."""
        neighbor = self._neighbors.find(guest)
        return self._names.get((neighbor.mac, address)) if neighbor is not None else None

    def clear(self) -> None:
        """Forget them: nobody asks any more."""
        self._names.clear()
