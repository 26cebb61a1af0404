"""What happens in a network, told to whoever listens now: `GET /v1/events`, as server-sent events.

Theory of operation
-------------------
Whoever makes something happen calls `EventHub.publish(kind, fields)`, a plain call that never waits and never raises.
Where nobody asked for that kind it is one look into a set; callers that would have to make text for it ask `wants`
first, as the stack does with `Events.debug`.

Each listener has a queue of its own, bounded: one that reads slower than things happen loses the oldest and is told how
many, as an event of the kind `lost`; nobody else waits for it. Nothing is kept for those who come later: what is now is
asked for with a GET, and a listener that subscribes first and asks then misses nothing.

On the wire (HTML standard, 9.2 "Server-sent events"): a comment at once, so that the client knows that it is heard,
then

    id: 17
    event: lease
    data: {"time":"2026-01-31T12:00:00.123Z","what":"bound","mac":"52:54:00:12:34:56",...}

and a comment every 15 s, which keeps proxies awake and finds out about listeners that are gone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import trio

KINDS: Final = ("guest", "lease", "forward", "flow", "link", "warning")

# What a listener that does not read may cost: some 200 bytes each.
MAX_WAITING: Final = 4096
MAX_LISTENERS: Final = 64

KEEP_AWAKE: Final = 15.0  # seconds; the HTML standard suggests "every 15 seconds or so"


class Event(NamedTuple):
    """One thing that happened."""

    number: int  # 0: it is no change, but what is now
    kind: str
    fields: Mapping[str, Any]


class TooManyListenersError(Exception):
    """There are as many as may be."""


class EventHub:
    """Who listens to what."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._wanted: frozenset[str] = frozenset()
        self._number = 0

    def wants(self, kind: str) -> bool:
        """Whether anybody listens to this kind."""
        return kind in self._wanted

    def publish(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Tell everybody who asked for this kind. The fields must be ready for JSON, and are not changed afterwards."""
        if kind not in self._wanted:
            return
        self._number += 1
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = Event(self._number, kind, {"time": time, **fields})
        for listener in self._listeners:
            if kind in listener.kinds:
                listener.put(event)

    def listen(self, kinds: Iterable[str] = KINDS) -> Listener:
        """Begin to listen; the end is Listener.close(). Raises TooManyListenersError."""
        if len(self._listeners) >= MAX_LISTENERS:
            raise TooManyListenersError
        listener = Listener(self, frozenset(kinds))
        self._listeners.add(listener)
        self._update()
        return listener

    def forget(self, listener: Listener) -> None:
        """It listens no more."""
        self._listeners.discard(listener)
        self._update()

    def _update(self) -> None:
        self._wanted = frozenset().union(*(listener.kinds for listener in self._listeners))


class Listener:
    """One that listens. Read it from one task."""

    def __init__(self, hub: EventHub, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self._hub = hub
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._arrived = trio.Event()

    def put(self, event: Event) -> None:
        """Something happened."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._arrived.set()

    async def wait(self, seconds: float) -> list[Event]:
        """What happened since the last call; it waits for something to happen, so long at most."""
        with trio.move_on_after(seconds):
            await self._arrived.wait()
        self._arrived = trio.Event()
        events = list(self._waiting)
        self._waiting.clear()
        if self._lost:
            events.insert(0, Event(events[0].number - 1, "lost", {"events": self._lost}))
            self._lost = 0
        return events

    def close(self) -> None:
        """Listen no more. May be called twice."""
        self._hub.forget(self)


def write_event(event: Event) -> bytes:
    """One event as it goes over the wire. JSON has no line ends in it, so that it is one `data` line."""
    data = json.dumps(event.fields, separators=(",", ":"), default=str)
    ident = f"id: {event.number}\n" if event.number else ""
    return f"{ident}event: {event.kind}\ndata: {data}\n\n".encode()
