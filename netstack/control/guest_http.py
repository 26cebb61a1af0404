r"""HTTP for guests, at port 80 of the gateway: a few paths of ours, and the host's own server for the rest.

Theory of operation
-------------------
The gateway address is the host, as guests see it, so port 80 there belongs to a server that the host may run. We only
borrow a few paths (/agent, /proxy.env, /wpad.dat ...). Each connection is looked at until it is certain whose it is:

    "GET /ag"            may yet become one of ours: wait for more
    "GET /agent HTTP/1"  ours: h11 reads the request, a handler answers it, and the connection is closed
    "GET /index.html"    not ours: every byte goes to the host's port 80, and back, as if we were not there
    "\x16\x03\x01", ...  the same: what is no HTTP is none of our business

The decision is made on the first byte that rules our paths out, so the host's server gets its bytes at once, and no
line has to be complete for it. Who makes the connection to the host is not our business (`gateway.guest_web`). Where no
server listens there, or guests may not reach it, the answer is 404 to what looks like HTTP, and a reset to anything
else. A connection that stays silent for REQUEST_SECONDS is the host's too: its protocol may be one in which the server
speaks first.

A connection of ours carries one request. A guest's HTTP library that would like to send another one opens a new
connection, and that is looked at like the first. The reverse does not hold: who began with the host's server stays with
it, for bytes that pass unread cannot be routed.

Two kinds of handlers. `register`: the whole request is read, at most MAX_BODY, and one answer is written.
`register_stream`: the handler is given the body as it comes and may write at any time, for as long as it likes. It
bounds itself. And with `register_raw` a connection is no HTTP behind its head, and whoever made us has it back then.

Bounds: 8 KiB of request head, 64 KiB of body, REQUEST_SECONDS for all of a request and for writing its answer, and of
connections that we look at or answer MAX_OPEN_OF_LINK for each link (a guest may have any number of addresses). One
more is not looked at: it goes to the host, or is closed.

Counted as dropped: guest_http_malformed, guest_http_slow, guest_http_too_many, guest_http_failed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    import h11

    from netstack.core.ports import Events, Link, TcpServiceCall

PORT = 80
MAX_HEAD = 8 << 10
MAX_BODY = 64 << 10
REQUEST_SECONDS = 10.0
MAX_OPEN_OF_LINK = 32

# RFC 9110 9.1: methods are tokens, and those in use are capital letters; what begins otherwise is no HTTP of ours.
_METHOD = re.compile(rb"[A-Z]{1,16}")
_MAX_METHOD = 16
_CHUNK = 16 << 10


@dataclass(frozen=True, slots=True)
class GuestRequest:
    """One request of a guest. Everything but `guest`, `link`, `mac` and `gateway` is what the guest says. Untrusted."""

    method: str
    path: str
    query: str  # what stands behind "?", undecoded
    headers: Mapping[str, str]  # names in lower case; of repeated ones the last
    body: bytes
    guest: bytes  # the guest's address, as the switch and the leases let it use it
    gateway: bytes  # the address of ours that it asked
    link: Link
    mac: bytes | None  # None: not known any more


@dataclass(frozen=True, slots=True)
class GuestResponse:
    """What a guest is answered."""

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = field(default=())


Handler = Callable[[GuestRequest], Awaitable[GuestResponse]]


class StreamingRequest:
    """A request whose body and answer take their time: `request.body` is empty, receive() gives it in pieces."""

    def __init__(self, request: GuestRequest, connection: _Exchange) -> None:
        self.request = request
        self._exchange = connection
        self._started = False

    async def receive(self) -> bytes:
        """The next piece of the body; b"" at its end. Raises BrokenResourceError when the guest is gone. Untrusted."""
        return await self._exchange.receive_body()

    async def send(self, data: bytes) -> None:
        """Write a piece of the answer, whose status is 200. Raises BrokenResourceError."""
        if not self._started:
            self._started = True
            await self._exchange.send_head(GuestResponse(), length=None)
        await self._exchange.send_body(data)


StreamHandler = Callable[[StreamingRequest], Awaitable[GuestResponse | None]]


class Outcome(Enum):
    """What has become of a connection."""

    RAW = "ours, and no HTTP behind its head"
    DONE = "answered, or gone"
    HOSTS_HTTP = "the host's, and it looks like HTTP"
    HOSTS = "the host's"


class GuestHttp:
    """The paths that guests may ask for, and who answers."""

    def __init__(
        self,
        mac_of: Callable[[bytes], bytes | None],
        drop: Callable[[str], None],
        events: Events | None = None,
        on_used: Callable[[], None] | None = None,
    ) -> None:
        """`mac_of` says whose an address is; `drop` counts what was refused, by reason.

        `on_used` is called once, with the first path: before that nobody need look at connections.
        """
        self._mac_of = mac_of
        self._drop = drop
        self._events = events
        self._on_used = on_used
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._streams: dict[tuple[str, str], StreamHandler] = {}
        self._paths: dict[bytes, None] = {}
        self._raw: set[bytes] = set()
        self._open: Counter[Link] = Counter()

    @property
    def paths(self) -> list[str]:
        """What is ours."""
        return [path.decode() for path in self._paths]

    def register(self, method: str, path: str, handler: Handler) -> None:
        """Have requests for this path answered. A handler of GET answers HEAD too, without its body."""
        self._handlers[method, path] = handler
        self._add_path(path)

    def register_stream(self, method: str, path: str, handler: StreamHandler) -> None:
        """Like register(), for a handler that reads and writes over time. It returns the answer, if it sent none."""
        self._streams[method, path] = handler
        self._add_path(path)

    def register_raw(self, path: str) -> None:
        """Have serve_stream() give back connections that begin with POST of this path: Outcome.RAW, and their head."""
        self._raw.add(b"POST " + path.encode("ascii"))
        self._add_path(path)

    def _add_path(self, path: str) -> None:
        self._paths[path.encode("ascii")] = None
        if self._on_used is not None:
            self._on_used()
            self._on_used = None

    def unregister(self, path: str) -> None:
        """Give a path back to the host's server."""
        for table in (self._handlers, self._streams):
            for key in [key for key in table if key[1] == path]:
                table.pop(key)
        self._paths.pop(path.encode("ascii"), None)
        self._raw.discard(b"POST " + path.encode("ascii"))

    # ---- one connection --------------------------------------------------------------------------------------------

    async def serve_stream(self, stream: trio.SocketStream, call: TcpServiceCall) -> tuple[Outcome, bytes]:
        """Serve one connection of a guest to its end, unless it is the host's: then what was read of it. Untrusted."""
        link = call.link
        if self._open[link] >= MAX_OPEN_OF_LINK:
            self._drop("guest_http_too_many")
            return Outcome.HOSTS, b""
        self._open[link] += 1
        try:
            received, ours = await self._look(stream)
            if ours and any(received.startswith(head) for head in self._raw):
                return Outcome.RAW, await self._read_head(stream, received)
            if ours:
                await _Exchange(self, stream, call, received).serve()
        finally:
            self._open[link] -= 1
            if not self._open[link]:
                del self._open[link]
        if ours is False:
            return Outcome.HOSTS_HTTP if _METHOD.match(received) else Outcome.HOSTS, received
        return Outcome.DONE, b""

    async def _look(self, stream: trio.SocketStream) -> tuple[bytes, bool | None]:
        """Read until it is certain whose the connection is: ours, the host's (False), or nobody's (None). Untrusted."""
        received = b""
        with trio.move_on_after(REQUEST_SECONDS):
            while True:
                verdict = self.is_ours(received)
                if verdict is not None:
                    return received, verdict
                try:
                    more = await stream.receive_some(_CHUNK)
                except trio.BrokenResourceError:
                    return received, None
                if not more:
                    return received, False if received else None
                received += more
        return received, False

    async def _read_head(self, stream: trio.SocketStream, received: bytes) -> bytes:
        """Read on until the head of a request is complete, at most MAX_HEAD. Untrusted."""
        with trio.move_on_after(REQUEST_SECONDS):
            while b"\r\n\r\n" not in received and len(received) < MAX_HEAD:
                more = await stream.receive_some(_CHUNK)
                if not more:
                    break
                received += more
        return received

    def is_ours(self, received: bytes) -> bool | None:
        """Whether a connection that begins so asks for a path of ours; None: that cannot be told yet. Untrusted."""
        found = _METHOD.match(received)
        end = found.end() if found else 0
        if end == len(received):
            return None if end < _MAX_METHOD else False
        if not end or received[end] != 0x20:
            return False
        target = received[end + 1 :]
        for path in self._paths:
            if target.startswith(path):
                if len(target) == len(path):
                    return None
                if target[len(path)] in b" ?\r\n":
                    return True
            elif path.startswith(target):
                return None
        return False

    async def send_not_found(self, stream: trio.SocketStream) -> None:
        """For what is HTTP, and the host's, where the host has no server."""
        body = b"not found\n"
        head = f"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        with trio.move_on_after(REQUEST_SECONDS):
            await stream.send_all(head.encode() + b"Connection: close\r\n\r\n" + body)
            await _linger(stream)

    # ---- for _Exchange ---------------------------------------------------------------------------------------------

    def find(self, method: str, path: str) -> tuple[Handler | None, StreamHandler | None, list[str]]:
        """Who answers; else, with which methods the path can be asked for."""
        wanted = "GET" if method == "HEAD" and ("HEAD", path) not in self._handlers else method
        known = sorted({one for table in (self._handlers, self._streams) for one, where in table if where == path})
        return self._handlers.get((wanted, path)), self._streams.get((method, path)), known

    def mac_of(self, address: bytes) -> bytes | None:
        return self._mac_of(address)

    def refuse(self, reason: str) -> None:
        """Count a request that came to nothing."""
        self._drop(reason)

    def on_bug(self, path: str, error: Exception) -> GuestResponse:
        """One request's bug must not end more than that request."""
        self._drop("guest_http_failed")
        if self._events is not None:
            self._events.warning(f"guest_http {path}", "a guest's request failed", path=path, error=repr(error))
        return GuestResponse(500, body=b"netstack failed to answer; its log says why\n")


