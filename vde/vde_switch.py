"""`vde://DIR`: a VDE switch, made of a directory, that QEMU's `-netdev vde,sock=DIR` and libvdeplug plug into.

The control protocol is that of vde_switch (vde-2 src/vde_switch/datasock.c; libvdeplug): DIR/ctl is a listening stream
socket; a client sends one request there and keeps the connection for as long as it is plugged in.

    request, native endian, packed: u32 magic 0xfeedface | u32 version 3 | u32 type | sockaddr_un 110 | text 0..128
    reply:                          sockaddr_un 110, the switch's datagram socket for this port

    type & 0xff: 0 a port, 1 the management's port; type >> 8: the port number asked for, 0 for any

The switch makes a datagram socket, connects it to the client's path, binds it to DIR/NNN.F, and answers with that path.
Frames are then datagrams, one each, raw. The end of the control connection unplugs.

QEMU 7.2 takes frames of 9,014 bytes whole over VDE, not more is promised: the MTU is 9,000.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path
from typing import Protocol

import trio

from netstack.vde.attachment import MAX_GUESTS, Attachment, LinkFactory, listen_unix
from netstack.vde.datagram import DatagramLink

VDE_MTU = 9000

_MAGIC = 0xFEEDFACE
_VERSION = 3
_NEW_PORT = (0, 1)
# magic 4 | version 4 | type 4 | sun_family 2 | sun_path 108
_REQUEST = struct.Struct("=IIIH108s")
_DESCRIPTION = 128
# sun_family 2 | sun_path 108
_ADDRESS = struct.Struct("=H108s")

# A client sends its request at once; one that does not is not a client.
_REQUEST_TIMEOUT = 5.0


class VdeFactory(LinkFactory, Protocol):
    """Makes the links of a VDE switch as well."""

    def datagram(self, name: str, sock: socket.socket, mtu: int) -> DatagramLink: ...


def parse_request(data: bytes) -> tuple[int, str, str] | None:
    """The port asked for (0: any), the client's socket path and its description. Untrusted; None when malformed."""
    if not _REQUEST.size <= len(data) <= _REQUEST.size + _DESCRIPTION:
        return None
    magic, version, kind, family, path = _REQUEST.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or kind & 0xFF not in _NEW_PORT or family != socket.AF_UNIX:
        return None
    name = path.split(b"\0", 1)[0]
    if not name.startswith(b"/"):
        return None  # an unnamed client cannot be answered; a relative name would be looked up in our directory
    description = data[_REQUEST.size :].split(b"\0", 1)[0].decode("utf-8", "replace")
    return kind >> 8, os.fsdecode(name), description


def write_address(path: str) -> bytes:
    """A sockaddr_un as the reply carries it."""
    return _ADDRESS.pack(socket.AF_UNIX, os.fsencode(path))


class VdeSwitch(Attachment):
    """A directory that is a VDE switch; each port is a link of its own."""

    def __init__(self, uri: str, factory: VdeFactory, *, directory: str) -> None:
        super().__init__(uri, factory)
        self._vde = factory
        self._directory = Path(directory)
        self._listener: socket.socket | None = None
        self._ports: set[int] = set()
        self._made_directory = False

    async def open(self) -> None:
        directory = self._directory
        try:
            directory.mkdir(mode=0o700)
            self._made_directory = True
        except FileExistsError:
            if not directory.is_dir():
                raise OSError(errno.ENOTDIR, f"{directory} exists and is not a directory") from None
        except OSError as error:
            raise OSError(error.errno, f"cannot make the switch's directory {directory}: {error.strerror}") from None
        self._listener = listen_unix(str(directory / "ctl"))
        for stale in directory.glob("[0-9][0-9][0-9].*"):  # ports of a switch that did not clean up
            if stale.is_socket():
                stale.unlink()

    async def run(self) -> None:
        listener = self._listener
        if listener is None:  # closed before it began
            return
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        connection, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        self._factory.tell("cannot accept a plug", link=self.uri, error=str(error))
                        await trio.sleep(0.5)
                        continue
                    nursery.start_soon(self._serve, trio.socket.from_stdlib_socket(connection))
        finally:
            self.close()

    async def _serve(self, control: trio.socket.SocketType) -> None:
        """One client, from its request until it unplugs."""
        with control:
            data = b""
            with trio.move_on_after(_REQUEST_TIMEOUT), contextlib.suppress(OSError):
                while len(data) < _REQUEST.size:
                    piece = await control.recv(_REQUEST.size + _DESCRIPTION + 1 - len(data))
                    if not piece:
                        return
                    data += piece
            request = parse_request(data)
            if request is None:
                self._factory.tell("not a VDE request", link=self.uri)
                return
            wanted, client, description = request
            plugged = self._plug(wanted, client, description)
            if plugged is None:
                return
            link, path = plugged
            gone = trio.Event()
            self._adopt(link, gone.set)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._await_end, control, nursery.cancel_scope)
                    await control.send(write_address(str(path)))
                    await gone.wait()
                    nursery.cancel_scope.cancel()
            except* OSError:
                pass  # it unplugged before it read our answer
            finally:
                link.close("guest unplugged")
                self._ports.discard(int(path.name[:3]))
                path.unlink(missing_ok=True)

    async def _await_end(self, control: trio.socket.SocketType, scope: trio.CancelScope) -> None:
        with contextlib.suppress(OSError):
            while await control.recv(64):
                pass
        scope.cancel()

    def _plug(self, wanted: int, client: str, description: str) -> tuple[DatagramLink, Path] | None:
        number = self._free_port(wanted)
        if number is None:
            self._factory.tell("no such port is free", link=self.uri, port=wanted)
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = self._directory / f"{number:03d}.{sock.fileno()}"
        try:
            sock.connect(client)
            path.unlink(missing_ok=True)
            sock.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            sock.close()
            self._factory.tell("cannot reach the plug's socket", link=self.uri, path=client, error=str(error))
            return None
        name = f"{self.uri}#{number}"
        try:
            link = self._vde.datagram(name, sock, VDE_MTU)
        except OSError as error:
            sock.close()
            path.unlink(missing_ok=True)
            self._factory.tell("cannot attach a guest", link=name, error=str(error))
            return None
        self._ports.add(number)
        self._factory.tell("plugged in", link=name, client=description)
        return link, path

    def _free_port(self, wanted: int) -> int | None:
        if wanted:
            return wanted if wanted <= MAX_GUESTS and wanted not in self._ports else None
        return next((number for number in range(1, MAX_GUESTS + 1) if number not in self._ports), None)

    def close(self) -> None:
        super().close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                (self._directory / "ctl").unlink()
        # Where guests were plugged in, their ports' sockets go with their tasks, and the directory when run() ends.
        if self._made_directory:
            with contextlib.suppress(OSError):
                self._directory.rmdir()
