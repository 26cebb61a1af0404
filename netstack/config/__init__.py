"""Settings: the TOML file, the flags and the environment, checked and frozen. Nothing else in netstack reads them.

A `Config` is built directly (`Config(network={"mtu": 1500})`), from a file (`Config.load`), or from a file with flags
over it (`Config.from_flags`). Whatever is wrong with it comes out as one `ConfigError` of one line that names the
flag, or the file and line, and says what to do.

A `Config` says only what was said. What `netstack run` adds on its own account (its socket, its API, its leases) is put
in by `Config.for_service`, so that a program which opens a network in a library call leaves nothing on the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from netstack.config.auto_publish import AutoPublishRule, AutoPublishTable, check_auto_publish
from netstack.config.forward_spec import ForwardSpec, parse_forward
from netstack.config.paths import notify_socket, runtime_directory, state_directory
from netstack.config.problems import ConfigError, problem_of
from netstack.config.proxy import ProxyTable, check_proxy
from netstack.config.tables import (
    AUTO,
    HOST,
    ApiTable,
    DnsTable,
    GuestTable,
    LimitsTable,
    LinkTable,
    LogTable,
    NetworkAddresses,
    NetworkTable,
    PcapTable,
    PublishTable,
    RouteTable,
    StateTable,
    Table,
    check_mac,
    subnet6_beside,
)
from netstack.config.toml_lines import key_lines, line_of
from netstack.config.uris import ApiSpec, LinkSpec, parse_api_uri, parse_link_uri

__all__ = [
    "ApiSpec",
    "Config",
    "ConfigError",
    "ForwardSpec",
    "LinkSpec",
    "NetworkAddresses",
    "check_mac",
    "notify_socket",
    "parse_api_uri",
    "parse_forward",
    "parse_link_uri",
    "runtime_directory",
    "state_directory",
    "subnet6_beside",
]

# A flag, and the setting in the file that it wins over.
_FLAGS: Mapping[str, tuple[str, tuple[str, str]]] = {
    "subnet": ("--subnet", ("network", "subnet")),
    "mtu": ("--mtu", ("network", "mtu")),
    "host_loopback": ("--no-host-loopback", ("network", "host_loopback")),
    "pcap": ("--pcap", ("pcap", "file")),
    "api": ("--api", ("api", "listen")),
    "log_level": ("--log-level", ("log", "level")),
    "log_format": ("--log-format", ("log", "format")),
    "state_dir": ("--state-dir", ("state", "dir")),
}
# In a file, a relative path is meant from where the file is: a service has no useful working directory.
_PATHS = (("pcap", "file"), ("api", "token_file"), ("dns", "resolv_conf"), ("dns", "hosts_file"), ("state", "dir"))
_MAX_FILE = 1 << 20  # bytes; a megabyte of settings is somebody's disk image given by mistake
_NO_API = "none"


class Config(Table):
    """All settings of one network. Tables may be given as dicts or as the models of `netstack.config.tables`."""

    network: NetworkTable = NetworkTable()
    link: tuple[LinkTable, ...] = ()
    guest: tuple[GuestTable, ...] = ()
    publish: tuple[PublishTable, ...] = ()
    auto_publish: AutoPublishTable = AutoPublishTable()
    dns: DnsTable = DnsTable()
    proxy: ProxyTable = ProxyTable()
    pcap: PcapTable = PcapTable()
    api: ApiTable = ApiTable()
    limits: LimitsTable = LimitsTable()
    log: LogTable = LogTable()
    state: StateTable = StateTable()

    def __init__(self, **tables: Any) -> None:
        """Check the tables. Raises ConfigError."""
        try:
            super().__init__(**tables)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise problem_of(first, _known_keys(first["loc"])) from None
        _check_together(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a TOML file. Raises ConfigError, with the line."""
        return cls.from_flags(path)

    @classmethod
    def from_flags(
        cls,
        file: str | os.PathLike[str] | None = None,
        *,
        link: Sequence[str] = (),
        flag_of_link: str = "--link",
        publish: Sequence[str] = (),
        **flags: Any,
    ) -> Self:
        """Read `file` if there is one, and let the flags that are given (not None, not empty) win over it.

        Flags: link, subnet, mtu, host_loopback, pcap, api, log_level, log_format, state_dir. Links given here replace
        all those of the file; forwards given here (`publish`) join them, and replace one of the same host port. Raises
        ConfigError, with the line or the flag.
        """
        text, tables = _read_toml(Path(file)) if file is not None else ("", {})
        from_flag: dict[tuple[str | int, ...], str] = {}
        for name, value in flags.items():
            flag, (table, key) = _FLAGS[name]
            if value is None or value == ():
                continue
            entries = tables.setdefault(table, {})
            if isinstance(entries, dict):  # else it is wrong anyway, and pydantic says so
                entries[key] = value
                from_flag[table, key] = flag
        if publish:
            _add_forwards(tables, publish, from_flag)
        if link:
            tables["link"] = [{"uri": uri} for uri in link]
            from_flag["link",] = flag_of_link
        try:
            return cls(**tables)
        except ConfigError as error:
            for path, flag in from_flag.items():
                if error.at[: len(path)] == path:
                    raise ConfigError(f"{flag} {error.reason}", at=error.at) from None
            if file is None:
                raise
            line = line_of(error.at, key_lines(text))
            raise ConfigError(f"{file}:{line}: {error}" if line else f"{file}: {error}", at=error.at) from None

    def for_service(self) -> Self:
        """This, and the default socket, API socket and state directory where none was named: what `run` runs."""
        changes: dict[str, Any] = {}
        if not self.link:
            uri = f"unix://{runtime_directory() / 'qemu.sock'}"
            changes["link"] = (LinkTable(uri=uri),)
        if _NO_API not in self.api.listen and not any(uri.startswith("unix:") for uri in self.api.listen):
            listen = (f"unix://{runtime_directory() / 'api.sock'}", *self.api.listen)
            changes["api"] = self.api.model_copy(update={"listen": listen})
        if self.state.dir is None:
            changes["state"] = StateTable(dir=state_directory())
        return self.model_copy(update=changes)

    def changed(self, other: Self) -> list[str]:
        """The names of the settings that are not the same in `other`: network.mtu, link, ..."""
        names: list[str] = []
        for table in type(self).model_fields:
            ours, theirs = getattr(self, table), getattr(other, table)
            if isinstance(ours, Table):
                keys = type(ours).model_fields
                names += [f"{table}.{key}" for key in keys if getattr(ours, key) != getattr(theirs, key)]
            elif ours != theirs:
                names.append(table)
        return names

    def api_listeners(self) -> tuple[ApiSpec, ...]:
        """Where the API is to be served; empty when it was turned off."""
        return () if _NO_API in self.api.listen else tuple(parse_api_uri(uri) for uri in self.api.listen)

    def token_place(self, port: int) -> Path:
        """Where the token of the API at this TCP port is stored."""
        return self.api.token_file or runtime_directory() / f"api-{port}.token"


