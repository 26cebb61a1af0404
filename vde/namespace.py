"""Namespaces of Linux: entering one, making them, and taps in them. Standard library only.

Theory of operation
-------------------
A tap belongs to the network namespace in which /dev/net/tun was opened, and TUNSETIFF asks for CAP_NET_ADMIN in the
user namespace that owns that network namespace (drivers/net/tun.c: tun_chr_open, tun_set_iff). Its descriptor works
everywhere. So somebody goes in, makes the tap, and passes the descriptor back over a unix socket (SCM_RIGHTS).

Who goes in cannot be the process that runs the network: setns(2) refuses to move a process with several threads, or
one that shares its file system context, into another user namespace. It is this very file, started as a program by
`make_tap`: some 30 ms. Root may enter the network namespace directly; anybody else enters the user namespace that owns
it first (NS_GET_USERNS, ioctl_ns(2)), where its maker has all capabilities (user_namespaces(7)).

`unshare_all` is the other half, for `netstack exec`: the calling process, which has one thread, gets namespaces of its
own. Root needs no user namespace and keeps its rights to the host's files; others become root of one in which their own
user is the only one.

Everything here fails with a `NamespaceError`, which says at which step.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

# include/uapi/linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
# include/uapi/linux/nsfs.h: _IO(0xb7, 1)
NS_GET_USERNS = 0xB701

# include/uapi/linux/if_tun.h, sockios.h, if.h
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFMTU = 0x8922
IFF_UP = 0x1

# struct ifreq: the name, then a union of 24 bytes
_IFREQ_FLAGS = struct.Struct("16sH22x")
_IFREQ_INT = struct.Struct("16si20x")

_TUN = "/dev/net/tun"
_NEW = -1  # in place of a descriptor: a namespace of its own

# A helper starts within 50 ms; on a machine that is busy with other things it may take a hundred times as long.
_PATIENCE = 20.0


_MEND = {
    errno.EACCES: "run netstack as the user who made it, or as root",
    errno.EBUSY: "another process has this device; take another name",
    errno.EINVAL: "name a network namespace, as /run/netns/NAME or /proc/PID/ns/net",
    errno.ENOENT: "make it first: ip netns add NAME",
    errno.EPERM: "run netstack as the user who made it, or as root",
    errno.ESRCH: "give the number of a process that runs",
}


class NamespaceError(OSError):
    """What was tried, and why the kernel refused: errno, strerror, `step`; `mend` says what to do, "" if unknown."""

    def __init__(self, code: int, step: str) -> None:
        super().__init__(code, f"{step}: {os.strerror(code)}")
        self.code = code
        self.step = step
        self.mend = _MEND.get(code, "")


def open_namespace(*, pid: int = 0, path: str = "") -> int:
    """A descriptor of a process's network namespace, or of the one at a path."""
    step = f"process {pid} has no network namespace that we may see" if pid else f"network namespace {path}"
    try:
        return os.open(path or f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(error.errno or 0, step) from None


def make_tap(name: str, mtu: int, namespace: int) -> int:
    """Make a tap in the namespace with this descriptor, of this MTU, up; returns the tap's descriptor. Blocks."""
    return _have_made(name, mtu, namespace)


def try_namespaces() -> None:
    """Make namespaces as `netstack exec` does, with a tap, and let them go again. Raises NamespaceError. Blocks."""
    os.close(_have_made("tap0", 1500, _NEW))


def _have_made(name: str, mtu: int, namespace: int) -> int:
    """Start this file as a program, and receive what it makes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            words = (name, str(mtu), str(theirs.fileno()), str(namespace))
            helper = subprocess.Popen(
                [sys.executable, "-I", "-S", Path(__file__).resolve(), *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd for fd in (theirs.fileno(), namespace) if fd >= 0],
            )
        try:
            ours.settimeout(_PATIENCE)
            return receive_tap(ours)
        finally:
            helper.kill()
            helper.wait()


def send_tap(sock: socket.socket, fd: int) -> None:
    """Pass a tap's descriptor to whoever calls receive_tap()."""
    socket.send_fds(sock, [b"{}"], [fd])


def send_error(sock: socket.socket, error: NamespaceError) -> None:
    """Have receive_tap() raise this."""
    sock.send(json.dumps({"errno": error.code, "step": error.step}).encode())


def receive_tap(sock: socket.socket) -> int:
    """The other end of send_tap() and send_error()."""
    try:
        # Not recv_fds(): its descriptors can be inherited, if only for an instant, and another thread may be forking.
        room = socket.CMSG_LEN(struct.calcsize("i"))
        message, ancillary, _, _ = sock.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise NamespaceError(errno.ETIMEDOUT, "making a tap") from None
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            (fd,) = struct.unpack("i", content)
            return int(fd)
    try:
        said = json.loads(message)
        code, step = int(said["errno"]), str(said["step"])
    except (ValueError, KeyError, TypeError):  # it died without a word
        raise NamespaceError(errno.EPIPE, "making a tap") from None
    raise NamespaceError(code, step)


# ---- inside ----------------------------------------------------------------------------------------------------------


def enter(namespace: int) -> None:
    """Move this process into a network namespace, by way of the user namespace that owns it where need be."""
    code = _setns(namespace, CLONE_NEWNET)
    if code == errno.EPERM:
        try:
            owner = fcntl.ioctl(namespace, NS_GET_USERNS)
        except OSError as error:
            raise NamespaceError(
                error.errno or 0, "finding the user namespace that owns the network namespace"
            ) from None
        code = _setns(owner, CLONE_NEWUSER)
        os.close(owner)
        if code:
            raise NamespaceError(code, "entering the user namespace that owns the network namespace")
        code = _setns(namespace, CLONE_NEWNET)
    if code:
        raise NamespaceError(code, "entering the network namespace")


def unshare_all() -> bool:
    """Give this process, which has one thread, mount and network namespaces of its own; whether it is still root there.

    False: it took a user namespace, in which only its own user and group exist, as root.
    """
    code = _unshare(CLONE_NEWNS | CLONE_NEWNET)
    if not code:
        return True
    if code != errno.EPERM:
        raise NamespaceError(code, "making mount and network namespaces")
    user, group = os.geteuid(), os.getegid()
    # One after the other, so that we can say which of them is forbidden.
    for flag, what in ((CLONE_NEWUSER, "user"), (CLONE_NEWNS, "mount"), (CLONE_NEWNET, "network")):
        code = _unshare(flag)
        if code:
            raise NamespaceError(code, f"making a {what} namespace")
        if flag == CLONE_NEWUSER:
            try:
                # user_namespaces(7): without this, an ordinary user may not map a group.
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            except OSError as error:
                raise NamespaceError(error.errno or 0, "becoming root of a user namespace") from None
    return False


def open_tap(name: str, mtu: int) -> int:
    """Make a tap with virtio-net headers in this process's network namespace, set its MTU, bring it up."""
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NamespaceError(error.errno or 0, f"opening {_TUN}") from None
    encoded = name.encode()
    step = f"making the tap {name}"
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ_FLAGS.pack(encoded, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            step = f"setting the MTU of {name} to {mtu}"
            fcntl.ioctl(control, SIOCSIFMTU, _IFREQ_INT.pack(encoded, mtu))
            step = f"bringing {name} up"
            _, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ_FLAGS.pack(encoded, 0)))
            fcntl.ioctl(control, SIOCSIFFLAGS, _IFREQ_FLAGS.pack(encoded, flags | IFF_UP))
    except OSError as error:
        os.close(fd)
        raise NamespaceError(error.errno or 0, step) from None
    return fd


def _setns(fd: int, kind: int) -> int:
    """setns(2), which Python has from 3.12 on: 0 or errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.setns(fd, kind) == 0 else ctypes.get_errno()


def _unshare(flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.unshare(flags) == 0 else ctypes.get_errno()


def _help(name: str, mtu: str, sock: str, namespace: str) -> None:
    with socket.socket(fileno=int(sock)) as parent:
        try:
            if int(namespace) == _NEW:
                unshare_all()
            else:
                enter(int(namespace))
            send_tap(parent, open_tap(name, int(mtu)))
        except NamespaceError as error:
            send_error(parent, error)


if __name__ == "__main__":
    _help(*sys.argv[1:])
