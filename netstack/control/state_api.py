"""What is running, in parts: what `GET /v1/status` shows all of at once, and what would make that too long.

    GET /v1/status    everything, of flows the first 1,000
    GET /v1/guests    one entry a MAC: who is here
    GET /v1/leases    addresses that were given out, those that have ended included
    GET /v1/flows?protocol=tcp&guest=debian&limit=50    open flows, and how many there are
    GET /v1/proxy     what the host's proxy settings say, and what came of it

All of it is as of the moment of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.bodies import FRESH

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

PROTOCOLS = ("tcp", "udp", "icmp")
MAX_FLOWS = 10_000  # 10,000 take 60 ms to write, in which no guest is served
SHOWN_FLOWS = 1_000


class StateSource(Protocol):
    """The part of a network that the API shows."""

    def statistics(self) -> Mapping[str, Any]: ...
    def guests(self) -> list[dict[str, Any]]: ...
    def lease_list(self) -> list[dict[str, Any]]: ...
    def flows(self, protocol: str | None, guest: str | None, limit: int) -> dict[str, Any]: ...
    def proxy(self) -> Mapping[str, Any] | None: ...  # None: this network has no such part


def state_routes(network: StateSource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def status(request: Request) -> Response:
        return JSONResponse(network.statistics(), headers=FRESH)

    async def guests(request: Request) -> Response:
        return JSONResponse({"guests": network.guests()}, headers=FRESH)

    async def leases(request: Request) -> Response:
        return JSONResponse({"leases": network.lease_list()}, headers=FRESH)

    async def flows(request: Request) -> Response:
        asked = request.query_params
        protocol, limit = asked.get("protocol"), asked.get("limit", str(SHOWN_FLOWS))
        if protocol is not None and protocol not in PROTOCOLS:
            raise HTTPException(400, f"protocol: must be one of {', '.join(PROTOCOLS)}")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and int(limit) <= MAX_FLOWS):
            raise HTTPException(400, f"limit: must be a number, {MAX_FLOWS} at most")
        return JSONResponse(network.flows(protocol, asked.get("guest"), int(limit)), headers=FRESH)

    async def proxy(request: Request) -> Response:
        found = network.proxy()
        if found is None:
            raise HTTPException(404, "this netstack knows nothing of proxies")
        return JSONResponse(found, headers=FRESH)

    return [
        Route("/v1/status", status),
        Route("/v1/guests", guests),
        Route("/v1/leases", leases),
        Route("/v1/flows", flows),
        Route("/v1/proxy", proxy),
    ]
