"""How links come and go: listening sockets that accept guests, and connections that are made again.

An `Attachment` is what one link URI stands for. It lives in a trio task of its own, makes links (`make_link`, given by
the gateway, joins them to the stack) and never ends because of one guest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trio

from netstack.vde.link import BaseLink
from netstack.vde.stream import StreamLink

# More guests on one socket than anybody runs on one machine; each costs a read buffer of 1 MiB.
MAX_GUESTS = 256

# A QEMU that restarts is back within a second; one that is gone is asked for every five.
_RETRY_FIRST = 0.2
_RETRY_LONGEST = 5.0

_BACKLOG = 64


class LinkFactory(Protocol):
    """Makes the links of a network and joins them to its stack."""

    def stream(self, name: str, sock: socket.socket) -> StreamLink: ...
    def tell(self, message: str, **fields: object) -> None: ...


class Attachment(ABC):
    """One link URI."""

    def __init__(self, uri: str, factory: LinkFactory) -> None:
        self.uri = uri
        self.links: list[BaseLink] = []
        self._factory = factory
        self._count = 0

    @abstractmethod
    async def open(self) -> None:
        """Make the socket, or fail: OSError, with a message that names the address."""

    @abstractmethod
    async def run(self) -> None:
        """Serve until cancelled. Called once, after open()."""

    def close(self) -> None:
        """Close all links."""
        for link in list(self.links):
            link.close("network closed")

    def _name(self) -> str:
        """What a new link of this attachment is called; numbers are not used again."""
        self._count += 1
        return self.uri if self._count == 1 else f"{self.uri}#{self._count}"

    def _make_link(self, name: str, sock: socket.socket) -> BaseLink:
        """Make a link of a connected stream socket: which kind, subclasses know."""
        return self._factory.stream(name, sock)

    def _admit(self, sock: socket.socket, gone: Callable[[], None] | None = None) -> None:
        """Make a link of a connected stream socket; where that fails, this guest is turned away and no other."""
        try:
            link = self._make_link(self._name(), sock)
        except OSError as error:
            sock.close()
            self._factory.tell("cannot attach a guest", link=self.uri, error=str(error))
            if gone is not None:
                gone()
        else:
            self._adopt(link, gone)

    def _adopt(self, link: BaseLink, gone: Callable[[], None] | None = None) -> None:
        """Keep track of a link until it closes."""
        if link.closed:  # while we said hello: its guest was gone already
            if gone is not None:
                gone()
            return
        self.links.append(link)
        join = link.on_closed

        def on_closed(why: str) -> None:
            self.links.remove(link)
            if join is not None:
                join(why)
            if gone is not None:
                gone()

        link.on_closed = on_closed


class StreamListener(Attachment):
    """`unix://PATH` and `tcp://HOST:PORT`: several guests, each may come and go."""

    def __init__(self, uri: str, factory: LinkFactory, *, path: str = "", host: str = "", port: int = 0) -> None:
        super().__init__(uri, factory)
        self._path = path
        self._host = host
        self._port = port
        self._sock: socket.socket | None = None
        self._made: tuple[int, int] | None = None

    @property
    def address(self) -> str:
        """Where guests connect to, with the real port where 0 was asked for."""
        if self._path or self._sock is None:
            return self._path
        host, port = self._sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def open(self) -> None:
        if self._path:
            self._sock = listen_unix(self._path)
            self._made = _identity(self._path)
        else:
            self._sock = await _listen_tcp(self._host, self._port)

    async def run(self) -> None:
        sock = self._sock
        if sock is None:  # closed before it began
            return
        try:
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    connection, _ = sock.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    # No descriptors or no memory: a queue of guests must not become a busy loop (accept(2)).
                    self._factory.tell("cannot accept a guest", link=self.uri, error=str(error))
                    await trio.sleep(0.5)
                    continue
                if len(self.links) >= MAX_GUESTS:
                    self._factory.tell("too many guests on one socket", link=self.uri, limit=MAX_GUESTS)
                    connection.close()
                    continue
                self._admit(connection)
        finally:
            self.close()

    def close(self) -> None:
        super().close()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            with contextlib.suppress(OSError):
                if self._made is not None and _identity(self._path) == self._made:  # not the one of our successor
                    Path(self._path).unlink()


class StreamConnector(Attachment):
    """`connect+unix://PATH` and `connect+tcp://HOST:PORT`: the guest's side listens; we come back when it does."""

    def __init__(self, uri: str, factory: LinkFactory, *, path: str = "", host: str = "", port: int = 0) -> None:
        super().__init__(uri, factory)
        self._path = path
        self._host = host
        self._port = port

    def _name(self) -> str:
        """There is one guest at a time, the same one as far as we know."""
        return self.uri

    async def open(self) -> None:
        """Nothing to make: the other side may come later."""

    async def run(self) -> None:
        delay = _RETRY_FIRST
        told = ""
        try:
            while True:
                try:
                    sock = await self._connect()
                except OSError as error:
                    problem = str(error)
                    if problem != told:
                        self._factory.tell("waiting for the guest's side", link=self.uri, error=problem)
                        told = problem
                    await trio.sleep(delay)
                    delay = min(delay * 2, _RETRY_LONGEST)
                    continue
                gone = trio.Event()
                delay = _RETRY_FIRST
                told = ""
                self._admit(sock, gone.set)
                await gone.wait()
                await trio.sleep(delay)  # a peer that accepts and closes at once must not become a busy loop
        finally:
            self.close()

    async def _connect(self) -> socket.socket:
        if self._path:
            made = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
            try:
                await made.connect(self._path)
            except BaseException:
                made.close()
                raise
            return _take_over(made)
        stream = await trio.open_tcp_stream(self._host, self._port)
        return _take_over(stream.socket)


