"""A time server for guests: SNTP (RFC 5905 14), from the host's clock.

A guest's clock stands still while the host sleeps or the machine is paused. Guests that keep time by NTP ask the
gateway (DHCP option 42), and are right again within a minute; no packet has to leave the host for that.

    0   leap 2 bits, version 3 bits, mode 3 bits; stratum 1; poll 1; precision 1 (log2 of seconds)
    4   root delay 4, root dispersion 4 (16.16 seconds), reference ID 4
    16  reference, originate, receive and transmit timestamps, 8 each (32.32 seconds since 1900)

Only client requests (mode 3) are answered, and an answer has the length of the shortest request, 48 bytes: nothing
here can be used to send somebody more than was asked for (CVE-2013-5211 was mode 7). Authenticators and extension
fields behind that are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

PORT: Final = 123

_CLIENT: Final = 3
_SERVER: Final = 4

# RFC 5905 7.3. VERSION 1 to 4 have the same first 48 bytes, and are answered in their own version.
_VERSIONS: Final = range(1, 5)

# first byte, stratum, poll, precision, root delay, root dispersion, reference ID, four timestamps
_PACKET: Final = Struct("!BBbbII4sQQQQ")

# Seconds from 1900 to 1970 (RFC 5905 figure 4).
_EPOCH: Final = 2208988800

# We do not know how far the host is from its own source of time. The stratum is that of a host that follows a public
# server of stratum 2; the reference ID is the name of the clock (RFC 5905 7.3), and no address, which it would be at
# this stratum for IPv4: guests use it to notice loops through themselves.
_STRATUM: Final = 3
_REFERENCE: Final = b"HOST"

# About a microsecond, what reading the clock is good for. Python's wall clock has more digits than meaning.
_PRECISION: Final = -20

# 10 ms, in units of 2**-16 s: what a host's clock under NTP is rarely further off than.
_DISPERSION: Final = 655

# Timestamps of the reference are given as of the last full 64 s: a clock that was never set says 0, and this one was.
_REFERENCE_AGE: Final = 64


@dataclass(slots=True)
class SntpServer:
    """Answers from a wall clock: clock() gives seconds since 1970."""

    clock: Callable[[], float]
    counters: Counter[str] = field(default_factory=Counter)

    def answer(self, payload: bytes) -> bytes | None:
        """Answer a datagram to port 123, or give None. Untrusted."""
        if len(payload) < _PACKET.size:
            self.counters["sntp_malformed"] += 1
            return None
        first, _, poll, _, _, _, _, _, _, _, transmit = _PACKET.unpack_from(payload)
        version = first >> 3 & 7
        if first & 7 != _CLIENT or version not in _VERSIONS:
            self.counters["sntp_not_a_request"] += 1
            return None
        self.counters["sntp_replies"] += 1
        seconds = self.clock()
        now = to_timestamp(seconds)
        return _PACKET.pack(
            # Leap indicator 0, no warning: the host's kernel inserts leap seconds itself, or its source smears them.
            version << 3 | _SERVER,
            _STRATUM,
            poll,
            _PRECISION,
            0,
            _DISPERSION,
            _REFERENCE,
            to_timestamp(seconds // _REFERENCE_AGE * _REFERENCE_AGE),
            # What the guest sent comes back, whatever it is: that is how it tells answers from forgeries.
            transmit,
            now,
            now,
        )


def to_timestamp(seconds: float) -> int:
    """Turn seconds since 1970 into an NTP timestamp of the current era (RFC 5905 6: eras wrap, in 2036 first)."""
    whole = int(seconds // 1)
    return (whole + _EPOCH & 0xFFFFFFFF) << 32 | int((seconds - whole) * 2**32)
