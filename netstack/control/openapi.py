"""OpenAPI 3.1 of the HTTP API: `GET /openapi.json`. What each part means: docs/api.md.

Written by hand rather than from types: the answers are plain data of many modules, and a test compares each of them
with the schema here (tests/control/test_openapi.py).
"""

from __future__ import annotations

from typing import Any, Final

from netstack.control.events import KINDS
from netstack.control.events_api import MAX_STATUS, MIN_STATUS
from netstack.control.forwards_api import MAX_DESCRIPTION, MAX_SPEC, ON_CONFLICT, SOURCES
from netstack.control.pcap_api import MAX_SIZE
from netstack.control.state_api import MAX_FLOWS, PROTOCOLS, SHOWN_FLOWS
from netstack.proxy.handout import FORMATS

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_SECONDS: Final[Schema] = {"type": "number"}
_YES_NO: Final[Schema] = {"type": "boolean"}
_MAYBE_TEXT: Final[Schema] = {"type": ["string", "null"]}
_MAYBE_SECONDS: Final[Schema] = {"type": ["number", "null"], "minimum": 0}
_COUNTS: Final[Schema] = {"type": "object", "additionalProperties": _COUNT}

_REASONS: Final = {
    "400": "What was sent cannot be; the reason is in `error`",
    "401": "The token is missing or wrong",
    "403": "The host does not allow it",
    "404": "There is none",
    "405": "The path has other methods",
    "409": "Something else has it already",
    "408": "The body did not come in time",
    "413": "The body is too long",
    "415": "The body is not JSON",
    "500": "It failed",
    "502": "The guest refused",
    "503": "Too much of it at once",
    "504": "Nobody answered in time",
}


def write_openapi(*, needs_token: bool) -> Schema:
    """The document."""
    from netstack.version import __version__

    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "netstack",
            "version": __version__,
            "description": "What a running netstack shows and does. On its unix socket for its owner, on TCP with a "
            "bearer token. Paths outside /v1 but /metrics are gvproxy's: their answers are of its form, not JSON's.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path, methods in document["paths"].items():
            for operation in methods.values():
                if path == "/":
                    operation["security"] = []
                else:
                    operation["responses"] |= _problems("401")
    return document


# ---- small parts -----------------------------------------------------------------------------------------------------


def _object(required: Schema, optional: Schema | None = None, *, more: bool = False) -> Schema:
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        **({} if more else {"additionalProperties": False}),
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema, words: str = "What was asked for") -> Schema:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _plain(words: str, kind: str = "text/plain") -> Schema:
    return {"description": words, "content": {kind: {"schema": _TEXT}}}


def _problems(codes: str, *, text: bool = False) -> Schema:
    return {code: _plain(_REASONS[code]) if text else _json(_ref("Error"), _REASONS[code]) for code in codes.split()}


def _operation(ident: str, summary: str, answer: Schema, problems: str = "", **more: Any) -> Schema:
    good = more.pop("status", "200")
    return {"operationId": ident, "summary": summary, "responses": {good: answer, **_problems(problems)}, **more}


def _query(name: str, schema: Schema, words: str, *, required: bool = False) -> Schema:
    return {"name": name, "in": "query", "required": required, "description": words, "schema": schema}


def _body(schema: Schema, *, required: bool = True) -> Schema:
    return {"required": required, "content": {"application/json": {"schema": schema}}}


# ---- paths -----------------------------------------------------------------------------------------------------------


def _paths() -> Schema:
    return {**_state_paths(), **_dns_paths(), **_forward_paths(), **_other_paths(), **_gvproxy_paths()}


