"""Connections for guests' requests: direct, or through a proxy of the host's.

Theory of operation. `choose` says which ways there are, and they are tried in order: a way that cannot be opened (the
proxy is down, it refuses, its name is unknown) gives way to the next one, and the last failure is what the guest is
told. A request through an HTTP proxy needs a connection to that proxy; everything else needs one to the target itself:
dialled, through SOCKS, or by CONNECT.

    tunnel       direct: dial   http, https: CONNECT host:port   socks5h: the name   socks5, socks4: an address
    request      direct: dial   http, https: the proxy itself    socks: the same

Names go to proxies as names (the proxy may be the only one that can resolve them); socks5 and socks4 are told an
address by definition. The credentials of the host's settings are written into the one field or handshake for which they
are, here, and are in nothing that this module raises, logs or counts.
"""

from __future__ import annotations

import base64
import select
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import h11
import trio

from netstack.proxy.errors import RouteError
from netstack.proxy.heads import MAX_HEAD, Fields, Place
from netstack.proxy.routes import DIRECT, Choose, Direct, Route, Routes
from netstack.proxy.service import CHUNK
from netstack.proxy.settings import ProxyServer

# Seconds for a proxy to accept a connection (TLS included), and to open a tunnel: it dials too, and may try
# several addresses of a name for longer than we would.
CONNECT_TIMEOUT: Final = 10.0
TUNNEL_TIMEOUT: Final = 60.0

# What a proxy may say about a tunnel that it refuses, and the guest is shown.
_MAX_REFUSAL: Final = 64 * 1024

Dial = Callable[[str, int], Awaitable[trio.SocketStream]]
"""Connects to host:port. Raises RouteError."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a name, the best first. Raises RouteError."""


class RefusedError(RouteError):
    """A proxy answered CONNECT with something else than 2xx; a 407 goes to the guest as it is."""

    def __init__(self, status: int, words: str, fields: Fields | None = None, body: bytes = b"") -> None:
        super().__init__(status, "http_request_denied", words)
        self.fields = fields or []
        self.body = body
        self.upstream: Upstream | None = None  # the connection to ask again on, where it was kept (NTLM belongs to it)


def new_connection() -> h11.Connection:
    """The state of an HTTP connection to a server or proxy."""
    return h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)


@dataclass(slots=True, eq=False)
class Upstream:
    """An open connection, and what it was opened for: `place`, or a proxy of ours that takes any place."""

    stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]
    route: Route
    place: Place | None
    connection: h11.Connection = field(default_factory=new_connection)
    used: bool = False

    @property
    def is_proxy(self) -> bool:
        """Whether requests on it name their host in full."""
        return self.place is None

    def is_quiet(self) -> bool:
        """Whether it can take another request: nothing has come since the last answer, no end either."""
        state = self.connection.our_state, self.connection.their_state
        return state == (h11.IDLE, h11.IDLE) and not is_readable(self.stream)

    def recycle(self) -> bool:
        """An answer is complete: make ready for the next request. False: there can be none."""
        connection = self.connection
        if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
            return False
        if connection.trailing_data[0]:
            return False  # more than was asked for
        connection.start_next_cycle()
        self.used = True
        return True

    async def close(self) -> None:
        """Close at once."""
        await trio.aclose_forcefully(self.stream)


