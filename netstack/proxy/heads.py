"""The head of a guest's request: whether it means one thing only, where it wants to go, and what is passed on.

Theory of operation. What one program takes for the end of a request another takes for its middle: so requests are
smuggled past a proxy (RFC 9112 11.2). Therefore every head is looked at as bytes before h11 reads it, and what could
be read in two ways is refused: bare LF and CR, NUL, folded lines (RFC 9112 5.2), more than one Content-Length, a
Content-Length beside Transfer-Encoding, any coding but chunked, more than one Host, and Connection options that name
what frames or routes the message. h11 does the grammar. What leaves is written anew by h11, never copied.

    explicit      GET http://host[:port]/path HTTP/1.1, CONNECT host:port HTTP/1.1
    transparent   GET /path HTTP/1.1, Host: host[:port]; the guest knows of no proxy

The target's host wins over the Host field (RFC 9112 3.2.2), which is replaced. Fields that are for one hop only are not
passed on (RFC 9110 7.6.1).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

import h11

from netstack.proxy.settings import parse_address

if TYPE_CHECKING:
    from h11._headers import Headers

# Squid's default (request_header_max_size); browsers with many cookies stay below 16 KiB.
MAX_HEAD: Final = 64 * 1024
MAX_FIELDS: Final = 128
# RFC 9112 2.2: empty lines before a request are skipped, "at least one".
_MAX_EMPTY_LINES: Final = 4

# RFC 9110 5.6.2: what a method is made of. CR: an empty line, half of it still on its way.
_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\r")

Fields = list[tuple[bytes, bytes]]

# RFC 3986 3.2.2 without what no host's name has (percent-encoding, sub-delims); "_" is in names of services.
_NAME = rb"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?"
_PLACE = re.compile(rb"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>" + _NAME + rb"))(?::(?P<port>[0-9]{0,5}))?")
_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)$")
_ABSOLUTE = re.compile(rb"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^#]*)")

# RFC 9110 7.6.1, and what older programs and proxies use the same way.
_ONE_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
# What a Connection field may not have us drop: the message would mean something else without it.
_NOT_OPTIONS: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie"))


class HeadError(Exception):
    """A request that is refused: the status to say so with, a counter's word, and words for people."""

    def __init__(self, status: int, reason: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.reason = reason
        self.words = words


class Place(NamedTuple):
    """Where a request wants to go. `host` is in lower case, without brackets and without the root's dot."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """host:port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Target(NamedTuple):
    """What a request asks for."""

    place: Place
    path: bytes  # in origin form; empty for CONNECT
    absolute: bool  # whether the guest said so in the request line: it knows that it speaks to a proxy


def find_head(received: bytearray, limit: int = MAX_HEAD) -> int:
    """Where the head ends in what has been received, 0 when it is not all there. Untrusted. Raises HeadError.

    Empty lines before it are removed from `received`.
    """
    for _ in range(_MAX_EMPTY_LINES):
        if not received.startswith(b"\r\n"):
            break
        del received[:2]
    end = received.find(b"\r\n\r\n", 0, limit + 4)
    if end >= 0:
        return end + 4
    if len(received) > limit:
        raise HeadError(431, "proxy_head_too_large", f"the head is longer than {limit} bytes")
    if received and received[0] not in _TOKEN:
        raise HeadError(400, "proxy_bad_head", "this is no HTTP/1 request")
    if b"\n\n" in received or b"\n\r\n" in received:
        raise HeadError(400, "proxy_bare_lf", "a line ends in LF without CR")
    return 0


def check_head(head: bytes) -> None:
    """Refuse a head that two programs could read differently. Untrusted. Raises HeadError."""
    pairs = head.count(b"\r\n")
    if head.count(b"\n") != pairs or head.count(b"\r") != pairs:
        raise HeadError(400, "proxy_bare_lf", "a line ends in LF or CR alone")
    if b"\0" in head:
        raise HeadError(400, "proxy_bad_head", "there is a NUL in the head")
    lines = head[:-4].split(b"\r\n")
    version = lines[0].rpartition(b" ")[2]
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        status = 505 if version.startswith(b"HTTP/") else 400
        raise HeadError(status, "proxy_bad_head", "the request line does not end in HTTP/1.1")
    if len(lines) - 1 > MAX_FIELDS:
        raise HeadError(431, "proxy_head_too_large", f"there are more than {MAX_FIELDS} fields")
    lengths = codings = hosts = 0
    for line in lines[1:]:
        if line[:1] in (b" ", b"\t"):
            raise HeadError(400, "proxy_folded_line", "a field is folded over several lines")
        name, colon, value = line.partition(b":")
        lowered = name.lower()
        if not colon or name != name.strip():
            raise HeadError(400, "proxy_bad_head", "there is a line that is no field")
        if lowered == b"content-length":
            lengths += 1
            if not value.strip(b" \t").isdigit():
                raise HeadError(400, "proxy_bad_length", "Content-Length is no number")
        elif lowered == b"transfer-encoding":
            codings += 1
            if value.strip(b" \t").lower() != b"chunked":
                raise HeadError(501, "proxy_bad_length", "the only transfer coding that is understood is chunked")
        elif lowered == b"host":
            hosts += 1
        elif lowered == b"connection" and not _NOT_OPTIONS.isdisjoint(split_list(value)):
            raise HeadError(400, "proxy_bad_head", "Connection names a field that is not its to remove")
    if lengths + codings > 1:
        raise HeadError(400, "proxy_two_lengths", "the length of the body is said more than once")
    if hosts > 1:
        raise HeadError(400, "proxy_two_hosts", "Host is there more than once")
    if codings and lines[0].endswith(b"HTTP/1.0"):
        raise HeadError(400, "proxy_bad_length", "HTTP/1.0 has no transfer codings")


def parse_request(head: bytes) -> tuple[h11.Connection, h11.Request]:
    """Read a head that check_head() let through; the connection goes on with the body. Untrusted. Raises HeadError."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise HeadError(error.error_status_hint, "proxy_bad_head", "this is no HTTP/1 request") from None
    if not isinstance(event, h11.Request):
        raise HeadError(400, "proxy_bad_head", "this is no HTTP/1 request")
    return connection, event


def explicit_target(request: h11.Request) -> Target:
    """Where a request to a proxy wants to go. Untrusted. Raises HeadError."""
    target = bytes(request.target)
    if request.method == b"CONNECT":
        if any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in request.headers):
            # RFC 9110 9.3.6: it has no content; one reader would take it for the tunnel's first bytes.
            raise HeadError(400, "proxy_bad_length", "CONNECT has no body")
        return Target(parse_place(target), b"", absolute=True)
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        raise HeadError(
            400, "proxy_not_a_proxy_request", "this is a proxy: set http_proxy and https_proxy to it, do not open it"
        )
    if found["scheme"].lower() != b"http":
        words = "this proxy forwards http:// only; https:// takes CONNECT, as every program does by itself"
        raise HeadError(501, "proxy_scheme", words)
    if b"@" in found["authority"]:
        # RFC 9110 4.2.4: a reader would take what stands before it for the host.
        raise HeadError(400, "proxy_userinfo", "there is a user name in the URL")
    place = parse_place(found["authority"], 80)
    path = found["path"]
    if not path.startswith(b"/"):
        # RFC 9112 3.2.4: OPTIONS without a path means the server as a whole.
        path = b"*" if request.method == b"OPTIONS" and not path else b"/" + path
    return Target(place, path, absolute=True)


def transparent_target(request: h11.Request, default: Place) -> Target:
    """Where a request that knows of no proxy wants to go: `default`, but for its Host. Untrusted. Raises HeadError."""
    target = bytes(request.target)
    if request.method == b"CONNECT" or _ABSOLUTE.fullmatch(target) is not None:
        return Target(default, target, absolute=True)  # the guest has a proxy of its own there
    if not target.startswith(b"/") and target != b"*":
        # Put behind the host in a URL for a proxy it would make another host of it.
        raise HeadError(400, "proxy_bad_target", "the request names no path")
    host = next((value for name, value in request.headers if name == b"host"), b"")
    place = parse_place(host, default.port) if host else default
    return Target(place, target, absolute=False)


def parse_place(text: bytes, default_port: int = 0) -> Place:
    """host[:port]; without a default the port must be there. Untrusted. Raises HeadError."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise HeadError(400, "proxy_bad_target", "the target is not HOST:PORT")
    port = int(found["port"]) if found["port"] else default_port
    if not 1 <= port <= 65535:
        raise HeadError(400, "proxy_bad_target", "the target has no port from 1 to 65535")
    host = (found["six"] or found["name"]).decode("ascii").lower().rstrip(".")
    if (found["six"] is not None or _NUMBER.search(host)) and parse_address(host) is None:
        # As in the URL standard, a name does not end in a number: some resolver would take it for an address that
        # nobody here has seen.
        raise HeadError(400, "proxy_bad_target", "the target is neither a name nor an address")
    return Place(host, port)


def split_list(value: bytes) -> list[bytes]:
    """The members of a comma-separated field value, in lower case."""
    return [word for part in value.split(b",") if (word := part.strip(b" \t").lower())]


def upgrade_of(request: h11.Request) -> bytes | None:
    """The protocol that a request wants to change to, where that is passed on.

    Not HTTP/2: behind that upgrade nobody would see the requests any more (RFC 9113 3.1 has dropped it, too).
    """
    options = [word for name, value in request.headers if name == b"connection" for word in split_list(value)]
    if b"upgrade" not in options:
        return None
    wanted = [value for name, value in request.headers if name == b"upgrade"]
    if len(wanted) != 1 or b"h2c" in split_list(wanted[0]):
        return None
    return wanted[0]


def onward_fields(headers: Headers, drop: frozenset[bytes] = frozenset()) -> Fields:
    """The fields of a message that are for the next hop as well, spelt as they came; `drop`: these are not either."""
    options = {word for name, value in headers if name == b"connection" for word in split_list(value)}
    gone = _ONE_HOP | (options - _NOT_OPTIONS) | drop
    return [(raw, value) for raw, value in headers.raw_items() if raw.lower() not in gone]
