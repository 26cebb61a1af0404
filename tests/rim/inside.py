"""Real sockets in a namespace from within a test, and the core's datagram flows upon them.

A thread may leave its process's network namespace by itself (setns(2)), and a socket stays where it was made.
So a test opens its sockets in a thread that has entered the namespace, and uses them like any others.
"""

from __future__ import annotations

import ctypes
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TypeVar

from netstack.core.ports import DatagramSocket, Host, HostSocket
from netstack.host.datagrams import AddressNames, open_udp
from netstack.host.ping import open_ping
from netstack.host.udp_listeners import UdpListener, open_udp_listeners
from tests.core.ip_fakes import FakeStack
from tests.lab.namespaces import Namespace

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
DEADLINE = 10.0


def call_inside(namespace: Namespace, function: Callable[[], T]) -> T:
    """What the function returns or raises when it is called in there."""
    libc = ctypes.CDLL(None, use_errno=True)
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with Path(namespace.path).open() as file:
                if libc.setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(function())
        except BaseException as failure:
            failures.append(failure)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


class InsideHost:
    """netstack's own host sockets, opened in a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._names = AddressNames()

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        raise NotImplementedError

    def is_connected(self, sock: HostSocket) -> bool:
        raise NotImplementedError

    def connect_error(self, sock: HostSocket) -> int:
        raise NotImplementedError

    def reset(self, sock: HostSocket) -> None:
        raise NotImplementedError

    def open_udp(self, address: bytes, port: int) -> DatagramSocket:
        return call_inside(self._namespace, lambda: open_udp(self._names, address, port))

    def listen_udp(self, host: str, port: int) -> list[UdpListener]:
        return call_inside(self._namespace, lambda: open_udp_listeners(self._names, host, port))

    def open_ping(self, address: bytes) -> DatagramSocket:
        return call_inside(self._namespace, lambda: open_ping(self._names, address))


class RealStack(FakeStack):
    """The fake stack with real sockets under it."""

    def __init__(self, namespace: Namespace) -> None:
        host: Host = InsideHost(namespace)
        super().__init__(host)

    def pump(self, condition: Callable[[], object], what: str, *, again: Callable[[], None] | None = None) -> None:
        """Serve the sockets, as the rim would, until the condition holds; `again` is done when nothing comes."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            poll = select.poll()
            for fd, events in self.poller.events.items():
                poll.register(fd, events)
            left = deadline - time.monotonic()
            assert left > 0, f"waited {DEADLINE} s in vain: {what}"
            happened = poll.poll(left * 1000 if again is None else 200)
            for fd, events in happened:
                self.poller.ready(fd, time.monotonic(), events)
            if not happened and again is not None:
                again()


def echo_socket(namespace: Namespace, family: socket.AddressFamily, address: str, port: int = 0) -> socket.socket:
    """A UDP socket in there with which a test plays the peer."""

    def make() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.settimeout(DEADLINE)
        sock.bind((address, port))
        return sock

    return call_inside(namespace, make)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def wait_readable(sock: DatagramSocket, events: int = select.POLLIN) -> int:
    """What poll() says of the socket when one of the events, or an error, is there."""
    happened = is_ready(sock, events, DEADLINE)
    assert happened, f"waited {DEADLINE} s in vain"
    return happened


def is_ready(sock: DatagramSocket, events: int, timeout: float) -> int:
    """The same; 0 when nothing happened in time."""
    poll = select.poll()
    poll.register(sock.fileno(), events)
    return next((happened for _, happened in poll.poll(timeout * 1000)), 0)
