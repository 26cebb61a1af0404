"""Deadlines of flows: one heap, lazily kept.

A flow has one deadline, `timer_at`, that moves with almost every segment. Moving it later must cost nothing, so it is a
plain store: the heap keeps the earlier entry, and when that comes up, the flow is put back with its true deadline.
Moving it earlier pushes a second entry; the first is then stale, recognised because it is not the flow's `heap_at`.
Stale and cancelled entries are swept out when they are the greater part of the heap, so that a closed flow is not kept
alive by a deadline far away, nor does an open one that moves its deadline to and fro leave an entry there each time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from netstack.core.ports import TimerOwner

NEVER = float("inf")

# Below this many entries a sweep is not worth its loop.
_SWEEP_MINIMUM = 1024


class Timers:
    """The deadlines of one stack. `on_earlier(deadline)` is called when the first deadline moves earlier."""

    def __init__(self, on_earlier: Callable[[float], None] | None = None) -> None:
        self._heap: list[tuple[float, int, TimerOwner]] = []
        self._order = itertools.count()  # ties are run in the order they were armed, and owners are never compared
        self._cancelled = 0
        self.on_earlier = on_earlier

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, owner: TimerOwner, at: float) -> None:
        """Set the owner's one deadline, in place of the one it had."""
        owner.timer_at = at
        if at < owner.heap_at:
            if owner.heap_at != NEVER:
                self._cancelled += 1  # its later entry is stale now
            owner.heap_at = at
            heap = self._heap
            heapq.heappush(heap, (at, next(self._order), owner))
            if self._cancelled > _SWEEP_MINIMUM and self._cancelled * 2 > len(heap):
                self._sweep()
                heap = self._heap
            if heap[0][0] == at and self.on_earlier is not None:
                self.on_earlier(at)

    def cancel(self, owner: TimerOwner) -> None:
        """The owner is gone for good."""
        owner.timer_at = NEVER
        if owner.heap_at != NEVER:
            owner.heap_at = NEVER
            self._cancelled += 1
            if self._cancelled > _SWEEP_MINIMUM and self._cancelled * 2 > len(self._heap):
                self._sweep()

    def _sweep(self) -> None:
        """Keep one entry of each owner. A stale one may bear the time of the valid one: that came back to it."""
        live = {id(entry[2]): entry for entry in self._heap if entry[2].heap_at == entry[0]}
        self._heap = list(live.values())
        heapq.heapify(self._heap)
        self._cancelled = 0

    def next_deadline(self) -> float:
        """When run() has something to look at; NEVER when nothing is armed. May be earlier than any true deadline."""
        return self._heap[0][0] if self._heap else NEVER

    def run(self, now: float, limit: int = 1000) -> None:
        """Call on_timer(now) of at most `limit` owners that are due; they arm themselves again if they want to."""
        heap = self._heap
        while heap and heap[0][0] <= now and limit > 0:
            at, _, owner = heapq.heappop(heap)
            if owner.heap_at != at:
                if self._cancelled:
                    self._cancelled -= 1
                continue
            owner.heap_at = NEVER
            due = owner.timer_at
            if due <= now:
                owner.timer_at = NEVER
                owner.on_timer(now)
                limit -= 1
            elif due != NEVER:
                owner.heap_at = due
                heapq.heappush(heap, (due, next(self._order), owner))
            heap = self._heap  # on_timer may have swept
