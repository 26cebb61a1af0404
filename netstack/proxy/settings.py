"""Proxy settings as values: a proxy, a list of exceptions, a PAC source, and all of them together.

Theory of operation. Whatever a host says about proxies (environment, our own settings, macOS, GNOME, KDE) is brought
into these values by `source_*.py`, merged by `layers.py`, and asked by `routes.py`. They are frozen: a change of the
host's settings is another `ProxySettings`, put in place in one assignment.

Credentials are in `ProxyServer.username` and `.password` and in nothing else. Neither `repr` nor `str` of any value
here shows them, error messages never quote the text they failed to read, and `ProxyServer.url()` leaves them out unless
it is asked. So a value may go into a log line, a metric, the API or a traceback as it is.

A proxy is written `[scheme://][user[:password]@]host[:port][/...]`. Without a scheme it is an HTTP proxy: Python's and
Go's URL parsers take `localhost:8080` for the scheme localhost, which is why nothing here uses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Literal, cast
from urllib.parse import quote, unquote, urlsplit

from netstack.proxy.exceptions import NO_EXCEPTIONS, NoProxy

Scheme = Literal["http", "https", "socks5", "socks5h", "socks4"]

# Where a proxy listens when nothing is said: as Go's httpproxy and the services database have it.
DEFAULT_PORTS: Final[dict[Scheme, int]] = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}

# Other words for the same protocols: curl's socks://, and 4a, which is 4 with a name in place of the address.
_ALIASES: Final[dict[str, Scheme]] = {"socks": "socks5", "socks4a": "socks4"}

# RFC 1035 2.3.4 allows 253 characters for a name; nothing that is longer than this is a proxy.
_MAX_TEXT = 2048
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?")
# RFC 3986 2.3: what a path, query or fragment may hold, besides percent-encoded bytes.
_SUFFIX = re.compile(r"[/?#][A-Za-z0-9._~!$&'()*+,;=:@/?%#\[\]-]*")


class ProxySyntaxError(ValueError):
    """A text is no proxy. Its words never quote the text, which may hold a password."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who asks a proxy. Its text shows nothing."""

    username: str = field(repr=False)
    password: str = field(repr=False)

    def __str__(self) -> str:
        return "***"


