"""Many datagrams in one call: recvmmsg(2), which Python's socket module does not have.

Where a peer sends datagram after datagram and nothing on the way merges them (UDP_GRO: what comes off a network card,
and not what another program sends one by one over the loopback), receiving is what costs: 1.9 us each, of which the
kernel needs a third. One call for up to 64, and array arithmetic over what it left, come to 0.7 us each.

One receiver serves all sockets of a network, as they take turns. Its slots are as large as a datagram can be, so none
is ever cut off; of 4 MiB only the pages are in memory that something was received into.

A `CallerReceiver` does the same for the sockets of forwards, which have to know which address of the host was meant.

ctypes calls the C library's recvmmsg(), which every Linux libc has. The structures are those of recvmsg(2) and
recvmmsg(2): glibc's and musl's are the same in memory on little-endian machines, and elsewhere there is no receiver.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from struct import Struct
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from netstack.core.addresses import is_link_local6
from netstack.core.ports import Caller

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Datagrams of one call. More than a flow may pass on in one turn (core.datagrams.BURST) would wait here.
COUNT = 64
# The largest datagram, RFC 768: a length field of 16 bits.
_SLOT = 65536
# sockaddr_in6 has 28 bytes, sockaddr_in 16.
_NAME = 32
_NAME_LENGTH = 28

# A control message (cmsg(3)) with an int, the size of merged datagrams: size_t length | int level | int type | int
_CONTROL = socket.CMSG_SPACE(4)
_SEGMENT_AT = socket.CMSG_LEN(0)

# The same, and struct in6_pktinfo (RFC 3542 6.1, 20 bytes) or the shorter struct in_pktinfo of ip(7).
_CONTROLS = _CONTROL + socket.CMSG_SPACE(20)
_CMSGHDR = Struct("=Qii")

_AF_INET = int(socket.AF_INET)

Take = Callable[[int, int, bytes, int], None]
TakeCaller = Callable[[int, int, Caller], None]


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    """struct mmsghdr: a struct msghdr, whose size is a multiple of 8, and how much was received."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_uint32),
        ("received", ctypes.c_uint),
    ]


class _Slots:
    """Where one call of recvmmsg() puts what it receives."""

    def __init__(self, control: int) -> None:
        """`control`: room for control messages of each. Raises AttributeError or OSError where there is none."""
        self._control = control
        self._call = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
        self._slots: NDArray[np.uint8] = np.zeros((COUNT, _SLOT), np.uint8)  # of pages that are not there yet
        self._names: NDArray[np.uint8] = np.zeros((COUNT, _NAME), np.uint8)
        self._controls: NDArray[np.uint8] = np.zeros((COUNT, control), np.uint8)
        self._name_words: NDArray[np.uint64] = self._names.view(np.uint64)
        self._vectors = (_Vector * COUNT)()
        self._headers = (_Header * COUNT)()
        for i in range(COUNT):
            self._vectors[i].base = self._slots[i].ctypes.data
            self._vectors[i].length = _SLOT
            self._headers[i].name = self._names[i].ctypes.data
            self._headers[i].vectors = ctypes.pointer(self._vectors[i])
            self._headers[i].vector_count = 1
            self._headers[i].control = self._controls[i].ctypes.data
        self._address = ctypes.addressof(self._headers)
        words: NDArray[np.uint32] = np.frombuffer(memoryview(self._headers), np.uint32).reshape(COUNT, -1)
        self._name_lengths = words[:, _Header.name_length.offset >> 2]
        self._received = words[:, _Header.received.offset >> 2]
        self._control_lengths = words[:, _Header.control_length.offset >> 2]

    def _fill(self, fd: int, limit: int) -> int:
        """Receive what there is, up to `limit`: how many."""
        self._name_lengths[:] = _NAME_LENGTH
        self._control_lengths[:] = self._control
        count: int = self._call(fd, self._address, limit, socket.MSG_DONTWAIT, None)
        if count < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return 0
            raise OSError(code, os.strerror(code))
        return count

    def _lay_out(self, begin: int, end: int, size: int, buffer: memoryview) -> Iterator[int]:
        """Lay datagrams of `size` bytes one behind the other in `buffer`, as many as it holds: so many bytes, again."""
        whole = np.frombuffer(buffer, np.uint8)
        step = len(buffer) // size
        for first in range(begin, end, step):
            last = min(first + step, end)
            length = (last - first) * size
            whole[:length].reshape(-1, size)[:] = self._slots[first:last, :size]
            yield length


