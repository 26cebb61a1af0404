"""Bytes to fields and back, one module per protocol: pure functions, no state, no IO.

The grammar is the same everywhere. `parse_x(buffer, start, end)` reads the header that begins at `start`, in a buffer
whose valid bytes for this unit end at `end`; the caller owes 0 <= start <= end <= len(buffer) and owes nothing about
the bytes. It returns a NamedTuple whose offsets count from the beginning of the same buffer, so that nothing is ever
sliced on the way down, or None for whatever cannot be read: it never raises. `write_x(...)` returns bytes, checksums
filled in.

Addresses are `bytes`, 4 or 16 of them; the length tells the family. A MAC is 6 bytes.

Checksums of what guests send are not verified: the link is a socket or shared memory of this very machine, and with
checksum offload (virtio 5.1.6.2) the field legitimately holds a partial sum.
"""

from __future__ import annotations

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
