"""Bytes that both ends can make without having been sent them, and in which every block knows its place.

A block that is lost, doubled, moved or damaged on the way changes the SHA-256 of the whole. Used in the guest and by
the servers on the host.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 1 << 16
_RANDOM = 1 << 20


def pattern_blocks(length: int) -> Iterator[bytes]:
    """The first `length` bytes of the pattern, in blocks of 64 KiB."""
    noise = random.Random(5).randbytes(_RANDOM + BLOCK)
    for number in range(-(-length // BLOCK)):
        start = number * 40503 % _RANDOM  # coprime to the range: no two neighbours are alike
        block = number.to_bytes(8, "big") + noise[start : start + BLOCK - 8]
        yield block[: length - number * BLOCK]


def pattern(length: int) -> bytes:
    """The first `length` bytes of the pattern."""
    return b"".join(pattern_blocks(length))


def pattern_digest(length: int) -> str:
    """The SHA-256 of the first `length` bytes of the pattern, in hexadecimal."""
    digest = hashlib.sha256()
    for block in pattern_blocks(length):
        digest.update(block)
    return digest.hexdigest()
