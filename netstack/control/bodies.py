"""Bodies of requests: bounded, JSON, and nothing a page in somebody's browser could have sent.

A body must say that it is JSON: a page in a browser cannot send that to us without asking first (CORS), which is never
granted. What cannot be read is a 400, 413 or 415 with words.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request

# A list of 10,000 names is 500 KB.
MAX_BODY = 1 << 20

# Answers are as of now.
FRESH = {"cache-control": "no-store"}


async def read_bytes(request: Request, limit: int = MAX_BODY) -> bytes:
    """The body as it came. Raises HTTPException when it is too long."""
    from starlette.exceptions import HTTPException

    data = bytearray()
    async with contextlib.aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > limit:
                raise HTTPException(413, f"at most {limit} bytes")
    return bytes(data)


async def read_object(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a request's body. Raises HTTPException."""
    from starlette.exceptions import HTTPException

    data = await read_bytes(request)
    if optional and not data:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


def take_text(body: dict[str, Any], key: str, default: str | None = None, *, among: Collection[str] = ()) -> str:
    """Remove the text at `key` and return it. Raises HTTPException, also when there is none and no default."""
    from starlette.exceptions import HTTPException

    value = body.pop(key, default)
    if value is None:
        raise HTTPException(400, f"{key} is missing")
    if not isinstance(value, str):
        raise HTTPException(400, f"{key}: must be text")
    if among and value not in among:
        raise HTTPException(400, f"{key}: must be one of {', '.join(among)}")
    return value


def refuse_others(body: dict[str, Any], known: str) -> None:
    """Raise HTTPException when something is left in the body: a typing mistake would else be obeyed by half."""
    from starlette.exceptions import HTTPException

    if body:
        raise HTTPException(400, f"unknown key {next(iter(body))!r}; there are: {known}")


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have (RFC 8259 6)."""
    raise ValueError(name)
