"""One request of a guest and its answer: the fields, the body both ways at once, and what can go wrong between.

Theory of operation
-------------------
h11 has the state of either connection: towards the guest it is a server, towards the upstream a client. Nothing is
gathered: what has been read of a body is written before more is read, so that whoever is slow slows the other one
down, and a connection holds a chunk of either direction at most.

    upload      a task: the guest's body to the upstream, then a look at whether the guest has gone
    download    1xx as they come (100: the guest sends its body now), the answer, its body

The answer may be complete before the body is (413, 401); then the guest's connection ends behind the answer, because
the rest of the body would be taken for the next request. An upstream that breaks off in the middle of an answer breaks
the guest's connection off as well: a body is never made to look complete.

A connection to an upstream that was kept may be closed by it at any time, and the request on its way is lost: one
without a body is sent once more, on a fresh connection (RFC 9110 9.2.2: only where repeating does no harm).
"""

from __future__ import annotations

from typing import Final

import h11
import trio
from h11._state import MIGHT_SWITCH_PROTOCOL  # documented, and missing in __all__

from netstack.proxy.errors import RouteError
from netstack.proxy.heads import Fields, HeadError, Place, Target, onward_fields, split_list, upgrade_of
from netstack.proxy.routes import Direct
from netstack.proxy.service import CHUNK, Guest
from netstack.proxy.settings import ProxyServer
from netstack.proxy.upstream import Upstream, authorization

# RFC 9110 9.2.1: they change nothing at the server.
_SAFE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))

# RFC 9110 9.3.8: answered with the request itself, by a proxy too (Max-Forwards: 0); TRACK is IIS's word for it.
_ECHOED: Final = frozenset((b"TRACE", b"TRACK"))

# A guest that sends further requests ahead of their turn is read so far (RFC 9112 9.3.2).
_AHEAD: Final = 64 * 1024


class LostError(Exception):
    """The upstream closed a kept connection instead of answering; the request may be sent again."""


