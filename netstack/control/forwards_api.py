"""The forwards of a network over HTTP: ports and unix sockets of the host that lead to guests.

    GET    /v1/forwards          all of them
    POST   /v1/forwards          {"spec": "127.0.0.1:8080:80", "on_conflict": "error", "description": "the web site"}
    GET    /v1/forwards/{id}     one
    DELETE /v1/forwards/{id}     end it: the port is closed; connections that are open go on

201 with the forward, whose spec has the real port where 0 was asked for. 400: the SPEC cannot be; 409: the port is
taken, and by whom where that can be read; 403: the host does not allow it; 404: there is none with this id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.bodies import FRESH, read_object, refuse_others, take_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

ON_CONFLICT = ("error", "next", "loopback")
SOURCES = ("caller", "gateway")  # as whom the guest sees a caller
MAX_SPEC = 512  # a path of a unix socket has 108 bytes at most
MAX_DESCRIPTION = 256

_STATUS = {"invalid": 400, "denied": 403, "conflict": 409, "failed": 500}


class ForwardEntry(Protocol):
    """A forward that is there."""

    @property
    def id(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...


class ForwardSource(Protocol):
    """The forwards of a network. What `add` raises has a `kind` (see _STATUS) and says in one line what is wrong."""

    def __iter__(self) -> Iterator[ForwardEntry]: ...
    def add(self, spec: str, *, on_conflict: str = ..., source: str = ..., description: str = ...) -> ForwardEntry: ...
    def remove(self, ident: str) -> object: ...


def forward_routes(forwards: ForwardSource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.responses import Response as Empty
    from starlette.routing import Route

    def find(request: Request) -> ForwardEntry:
        ident = request.path_params["ident"]
        for forward in forwards:
            if forward.id == ident:
                return forward
        raise HTTPException(404, f"there is no forward {ident!r}")

    async def table(request: Request) -> Response:
        if request.method != "POST":
            return JSONResponse({"forwards": [forward.describe() for forward in forwards]}, headers=FRESH)
        body = await read_object(request)
        spec = take_text(body, "spec")
        on_conflict = take_text(body, "on_conflict", "error", among=ON_CONFLICT)
        source = take_text(body, "source", "caller", among=SOURCES)
        description = take_text(body, "description", "")
        refuse_others(body, "spec, on_conflict, source, description")
        for key, text, limit in (("spec", spec, MAX_SPEC), ("description", description, MAX_DESCRIPTION)):
            if len(text) > limit:
                raise HTTPException(400, f"{key}: at most {limit} characters")
        try:
            made = forwards.add(spec, on_conflict=on_conflict, source=source, description=description)
        except Exception as error:
            kind = getattr(error, "kind", None)
            if kind is None:
                raise
            raise HTTPException(_STATUS.get(kind, 500), " ".join(str(error).split())) from None
        place = {"location": f"/v1/forwards/{made.id}"}
        return JSONResponse(made.describe(), 201, headers={**FRESH, **place})

    async def one(request: Request) -> Response:
        forward = find(request)
        if request.method == "DELETE":
            forwards.remove(forward.id)
            return Empty(status_code=204)
        return JSONResponse(forward.describe(), headers=FRESH)

    return [
        Route("/v1/forwards", table, methods=["GET", "POST"]),
        Route("/v1/forwards/{ident}", one, methods=["GET", "DELETE"]),
    ]
