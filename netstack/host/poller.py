"""The one owner of fd -> handler: a nested epoll (Linux) or kqueue (macOS) that trio waits for as one descriptor.

Theory of operation
-------------------
A trio task per socket would cost a trio turn per ready socket, some 5 us each; one nested poller costs one turn for all
(design law 1). So links and host sockets are all registered here, trio waits for the poller's own descriptor to be
readable, and `poll(0)` then gives everything that is ready. What one round did often makes the next one ready (a
request goes out, its answer is there 20 us later), so several rounds are made before going back to trio.

Work is bounded: a handler does a bounded amount in one call, a wakeup makes ROUNDS rounds, and then trio and its other
tasks have their turn.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from time import monotonic

import trio

from netstack.core.ports import FAILED, HUNG_UP, PEER_CLOSED, READABLE, WRITABLE, Handler

# Rounds after which trio gets its turn. 8 was the prototype's; the gain flattens beyond 4 (measured there).
ROUNDS = 8

# Events of one round. More are reported by the next one: the kernel rotates its list of ready descriptors.
_EVENTS = 512


# A trio turn costs some 20 us twice over in a round trip. When the last sleep was shorter than _SOON, polling a little
# longer would have caught its end, so the next wakeups poll up to _SPINS times more, yielding the processor in between,
# before they sleep; when sleeps are long again this goes back to none. KVM halt polling works so (virt/kvm/kvm_main.c,
# grow_halt_poll_ns). A round trip took 190 us without and 115 us with it, and no more CPU time (measured).
_SOON = 0.0001
_SPINS = 48

# Where somebody else wants the processor, one yield can cost a slice of the scheduler, 3 ms, in which a sleeper would
# have been woken and a socket's queue overflows (57 % of a UDP stream of 1 Gbit/s were lost, 22 % without the yields).
# All yields of one go together take some 50 us; if they took so much longer, none for the next wakeups.
_TAKEN_AWAY = 0.0003
_REST = 50


# Not every system has it in Python.
sched_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: None)


class HostPoller:
    """Level-triggered readiness for all links and host sockets of one network."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        # Registered in this round. The kernel gives the lowest free number to the next socket, so an event that is
        # still to be dispatched may be that of its predecessor, closed a moment ago.
        self._fresh: set[int] = set()
        if sys.platform == "linux":
            epoll = select.epoll()
            self._epoll = epoll
            self._fd = epoll.fileno()
            self._poll: Callable[[], list[tuple[int, int]]] = lambda: epoll.poll(0, _EVENTS)
        else:
            self._kqueue = select.kqueue()
            self._fd = self._kqueue.fileno()
            self._interest: dict[int, int] = {}
            self._poll = self._poll_kqueue

    def __len__(self) -> int:
        return len(self._handlers)

    def close(self) -> None:
        """Release the poller's descriptor; handlers close their own."""
        if sys.platform == "linux":
            self._epoll.close()
        else:
            self._kqueue.close()

    if sys.platform == "linux":

        def register(self, fd: int, handler: Handler, events: int) -> None:
            self._epoll.register(fd, events | PEER_CLOSED if events & READABLE else events)
            self._handlers[fd] = handler
            self._fresh.add(fd)

        def modify(self, fd: int, events: int) -> None:
            self._epoll.modify(fd, events | PEER_CLOSED if events & READABLE else events)

        def unregister(self, fd: int) -> None:
            if self._handlers.pop(fd, None) is not None:
                self._epoll.unregister(fd)

        def _poll_kqueue(self) -> list[tuple[int, int]]:
            raise NotImplementedError

    else:

        def register(self, fd: int, handler: Handler, events: int) -> None:
            self._handlers[fd] = handler
            self._fresh.add(fd)
            self._interest[fd] = 0
            self.modify(fd, events)

        def modify(self, fd: int, events: int) -> None:
            changes = []
            was = self._interest[fd]
            for bit, kind in ((READABLE, select.KQ_FILTER_READ), (WRITABLE, select.KQ_FILTER_WRITE)):
                if (was ^ events) & bit:
                    flag = select.KQ_EV_ADD if events & bit else select.KQ_EV_DELETE
                    changes.append(select.kevent(fd, kind, flag))
            self._interest[fd] = events
            if changes:
                self._kqueue.control(changes, 0)

        def unregister(self, fd: int) -> None:
            if self._handlers.pop(fd, None) is not None:
                self.modify(fd, 0)
                del self._interest[fd]

        def _poll_kqueue(self) -> list[tuple[int, int]]:
            ready: dict[int, int] = {}
            for event in self._kqueue.control(None, _EVENTS, 0):
                bits = READABLE if event.filter == select.KQ_FILTER_READ else WRITABLE
                if event.flags & select.KQ_EV_EOF:
                    bits |= READABLE | PEER_CLOSED
                    if event.fflags:
                        bits |= FAILED | HUNG_UP
                ready[event.ident] = ready.get(event.ident, 0) | bits
            return list(ready.items())

    async def run(self, end_round: Callable[[float], None], on_crash: Callable[[Handler, Exception], None]) -> None:
        """Dispatch readiness for ever. `end_round(now)` is called when nothing more is ready, or trio's turn comes.

        An exception of one handler is a bug; it is reported with on_crash(handler, error), which must end that handler
        (its flow, its link), and the others go on.
        """
        poll = self._poll
        find = self._handlers.get
        fresh = self._fresh
        spins = resting = 0
        idle_since = monotonic()
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            now = monotonic()
            if resting:
                resting -= 1
            elif now - idle_since < _SOON:
                spins = min(_SPINS, spins * 2 + 8)
            else:
                spins >>= 1
            for _ in range(ROUNDS):
                ready = poll()
                if not ready and spins:
                    begun = monotonic()
                    for _ in range(spins):
                        sched_yield()
                        ready = poll()
                        if ready:
                            break
                    if monotonic() - begun > _TAKEN_AWAY:
                        spins = 0
                        resting = _REST
                if not ready:
                    break
                now = monotonic()
                fresh.clear()
                for fd, events in ready:
                    handler = find(fd)
                    if handler is not None and fd not in fresh:
                        try:
                            handler.on_ready(events, now)
                        except Exception as error:
                            on_crash(handler, error)
                # Answers leave now: what they cause on the other side may be ready in the next round.
                end_round(now)
            idle_since = monotonic()
