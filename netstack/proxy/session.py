"""A guest's HTTP connection to the proxy: request after request, each by the way that holds at that moment.

Theory of operation
-------------------
A head is read and looked at (`heads`), `choose` says which ways there are, a connection is opened or the last one used
again (`upstream`), and the request is carried (`exchange`) or, for CONNECT, the connections are joined (`service`).

One connection to an upstream is kept with the guest's own, for the next request by the same way: so that credentials
which belong to a connection (NTLM) keep working, and a page with a hundred pictures does not open a hundred
connections. What is wrong with a request is answered with a page that says so; after a request that could be
read in two ways the connection ends, because nobody knows where the next one begins.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import trio

from netstack.proxy.errors import RouteError
from netstack.proxy.exchange import Exchange, LostError
from netstack.proxy.heads import (
    HeadError,
    Place,
    Target,
    check_head,
    explicit_target,
    find_head,
    parse_request,
    transparent_target,
)
from netstack.proxy.pages import ESTABLISHED, write_page
from netstack.proxy.records import Record, Records
from netstack.proxy.routes import DIRECT, Routes
from netstack.proxy.service import HEAD_CHUNK, Guest
from netstack.proxy.upstream import Connector, Dial, RefusedError, Upstream

if TYPE_CHECKING:
    import h11

# Seconds for a head to come in once its first byte is there, and for the next request to begin. nginx has 60 and 75.
HEAD_TIMEOUT: Final = 60.0
IDLE_TIMEOUT: Final = 120.0


class Session:
    """One connection of a guest. `default` and `direct`: where it connected to, if it knows of no proxy."""

    def __init__(
        self,
        guest: Guest,
        connector: Connector,
        records: Records,
        *,
        default: Place | None = None,
        direct: Dial | None = None,
        received: bytes = b"",
    ) -> None:
        self._guest = guest
        self._connector = connector
        self._records = records
        self._default = default
        self._direct = direct
        self._received = bytearray(received)
        self._upstream: Upstream | None = None
        self._kind = "http" if default is None else "transparent http"

    @property
    def counters(self) -> Counter[str]:
        return self._records.counters

    async def run(self) -> None:
        """Serve the connection to its end. Untrusted."""
        try:
            while await self._serve_one():
                pass
        finally:
            if self._upstream is not None:
                await self._upstream.close()

    # ---- a request -------------------------------------------------------------------------------------------------

    async def _serve_one(self) -> bool:
        """One request; whether there may be another."""
        try:
            head = await self._read_head()
            if head is None:
                return False
            check_head(head)
            # What follows the head belongs to the body, or to the next request: h11 tells.
            connection, request = parse_request(head + bytes(self._received))
            self._received.clear()
            if self._default is None:
                target = explicit_target(request)
            else:
                target = transparent_target(request, self._default)
        except HeadError as error:
            await self._refuse(error)
            return False
        if self._default is not None and target.absolute:
            return await self._pass_on(head, connection)
        if request.method == b"CONNECT":
            return await self._tunnel(connection, request, target)
        return await self._forward(head, connection, request, target)

    async def _read_head(self) -> bytes | None:
        """The next head; None when the guest sends no more."""
        received = self._received
        deadline = trio.current_time() + (HEAD_TIMEOUT if received else IDLE_TIMEOUT)
        while True:
            end = find_head(received)
            if end:
                head = bytes(received[:end])
                del received[:end]
                return head
            data = b""
            with trio.move_on_at(deadline) as patience:
                data = bytes(await self._guest.stream.receive_some(HEAD_CHUNK))
            if patience.cancelled_caught:
                if not received:
                    return None
                raise HeadError(408, "proxy_slow_head", f"the head was not complete after {HEAD_TIMEOUT:.0f} s")
            if not data:
                if received:
                    self.counters["proxy_cut_head"] += 1
                return None
            if not received:
                deadline = trio.current_time() + HEAD_TIMEOUT
            received += data

    async def _refuse(self, error: HeadError) -> None:
        """Say what is wrong with a request, and end."""
        self.counters[error.reason] += 1
        place = self._default or Place("", 0)
        self._note("", place, "", error.status, 0.0, error.words)
        await self._guest.stream.send_all(write_page(error.status, error.words, error="http_request_error"))
        await self._guest.linger()

    # ---- CONNECT ---------------------------------------------------------------------------------------------------

    async def _tunnel(self, connection: h11.Connection, request: h11.Request, target: Target) -> bool:
        place = target.place
        start = time.monotonic()
        url = f"https://{place.authority}/"
        fields = [
            pair for pair in request.headers.raw_items() if pair[0].lower() in (b"proxy-authorization", b"user-agent")
        ]
        try:
            self._check_loop(request)
            routes = await self._connector.choose("https", place.host, place.port, url)
            kept, self._upstream = self._upstream, None
            upstream = await self._connector.open_tunnel(routes, place, fields, kept=kept)
        except RouteError as error:
            keep = isinstance(error, RefusedError) and error.status == 407
            if isinstance(error, RefusedError):
                self._upstream = error.upstream
            self._note_error("CONNECT", place, error, start, kind="connect")
            return await self._answer_error(connection, error, head_only=False, keep=keep)
        self._note("CONNECT", place, str(upstream.route), 200, start, kind="connect")
        try:
            await self._guest.stream.send_all(ESTABLISHED + upstream.connection.trailing_data[0])
        except BaseException:
            await upstream.close()
            raise
        await self._guest.join(upstream.stream, connection.trailing_data[0], self.counters)
        return False

    # ---- everything else -------------------------------------------------------------------------------------------

    async def _forward(self, head: bytes, connection: h11.Connection, request: h11.Request, target: Target) -> bool:
        place = target.place
        start = time.monotonic()
        method = request.method.decode("ascii", "replace")
        url = f"http://{place.authority}{target.path.decode('latin-1')}"
        exchange: Exchange | None = None
        upstream: Upstream | None = None
        if self._default is not None and self._has_been_here(request):
            # The host's proxy is in a guest, and this is its own connection to the world.
            self.counters["proxy_loop"] += 1
            return await self._pass_on(head, connection)
        try:
            self._check_loop(request)
            routes = await self._connector.choose("http", place.host, place.port, url)
            if self._default is not None and routes[0] is DIRECT:
                # The guest knows of no proxy, and needs none: from here on this is a connection like any other.
                return await self._pass_on(head, connection)
            upstream = await self._reuse_or_open(routes, place)
            while True:
                self._upstream = upstream
                exchange = Exchange(self._guest, connection, request, target, upstream, self._connector.via)
                try:
                    again = await exchange.run()
                    break
                except LostError:
                    await upstream.close()
                    self.counters["proxy_repeated"] += 1
                    upstream = await self._connector.open_for_request(routes, place, direct=self._direct)
        except RouteError as error:
            await self._drop_upstream()
            self._note_error(method, place, error, start)
            return await self._answer_error(connection, error, head_only=request.method == b"HEAD", keep=False)
        except HeadError as error:
            await self._drop_upstream()
            await self._refuse(error)
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            status = exchange.status if exchange is not None else 0
            route = str(upstream.route) if upstream is not None else ""
            self._note(method, place, route, status, start, "the connection broke off")
            if status:
                self._guest.reset()  # a FIN would be the end of a body that has no length
            raise
        self._note(method, place, str(upstream.route), exchange.status, start)
        if exchange.switched:
            self._upstream = None
            self.counters["proxy_upgraded"] += 1
            await self._guest.join(upstream.stream, connection.trailing_data[0], self.counters)
            return False
        if not upstream.recycle():
            await self._drop_upstream()
        if not again:
            await self._guest.linger()
            return False
        self._received[:] = connection.trailing_data[0]
        return True

    async def _reuse_or_open(self, routes: Routes, place: Place) -> Upstream:
        kept = self._upstream
        if kept is not None:
            if kept.route == routes[0] and kept.place in (None, place) and kept.is_quiet():
                return kept
            await self._drop_upstream()
        return await self._connector.open_for_request(routes, place, direct=self._direct)

    async def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            await upstream.close()

    async def _pass_on(self, head: bytes, connection: h11.Connection) -> bool:
        """Leave a transparent connection alone: everything goes to where the guest connected to."""
        assert self._default is not None and self._direct is not None
        place = self._default
        start = time.monotonic()
        await self._drop_upstream()
        early = head + connection.trailing_data[0]
        try:
            stream = await self._direct(*place)
        except RouteError as error:
            self._note_error("", place, error, start)
            return await self._answer_error(connection, error, head_only=False, keep=False)
        self._note("", place, "direct", 0, start)
        await self._guest.join(stream, early, self.counters)
        return False

    # ---- answers of ours -------------------------------------------------------------------------------------------

    def _has_been_here(self, request: h11.Request) -> bool:
        return any(name == b"via" and self._connector.via in value for name, value in request.headers)

    def _check_loop(self, request: h11.Request) -> None:
        """A request that has been here already: the host's proxy is a guest of ours, or leads to one."""
        if self._has_been_here(request):
            self.counters["proxy_loop"] += 1
            raise RouteError(508, "proxy_loop_detected", "the host's proxy settings lead back to this proxy")

    async def _answer_error(
        self, connection: h11.Connection, error: RouteError, *, head_only: bool, keep: bool
    ) -> bool:
        fields, body = (error.fields, error.body) if isinstance(error, RefusedError) else ([], b"")
        page = write_page(
            error.status,
            error.words,
            error=error.error,
            fields=fields,
            body=body if body and error.status == 407 else None,
            head_only=head_only,
            keep=keep,
        )
        await self._guest.stream.send_all(page)
        if not keep:
            await self._guest.linger()
            return False
        self._received[:] = connection.trailing_data[0]
        return True

    def _note(
        self, method: str, place: Place, route: str, status: int, start: float, error: str = "", kind: str = ""
    ) -> None:
        seconds = time.monotonic() - start if start else 0.0
        record = Record(
            self._guest.address, kind or self._kind, method, place.host, place.port, route, status, seconds, error
        )
        self._records.add(record)

    def _note_error(self, method: str, place: Place, error: RouteError, start: float, kind: str = "") -> None:
        self._note(method, place, "", error.status, start, error.words, kind)
