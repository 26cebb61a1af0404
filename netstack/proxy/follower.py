"""Keeps the settings true to the host: merges the sources, waits for changes to settle, tells who wants to know.

    a source changed -> wait DEBOUNCE for more of the same, MAX_DELAY at most -> merge all layers -> other settings,
    if they say anything else -> subscribers

The same shape as the DNS follower's, and for the same reason: what logs in to a VPN changes a dozen things in a row.
The settings are replaced in one assignment; connections that are open stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from netstack.proxy.layers import Layer, Merged, merge
from netstack.proxy.routes import describe_settings
from netstack.proxy.settings import ProxySettings
from netstack.proxy.sources import Source

DEBOUNCE: Final = 0.1
MAX_DELAY: Final = 0.3
_RESTART: Final = 5.0

Subscriber = Callable[[ProxySettings, ProxySettings], None]


class ProxyFollower:
    """What holds now, of `sources` in the order of their rank."""

    def __init__(self, sources: Sequence[Source], on_failure: Callable[[Exception], None] = lambda error: None) -> None:
        """on_failure is told of a bug that a change brought to light; following goes on."""
        self._sources = tuple(sources)
        self._on_failure = on_failure
        self._subscribers: list[Subscriber] = []
        self._changed = trio.Event()
        self._running = trio.CancelScope()
        self._merged: Merged = merge([source.current() for source in self._sources])

    @property
    def settings(self) -> ProxySettings:
        """What holds."""
        return self._merged.settings

    @property
    def layers(self) -> list[Layer]:
        """What each source says, the highest rank first."""
        return [source.current() for source in self._sources]

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have old and new settings told after each change. Subscribers must not raise."""
        self._subscribers.append(subscriber)

    def set_sources(self, sources: Sequence[Source]) -> None:
        """Follow these from now on."""
        self._sources = tuple(sources)
        self._running.cancel()
        self.rebuild()

    def rebuild(self) -> None:
        """Merge anew, and tell the subscribers if that says something else."""
        merged = merge([source.current() for source in self._sources])
        was, self._merged = self._merged, merged
        if merged.settings != was.settings:
            for subscriber in self._subscribers:
                subscriber(was.settings, merged.settings)

    async def run(self) -> None:
        """Follow until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._merge)
            while True:
                self._running = trio.CancelScope()
                with self._running:
                    async with trio.open_nursery() as watchers:
                        for source in self._sources:
                            watchers.start_soon(self._keep_running, source)
                        watchers.start_soon(trio.sleep_forever)  # where there is nothing to watch

    async def _keep_running(self, source: Source) -> None:
        """What a host says may be something that nobody thought of; the other sources go on, and this one again."""
        while True:
            try:
                await source.run(self._changed_now)
            except Exception as error:
                self._on_failure(error)
            await trio.sleep(_RESTART)

    def _changed_now(self) -> None:
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

    def describe(self) -> dict[str, Any]:
        """Each source, what won and why. No credentials are in it."""
        return {
            "effective": describe_settings(self.settings),
            "won": dict(self._merged.won),
            "sources": [layer.describe() for layer in self.layers],
        }
