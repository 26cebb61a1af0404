"""Queries to nameservers by TCP and TLS: connections that stay, with many queries on each (RFC 7766, RFC 7858).

Theory of operation
-------------------
Each server has at most a few connections, made when needed. A query on one gets an ID that no other on it has, and is
sent at once, whether earlier ones were answered or not; answers come in any order and are told apart by ID and
question. A connection with nothing to wait for is closed after a while (RFC 7766 6.2.3).

Servers close idle connections too, and a query may be on its way just then: one that was sent on a used connection that
ends without an answer is sent once more, on a new one.

TLS: the certificate is checked against the server's name, or its address where it has none, unless the server is
"opportunistic" (RFC 7858 4.1): then any will do, and where there is none at all, `upstream` asks in the clear.
"""

from __future__ import annotations

import errno
import secrets
import socket
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import trio

from netstack.dns.message import Question, is_answer_to
from netstack.dns.routes import OPPORTUNISTIC, Server
from netstack.dns.upstream_udp import open_socket

if TYPE_CHECKING:
    import ssl

# Seconds.
IDLE_TIMEOUT = 15.0
CONNECT_TIMEOUT = 3.0
# One that has not answered for so long is not asked again: what was sent there is lost with its network.
_SILENT = 1.5

MAX_CONNECTIONS = 4  # to one server
MAX_IN_FLIGHT = 128  # on one connection; what BIND takes is 150


class LostError(OSError):
    """The connection ended before the answer came."""


class _Connection:
    """One connection to a server."""

    def __init__(self, pool: Streams, server: Server) -> None:
        self.used = False
        self.waiting: dict[bytes, tuple[bytes, Question, trio.Event]] = {}
        self.closed = False
        self._pool = pool
        self._server = server
        self._stream: trio.abc.Stream | None = None
        self._sending = trio.Lock()
        self._answers: dict[bytes, bytes] = {}
        self._ready = trio.Event()
        self._error: OSError | None = None
        self._heard_at = 0.0
        self._scope = trio.CancelScope()

    async def ask(self, query: bytes, question: Question) -> bytes:
        """Send a query; give the answer, both with IDs of their own. Raises OSError."""
        ident = secrets.token_bytes(2)
        while ident in self.waiting:
            ident = secrets.token_bytes(2)
        sent = ident + query[2:]
        done = trio.Event()
        self.waiting[ident] = (sent, question, done)
        sent_at = trio.current_time()
        try:
            await self._ready.wait()
            if self._error is None and self._stream is not None:
                await self._send(self._stream, len(sent).to_bytes(2, "big") + sent)
                await done.wait()
            answer = self._answers.pop(ident, None)
        finally:
            self.waiting.pop(ident, None)
            now = trio.current_time()
            if not self.closed and self._heard_at <= sent_at and now - sent_at > _SILENT:
                self.close(OSError(errno.ETIMEDOUT, "timed out"))
        if answer is None:
            # Another object for each who waited: what is raised grows by where it was raised.
            error = self._error or LostError(errno.ECONNRESET, "connection lost")
            raise type(error)(*error.args)
        return answer

    async def _send(self, stream: trio.abc.Stream, message: bytes) -> None:
        """Send a message with its length; whoever waits is told when that fails."""
        async with self._sending:
            if self.closed:
                return
            try:
                # In one piece: some servers read the length alone and give up (RFC 7766 8).
                await stream.send_all(message)
            except BaseException as error:
                # Also of a query that nobody wants any more: perhaps half of it is sent, and what others sent behind
                # that would be taken for its rest.
                self.close(LostError(errno.ECONNRESET, "connection lost"))
                if not isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError)):
                    raise

    def close(self, error: OSError) -> None:
        """End it: whoever waits is told."""
        if not self.closed:
            self.closed = True
            self._error = error
            self._pool.remove(self._server, self)
            self._scope.cancel()
            self._ready.set()
            for _, _, done in self.waiting.values():
                done.set()

    async def run(self) -> None:
        with self._scope:
            try:
                with trio.fail_after(CONNECT_TIMEOUT):
                    stream = await self._connect()
            except trio.TooSlowError:
                self.close(OSError(errno.ETIMEDOUT, "no connection in time"))
            except OSError as error:
                self.close(error)
            except Exception as error:  # of a library: this task's end must not be that of the network
                self.close(OSError(errno.EPROTO, repr(error)))
            else:
                try:
                    self._stream = stream
                    self._ready.set()
                    await self._read(stream)
                finally:
                    await trio.aclose_forcefully(stream)
        self.close(LostError(errno.ECONNRESET, "connection lost"))

    async def _connect(self) -> trio.abc.Stream:
        server = self._server
        sock, address = open_socket(server, socket.SOCK_STREAM)
        trio_sock = trio.socket.from_stdlib_socket(sock)
        try:
            await trio_sock.connect(address)
            stream = trio.SocketStream(trio_sock)
        except BaseException:
            trio_sock.close()
            raise
        if server.transport != "tls":
            return stream
        context = self._pool.tls_context(opportunistic=OPPORTUNISTIC in server.options)
        name = server.name or server.address.partition("%")[0]
        try:
            secure = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
            await secure.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, (trio.BrokenResourceError, ValueError)):
                raise OSError(errno.EPROTO, f"no TLS: {error.__cause__ or error}") from None
            raise
        return secure

    async def _read(self, stream: trio.abc.Stream) -> None:
        received = bytearray()
        while True:
            chunk: bytes | bytearray = b""
            with trio.move_on_after(IDLE_TIMEOUT) as patience:
                try:
                    chunk = await stream.receive_some(65536)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            if patience.cancelled_caught and self.waiting:
                continue
            if not chunk:
                return
            self._heard_at = trio.current_time()
            received += chunk
            while len(received) >= 2 and len(received) >= (end := 2 + int.from_bytes(received[:2], "big")):
                answer = bytes(received[2:end])
                del received[:end]
                self._on_answer(answer)

    def _on_answer(self, answer: bytes) -> None:
        """Untrusted."""
        waiting = self.waiting.get(answer[:2])
        if waiting is None or not is_answer_to(answer, waiting[0], waiting[1]):
            self._pool.counters["dns_mismatched_replies"] += 1
            return
        self.used = True
        self._answers[answer[:2]] = answer
        waiting[2].set()


