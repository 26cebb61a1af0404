"""The memory that flows read into from the host, and that holds what is in flight until the guest acknowledges it.

Theory of operation
-------------------
A read goes into `scratch`. A small one is copied out of it, as most reads are small; a large one keeps the whole buffer
(`keep`), and the next read gets another one: one that a guest has acknowledged since, where there is one. New memory
costs a page fault for every 4 KiB (98,000 a gigabyte, a fifth of the CPU time of a transfer to a guest, measured),
memory used a moment ago is in the cache.

How much one read may take decides how often the host's sender is acknowledged and woken: where a frame carries 64 KiB,
reads of up to 1 MiB in place of 256 KiB take a fifth less CPU time for a gigabyte (measured). Where frames are small
nothing is to be had, and a guest's queue of 1,000 frames to overflow. So a stack has chunks of two sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from netstack.core.ports import Link

# One read from the host, cut to whole segments: it bounds the work of one call. 180 frames of 1,500 bytes.
CHUNK = 1 << 18
LARGE_CHUNK = 1 << 20

# What chunks that nobody uses may hold, of each size.
POOLED = 8 << 20


class Chunks:
    """Buffers of one size for all flows of a stack."""

    __slots__ = ("_acked", "_free", "keep_from", "scratch", "size")

    def __init__(self, size: int, keep_from: int) -> None:
        """`size`: bytes of each; a read of more than `keep_from` keeps its buffer."""
        self.size = size
        self.keep_from = keep_from
        self.scratch: NDArray[np.uint8] = np.empty(size, dtype=np.uint8)
        self._free: list[NDArray[np.uint8]] = []
        self._acked: list[tuple[Link, NDArray[np.uint8]]] = []

    def __len__(self) -> int:
        """How many there are that nobody uses."""
        return len(self._free) + len(self._acked)

    def keep(self, length: int) -> memoryview:
        """What the last read left in `scratch`; another buffer takes its place."""
        view = self.scratch.data[:length]
        self.scratch = self._free.pop() if self._free else np.empty(self.size, dtype=np.uint8)
        return view

    def on_acked(self, link: Link, chunk: NDArray[np.uint8]) -> None:
        """The guest says that it has all that this buffer held."""
        self._acked.append((link, chunk))

    def recycle(self) -> None:
        """Let acknowledged buffers be read into again. To be called when links have been flushed.

        A guest may acknowledge what it has not received yet. What is still queued on its link by reference would then
        show it the data of another flow, so only buffers of links with an empty queue are used again.
        """
        if self._acked:
            most = POOLED // self.size
            for link, chunk in self._acked:
                if not link.backlog and len(self._free) < most:
                    self._free.append(chunk)
            self._acked.clear()
