"""A tap device as a link: the guest is a kernel's network stack, as a rule in a network namespace of its own.

Theory of operation
-------------------
Each read of a tap gives one frame and each write takes one (Linux Documentation/networking/tuntap.rst), so what a
system call costs is paid per frame, and all speed comes from large frames. IFF_VNET_HDR puts a virtio-net header before
each (`wire.virtio_net`), and TUNSETOFFLOAD tells the kernel what it may leave to us: with checksums and segmentation
left, a TCP sender behind a tap of MTU 1500 hands over 64 KiB at a time, as over the loopback. In the other direction
frames of 64 KiB are written with the same header, and the kernel takes them for what its own card's receive offload
would have made of many small ones.

A write is delivered before it returns: it runs the receiving half of the guest's TCP. There is no queue that fills up,
and back-pressure is the guest's windows alone.

Reading goes on until nothing is left, some 1 MiB at most, and costs one call more than there are frames.
`FileIO.readinto` says "nothing" by None, where os.readv would raise. A guest that sends one small frame and waits for
the answer is spared that call: after such a frame one is read, unless we are back so soon that more was waiting. With
the plain write() for frames of one piece this took a sixth off a round trip.

The device: made in a namespace, which may belong to another user namespace, by `vde.namespace`. It is gone when the
descriptor is closed, with its addresses. It can be taken away from us, too (`ip link del`): reading then fails with
EBADFD.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import struct
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from netstack.core.ports import FAILED, HUNG_UP, READABLE, WRITABLE, Buffer, Offload, Poller
from netstack.vde.link import READ_BUFFER, BaseLink, ReceiveFrames
from netstack.wire.ethernet import MAX_FRAME
from netstack.wire.virtio_net import HEADER_LENGTH

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

# include/uapi/linux/if_tun.h. The numbers hold for x86, ARM and RISC-V; MIPS, PowerPC and SPARC have others for _IOW.
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_USO4 = 0x20  # both since Linux 6.2
TUN_F_USO6 = 0x40
SIOCGIFHWADDR = 0x8927
SIOCSIFHWADDR = 0x8924
ARPHRD_ETHER = 1

# struct ifreq: the name, then a union of 24 bytes
_IFREQ_FLAGS = struct.Struct("16sH22x")
_IFREQ_HWADDR = struct.Struct("16xH6s16x")

# drivers/net/tun.c: MAX_MTU less the Ethernet header.
MAX_MTU = 65521

_SMALLEST = HEADER_LENGTH + 14
_ROOM = HEADER_LENGTH + MAX_FRAME

# Frames of one wakeup, for when they are small.
_BATCH = 256

# A request, and not a segment of a stream; and what a poller's round takes without anything to wait for.
_SMALL = 2048
_AT_ONCE = 20e-6

# That this frame could not be taken: the device is down (EIO), the header does not fit it, no memory.
_NOT_THIS_ONE = frozenset((errno.EIO, errno.EINVAL, errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE, errno.EFAULT))


def set_up(fd: int) -> Offload:
    """Agree with the kernel on headers and offload for this tap. Raises OSError where it is no such tap."""
    _, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(40)))
    if flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != IFF_TAP | IFF_NO_PI | IFF_VNET_HDR:
        raise OSError(errno.EINVAL, "not a tap with IFF_VNET_HDR and IFF_NO_PI")
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_LENGTH))
    fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
    plain = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, plain | TUN_F_USO4 | TUN_F_USO6)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.ioctl(fd, TUNSETOFFLOAD, plain)
        return Offload(checksum=True, tso4=True, tso6=True, uso=False)
    return Offload(checksum=True, tso4=True, tso6=True, uso=True)


def mac_of(fd: int) -> bytes:
    """The MAC of a tap's device, which is the guest's."""
    kind_and_mac: tuple[int, bytes] = _IFREQ_HWADDR.unpack(fcntl.ioctl(fd, SIOCGIFHWADDR, bytes(40)))
    return kind_and_mac[1]


def set_mac(fd: int, mac: bytes) -> None:
    """Give a tap's device this MAC (tun_chr_ioctl; whoever has the descriptor may). Raises OSError."""
    fcntl.ioctl(fd, SIOCSIFHWADDR, _IFREQ_HWADDR.pack(ARPHRD_ETHER, mac))


class TapLink(BaseLink):
    """One tap; the link owns its descriptor."""

    prefix = HEADER_LENGTH

    def __init__(self, name: str, fd: int, mtu: int, poller: Poller, receive: ReceiveFrames) -> None:
        """`fd` is of a tap that set_up() has not seen yet. Raises OSError, and does not take it over then."""
        offload = set_up(fd)
        super().__init__(name, min(mtu, MAX_MTU), poller, receive)
        os.set_blocking(fd, False)
        self.offload: Offload | None = offload
        self.mac = mac_of(fd)  # the guest's
        self._file = io.FileIO(fd, "r+b", closefd=False)  # the descriptor is ours only if what follows succeeds
        self._fd = fd
        self._buffer = memoryview(bytearray(READ_BUFFER + _ROOM))
        self._out: deque[tuple[Buffer, ...]] = deque()
        self._alone = False  # the last read gave one small frame
        self._read_at = 0.0
        poller.register(fd, self, READABLE)

    def on_ready(self, events: int, now: float) -> None:
        """Read a batch of frames, one after the other into one buffer."""
        if events & WRITABLE and self._waits_writable:
            self.flush()
            self.note_backlog(now)
            self._watch_writability(self._fd, bool(self._out) or self.congested)
        if not events & (READABLE | FAILED | HUNG_UP) or self.closed:
            return
        buffer = self._buffer
        read = self._file.readinto
        spans: list[int] = []
        at = size = 0
        why = ""
        for _ in range(1 if self._alone and now - self._read_at > _AT_ONCE else _BATCH):
            try:
                n = read(buffer[at : at + _ROOM])
            except OSError as error:
                why = f"tap: {error.strerror}"
                break
            if n is None:
                break
            if n >= _SMALLEST:
                spans += (at + HEADER_LENGTH, at + n)
                size += n - HEADER_LENGTH
                at += n
                if at > READ_BUFFER:
                    break
        if spans:
            self.frames_from_guest += len(spans) >> 1
            self.bytes_from_guest += size
            self._receive(self, buffer, spans, now)
            self._alone = len(spans) == 2 and size < _SMALL
            self._read_at = monotonic()
        if why or events & HUNG_UP:
            self.close(why or "tap: the device is gone")

    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None:
        self._out.append((head,) if payload is None else (head, payload))

    def _put_burst(self, frames: NDArray[uint8]) -> None:
        self._out.extend((memoryview(row),) for row in frames)

    def flush(self) -> None:
        out = self._out
        if not out:
            return
        if self._captured:
            self.write_capture()
        fd = self._fd
        while out:
            frame = out[0]
            try:
                if len(frame) == 1:
                    os.write(fd, frame[0])  # 0.2 us less than writev()
                else:
                    os.writev(fd, frame)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _NOT_THIS_ONE:
                    self.close(f"tap: {error.strerror}")
                    return
                self.drops_to_guest += 1
            out.popleft()
            self.backlog -= sum(map(len, frame))
        self.note_backlog()
        self._watch_writability(self._fd, bool(self._out) or self.congested)

    def _close(self) -> None:
        self._out.clear()
        self._poller.unregister(self._fd)
        self._file.close()
        os.close(self._fd)
