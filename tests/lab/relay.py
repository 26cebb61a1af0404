"""A tap device in a network namespace, carried over QEMU's stream framing: the Linux kernel as a guest at native speed.

Theory of operation. A kernel needs no virtual machine to be a guest: a tap device in a namespace of its own hands
over whole Ethernet frames just as virtio-net does. This program opens such a tap (without a virtio-net header, so
that, as on QEMU's stream socket, the kernel segments and computes its checksums itself), connects to the unix socket
where netstack, passt or any other back-end listens for QEMU, and copies frames both ways, each with QEMU's four-byte
big-endian length in front.

It is two processes, one for each direction, because each then only ever blocks on its own source and they share
neither a loop nor an interpreter lock. A frame costs one system call on the tap, which has no call for several; on
the socket's side, as many frames as are ready travel in one. The payload is never copied by Python: a frame is read
behind the room for its length, and a received batch is written from where it lies.

It stands alone (standard library only), so that benchmarks may start it with any interpreter:

    python tests/lab/relay.py --netns /run/netns/guest --tap tap0 --mtu 65520 --connect /tmp/n.sock

It prints `ready` on standard output when frames flow, and ends with status 0 on SIGTERM or when the other side closes.

Sources: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h; QEMU net/stream.c (framing).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFMTU = 0x8922
SIOCSIFHWADDR = 0x8924
IFF_UP = 0x1
ARPHRD_ETHER = 1
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

LENGTH = struct.Struct(">I")
MAX_FRAME = 65535 + 14  # the largest IP packet and its Ethernet header
BATCH = 1 << 20  # bytes gathered before they are sent: some 16 frames of MTU 65520, 690 of 1500


def enter_namespace(path: str) -> None:
    """Move this thread to the network namespace at `path`. `os.setns` only exists from Python 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}", path)
    finally:
        os.close(fd)


def open_tap(name: str, *, mtu: int, mac: bytes | None = None) -> int:
    """Make the tap `name` in the present namespace, set its MTU and MAC, bring it up; return its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    encoded = name.encode()
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", encoded, IFF_TAP | IFF_NO_PI))
    # Duplicate address detection would keep the link-local address unusable for a second, and nobody else has it.
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", encoded, mtu))
        if mac is not None:
            fcntl.ioctl(control, SIOCSIFHWADDR, struct.pack("16sH6s16x", encoded, ARPHRD_ETHER, mac))
        answer = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH22x", encoded, 0))
        (flags,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", encoded, flags | IFF_UP))
    return fd


def connect(path: str, timeout: float) -> socket.socket:
    """Connect to the unix stream socket `path`, which may yet have to appear, within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return link


def copy_to_link(tap: int, link: socket.socket) -> None:
    """Frames from the tap to the stream socket, for ever: until the socket is closed or the tap is gone."""
    buffer = bytearray(BATCH + LENGTH.size + MAX_FRAME)
    view = memoryview(buffer)
    waiter = select.poll()
    waiter.register(tap, select.POLLIN)
    readv, pack_into, prefix = os.readv, LENGTH.pack_into, LENGTH.size
    while True:
        waiter.poll()
        end = 0
        try:
            while end < BATCH:
                start = end + prefix
                length = readv(tap, [view[start : start + MAX_FRAME]])
                pack_into(buffer, end, length)
                end = start + length
        except BlockingIOError:
            pass
        if end:
            link.sendall(view[:end])


def copy_to_tap(link: socket.socket, tap: int) -> None:
    """Frames from the stream socket to the tap, until the other side closes."""
    buffer = bytearray(BATCH + LENGTH.size + MAX_FRAME)
    view = memoryview(buffer)
    unpack_from, write, prefix = LENGTH.unpack_from, os.write, LENGTH.size
    fill = 0
    while count := link.recv_into(view[fill:]):
        fill += count
        start = 0
        while fill - start >= prefix:
            (length,) = unpack_from(buffer, start)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes in the stream: it is out of step")
            end = start + prefix + length
            if end > fill:
                break
            try:
                write(tap, view[start + prefix : end])
            except BlockingIOError:
                select.select([], [tap], [])
                continue
            except OSError as error:
                # A frame that is too short or comes while the device is down is dropped, as by a real card.
                if error.errno not in (errno.EIO, errno.EINVAL, errno.ENOBUFS):
                    raise
            start = end
        # What is left is less than one frame: move it to the front, so that there is always room for the rest of it.
        view[: fill - start] = bytes(view[start:fill])
        fill -= start


def run(link: socket.socket, tap: int) -> None:
    """Carry frames both ways until the link closes or SIGTERM arrives."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        # A child whose parent was killed would hold the tap, and with it the name, for ever.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            if os.getppid() == parent:
                copy_to_link(tap, link)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # ends the other direction too
            os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        print("ready", flush=True)
        copy_to_tap(link, tap)
    except (ConnectionError, KeyboardInterrupt):
        pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="a tap in a network namespace, carried over QEMU's stream framing")
    parser.add_argument("--netns", help="path of the namespace; without it the present one")
    parser.add_argument("--tap", default="tap0", help="name of the device (default: tap0)")
    parser.add_argument("--mtu", type=int, default=65520)
    parser.add_argument("--mac", help="its MAC address, as 52:54:00:00:00:01")
    parser.add_argument("--connect", required=True, metavar="PATH", help="the unix stream socket to connect to")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for that socket (default: 10)")
    options = parser.parse_args()
    mac = bytes.fromhex(options.mac.replace(":", "")) if options.mac else None
    if options.netns:
        enter_namespace(options.netns)
    try:
        link = connect(options.connect, options.timeout)
        tap = open_tap(options.tap, mtu=options.mtu, mac=mac)
    except OSError as error:
        sys.exit(f"relay: {error}")
    with link:
        run(link, tap)


if __name__ == "__main__":
    main()
