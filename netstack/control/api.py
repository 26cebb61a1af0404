"""The HTTP API: what is running, as JSON, on a unix socket of mode 0600 and on request on loopback TCP with a token.

Listening and serving are two steps. `listen_unix` and `listen_tcp` are a few system calls, made before the network says
that it is ready, so that whoever was told finds the socket. hypercorn and starlette take 0.3 s to import, in a thread
and after that; until then requests wait in the socket's queue.

Who answers. The front (`control.front`) accepts; it keeps connections that become tunnels into guests and hands the
others to hypercorn, which runs the application made here of routes in modules of their own: state_api, dns_api,
forwards_api, events_api, pcap_api, gvproxy_api. They talk to protocols, which gateway.api_view implements.

Who may ask. The unix socket is its owner's by its mode. The TCP socket is everybody's on this host, and a guest
reaches the host's loopback through the gateway address: so it answers nothing without the bearer token, and the
gateway is told to refuse guests that port besides.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from netstack.control.log import Events
from netstack.host.listeners import listen_unix as open_unix_listener

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from netstack.control.dns_api import DnsSource
    from netstack.control.events_api import EventSource
    from netstack.control.forwards_api import ForwardSource
    from netstack.control.gvproxy_api import GvproxySource
    from netstack.control.log import Log
    from netstack.control.pcap_api import CaptureSource
    from netstack.control.proxy_api import ProxySource
    from netstack.control.state_api import StateSource
    from netstack.control.tunnels import GuestOpener

    class ApiSource(StateSource, ProxySource, EventSource, GuestOpener, Protocol):
        """The parts of a network that the API shows and changes."""

        @property
        def dns_view(self) -> DnsSource: ...
        @property
        def forwards(self) -> ForwardSource: ...
        @property
        def capture(self) -> CaptureSource: ...
        @property
        def gvproxy(self) -> GvproxySource: ...


BACKLOG = 64
TOKEN_BYTES = 32


class ApiError(Exception):
    """The API cannot be served; str() is one line that says where and why, `errno` is the system's code or 0."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code or 0


class ApiListener:
    """A listening socket of the API. Made by `listen_unix` or `listen_tcp`; close it in the end."""

    def __init__(self, sock: socket.socket, uri: str, *, path: Path | None = None, token: str | None = None) -> None:
        self.sock = sock
        self.uri = uri  # with the real port, where 0 was asked for
        self.token = token
        self.port = 0 if path else int(sock.getsockname()[1])
        self._files: list[tuple[Path, int]] = []  # ours to remove, if they still are the same inode
        if path:
            self._own(path)

    def store_token(self, path: Path) -> None:
        """Write the token where its owner's programs find it. Raises ApiError."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # A file of our own making: one that somebody left there may be open to them.
            temporary.unlink(missing_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                os.fchmod(fd, 0o600)
                file.write(f"{self.token}\n")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ApiError(f"cannot store the API's token in {path}: {error.strerror}", error.errno) from None
        self._own(path)

    def close(self) -> None:
        """Stop listening and remove the socket's and the token's file. May be called twice."""
        # The file first: while the socket holds its inode, no successor's file can have the same number.
        for path, inode in self._files:
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()
        self._files.clear()
        self.sock.close()

    def _own(self, path: Path) -> None:
        self._files.append((path, path.lstat().st_ino))


def listen_unix(path: str) -> ApiListener:
    """Listen at a unix socket that only its owner can use. A socket file that nobody listens at is replaced.

    Raises ApiError.
    """
    try:
        sock = open_unix_listener(path, BACKLOG)
    except OSError as error:
        code, words = error.errno, error.strerror
        if isinstance(error, FileExistsError):
            words = f"{words}; name another path"
        elif code == errno.EADDRINUSE:
            code, words = None, f"{words}; name another with --api"
        raise ApiError(f"cannot listen for the API at {path}: {words}", code) from None
    try:
        return ApiListener(sock, f"unix://{path}", path=Path(path))
    except OSError as error:
        sock.close()
        raise ApiError(f"cannot listen for the API at {path}: {error.strerror}", error.errno) from None


def listen_tcp(host: str, port: int) -> ApiListener:
    """Listen on a loopback address, with a fresh token. Port 0 takes a free one. Raises ApiError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ApiError(f"cannot listen for the API at tcp://{shown}:{port}: {error.strerror}", error.errno) from None
    return ApiListener(sock, f"tcp://{shown}:{sock.getsockname()[1]}", token=secrets.token_urlsafe(TOKEN_BYTES))


