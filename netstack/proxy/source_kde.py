"""KDE: ~/.config/kioslaverc, group [Proxy Settings].

    ProxyType          0 none, 1 manual, 2 PAC script, 3 WPAD, 4 the names of environment variables
    httpProxy, httpsProxy, ftpProxy, socksProxy      "http://host:port", or in older files "http://host port"
    NoProxyFor         exceptions, with commas
    ReversedException  true: the proxies are for these names only
    Proxy Config Script

Keys may have flags in brackets behind them ("httpProxy[$e]"), which say that variables in the value are expanded; a
file of the system (/etc/xdg) stands below that of the user, key by key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer, LayerWriter
from netstack.proxy.settings import PacSource, Scheme

NAME = "KDE"
GROUP = "Proxy Settings"
MAX_FILE = 65536

_SERVERS: tuple[tuple[str, str, Scheme], ...] = (
    ("http", "httpProxy", "http"),
    ("https", "httpsProxy", "http"),
    ("ftp", "ftpProxy", "http"),
    ("socks", "socksProxy", "socks5"),
)


def kioslaverc_paths(environment: Mapping[str, str], home: Path) -> list[Path]:
    """The files, that of the user first (XDG Base Directory Specification)."""
    user = environment.get("XDG_CONFIG_HOME", "")
    system = environment.get("XDG_CONFIG_DIRS", "") or "/etc/xdg"
    directories = [Path(user) if user else home / ".config", *(Path(one) for one in system.split(":") if one)]
    return [directory / "kioslaverc" for directory in directories if directory.is_absolute()][:8]


def parse_kioslaverc(texts: Sequence[str], environment: Mapping[str, str], why: str = "kioslaverc") -> Layer:
    """What the files say, that of the user first."""
    values: dict[str, str] = {}
    for text in reversed(texts):
        values |= _read_group(text)
    writer = LayerWriter(NAME, why)
    kind = values.get("ProxyType", "0")
    if kind == "2":
        url = values.get("Proxy Config Script", "")
        if url:
            writer.pac = PacSource(url)
        else:
            writer.problems.append("ProxyType is 2, but there is no Proxy Config Script")
    elif kind == "3":
        writer.pac = PacSource(discover=True)
    elif kind in ("1", "4"):
        _take_servers(writer, values, environment if kind == "4" else None)
    return writer.layer()


def _take_servers(writer: LayerWriter, values: Mapping[str, str], environment: Mapping[str, str] | None) -> None:
    for key, name, scheme in _SERVERS:
        text = values.get(name, "")
        if environment is not None:
            text = environment.get(text, "")
        if not text:
            continue
        # "http://host 8080": KDE before 5.
        text = re.sub(r"\s+([0-9]+)/?$", r":\1", text.strip())
        if text.partition("://")[2] or "://" not in text:
            writer.server(key, text, name, scheme)
    if not writer.servers:
        return
    exceptions = values.get("NoProxyFor", "")
    if environment is not None:
        exceptions = environment.get(exceptions, "")
    listed = NoProxy.parse(exceptions)
    if values.get("ReversedException", "").lower() not in ("true", "1"):
        writer.no_proxy = listed
        return
    # The proxies are for these names only.
    scoped = Layer(NAME, writer.why, dict(writer.servers))
    for entry in listed.entries:
        name = entry.lstrip("*.")
        if re.fullmatch(r"[a-z0-9._-]+", name):
            writer.domains.append((name, scoped))
        else:
            writer.problems.append("NoProxyFor with ReversedException holds something that is no name")
    writer.servers.clear()


def _read_group(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    ours = False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            ours = line == f"[{GROUP}]"
        elif ours and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            values[key.partition("[")[0].strip()] = value.strip()
    return values
