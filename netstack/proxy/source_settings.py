"""Proxy settings from [proxy] of our own configuration, which arrive as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer
from netstack.proxy.settings import PacSource, ProxyServer

NAME = "settings"


def settings_layer(
    servers: Mapping[str, ProxyServer | None],
    no_proxy: Sequence[str] | None = None,
    pac: str = "",
    *,
    discover: bool = False,
) -> Layer:
    """What the settings say. `discover` looks for a script as WPAD does, where none is named."""
    source = PacSource(pac) if pac else PacSource(discover=True) if discover and not servers else None
    exceptions = None if no_proxy is None else NoProxy(no_proxy)
    return Layer(NAME, "[proxy]", dict(servers), exceptions, source)
