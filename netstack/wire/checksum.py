"""The Internet checksum (RFC 1071), as arithmetic modulo 65535.

A one's complement sum of 16-bit words is their sum modulo 65535, where 0 has two spellings, 0x0000 and 0xffff. Hence
sums can be added in any order and any word size (2**16 is 1 modulo 65535), and taken over the bytes in the wrong order
if the result is swapped (RFC 1071 2B). Every function here returns some integer congruent to the true sum; `finish`
turns it into the field.
"""

from __future__ import annotations

import numpy as np

from netstack.wire import Buffer

# int.from_bytes and the division cost 1.8 ns a byte; NumPy costs 1.7 us a call and then 0.06 ns a byte. They meet at
# some 900 bytes (CPython 3.11, NumPy 2.4, x86-64, best of 5; 40 bytes: 0.2 and 1.8 us, 64 KiB: 116 and 5.6 us).
NUMPY_PAYS_FROM = 900

_LITTLE_WORDS = np.dtype("<u4")
_UINT64 = np.uint64
_add = np.add.reduce


def sum_words(view: Buffer) -> int:
    """One's complement sum of the big-endian 16-bit words, 0..65534. An odd tail counts as padded with a zero byte."""
    length = len(view)
    if length < NUMPY_PAYS_FROM:
        total = int.from_bytes(view, "big")
        return (total << 8 if length & 1 else total) % 65535
    # 64 bits never overflow here: it takes 2**32 words of 32 bits.
    total = int(_add(np.frombuffer(view, _LITTLE_WORDS, length >> 2), dtype=_UINT64))
    tail = length & 3
    if tail:
        total += int.from_bytes(view[length - tail :], "little")
    total %= 65535
    return total >> 8 | (total & 0xFF) << 8


def pseudo_sum(src: bytes, dst: bytes, protocol: int, length: int) -> int:
    """Sum of the pseudo-header: RFC 9293 3.1 for 4-byte addresses, RFC 8200 8.1 for 16-byte ones.

    The two headers differ in layout only: after folding, what counts is both addresses, the protocol and the length.
    """
    return (int.from_bytes(src + dst, "big") + protocol + length) % 65535


def finish(total: int) -> int:
    """The value of the checksum field for a total of words (any integer >= 0 congruent to their sum).

    Never 0, which in UDP would mean "no checksum" (RFC 768; RFC 8200 8.1). Where the sum is zero it gives 0xffff, the
    other zero, which every receiver's arithmetic accepts as well.
    """
    return 65535 - total % 65535
