"""gvproxy's forwards and zones, as its HTTP API has them: its payloads, its status codes, its words.

Programs that drive gvproxy (podman, Lima, CRC) list, add and remove forwards by the *text* of their local address:
`127.0.0.1:2224` and `localhost:2224` are two keys, and what was added as `:8080` is listed and removed as `:8080`. Here
such a text is kept beside the forward of ours that it made. Forwards that others made (settings, `netstack publish`,
the agent) are listed too, under the text that they would have.

The words of errors are Go's where gvproxy passes them on (net.Listen, strconv, encoding/json). What it can do and we
cannot: `ssh-tunnel://` and named pipes, which are answered as a remote protocol that is not implemented.

Each method takes the bytes of a body and gives the status and text of an answer; HTTP is gvproxy_api's.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Any, Final, NamedTuple, Protocol

from netstack.control.go_json import GoJsonError, kind_of, loads, take_struct

OWNER: Final = "gvproxy"

_EXPOSE: Final = {"local": (str, "string"), "remote": (str, "string"), "protocol": (str, "types.TransportProtocol")}
_UNEXPOSE: Final = {"local": (str, "string"), "protocol": (str, "types.TransportProtocol")}
_ZONE: Final = {"Name": (str, "string"), "Records": (list, "[]types.Record"), "DefaultIP": (str, "net.IP")}
_RECORD: Final = {"Name": (str, "string"), "IP": (str, "net.IP"), "Regexp": (str, "regexp.Regexp")}

_NOT_FOUND: Final = "proxy not found"

# Names that every resolver knows without asking.
_LOOPBACK: Final = {"localhost": "127.0.0.1"}

# Names are bounded where they are kept; zones without one are not.
MAX_ZONES: Final = 1000

# The zones that gvproxy has from the start.
ZONES: Final = ("containers.internal.", "docker.internal.")


class Answer(NamedTuple):
    """A status, and an error's text; "" where it is none."""

    status: int
    words: str = ""


OK: Final = Answer(200)