class StreamDescriptor(Attachment):
    """`fd://N`: a connected stream socket that our parent left us."""

    def __init__(self, uri: str, factory: LinkFactory, *, fd: int) -> None:
        super().__init__(uri, factory)
        self._fd = fd
        self._gone = trio.Event()

    async def open(self) -> None:
        try:
            sock = socket.socket(fileno=os.dup(self._fd))
        except OSError as error:
            raise OSError(error.errno, f"descriptor {self._fd} is not an open socket ({error.strerror})") from None
        if sock.type != socket.SOCK_STREAM:
            sock.close()
            raise OSError(errno.EPROTOTYPE, f"descriptor {self._fd} is not a stream socket")
        try:
            sock.getpeername()
        except OSError:
            sock.close()
            raise OSError(errno.ENOTCONN, f"descriptor {self._fd} is not a connected socket") from None
        os.close(self._fd)
        self._adopt(self._factory.stream(self.uri, sock), self._gone.set)

    async def run(self) -> None:
        try:
            await self._gone.wait()
        finally:
            self.close()


def _identity(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _take_over(sock: trio.socket.SocketType) -> socket.socket:
    """The plain socket of a trio one, which gives it up."""
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())


def listen_unix(path: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A non-blocking listening socket at `path`, mode 0600; a dead one that is in the way is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise OSError(errno.EEXIST, f"{path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except BlockingIOError:
                raise OSError(errno.EADDRINUSE, f"{path} is in use by another process") from None
            except (ConnectionRefusedError, FileNotFoundError):
                Path(path).unlink()
            except OSError as error:
                raise OSError(error.errno, f"cannot listen at {path}: {error.strerror or error}") from None
            else:
                raise OSError(errno.EADDRINUSE, f"{path} is in use by another process")
    sock = socket.socket(socket.AF_UNIX, kind)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen at {path}: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    return sock


async def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(error.errno, f"cannot resolve {host}: {error.strerror}") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen at {host}:{port}: {error.strerror}") from None
    return sock