def _add_forwards(tables: dict[str, Any], publish: Sequence[str], from_flag: dict[tuple[str | int, ...], str]) -> None:
    """Put the forwards of -p behind those of the file, whose lines keep their places."""
    entries = tables.setdefault("publish", [])
    if not isinstance(entries, list):
        return  # wrong, and pydantic says so
    for spec in publish:
        side = _host_side(spec)
        for index, entry in enumerate(entries):
            from_file = isinstance(entry, dict) and ("publish", index) not in from_flag
            if side is not None and from_file and _host_side(entry.get("spec")) == side:
                from_flag["publish", index] = "-p"
                entries[index] = {"spec": spec}
                break
        else:
            from_flag["publish", len(entries)] = "-p"
            entries.append({"spec": spec})


def _host_side(spec: object) -> str | None:
    """What of the host a SPEC takes; None when it is none, or takes whatever is free."""
    try:
        forward = parse_forward(spec) if isinstance(spec, str) else None
    except ConfigError:
        return None
    return None if forward is None or (forward.protocol != "unix" and not forward.host_port) else forward.host_side


def _check_together(config: Config) -> None:
    """What no setting can tell for itself: that they fit each other."""
    network, net = config.network, config.network.addresses()
    reserved = {net.subnet.network_address, net.subnet.broadcast_address, net.subnet6.network_address}
    for name in ("gateway", "dns", "gateway6", "dns6"):
        if getattr(network, name) is None:
            continue
        address: IPv4Address | IPv6Address = getattr(net, name)
        family = "subnet6" if name.endswith("6") else "subnet"
        if getattr(network, family) == AUTO:
            raise ConfigError(f"network.{name} needs network.{family} to be named too", at=("network", name))
        net_of = net.subnet6 if name.endswith("6") else net.subnet
        if address not in net_of or address in reserved:
            raise ConfigError(f"network.{name}: {address} is no free address of {net_of}", at=("network", name))
    taken: dict[object, str] = dict.fromkeys(reserved, "the network")
    taken |= {net.gateway: "the gateway", net.gateway6: "the gateway"}
    taken.setdefault(net.dns, "DNS")
    taken.setdefault(net.dns6, "DNS")
    for index, guest in enumerate(config.guest):
        _check_guest(config, net, index, guest, taken)
    check_auto_publish(config.auto_publish)
    check_proxy(config.proxy)
    _check_forwards(config, net)
    uris: set[str] = set()
    for index, link in enumerate(config.link):
        if link.uri in uris:
            raise ConfigError(f"link[{index + 1}].uri: {link.uri} is there twice", at=("link", index, "uri"))
        uris.add(link.uri)


