"""[proxy]: which of the host's proxy settings count, and what guests are told. For users: docs/proxy.md.

Values may hold passwords, so they become `ProxyServer`s at once, whose text shows none, and `problems.problem_of` does
not quote what stands in this table.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetPydanticSchema
from pydantic_core import core_schema

from netstack.config.problems import ConfigError
from netstack.config.tables import Table
from netstack.proxy.exceptions import NoProxy
from netstack.proxy.settings import (
    Credentials,
    ProxyServer,
    ProxySyntaxError,
    local_path,
    parse_credentials,
    parse_server,
)


def _parse_proxy(value: object) -> object:
    """A proxy; "" is explicitly none."""
    if isinstance(value, ProxyServer):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a URL such as http://proxy.example:8080")  # noqa: TRY004 # pydantic takes this one
    return _check_server(parse_server(value)) if value.strip() else ""


def _parse_socks(value: object) -> object:
    if isinstance(value, str) and value.strip() and "://" not in value:
        return _check_server(parse_server(value, "socks5"))
    return _parse_proxy(value)


def _check_server(server: ProxyServer) -> ProxyServer:
    if server.problem:
        raise ProxySyntaxError(server.problem)
    return server


def _parse_list(value: object) -> object:
    if isinstance(value, str):
        return NoProxy.parse(value).entries
    return value


def _check_pac(text: str) -> str:
    if text and local_path(text) is None and not text.lower().startswith(("http://", "https://", "data:")):
        raise ValueError("must be a URL (http://, https://, file:///, data:) or a path that begins with /")
    return text


def _parse_secret(value: object) -> object:
    if isinstance(value, Credentials):
        return value
    if not isinstance(value, str):
        raise ValueError('must be "user:password"')  # noqa: TRY004 # pydantic takes this one
    return parse_credentials(value)


def _check_place(text: str) -> str:
    try:
        server = parse_server(text)
    except ProxySyntaxError:
        raise ValueError("must be the proxy's host, or host:port") from None
    if server.has_credentials or server.suffix or "://" in text:
        raise ValueError("must be the proxy's host, or host:port")
    return text.lower()


# These come ready made out of their BeforeValidators. Dumped, they are their text, which shows no password.
_AS_TEXT = core_schema.plain_serializer_function_ser_schema(str)
_AS_IT_IS = GetPydanticSchema(lambda source, handler: core_schema.any_schema(serialization=_AS_TEXT))
Proxy = Annotated[ProxyServer | Literal[""] | None, _AS_IT_IS, BeforeValidator(_parse_proxy)]
Socks = Annotated[ProxyServer | Literal[""] | None, _AS_IT_IS, BeforeValidator(_parse_socks)]
Secret = Annotated[Credentials, _AS_IT_IS, BeforeValidator(_parse_secret)]
Place = Annotated[str, AfterValidator(_check_place)]
CredentialTable = dict[Place, Secret]
Port = Annotated[int, Field(ge=1, le=65535)]
SourceName = Literal["environment", "settings", "system"]


class ProxyTable(Table):
    """[proxy]."""

    enabled: bool = True
    # The highest rank first.
    sources: tuple[SourceName, ...] = ("environment", "settings", "system")
    http: Proxy = None
    https: Proxy = None
    ftp: Proxy = None
    all: Proxy = None
    socks: Socks = None
    no_proxy: Annotated[tuple[str, ...] | None, BeforeValidator(_parse_list)] = None
    pac: Annotated[str, AfterValidator(_check_pac), Field(repr=False)] = ""
    wpad: Literal["system", "always", "never"] = "system"
    # Of proxies that the system names without a password, and of those in a PAC script.
    credentials: CredentialTable = {}  # noqa: RUF012 # pydantic copies it
    # What guests are told: our own proxy, or the host's as it is.
    guests: Literal["gateway", "literal", "none"] = "gateway"
    share_credentials: bool = False
    announce: bool = True  # DHCP option 252
    # The gateway's proxy.
    http_port: Port = 3128
    socks_port: Port = 1080
    transparent: bool = True
    transparent_http_ports: tuple[Port, ...] = (80,)
    transparent_https_ports: tuple[Port, ...] = (443,)
    block_quic: bool = False
    log_requests: bool = False

    def servers(self) -> dict[str, ProxyServer | None]:
        """The proxies that are named; None is explicitly none."""
        named: dict[str, Any] = {key: getattr(self, key) for key in ("http", "https", "ftp", "all", "socks")}
        return {key: value or None for key, value in named.items() if value is not None}


def check_proxy(table: ProxyTable) -> None:
    """What no setting can tell for itself. Raises ConfigError."""
    named = list(table.servers())
    if table.pac and named:
        words = f"a script decides for all requests; name it, or proxy.{named[0]}, but not both"
        raise ConfigError(f"proxy.pac: {words}", at=("proxy", "pac"))
    ports = (table.http_port, table.socks_port)
    if ports[0] == ports[1]:
        raise ConfigError(f"proxy.socks_port: {ports[1]} is proxy.http_port already", at=("proxy", "socks_port"))
    for key, port in (("http_port", ports[0]), ("socks_port", ports[1])):
        if port in (53, 80):  # DNS, and what guests are told about proxies
            raise ConfigError(f"proxy.{key}: {port} serves something else at the gateway", at=("proxy", key))
