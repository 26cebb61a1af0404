"""Bodies of requests: bounded, JSON, and nothing a page in somebody's browser could have sent.

A body must say that it is JSON: a page in a browser cannot send that to us without asking first (CORS), which is never
granted. It must be here within BODY_SECONDS, since whoever sends one holds a place of the front (control.front). What
cannot be read is a 400, 408, 413 or 415 with words.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request

# A list of 10,000 names is 500 KB.
MAX_BODY = 1 << 20
BODY_SECONDS = 10.0  # as for the head of a request

# \ud800 to \udfff. Two of them are one character; one alone is none (RFC 8259 8.2), and could not be shown again.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")

# Answers are as of now.
FRESH = {"cache-control": "no-store"}


async def read_bytes(request: Request, limit: int = MAX_BODY) -> bytes:
    """The body as it came. Raises HTTPException when it is too long, or too slow."""
    import trio
    from starlette.exceptions import HTTPException

    data = bytearray()
    with trio.move_on_after(BODY_SECONDS) as scope:
        async with contextlib.aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise HTTPException(413, f"at most {limit} bytes")
    if scope.cancelled_caught:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS:.0f} seconds")
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
        body = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if _HALF.search(data):
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "the body has half of a surrogate pair, which is no character") from None
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
