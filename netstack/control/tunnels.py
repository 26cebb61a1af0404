"""Connections of the host's programs into guests, over the API's socket.

    POST /tunnel?ip=192.168.5.15&port=22          gvproxy's: `OK`, two bytes without a status line, and before the guest
                                                  was asked; the end of the connection says that it refused
    POST /v1/connect?guest=debian&port=22         ours: 101 when the guest has accepted, else the status that fits:
                                                  404 there is no such guest, 502 it refused, 504 it does not answer

After that the connection leads to the guest, byte for byte, half close and reset included: the client's socket itself
becomes the host's side of the flow. To the guest it comes from the gateway's address.

While the guest is asked, nobody reads the socket, so nothing that the client sends early is lost. The flow owns the
socket from the beginning and closes it when it fails, so that the words of a failure go over a duplicate of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import trio

if TYPE_CHECKING:
    from netstack.control.front import Takeover, Takeovers

_UPGRADED: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"

# What the guest or the way to it said -> a status. Everything else is 502.
_STATUS: Final = {errno.EHOSTUNREACH: 504, errno.ETIMEDOUT: 504, errno.EADDRINUSE: 503, errno.EMFILE: 503}


class UnknownGuestError(Exception):
    """There is no such guest; str() is one line."""


class GuestOpener(Protocol):
    """Opens connections to guests."""

    def open_guest(self, sock: socket.socket, guest: str, port: int, on_opened: Callable[[int], None]) -> None:
        """Make `sock` the host's side of a connection to a guest by name or address; "" is the first one.

        on_opened(0) when the guest accepted, else on_opened(errno), the socket being closed. Raises UnknownGuestError,
        and then the socket is still the caller's.
        """


def tunnel_takeovers(network: GuestOpener) -> Takeovers:
    """What to take over."""

    def tunnel(request: Takeover) -> None:
        sock = request.sock
        address, text = request.query.get("ip", ""), request.query.get("port", "")
        if not address:
            return _answer(sock, 500, "ip is mandatory")
        # strconv.Atoi; and Go would cut a larger number to 16 bits.
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
            return _answer(sock, 500, f'strconv.Atoi: parsing "{text}": invalid syntax')
        if not 0 <= int(text) <= 0xFFFF:
            return _answer(sock, 500, f'strconv.Atoi: parsing "{text}": value out of range')
        with contextlib.suppress(OSError):
            sock.send(b"OK")
        try:
            network.open_guest(sock, address, int(text), lambda error: None)
        except UnknownGuestError:
            sock.close()
        return None

    def connect(request: Takeover) -> None:
        sock = request.sock
        if request.method != "POST":
            return _answer(sock, 405, "connect with POST", {"allow": "POST"})
        guest, text = request.query.get("guest", ""), request.query.get("port", "")
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 0xFFFF):
            return _answer(sock, 400, "port: must be a number, 1 to 65535")
        spare = socket.socket(fileno=os.dup(sock.fileno()))

        def on_opened(error: int) -> None:
            """Untrusted: what a guest answers decides when and how this is called."""
            if error:
                words = f"{guest or 'the first guest'} port {text}: {os.strerror(error)}"
                _answer(spare, _STATUS.get(error, 502), words)
                return
            with contextlib.suppress(OSError):
                spare.send(_UPGRADED)
            spare.close()

        try:
            network.open_guest(sock, guest, int(text), on_opened)
        except UnknownGuestError as error:
            sock.close()
            _answer(spare, 404, str(error))
        return None

    return {"/tunnel": tunnel, "/v1/connect": connect}


def _answer(sock: socket.socket, status: int, words: str, headers: dict[str, str] | None = None) -> None:
    """Refuse. The answer always fits into the buffer of a socket into which nothing was written yet."""
    from netstack.control.front import write_answer

    with contextlib.suppress(OSError):
        sock.send(write_answer(status, words, headers))
        sock.shutdown(socket.SHUT_WR)
    # Not at once: a flow that failed is about to reset its own descriptor, which would take the answer back.
    trio.lowlevel.current_trio_token().run_sync_soon(_close, sock)


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    sock.close()
