"""Many datagrams in one call: recvmmsg(2), which Python's socket module does not have.

Where a peer sends datagram after datagram and nothing on the way merges them (UDP_GRO: what comes off a network card,
and not what another program sends one by one over the loopback), receiving is what costs: 1.9 us each, of which the
kernel needs a third. One call for up to 64, and array arithmetic over what it left, come to 0.7 us each.

One receiver serves all sockets of a network, as they take turns. Its slots are as large as a datagram can be, so none
is ever cut off; of 4 MiB only the pages are in memory that something was received into.

ctypes calls the C library's recvmmsg(), which every Linux libc has. The structures are those of recvmsg(2) and
recvmmsg(2): glibc's and musl's are the same in memory on little-endian machines, and elsewhere there is no receiver.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

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

_AF_INET = int(socket.AF_INET)

Take = Callable[[int, int, bytes, int], None]


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


class BatchReceiver:
    """Slots for one call of recvmmsg()."""

    def __init__(self) -> None:
        """Raises AttributeError or OSError where there is no such call."""
        self._call = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
        self._slots: NDArray[np.uint8] = np.zeros((COUNT, _SLOT), np.uint8)  # of pages that are not there yet
        self._names: NDArray[np.uint8] = np.zeros((COUNT, _NAME), np.uint8)
        self._controls: NDArray[np.uint8] = np.zeros((COUNT, _CONTROL), np.uint8)
        self._segments = self._controls[:, _SEGMENT_AT : _SEGMENT_AT + 4].view(np.int32)[:, 0]
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

    def receive(self, fd: int, limit: int, buffer: memoryview, take: Take) -> tuple[int, bool]:
        """Receive what there is, up to `limit` (at most COUNT): how many, and whether the kernel had merged some.

        For each run of datagrams of one peer and one size, these are laid one behind the other at the start of `buffer`
        (of 64 KiB or more), and take(length, size, address, port) is called; of what was merged the last one may be
        shorter. Raises OSError, but not BlockingIOError.
        """
        self._name_lengths[:] = _NAME_LENGTH
        self._control_lengths[:] = _CONTROL
        count: int = self._call(fd, self._address, limit, socket.MSG_DONTWAIT, None)
        if count < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return 0, False
            raise OSError(code, os.strerror(code))
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
        whole = np.frombuffer(buffer, np.uint8)
        if merged:
            whole[:size] = self._slots[begin, :size]
            take(size, int(self._segments[begin]), address, port)
            return
        step = len(buffer) // size
        for first in range(begin, end, step):
            last = min(first + step, end)
            length = (last - first) * size
            whole[:length].reshape(-1, size)[:] = self._slots[first:last, :size]
            take(length, size, address, port)


def make_receiver() -> BatchReceiver | None:
    """A receiver; None where the system has no such call, or lays its structures out in another way."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        return BatchReceiver()
    except (AttributeError, OSError):
        return None
