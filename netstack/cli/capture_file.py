"""Reading pcap and pcapng files, frame by frame, with what netstack writes beside each frame. Untrusted.

A file may come from anywhere and end anywhere: whatever is wrong with it is a CaptureError with its offset, raised when
the reading gets there, so that all before it is still shown.

Source: draft-ietf-opsawg-pcapng (blocks, options), draft-ietf-opsawg-pcap (the older format). dpkt reads both
formats, but gives neither the comments nor the interfaces of a pcapng file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTION_HEADER = 0x0A0D0D0A
INTERFACE_DESCRIPTION = 1
SIMPLE_PACKET = 3
ENHANCED_PACKET = 6
BYTE_ORDER_MAGIC = 0x1A2B3C4D

OPT_COMMENT = 1
IF_NAME = 2
IF_TSRESOL = 9
EPB_FLAGS = 2

MAX_BLOCK = 16 << 20  # Wireshark's own limit for a block (wiretap/pcapng.c)
NANOSECONDS = 1_000_000_000

# The first four bytes of a pcap file: byte order, and nanoseconds per unit of the second time field.
PCAP_MAGIC = {
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\x3c\x4d": (">", 1),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
}


class CaptureError(Exception):
    """The file cannot be read on; str() says why and at which byte."""


class CapturedFrame(NamedTuple):
    """One frame of a capture."""

    wall_ns: int  # nanoseconds since 1970
    data: bytes
    length: int  # as it was on the link; more than len(data) when the capture cut it
    linktype: int
    interface: str  # "" in files that do not say
    to_guest: bool | None  # None in files that do not say
    comment: str


class _Interface(NamedTuple):
    linktype: int
    name: str
    units: int  # time units in a second


def read_capture(file: BinaryIO) -> Iterator[CapturedFrame]:
    """Every frame of a pcap or pcapng file. Raises CaptureError."""
    magic = file.read(4)
    if magic in PCAP_MAGIC:
        return _read_pcap(file, *PCAP_MAGIC[magic])
    if magic == SECTION_HEADER.to_bytes(4, "big"):
        return _read_pcapng(file)
    raise CaptureError("not a pcap or pcapng file" if magic else "the file is empty")


def _read_pcap(file: BinaryIO, order: str, nanoseconds: int) -> Iterator[CapturedFrame]:
    # u16 major, minor; i32 zone; u32 accuracy, snaplen, linktype (its upper half is about the FCS)
    (linktype,) = struct.unpack(order + "16xI", _exactly(file, 20, 4))
    header = struct.Struct(order + "4I")
    at = 24
    while head := file.read(header.size):
        if len(head) < header.size:
            raise CaptureError(f"the file ends inside a frame at byte {at}")
        seconds, fraction, captured, length = header.unpack(head)
        if captured > MAX_BLOCK:
            raise CaptureError(f"a frame of {captured} bytes at byte {at}: the file is damaged")
        data = _exactly(file, captured, at)
        at += header.size + captured
        wall_ns = seconds * NANOSECONDS + fraction * nanoseconds
        yield CapturedFrame(wall_ns, data, length, linktype & 0xFFFF, "", None, "")


def _read_pcapng(file: BinaryIO) -> Iterator[CapturedFrame]:
    order = "<"
    interfaces: list[_Interface] = []
    at = 0
    head = SECTION_HEADER.to_bytes(4, "big")  # read already
    while head:
        rest = _exactly(file, 8 - len(head), at)
        head += rest
        # The section header says the byte order, after its length: so that is read in both.
        if head[:4] == SECTION_HEADER.to_bytes(4, "big"):
            magic = _exactly(file, 4, at)
            order = "<" if magic == BYTE_ORDER_MAGIC.to_bytes(4, "little") else ">"
            if order == ">" and magic != BYTE_ORDER_MAGIC.to_bytes(4, "big"):
                raise CaptureError(f"no byte order in the section header at byte {at}: the file is damaged")
            interfaces = []
        else:
            magic = b""
        kind, length = struct.unpack(order + "II", head)
        if length < 12 or length % 4 or length > MAX_BLOCK:
            raise CaptureError(f"a block of {length} bytes at byte {at}: the file is damaged")
        if length < 12 + len(magic):
            raise CaptureError(f"a section header of {length} bytes at byte {at}: the file is damaged")
        body = magic + _exactly(file, length - 12 - len(magic), at)
        if struct.unpack(order + "I", _exactly(file, 4, at))[0] != length:
            raise CaptureError(f"the block at byte {at} has two lengths: the file is damaged")
        try:
            if kind == INTERFACE_DESCRIPTION:
                interfaces.append(_parse_interface(body, order))
            elif kind == ENHANCED_PACKET:
                yield _parse_packet(body, order, interfaces)
            elif kind == SIMPLE_PACKET:
                (original,) = struct.unpack_from(order + "I", body)
                yield CapturedFrame(0, body[4 : 4 + original], original, interfaces[0].linktype, "", None, "")
        except (struct.error, IndexError):
            raise CaptureError(f"the block at byte {at} is too short for what it should hold") from None
        at += length
        head = file.read(8)


def _parse_interface(body: bytes, order: str) -> _Interface:
    (linktype,) = struct.unpack_from(order + "H6x", body)
    name, units = "", 1_000_000
    for code, value in _options(body, 8, order):
        if code == IF_NAME:
            name = value.decode(errors="replace")
        elif code == IF_TSRESOL and value:
            # The highest bit tells powers of two from powers of ten. Bounded: 2**127 is a number like any other here.
            units = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** (value[0] & 0x7F)
    return _Interface(linktype, name, units)


def _parse_packet(body: bytes, order: str, interfaces: list[_Interface]) -> CapturedFrame:
    number, high, low, captured, length = struct.unpack_from(order + "5I", body)
    interface = interfaces[number]
    if 20 + captured > len(body):
        raise IndexError
    to_guest, comment = None, ""
    for code, value in _options(body, 20 + captured + -captured % 4, order):
        if code == OPT_COMMENT:
            comment = f"{comment}; {value.decode(errors='replace')}" if comment else value.decode(errors="replace")
        elif code == EPB_FLAGS and len(value) == 4:
            # 1 is inbound to the capturing machine, 2 outbound
            to_guest = {1: False, 2: True}.get(struct.unpack(order + "I", value)[0] & 3)
    wall_ns = (high << 32 | low) * NANOSECONDS // interface.units
    return CapturedFrame(
        wall_ns, body[20 : 20 + captured], length, interface.linktype, interface.name, to_guest, comment
    )


def _options(body: bytes, at: int, order: str) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= len(body):
        code, length = struct.unpack_from(order + "HH", body, at)
        if code == 0:
            return
        yield code, body[at + 4 : at + 4 + length]
        at += 4 + length + -length % 4


def _exactly(file: BinaryIO, count: int, at: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise CaptureError(f"the file ends inside the block at byte {at}")
    return data
