"""gvproxy's /services/forwarder for guests, at the gateway's port 80: only their own ports, and only as the rules say.

Programs in guests of gvproxy (podman's and Lima's among them) ask for ports there, in its words:

    POST expose     {"local": ":8080", "remote": ":8080" or "GUEST:8080", "protocol": "tcp" or "udp"}
    POST unexpose   {"local": ":8080", "protocol": "tcp"}
    GET  all        what this guest has of the host's ports

At gvproxy that is the whole API: any guest can take any port, make or remove unix sockets of the host, and see and end
the forwards of others. Here a guest's wish is treated like a socket that its agent reports: `remote` must be the guest
itself, a rule of `[auto_publish]` must give that port just the `local` port that is asked for, and the rule says at
which address of the host. What is not allowed is 403, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING

from netstack.control.auto_publish import Listener, Publication, write_host
from netstack.control.go_json import GoJsonError, dumps, loads, take_struct
from netstack.control.guest_http import GuestRequest, GuestResponse
from netstack.control.gvproxy import GoError, split_host_port

if TYPE_CHECKING:
    from netstack.control.guest_http import Handler
    from netstack.gateway.guest_agents import GuestAgents
    from netstack.gateway.guest_record import Guest

_EXPOSE = {"local": (str, "string"), "remote": (str, "string"), "protocol": (str, "types.TransportProtocol")}
_UNEXPOSE = {"local": (str, "string"), "protocol": (str, "types.TransportProtocol")}
# The scanner of control.go_json looks at each byte: this is half a millisecond.
_MAX_BODY = 4096
_MAX_TEXT = 128


class GuestForwarder:
    """The three paths."""

    def __init__(self, agents: GuestAgents) -> None:
        self._agents = agents
        self.paths: dict[str, Handler] = {
            "/services/forwarder/all": self._all,
            "/services/forwarder/expose": self._expose,
            "/services/forwarder/unexpose": self._unexpose,
        }

    async def _all(self, request: GuestRequest) -> GuestResponse:
        """What this guest has. Untrusted."""
        guest = self._agents.find_guest(request)
        if guest is None:
            return _error(GoError("this guest is not known", 503))
        named = {publication.place: key.partition("/")[2] for key, publication in guest.exposed.items()}
        found = []
        for place, (publication, _) in guest.forwards.items():
            local = named.get(place, f"{write_host(publication.host)}:{publication.host_port}")
            remote = f"{write_host(ip_address(guest.address))}:{publication.guest_port}"
            found.append({"local": local, "remote": remote, "protocol": publication.protocol})
        found.sort(key=lambda one: (one["local"], one["protocol"]))
        return GuestResponse(body=dumps(found))

    async def _expose(self, request: GuestRequest) -> GuestResponse:
        """POST expose. Untrusted."""
        try:
            fields = _read(request, "types.ExposeRequest", _EXPOSE)
            guest = self._guest(request)
            protocol, local = fields.get("protocol") or "tcp", fields.get("local", "")
            key = f"{protocol}/{local}"
            if key in guest.exposed:
                raise GoError(f"proxy already running for {protocol} on {local}")
            publication = self._allow(guest, protocol, local, fields.get("remote", ""))
            if any(one.place == publication.place for one in guest.exposed.values()):
                # What stands before the colon of `local` means nothing here: spellings of one place have no end.
                raise GoError(_in_use(publication))
            if publication.place not in guest.forwards and self._agents.is_full(guest):
                raise GoError("this guest has as many ports as auto_publish.max_ports allows", 403)
            guest.exposed[key] = publication
            self._agents.settle(guest)
            failure = guest.failed.get(publication.place)
            if failure is not None:
                del guest.exposed[key]
                # Which process of the host has the port, or which other guest, is not for guests to know.
                if "is in use" in failure.why:
                    raise GoError(_in_use(publication))
                raise GoError("the host cannot open this port now; its log says why")
        except GoError as error:
            return _error(error)
        return GuestResponse()

    async def _unexpose(self, request: GuestRequest) -> GuestResponse:
        """POST unexpose. Untrusted."""
        try:
            fields = _read(request, "types.UnexposeRequest", _UNEXPOSE)
            guest = self._guest(request)
            key = f"{fields.get('protocol') or 'tcp'}/{fields.get('local', '')}"
            if guest.exposed.pop(key, None) is None:
                raise GoError("proxy not found")
            self._agents.settle(guest)
        except GoError as error:
            return _error(error)
        return GuestResponse()

    def _guest(self, request: GuestRequest) -> Guest:
        guest = self._agents.find_guest(request)
        if guest is None:
            raise GoError("this guest is not known", 503)
        return guest

    def _allow(self, guest: Guest, protocol: str, local: str, remote: str) -> Publication:
        """What the rules give for this wish. Raises GoError."""
        if protocol not in ("tcp", "udp"):
            raise GoError(f"a guest may only expose tcp and udp ports, not {protocol}", 403)
        host, port = split_host_port(remote, status=400)
        own = ip_address(guest.address)
        try:
            address = ip_address(host) if host else own
        except ValueError:
            raise GoError(f"address {remote}: not an IP address", 400) from None
        if address != own:
            raise GoError(f"{address} is not this guest; a guest may only expose its own ports", 403)
        # Whichever address it named: it is a port of this guest's, reached where the guest is.
        listener = Listener("tcp" if protocol == "tcp" else "udp", IPv4Address(0), _port(port))
        if own.version == 6:
            listener = listener._replace(address=own)
        wanted = _port(split_host_port(local)[1])
        found = self._agents.decide(guest, listener)
        if isinstance(found, str):
            raise GoError(f"not allowed: {found}", 403)
        if found.host_port != wanted:
            raise GoError(
                f"not allowed: auto_publish gives port {found.guest_port} of a guest port {found.host_port}", 403
            )
        return found


def _read(request: GuestRequest, struct: str, fields: Mapping[str, tuple[type, str]]) -> dict[str, str]:
    """The body of a POST. Raises GoError. Untrusted."""
    if request.method != "POST":
        raise GoError("post only", 400)
    if len(request.body) > _MAX_BODY:
        raise GoError("http: request body too large", 400)
    try:
        found = take_struct(loads(request.body), struct, fields)
    except GoJsonError as error:
        raise GoError(str(error), 400) from None
    for name, text in found.items():
        if len(text) > _MAX_TEXT or not text.isprintable():
            raise GoError(f"{name} is not an address", 400)
    return found


def _in_use(publication: Publication) -> str:
    """Go's words for it."""
    where = f"{write_host(publication.host)}:{publication.host_port}"
    return f"listen {publication.protocol} {where}: bind: address already in use"


def _port(text: str) -> int:
    if not (text.isdigit() and text.isascii() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise GoError(f"{text[:20]!r} is not a port", 400)
    return int(text)


def _error(error: GoError) -> GuestResponse:
    """As Go's http.Error writes it."""
    return GuestResponse(error.status, body=f"{error}\n".encode(), headers=(("X-Content-Type-Options", "nosniff"),))
