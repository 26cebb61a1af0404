"""Keeps the routing table true to the host: merges the sources, waits for changes to settle, tells who wants to know.

    a source changed -> wait DEBOUNCE for more of the same (a VPN client makes a dozen changes in a row), MAX_DELAY at
    most -> ask all sources for their scopes -> another table, if it says anything else -> subscribers

A table is replaced in one assignment, and nothing is torn down here: who is being asked meanwhile either answers, or
the subscriber that owns the question asks the new table (rule 50). The first table is made while the follower is, from
what can be read at once, so that the first query of the first guest has somebody to go to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import trio

from netstack.dns.routes import RoutingTable, Scope
from netstack.dns.sources import Source

# Seconds (rule 50 says 0.1 to 0.3).
DEBOUNCE = 0.1
MAX_DELAY = 0.3

Subscriber = Callable[[RoutingTable, RoutingTable], None]


class Follower:
    """The routing table that is in use.

    `own` are the gateway's addresses (packed), which are never asked. Scopes of the user's settings are put in with
    `set_user_scopes`, and stand beside those of `source`.
    """

    def __init__(
        self, source: Source, own: Collection[bytes] = (), on_failure: Callable[[Exception], None] = lambda error: None
    ) -> None:
        """on_failure is told of a bug that a change brought to light; following goes on."""
        self._source = source
        self._on_failure = on_failure
        self._own = frozenset(own)
        self._user: Sequence[Scope] = ()
        self._subscribers: list[Subscriber] = []
        self._changed = trio.Event()
        self._running = trio.CancelScope()
        self.table = RoutingTable(source.current(), own=self._own, version=1)

    @property
    def source(self) -> Source:
        """What the host is followed by."""
        return self._source

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have the old and the new table told after each change. Subscribers must not raise."""
        self._subscribers.append(subscriber)

    def set_user_scopes(self, scopes: Sequence[Scope]) -> None:
        """Take other settings, at once."""
        self._user = scopes
        self.rebuild()

    def set_source(self, source: Source) -> None:
        """Follow the host by something else from now on."""
        self._source = source
        self._running.cancel()
        self.rebuild()

    def rebuild(self) -> None:
        """Make the table anew from what is known, and tell the subscribers if it says something else."""
        scopes = [*self._user, *self._source.current()]
        search = tuple(dict.fromkeys(name for scope in self._user for name in scope.search))
        if search:
            # Search domains of the settings replace the host's.
            scopes = [scope if scope in self._user else _without_search(scope) for scope in scopes]
        fresh = RoutingTable(scopes, own=self._own, version=self.table.version + 1)
        if fresh.same_as(self.table):
            return
        was, self.table = self.table, fresh
        for subscriber in self._subscribers:
            subscriber(was, fresh)

    async def run(self) -> None:
        """Follow until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._merge)
            while True:
                self._running = trio.CancelScope()
                with self._running:
                    await self._source.run(self._on_changed)
                    await trio.sleep_forever()  # a source without anything to watch

    def _on_changed(self) -> None:
        self._changed.set()

    async def _merge(self) -> None:
        while True:
            await self._changed.wait()
            with trio.move_on_after(MAX_DELAY):
                while True:
                    self._changed = trio.Event()
                    with trio.move_on_after(DEBOUNCE) as quiet:
                        await self._changed.wait()
                    if quiet.cancelled_caught:
                        break
            # What comes between here and the next round sets the event again.
            self._changed = trio.Event()
            try:
                self.rebuild()
            except Exception as error:
                self._on_failure(error)


def _without_search(scope: Scope) -> Scope:
    return replace(scope, search=())
