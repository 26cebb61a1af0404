"""The proxy part of the HTTP API, beside GET /v1/proxy (state_api): what guests are told.

    GET /v1/proxy/env?format=shell    {"format": ..., "text": ...}: shell, env, docker, docker-daemon, containerd,
                                      systemd, apt, cloud-init, json

Credentials are in none of it, whatever guests may be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from netstack.control.bodies import FRESH

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route


class ProxySource(Protocol):
    """The part of a network that knows about proxies."""

    def proxy_env(self, form: str) -> str: ...  # ValueError: there is no such format, and which there are


def proxy_routes(network: ProxySource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def env(request: Request) -> Response:
        form = request.query_params.get("format", "shell")
        try:
            return JSONResponse({"format": form, "text": network.proxy_env(form)}, headers=FRESH)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    return [Route("/v1/proxy/env", env)]
