"""The user's own upstreams, from the settings: before what the host says, for the same suffix.

An upstream is written as

    192.0.2.1  192.0.2.1:5353  2001:db8::1  [2001:db8::1]:5353  fe80::1%eth0     UDP, and TCP where that is needed
    udp://ADDRESS[:PORT]       the same
    tcp://ADDRESS[:PORT]       TCP only
    tls://ADDRESS[:PORT]#NAME  DNS over TLS (RFC 7858); NAME is who the certificate must be for, the address if left out
    https://HOST[:PORT]/PATH   DNS over HTTPS (RFC 8484); with #ADDRESS behind it, where HOST is to be found

Pure: text in, scopes out. There is nothing to watch; a reload of the settings brings new scopes to the follower.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from netstack.dns.routes import OPPORTUNISTIC, PORTS, ROOT, USER_RANK, Scope, Server, Transport, parse_name

_EXAMPLE = "such as 192.0.2.1, [2001:db8::1]:5353, tls://192.0.2.1#dns.example or https://dns.example/dns-query"


def parse_upstream(text: str) -> Server:
    """Read an upstream. Raises ValueError with words that fit behind the name of the setting."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _parse_plain(text, "udp", text)
    if scheme == "https":
        return _parse_https(text)
    if scheme not in ("udp", "tcp", "tls"):
        raise ValueError(f"must be the address of a nameserver, {_EXAMPLE}")
    transport: Transport = "udp" if scheme == "udp" else "tcp" if scheme == "tcp" else "tls"
    place, hash_sign, name = rest.partition("#")
    if hash_sign and (transport != "tls" or not parse_name(name)):
        raise ValueError(f"has no server's name behind the #; write {_EXAMPLE}")
    return _parse_plain(place.removesuffix("/"), transport, text)._replace(name=name.lower())


def _parse_plain(place: str, transport: Transport, text: str) -> Server:
    match = re.fullmatch(r"\[([^\]]*)\](?::([0-9]{1,5}))?|([0-9.]+):([0-9]{1,5})", place)
    address, number = ((match[1] or match[3] or ""), match[2] or match[4]) if match else (place, None)
    port = PORTS[transport] if number is None else int(number)
    try:
        address = str(ipaddress.ip_address(address))
    except ValueError:
        raise ValueError(f"must be the address of a nameserver, {_EXAMPLE}") from None
    if not 1 <= port <= 65535:
        raise ValueError(f"has the port {port}; ports are 1 to 65535")
    return Server(address, port, transport)


def _parse_https(text: str) -> Server:
    url, hash_sign, address = text.partition("#")
    wrong = "must be a URL such as https://dns.example/dns-query"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS["https"]
    except ValueError:
        raise ValueError(wrong) from None
    if not host or parts.username is not None or not url.isascii() or any(c.isspace() for c in url):
        raise ValueError(wrong)
    try:
        address = str(ipaddress.ip_address(address if hash_sign else host))
    except ValueError:
        if hash_sign:
            raise ValueError("has no address behind the #, such as https://dns.example/dns-query#192.0.2.1") from None
        address = ""
    return Server(address, port, "https", url if parts.path else f"{url}/dns-query")


def user_scopes(
    upstreams: Sequence[str],
    routes: Iterable[tuple[Sequence[str], Sequence[str], str]] = (),
    search: Sequence[str] = (),
    *,
    opportunistic: bool = False,
) -> list[Scope]:
    """The scopes that the settings ask for. The texts have been checked with parse_upstream.

    upstreams take every name that no suffix claims, also where a VPN of the host's claims all; a route is its domains,
    its upstreams and the interface to reach them by, or "".
    """
    options = frozenset((OPPORTUNISTIC,)) if opportunistic else frozenset()

    def servers_of(texts: Sequence[str], interface: str) -> tuple[Server, ...]:
        return tuple(parse_upstream(text)._replace(interface=interface, options=options) for text in texts)

    scopes = []
    if upstreams or search:
        everything = (ROOT,) if upstreams else ()
        servers = servers_of(upstreams, "")
        scopes.append(Scope("settings", servers, everything, tuple(search), False, "settings, [dns]", USER_RANK))
    for number, (domains, texts, interface) in enumerate(routes, 1):
        key = f"settings:{number}:{','.join(sorted(domains))}"
        source = f"settings, [[dns.route]] {number}"
        scopes.append(Scope(key, servers_of(texts, interface), tuple(domains), (), False, source, USER_RANK))
    return scopes
