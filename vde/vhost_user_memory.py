"""A guest's memory, as vhost-user shares it: regions of files that are mapped here, and addresses into them.

Theory of operation
-------------------
Each region is a piece of a file that the front-end sent a descriptor of. It has two addresses: where the guest sees it
(descriptors in rings hold such addresses), and where the front-end has it mapped (the rings' own places are told in
these). Here it is a memoryview. So no address of either kind is ever used as one: it becomes an offset, is checked
against a region's bounds, and indexes a memoryview, which checks once more.

Python unmaps a file when the last memoryview into it is gone. A region that the front-end takes away therefore stays
mapped for exactly as long as something still refers to it, such as data on its way to a host's socket.

What cannot be checked here: a file that becomes shorter while it is mapped. The kernel ends a process that touches what
is missing (SIGBUS). A guest cannot do that, only its front-end, and memfds that are sealed (QEMU's memory-backend-memfd
does it by itself, F_SEAL_SHRINK) cannot shrink at all. `sealed` says whether all regions are of that kind.

In one case the seal does not help: huge pages that the front-end punches out of the file (fallocate(2), which the seal
allows) come from a pool when they are touched again, and when that is empty it is SIGBUS as well. So a front-end is
somebody who is trusted not to end this process; a guest need not be.

Linux only, like memfd and eventfd.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from bisect import bisect_right

from netstack.vde.vhost_user_messages import RegionTable, ViolationError

# What we say in answer to GET_MAX_MEM_SLOTS; each costs a mapping and a descriptor. QEMU uses a handful, and one for
# each memory module that is plugged in.
MAX_REGIONS = 64

_TOP = 1 << 64


class Region:
    """A part of the guest's memory, mapped."""

    __slots__ = ("end", "guest", "sealed", "size", "user", "view")

    def __init__(self, table: RegionTable, fd: int) -> None:
        """Map it; `fd` stays the caller's. Untrusted; raises ViolationError."""
        guest, size, user, offset = table
        if not size or guest + size > _TOP or user + size > _TOP:
            raise ViolationError(f"a memory region of {size:#x} bytes at {guest:#x}")
        self.guest = guest
        self.size = size
        self.end = guest + size
        self.user = user
        try:
            status = os.fstat(fd)
            # Only files can be mapped for good: a device may do anything when it is touched.
            if not stat.S_ISREG(status.st_mode):
                raise ViolationError("a memory region that is no file")
            if offset + size > status.st_size:
                raise ViolationError(
                    f"a memory region that ends at {offset + size:#x} in a file of {status.st_size:#x} bytes"
                )
            # From 0 on, as offsets need not lie on a page (or a huge page) of their own.
            mapped = mmap.mmap(fd, offset + size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, OverflowError, ValueError) as error:
            raise ViolationError(f"a memory region that cannot be mapped: {error}") from None
        try:
            self.sealed = bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:  # not a memfd
            self.sealed = False
        self.view = memoryview(mapped)[offset : offset + size]


class GuestMemory:
    """All regions of one guest."""

    def __init__(self) -> None:
        self._regions: list[Region] = []  # in the order of guest addresses
        self._starts: list[int] = []
        self._last: Region | None = None  # where the last address was found: most guests have all buffers in one

    def __len__(self) -> int:
        return len(self._regions)

    @property
    def sealed(self) -> bool:
        """Whether no region's file can become shorter."""
        return all(region.sealed for region in self._regions)

    def replace(self, regions: list[Region]) -> None:
        """Forget all there was. Untrusted; raises ViolationError."""
        self.clear()
        for region in regions:
            self.add(region)

    def add(self, region: Region) -> None:
        """Untrusted; raises ViolationError."""
        if len(self._regions) >= MAX_REGIONS:
            raise ViolationError(f"more than {MAX_REGIONS} memory regions")
        for other in self._regions:
            if region.guest < other.end and other.guest < region.end:
                raise ViolationError(f"memory regions overlap at {max(region.guest, other.guest):#x}")
            if region.user < other.user + other.size and other.user < region.user + region.size:
                raise ViolationError(f"memory regions overlap at the front-end's {max(region.user, other.user):#x}")
        at = bisect_right(self._starts, region.guest)
        self._regions.insert(at, region)
        self._starts.insert(at, region.guest)

    def remove(self, table: RegionTable) -> None:
        """Untrusted; raises ViolationError."""
        for at, region in enumerate(self._regions):
            if (region.guest, region.size, region.user) == table[:3]:
                del self._regions[at]
                del self._starts[at]
                self._last = None
                return
        raise ViolationError(f"no memory region at {table.guest:#x} to be removed")

    def clear(self) -> None:
        self._regions.clear()
        self._starts.clear()
        self._last = None

    def region_of(self, address: int) -> Region:
        """The region with a guest's address in it. Untrusted; raises ViolationError."""
        region = self._last
        if region is not None and region.guest <= address < region.end:
            return region
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            region = self._regions[at]
            if address < region.end:
                self._last = region
                return region
        raise ViolationError(f"address {address:#x} is outside of the guest's memory")

    def pieces(self, address: int, length: int) -> list[memoryview]:
        """The memory at a guest's address, in pieces where it lies in several regions. Untrusted; ViolationError."""
        found = []
        while length:
            region = self.region_of(address)
            start = address - region.guest
            take = min(length, region.size - start)
            found.append(region.view[start : start + take])
            address += take
            length -= take
        return found

    def at_user(self, address: int, length: int) -> memoryview:
        """The memory at one of the front-end's addresses. Untrusted; raises ViolationError."""
        for region in self._regions:
            start = address - region.user
            if start >= 0 and start + length <= region.size:
                return region.view[start : start + length]
        raise ViolationError(f"a ring of {length} bytes at the front-end's {address:#x}, outside of the guest's memory")