class BatchReceiver(_Slots):
    """For sockets through which guests talk to their peers."""

    def __init__(self) -> None:
        super().__init__(_CONTROL)
        self._segments = self._controls[:, _SEGMENT_AT : _SEGMENT_AT + 4].view(np.int32)[:, 0]

    def receive(self, fd: int, limit: int, buffer: memoryview, take: Take) -> tuple[int, bool]:
        """Receive what there is, up to `limit` (at most COUNT): how many, and whether the kernel had merged some.

        For each run of datagrams of one peer and one size, these are laid one behind the other at the start of `buffer`
        (of 64 KiB or more), and take(length, size, address, port) is called; of what was merged the last one may be
        shorter. Raises OSError, but not BlockingIOError.
        """
        count = self._fill(fd, limit)
        if not count:
            return 0, False
        sizes = self._received[:count]
        words = self._name_words[:count, : 1 if self._names[0, 0] == _AF_INET else 3]
        breaks = (words[1:] != words[:-1]).any(axis=1)
        breaks |= sizes[1:] != sizes[:-1]
        merged = self._control_lengths[:count] != 0  # no other control message was asked for than UDP_GRO's
        any_merged = bool(merged.any())
        if any_merged:
            breaks |= merged[1:] | merged[:-1]
        edges = (np.flatnonzero(breaks) + 1).tolist()
        for begin, end in pairwise((0, *edges, count)):
            self._pass_on(begin, end, int(sizes[begin]), any_merged and bool(merged[begin]), buffer, take)
        return count, any_merged

    def _pass_on(self, begin: int, end: int, size: int, merged: bool, buffer: memoryview, take: Take) -> None:
        name = self._names[begin].tobytes()
        port = name[2] << 8 | name[3]
        address = name[4:8] if name[0] == _AF_INET else name[8:24]
        if not size:
            for _ in range(begin, end):
                take(0, 0, address, port)
            return
        for length in self._lay_out(begin, end, size, buffer):
            take(length, int(self._segments[begin]) if merged else size, address, port)


class CallerReceiver(_Slots):
    """For sockets that others send to: besides whence, it says to which of the host's addresses (IP_PKTINFO)."""

    def __init__(self) -> None:
        super().__init__(_CONTROLS)
        self._control_words: NDArray[np.uint64] = self._controls.view(np.uint64)

    def receive(self, fd: int, limit: int, buffer: memoryview, take: TakeCaller) -> tuple[int, bool]:
        """As BatchReceiver.receive(); take(length, size, caller) is called."""
        count = self._fill(fd, limit)
        if not count:
            return 0, False
        sizes = self._received[:count]
        ipv4 = self._names[0, 0] == _AF_INET
        words = self._name_words[:count, : 1 if ipv4 else 4]
        breaks = (words[1:] != words[:-1]).any(axis=1)
        breaks |= sizes[1:] != sizes[:-1]
        lengths = self._control_lengths[:count]
        # What stands behind the messages of one may be left over from another, and costs a run too many at worst.
        breaks |= (self._control_words[1:count] != self._control_words[: count - 1]).any(axis=1)
        breaks |= lengths[1:] != lengths[:-1]
        any_merged = False
        edges = (np.flatnonzero(breaks) + 1).tolist()
        for begin, end in pairwise((0, *edges, count)):
            name = self._names[begin].tobytes()
            segment, local = parse_control(self._controls[begin, : int(lengths[begin])].tobytes())
            if ipv4:
                caller = (name[4:8], name[2] << 8 | name[3], local, 0)
            else:
                address = name[8:24]
                zone = int.from_bytes(name[24:28], sys.byteorder) if is_link_local6(address) else 0
                caller = (address, name[2] << 8 | name[3], local, zone)
            size = int(sizes[begin])
            if not size:
                for _ in range(begin, end):
                    take(0, 0, caller)
            elif segment:
                any_merged = True
                for i in range(begin, end):  # each may end with a shorter one
                    for length in self._lay_out(i, i + 1, size, buffer):
                        take(length, segment, caller)
            else:
                for length in self._lay_out(begin, end, size, buffer):
                    take(length, size, caller)
        return count, any_merged


def parse_control(control: bytes) -> tuple[int, bytes]:
    """Of control messages as the kernel lays them out: the size of merged datagrams or 0; the address meant, or b""."""
    segment = 0
    local = b""
    at = 0
    while at + _SEGMENT_AT <= len(control):
        length, level, _ = _CMSGHDR.unpack_from(control, at)
        if length < _SEGMENT_AT:
            break
        data = control[at + _SEGMENT_AT : at + length]
        if level == socket.IPPROTO_UDP:
            segment = int.from_bytes(data[:4], sys.byteorder)
        elif level == socket.IPPROTO_IP:
            local = data[4:8]  # struct in_pktinfo: int interface | our address | destination of the header
        elif level == socket.IPPROTO_IPV6 and data[:1] != b"\xff":  # nobody answers from a group's address
            local = data[:16]  # struct in6_pktinfo: destination | int interface
        at += length + 7 & ~7
    return segment, local


R = TypeVar("R", BatchReceiver, CallerReceiver)


def make_receiver(kind: type[R]) -> R | None:
    """A receiver; None where the system has no such call, or lays its structures out in another way."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        return kind()
    except (AttributeError, OSError):
        return None