class Exchange:
    """A request, once the connection for it is there."""

    def __init__(
        self,
        guest: Guest,
        connection: h11.Connection,
        request: h11.Request,
        target: Target,
        upstream: Upstream,
        via: bytes,
    ) -> None:
        self._guest = guest
        self._connection = connection
        self._request = request
        self._target = target
        self._upstream = upstream
        self._via = via
        self._upload_failed: HeadError | None = None
        self._upload_done = False
        self._guest_closed = False
        self._had_body = False
        self._ends_chunked = False  # the answer to the guest, unless it speaks HTTP/1.0
        self._out: list[bytes] = []
        self.status = 0  # of the answer, once it has begun
        self.switched = False  # to another protocol: the connections are to be joined

    @property
    def can_repeat(self) -> bool:
        """Whether it may be sent again: nothing of it or its answer has gone further."""
        return self._upstream.used and self._request.method in _SAFE and not self._had_body

    async def run(self) -> bool:
        """Send the request and relay the answer; whether the guest's connection can take another request.

        Raises RouteError while nothing has been answered, LostError, HeadError for a bad body; BrokenResourceError when
        the guest has gone, or must be left.
        """
        await self._send_head(upgrade_of(self._request))
        complete = False
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, nursery.cancel_scope)
            try:
                complete = await self._download()
            except (RouteError, LostError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                failure = error  # out of here before it is raised: a nursery would wrap it
            nursery.cancel_scope.cancel()
        if self._upload_failed is not None and not self.status:
            raise self._upload_failed
        if failure is not None:
            raise failure
        if not complete:
            # The nursery was cancelled from within: the guest has gone.
            raise trio.BrokenResourceError("the guest has gone")
        return self._upload_done and not self._guest_closed and self._connection.our_state is h11.DONE

    # ---- up --------------------------------------------------------------------------------------------------------

    async def _send_head(self, upgrade: bytes | None) -> None:
        upstream, request, target = self._upstream, self._request, self._target
        route = upstream.route
        # RFC 9112 3.2.2: Host says what the target says.
        fields: Fields = [(b"Host", _host_of(target.place))]
        kept = onward_fields(request.headers, frozenset((b"host", b"transfer-encoding")))
        if upstream.is_proxy:
            assert isinstance(route, ProxyServer)
            own = authorization(route)
            if own and request.method.upper() in _ECHOED:
                words = f"{request.method.decode('ascii')} would have the proxy {route} tell the host's credentials"
                raise RouteError(403, "http_request_denied", words)
            fields += own or [
                (raw, value) for raw, value in request.headers.raw_items() if raw.lower() == b"proxy-authorization"
            ]
        fields += kept
        if any(name == b"transfer-encoding" for name, _ in request.headers):
            fields.append((b"Transfer-Encoding", b"chunked"))
            self._had_body = True
        elif any(name == b"content-length" and value != b"0" for name, value in request.headers):
            self._had_body = True
        if upgrade is not None:
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
        if target.absolute or upstream.is_proxy:
            fields.append((b"Via", self._via))
        path = target.path
        if upstream.is_proxy:
            path = b"http://" + _host_of(target.place) + (path if path != b"*" else b"")
        event = h11.Request(method=request.method, target=path, headers=fields)
        data = upstream.connection.send(event)
        assert data is not None
        if not self._had_body:
            # In one piece: most requests are no more than this.
            ending = self._next_event()
            if isinstance(ending, h11.EndOfMessage):
                data += upstream.connection.send(h11.EndOfMessage()) or b""
                self._upload_done = True
        try:
            await upstream.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if self.can_repeat:
                raise LostError from None
            # It may have said why before it closed: that is read below.

    def _next_event(self) -> object:
        try:
            return self._connection.next_event()
        except h11.RemoteProtocolError as error:
            raise HeadError(
                error.error_status_hint, "proxy_bad_body", "the body is not framed as it should be"
            ) from None

    async def _upload(self, exchange: trio.CancelScope) -> None:
        """The guest's body; then wait for the guest to go."""
        try:
            if not self._upload_done:
                await self._send_body()
                self._upload_done = True
            await self._watch_guest()
        except HeadError as error:
            self._upload_failed = error
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        exchange.cancel()

    async def _send_body(self) -> None:
        upstream = self._upstream
        is_deaf = False  # the upstream reads no more: what it says is what counts
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                data = await self._guest.stream.receive_some(CHUNK)
                if not data:
                    raise trio.BrokenResourceError("the guest has gone")
                self._connection.receive_data(data)
                continue
            if not isinstance(event, (h11.Data, h11.EndOfMessage)):
                return
            last = isinstance(event, h11.EndOfMessage)
            if isinstance(event, h11.EndOfMessage):
                event = h11.EndOfMessage(headers=onward_fields(event.headers, _FRAMING) if self._is_chunked() else [])
            if not is_deaf:
                try:
                    await upstream.stream.send_all(upstream.connection.send(event) or b"")
                except (trio.BrokenResourceError, trio.ClosedResourceError, h11.LocalProtocolError):
                    is_deaf = True
            if last:
                return

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self._request.headers)

    async def _watch_guest(self) -> None:
        """Return when the guest has gone; further requests that it sends ahead are kept for later."""
        while True:
            data = await self._guest.stream.receive_some(CHUNK)
            if not data:
                self._guest_closed = True
                await self._guest.wait_gone()
                return
            self._connection.receive_data(data)
            if len(self._connection.trailing_data[0]) > _AHEAD:
                await self._guest.wait_gone()
                return

    # ---- down ------------------------------------------------------------------------------------------------------

    async def _download(self) -> bool:
        """Relay the answer, to its end."""
        upstream = self._upstream
        seen = False
        while True:
            try:
                event = upstream.connection.next_event()
                if event is h11.NEED_DATA:
                    await self._flush()
                    data = await upstream.stream.receive_some(CHUNK)
                    seen = seen or bool(data)
                    upstream.connection.receive_data(bytes(data))
                    continue
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
                if not seen and self.can_repeat:
                    raise LostError from None
                raise self._bad_answer(malformed=seen and isinstance(error, h11.RemoteProtocolError)) from None
            try:
                if self._relay_event(event):
                    await self._flush()
                    return True
            except h11.LocalProtocolError:
                raise self._bad_answer(malformed=True) from None

    def _relay_event(self, event: object) -> bool:
        """A part of the answer; True for its last one."""
        if isinstance(event, h11.InformationalResponse):
            if event.status_code == 101:
                self._switch(event)
                return True
            if self._connection.their_http_version != b"1.0":
                fields = onward_fields(event.headers)
                self._send(
                    h11.InformationalResponse(status_code=event.status_code, reason=event.reason, headers=fields)
                )
        elif isinstance(event, h11.Response):
            self._send_answer(event)
        elif isinstance(event, h11.Data):
            self._send(event)
        elif isinstance(event, h11.EndOfMessage):
            self._send(h11.EndOfMessage(headers=self._trailers(event)))
            return True
        else:
            raise self._bad_answer(malformed=False)
        return False

    def _send(self, event: h11.Event) -> None:
        data = self._connection.send(event)
        if data:
            self._out.append(data)

    async def _flush(self) -> None:
        if self._out:
            data = b"".join(self._out)
            self._out.clear()
            await self._guest.stream.send_all(data)

    def _trailers(self, event: h11.EndOfMessage) -> Fields:
        """Trailers only fit behind a chunked body, which HTTP/1.0 does not know."""
        if self._connection.their_http_version == b"1.0" or self._request.method == b"HEAD" or not self._ends_chunked:
            return []
        return onward_fields(event.headers, _FRAMING)

    def _send_answer(self, event: h11.Response) -> None:
        upstream = self._upstream
        fields = onward_fields(event.headers, frozenset((b"transfer-encoding",)))
        if event.status_code == 407:
            route = upstream.route
            if upstream.is_proxy and isinstance(route, ProxyServer):
                if route.has_credentials:
                    words = f"the proxy {route} does not accept the host's credentials for it"
                    raise RouteError(502, "http_request_denied", words)
                if not self._target.absolute:
                    words = f"the proxy {route} wants credentials, and the host has none"
                    raise RouteError(502, "http_request_denied", words)
                # The host has none: the guest may.
                fields += [
                    (raw, value) for raw, value in event.headers.raw_items() if raw.lower() == b"proxy-authenticate"
                ]
        if any(name == b"transfer-encoding" for name, _ in event.headers):
            fields = [pair for pair in fields if pair[0].lower() != b"content-length"]  # RFC 9112 6.3
        if event.status_code == 426:
            fields += [(raw, value) for raw, value in event.headers.raw_items() if raw.lower() == b"upgrade"]
        self._ends_chunked = not any(raw.lower() == b"content-length" for raw, _ in fields)
        if not self._upload_done and any(
            name == b"connection" and b"close" in split_list(value) for name, value in event.headers
        ):
            # It has heard enough of the body (413, 401): the guest is told that its connection ends, too.
            fields.append((b"Connection", b"close"))
        if self._target.absolute:
            fields.append((b"Via", self._via))
        self.status = event.status_code
        self._send(h11.Response(status_code=event.status_code, reason=event.reason, headers=fields))

    def _switch(self, event: h11.InformationalResponse) -> None:
        """101: from here on it is another protocol's."""
        if self._connection.their_state is not MIGHT_SWITCH_PROTOCOL:
            raise self._bad_answer(malformed=True)
        fields = onward_fields(event.headers)
        fields += [
            (raw, value) for raw, value in event.headers.raw_items() if raw.lower() in (b"upgrade", b"connection")
        ]
        self.status = 101
        self.switched = True
        self._send(h11.InformationalResponse(status_code=101, reason=event.reason, headers=fields))
        self._out.append(self._upstream.connection.trailing_data[0])

    def _bad_answer(self, malformed: bool) -> Exception:
        if self.status:
            return trio.BrokenResourceError("the answer broke off")
        who = self._target.place.host if isinstance(self._upstream.route, Direct) else str(self._upstream.route)
        if malformed:
            return RouteError(502, "http_protocol_error", f"{who} does not answer in HTTP")
        return RouteError(502, "connection_terminated", f"{who} closed the connection without an answer")


_FRAMING: Final = frozenset((b"host", b"content-length", b"transfer-encoding"))


def _host_of(place: Place) -> bytes:
    """The Host field: without the port where that is the scheme's own, as browsers write it."""
    text = place.authority
    return (text.removesuffix(":80") if place.port == 80 else text).encode("ascii")