class Streams:
    """Asks by TCP and TLS. Its connections live in the nursery."""

    def __init__(self, nursery: trio.Nursery, counters: Counter[str], ca_file: str | None = None) -> None:
        """ca_file: certificates to trust in place of the host's."""
        self._nursery = nursery
        self.counters = counters
        self._connections: dict[Server, list[_Connection]] = {}
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._ca_file = ca_file

    async def ask(self, server: Server, query: bytes, question: Question) -> bytes:
        """Give the answer to a query. Raises OSError."""
        connection = self._choose(server)
        used = connection.used
        try:
            return await connection.ask(query, question)
        except LostError:
            if not used:
                raise
        return await self._choose(server).ask(query, question)

    def retain(self, servers: Collection[Server]) -> None:
        """Close the connections to all other servers: they are not the host's any more."""
        kept = {server._replace(transport="tcp") if server.transport == "udp" else server for server in servers}
        for server, connections in list(self._connections.items()):
            for connection in list(connections) if server not in kept else ():
                connection.close(LostError(errno.ENETRESET, "the host's network changed"))

    @property
    def open(self) -> int:
        """How many connections there are."""
        return sum(map(len, self._connections.values()))

    def remove(self, server: Server, connection: _Connection) -> None:
        connections = self._connections.get(server, [])
        if connection in connections:
            connections.remove(connection)
        if not connections:
            self._connections.pop(server, None)

    def tls_context(self, *, opportunistic: bool) -> ssl.SSLContext:
        """The settings of TLS, made once: reading the host's certificates takes 20 ms."""
        context = self._contexts.get(opportunistic)
        if context is None:
            import ssl

            context = ssl.create_default_context(cafile=self._ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if opportunistic:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._contexts[opportunistic] = context
        return context

    def _choose(self, server: Server) -> _Connection:
        connections = self._connections.setdefault(server, [])
        for connection in connections:
            if len(connection.waiting) < MAX_IN_FLIGHT:
                return connection
        if len(connections) >= MAX_CONNECTIONS:
            raise OSError(errno.EAGAIN, "too many queries to one nameserver")
        connection = _Connection(self, server)
        connections.append(connection)
        self._nursery.start_soon(connection.run)
        return connection
