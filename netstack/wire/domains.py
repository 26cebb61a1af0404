"""Domain names as DHCP, DHCPv6 and router advertisements carry them: lists of RFC 1035 names.

Three options share this form and differ in one point only: DHCP option 119 (RFC 3397) may use compression pointers,
counted from the start of the option's data; DHCPv6 option 24 (RFC 8415 10) and the DNSSL option of router
advertisements (RFC 8106 5.2) must not.

We write the plain form everywhere: every reader of the compressed form reads it too, and our lists are short.
"""

from __future__ import annotations

from collections.abc import Iterable

# RFC 1035 2.3.4.
MAX_LABEL = 63
MAX_NAME = 255

# A pointer may lead to a pointer. A name of 255 bytes has at most 127 labels, so no honest one needs more hops.
MAX_HOPS = 127

# No option of 64 KiB needs more; the bound keeps a list of one-byte names from a guest cheap.
MAX_NAMES = 256


def write_domain(name: str) -> bytes | None:
    """Give the wire form of one name, or None when no such name can be written (label over 63 bytes, not ASCII ...).

    Names that are not ASCII must have been turned into A-labels by whoever read the settings.
    """
    out = bytearray()
    for label in name.rstrip(".").split("."):
        if not label or len(label) > MAX_LABEL or not label.isascii():
            return None
        out.append(len(label))
        out += label.encode("ascii")
    out.append(0)
    return bytes(out) if len(out) <= MAX_NAME else None


def write_domains(names: Iterable[str]) -> bytes:
    """Give the wire form of a list of names, without compression. Names that cannot be written are left out."""
    return b"".join(filter(None, map(write_domain, names)))


def parse_domains(data: bytes, *, compressed: bool) -> list[str] | None:
    """Read a list of names. Untrusted: None when it cannot be read.

    Zero bytes between and after the names are padding (RFC 8106 5.2 pads to 8 bytes) and give no name. Bytes of a label
    that are not printable ASCII, or are dots, make the list unreadable: nothing we do with such a name is safe.
    """
    names: list[str] = []
    position = 0
    while position < len(data):
        if data[position] == 0:
            position += 1
            continue
        found = _parse_name(data, position, compressed)
        if found is None or len(names) == MAX_NAMES:
            return None
        name, position = found
        names.append(name)
    return names


def _parse_name(data: bytes, position: int, compressed: bool) -> tuple[str, int] | None:
    """Read one name at position: the name and where the next one begins. Untrusted."""
    labels: list[str] = []
    size = 1
    hops = 0
    after = -1
    run = position
    end = len(data)
    while True:
        if position >= end:
            return None
        length = data[position]
        if length == 0:
            position += 1
            break
        if length >= 0xC0:
            target = (length & 0x3F) << 8 | data[position + 1] if position + 1 < end else end
            # RFC 1035 4.1.4: a pointer leads to a prior occurrence. Each must lead before the place that the last one
            # led to, so no loop is possible.
            if not compressed or target >= run or hops == MAX_HOPS:
                return None
            if after < 0:
                after = position + 2
            hops += 1
            position = run = target
            continue
        label = data[position + 1 : position + 1 + length]
        size += 1 + length
        if length > MAX_LABEL or len(label) < length or size > MAX_NAME:
            return None
        if not all(0x21 <= byte <= 0x7E and byte != 0x2E for byte in label):
            return None
        labels.append(label.decode("ascii"))
        position += 1 + length
    return ".".join(labels), after if after >= 0 else position
