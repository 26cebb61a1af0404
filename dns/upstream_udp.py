"""Queries to nameservers by UDP: a socket for each, one task for all (RFC 5452).

Theory of operation
-------------------
Each query leaves from a socket of its own, connected to the server: so each has a fresh random port (the kernel's), a
fresh random ID (ours), and the kernel drops what does not come from that address and port (RFC 5452 9.2). What arrives
must have that ID and the same question; anything else is somebody's guess, is counted, and the wait goes on.

The sockets are in one nested epoll (kqueue on macOS), and one task waits for that: a task, or a trio wait, for each
socket would cost more than the query. Whoever asked is told by a plain call.

Threads: none; all of it runs in trio's.
"""

from __future__ import annotations

import errno
import secrets
import selectors
import socket
import sys
from collections import Counter
from collections.abc import Callable

import trio

from netstack.dns.message import Question, is_answer_to
from netstack.dns.routes import Server

# Open at a time: descriptors that the guests' flows do not get.
MAX_SOCKETS = 2048

# Packets that one socket may bring in one turn: guesses come in floods.
_BURST = 16

_IP_BOUND_IF, _IPV6_BOUND_IF = 25, 125  # <netinet/in.h> and <netinet6/in6.h> of macOS; Python does not name them

# Ours, and no sign that a server is not there.
OUR_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})

_buffer_size = 65535


def resolve_address(address: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    """The socket address of a numeric address. Raises OSError for what is none, or whose interface is not there."""
    if ":" not in address:
        try:
            socket.inet_pton(socket.AF_INET, address)
        except (OSError, ValueError):
            raise OSError(errno.EINVAL, f"no address: {address}") from None
        return socket.AF_INET, (address, port)
    bare, _, interface = address.partition("%")
    try:
        socket.inet_pton(socket.AF_INET6, bare)
    except (OSError, ValueError):
        raise OSError(errno.EINVAL, f"no address: {address}") from None
    # The number of an interface changes over time, so it is asked for each time.
    scope = (int(interface) if interface.isdecimal() else socket.if_nametoindex(interface)) if interface else 0
    return socket.AF_INET6, (bare, port, 0, scope)


def open_socket(server: Server, kind: int) -> tuple[socket.socket, tuple[object, ...]]:
    """A non-blocking socket for a server, bound to its interface where the host allows that, and the server's address.

    Raises OSError.
    """
    family, address = resolve_address(server.address, server.port)
    sock = socket.socket(family, kind | getattr(socket, "SOCK_CLOEXEC", 0))
    try:
        sock.setblocking(False)
        if server.interface:
            _bind_to(sock, family, server.interface)
    except BaseException:
        sock.close()
        raise
    return sock, address


def _bind_to(sock: socket.socket, family: int, interface: str) -> None:
    """Have it use this interface, whatever the routes say (two networks may both have a 192.168.1.1)."""
    try:
        if hasattr(socket, "SO_BINDTODEVICE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        elif sys.platform == "darwin":
            level, option = (
                (socket.IPPROTO_IP, _IP_BOUND_IF) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_BOUND_IF)
            )
            sock.setsockopt(level, option, socket.if_nametoindex(interface))
    except PermissionError:
        pass  # Linux before 5.7 wants CAP_NET_RAW: then the routes decide


class Exchange:
    """One query on its way to one server. told(answer, error) is called once: with one of them."""

    __slots__ = ("_socket", "query", "question", "sent_at", "told")

    def __init__(
        self, query: bytes, question: Question, told: Callable[[bytes | None, OSError | None], None], now: float
    ) -> None:
        self.query = query
        self.question = question
        self.told = told
        self.sent_at = now
        self._socket: socket.socket | None = None


class Datagrams:
    """Asks by UDP. Its task runs in the nursery, from the first query on."""

    def __init__(self, nursery: trio.Nursery, counters: Counter[str]) -> None:
        self._nursery = nursery
        self._counters = counters
        self._selector: selectors.DefaultSelector | None = None
        self._buffer = memoryview(bytearray(_buffer_size))
        self.open = 0

    def ask(
        self,
        server: Server,
        query: bytes,
        question: Question,
        told: Callable[[bytes | None, OSError | None], None],
        now: float,
    ) -> Exchange:
        """Send a query, with an ID of its own; `told` is called later. Raises OSError when it cannot be sent."""
        if self.open >= MAX_SOCKETS:
            raise OSError(errno.EMFILE, "too many queries to nameservers at once")
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._nursery.start_soon(self._run, self._selector)
        exchange = Exchange(secrets.token_bytes(2) + query[2:], question, told, now)
        sock, address = open_socket(server, socket.SOCK_DGRAM)
        try:
            sock.connect(address)
            sock.send(exchange.query)
            self._selector.register(sock, selectors.EVENT_READ, exchange)
        except BaseException:
            sock.close()
            raise
        exchange._socket = sock
        self.open += 1
        return exchange

    def close(self, exchange: Exchange) -> None:
        """Stop to wait for an answer. It may be closed already."""
        sock = exchange._socket
        if sock is not None:
            exchange._socket = None
            self.open -= 1
            if self._selector is not None:
                self._selector.unregister(sock)
            sock.close()

    async def _run(self, selector: selectors.DefaultSelector) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(selector)
                for key, _ in selector.select(0):
                    self._receive(key.data)
        finally:
            self._selector = None
            selector.close()

    def _receive(self, exchange: Exchange) -> None:
        buffer = self._buffer
        for _ in range(_BURST):
            sock = exchange._socket
            if sock is None:
                return  # closed within this turn, by the answer of another
            try:
                size = sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                # ICMP says that nobody is there.
                self.close(exchange)
                exchange.told(None, error)
                return
            answer = bytes(buffer[:size])
            if is_answer_to(answer, exchange.query, exchange.question):
                self.close(exchange)
                exchange.told(answer, None)
                return
            self._counters["dns_mismatched_replies"] += 1
