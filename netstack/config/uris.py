"""The addresses of links and of the API, from text to fields."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Literal, NamedTuple
from urllib.parse import unquote

from netstack.config.problems import ConfigError

LinkScheme = Literal["unix", "connect+unix", "tcp", "connect+tcp", "fd", "vde", "tap", "vhost-user"]

# sun_path is 108 bytes with its NUL on Linux, 104 on macOS (unix(7)): the shorter one keeps a file usable on both.
MAX_SOCKET_PATH = 103
# A VDE switch makes DIR/ctl and DIR/NNN.NNNNN for every port.
VDE_SUFFIX = 16

_PATH_SCHEMES = ("unix", "connect+unix", "vde", "vhost-user")
_HOST_SCHEMES = ("tcp", "connect+tcp")
_LATER_SCHEMES = ("dgram", "seqpacket", "vde-plug", "hyperkit", "stdio")
# IFNAMSIZ of Linux is 16, with the NUL.
_DEVICE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_TAP_EXAMPLE = "tap://tap0?netns=/run/netns/guest"
_HOST_PORT = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]*)")


class LinkSpec(NamedTuple):
    """One link's URI.

    `path` for unix, connect+unix, vde and vhost-user, `host` and `port` for tcp and connect+tcp, `fd` for fd.

    Of a tap `device` is the name, and one of these says where: `path` of a network namespace, `pid` of a process in it,
    `fd` of a tap that is open already.
    """

    scheme: LinkScheme
    uri: str
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1
    device: str = ""
    pid: int = 0


class ApiSpec(NamedTuple):
    """Where the API is served: on a unix socket (`path`), or on loopback TCP (`host`, `port`)."""

    uri: str
    path: str = ""
    host: str = ""
    port: int = 0


def parse_link_uri(uri: str) -> LinkSpec:
    """Take a link's URI apart. Raises ConfigError, of one line."""
    scheme, colon, rest = uri.partition(":")
    if not colon:
        if rest == "" and "/" in uri:
            raise ConfigError(f"{uri!r} has no scheme; write unix://{uri if uri.startswith('/') else '/PATH/' + uri}")
        raise ConfigError(f"{uri!r} is not the address of a link; write for example unix:///run/netstack.sock")
    if scheme in _LATER_SCHEMES:
        raise ConfigError(
            f"{uri}: links of the kind {scheme}: are not supported yet; use unix, tcp, fd, vde, tap or vhost-user"
        )
    if scheme == "tap":
        return _parse_tap(uri, rest)
    if "?" in rest or "#" in rest:
        raise ConfigError(f"{uri}: {scheme} links take no options; write %3F or %23 for a ? or # in a path")
    if scheme in _PATH_SCHEMES:
        path = _absolute_path(uri, rest, MAX_SOCKET_PATH - (VDE_SUFFIX if scheme == "vde" else 0))
        return LinkSpec(scheme, uri, path=path)  # type: ignore[arg-type] # narrowed by the line above
    if scheme in _HOST_SCHEMES:
        host, port = _host_and_port(uri, rest)
        if scheme == "connect+tcp" and port == 0:
            raise ConfigError(f"{uri}: port 0 is no port to connect to")
        return LinkSpec(scheme, uri, host=host, port=port)  # type: ignore[arg-type]
    if scheme == "fd":
        return LinkSpec("fd", uri, fd=_descriptor(uri, rest.removeprefix("//"), "fd://3"))
    raise ConfigError(
        f"{uri}: unknown kind of link {scheme!r}; use unix, connect+unix, tcp, connect+tcp, fd, vde, tap or vhost-user"
    )


def _parse_tap(uri: str, rest: str) -> LinkSpec:
    device, _, query = rest.removeprefix("//").partition("?")
    key, _, value = query.partition("=")
    value = unquote(value)
    if not rest.startswith("//") or not _DEVICE.fullmatch(device) or device in (".", ".."):
        raise ConfigError(f"{uri}: write a device's name of at most 15 letters and digits, as in {_TAP_EXAMPLE}")
    if key == "fd":
        return LinkSpec("tap", uri, device=device, fd=_descriptor(uri, value, "tap://tap0?fd=3"))
    if key != "netns" or not value:
        raise ConfigError(f"{uri}: say in which network namespace the tap is to be, as in {_TAP_EXAMPLE} or ?netns=PID")
    if value.isascii() and value.isdigit() and len(value) <= 9 and int(value):
        return LinkSpec("tap", uri, device=device, pid=int(value))
    if not value.startswith("/") or "\0" in value:
        raise ConfigError(f"{uri}: netns is the number of a process or an absolute path, as in {_TAP_EXAMPLE}")
    return LinkSpec("tap", uri, device=device, path=value)


def _descriptor(uri: str, number: str, example: str) -> int:
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise ConfigError(f"{uri}: write the number of an open file descriptor, as in {example}")
    return int(number)


def parse_api_uri(uri: str) -> ApiSpec:
    """Take an address of the API apart. Raises ConfigError, of one line."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        return ApiSpec(uri, path=_absolute_path(uri, rest, MAX_SOCKET_PATH))
    if scheme == "tcp":
        host, port = _host_and_port(uri, rest)
        if host == "localhost":
            host = "127.0.0.1"
        if not ip_address(host).is_loopback:
            raise ConfigError(f"{uri}: the API is served on loopback only; write tcp://127.0.0.1:{port}")
        return ApiSpec(uri, host=host, port=port)
    raise ConfigError(f"{uri}: the API listens at unix:///PATH or tcp://127.0.0.1:PORT, or not at all: none")


def _absolute_path(uri: str, rest: str, limit: int) -> str:
    path = unquote(rest.removeprefix("//"))
    if not rest.startswith("//") or not path.startswith("/") or "\0" in path:
        raise ConfigError(
            f"{uri}: write an absolute path after three slashes, as in {uri.partition(':')[0]}:///run/n.sock"
        )
    if len(path.encode()) > limit:
        raise ConfigError(f"{uri}: the path has {len(path.encode())} bytes, a socket takes {limit}; use a shorter one")
    return path


def _host_and_port(uri: str, rest: str) -> tuple[str, int]:
    match = _HOST_PORT.fullmatch(rest.removeprefix("//"))
    if match is None or not rest.startswith("//") or not match[3]:
        raise ConfigError(f"{uri}: write an address and a port, as in tcp://127.0.0.1:5555 or tcp://[::1]:5555")
    host, port = match[1] or match[2], int(match[3])
    try:
        if host != "localhost":
            ip_address(host)
    except ValueError:
        raise ConfigError(f"{uri}: {host!r} is not an IP address; write for example 127.0.0.1 or [::1]") from None
    if port > 65535:
        raise ConfigError(f"{uri}: port {port} is above 65535")
    return host, port
