"""SPEC: which port or socket of the host leads to which port of a guest, from text to fields and back.

    [HOST_IP:]HOST_PORT[-LAST]:[GUEST:]GUEST_PORT[-LAST][/tcp|/udp]
    unix:HOST_PATH:[GUEST:]GUEST_PORT

It is Docker's, with a guest in it. Three parts are told apart by the first one: a number or a range is a host port, and
a guest follows; anything else is a host address. IPv6 stands in brackets. A path may have colons: its end is the last
part that is neither a port nor a guest, so that a path whose last name has a colon wants an empty guest behind it
(`unix:/run/a:b::80`), which str() writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal

from netstack.config.problems import ConfigError
from netstack.config.uris import MAX_SOCKET_PATH

Protocol = Literal["tcp", "udp", "unix"]

DEFAULT_HOST: Final = "127.0.0.1"
MAX_SPEC: Final = 512  # characters; a path is 103 bytes at most, a name 63

_FORM: Final = "[HOST_IP:]HOST_PORT:[GUEST:]GUEST_PORT[/udp], as in 8080:80"
_UNIX_FORM: Final = "unix:HOST_PATH:[GUEST:]GUEST_PORT, as in unix:/run/web.sock:80"
# RFC 1123 2.1: a label of a host name. In "80-90" the hyphen of a range comes first.
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_GUEST_DOMAIN: Final = ".netstack.internal"
# What people write for all addresses of both families.
_EVERYWHERE: Final = "*"


@dataclass(frozen=True, slots=True)
class ForwardSpec:
    """One forward, as it was asked for. str() is the canonical text, which parse_forward() takes."""

    protocol: Protocol
    host: str = DEFAULT_HOST  # an address; "::" takes IPv4 as well. Of no meaning for unix
    host_port: int = 0  # 0: a free one
    count: int = 1  # so many ports, from host_port and guest_port on
    path: str = ""  # of a unix socket
    guest: str = ""  # an address or a name; "": the first guest
    guest_port: int = 0

    def __str__(self) -> str:
        guest = f"[{self.guest}]:" if ":" in self.guest else f"{self.guest}:" if self.guest else ""
        if self.protocol == "unix":
            if not guest and ":" in self.path.rpartition("/")[2]:
                guest = ":"
            return f"unix:{self.path}:{guest}{self.guest_port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        last = f"-{self.host_port + self.count - 1}" if self.count > 1 else ""
        guest_last = f"-{self.guest_port + self.count - 1}" if self.count > 1 else ""
        suffix = "/udp" if self.protocol == "udp" else ""
        return f"{host}:{self.host_port}{last}:{guest}{self.guest_port}{guest_last}{suffix}"

    @property
    def host_side(self) -> str:
        """What of the host it takes: a path, or address, ports and protocol. For people, and to find it again."""
        if self.protocol == "unix":
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        last = f"-{self.host_port + self.count - 1}" if self.count > 1 else ""
        return f"{host}:{self.host_port}{last}/{self.protocol}"


def parse_forward(text: str) -> ForwardSpec:
    """Take a SPEC apart. Raises ConfigError, of one line that begins with the text."""
    if not text:
        raise ConfigError(f"an empty SPEC; write {_FORM}")
    if len(text) > MAX_SPEC:
        raise ConfigError(f"{text[:40]}...: is longer than {MAX_SPEC} characters; is it a SPEC?")
    if not text.isprintable():
        raise ConfigError(f"{text!r}: has characters that cannot be in a SPEC; write {_FORM}")
    try:
        return _parse_unix(text[5:]) if text.startswith("unix:") else _parse_ports(text)
    except _Wrong as wrong:
        raise ConfigError(f"{text}: {wrong}") from None


class _Wrong(Exception):  # noqa: N818 # its words are what is wrong
    """The words of a ConfigError, still without the text."""


def _parse_ports(text: str) -> ForwardSpec:
    body, slash, suffix = text.partition("/")
    protocol = suffix.lower() if slash else "tcp"
    if protocol not in ("tcp", "udp"):
        raise _Wrong(f"a forward is of /tcp or /udp; write {_FORM}")
    parts = _split(body)
    host, guest = DEFAULT_HOST, ""
    if len(parts) == 2:
        host_ports, guest_ports = parts
    elif len(parts) == 3 and _PORTS.fullmatch(parts[0]):
        host_ports, guest, guest_ports = parts[0], _guest(parts[1]), parts[2]
    elif len(parts) == 3:
        host, host_ports, guest_ports = _host(parts[0]), parts[1], parts[2]
    elif len(parts) == 4:
        host, host_ports, guest, guest_ports = _host(parts[0]), parts[1], _guest(parts[2]), parts[3]
    elif len(parts) == 1 and _PORTS.fullmatch(body):
        raise _Wrong(f"which port of the host? write {body}:{body}, or 0:{body} for a free one")
    elif len(parts) > 4 and "[" not in body:
        raise _Wrong("has too many colons; write IPv6 in brackets, as in [::1]:8080:80")
    else:
        raise _Wrong(f"write {_FORM}")
    first, count = _ports(host_ports, "host")
    guest_first, guest_count = _ports(guest_ports, "guest")
    if count != guest_count:
        raise _Wrong(f"{count} ports of the host cannot lead to {guest_count} of the guest; name as many of each")
    if first == 0 and count > 1:
        raise _Wrong("port 0 takes one free port, not a range; name the first port")
    if guest_first == 0:
        raise _Wrong("a guest has no port 0")
    return ForwardSpec(
        "udp" if protocol == "udp" else "tcp",
        host=host,
        host_port=first,
        count=count,
        guest=guest,
        guest_port=guest_first,
    )


def _parse_unix(rest: str) -> ForwardSpec:
    head, _, last = rest.rpartition(":")
    if last.lower().endswith("/udp"):
        raise _Wrong("a unix socket leads to a TCP port; leave /udp out")
    last = re.sub("/tcp$", "", last, flags=re.IGNORECASE)
    guest = ""
    if head.endswith("]") and re.search(r"\[.*:|:\[", head.rpartition("/")[2]):  # and not of a path such as /run/web[1]
        head, _, guest = head.rpartition("[")
        if not head.endswith(":"):
            raise _Wrong(f"write {_UNIX_FORM}")
        head, guest = head[:-1], _guest(f"[{guest}")
    else:
        path, colon, name = head.rpartition(":")
        if colon and "/" not in name:
            head, guest = path, _guest(name) if name else ""
    if not head or not _PORTS.fullmatch(last):
        raise _Wrong(f"write {_UNIX_FORM}")
    port, count = _ports(last, "guest")
    if count != 1 or port == 0:
        raise _Wrong("a unix socket leads to one port of a guest")
    if not head.startswith("/"):
        raise _Wrong(f"{head} is no absolute path; write {_UNIX_FORM}")
    if len(head.encode()) > MAX_SOCKET_PATH:
        raise _Wrong(f"the path has {len(head.encode())} bytes, a socket takes {MAX_SOCKET_PATH}; use a shorter one")
    return ForwardSpec("unix", path=head, guest=guest, guest_port=port)


def _split(body: str) -> list[str]:
    """The parts between colons, those in brackets left whole, with their brackets."""
    parts = re.findall(r"\[[^\]]*\]|[^:\[\]]+", body)
    if ":".join(parts) != body:
        raise _Wrong(f"write {_FORM}")
    return list(parts)


def _host(text: str) -> str:
    if text == _EVERYWHERE:
        return "::"
    if text == "localhost":
        return DEFAULT_HOST
    address = _address(text)
    if address is None:
        raise _Wrong(f"{text!r} is no address of this host; write 127.0.0.1, 0.0.0.0 or [::] for example")
    if address.is_multicast or (isinstance(address, IPv6Address) and address.ipv4_mapped is not None):
        raise _Wrong(f"nobody can listen at {text}; write 127.0.0.1, 0.0.0.0 or [::] for example")
    return str(address)


def _guest(text: str) -> str:
    address = _address(text)
    if address is not None:
        if isinstance(address, IPv6Address) and address.scope_id:
            raise _Wrong(f"{text} names an interface of the host; leave that out of a guest's address")
        return str(address)
    name = text.lower().removesuffix(".").removesuffix(_GUEST_DOMAIN)
    if not _NAME.fullmatch(name) or name.isdigit():
        raise _Wrong(f"{text!r} is neither an address nor a name of a guest")
    return name


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address: IPv6 in brackets, IPv4 without."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ip_address(bare)
    except ValueError:
        return None
    return address if (bare != text) == isinstance(address, IPv6Address) else None


def _ports(text: str, whose: str) -> tuple[int, int]:
    """The first port and how many."""
    match = _PORTS.fullmatch(text)
    if match is None:
        raise _Wrong(f"{text!r} is no port of the {whose}; write a number up to 65535, or a range such as 8000-8010")
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if max(first, last) > 65535:
        raise _Wrong(f"port {max(first, last)} is above 65535")
    if last < first:
        raise _Wrong(f"the range {text} ends before it begins")
    return first, last - first + 1