def _check_forwards(config: Config, net: NetworkAddresses) -> None:
    sides: dict[str, int] = {}
    for index, table in enumerate(config.publish):
        at = ("publish", index, "spec")
        side = _host_side(table.spec)
        if side is not None and side in sides:
            words = f"{table.spec}: publish[{sides[side] + 1}] takes {side} already"
            raise ConfigError(f"publish[{index + 1}].spec: {words}", at=at, reason=words)
        if side is not None:
            sides[side] = index
        guest = parse_forward(table.spec).guest
        if guest in {str(address) for address in (net.gateway, net.dns, net.gateway6, net.dns6)}:
            words = f"{table.spec}: {guest} is the gateway's own address, not a guest's"
            raise ConfigError(f"publish[{index + 1}].spec: {words}", at=at, reason=words)


def _check_guest(
    config: Config, net: NetworkAddresses, index: int, guest: GuestTable, taken: dict[object, str]
) -> None:
    fixed = [("name", guest.name), ("mac", guest.mac)]
    for key, text, family in (("address", guest.address, "subnet"), ("address6", guest.address6, "subnet6")):
        if text is None:
            continue
        at = ("guest", index, key)
        if text == HOST:
            fixed.append((key, text))
            continue
        # With auto, netstack may move to another network, and the address would lie outside it.
        if getattr(config.network, family) == AUTO and (family == "subnet" or config.network.subnet == AUTO):
            words = f"needs network.{family} to be named, since auto may take another one"
            raise ConfigError(f"guest[{index + 1}].{key} {words}", at=at)
        address = IPv4Address(text) if family == "subnet" else IPv6Address(text)
        if address not in getattr(net, family):
            raise ConfigError(f"guest[{index + 1}].{key}: {text} is not in {getattr(net, family)}", at=at)
        fixed.append((key, text))
    for key, text in fixed:
        value: object = (key, text)
        if key in ("address", "address6") and text != HOST:
            value = IPv4Address(text) if key == "address" else IPv6Address(text)
        if value in taken:
            at = ("guest", index, key)
            raise ConfigError(f"guest[{index + 1}].{key}: {text} belongs to {taken[value]} already", at=at)
        taken[value] = f"guest {guest.name!r}"


def _read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    import tomllib  # 10 ms that a start without a file need not wait for

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable TOML file") from None
    if len(data) > _MAX_FILE:
        raise ConfigError(f"{path} is larger than a megabyte: is it the right file?")
    text = data.decode(errors="replace")
    try:
        data.decode()
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text, as TOML must be") from None
    except tomllib.TOMLDecodeError as error:
        # "... (at line 3, column 5)" or "(at end of document)".
        words, _, place = str(error).partition(" (at ")
        found = re.match(r"line ([0-9]+), column ([0-9]+)", place)
        line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
        raise ConfigError(f"{path}:{line}: not TOML: {words[:1].lower()}{words[1:]}") from None
    except (RecursionError, ValueError):
        # Brackets in brackets without end, or a number of thousands of digits (sys.set_int_max_str_digits).
        words = "nests too deeply, or has a number of too many digits: is it the right file?"
        raise ConfigError(f"{path}: {words}") from None
    for table, key in _PATHS:
        entries = tables.get(table)
        if isinstance(entries, dict) and isinstance(entries.get(key), str):
            try:
                entries[key] = path.absolute().parent / Path(entries[key]).expanduser()
            except RuntimeError:
                place = f"{path}:{line_of((table, key), key_lines(text))}: {table}.{key}"
                words = "nobody knows that home directory; write a path that begins with /"
                raise ConfigError(f"{place}: {entries[key]}: {words}") from None
    return text, tables


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the table in which `path` lies."""
    table: type[BaseModel] = Config
    for part in path[:-1]:
        if isinstance(part, str) and part in _TABLES:
            table = _TABLES[part]
    return list(table.model_fields)


_TABLES: Mapping[str, type[BaseModel]] = {
    "network": NetworkTable,
    "link": LinkTable,
    "guest": GuestTable,
    "publish": PublishTable,
    "auto_publish": AutoPublishTable,
    "rule": AutoPublishRule,
    "dns": DnsTable,
    "route": RouteTable,
    "proxy": ProxyTable,
    "pcap": PcapTable,
    "api": ApiTable,
    "limits": LimitsTable,
    "log": LogTable,
    "state": StateTable,
}
