"""Being a service: what `netstack run` owes to whoever started it, besides the network itself.

Readiness is told three ways, each after everything that it promises is true: a line on standard error, a line on the
file descriptor that the parent chose, and sd_notify(3) for systemd.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import time
from pathlib import Path

from netstack.cli.faults import INPUT_ERRNOS, CommandError, InputError, say, what_to_do


def raise_file_limit() -> tuple[int, int]:
    """Open as many files as this process may: each flow takes one. Returns the limits as they were."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says infinity and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    return before


class ReadyFd:
    """The file descriptor on which a parent waits for `ready`."""

    def __init__(self, fd: int) -> None:
        """Raises InputError when `fd` is not open."""
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            raise InputError(f"--ready-fd {fd}: no such open file descriptor; the parent must leave it open") from None
        os.set_inheritable(fd, False)
        self._fd = fd

    def tell(self) -> None:
        """Write the line and close, unless it is one of the three that every program has."""
        try:
            os.write(self._fd, b"ready\n")
            if self._fd > 2:
                os.close(self._fd)
        except OSError as error:  # the parent is gone, and the network may be wanted all the same
            say(f"netstack: --ready-fd {self._fd}: {error.strerror}")


class PidFile:
    """A file with the number of this process, locked, so that it always names a live one."""

    def __init__(self, path: str) -> None:
        """Raises InputError when there cannot be such a file, CommandError when another netstack holds it."""
        self._path = Path(path)
        self._fd = -1
        if not self._path.parent.is_dir():
            raise InputError(f"--pidfile {path}: there is no directory {self._path.parent}")
        if self._path.is_dir():
            raise InputError(f"--pidfile {path}: is a directory; name a file")
        self._refuse_held()

    def _refuse_held(self) -> None:
        with contextlib.suppress(OSError):
            held = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(held, 32).decode(errors="replace").strip()
                raise CommandError(f"--pidfile {self._path}: netstack runs already, as process {owner}") from None
            finally:
                os.close(held)

    def write(self) -> None:
        """Write it. Raises InputError or CommandError."""
        self._refuse_held()  # again: one that was started with us may have been quicker
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)  # of a process that had our number and died here
            # Locked before it has its name: nobody ever sees it empty or unlocked.
            self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._fd, f"{os.getpid()}\n".encode())
            temporary.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            kind = InputError if error.errno in INPUT_ERRNOS else CommandError
            raise kind(f"--pidfile {self._path}: {error.strerror}{what_to_do(error)}") from None

    def remove(self) -> None:
        """Remove it, if it is still ours."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == os.fstat(self._fd).st_ino:
                self._path.unlink()
        os.close(self._fd)
        self._fd = -1


class Systemd:
    """systemd's notification socket: sd_notify(3). Without one, every method does nothing."""

    def __init__(self, path: str | None) -> None:
        # A name beginning with @ is in the abstract namespace, which the kernel writes as a NUL.
        self._address = "\0" + path[1:] if path and path.startswith("@") else path

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        # systemd 253 wants the time of the reload's begin (Type=notify-reload).
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(state.encode(), self._address)
        except OSError as error:
            say(f"netstack: NOTIFY_SOCKET: {error.strerror}")
