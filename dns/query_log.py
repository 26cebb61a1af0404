"""The last queries of guests, for people to look at; and the answers to those that come again and again.

The log is a ring of plain tuples: putting one in costs a tenth of a microsecond, and text is made when somebody looks.

The same query again, to the byte but for its ID, is most of what busy guests send (the C library keeps no answers). For
those the answer is remembered as it left, until its TTLs count down by one more second, or something changes that it
came from: then one look-up takes the place of reading the query.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from netstack.dns.routes import format_name

# Queries that are remembered for people to look at.
LOG_LENGTH = 1000

# Answers that are remembered as they left: some 700 bytes each.
_ANSWERS = 4096
# The longest query for which that is done; real ones are below 100 bytes.
_MAX_QUERY = 512


class Logged(NamedTuple):
    """One query of the log. at is of the resolver's clock."""

    at: float
    guest: bytes | str
    name: tuple[bytes, ...]
    type: int
    route: str
    rcode: int
    seconds: float
    cached: bool


class QueryLog:
    """The ring."""

    def __init__(self) -> None:
        self.on_query: Callable[[Logged], None] | None = None
        """Told of each query that was answered; must not raise."""
        self._ring: deque[tuple[float, bytes | str, Logged]] = deque(maxlen=LOG_LENGTH)

    def add(self, logged: Logged) -> None:
        self._ring.append((logged.at, logged.guest, logged))
        if self.on_query is not None:
            self.on_query(logged)

    def add_again(self, logged: Logged, at: float, guest: bytes | str) -> None:
        """The same once more, at another time and for another guest perhaps."""
        self._ring.append((at, guest, logged))
        if self.on_query is not None:
            self.on_query(logged._replace(at=at, guest=guest))

    def recent(self, now: float) -> list[tuple[float, str, str, int, str, int, float, bool]]:
        """The last queries, the newest first: (seconds ago, guest, name, type, route, rcode, ms, cached)."""
        return [
            (
                round(now - at, 3),
                format_guest(guest),
                format_name(entry.name),
                entry.type,
                entry.route,
                entry.rcode,
                round(entry.seconds * 1000, 3),
                entry.cached,
            )
            for at, guest, entry in reversed(self._ring)
        ]


class _Remembered(NamedTuple):
    """An answer as it left, without its ID."""

    until: float
    version: int
    answer: bytes
    logged: Logged


class Answers:
    """Answers as they left, by the bytes of the query. Both without their IDs."""

    def __init__(self) -> None:
        self._answers: dict[bytes, _Remembered] = {}

    def find(self, wire: bytes, now: float, version: int) -> tuple[bytes, Logged] | None:
        """The answer, and what the log had to say of it. Untrusted. version is that of everything it came from."""
        key = wire[2:]
        found = self._answers.get(key)
        if found is None:
            return None
        until, known, answer, logged = found
        if now >= until or known != version:
            del self._answers[key]
            return None
        return wire[:2] + answer, logged

    def keep(self, wire: bytes, answer: bytes, until: float, version: int, logged: Logged) -> None:
        if len(wire) <= _MAX_QUERY:
            if len(self._answers) >= _ANSWERS:
                self._answers.clear()
            self._answers[wire[2:]] = _Remembered(until, version, answer[2:], logged)

    def clear(self) -> None:
        self._answers.clear()


def format_guest(guest: bytes | str) -> str:
    """A guest of the log, as text."""
    if isinstance(guest, str):
        return guest
    return str(ipaddress.ip_address(guest)) if len(guest) in (4, 16) else ""
