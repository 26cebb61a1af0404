"""What became of each request: a line for the log, and counters. There is nothing secret in either.

A line has the host and port that were asked for and never the path, which may hold tokens; the way it took, where a
proxy is named without its credentials; and how it ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

# Kept for `netstack proxy show`.
_KEPT: Final = 100


class Record(NamedTuple):
    """One request or tunnel."""

    guest: str
    kind: str  # "http", "connect", "socks", "transparent http", "transparent tls", "transparent tcp"
    method: str
    host: str
    port: int
    route: str  # "direct", a proxy, or empty where none was taken
    status: int  # what the guest was answered; 0 where nothing could be
    seconds: float  # of a tunnel: until it was open
    error: str = ""


class Records:
    """The last requests, and the number of each kind."""

    def __init__(self, counters: Counter[str]) -> None:
        self.counters = counters
        self.on_record: Callable[[Record], None] | None = None
        self._last: deque[Record] = deque(maxlen=_KEPT)

    def add(self, record: Record) -> None:
        """A request has been answered, or a tunnel is open."""
        counters = self.counters
        counters["proxy_" + record.kind.replace(" ", "_")] += 1
        if record.error:
            counters["proxy_failed"] += 1
        elif record.route == "direct":
            counters["proxy_direct"] += 1
        elif record.route:
            counters["proxy_forwarded"] += 1
        self._last.append(record)
        if self.on_record is not None:
            self.on_record(record)

    def recent(self) -> list[dict[str, Any]]:
        """The last ones, the newest first."""
        return [record._asdict() | {"seconds": round(record.seconds, 4)} for record in reversed(self._last)]
