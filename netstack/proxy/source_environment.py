"""Proxy settings from environment variables: http_proxy, https_proxy, ftp_proxy, all_proxy, socks_proxy, no_proxy.

Both letter cases are read and the lower one wins, as in Python, curl and Lima. HTTP_PROXY in capitals is not read where
REQUEST_METHOD is set: there it is a header that somebody sent to a CGI script (httpoxy, CVE-2016-5385). A variable
that is set and empty means no proxy for that scheme, whatever the system says.

A process's environment never changes, so there is nothing to follow.
"""

from __future__ import annotations

from collections.abc import Mapping

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer, LayerWriter
from netstack.proxy.settings import PacSource, Scheme

NAME = "environment"

VARIABLES: Mapping[str, str] = {
    "http_proxy": "http",
    "https_proxy": "https",
    "ftp_proxy": "ftp",
    "all_proxy": "all",
    "socks_proxy": "socks",
}


def parse_environment(environment: Mapping[str, str]) -> Layer:
    """What the variables say."""
    writer = LayerWriter(NAME, "")
    seen: list[str] = []
    for variable, key in VARIABLES.items():
        name = _name_of(environment, variable)
        if name is None:
            continue
        seen.append(name)
        scheme: Scheme = "socks5" if key == "socks" else "http"
        writer.server(key, environment[name], name, scheme)
    name = _name_of(environment, "no_proxy")
    if name is not None:
        seen.append(name)
        writer.no_proxy = NoProxy.parse(environment[name])
    name = _name_of(environment, "auto_proxy")
    if name is not None and environment[name]:
        seen.append(name)
        writer.pac = PacSource(environment[name])
    writer.why = ", ".join(seen)
    return writer.layer()


def _name_of(environment: Mapping[str, str], lower: str) -> str | None:
    if lower in environment:
        return lower
    upper = lower.upper()
    if upper == "HTTP_PROXY" and "REQUEST_METHOD" in environment:
        return None
    return upper if upper in environment else None
