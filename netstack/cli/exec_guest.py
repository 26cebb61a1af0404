"""The other process of `netstack exec`: makes its namespaces, configures them, and becomes the command.

It is forked before anything is imported that starts threads, because a process with threads cannot make a user
namespace (unshare(2)). What it says and hears, over one socket:

    tap's descriptor   ->     or {"errno": ..., "step": ...}, and it ends
                       <-     the configuration, as JSON; an end of file: netstack gave up, and it ends
    end of file        ->     the command runs: its end of the socket is closed on exec; or {"errno": ..., "step": ...}

Nothing here may import what `netstack run` imports: it would cost memory in every command's process until exec.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from netstack.host import rtnetlink
from netstack.vde.namespace import NamespaceError, open_tap, send_error, send_tap, unshare_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# include/uapi/linux/mount.h, prctl.h
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_PR_SET_PDEATHSIG = 1

# Where the sockets of the host's own resolver are: a program that asks there would get the host's answers, or wait for
# those of a service that cannot be reached from here. With nobody listening, the C library goes on to resolv.conf.
_RESOLVERS = ("/run/systemd/resolve", "/run/nscd")

# Where services keep the file that resolv.conf leads to, and nothing that a command needs. Not any directory in /run: a
# user's own sockets are there, and in some containers the host's /etc.
_WRITERS = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/run/connman", "/run/netconfig")

# Python ignores these, and ignored they would stay for the command (subprocess: restore_signals).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def become_guest(
    sock: socket.socket, parent: int, mask: Iterable[int], device: str, mtu: int, command: Sequence[str]
) -> NoReturn:
    """Never returns: this process becomes the command, or ends. `mask`: the signals that are blocked in it."""
    status = 1
    try:
        _prepare(sock, parent, device, mtu)
        _configure(device, _hear(sock))
        _run(command, mask)
    except NamespaceError as error:
        with contextlib.suppress(OSError):
            send_error(sock, error)
    except (EOFError, OSError):  # netstack has ended, and said why
        pass
    finally:
        os._exit(status)


def _prepare(sock: socket.socket, parent: int, device: str, mtu: int) -> None:
    is_root = unshare_all()
    # The command does not outlive its network. (After a change of user the kernel would forget this.)
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise EOFError
    for name, value in (
        # What is configured below is all there is: nothing to wait for, nothing to be learnt. For devices to come.
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        ("net/ipv6/conf/default/autoconf", "0"),
        # All groups there are may ping.
        ("net/ipv4/ping_group_range", "0 2147483647" if is_root else "0 0"),
    ):
        with contextlib.suppress(OSError):  # no IPv6 in this kernel; /proc/sys is read-only in some containers
            Path("/proc/sys", name).write_text(value)
    tap = open_tap(device, mtu)
    send_tap(sock, tap)
    os.close(tap)


def _hear(sock: socket.socket) -> dict[str, Any]:
    message = sock.recv(65536)
    if not message:
        raise EOFError
    said: dict[str, Any] = json.loads(message)
    return said


def _configure(device: str, given: dict[str, Any]) -> None:
    with _step("configuring the network"):
        rtnetlink.bring_up("lo")
        for address, length, broadcast in given["addresses"]:
            rtnetlink.add_address(device, bytes.fromhex(address), length, bytes.fromhex(broadcast))
        for gateway in given["gateways"]:
            rtnetlink.add_default_route(device, bytes.fromhex(gateway))
    with _step("mounting"):
        # What the host mounts later is seen in here, and not the other way round.
        _mount("none", Path("/"), _MS_REC | _MS_SLAVE)
    replace_resolver(Path("/etc/resolv.conf"), given["resolv_conf"])


def replace_resolver(path: Path, text: str) -> None:
    """Have this text stand where `path` leads to, and nobody listen where the host's resolvers do.

    A mount over a file is gone when the host renames another file over that one (rename(2)), as services do that write
    resolv.conf, and one over a socket when its service starts again. So where the file is in a directory of its own,
    that is mounted over, which stays. Not so /etc: what the command writes there, as root, is meant to be the host's.
    """
    target = path.resolve() if path.exists() else path
    folders = [Path(name) for name in _RESOLVERS]
    if str(target.parent) in _WRITERS:
        folders.append(target.parent)
    for folder in dict.fromkeys(folders):
        if folder.is_dir():
            _cover(folder, text, {target.name} if folder == target.parent else set())
    if target.parent not in folders:
        _stand_in(target, text)


def _cover(folder: Path, text: str, names: set[str]) -> None:
    """Have a directory stand where `folder` is, in which these files and every resolv.conf have this text, alone."""
    with _step(f"mounting over {folder}"):
        with contextlib.suppress(PermissionError):
            names |= {entry.name for entry in folder.iterdir() if entry.name.endswith("resolv.conf")}
        _mount("tmpfs", folder, 0, "tmpfs", "mode=755,size=1m")
        for name in names:
            (folder / name).write_text(text)
            (folder / name).chmod(0o644)


def _stand_in(target: Path, text: str) -> None:
    """Have a file with this text stand where `target` is; where nothing is, nothing can."""
    if not target.exists():
        return
    with _step(f"mounting over {target}"), tempfile.NamedTemporaryFile("w", prefix="netstack-") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        _mount(file.name, target, _MS_BIND)  # what it shows stays when the name is gone


def _run(command: Sequence[str], mask: Iterable[int]) -> NoReturn:
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that came meanwhile is to end us, and not to be a traceback
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with _step(f"starting {command[0]}"):
        os.execvp(command[0], list(command))
    raise AssertionError


@contextlib.contextmanager
def _step(what: str) -> Any:
    """Name what was tried when it fails."""
    try:
        yield
    except OSError as error:
        raise NamespaceError(error.errno or errno.EIO, what) from None


def _mount(source: str, target: Path, flags: int, kind: str = "none", data: str = "") -> None:
    if _libc().mount(source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