class _Exchange:
    """One request of ours, and its answer."""

    def __init__(self, http: GuestHttp, stream: trio.SocketStream, call: TcpServiceCall, received: bytes) -> None:
        import h11  # when the first guest asks: `netstack run` need not wait for it

        self._h11 = h11
        self._http = http
        self._stream = stream
        self._call = call
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._connection.receive_data(received)
        self._sending = trio.Lock()
        self._is_head = False

    async def serve(self) -> None:
        """Read, have it handled, answer, close. Untrusted."""
        h11 = self._h11
        try:
            try:
                with trio.fail_after(REQUEST_SECONDS):
                    request, stream_handler = await self._read_request()
                if isinstance(request, GuestRequest) and stream_handler is not None:
                    response = await self._serve_streaming(request, stream_handler)
                elif isinstance(request, GuestRequest):
                    response = await self._handle(request)
                else:
                    response = request
            except h11.RemoteProtocolError as error:
                self._http.refuse("guest_http_malformed")
                hint = error.error_status_hint
                response = GuestResponse(hint if hint in (400, 413, 431) else 400, body=b"not a request\n")
            except trio.TooSlowError:
                self._http.refuse("guest_http_slow")
                response = GuestResponse(408, body=b"too slow\n")
            if response is not None:
                await self._answer(response)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass  # the guest has gone

    async def _read_request(self) -> tuple[GuestRequest | GuestResponse, StreamHandler | None]:
        """The request, or what its head alone is answered."""
        h11 = self._h11
        event = await self._next_event()
        if not isinstance(event, h11.Request):
            raise EOFError  # noqa: TRY004 # the guest closed before it asked
        # h11 bounds a head that is not complete; one that came in a single read may be longer.
        if sum(len(name) + len(value) + 4 for name, value in event.headers) + len(event.target) > MAX_HEAD:
            self._http.refuse("guest_http_malformed")
            return GuestResponse(431, body=f"more than {MAX_HEAD} bytes of headers\n".encode()), None
        method = event.method.decode("ascii")
        self._is_head = method == "HEAD"  # RFC 9110 9.3.2: the headers of GET, and no content
        path, _, query = event.target.decode("ascii", "replace").partition("?")
        handler, stream_handler, known = self._http.find(method, path)
        if handler is None and stream_handler is None:
            allow = (("Allow", ", ".join(known)),)
            return GuestResponse(405, body=f"{path} takes {' or '.join(known)}\n".encode(), headers=allow), None
        body = b"" if stream_handler is not None else await self._read_body()
        if body is None:
            self._http.refuse("guest_http_malformed")
            return GuestResponse(413, body=f"more than {MAX_BODY} bytes\n".encode()), None
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        call = self._call
        mac = self._http.mac_of(call.guest)
        return (
            GuestRequest(method, path, query, headers, body, call.guest, call.address, call.link, mac),
            stream_handler,
        )

    async def _read_body(self) -> bytes | None:
        body = bytearray()
        while piece := await self.receive_body():
            body += piece
            if len(body) > MAX_BODY:
                return None
        return bytes(body)

    async def receive_body(self) -> bytes:
        """The next piece of the request's body; b"" at its end. Untrusted."""
        while True:
            event = await self._next_event()
            if isinstance(event, self._h11.Data):
                if event.data:
                    return bytes(event.data)
            else:
                return b""

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        h11 = self._h11
        connection = self._connection
        while True:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value] # NEED_DATA is ruled out
            if connection.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            data = await self._stream.receive_some(_CHUNK)
            if not data and connection.their_state is h11.SEND_BODY:
                raise EOFError  # gone in the middle, and nobody is left to be told so
            connection.receive_data(data)

    async def _handle(self, request: GuestRequest) -> GuestResponse:
        handler = self._http.find(request.method, request.path)[0]
        if handler is None:  # unregistered since
            return GuestResponse(404, body=b"not found\n")
        try:
            with trio.fail_after(REQUEST_SECONDS):
                return await handler(request)
        except trio.TooSlowError:
            return GuestResponse(503, body=b"no answer in time\n")
        except Exception as error:
            return self._http.on_bug(request.path, error)

    async def _serve_streaming(self, request: GuestRequest, handler: StreamHandler) -> GuestResponse | None:
        try:
            response = await handler(StreamingRequest(request, self))
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError, self._h11.RemoteProtocolError):
            raise
        except Exception as error:
            response = self._http.on_bug(request.path, error)
        if self._connection.our_state is self._h11.SEND_RESPONSE:
            return response or GuestResponse(204)
        await self._write(self._h11.EndOfMessage())
        return None

    async def _answer(self, response: GuestResponse) -> None:
        if self._connection.our_state not in (self._h11.IDLE, self._h11.SEND_RESPONSE):
            return
        with trio.move_on_after(REQUEST_SECONDS):
            await self.send_head(response, length=len(response.body))
            if response.body and not self._is_head:
                await self.send_body(response.body)
            await self._write(self._h11.EndOfMessage())
            await _linger(self._stream)

    async def send_head(self, response: GuestResponse, *, length: int | None) -> None:
        """Status and headers; without a length the body ends with the connection, or comes in chunks."""
        headers = [("Content-Type", response.content_type), ("Connection", "close"), ("Cache-Control", "no-store")]
        if length is not None:
            headers.append(("Content-Length", str(length)))
        headers += response.headers
        await self._write(self._h11.Response(status_code=response.status, headers=headers))

    async def send_body(self, data: bytes) -> None:
        """Raises BrokenResourceError."""
        await self._write(self._h11.Data(data=data))

    async def _write(self, event: h11.Event) -> None:
        data = self._connection.send(event)
        if data:
            async with self._sending:
                await self._stream.send_all(data)


async def _linger(stream: trio.SocketStream) -> None:
    """End our half, and read what the guest still sends: a close() on unread bytes would be a reset (RFC 9112 9.6)."""
    await stream.send_eof()
    while await stream.receive_some(_CHUNK):
        pass
