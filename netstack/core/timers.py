"""Deadlines of flows: lists by the time of day, lazily kept.

A flow has one deadline, `timer_at`, that moves with almost every segment. Moving it later must cost nothing, so it is a
plain store: the earlier entry stays, and when that comes up, the flow is put back with its true deadline. Moving it
earlier adds a second entry; the first is then stale, recognised because it is not the flow's `heap_at`. Stale and
cancelled entries are swept out when they are the greater part, so that a closed flow is not kept alive by a deadline
far away, nor does an open one that moves its deadline to and fro leave an entry there each time.

Entries lie in slots of some milliseconds, and only the slots are in a heap. With 2,000 connections a second there are
10,000 entries, three of each connection, and a heap of all of them took a seventh of the interpreter's time: it
compares entries all over the memory. Deadlines are exact all the same: what of a slot is not due yet stays there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from netstack.core.ports import TimerOwner

NEVER = float("inf")

# Below this many stale entries a sweep is not worth its loop.
_SWEEP_MINIMUM = 1024

# Slots of a second: 8 ms each.
_SLOTS = 128

Entry = tuple[float, int, TimerOwner]


class Timers:
    """The deadlines of one stack. `on_earlier(deadline)` is called when the first deadline moves earlier."""

    def __init__(self, on_earlier: Callable[[float], None] | None = None) -> None:
        self._slots: dict[int, list[Entry]] = {}
        self._heap: list[int] = []  # the slots that there are
        self._first = NEVER  # no entry is earlier
        self._order = itertools.count()  # ties are run in the order they were armed, and owners are never compared
        self._count = 0
        self._cancelled = 0
        self.on_earlier = on_earlier

    def __len__(self) -> int:
        return self._count

    def entries(self) -> list[Entry]:
        """All of them, stale ones too: (time, number, owner)."""
        return [entry for slot in self._slots.values() for entry in slot]

    def arm(self, owner: TimerOwner, at: float) -> None:
        """Set the owner's one deadline, in place of the one it had."""
        owner.timer_at = at
        if at < owner.heap_at:
            if owner.heap_at != NEVER:
                self._cancelled += 1  # its later entry is stale now
            owner.heap_at = at
            self._put(at, owner)
            if self._cancelled > _SWEEP_MINIMUM and self._cancelled * 2 > self._count:
                self._sweep()
            if at < self._first:
                self._first = at
                if self.on_earlier is not None:
                    self.on_earlier(at)

    def cancel(self, owner: TimerOwner) -> None:
        """The owner is gone for good."""
        owner.timer_at = NEVER
        if owner.heap_at != NEVER:
            owner.heap_at = NEVER
            self._cancelled += 1
            if self._cancelled > _SWEEP_MINIMUM and self._cancelled * 2 > self._count:
                self._sweep()

    def _put(self, at: float, owner: TimerOwner) -> None:
        number = int(at * _SLOTS)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = []
            heapq.heappush(self._heap, number)
        slot.append((at, next(self._order), owner))
        self._count += 1

    def _sweep(self) -> None:
        """Keep one entry of each owner. A stale one may bear the time of the valid one: that came back to it."""
        live = {id(entry[2]): entry for entry in self.entries() if entry[2].heap_at == entry[0]}
        self._slots = {}
        for entry in live.values():
            self._slots.setdefault(int(entry[0] * _SLOTS), []).append(entry)
        self._heap = list(self._slots)
        heapq.heapify(self._heap)
        self._count = len(live)
        self._cancelled = 0

    def next_deadline(self) -> float:
        """When run() has something to look at; NEVER when nothing is armed. May be earlier than any true deadline."""
        return self._first

    def run(self, now: float, limit: int = 1000) -> None:
        """Call on_timer(now) of at most `limit` owners that are due; they arm themselves again if they want to."""
        if self._first > now:
            return
        last = int(now * _SLOTS)
        while limit > 0 and self._heap and self._heap[0] <= last:
            number = self._heap[0]
            due = self._take(number, now)
            if not due and number in self._slots:
                break  # the slot of now, and the rest of it comes later
            for i, (at, _, owner) in enumerate(due):
                if owner.heap_at != at:
                    self._note_stale()  # since it was taken out, by the on_timer of another
                elif owner.timer_at > now:
                    owner.heap_at = NEVER
                    self._put_again(owner)
                elif limit > 0:
                    owner.heap_at = owner.timer_at = NEVER
                    owner.on_timer(now)
                    limit -= 1
                else:
                    for early, _, other in due[i:]:
                        self._put(early, other)
                    break
        self._first = self._find_first()

    def _take(self, number: int, until: float) -> list[Entry]:
        """Take the valid entries due until then out of a slot, in order, and put those that moved where they belong.

        The slot must be the first one. It is gone when this returns, or holds what is later.
        """
        heapq.heappop(self._heap)
        slot = self._slots.pop(number)
        self._count -= len(slot)
        taken: list[Entry] = []
        for entry in slot:
            at, _, owner = entry
            if owner.heap_at != at:
                self._note_stale()
            elif owner.timer_at <= until:
                taken.append(entry)
            elif owner.timer_at > at:
                owner.heap_at = NEVER
                self._put_again(owner)
            else:
                self._put(at, owner)
        taken.sort()
        return taken

    def _put_again(self, owner: TimerOwner) -> None:
        at = owner.timer_at
        if at != NEVER:
            owner.heap_at = at
            self._put(at, owner)

    def _note_stale(self) -> None:
        if self._cancelled:
            self._cancelled -= 1

    def _find_first(self) -> float:
        """The first deadline; entries before it that are none are cleared away, or each would wake the rim for nothing.

        A connection that lives for a few milliseconds leaves several of them.
        """
        while self._heap:
            number = self._heap[0]
            first = min((owner.timer_at for at, _, owner in self._slots[number] if owner.heap_at == at), default=NEVER)
            if first < (number + 1) / _SLOTS:
                return first
            self._take(number, -NEVER)
        return NEVER
