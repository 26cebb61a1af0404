"""GNOME and what follows it (Cinnamon, MATE, Unity): the schema org.gnome.system.proxy, as `gsettings` prints it.

    mode              'none' | 'manual' | 'auto'
    autoconfig-url    of mode auto; empty means WPAD
    ignore-hosts      exceptions of mode manual
    http, https, ftp, socks   each with host and port; http with a user and password, too

`use-same-proxy` is in the schema and read by nobody since GNOME 3 (its own description says unused), so it is not
read here. A socks proxy serves what has no proxy of its own (glib's GSimpleProxyResolver has it as the default).

Values are GVariant text: 'a', "a", true, 0, ['a', 'b'], @as [].
"""

from __future__ import annotations

import ast
from typing import Any
from urllib.parse import quote

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer, LayerWriter
from netstack.proxy.settings import PacSource, Scheme

NAME = "GNOME"
SCHEMA = "org.gnome.system.proxy"
COMMAND = ("gsettings", "list-recursively", SCHEMA)

_MAX_LINE = 65536

_SERVERS: tuple[tuple[str, Scheme], ...] = (("http", "http"), ("https", "http"), ("ftp", "http"), ("socks", "socks5"))


def parse_gsettings(text: str) -> Layer:
    """What `gsettings list-recursively` printed says."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        schema, _, rest = line.strip().partition(" ")
        key, _, value = rest.partition(" ")
        if schema == SCHEMA or schema.startswith(SCHEMA + "."):
            values[f"{schema[len(SCHEMA) :].lstrip('.')}/{key}".lstrip("/")] = _parse_variant(value)
    writer = LayerWriter(NAME, f"gsettings {SCHEMA}")
    mode = values.get("mode")
    if mode == "auto":
        url = values.get("autoconfig-url")
        writer.pac = PacSource(url) if isinstance(url, str) and url else PacSource(discover=True)
    elif mode == "manual":
        _take_servers(writer, values)
    return writer.layer()


def _take_servers(writer: LayerWriter, values: dict[str, Any]) -> None:
    for key, scheme in _SERVERS:
        host, port = values.get(f"{key}/host"), values.get(f"{key}/port")
        # Port 0 is how the schema says "not set"; its own panel writes both or neither.
        if not isinstance(host, str) or not host or not isinstance(port, int) or port == 0:
            continue
        host = host.partition("://")[2].rstrip("/") or host  # people paste URLs into the host's field
        userinfo = ""
        user, secret = values.get("http/authentication-user"), values.get("http/authentication-password")
        if key == "http" and values.get("http/use-authentication") is True and isinstance(user, str) and user:
            userinfo = f"{quote(user, safe='')}:{quote(secret if isinstance(secret, str) else '', safe='')}@"
        place = f"[{host}]" if ":" in host and not host.startswith("[") else host
        writer.server(key, f"{scheme}://{userinfo}{place}:{port}", f"{SCHEMA}.{key} host", scheme)
    ignored = values.get("ignore-hosts")
    if writer.servers and isinstance(ignored, list):
        writer.no_proxy = NoProxy(entry for entry in ignored if isinstance(entry, str))


def _parse_variant(text: str) -> Any:
    """The value of a line, or None where it is none."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("@"):  # a type, where the value alone does not tell: @as []
        text = text.partition(" ")[2]
    for word in ("uint32 ", "int32 "):
        text = text.removeprefix(word)
    if len(text) > _MAX_LINE:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
