"""netstack: a user-mode network for virtual machines.

    async with netstack.open_network(netstack.Config()) as network:  # under trio
        link = await network.attach("unix:///tmp/n.sock")
        forward = await network.publish("127.0.0.1:8080:80")
        network.statistics()

The names are imported when they are first used, so that `import netstack.wire` does not load pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netstack.version import __version__

if TYPE_CHECKING:
    from netstack.config import Config, ConfigError
    from netstack.core.forwards import ForwardError
    from netstack.gateway import Network, open_network

__all__ = ["Config", "ConfigError", "ForwardError", "Network", "__version__", "open_network"]


def __getattr__(name: str) -> Any:
    if name in ("Config", "ConfigError"):
        import netstack.config

        return getattr(netstack.config, name)
    if name in ("Network", "open_network"):
        import netstack.gateway

        return getattr(netstack.gateway, name)
    if name == "ForwardError":
        import netstack.core.forwards

        return netstack.core.forwards.ForwardError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
