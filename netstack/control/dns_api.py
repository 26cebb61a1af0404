"""The DNS part of the HTTP API.

    GET  /v1/dns                     routing table, cache, servers, counters, the last 1,000 queries
    GET  /v1/dns/query?name=&type=   asks as a guest would; the answer's bytes in hex
    POST /v1/dns/flush               {"scope": "resolved:tun0"} or {"name": "git.corp.example"}; without either all
    GET  /v1/dns/hosts               the names of [dns.hosts] and those that were added
    POST /v1/dns/hosts               {"app.test": "192.168.5.20", "*.app.test": ["192.168.5.20"], "old.test": null}

What cannot be done is a 400 with words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.bodies import FRESH, read_object

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

_DEADLINE = 8.0  # seconds for a query; the resolver itself gives up before


class DnsSource(Protocol):
    """The part of a network's DNS that the API shows and changes. ValueError: it cannot be done, and why."""

    def describe(self) -> dict[str, Any]: ...
    def flush(self, scope: str | None = None, name: str | None = None) -> int: ...
    def hosts(self) -> list[dict[str, object]]: ...
    def add_hosts(self, entries: Mapping[str, str | Sequence[str] | None]) -> None: ...
    async def query(self, name: str, kind: str = "A") -> dict[str, Any]: ...


def dns_routes(dns: DnsSource) -> list[Route]:
    """What to serve."""
    import trio
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def state(request: Request) -> Response:
        return JSONResponse(dns.describe(), headers=FRESH)

    async def query(request: Request) -> Response:
        name = request.query_params.get("name")
        if not name:
            raise HTTPException(400, "say which name: /v1/dns/query?name=example.com&type=AAAA")
        try:
            with trio.fail_after(_DEADLINE):
                return JSONResponse(await dns.query(name, request.query_params.get("type", "A")), headers=FRESH)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except trio.TooSlowError:
            raise HTTPException(504, f"no answer for {name} within {_DEADLINE:.0f} s") from None

    async def flush(request: Request) -> Response:
        body = await read_object(request, optional=True)
        scope, name = body.pop("scope", None), body.pop("name", None)
        if body or not isinstance(scope, str | None) or not isinstance(name, str | None):
            raise HTTPException(400, 'takes {"scope": "..."} or {"name": "..."}, or nothing for all')
        try:
            return JSONResponse({"flushed": dns.flush(scope, name)})
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def hosts(request: Request) -> Response:
        if request.method == "POST":
            body = await read_object(request)
            for name, value in body.items():
                values = value if isinstance(value, list) else [value]
                if value is not None and not all(isinstance(text, str) for text in values):
                    raise HTTPException(400, f"{name}: must be an address, a list of them, another name, or null")
            try:
                dns.add_hosts(body)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return JSONResponse({"hosts": dns.hosts()}, headers=FRESH)

    return [
        Route("/v1/dns", state),
        Route("/v1/dns/query", query),
        Route("/v1/dns/flush", flush, methods=["POST"]),
        Route("/v1/dns/hosts", hosts, methods=["GET", "POST"]),
    ]
