"""What all links have in common: the queue of frames toward the guest, its bounds, counters, and the capture.

Theory of operation
-------------------
The stack queues frames during a wakeup and calls `flush` once; a subclass hands them to the kernel. What the kernel
does not take stays queued and the poller is asked for writability. Two marks bound the queue, in bytes:

    backlog > CONGESTED   `congested`: TCP flows stop reading from their host sockets and wait with wait_drained();
                          nothing is lost, the host's TCP slows down
    backlog > FULL        frames are dropped and counted; TCP retransmits, everything else is used to loss

so a guest that does not read costs FULL bytes, and nobody else waits for it. The queue ends at frame borders: a frame
whose first bytes are gone is always finished.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from netstack.core.ports import READABLE, WRITABLE, Buffer, Capture, DrainWaiter, Link, Offload, Poller

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

    from netstack.core.runs import Run

# Four reads of a flow from the host. A local socket drains this in about a millisecond.
CONGESTED = 1 << 20
FULL = 4 << 20

# Reads from the guest: a batch of 700 frames of 1,500 bytes, or of 16 of 64 KiB. passt uses 1 MiB and more as well.
READ_BUFFER = 1 << 20


# How the reason begins for which a link was closed whose other side broke its rules.
VIOLATION = "violation: "


class ReceiveFrames(Protocol):
    """Stack.receive_frames: takes a batch of frames, and where in it runs are (`core.runs`)."""

    def __call__(
        self, link: Link, buffer: memoryview, spans: Sequence[int], now: float, runs: Sequence[Run] = ..., /
    ) -> None: ...


class BaseLink(ABC):
    """A link's queue and counters. Subclasses own a file descriptor and know its framing."""

    prefix = 0
    direct = False

    def __init__(self, name: str, mtu: int, poller: Poller, receive: ReceiveFrames) -> None:
        """`receive` is Stack.receive_frames; `mtu` the largest IP packet this kind of link and its settings allow."""
        self.name = name
        self.mtu = mtu
        self.backlog = 0
        self.congested = False
        self.closed = False
        self.macs_high = self.macs_low = -1
        self.known_macs: set[tuple[int, int]] = set()
        self.interface = 0
        self.capture: Capture | None = None
        self.offload: Offload | None = None
        self.frames_from_guest = self.bytes_from_guest = 0
        self.frames_to_guest = self.bytes_to_guest = 0
        self.drops_to_guest = 0
        self.on_closed: Callable[[str], None] | None = None
        self._poller = poller
        self._receive = receive
        self._waiters: list[DrainWaiter] = []
        self._waits_writable = False
        self._captured: list[tuple[Any, ...]] = []

    def forget_macs(self) -> None:
        """Have the next frame of each guest take the slow road: one of them may have moved."""
        self.macs_high = self.macs_low = -1
        self.known_macs.clear()

    # ---- the queue -------------------------------------------------------------------------------------------------

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        """Fill what stands before a frame; here nothing does."""
        del buffer, frame_length

    def queue_frame(self, head: Buffer, payload: Buffer | None = None) -> None:
        """Queue one frame in one or two pieces."""
        if self.backlog > FULL or self.closed:
            self.drops_to_guest += 1
            return
        size = len(head) if payload is None else len(head) + len(payload)
        self.backlog += size
        self.frames_to_guest += 1
        self.bytes_to_guest += size - self.prefix
        if self.capture is not None:
            self._captured.append(
                (memoryview(head)[self.prefix :],) if payload is None else (memoryview(head)[self.prefix :], payload)
            )
        self._put_frame(head, payload)
        if self.backlog > CONGESTED:
            self.flush()

    def queue_burst(self, frames: NDArray[uint8]) -> None:
        """Queue k frames of equal length, one in each row."""
        k = len(frames)
        if self.backlog > FULL or self.closed:
            self.drops_to_guest += k
            return
        size = frames.size
        self.backlog += size
        self.frames_to_guest += k
        self.bytes_to_guest += size - k * self.prefix
        if self.capture is not None:
            self._captured.extend((memoryview(row)[self.prefix :],) for row in frames)
        self._put_burst(frames)
        if self.backlog > CONGESTED:
            self.flush()

    @abstractmethod
    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None: ...

    @abstractmethod
    def _put_burst(self, frames: NDArray[uint8]) -> None: ...

    @abstractmethod
    def flush(self) -> None:
        """Hand what is queued to the kernel."""

    def write_capture(self) -> None:
        """Give the frames queued since the last flush to the capture, behind those that they answer."""
        captured, self._captured = self._captured, []
        if self.capture is not None:
            for pieces in captured:
                self.capture.frame(self.interface, pieces, to_guest=True)

    def reserve(self, header: int, limit: int) -> list[memoryview]:
        """There is none of the guest's memory to receive into, unless a link says so (`direct`)."""
        del header, limit
        return []

    def commit(self, head: Buffer, length: int) -> None:
        """Never called where nothing was reserved."""
        del head, length

    # ---- back-pressure ---------------------------------------------------------------------------------------------

    def wait_drained(self, waiter: DrainWaiter) -> None:
        """Call waiter.on_drained(now) once the backlog is gone."""
        self._waiters.append(waiter)

    def note_backlog(self, now: float | None = None) -> None:
        """After the kernel took something, or refused: set `congested`; with `now` also clear it, and wake who waited.

        Only on_ready() has a `now`, so a link that is congested stays registered for writability until it comes there.
        """
        if self.backlog > CONGESTED:
            self.congested = True
        elif now is not None and self.congested and self.backlog <= CONGESTED >> 1:
            self.congested = False
            self.wake_waiters(now)

    def _watch_writability(self, fd: int, waits: bool) -> None:
        """Have on_ready() called when the kernel takes more, for as long as something waits for that."""
        if waits != self._waits_writable and not self.closed:
            self._waits_writable = waits
            self._poller.modify(fd, READABLE | WRITABLE if waits else READABLE)

    def wake_waiters(self, now: float) -> None:
        waiters, self._waiters = self._waiters, []
        for i, waiter in enumerate(waiters):
            if self.congested:
                self._waiters[:0] = waiters[i:]  # the first ones filled it again; the rest keep their turn
                return
            waiter.on_drained(now)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, why: str) -> None:
        """End this link, once; `on_closed(why)` is told."""
        if self.closed:
            return
        self.closed = True
        self.backlog = 0
        self.congested = False
        self._waiters.clear()
        self._captured.clear()
        self._close()
        if self.on_closed is not None:
            self.on_closed(why)

    @abstractmethod
    def _close(self) -> None:
        """Unregister and close the descriptor."""


class LinkPart:
    """What the poller wakes for a further descriptor of a link's; a crash of it is the link's."""

    def __init__(self, link: BaseLink) -> None:
        self.link = link
