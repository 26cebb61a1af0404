"""gvproxy's endpoints over HTTP (control.gvproxy; what is where: docs/api.md).

    /services/forwarder/all  expose  unexpose      /services/dns/all  add      /services/dhcp/leases, /leases
    /cam    MAC -> number of its link              /stats    counters in gVisor's names
    /tunnel?ip=&port=                              see control.tunnels: it ends the HTTP on its connection

Answers are as Go's net/http sends them: JSON as text/plain, because nobody says what it is; errors as text with a line
end. A missing body or header is no reason to refuse: whoever can speak to this socket is its owner, or has the token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.bodies import read_bytes
from netstack.control.go_json import dumps

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from netstack.control.gvproxy import Answer, GvproxyForwards, GvproxyZones

# The scanner of control.go_json looks at each byte: 64 KiB are 10 ms in which no guest is served.
MAX_BODY = 1 << 16

# gvproxy's handlers ask for POST themselves, where they do.
_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]


class GvproxySource(Protocol):
    """The parts of a network that gvproxy's API shows and changes."""

    @property
    def forwards(self) -> GvproxyForwards: ...
    @property
    def zones(self) -> GvproxyZones: ...

    def leases(self) -> dict[str, str]: ...  # IPv4 address -> MAC, the gateway's own included
    def cam(self) -> dict[str, int]: ...
    def stats(self) -> dict[str, Any]: ...


def gvproxy_routes(source: GvproxySource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.responses import Response
    from starlette.routing import Route

    text = {"content-type": "text/plain; charset=utf-8"}

    def show(value: Any) -> Response:
        return Response(dumps(value), headers=text)

    def tell(answer: Answer) -> Response:
        if answer.status == 200:
            return Response(b"")
        return Response(f"{answer.words}\n", answer.status, headers={**text, "x-content-type-options": "nosniff"})

    async def read_post(request: Request) -> bytes | Response:
        from netstack.control.gvproxy import Answer

        if request.method != "POST":
            return tell(Answer(400, "post only"))
        try:
            return await read_bytes(request, MAX_BODY)
        except HTTPException as error:
            # Go's http.MaxBytesError, and what its ReadTimeout comes to
            return tell(Answer(400, "http: request body too large" if error.status_code == 413 else "i/o timeout"))

    async def forwards(request: Request) -> Response:
        return show(source.forwards.all())

    async def expose(request: Request) -> Response:
        body = await read_post(request)
        return body if isinstance(body, Response) else tell(source.forwards.expose(body, _peer_of(request)))

    async def unexpose(request: Request) -> Response:
        body = await read_post(request)
        return body if isinstance(body, Response) else tell(source.forwards.unexpose(body))

    async def zones(request: Request) -> Response:
        return show(source.zones.all())

    async def add_zone(request: Request) -> Response:
        body = await read_post(request)
        return body if isinstance(body, Response) else tell(source.zones.add(body))

    async def leases(request: Request) -> Response:
        return show(dict(sorted(source.leases().items())))

    async def cam(request: Request) -> Response:
        return show(dict(sorted(source.cam().items())))

    async def stats(request: Request) -> Response:
        return show(source.stats())

    async def tunnel(request: Request) -> Response:
        from netstack.control.gvproxy import Answer

        return tell(Answer(400, "a tunnel must be the first request of a connection, over HTTP/1.1"))

    async def nowhere(request: Request) -> Response:
        from netstack.control.gvproxy import Answer

        return tell(Answer(404, "404 page not found"))

    pages = {
        "/services/forwarder/all": forwards,
        "/services/forwarder/expose": expose,
        "/services/forwarder/unexpose": unexpose,
        "/services/dns/all": zones,
        "/services/dns/add": add_zone,
        "/services/dhcp/leases": leases,
        "/leases": leases,
        "/cam": cam,
        "/stats": stats,
        "/tunnel": tunnel,
        "/services/{rest:path}": nowhere,
    }
    return [Route(path, page, methods=_METHODS) for path, page in pages.items()]


def _peer_of(request: Request) -> str:
    """http.Request.RemoteAddr: "@" for a client of a unix socket, which has no name."""
    if request.client is None or not request.client.port:
        return "@"
    host, port = request.client.host, request.client.port
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