def is_readable(stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> bool:
    """Whether there is something to be read, or the end."""
    sock = (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def authorization(server: ProxyServer) -> Fields:
    """The field that tells a proxy who asks (RFC 7617 2; UTF-8, as curl and browsers)."""
    if server.username is None:
        return []
    userinfo = f"{server.username}:{server.password or ''}".encode("utf-8", "replace")
    return [(b"Proxy-Authorization", b"Basic " + base64.b64encode(userinfo))]


class Connector:
    """Opens connections for requests.

    `dial` reaches whatever a guest may reach, `dial_proxy` whatever the host may: a proxy on its loopback.
    """

    def __init__(
        self,
        choose: Choose,
        dial: Dial,
        dial_proxy: Dial,
        resolve: Resolve,
        *,
        counters: Counter[str] | None = None,
        on_result: Callable[[ProxyServer, bool], None] = lambda server, worked: None,
        via: bytes = b"1.1 netstack",
    ) -> None:
        self.choose = choose
        self.via = via
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._dial = dial
        self._dial_proxy = dial_proxy
        self._resolve = resolve
        self._on_result = on_result
        self._tls: ssl.SSLContext | None = None

    async def open_tunnel(
        self,
        routes: Routes,
        place: Place,
        fields: Fields,
        *,
        direct: Dial | None = None,
        kept: Upstream | None = None,
    ) -> Upstream:
        """A connection on which the target itself answers. Raises RouteError.

        `fields` are for a CONNECT; `kept`, a connection to a proxy, is used where it is the right one, else closed.
        """

        async def open_route(route: Route) -> Upstream:
            nonlocal kept
            if isinstance(route, Direct):
                return Upstream(await (direct or self._dial)(*place), route, place)
            if route.scheme in ("http", "https"):
                again, kept = kept, None
                if again is not None and not (again.is_proxy and again.route == route and again.is_quiet()):
                    await again.close()
                    again = None
                return await self._open_by_connect(route, place, fields, again)
            return Upstream(await self._open_by_socks(route, place), route, place)

        try:
            return await self._first(routes, open_route)
        finally:
            if kept is not None:
                await kept.close()

    async def open_for_request(self, routes: Routes, place: Place, *, direct: Dial | None = None) -> Upstream:
        """A connection that a plain request is to be sent on. Raises RouteError."""

        async def open_route(route: Route) -> Upstream:
            if isinstance(route, Direct):
                return Upstream(await (direct or self._dial)(*place), route, place)
            if route.scheme in ("http", "https"):
                return Upstream(await self._open_proxy(route), route, None)
            return Upstream(await self._open_by_socks(route, place), route, place)

        return await self._first(routes, open_route)

    async def _first(self, routes: Routes, open_route: Callable[[Route], Awaitable[Upstream]]) -> Upstream:
        """The first way that works."""
        last: RouteError | None = None
        for route in routes or (DIRECT,):
            try:
                upstream = await open_route(route)
            except RefusedError:
                # It is there, and has decided: that is an answer, and another proxy may not undo it.
                raise
            except RouteError as error:
                last = error
                if isinstance(route, ProxyServer):
                    self.counters["proxy_upstream_failed"] += 1
                    self._on_result(route, False)
                continue
            if isinstance(route, ProxyServer):
                self._on_result(route, True)
            return upstream
        assert last is not None
        raise last

    async def _open_proxy(self, server: ProxyServer) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        """A connection to a proxy, in TLS where its scheme says so."""
        stream: trio.SocketStream | None = None
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                stream = await self._dial_proxy(server.host, server.port)
                if server.scheme != "https":
                    return stream
                secured = trio.SSLStream(stream, self._context(), server_hostname=server.host, https_compatible=True)
                await secured.do_handshake()
                return secured
        except trio.TooSlowError:
            error = RouteError(504, "connection_timeout", f"the proxy {server} does not answer")
        except RouteError as failure:
            error = RouteError(failure.status, failure.error, f"the proxy {server} cannot be reached: {failure.words}")
        except (trio.BrokenResourceError, OSError, ValueError) as failure:
            error = RouteError(502, "tls_protocol_error", f"no TLS with the proxy {server}: {_words_of(failure)}")
        if stream is not None:
            await trio.aclose_forcefully(stream)
        raise error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            # The host's authorities; some 20 ms, so not before it is needed.
            self._tls = ssl.create_default_context()
        return self._tls

    async def _open_by_connect(
        self, server: ProxyServer, place: Place, fields: Fields, kept: Upstream | None
    ) -> Upstream:
        upstream = kept or Upstream(await self._open_proxy(server), server, None)
        try:
            with trio.fail_after(TUNNEL_TIMEOUT):
                refusal = await self._ask_for_tunnel(upstream, server, place, fields)
        except trio.TooSlowError:
            refusal = RouteError(504, "connection_timeout", f"the proxy {server} does not answer")
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            refusal = RouteError(502, "http_protocol_error", f"the proxy {server} does not speak HTTP")
        except BaseException:
            await trio.aclose_forcefully(upstream.stream)
            raise
        if refusal is None:
            return upstream
        if isinstance(refusal, RefusedError) and refusal.status == 407 and upstream.recycle():
            refusal.upstream = upstream
        else:
            await upstream.close()
        raise refusal

    async def _ask_for_tunnel(
        self, upstream: Upstream, server: ProxyServer, place: Place, fields: Fields
    ) -> RouteError | None:
        """Send CONNECT and read the answer; None when the tunnel is there."""
        connection, stream = upstream.connection, upstream.stream
        authority = place.authority.encode("ascii")
        own = authorization(server)
        if own:
            fields = [pair for pair in fields if pair[0].lower() != b"proxy-authorization"]
        request = h11.Request(
            method=b"CONNECT", target=authority, headers=[(b"Host", authority), *fields, *own, (b"Via", self.via)]
        )
        out = connection.send(request)
        assert out is not None
        await stream.send_all(out + (connection.send(h11.EndOfMessage()) or b""))
        response: h11.Response | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some(CHUNK)
                connection.receive_data(bytes(data))
            elif isinstance(event, h11.Response):
                if 200 <= event.status_code < 300:
                    return None
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > _MAX_REFUSAL:
                    break
            elif not isinstance(event, h11.InformationalResponse):
                break  # the end of the message
        if response is None:
            return RouteError(502, "http_protocol_error", f"the proxy {server} closed the connection")
        return self._refusal(server, response, bytes(body[:_MAX_REFUSAL]), mine=bool(own))

    def _refusal(self, server: ProxyServer, response: h11.Response, body: bytes, *, mine: bool) -> RouteError:
        status = response.status_code
        if status == 407:
            self.counters["proxy_upstream_407"] += 1
            if mine:
                return RefusedError(502, f"the proxy {server} does not accept the host's credentials for it")
            kept = [(raw, value) for raw, value in response.headers.raw_items() if raw.lower() in _KEPT_OF_407]
            return RefusedError(407, f"the proxy {server} wants credentials, and the host has none", kept, body)
        # 3xx and whatever else is no status that a guest's program can do anything with, behind CONNECT.
        told = status if 400 <= status < 600 else 502
        return RefusedError(told, f"the proxy {server} refused the connection with status {status}")

    async def _open_by_socks(self, server: ProxyServer, place: Place) -> trio.SocketStream:
        from python_socks import ProxyError, ProxyType
        from python_socks.async_.trio import Proxy

        if server.problem:
            raise RouteError(502, "proxy_configuration_error", f"the proxy {server} {server.problem}")
        kind = ProxyType.SOCKS4 if server.scheme == "socks4" else ProxyType.SOCKS5
        try:
            with trio.fail_after(TUNNEL_TIMEOUT):
                host = place.host
                if server.scheme != "socks5h":
                    found = await self._resolve(host)
                    host = (
                        next((text for text in found if ":" not in text), "") if kind is ProxyType.SOCKS4 else found[0]
                    )
                    if not host:
                        raise RouteError(502, "dns_error", f"{place.host} has no IPv4 address, as SOCKS 4 needs")
                forward: Any = _Dialled(self._dial_proxy)
                proxy = Proxy(
                    kind, server.host, server.port, server.username, server.password, rdns=True, forward=forward
                )
                return trio.SocketStream(await proxy.connect(host, place.port, timeout=TUNNEL_TIMEOUT))
        except RouteError as error:
            raise RouteError(
                error.status, error.error, f"the proxy {server} cannot be reached: {error.words}"
            ) from None
        except ProxyError as error:
            # 2: not allowed by its rules (RFC 1928 6). The library's words may quote the request.
            if error.error_code == 2:
                raise RefusedError(403, f"the proxy {server} does not allow it") from None
            words = _SOCKS_WORDS.get(error.error_code or 0, "it refused the connection")
            raise RouteError(502, "connection_refused", f"the proxy {server}: {words}") from None
        except (trio.TooSlowError, TimeoutError):
            raise RouteError(504, "connection_timeout", f"the proxy {server} does not answer") from None
        except (OSError, ValueError, trio.BrokenResourceError) as error:
            raise RouteError(502, "proxy_internal_error", f"the proxy {server}: {_words_of(error)}") from None


class _Dialled:
    """Has the library use a connection of ours, as if it went through another proxy: names are ours to resolve."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def connect(
        self,
        dest_host: str,
        dest_port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
    ) -> trio.socket.SocketType:
        del timeout
        with trio.fail_after(CONNECT_TIMEOUT):
            return (await self._dial(dest_host, dest_port)).socket


_KEPT_OF_407: Final = frozenset((b"proxy-authenticate", b"content-type", b"content-language"))

# RFC 1928 6.
_SOCKS_WORDS: Final = {
    1: "it failed",
    3: "the network cannot be reached",
    4: "the host cannot be reached",
    5: "the connection was refused",
    6: "the TTL has expired",
    7: "it does not know CONNECT",
    8: "it does not know that type of address",
}


def _words_of(error: BaseException) -> str:
    """What went wrong, without what was sent: an OSError's own words, and the kind of anything else."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.lower().replace("_", " ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