@dataclass(frozen=True, slots=True)
class ProxyServer:
    """A proxy to ask. `host` is in lower case and without brackets; `suffix` is what a URL had after the port."""

    scheme: Scheme
    host: str
    port: int
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    suffix: str = field(default="", repr=False)

    @property
    def has_credentials(self) -> bool:
        """Whether the proxy is to be told who asks."""
        return self.username is not None

    @property
    def authority(self) -> str:
        """host:port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, *, credentials: bool = False) -> str:
        """The proxy as a URL, with the credentials only where they were asked for."""
        userinfo = ""
        if credentials and self.username is not None:
            userinfo = quote(self.username, safe="")
            if self.password is not None:
                userinfo += ":" + quote(self.password, safe="")
            userinfo += "@"
        return f"{self.scheme}://{userinfo}{self.authority}{self.suffix}"

    def with_host(self, host: str) -> ProxyServer:
        """The same proxy, found at another address."""
        return replace(self, host=host)

    def with_credentials(self, credentials: Credentials) -> ProxyServer:
        """The same proxy, told who asks."""
        return replace(self, username=credentials.username, password=credentials.password)

    @property
    def problem(self) -> str:
        """Why its credentials cannot be sent; empty where they can. To a SOCKS proxy python-socks sends ASCII only.

        RFC 1929 2 has bytes, 255 at most, and names no character set: what others make of ü is anybody's guess.
        """
        if not self.scheme.startswith("socks"):
            return ""
        for what, text in (("user", self.username), ("password", self.password)):
            if text and not text.isascii():
                return f"has a letter in its {what} that is not ASCII, which SOCKS cannot send; take one without"
            if text and len(text) > 255:
                return f"has a {what} of more than 255 characters, which SOCKS cannot send"
        return ""

    def __str__(self) -> str:
        return f"{self.scheme}://{'***@' if self.has_credentials else ''}{self.authority}"


@dataclass(frozen=True, slots=True)
class PacSource:
    """Where a proxy auto-config script is: a URL (http, https, file or data), or the script itself.

    `discover`: look for it as WPAD says, at the network's wpad host.
    """

    url: str = ""
    script: str = field(default="", repr=False)
    discover: bool = False

    def __str__(self) -> str:
        if self.discover:
            return "wpad"
        if self.script:
            return f"a script of {len(self.script)} characters"
        return redact_url(self.url)

    def __repr__(self) -> str:
        return f"PacSource({self!s})"


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """What holds now, merged from all sources.

    `http` and `https` are for requests of those schemes, `all` for everything else, `socks` a SOCKS proxy where one was
    named, whatever for. A scheme in `pac_schemes` is decided by the script `pac`. `domains` are settings for
    the names below a domain, which a VPN on macOS may bring; the longest domain wins.
    """

    http: ProxyServer | None = None
    https: ProxyServer | None = None
    socks: ProxyServer | None = None
    all: ProxyServer | None = None
    no_proxy: NoProxy = NO_EXCEPTIONS
    pac: PacSource | None = None
    source: str = "none"
    pac_schemes: frozenset[str] = frozenset()
    domains: tuple[tuple[str, ProxySettings], ...] = ()
    ftp: ProxyServer | None = None  # for what guests are told; nothing here speaks FTP

    def server_for(self, scheme: str) -> ProxyServer | None:
        """The proxy for a scheme, exceptions and PAC left aside."""
        if scheme == "http":
            return self.http
        if scheme == "https":
            return self.https
        return self.all

    def may_proxy(self, scheme: str) -> bool:
        """Whether anything of this scheme may go to a proxy. False means that all of it goes direct."""
        return (
            self.server_for(scheme) is not None
            or scheme in self.pac_schemes
            or any(settings.may_proxy(scheme) for _, settings in self.domains)
        )


NO_SETTINGS: Final = ProxySettings()


def parse_server(text: str, default: Scheme = "http", default_port: int | None = None) -> ProxyServer:
    """A proxy from a URL, or from host:port of the scheme `default`. Raises ProxySyntaxError.

    Untrusted where it comes from a PAC script.
    """
    text = text.strip()
    if not text or len(text) > _MAX_TEXT or any(ord(letter) <= 32 or ord(letter) == 127 for letter in text):
        raise ProxySyntaxError("is no proxy; write http://HOST:PORT")
    before, divider, rest = text.partition("://")
    scheme: Scheme = default
    if divider:
        word = before.lower()
        if word not in DEFAULT_PORTS and word not in _ALIASES:
            raise ProxySyntaxError("has a scheme that is no proxy's; take http, https, socks5, socks5h or socks4")
        scheme = _ALIASES.get(word) or cast("Scheme", word)
    else:
        rest = text
    end = re.search(r"[/?#]", rest.rpartition("@")[2])
    suffix = rest[len(rest.rpartition("@")[0]) + ("@" in rest) + end.start() :] if end else ""
    authority = rest.removesuffix(suffix) if suffix else rest
    userinfo, at, place = authority.rpartition("@")
    username = password = None
    if at:
        user, colon, secret = userinfo.partition(":")
        username, password = unquote(user), unquote(secret) if colon else None
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in username + (password or "")):
            # RFC 7617 2: no control characters; they could end a header's line.
            raise ProxySyntaxError("has a control character in its user or password")
    if suffix == "/":
        suffix = ""
    if suffix and not _SUFFIX.fullmatch(suffix):
        raise ProxySyntaxError("is no URL after the port")
    host, port = _split_place(place, default_port or DEFAULT_PORTS[scheme])
    return ProxyServer(scheme, host, port, username, password, suffix)


def parse_credentials(text: str) -> Credentials:
    """Read user:password as it is: nothing is percent-decoded. Raises ProxySyntaxError."""
    user, colon, secret = text.partition(":")
    if not colon or not user:
        raise ProxySyntaxError('must be "user:password"')
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ProxySyntaxError("has a control character in it")
    return Credentials(user, secret)


def _split_place(place: str, default_port: int) -> tuple[str, int]:
    """host[:port] of a proxy, an IPv6 address in brackets or alone."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::([0-9]{0,5}))?", place)
    if bracketed is not None:
        host, digits = bracketed[1], bracketed[2] or ""
    elif place.count(":") > 1:
        host, digits = place, ""
    else:
        host, _, digits = place.partition(":")
    if digits and not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= 65535):
        raise ProxySyntaxError("has no port from 1 to 65535 after the colon")
    host = host.lower()
    if not host:
        raise ProxySyntaxError("names no host; write http://HOST:PORT")
    if bracketed is not None or ":" in host:
        try:
            IPv6Address(host)
        except ValueError:
            raise ProxySyntaxError("has something in brackets that is no IPv6 address") from None
    else:
        if not host.isascii():
            try:
                host = host.encode("idna").decode("ascii")
            except UnicodeError:
                raise ProxySyntaxError("has a host that is no name") from None
        if len(host) > 254 or not _NAME.fullmatch(host):
            raise ProxySyntaxError("has a host that is no name and no address")
    return host, int(digits) if digits else default_port


