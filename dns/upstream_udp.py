"""Queries to nameservers by UDP: a socket for each while there are enough, one task for all (RFC 5452).

Theory of operation
-------------------
Each query leaves from a socket of its own, connected to the server: so each has a fresh random port (the kernel's), a
fresh random ID (ours), and the kernel drops what does not come from that address and port (RFC 5452 9.2). What arrives
must have that ID and the same question; anything else is somebody's guess, is counted, and the wait goes on.

With `max_sockets` open, further queries share those that lead to the same server, each time another one by chance, and
with an ID that is free there (dnsmasq does so from its port limit on): what a guess has to hit is then one of so many
ports still, and an ID. A socket is shared by 64 queries in its life at most, so that none is open for ever.

The sockets are in the poller of the network, beside those of the guests' flows, or else in one nested epoll (kqueue on
macOS) for which one task waits: a task, or a trio wait, for each socket would cost more than the query. Whoever asked
is told by a plain call.

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

from netstack.core.ports import READABLE, Handler, Poller
from netstack.dns.message import Question, is_answer_to
from netstack.dns.routes import Server

# Open at a time: descriptors that the guests' flows do not get. For servers that have none yet there may be more.
MAX_SOCKETS = 1024
_EXTRA = 256
_SHARED_BY = 64

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

    __slots__ = ("_port", "query", "question", "told")

    def __init__(
        self, query: bytes, question: Question, told: Callable[[bytes | None, OSError | None], None], port: _Port
    ) -> None:
        self.query = query
        self.question = question
        self.told = told
        self._port: _Port | None = port


class _Port:
    """One socket, connected to one server."""

    __slots__ = ("datagrams", "server", "sock", "used", "waiting")

    def __init__(self, datagrams: Datagrams, sock: socket.socket, server: Server) -> None:
        self.datagrams = datagrams
        self.sock = sock
        self.server = server
        self.used = 0  # queries in its life
        self.waiting: dict[bytes, Exchange] = {}  # by their IDs

    def on_ready(self, events: int, now: float) -> None:
        """What the poller calls."""
        del events, now
        self.datagrams._receive(self)


class _OwnPoller:
    """Readiness where there is no other poller. Its task runs in the nursery, from the first socket on."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._selector: selectors.DefaultSelector | None = None

    def register(self, fd: int, handler: Handler, events: int) -> None:
        del events
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._nursery.start_soon(self._run, self._selector)
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def modify(self, fd: int, events: int) -> None:
        """Nobody does."""

    def unregister(self, fd: int) -> None:
        if self._selector is not None:
            self._selector.unregister(fd)

    async def _run(self, selector: selectors.DefaultSelector) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(selector)
                for key, _ in selector.select(0):
                    key.data.on_ready(READABLE, 0.0)
        finally:
            self._selector = None
            for key in tuple(selector.get_map().values()):
                key.data.sock.close()
            selector.close()


class Datagrams:
    """Asks by UDP."""

    def __init__(self, nursery: trio.Nursery, counters: Counter[str], poller: Poller | None = None) -> None:
        self.max_sockets = MAX_SOCKETS
        self._open_ports: set[_Port] = set()
        self._counters = counters
        self._poller: Poller = poller if poller is not None else _OwnPoller(nursery)
        self._buffer = memoryview(bytearray(_buffer_size))
        self._ports: dict[Server, list[_Port]] = {}  # that may be shared

    def ask(
        self, server: Server, query: bytes, question: Question, told: Callable[[bytes | None, OSError | None], None]
    ) -> Exchange:
        """Send a query, with an ID of its own; `told` is called later. Raises OSError when it cannot be sent."""
        port = self._share(server) if len(self._open_ports) >= self.max_sockets else None
        if port is None:
            port = self._open(server)
        ident = secrets.token_bytes(2)
        while ident in port.waiting:
            ident = secrets.token_bytes(2)
        exchange = Exchange(ident + query[2:], question, told, port)
        port.waiting[ident] = exchange
        port.used += 1
        try:
            port.sock.send(exchange.query)
        except BaseException:
            self.close(exchange)
            raise
        if port.used == 1:
            self._ports.setdefault(server, []).append(port)
        elif port.used == _SHARED_BY:
            self._withdraw(port)
        return exchange

    @property
    def open(self) -> int:
        """How many sockets are."""
        return len(self._open_ports)

    def end(self) -> None:
        """The network ends, its poller with it: close what is open."""
        for port in self._open_ports:
            port.sock.close()

    def close(self, exchange: Exchange) -> None:
        """Stop to wait for an answer. It may be closed already."""
        port = exchange._port
        if port is not None:
            exchange._port = None
            del port.waiting[exchange.query[:2]]
            if not port.waiting:
                self._withdraw(port)
                self._open_ports.discard(port)
                if port.sock.fileno() >= 0:  # else end() was first
                    self._poller.unregister(port.sock.fileno())
                    port.sock.close()

    def _open(self, server: Server) -> _Port:
        """A socket of its own. Raises OSError."""
        if len(self._open_ports) >= self.max_sockets + _EXTRA:
            raise OSError(errno.EMFILE, "too many queries to nameservers at once")
        sock, address = open_socket(server, socket.SOCK_DGRAM)
        try:
            sock.connect(address)
            port = _Port(self, sock, server)
            self._poller.register(sock.fileno(), port, READABLE)
        except BaseException:
            sock.close()
            raise
        self._open_ports.add(port)
        return port

    def _share(self, server: Server) -> _Port | None:
        """One of those that lead there, by chance; None where there is none, or nearly all are used up."""
        ports = self._ports.get(server)
        return secrets.choice(ports) if ports else None

    def _withdraw(self, port: _Port) -> None:
        """It is shared no more."""
        ports = self._ports.get(port.server)
        if ports is not None and port in ports:
            ports.remove(port)
            if not ports:
                del self._ports[port.server]

    def _receive(self, port: _Port) -> None:
        """Take what has come. Untrusted."""
        buffer = self._buffer
        for _ in range(_BURST):
            if not port.waiting:
                return  # closed within this turn, by the answer of another
            try:
                size = port.sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                # ICMP says that nobody is there.
                for exchange in tuple(port.waiting.values()):
                    self.close(exchange)
                    exchange.told(None, error)
                return
            answer = bytes(buffer[:size])
            found = port.waiting.get(answer[:2])
            if found is not None and is_answer_to(answer, found.query, found.question):
                self.close(found)
                found.told(answer, None)
            else:
                self._counters["dns_mismatched_replies"] += 1