def _state_paths() -> Schema:
    leases = _json(_object({"leases": _list(_ref("Lease"))}))
    flows = [
        _query("protocol", {"type": "string", "enum": list(PROTOCOLS)}, "Only of this protocol"),
        _query("guest", _TEXT, "Only of this guest: its name, or one address of it"),
        _query("limit", {"type": "integer", "minimum": 0, "maximum": MAX_FLOWS}, f"So many; without it {SHOWN_FLOWS}"),
    ]
    form = [_query("format", {"type": "string", "enum": list(FORMATS)}, "As which program's configuration")]
    env = _json(_object({"format": _TEXT, "text": _TEXT}))
    return {
        "/v1/status": {"get": _operation("getStatus", "What is running", _json(_ref("Status")))},
        "/v1/guests": {"get": _operation("getGuests", "Who is here", _json(_object({"guests": _list(_ref("Guest"))})))},
        "/v1/leases": {"get": _operation("getLeases", "Addresses that guests have", leases)},
        "/v1/flows": {"get": _operation("getFlows", "Open connections", _json(_ref("Flows")), "400", parameters=flows)},
        "/v1/proxy": {"get": _operation("getProxy", "What the host says of proxies", _json({"type": "object"}), "404")},
        "/v1/proxy/env": {"get": _operation("getProxyEnv", "What guests are told", env, "400", parameters=form)},
    }


def _dns_paths() -> Schema:
    asked = [
        _query("name", _TEXT, "The name to ask for", required=True),
        _query("type", _TEXT, "A, AAAA, MX, TYPE65280 and so on; without it A"),
    ]
    value = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 64}, {"type": "null"}]}
    which = {
        "oneOf": [
            _object({"scope": _TEXT}),
            _object({"name": _TEXT}),
            _object({}),
            _object({"scope": _TEXT, "name": _TEXT}),
        ]
    }
    hosts = _json(_object({"hosts": _list(_object({"name": _TEXT, "value": {}, "source": _TEXT}))}))
    writing = "400 408 413 415"
    anything = _json({"type": "object"})
    return {
        "/v1/dns": {"get": _operation("getDns", "Routing table, cache, counters, the last queries", anything)},
        "/v1/dns/query": {
            "get": _operation("queryDns", "Ask as a guest would", _json(_ref("DnsAnswer")), "400 504", parameters=asked)
        },
        "/v1/dns/flush": {
            "post": _operation(
                "flushDns",
                "Empty the cache",
                _json(_object({"flushed": _COUNT})),
                writing,
                requestBody=_body(which, required=False),
            )
        },
        "/v1/dns/hosts": {
            "get": _operation("getDnsHosts", "The names that were given", hosts),
            "post": _operation(
                "setDnsHosts",
                "Give names, or take them away with null",
                hosts,
                writing,
                requestBody=_body({"type": "object", "additionalProperties": value}),
            ),
        },
    }


def _forward_paths() -> Schema:
    wanted = _object(
        {
            "spec": {
                "type": "string",
                "maxLength": MAX_SPEC,
                "format": "forward-spec",
                "examples": ["127.0.0.1:8080:80"],
            }
        },
        {
            "on_conflict": {"type": "string", "enum": list(ON_CONFLICT), "default": "error"},
            "source": {"type": "string", "enum": list(SOURCES), "default": "caller"},
            "description": {"type": "string", "maxLength": MAX_DESCRIPTION},
        },
    )
    ident = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^f[0-9]+$"}}
    made = _json(_ref("Forward"), "It is open")
    made["headers"] = {"Location": {"schema": _TEXT}}
    made["links"] = {
        "one": {"operationId": "getForward", "parameters": {"id": "$response.body#/id"}},
        "end": {"operationId": "removeForward", "parameters": {"id": "$response.body#/id"}},
    }
    return {
        "/v1/forwards": {
            "get": _operation("getForwards", "All forwards", _json(_object({"forwards": _list(_ref("Forward"))}))),
            "post": _operation(
                "addForward",
                "Open a port of the host that leads to a guest",
                made,
                "400 403 409 408 413 415 500",
                status="201",
                requestBody=_body(wanted),
            ),
        },
        "/v1/forwards/{id}": {
            "get": _operation("getForward", "One forward", _json(_ref("Forward")), "404", parameters=[ident]),
            "delete": _operation(
                "removeForward", "Close it", {"description": "Closed"}, "404", status="204", parameters=[ident]
            ),
        },
    }


