"""`tap://NAME?netns=PATH`, `?netns=PID` and `?fd=N`: taps come and go with their namespaces.

An open tap keeps its namespace alive, even one that nobody is left in, so waiting for the device to vanish would be
waiting for ourselves. What ends a link is therefore looked at from outside: of a process its end (a pidfd), of a path
that something else stands there or nothing. A namespace at a path may come back, as that of a restarted container
does; it is looked for every second. Numbers of processes are used again, so a process that ended is not looked for.

A device that is deleted inside a namespace that lives on is made again, as a machine's network card would be there
again after a restart. It has the same MAC then, and with it the same addresses; that of a namespace at a path is the
same after a restart of netstack, too.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Protocol

import trio

from netstack.vde.attachment import Attachment, LinkFactory
from netstack.vde.namespace import NamespaceError, make_tap, open_namespace
from netstack.vde.tap import TapLink, set_mac

_LOOK = 1.0

# Locally administered, and one station's: the two low bits of the first byte are 10 (IEEE 802). The gateway's is 52:55.
_MAC_PREFIX = b"\x52\x56"


class TapFactory(LinkFactory, Protocol):
    """Makes the links of a network and joins them to its stack."""

    @property
    def mtu(self) -> int: ...
    def tap(self, name: str, fd: int) -> TapLink: ...


class TapDevice(Attachment):
    """A tap that we make in somebody's network namespace."""

    def __init__(self, uri: str, factory: TapFactory, *, device: str, path: str = "", pid: int = 0) -> None:
        super().__init__(uri, factory)
        self._taps = factory
        self._device = device
        self._path = path
        self._pid = pid
        self._watched = -1  # a pidfd
        # Numbers of processes tell nothing about who they are.
        self._mac = _MAC_PREFIX + (hashlib.sha256(uri.encode()).digest()[:4] if path else os.urandom(4))
        self._identity: tuple[int, int] | None = None
        self._gone = trio.Event()

    def _name(self) -> str:
        """There is one guest at a time."""
        return self.uri

    async def open(self) -> None:
        if self._pid:
            try:
                self._watched = os.pidfd_open(self._pid)
            except OSError as error:
                raise NamespaceError(error.errno or 0, f"process {self._pid}") from None
        try:
            await self._plug_in()
        except BaseException:
            self._stop_watching()
            raise

    async def run(self) -> None:
        told = ""
        try:
            while not await self._is_over():
                if not self.links:
                    try:
                        await self._plug_in()
                    except OSError as error:
                        problem = str(error)
                        if problem != told:
                            self._factory.tell("waiting for the guest's namespace", link=self.uri, error=problem)
                            told = problem
                    else:
                        told = ""
        finally:
            self.close()
            self._stop_watching()

    async def _plug_in(self) -> None:
        """Make the tap and its link."""
        namespace = open_namespace(pid=self._pid, path=self._path)
        try:
            status = os.fstat(namespace)
            identity = status.st_dev, status.st_ino
            fd = await trio.to_thread.run_sync(make_tap, self._device, self._taps.mtu, namespace)
        finally:
            os.close(namespace)
        try:
            set_mac(fd, self._mac)
            link = self._taps.tap(self._name(), fd)
        except BaseException:
            os.close(fd)
            raise
        self._identity = identity
        self._adopt(link)

    async def _is_over(self) -> bool:
        """A second later: whether the namespace will not come back. Closes the link when it is gone."""
        if self._pid:
            with trio.move_on_after(_LOOK):
                await trio.lowlevel.wait_readable(self._watched)
                for link in list(self.links):
                    link.close(f"process {self._pid} ended")
                return True
            return False
        await trio.sleep(_LOOK)
        if self.links and self._identity is not None and not self._is_there():
            for link in list(self.links):
                link.close("its namespace is gone")
        return False

    def _is_there(self) -> bool:
        try:
            status = Path(self._path).stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def _stop_watching(self) -> None:
        if self._watched >= 0:
            os.close(self._watched)
            self._watched = -1


class TapDescriptor(Attachment):
    """A tap that our parent made and left us."""

    def __init__(self, uri: str, factory: TapFactory, *, fd: int) -> None:
        super().__init__(uri, factory)
        self._taps = factory
        self._fd = fd
        self._gone = trio.Event()

    async def open(self) -> None:
        try:
            fd = os.dup(self._fd)
        except OSError as error:
            raise OSError(error.errno, f"descriptor {self._fd} is not open ({error.strerror})") from None
        try:
            link = self._taps.tap(self.uri, fd)
        except OSError as error:
            os.close(fd)
            raise OSError(
                errno.ENOTTY, f"descriptor {self._fd} is not a tap with IFF_VNET_HDR ({error.strerror})"
            ) from None
        os.close(self._fd)
        self._adopt(link, self._gone.set)

    async def run(self) -> None:
        try:
            await self._gone.wait()
        finally:
            self.close()
