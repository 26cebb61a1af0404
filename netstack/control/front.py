"""The API's front: takes connections in, keeps those that become a tunnel, and hands all others to hypercorn.

Theory of operation
-------------------
ASGI has no way to say "from here on this connection is no HTTP any more", and hypercorn closes what it does not know.
`/tunnel` is just that: after two bytes of answer the connection leads to a guest. So each connection is looked at
before hypercorn has it:

    POST /tunnel?ip=...     a path of `Takeovers`: the head is taken off the socket to its last byte and not further,
                            h11 reads it, and the takeover is given the socket itself
    anything else           hypercorn's, as if nobody had looked: bytes that were taken come first (`Connection`)

The head is peeked at (MSG_PEEK), so that what the client sends behind it stays in the socket, and the socket can become
the host's side of a TCP flow: no byte of a tunnel passes through here. A takeover is only found as the first request of
a connection, which is how every client of it does it; as a later one it is answered by the application, with words.

Bounds: CONNECTIONS at once (more wait in the queue), HEAD_SECONDS and MAX_HEAD for the head of a first request,
WRITE_SECONDS for a client that does not read. hypercorn shields its writes from cancellation, so that a client which
does not read would keep netstack from ending: when the front ends, it closes what is open under hypercorn's feet.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import trio

if TYPE_CHECKING:
    from hypercorn.trio.tcp_server import TCPServer
    from starlette.types import ASGIApp

CONNECTIONS: Final = 256
HEAD_SECONDS: Final = 10.0  # gvproxy's ReadTimeout
WRITE_SECONDS: Final = 10.0  # its WriteTimeout
MAX_HEAD: Final = 16 * 1024

UNAUTHORIZED: Final = "send the header Authorization: Bearer TOKEN, with the token that netstack printed"

_LINE = re.compile(rb"[A-Z]{1,16} (/[^ ?]*)[? ]")
_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class Takeover:
    """A request that ends the HTTP on its connection. Answer on the socket, then close it or give it away."""

    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    sock: socket.socket  # non-blocking; behind the request's head


# By path. Each is a plain call that closes the socket in the end, or gives it away.
Takeovers = Mapping[str, Callable[[Takeover], None]]


class Connection:
    """A client's connection as hypercorn wants it: what was read already comes first, and a write ends in time."""

    def __init__(self, stream: trio.SocketStream, taken: bytes) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._taken = taken

    async def receive_some(self, limit: int | None = None) -> bytes:
        """What the client sent; b"" at the end."""
        if self._taken:
            taken, self._taken = self._taken, b""
            return taken
        return bytes(await self._stream.receive_some(limit))

    async def send_all(self, data: bytes) -> None:
        """Write all, or raise BrokenResourceError."""
        with trio.move_on_after(WRITE_SECONDS) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.socket.close()  # hypercorn would go on to wait for what the client says
            raise trio.BrokenResourceError("the client does not read")

    async def send_eof(self) -> None:
        """Nothing more will be written."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close it."""
        await self._stream.aclose()


class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """A listening socket that is asked for one more connection when there is a place for it."""

    def __init__(self, sock: socket.socket, places: trio.Semaphore) -> None:
        # A duplicate: trio closes what it is given, and the socket is its owner's.
        self._inner = trio.SocketListener(trio.socket.fromfd(sock.fileno(), sock.family, sock.type))
        self._places = places

    async def accept(self) -> trio.SocketStream:
        """The next connection; whoever takes it releases the place."""
        await self._places.acquire()
        try:
            return await self._inner.accept()
        except BaseException:
            self._places.release()
            raise

    async def aclose(self) -> None:
        """Listen no more."""
        await self._inner.aclose()


