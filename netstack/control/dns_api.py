"""The DNS part of the HTTP API.

    GET  /v1/dns                     routing table, cache, servers, counters, the last 1,000 queries
    GET  /v1/dns/query?name=&type=   asks as a guest would; the answer's bytes in hex
    POST /v1/dns/flush               {"scope": "resolved:tun0"} or {"name": "git.corp.example"}; without either all
    GET  /v1/dns/hosts               the names of [dns.hosts] and those that were added
    POST /v1/dns/hosts               {"app.test": "192.168.5.20", "*.app.test": ["192.168.5.20"], "old.test": null}

What cannot be done is a 400 with words. A body must say that it is JSON: a page in a browser cannot send that to us
without asking first (CORS), which is never granted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

# A list of 10,000 names is 500 KB.
MAX_BODY = 1 << 20
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

    fresh = {"cache-control": "no-store"}

    async def state(request: Request) -> Response:
        return JSONResponse(dns.describe(), headers=fresh)

    async def query(request: Request) -> Response:
        name = request.query_params.get("name")
        if not name:
            raise HTTPException(400, "say which name: /v1/dns/query?name=example.com&type=AAAA")
        try:
            with trio.fail_after(_DEADLINE):
                return JSONResponse(await dns.query(name, request.query_params.get("type", "A")), headers=fresh)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except trio.TooSlowError:
            raise HTTPException(504, f"no answer for {name} within {_DEADLINE:.0f} s") from None

    async def flush(request: Request) -> Response:
        body = await _read_object(request, optional=True)
        scope, name = body.pop("scope", None), body.pop("name", None)
        if body or not isinstance(scope, str | None) or not isinstance(name, str | None):
            raise HTTPException(400, 'takes {"scope": "..."} or {"name": "..."}, or nothing for all')
        try:
            return JSONResponse({"flushed": dns.flush(scope, name)})
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def hosts(request: Request) -> Response:
        if request.method == "POST":
            body = await _read_object(request)
            for name, value in body.items():
                values = value if isinstance(value, list) else [value]
                if value is not None and not all(isinstance(text, str) for text in values):
                    raise HTTPException(400, f"{name}: must be an address, a list of them, another name, or null")
            try:
                dns.add_hosts(body)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return JSONResponse({"hosts": dns.hosts()}, headers=fresh)

    return [
        Route("/v1/dns", state),
        Route("/v1/dns/query", query),
        Route("/v1/dns/flush", flush, methods=["POST"]),
        Route("/v1/dns/hosts", hosts, methods=["GET", "POST"]),
    ]


async def _read_object(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a request's body. Raises HTTPException."""
    import json

    from starlette.exceptions import HTTPException

    data = bytearray()
    async with contextlib.aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > MAX_BODY:
                raise HTTPException(413, f"at most {MAX_BODY} bytes")
    if optional and not data:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


def describe_dns_paths(answer: dict[str, Any]) -> dict[str, Any]:
    """The part of the OpenAPI document. `answer` is what every 200 looks like."""

    def operation(summary: str, ident: str, **more: Any) -> dict[str, Any]:
        return {"summary": summary, "operationId": ident, "responses": {"200": answer}, **more}

    def body(schema: dict[str, Any]) -> dict[str, Any]:
        return {"requestBody": {"content": {"application/json": {"schema": schema}}}}

    def parameter(name: str, *, required: bool) -> dict[str, Any]:
        return {"name": name, "in": "query", "required": required, "schema": {"type": "string"}}

    text = {"type": "string"}
    value = {"oneOf": [text, {"type": "array", "items": text}, {"type": "null"}]}
    asked = [parameter("name", required=True), parameter("type", required=False)]
    which = body({"type": "object", "properties": {"scope": text, "name": text}, "additionalProperties": False})
    return {
        "/v1/dns": {"get": operation("Routing table, cache, counters and the last queries", "getDns")},
        "/v1/dns/query": {"get": operation("Ask as a guest would", "queryDns", parameters=asked)},
        "/v1/dns/flush": {"post": operation("Empty the cache", "flushDns", **which)},
        "/v1/dns/hosts": {
            "get": operation("The names that were given", "getDnsHosts"),
            "post": operation(
                "Give names, or take them away with null",
                "setDnsHosts",
                **body({"type": "object", "additionalProperties": value}),
            ),
        },
    }