class ForwardEntry(Protocol):
    """A forward that is there."""

    @property
    def id(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...


class ForwardTable(Protocol):
    """The forwards of a network. `add` raises an error with `kind` ("conflict", "denied", ...) and words."""

    def __iter__(self) -> Iterator[ForwardEntry]: ...
    def add(self, spec: str, *, owner: str = ..., description: str = ...) -> ForwardEntry: ...
    def remove(self, ident: str) -> object: ...


class HostNames(Protocol):
    """Where names for guests are added. ValueError: it cannot be done, and why."""

    def add_hosts(self, entries: Mapping[str, str | Sequence[str] | None]) -> None: ...


class GoError(Exception):
    """What Go, or gvproxy, says."""

    def __init__(self, words: str, status: int = 500) -> None:
        super().__init__(words)
        self.status = status


class GvproxyForwards:
    """/services/forwarder."""

    def __init__(self, forwards: ForwardTable) -> None:
        self._forwards = forwards
        # (protocol, local) as they were given -> the forward's id and the remote text
        self._exposed: dict[tuple[str, str], tuple[str, str]] = {}

    def all(self) -> list[dict[str, str]]:
        """What is exposed, sorted as gvproxy does."""
        present = {forward.id: forward for forward in self._forwards}
        self._forget_others(present)
        ours = {ident: (local, remote, protocol) for (protocol, local), (ident, remote) in self._exposed.items()}
        found = [ours.get(ident) or _texts_of(forward.describe()) for ident, forward in present.items()]
        found.sort(key=lambda texts: (texts[0], texts[2]))
        return [{"local": local, "remote": remote, "protocol": protocol} for local, remote, protocol in found]

    def expose(self, body: bytes, peer: str) -> Answer:
        """POST expose. `peer` is the HTTP client's address as Go shows it, whose part a remote of ":8080" takes."""
        try:
            fields = _read(body, "types.ExposeRequest", _EXPOSE)
            protocol = fields.get("protocol") or "tcp"
            local, remote = fields.get("local", ""), fields.get("remote", "")
            if protocol not in ("unix", "npipe"):
                host, _ = split_host_port(remote, status=400)
                remote = remote if host else split_host_port(peer, status=400)[0] + remote
            if self._find(protocol, local) is not None:
                raise GoError(f"proxy already running for {protocol} on {local}")
            spec, where = _spec_of(protocol, local, remote)
            try:
                forward = self._forwards.add(spec, owner=OWNER)
            except Exception as error:
                if getattr(error, "kind", None) is None:
                    raise
                raise GoError(_listen_words(where, error)) from None
        except GoError as error:
            return Answer(error.status, str(error))
        self._forget_others({forward.id for forward in self._forwards})
        self._exposed[protocol, local] = forward.id, remote
        return OK

    def unexpose(self, body: bytes) -> Answer:
        """POST unexpose."""
        try:
            fields = _read(body, "types.UnexposeRequest", _UNEXPOSE)
        except GoError as error:
            return Answer(error.status, str(error))
        protocol, local = fields.get("protocol") or "tcp", fields.get("local", "")
        ident = self._find(protocol, local)
        self._exposed.pop((protocol, local), None)
        if ident is None:
            return Answer(500, _NOT_FOUND)
        self._forwards.remove(ident)
        return OK

    def _forget_others(self, present: Container[str]) -> None:
        """Forwards may be removed by other ways than ours."""
        self._exposed = {key: value for key, value in self._exposed.items() if value[0] in present}

    def _find(self, protocol: str, local: str) -> str | None:
        """The id of the forward with this key."""
        known = self._exposed.get((protocol, local))
        if known is not None:
            return next((forward.id for forward in self._forwards if forward.id == known[0]), None)
        ours = {ident for ident, _ in self._exposed.values()}
        for forward in self._forwards:
            if forward.id not in ours:
                texts = _texts_of(forward.describe())
                if (texts[2], texts[0]) == (protocol, local):
                    return forward.id
        return None


class GvproxyZones:
    """/services/dns: zones of names, of which each name becomes one of ours."""

    def __init__(self, names: HostNames, gateway: str) -> None:
        records = ({"Name": "gateway", "IP": gateway}, {"Name": "host", "IP": gateway})
        self._names = names
        self._zones: list[dict[str, Any]] = [
            {"Name": zone, "Records": [dict(record) for record in records], "DefaultIP": ""} for zone in ZONES
        ]

    def all(self) -> list[dict[str, Any]]:
        """The zones in the order in which they came, of each the newest record first."""
        return self._zones

    def add(self, body: bytes) -> Answer:
        """POST add: a zone, or more records of one that is there."""
        try:
            fields = _read(body, "types.Zone", _ZONE)
            name = fields.get("Name", "")
            records = [_read_record(record) for record in fields.get("Records", ()) if record is not None]
            default = _check_ip(fields.get("DefaultIP", ""))
            zone = name.strip(".")
            entries: dict[str, str | Sequence[str] | None] = {
                ".".join(part for part in (record["Name"].rstrip("."), zone) if part): record["IP"]
                for record in reversed(records)  # of two for one name, the first one counts
            }
            known = next((one for one in self._zones if one["Name"] == name), None)
            if known is None and len(self._zones) >= MAX_ZONES:
                raise GoError(f"there are {MAX_ZONES} zones already, and no more can be", 400)
            if zone and (default or (known is not None and known["DefaultIP"])):
                entries[f"*.{zone}"] = default or None
            self._names.add_hosts(entries)
        except GoError as error:
            return Answer(error.status, str(error))
        except ValueError as error:
            return Answer(400, str(error))
        if known is None:
            self._zones.append({"Name": name, "Records": records, "DefaultIP": default})
        else:
            # A new record hides the older ones of its name, so that the list stays as long as there are names.
            fresh = {record["Name"] for record in records}
            known["Records"] = records + [old for old in known["Records"] if old["Name"] not in fresh]
            known["DefaultIP"] = default
        return OK


def _read(body: bytes, struct: str, fields: Mapping[str, tuple[type, str]]) -> dict[str, Any]:
    try:
        return take_struct(loads(body), struct, fields)
    except GoJsonError as error:
        raise GoError(str(error), 400) from None


def _read_record(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        kind = kind_of(value)
        raise GoError(f"json: cannot unmarshal {kind} into Go struct field Zone.Records of type types.Record", 400)
    try:
        record = take_struct(value, "types.Record", _RECORD, "Records.")
    except GoJsonError as error:
        raise GoError(str(error), 400) from None
    if "Regexp" in record:
        raise GoError("records with a Regexp are not supported; give a name, or the zone a DefaultIP", 400)
    if not record.get("Name") or not record.get("IP"):
        raise GoError("a record needs a Name and an IP", 400)
    return {"Name": record["Name"], "IP": _check_ip(record["IP"])}


def _check_ip(text: str) -> str:
    """net.IP.UnmarshalText."""
    if text:
        try:
            return str(ip_address(text))
        except ValueError:
            raise GoError(f"invalid IP address: {text}", 400) from None
    return ""


def split_host_port(text: str, *, status: int = 500) -> tuple[str, str]:
    """net.SplitHostPort, with its errors."""

    def fail(why: str) -> GoError:
        return GoError(f"address {text}: {why}" if text else why, status)  # net.AddrError

    colon = text.rfind(":")
    if colon < 0:
        raise fail("missing port in address")
    head = text[:colon]
    begin = 0
    if text.startswith("["):
        end = text.find("]")
        if end < 0:
            raise fail("missing ']' in address")
        if end + 1 == len(text):
            raise fail("missing port in address")
        if end + 1 != colon:
            raise fail("too many colons in address" if text[end + 1] == ":" else "missing port in address")
        head = text[1:end]
        begin = end + 1
        rest = text[1:]
    else:
        if ":" in head:
            raise fail("too many colons in address")
        rest = text
    if "[" in rest:
        raise fail("unexpected '[' in address")
    if "]" in text[begin + 1 if begin else 0 :]:
        raise fail("unexpected ']' in address")
    return head, text[colon + 1 :]


def _parse_uint16(text: str) -> int:
    """strconv.ParseUint(text, 10, 16)."""
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if not re.fullmatch("[0-9]+", text):
        raise GoError(f"strconv.ParseUint: parsing {quoted}: invalid syntax")
    digits = text.lstrip("0") or "0"  # int() refuses thousands of digits
    if len(digits) > 5 or int(digits) > 0xFFFF:
        raise GoError(f"strconv.ParseUint: parsing {quoted}: value out of range")
    return int(digits)


def _spec_of(protocol: str, local: str, remote: str) -> tuple[str, str]:
    """Our SPEC, and how Go names what is listened at: "listen tcp 127.0.0.1:80"."""
    if protocol in ("unix", "npipe"):
        scheme = remote.partition("://")[0].lower() if "://" in remote else ""
        if scheme != "tcp" or protocol == "npipe":
            raise GoError(f"remote protocol for {protocol} forwarder is not implemented: {scheme}")
        if not local.startswith("/"):
            raise GoError(f"listen unix {local}: bind: no such file or directory")
        return f"unix:{local}:{_guest_of(remote[len('tcp://') :].partition('/')[0])}", f"listen unix {local}"
    if protocol not in ("tcp", "udp"):
        raise GoError(f"unknown protocol {protocol}")
    guest = _guest_of(remote)
    # net.Listen says what it tried, net.ResolveUDPAddr does not.
    what = "listen tcp: " if protocol == "tcp" else ""
    try:
        host, text = split_host_port(local)
    except GoError as error:
        raise GoError(f"{what}{error}") from None
    if not re.fullmatch("[+-]?[0-9]*", text):
        raise GoError(f"{what}lookup {protocol}/{text}: unknown port")
    digits = text.lstrip("0") or "0"
    if text[:1] in ("+", "-") or len(digits) > 5 or int(digits) > 0xFFFF:
        raise GoError(f"{what}address {text}: invalid port")
    port = int(digits)
    host = _LOOPBACK.get(host, host)
    try:
        address = ip_address(host or "::")
    except ValueError:
        raise GoError(f"{what}lookup {host}: no such host") from None
    shown = f"[{address}]" if address.version == 6 else str(address)
    where = f"listen {protocol} {shown if host else ''}:{port}"
    return f"{shown}:{port}:{guest}/{protocol}", where


def _guest_of(remote: str) -> str:
    """GUEST:PORT of a SPEC."""
    parts = remote.split(":")
    if len(parts) == 2:
        host, port = parts
    elif remote.startswith("["):  # IPv6, which gvproxy does not have
        host, port = split_host_port(remote)
        host = f"[{host}]"
    else:
        raise GoError("invalid remote addr")
    number = _parse_uint16(port)
    if not host or not number:
        raise GoError("invalid remote addr")
    return f"{host}:{number}"


def _texts_of(described: Mapping[str, Any]) -> tuple[str, str, str]:
    """How gvproxy would list a forward of ours: local, remote, protocol."""
    protocol, host, guest = (str(described[key]) for key in ("protocol", "host", "guest"))
    remote = f"[{guest}]:{described['guest_port']}" if ":" in guest else f"{guest}:{described['guest_port']}"
    if protocol == "unix":
        return host, f"tcp://{remote}", protocol
    return f"[{host}]:{described['host_port']}" if ":" in host else f"{host}:{described['host_port']}", remote, protocol


def _listen_words(where: str, error: Exception) -> str:
    """Go's words for a listener that could not be made."""
    cause = error.__cause__ or error.__context__
    code = cause.errno if isinstance(cause, OSError) else None
    code = code or {"conflict": errno.EADDRINUSE, "denied": errno.EACCES}.get(getattr(error, "kind", ""))
    if code is None:
        return str(error)
    return f"{where}: bind: {os.strerror(code).lower()}"