class Front:
    """Serves one listening socket."""

    def __init__(
        self,
        app: ASGIApp,
        takeovers: Takeovers,
        token: str | None,
        on_crash: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        from hypercorn.config import Config
        from hypercorn.trio.worker_context import WorkerContext
        from hypercorn.typing import ConnectionState
        from hypercorn.utils import wrap_app

        config = Config()
        config.errorlog = None
        config.accesslog = None
        config.include_server_header = False
        config.keep_alive_max_requests = 1 << 30  # not 1,000: `top` asks for as long as somebody looks at it
        config.h11_max_incomplete_size = MAX_HEAD
        self._config = config
        self._app = wrap_app(app, 0, "asgi")  # type: ignore[arg-type] # its own ASGI types
        self._context = WorkerContext(None)
        self._state = ConnectionState({})
        self._takeovers = takeovers
        self._expected = f"Bearer {token}".encode() if token is not None else None
        self._on_crash = on_crash
        self._open: set[trio.SocketStream] = set()
        self._places = trio.Semaphore(CONNECTIONS)

    async def serve(
        self, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer until cancelled. The socket stays its owner's."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_at_end)
            listener = _BoundedListener(sock, self._places)
            await nursery.start(trio.serve_listeners, self._admit, [listener])
            task_status.started()

    async def _close_at_end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for stream in self._open:
                stream.socket.close()

    async def _admit(self, stream: trio.SocketStream) -> None:
        self._open.add(stream)
        try:
            await self._serve(stream)
        except Exception as error:
            for one in _leaves(error):
                # Those mean that the client is gone, or its descriptor because we end.
                if not isinstance(one, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
                    self._on_crash(one)
        finally:
            self._open.discard(stream)
            stream.socket.close()
            self._places.release()

    async def _serve(self, stream: trio.SocketStream) -> None:
        found = None
        with trio.move_on_after(HEAD_SECONDS):
            found = await self._look(stream.socket)
        if found is None:
            return
        taken, path = found
        if len(taken) >= MAX_HEAD:
            await _refuse(stream, write_answer(431, f"the head of a request has {MAX_HEAD} bytes at most"))
        elif path is not None:
            await self._take_over(stream, taken, self._takeovers[path])
        else:
            await self._hand_over(stream, taken)

    async def _look(self, sock: trio.socket.SocketType) -> tuple[bytes, str | None] | None:
        """Find out whose this connection is: what was taken off the socket, and the path of a takeover or None.

        Untrusted. Of a takeover all of the head is taken, and nothing behind it. MAX_HEAD bytes are too many; None: the
        client went away without having said anything that could be answered.
        """
        taken = bytearray()
        while len(taken) < MAX_HEAD:
            seen = await sock.recv(MAX_HEAD - len(taken), socket.MSG_PEEK)
            before = len(taken)
            taken += seen
            line = _LINE.match(taken)
            path = line[1].decode("latin-1") if line is not None else None
            if not seen:
                return None
            if (b"\n" in taken and path is None) or (path is not None and path not in self._takeovers):
                return bytes(taken[:before]), None
            end = _END.search(taken) if path is not None else None
            keep = end.end() if end is not None else len(taken)
            await _take(sock, keep - before)
            if end is not None:
                return bytes(taken[:keep]), path
        return bytes(taken), None  # too much

    async def _hand_over(self, stream: trio.SocketStream, taken: bytes) -> None:
        connection: Any = Connection(stream, taken)
        await _server_class()(self._app, self._config, self._context, self._state, connection).run()

    async def _take_over(self, stream: trio.SocketStream, head: bytes, takeover: Callable[[Takeover], None]) -> None:
        """Read the head, and give the socket away. Untrusted."""
        import h11

        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        reader.receive_data(head)
        try:
            request = reader.next_event()
        except h11.RemoteProtocolError as error:
            await _refuse(stream, write_answer(error.error_status_hint, str(error)))
            return
        if not isinstance(request, h11.Request):
            await _refuse(stream, write_answer(400, "no request"))
            return
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
        if self._expected is not None and not secrets.compare_digest(
            headers.get("authorization", "").encode("latin-1"), self._expected
        ):
            await _refuse(stream, write_answer(401, UNAUTHORIZED, {"www-authenticate": "Bearer"}))
            return
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            await _refuse(stream, write_answer(400, "this request has no body: what follows it goes to the guest"))
            return
        target = request.target.decode("latin-1").partition("?")[2]
        query = {name: values[0] for name, values in parse_qs(target, keep_blank_values=True).items()}
        # A duplicate, because trio's object must be closed and the connection must not.
        own = socket.socket(fileno=os.dup(stream.socket.fileno()))
        own.setblocking(False)
        stream.socket.close()
        try:
            takeover(Takeover(request.method.decode("ascii"), query, headers, own))
        except BaseException:
            own.close()
            raise


@functools.cache
def _server_class() -> type[TCPServer]:
    """hypercorn's, without HTTP/2: once that is agreed on, hypercorn lets a client that asks nothing stay for ever."""
    from hypercorn.trio.tcp_server import TCPServer

    async def keep_protocol(request: object) -> None:
        """An Upgrade to h2c is not obliged (RFC 9110 7.8), and the preface of HTTP/2 is a request for nothing."""

    class Http1Server(TCPServer):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "protocol":
                value.protocol._check_protocol = keep_protocol
            super().__setattr__(name, value)

    return Http1Server


async def _take(sock: trio.socket.SocketType, count: int) -> None:
    """Read so many bytes that are known to be there."""
    while count > 0:
        count -= len(await sock.recv(count))


async def _refuse(stream: trio.SocketStream, answer: bytes) -> None:
    """Answer and close, not before the client has read it: a TCP socket with unread bytes is closed with a reset."""
    with trio.move_on_after(1):
        await stream.send_all(answer)
        await stream.send_eof()
        while await stream.receive_some(MAX_HEAD):
            pass


def _leaves(error: BaseException) -> list[Exception]:
    """The exceptions in a group, of whatever depth."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error] if isinstance(error, Exception) else []


def write_answer(status: int, words: str, headers: Mapping[str, str] | None = None) -> bytes:
    """An answer in text, as Go's http.Error writes it, after which the connection is closed."""
    from http import HTTPStatus

    body = f"{words}\n".encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: text/plain; charset=utf-8",
        "X-Content-Type-Options: nosniff",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + body
