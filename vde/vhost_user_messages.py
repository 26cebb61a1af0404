"""vhost-user messages: bytes <-> fields (QEMU docs/interop/vhost-user.rst). Pure functions, no state.

A front-end, QEMU, has a device to emulate; a back-end, we, does the work of its queues. They talk over a unix stream
socket, and file descriptors travel along (SCM_RIGHTS): of the guest's memory, and eventfds by which the two sides wake
each other. A message, in native byte order:

    u32 request | u32 flags | u32 size | payload of `size` bytes

    flags: bits 0 and 1 version, 1; bit 2 this is a reply; bit 3 a reply is wanted (REPLY_ACK)

Descriptors come with the first byte of the message they belong to. So the header is read by itself, and nothing of the
next message with it.

Payloads: a u64; a ring's state or addresses; one region of memory, or a table of them.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple


class ViolationError(Exception):
    """The front-end or the guest broke the protocol; the text says how. It ends the link and nothing else."""


class Request(IntEnum):
    """What a front-end may ask of us."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


# Device features (virtio 1.2 sections 5.1.3 and 6; bit 30 is vhost-user's own).
CSUM = 1 << 0  # the guest may leave checksums to us
GUEST_CSUM = 1 << 1  # and we to the guest
MTU = 1 << 3  # the device says how large packets may be
GUEST_TSO4 = 1 << 7
GUEST_TSO6 = 1 << 8
HOST_TSO4 = 1 << 11
HOST_TSO6 = 1 << 12
MRG_RXBUF = 1 << 15  # a frame may fill several of the guest's buffers
INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
PROTOCOL_FEATURES = 1 << 30
VERSION_1 = 1 << 32
GUEST_USO4 = 1 << 54
GUEST_USO6 = 1 << 55
HOST_USO = 1 << 56

# Protocol features.
PROTOCOL_MQ = 1 << 0
PROTOCOL_REPLY_ACK = 1 << 3
PROTOCOL_MTU = 1 << 4
PROTOCOL_RESET_DEVICE = 1 << 13
PROTOCOL_MEM_SLOTS = 1 << 15

VERSION = 1
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

HEADER = Struct("=III")
U64 = Struct("=Q")
# index, value
VRING_STATE = Struct("=II")
# index, flags | descriptors, used, available: addresses in the front-end's memory | log
VRING_ADDR = Struct("=IIQQQQ")
# guest address, size, the front-end's address, offset in the file
REGION = Struct("=QQQQ")
_TABLE = Struct("=II")
_PADDING = 8  # before a single region

# linux/vhost.h and QEMU allow 8 descriptors a message (VHOST_MEMORY_BASELINE_NREGIONS).
MAX_DESCRIPTORS = 8
# The largest payload is a table of as many regions.
MAX_PAYLOAD = _TABLE.size + MAX_DESCRIPTORS * REGION.size

_INDEX_MASK = 0xFF
_NO_DESCRIPTOR = 0x100


class VringAddress(NamedTuple):
    """Where a ring's three parts are, in the front-end's addresses."""

    ring: int
    descriptors: int
    used: int
    available: int


class RegionTable(NamedTuple):
    """One region of the guest's memory."""

    guest: int  # its first guest-physical address
    size: int
    user: int  # its first address in the front-end's memory, which is what ring addresses are
    offset: int  # where it begins in its file


def parse_header(data: bytes) -> tuple[int, int, int]:
    """Request, flags and payload size of a message's header. Untrusted; raises ViolationError."""
    request, flags, size = HEADER.unpack(data)
    if flags & VERSION_MASK != VERSION or flags & REPLY:
        raise ViolationError(f"message {request} with flags {flags:#x} is no vhost-user request of version 1")
    if size > MAX_PAYLOAD:
        raise ViolationError(f"message {request} with {size} bytes, at most {MAX_PAYLOAD} are allowed")
    return request, flags, size


def parse_u64(payload: bytes) -> int:
    """Untrusted; raises ViolationError."""
    _check_size(payload, U64.size)
    value: int = U64.unpack(payload)[0]
    return value


def parse_vring_state(payload: bytes) -> tuple[int, int]:
    """A ring's index, and what is said about it. Untrusted; raises ViolationError."""
    _check_size(payload, VRING_STATE.size)
    index, value = VRING_STATE.unpack(payload)
    return index, value


def parse_vring_addr(payload: bytes) -> VringAddress:
    """Untrusted; raises ViolationError."""
    _check_size(payload, VRING_ADDR.size)
    index, _, descriptors, used, available, _ = VRING_ADDR.unpack(payload)
    return VringAddress(index, descriptors, used, available)


def parse_vring_file(payload: bytes) -> tuple[int, bool]:
    """A ring's index, and whether a descriptor comes along. Untrusted; raises ViolationError."""
    value = parse_u64(payload)
    return value & _INDEX_MASK, not value & _NO_DESCRIPTOR


def parse_region(payload: bytes) -> RegionTable:
    """A single region. Untrusted; raises ViolationError."""
    _check_size(payload, _PADDING + REGION.size)
    return RegionTable._make(REGION.unpack_from(payload, _PADDING))


def parse_region_table(payload: bytes) -> list[RegionTable]:
    """All regions at once. Untrusted; raises ViolationError."""
    if len(payload) < _TABLE.size:
        raise ViolationError(f"a memory table of {len(payload)} bytes")
    count, _ = _TABLE.unpack_from(payload)
    if count > MAX_DESCRIPTORS:
        raise ViolationError(f"a memory table of {count} regions, at most {MAX_DESCRIPTORS} are allowed")
    # QEMU sends the regions it has; others send the table at its full size.
    if len(payload) < _TABLE.size + count * REGION.size:
        raise ViolationError(f"a memory table of {count} regions in {len(payload)} bytes")
    return [RegionTable._make(REGION.unpack_from(payload, _TABLE.size + i * REGION.size)) for i in range(count)]


def write_reply(request: int, payload: bytes) -> bytes:
    """The answer to a request."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def _check_size(payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise ViolationError(f"a payload of {len(payload)} bytes in place of {size}")
