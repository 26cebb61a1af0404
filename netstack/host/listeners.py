"""Listening sockets of forwards: TCP and unix, accepted by the poller without a task each.

A listener that is idle costs a descriptor and an entry in the poller. When callers come, on_ready() accepts a bounded
number and hands each on at once, with its address as packed bytes. It pauses, by leaving the poller, where accepting
would be wrong: when the forward has as many connections pending as it may (resume() goes on), and for a second when the
host has no descriptors or memory left. Meanwhile callers wait in the kernel's queue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from netstack.core.ports import READABLE, Poller
from netstack.core.timers import NEVER

if TYPE_CHECKING:
    from netstack.core.timers import Timers

# accept() calls of one wakeup: then flows have their turn.
_ACCEPTS: Final = 64

# Connections that wait in the kernel; Linux takes no more than net.core.somaxconn, 4096 since 5.4.
BACKLOG: Final = 4096

# The host has nothing left: how long until accept() is tried again.
_PAUSE: Final = 1.0
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

_MAPPED: Final = bytes(10) + b"\xff\xff"

# (connection, the caller's address or None, the caller's port, now)
OnConnection = Callable[[socket.socket, bytes | None, int, float], None]


class Listener:
    """One listening socket in the poller. Not watched before resume()."""

    def __init__(
        self,
        sock: socket.socket,
        poller: Poller,
        timers: Timers,
        on_connection: OnConnection,
        *,
        full: Callable[[], bool] = lambda: False,
        on_exhausted: Callable[[OSError], None] = lambda error: None,
    ) -> None:
        """It owns `sock`. full() says whether to pause until resume()."""
        self._sock = sock
        self._fd = sock.fileno()
        self._poller = poller
        self._timers = timers
        self._on_connection = on_connection
        self._full = full
        self._on_exhausted = on_exhausted
        self._watched = False
        self._expected = 1  # so many callers wait, as it seems: to ask for one more costs as much as to accept it
        self._path, self._inode = _place_of(sock)
        self.timer_at = self.heap_at = NEVER

    @property
    def port(self) -> int:
        """The TCP port; 0 for a unix socket."""
        return 0 if self._path else int(self._sock.getsockname()[1])

    def resume(self) -> None:
        """Accept; harmless when it does so already, or is closed. Raises OSError when the poller has no more room."""
        if not self._watched and self._fd >= 0 and self.timer_at == NEVER:
            self._poller.register(self._fd, self, READABLE)
            self._watched = True

    def on_ready(self, events: int, now: float) -> None:
        """Callers wait."""
        sock = self._sock
        for count in range(self._expected):
            if self._full():
                self._pause()
                return
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                self._expected = max(1, count)
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._on_exhausted(error)
                    self._pause()
                    self._timers.arm(self, now + _PAUSE)
                    return
                continue  # the caller's connection failed before we came (accept(2)): ECONNABORTED and the like
            connection.setblocking(False)
            if self._path:
                self._on_connection(connection, None, 0, now)
            else:
                self._on_connection(connection, _packed(sock.family, address[0]), address[1], now)
            if self._fd < 0:
                return  # it was closed by what it brought
        self._expected = min(self._expected * 2, _ACCEPTS)  # and what there is besides is reported again

    def on_timer(self, now: float) -> None:
        """The pause is over."""
        try:
            self.resume()
        except OSError as error:
            self._on_exhausted(error)
            self._timers.arm(self, now + _PAUSE)

    def close(self) -> None:
        """Stop listening, and remove the socket's file. May be called twice."""
        if self._fd < 0:
            return
        self._pause()
        self._timers.cancel(self)
        self._fd = -1
        if self._path:
            # The file first: while the socket holds its inode, no successor's file can have the same number.
            with contextlib.suppress(OSError):
                place = Path(self._path)
                if place.lstat().st_ino == self._inode:
                    place.unlink()
        self._sock.close()

    def _pause(self) -> None:
        if self._watched:
            self._watched = False
            self._poller.unregister(self._fd)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen at an address of the host; "::" takes both families. Port 0 takes a free one. Raises OSError."""
    ipv6 = ":" in host
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections of a predecessor in TIME-WAIT are no obstacle. Two that listen are, on Linux: socket(7).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts has it too (Linux, BSD)
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        # getaddrinfo() reads the zone of a link-local address, fe80::1%eth0.
        sock.bind(socket.getaddrinfo(host, port, sock.family, flags=socket.AI_NUMERICHOST)[0][4])
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: str, backlog: int = BACKLOG) -> socket.socket:
    """Listen at a unix socket that only its owner can use; one that nobody listens at is replaced.

    Raises OSError: EADDRINUSE when somebody does, EEXIST when there is a file that is no socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # bind() makes the file with 0777 & ~umask: a chmod afterwards would leave a moment in which anybody may
        # connect.
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is there", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        code = probe.connect_ex(path)
    if code == errno.ECONNREFUSED:
        Path(path).unlink(missing_ok=True)
    elif code != errno.ENOENT:
        raise OSError(errno.EADDRINUSE, "another process listens there", path)


def _place_of(sock: socket.socket) -> tuple[str, int]:
    """The path of a unix socket and its inode."""
    if sock.family != socket.AF_UNIX:
        return "", 0
    path = sock.getsockname()
    return path, Path(path).lstat().st_ino


def _packed(family: int, address: str) -> bytes:
    """A caller's address as bytes. Callers over IPv4 at a socket of both families are themselves (RFC 4291 2.5.5.2)."""
    if family == socket.AF_INET:
        return socket.inet_aton(address)
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    return packed[12:] if packed.startswith(_MAPPED) else packed