def redact_url(url: str) -> str:
    """A URL without its credentials, query and fragment: a query may hold a token.

    All before the last "@" is left out, wherever that is: what people write is not always a URL.
    """
    if url[:5].lower() == "data:":
        return "data:..."
    if url.startswith("/") and not url.startswith("//"):
        return url.partition("?")[0]
    scheme, divider, rest = url.partition("://")
    if not divider:
        scheme, rest = "", url
    return f"{scheme}{divider}{rest.rpartition('@')[2]}".partition("?")[0].partition("#")[0]


def local_path(url: str) -> Path | None:
    """The file that a file: URL or a plain path names."""
    if url.startswith("/"):
        return Path(url)
    if url[:5].lower() != "file:":
        return None
    parts = urlsplit(url)
    path = unquote(parts.path)
    return Path(path) if parts.netloc in ("", "localhost") and path.startswith("/") else None


def parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host part is, brackets and a zone allowed, or None for a name.

    IPv4 in all forms that inet_aton() takes (127.1, 0x7f.0.0.1, 2130706433), because a guest's programs take them;
    an IPv4 address mapped into IPv6 is the IPv4 address. Untrusted.
    """
    host = host.strip("[]").partition("%")[0]
    if ":" in host:
        try:
            address = IPv6Address(host)
        except ValueError:
            return None
        return address.ipv4_mapped or address
    try:
        return ip_address(host)
    except ValueError:
        return _parse_classic(host)


def _parse_classic(host: str) -> IPv4Address | None:
    parts = host.split(".")
    if len(parts) > 4:
        return None
    numbers = []
    for part in parts:
        if not re.fullmatch(r"0[xX][0-9A-Fa-f]{1,8}|[0-9]{1,12}", part):
            return None
        try:
            numbers.append(int(part, 16 if part[:2].lower() == "0x" else 8 if part[0] == "0" else 10))
        except ValueError:  # an 8 or 9 in an octal number
            return None
    *high, last = numbers
    if any(number > 255 for number in high) or last >= 1 << 8 * (4 - len(high)):
        return None
    return IPv4Address(sum(number << 8 * (3 - place) for place, number in enumerate(high)) + last)


def is_loopback(host: str) -> bool:
    """Whether a host part means the machine itself: 127.x, ::1, 0.0.0.0, ::, localhost and names below it.

    RFC 6761 6.3 for localhost; connecting to an unspecified address reaches the loopback on Linux and macOS.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = parse_address(name)
    return address is not None and (address.is_loopback or address.is_unspecified)
