"""The host's side of one forward: its listening sockets, joined to what does the work (`core.forwards.Engine`).

`Ports` is what `gateway.forwards` needs of a kind of forward: open ports one by one, then begin, then close. TCP and
unix sockets are here; UDP is in `gateway.udp_ports`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Protocol

from netstack.core.forwards import Engine, FindGuest, OpenToGuest, TcpForward
from netstack.core.ports import Events, Poller
from netstack.core.stack import Stack
from netstack.host.listeners import Listener, listen_tcp, listen_unix


class Ports(Protocol):
    """The open ports of one forward."""

    @property
    def engine(self) -> Engine: ...

    def open(self, host: str, host_port: int, guest_port: int) -> int:
        """Take a port of the host, without serving it yet; which one it is. Raises OSError."""
        ...

    def start(self) -> None:
        """Serve all that was opened. Raises OSError."""

    def close(self, now: float) -> None:
        """Give the ports back."""


class TcpPorts:
    """Ports whose connections go to a guest's TCP ports."""

    def __init__(
        self,
        stack: Stack,
        poller: Poller,
        find_guest: FindGuest,
        events: Events | None,
        *,
        as_gateway: bool = False,
        through: OpenToGuest | None = None,
    ) -> None:
        self._stack = stack
        self._poller = poller
        self._events = events
        self._listeners: list[Listener] = []
        self.engine = TcpForward(stack, find_guest, as_gateway=as_gateway, through=through)
        self.engine.on_room = self._resume

    def open(self, host: str, host_port: int, guest_port: int) -> int:
        """Listen at an address of the host. Raises OSError."""
        return self._add(listen_tcp(host, host_port), guest_port).port

    def open_path(self, path: str, guest_port: int) -> None:
        """Listen at a unix socket. Raises OSError."""
        self._add(listen_unix(path), guest_port)

    def start(self) -> None:
        """Accept. Raises OSError when the poller has no more room."""
        for listener in self._listeners:
            listener.resume()

    def close(self, now: float) -> None:
        """Stop listening. Connections that are open go on."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self.engine.close(now)

    def _add(self, sock: socket.socket, guest_port: int) -> Listener:
        on_connection = self._handler(guest_port)
        engine = self.engine
        listener = Listener(
            sock, self._poller, self._stack.timers, on_connection, full=engine.full, on_exhausted=self._on_exhausted
        )
        self._listeners.append(listener)
        return listener

    def _handler(self, guest_port: int) -> Callable[[socket.socket, bytes | None, int, float], None]:
        on_connection = self.engine.on_connection

        def handle(sock: socket.socket, caller: bytes | None, caller_port: int, now: float) -> None:
            on_connection(sock, caller, caller_port, guest_port, now)

        return handle

    def _resume(self) -> None:
        try:
            self.start()
        except OSError as error:
            self._on_exhausted(error)

    def _on_exhausted(self, error: OSError) -> None:
        self._stack.counters.drop("forward_host_exhausted")
        if self._events is not None:
            words = os.strerror(error.errno or 0)
            self._events.warning("forward exhausted", "the host takes no more connections for forwards", error=words)