def _other_paths() -> Schema:
    one_of = "|".join(KINDS)
    kinds = {"type": "string", "pattern": f"^(?:{one_of})(?:,(?:{one_of}))*$"}
    every = {"type": "number", "minimum": MIN_STATUS, "maximum": MAX_STATUS}
    events = [
        _query("kinds", kinds, f"Only these, separated by commas: {', '.join(KINDS)}"),
        _query("status", every, "Each so many seconds also what is running, as an event of the kind `status`"),
    ]
    file = {"type": "string", "pattern": "^/[^\\u0000]+$"}
    size = {"type": "integer", "minimum": 0, "maximum": MAX_SIZE}
    action = {
        "oneOf": [
            _object({"action": {"const": "start"}, "file": file}, {"max_size": size}),
            _object({"action": {"const": "stop"}}),
        ]
    }
    where = [
        _query("guest", _TEXT, "Its name or address; without it the first guest"),
        _query("port", {"type": "integer", "minimum": 1, "maximum": 65535}, "The guest's port", required=True),
    ]
    upgraded = {"description": "The guest has accepted: what follows on the connection is its"}
    connect = _operation("connectGuest", "A TCP connection to a guest", upgraded, status="101", parameters=where)
    connect["responses"] |= _problems("400 404 405 502 503 504", text=True)
    return {
        "/v1/events": {
            "get": _operation(
                "getEvents",
                "What happens, while it happens: server-sent events",
                _plain("It ends when the network does", "text/event-stream"),
                "400 503",
                parameters=events,
            )
        },
        "/v1/pcap": {
            "get": _operation("getCapture", "Whether frames are written to a file", _json(_ref("Capture"))),
            "post": _operation(
                "setCapture",
                "Begin to write frames to a file, or end it",
                _json(_ref("Capture")),
                "400 409 408 413 415",
                requestBody=_body(action),
            ),
        },
        "/v1/connect": {"post": connect},
        "/metrics": {"get": _operation("getMetrics", "The same as numbers, for Prometheus", _plain("Its text format"))},
        "/openapi.json": {"get": _operation("getOpenapi", "This document", _json({"type": "object"}))},
        "/": {"get": _operation("getDashboard", "The dashboard", _plain("A page", "text/html"))},
    }


def _gvproxy_paths() -> Schema:
    exposed = {"local": _TEXT, "remote": _TEXT, "protocol": {"type": "string", "enum": ["tcp", "udp", "unix"]}}
    record = _object({"Name": _TEXT, "IP": _TEXT}, {"Regexp": _TEXT}, more=True)
    zone = _object({"Name": _TEXT}, {"Records": _list(record), "DefaultIP": _TEXT}, more=True)
    done = {"description": "Done"}
    words: Schema = _problems("400", text=True)
    broken: Schema = _problems("400 500", text=True)

    def show(ident: str, summary: str) -> Schema:
        return {"get": {"operationId": ident, "summary": summary, "responses": {"200": _plain("JSON, in fact")}}}

    def change(ident: str, summary: str, schema: Schema, problems: Schema) -> Schema:
        told = {"200": done, **problems}
        return {"post": {"operationId": ident, "summary": summary, "requestBody": _body(schema), "responses": told}}

    expose = _object({"local": _TEXT, "remote": _TEXT}, {"protocol": exposed["protocol"]}, more=True)
    unexpose = _object({"local": _TEXT}, {"protocol": exposed["protocol"]}, more=True)
    tunnel = [_query("ip", _TEXT, "The guest's address"), _query("port", _TEXT, "Its port")]
    return {
        "/services/forwarder/all": show("gvproxyForwards", "All forwards"),
        "/services/forwarder/expose": change("gvproxyExpose", "Add a forward", expose, broken),
        "/services/forwarder/unexpose": change("gvproxyUnexpose", "Remove a forward", unexpose, broken),
        "/services/dns/all": show("gvproxyZones", "The zones of names"),
        "/services/dns/add": change("gvproxyAddZone", "Add names", zone, words),
        "/services/dhcp/leases": show("gvproxyLeases", "Address to MAC"),
        "/leases": show("gvproxyAllLeases", "The same"),
        "/cam": show("gvproxyCam", "MAC to the number of its link"),
        "/stats": show("gvproxyStats", "Counters"),
        "/tunnel": {
            "post": {
                "operationId": "gvproxyTunnel",
                "summary": "A TCP connection to a guest: OK without a status line, then its bytes",
                "parameters": tunnel,
                "responses": {"200": _plain("Never in HTTP"), **broken},
            }
        },
    }