async def serve_api(
    network: ApiSource,
    listeners: Sequence[ApiListener],
    *,
    log: Log | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests at all `listeners` until cancelled, then close them. The network outlives any failure in here."""
    logger = logging.getLogger("trio.serve_listeners")
    faults = None if log is None else _AcceptFaults(log)
    if faults is not None:
        logger.addFilter(faults)

    def on_crash(error: Exception) -> None:
        if log is not None:
            log.error("an API connection was lost", error=repr(error))

    try:
        await trio.to_thread.run_sync(_import_server)
        from netstack.control.front import Front
        from netstack.control.tunnels import tunnel_takeovers

        takeovers = tunnel_takeovers(network)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                app = make_app(network, listener.token, log)
                await nursery.start(Front(app, takeovers, listener.token, on_crash).serve, listener.sock)
            task_status.started()
    except Exception as error:
        if log is None:
            raise
        log.error("the API has ended", error=repr(error))
    finally:
        if faults is not None:
            logger.removeFilter(faults)
        for listener in listeners:
            listener.close()


class _AcceptFaults(logging.Filter):
    """Takes what trio says when accept() fails for want of descriptors: ten tracebacks a second, while somebody waits.

    Here they are a warning of our own, of which there is one in ten seconds (trio/_highlevel_serve_listeners.py).
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._events = Events(log)

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else record.getMessage()
        self._events.warning("accept", "the API cannot accept requests", error=str(error))
        return False


def make_app(network: ApiSource, token: str | None, log: Log | None = None) -> ASGIApp:
    """The ASGI application. With a `token`, every request must carry it, but the one for the dashboard's empty page."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from netstack.control.dashboard import dashboard_page
    from netstack.control.dns_api import dns_routes
    from netstack.control.events_api import event_routes
    from netstack.control.forwards_api import forward_routes
    from netstack.control.gvproxy_api import gvproxy_routes
    from netstack.control.metrics import write_metrics
    from netstack.control.openapi import write_openapi
    from netstack.control.pcap_api import capture_routes
    from netstack.control.proxy_api import proxy_routes
    from netstack.control.state_api import state_routes

    async def metrics(request: Request) -> Response:
        body, content_type = write_metrics(network, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})

    async def openapi(request: Request) -> Response:
        return JSONResponse(write_openapi(needs_token=token is not None))

    async def page(request: Request) -> Response:
        body, headers = dashboard_page()
        return Response(body, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    async def failed(request: Request, error: Exception) -> Response:
        if log is not None:
            log.error("an API request failed", path=request.url.path, error=repr(error))
        return JSONResponse({"error": "netstack failed to answer; its log says why"}, 500)

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]]
    handlers = {HTTPException: refused, Exception: failed}
    routes = [Route("/", page), Route("/metrics", metrics), Route("/openapi.json", openapi)]
    routes += state_routes(network)
    routes += proxy_routes(network)
    routes += dns_routes(network.dns_view)
    routes += forward_routes(network.forwards)
    routes += capture_routes(network.capture)
    routes += event_routes(network)
    routes += gvproxy_routes(network.gvproxy)
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    return app if token is None else _RequireToken(app, token)


class _RequireToken:
    """ASGI: lets pass only requests with `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        # The page is the same for everybody and shows nothing by itself: what it shows it asks for, with the token.
        if scope["type"] == "http" and not (scope["path"] == "/" and scope["method"] in ("GET", "HEAD")):
            given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
            if not secrets.compare_digest(given, self._expected):
                from starlette.responses import JSONResponse

                from netstack.control.front import UNAUTHORIZED

                response = JSONResponse({"error": UNAUTHORIZED}, 401, headers={"www-authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _import_server() -> None:
    import h11  # noqa: F401
    import hypercorn.trio.tcp_server  # noqa: F401
    import prometheus_client.exposition  # noqa: F401

    import netstack.control.gvproxy_api
    import netstack.control.openapi
    import netstack.control.tunnels  # noqa: F401
