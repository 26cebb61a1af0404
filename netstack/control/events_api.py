"""`GET /v1/events`: what happens, as server-sent events (control.events).

    GET /v1/events                      everything
    GET /v1/events?kinds=lease,forward  only these
    GET /v1/events?status=1             and what is running, each second, as events of the kind `status`

A listener that does not read for ten seconds is let go by the front (control.front).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.events import KEEP_AWAKE, KINDS, Event, EventHub, Listener, TooManyListenersError, write_event

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
    from trio import CancelScope

MIN_STATUS, MAX_STATUS = 0.2, 3600.0


class EventSource(Protocol):
    """The part of a network that tells what happens."""

    @property
    def hub(self) -> EventHub: ...

    def summary(self) -> dict[str, Any]: ...  # what is running, without the list of flows


def event_routes(source: EventSource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    async def events(request: Request) -> _Stream:
        kinds = [kind for kind in request.query_params.get("kinds", ",".join(KINDS)).split(",") if kind]
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise HTTPException(400, f"kinds: there is no {unknown[0]!r}; there are: {', '.join(KINDS)}")
        every = _parse_interval(request.query_params.get("status"))
        try:
            # Before the answer begins: what happens from now on is in it.
            listener = source.hub.listen(kinds)
        except TooManyListenersError:
            raise HTTPException(503, "too many programs listen already; end one of them") from None
        return _Stream(source, listener, every)

    return [Route("/v1/events", events)]


def _parse_interval(text: str | None) -> float | None:
    from starlette.exceptions import HTTPException

    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_STATUS <= seconds <= MAX_STATUS:  # nan is in no range
        raise HTTPException(400, f"status: must be a number of seconds, {MIN_STATUS} to {MAX_STATUS:.0f}")
    return seconds


class _Stream:
    """One answer, an ASGI application: written while a second task waits for the listener to go away."""

    def __init__(self, source: EventSource, listener: Listener, every: float | None) -> None:
        self._source = source
        self._listener = listener
        self._every = every

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import trio

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if scope["method"] != "HEAD":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_wait_disconnected, receive, nursery.cancel_scope)
                    await self._write(send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._listener.close()

    async def _write(self, send: Send) -> None:
        import trio

        status_at = trio.current_time() if self._every is not None else float("inf")
        out = b": netstack\n\n"
        while True:
            await send({"type": "http.response.body", "body": out, "more_body": True})
            events = await self._listener.wait(max(0.0, min(KEEP_AWAKE, status_at - trio.current_time())))
            if self._every is not None and trio.current_time() >= status_at:
                status_at = max(status_at + self._every, trio.current_time())
                events.append(Event(0, "status", self._source.summary()))
            out = b"".join(map(write_event, events)) or b": still here\n\n"


async def _wait_disconnected(receive: Receive, scope: CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