# ---- schemas ---------------------------------------------------------------------------------------------------------


def _schemas() -> Schema:
    flow = {
        "protocol": {"type": "string", "enum": list(PROTOCOLS)},
        "guest": _TEXT,
        "peer": _TEXT,
        "state": _TEXT,
        "age": _SECONDS,
        "bytes_from_guest": _COUNT,
        "bytes_to_guest": _COUNT,
    }
    totals = dict.fromkeys((*PROTOCOLS, "limit"), _COUNT)
    guest = {
        "name": _TEXT,
        "mac": _TEXT,
        "addresses": _list(_TEXT),
        "link": _TEXT,
        "mtu": _COUNT,
        "seen": {"type": "number", "description": "Seconds since it was heard of"},
    }
    agent = _object(
        {
            "agent": {"type": "string", "enum": ["alive", "silent"], "description": "Only where [auto_publish] is on"},
            "listening": _COUNT,
            "published": _list(_TEXT),
            "not_published": _list(_object({"socket": _TEXT, "why": _TEXT})),
        }
    )
    lease = {
        "name": _TEXT,
        "mac": _TEXT,
        "address": _TEXT,
        "address6": _MAYBE_TEXT,
        "link": _TEXT,
        "static": _YES_NO,
        "live": _YES_NO,
        "expires_in": _MAYBE_SECONDS,
        "expires6_in": _MAYBE_SECONDS,
    }
    numbers = "frames_from_guest bytes_from_guest frames_to_guest bytes_to_guest drops_to_guest backlog".split()
    link = _object(
        {"name": _TEXT, "uri": _TEXT, "guests": _COUNT, "connected": _YES_NO}, dict.fromkeys(numbers, _COUNT)
    )
    network = dict.fromkeys("subnet gateway dns subnet6 gateway6 dns6".split(), _TEXT)
    status = {
        "version": _TEXT,
        "pid": _COUNT,
        "started": {"type": "string", "format": "date-time"},
        "uptime": _SECONDS,
        "network": _object({**network, "mtu": _COUNT}),
        "links": _list(link),
        "guests": _list(_ref("Guest")),
        "flows": _ref("Flows"),
        "forwards": _list(_ref("Forward")),
        "counters": _COUNTS,
        "dns": _COUNTS,
        "drops": _COUNTS,
    }
    forward = {
        "id": _TEXT,
        "spec": {"type": "string", "description": "With the real port"},
        "protocol": {"type": "string", "enum": ["tcp", "udp", "unix"]},
        "host": {"type": "string", "description": "An address, or a path"},
        "host_port": _COUNT,
        "ports": _COUNT,
        "guest": {"type": "string", "description": "An address or a name; empty for the first guest"},
        "guest_port": _COUNT,
        "owner": {"type": "string", "description": "config, user, gvproxy or agent:GUEST"},
        "description": _TEXT,
        "source": _TEXT,
        "connections": _object(dict.fromkeys(("open", "total", "refused"), _COUNT)),
        "bytes_from_guest": _COUNT,
        "bytes_to_guest": _COUNT,
        "last_error": _TEXT,
    }
    answer = {"name": _TEXT, "type": _TEXT, "rcode": _TEXT, "ms": _SECONDS, "answer": _TEXT}
    capture = {"active": _YES_NO, "file": _MAYBE_TEXT, "frames": _COUNT, "bytes": _COUNT}
    return {
        "Error": _object({"error": _TEXT}),
        "Status": _object(status, more=True),
        "Guest": _object(guest, {"agent": agent}),
        "Lease": _object(lease),
        "Flow": _object(flow),
        "Flows": _object({**totals, "list": _list(_ref("Flow"))}),
        "Forward": _object(forward, more=True),
        "DnsAnswer": _object(answer),
        "Capture": _object(capture),
    }
