"""The gateway's proxy on a desk: real sockets on the loopback, guests at the far end of a socket pair, scripted peers.

    guest (a trio stream)  ==socket pair==  ProxyService -> GatewayProxy  --TCP-->  Peer, on 127.0.0.1

Names are the desk's: `desk.names["web.test"] = peer.port`. Whatever is not there does not exist. There is no stack
behind the service, so that connections are never joined but copied: tests/netns/test_proxy.py has the stack.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from netstack.core.ports import HostSocket, TcpServiceCall
from netstack.proxy.errors import RouteError, route_error
from netstack.proxy.routes import DIRECT, Routes
from netstack.proxy.server import GatewayProxy
from netstack.proxy.service import Gate, ProxyService
from netstack.proxy.settings import ProxyServer, parse_server
from netstack.proxy.upstream import Connector

GUEST = bytes((192, 168, 5, 15))
WORLD = bytes((203, 0, 113, 1))
VIA = b"1.1 netstack-test"

Script = Callable[[trio.SocketStream], Awaitable[None]]


class Peer:
    """A server on the loopback that does what its script says with each connection, and keeps what it received."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.received = bytearray()
        self.connections = 0
        self.port = 0

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._serve, listeners, task_status=task_status)  # type: ignore[arg-type]

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            async with stream:
                await self.script(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass

    async def head(self, stream: trio.SocketStream) -> bytes:
        """The next head that comes, kept in `received`; what follows it must not have come yet."""
        return await self.until(stream, b"\r\n\r\n")

    async def until(self, stream: trio.SocketStream, end: bytes) -> bytes:
        """What comes, as far as `end`."""
        found = bytearray()
        while not found.endswith(end):
            piece = await stream.receive_some(65536 if end != b"\r\n\r\n" else 1)
            if not piece:
                self.received += found
                raise EOFError
            found += piece
        self.received += found
        return bytes(found)


class Stack:
    """No stack."""

    def __init__(self) -> None:
        self.reset: list[TcpServiceCall] = []

    def replace_socket(self, call: TcpServiceCall, old: HostSocket, new: HostSocket, early: bytes, now: float) -> bool:
        return False

    def reset_service(self, call: TcpServiceCall, old: HostSocket, now: float) -> None:
        self.reset.append(call)

    def end_round(self, now: float) -> None: ...


class Events:
    debug = False

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None: ...
    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None: ...
    def info(self, message: str, **fields: object) -> None: ...

    def warning(self, key: str, message: str, **fields: object) -> None:
        self.warnings.append(f"{message} {fields}")


class Desk:
    """A proxy, its settings and its world."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.names: dict[str, int | OSError] = {}
        self.routes: Routes = (DIRECT,)
        self.asked: list[tuple[str, str, int, str]] = []
        self.results: list[tuple[ProxyServer, bool]] = []
        self.counters: Counter[str] = Counter()
        self.stack = Stack()
        self._guests: list[trio.SocketStream] = []
        self.events = Events()
        self.dialled: list[tuple[str, int]] = []
        connector = Connector(
            self._choose,
            self._dial,
            self._dial,
            self._resolve,
            counters=self.counters,
            on_result=lambda server, worked: self.results.append((server, worked)),
            via=VIA,
        )
        self.known: dict[bytes, str] = {}
        self.proxy = GatewayProxy(connector, self._dial, lambda guest, address: self.known.get(address), self.counters)
        self.gate = Gate()

    async def peer(self, name: str, script: Script) -> Peer:
        """A scripted server by this name."""
        peer = Peer(script)
        await self.nursery.start(peer.serve)
        self.names[name] = peer.port
        return peer

    def via(self, *urls: str) -> None:
        """From now on requests go to these proxies, in turn; "" is direct."""
        self.routes = tuple(parse_server(url) if url else DIRECT for url in urls)

    def guest(self, kind: str = "http", *, port: int = 80) -> trio.SocketStream:
        """A new connection of a guest: to the "http" or "socks" port, or "transparent" to WORLD."""
        serve = getattr(self.proxy, f"serve_{kind}")
        service = ProxyService(self.nursery, self.stack, self.gate, serve, self.events, self.counters)
        sock = service.open(TcpServiceCall(None, GUEST, 40000, WORLD, port))  # type: ignore[arg-type]
        assert sock is not None
        guest = trio.SocketStream(trio.socket.from_stdlib_socket(sock))  # type: ignore[arg-type]
        self._guests.append(guest)
        return guest

    def close(self) -> None:
        """All guests go."""
        for guest in self._guests:
            guest.socket.close()

    async def ask(self, request: bytes, kind: str = "http") -> bytes:
        """The whole answer to one request, to the end of the connection."""
        guest = self.guest(kind)
        await guest.send_all(request)
        return await read_all(guest)

    async def _choose(self, scheme: str, host: str, port: int, url: str) -> Routes:
        self.asked.append((scheme, host, port, url))
        return self.routes

    async def _dial(self, host: str, port: int) -> trio.SocketStream:
        self.dialled.append((host, port))
        found = self.names.get(host)
        if found is None:
            raise RouteError(502, "dns_error", f"{host} does not exist")
        if isinstance(found, OSError):
            raise route_error(found, host)
        return await trio.open_tcp_stream("127.0.0.1", found)

    async def _resolve(self, host: str) -> list[str]:
        return ["203.0.113.9"]


REFUSED = OSError(errno.ECONNREFUSED, "Connection refused")


async def read_all(stream: trio.SocketStream) -> bytes:
    """What comes, to the end."""
    found = bytearray()
    with trio.fail_after(10):
        while piece := await stream.receive_some(65536):
            found += piece
    return bytes(found)


async def read_until(stream: trio.SocketStream, end: bytes) -> bytes:
    """What comes, as far as `end` at its end."""
    found = bytearray()
    with trio.fail_after(10):
        while not found.endswith(end):
            piece = await stream.receive_some(65536)
            assert piece, f"the connection ended behind {bytes(found)!r}"
            found += piece
    return bytes(found)
