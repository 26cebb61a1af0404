"""The records of a message that we have to look into: the answer for an alias, and mDNS replies.

Answers of nameservers are handed on as bytes (netstack.dns.message); this is only for the few that are not. dnslib
would not do: it refuses labels that are not ASCII, which mDNS has ("Bob’s Printer"), and can be kept busy for a second
by a message of compressed names. Here the number of records, of pointers in a name, and the length of a name are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from netstack.dns.message import HEADER_LENGTH, skip_name

_COUNTS = Struct("!HHHH")
_TAIL = Struct("!HHIH")  # behind a record's name: type, class, TTL, length of the data

MAX_RECORDS: Final = 512
# Of the names of all records of a message. By a pointer each can have 126; 64,000 would take 15 ms to read.
MAX_LABELS: Final = 8192
_MAX_POINTERS: Final = 32
_MAX_NAME: Final = 255  # RFC 1035 2.3.4


class Record(NamedTuple):
    """A resource record."""

    labels: tuple[bytes, ...]
    """The name, in lower case."""
    type: int
    class_: int
    ttl: int
    data: bytes
    """As it is in the message: names in it may be compressed."""
    at: int
    """Where the data begins in the message."""


def read_name(message: bytes, position: int) -> tuple[tuple[bytes, ...], int] | None:
    """A name, as it is spelt, and where it ends. Untrusted: None for what is none."""
    labels: list[bytes] = []
    length = pointers = 0
    end = 0
    while position < len(message):
        size = message[position]
        if size >= 0xC0:
            target = int.from_bytes(message[position : position + 2], "big") & 0x3FFF
            end = end or position + 2
            pointers += 1
            # RFC 1035 4.1.4: to an earlier place.
            if pointers > _MAX_POINTERS or target >= position:
                return None
            position = target
            continue
        if size == 0:
            return tuple(labels), end or position + 1
        length += size + 1
        label = message[position + 1 : position + 1 + size]
        if size > 63 or length >= _MAX_NAME or len(label) < size:
            return None
        labels.append(label)
        position += size + 1
    return None


def read_answers(message: bytes, position: int) -> list[Record] | None:
    """The records of the answer section, which begins at position. Untrusted: None when they cannot be read."""
    count = int.from_bytes(message[6:8], "big")
    found = list(_read(message, position, count))
    return found if len(found) == count else None


def read_all(message: bytes) -> list[Record] | None:
    """The records of all sections of a message with any number of questions. Untrusted: None when it is malformed."""
    if len(message) < HEADER_LENGTH:
        return None
    questions, *counts = _COUNTS.unpack_from(message, 4)
    position = HEADER_LENGTH
    if questions > MAX_RECORDS:
        return None
    for _ in range(questions):
        # What was asked does not matter, so no pointer is followed.
        end = skip_name(message, position)
        if end is None:
            return None
        position = end + 4
    found = list(_read(message, position, sum(counts)))
    return found if len(found) == sum(counts) else None


def _read(message: bytes, position: int, count: int) -> Iterator[Record]:
    if count > MAX_RECORDS:
        return
    left = MAX_LABELS
    for _ in range(count):
        name = read_name(message, position)
        if name is None or name[1] + _TAIL.size > len(message):
            return
        labels, position = name
        left -= len(labels)
        if left < 0:
            return
        kind, class_, ttl, length = _TAIL.unpack_from(message, position)
        position += _TAIL.size
        if position + length > len(message):
            return
        # RFC 2181 8: a TTL with the top bit set is 0.
        ttl = ttl if ttl < 1 << 31 else 0
        yield Record(
            tuple(map(bytes.lower, labels)), kind, class_, ttl, message[position : position + length], position
        )
        position += length
