"""The tables of the TOML file, as frozen models. What each key means for its user: docs/configuration.md."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from netstack.config.forward_spec import parse_forward
from netstack.config.host_names import HostNames
from netstack.config.problems import ConfigError
from netstack.config.uris import parse_api_uri, parse_link_uri
from netstack.dns.prefixes import parse_prefix
from netstack.dns.routes import format_name, parse_name
from netstack.dns.source_settings import parse_upstream

AUTO = "auto"
HOST = "host"  # the address of the guest that has the host's
DEFAULT_SUBNET = IPv4Network("192.168.5.0/24")
# Places of the well-known addresses in a network (Lima's numbers, which its users' scripts contain).
GATEWAY_OFFSET, DNS_OFFSET = 2, 3

SMALLEST_NETWORK = 29  # /29: the network's own address, broadcast, gateway, DNS, and 4 guests
MIN_MTU = 1280  # RFC 8200 5: what IPv6 asks of every link
MAX_MTU = 65520  # the largest that Linux's virtio-net, and passt, take; 65535 less the alignment they keep


class Table(BaseModel):
    """A table: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_subnet(text: str) -> str:
    if text == AUTO:
        return text
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        raise ValueError("must be auto, or a network such as 192.168.5.0/24") from None
    if "/" not in text:
        raise ValueError(f"says no length; write {text}/24 to mean 254 addresses")
    if str(network.network_address) != text.partition("/")[0]:
        raise ValueError(f"is an address in a network; write {network}")
    if network.prefixlen > SMALLEST_NETWORK:
        raise ValueError(f"is too small for a gateway and guests; /{SMALLEST_NETWORK} is the smallest")
    special = network.is_loopback or network.is_multicast or network.is_reserved or network.is_link_local
    if network.prefixlen < 8 or special:
        raise ValueError("cannot be a guest's network; take a private one such as 192.168.5.0/24")
    return str(network)


def _check_subnet6(text: str) -> str:
    if text == AUTO:
        return text
    try:
        network = IPv6Network(text)
    except ValueError:
        raise ValueError("must be auto, or a network such as fd00:c0a8:5::/64") from None
    if network.prefixlen != 64:  # RFC 4862 5.5.3 d: guests ignore a prefix of another length
        raise ValueError("must be a /64, or guests cannot make addresses in it")
    if network.is_link_local or network.is_multicast or network.network_address.packed[:8] == bytes(8):
        raise ValueError("cannot be a guest's network; take a private one such as fd00:c0a8:5::/64")
    return str(network)


def _check_address4(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        raise ValueError("must be an IPv4 address such as 192.168.5.20") from None


def _check_guest_address4(text: str) -> str:
    if text == HOST:
        return text
    try:
        return _check_address4(text)
    except ValueError:
        raise ValueError(f'must be an IPv4 address such as 192.168.5.20, or "{HOST}" for the host\'s own') from None


def _check_address6(text: str) -> str:
    try:
        return str(IPv6Address(text))
    except AddressValueError:
        raise ValueError("must be an IPv6 address such as fd00:c0a8:5::20") from None


def check_mac(text: str) -> str:
    """One guest's MAC in lower case with colons. Raises ValueError."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}", text):
        raise ValueError("must be a MAC address such as 52:54:00:12:34:56")
    if int(text[:2], 16) & 1:
        raise ValueError("is a group's address, not one guest's; make its first byte even")
    return text.lower().replace("-", ":")


def _check_name(text: str) -> str:
    # RFC 1123 2.1: a label of a host name.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", text):
        raise ValueError("must be a host name: letters, digits and hyphens, 63 at most, no dots")
    return text.lower()


def _check_domain(text: str) -> str:
    for label in text.removesuffix(".").split("."):
        _check_name(label.lstrip("_"))
    if len(text) > 253:
        raise ValueError("is longer than 253 characters")
    return text.removesuffix(".").lower()


def _check_route_domain(text: str) -> str:
    """A suffix of names: labels with an underscore are in use (_msdcs.corp.example), and "." is all names."""
    labels = parse_name(text)
    if labels is None or not text or not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError('must be a domain such as corp.example or 8.10.in-addr.arpa, or "." for all names')
    return format_name(labels)


def _check_nat64_prefix(text: str) -> str:
    return str(parse_prefix(text))


def _check_nameserver(text: str) -> str:
    if "://" in text:
        raise ValueError("must be the address of a nameserver; what has a :// goes into dns.upstreams")
    parse_upstream(text)
    return text


def _check_upstream(text: str) -> str:
    parse_upstream(text)
    return text


def _check_link(text: str) -> str:
    try:
        return parse_link_uri(text).uri
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _check_forward(text: str) -> str:
    try:
        parse_forward(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _check_api(text: str) -> str:
    try:
        return text if text == "none" else parse_api_uri(text).uri
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _parse_size(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,12})([KMGT]?)", value)
        if match is None:
            raise ValueError("must be a number of bytes, such as 500M")
        return int(match[1]) * 1024 ** " KMGT".index(match[2] or " ")
    return value


Subnet = Annotated[str, AfterValidator(_check_subnet)]
Subnet6 = Annotated[str, AfterValidator(_check_subnet6)]
Address4 = Annotated[str, AfterValidator(_check_address4)]
GuestAddress4 = Annotated[str, AfterValidator(_check_guest_address4)]
Address6 = Annotated[str, AfterValidator(_check_address6)]
Mac = Annotated[str, AfterValidator(check_mac)]
GuestName = Annotated[str, AfterValidator(_check_name)]
Domain = Annotated[str, AfterValidator(_check_domain)]
RouteDomain = Annotated[str, AfterValidator(_check_route_domain)]
Nat64Prefix = Annotated[str, AfterValidator(_check_nat64_prefix)]
Nameserver = Annotated[str, AfterValidator(_check_nameserver)]
Upstream = Annotated[str, AfterValidator(_check_upstream)]
LinkUri = Annotated[str, AfterValidator(_check_link)]
ApiUri = Annotated[str, AfterValidator(_check_api)]
Forward = Annotated[str, AfterValidator(_check_forward)]
Size = Annotated[int, BeforeValidator(_parse_size), Field(ge=0)]
Mtu = Annotated[int, Field(ge=MIN_MTU, le=MAX_MTU)]
# netstack.dns.source_auto.Kind
DnsSource = Literal["auto", "resolved", "networkmanager", "resolv.conf", "scutil", "stub", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


class NetworkAddresses(NamedTuple):
    """Every address that a network gives away, worked out for one subnet of each family."""

    subnet: IPv4Network
    gateway: IPv4Address
    dns: IPv4Address
    subnet6: IPv6Network
    gateway6: IPv6Address
    dns6: IPv6Address


class NetworkTable(Table):
    """[network]."""

    subnet: Subnet = AUTO
    subnet6: Subnet6 = AUTO
    gateway: Address4 | None = None
    dns: Address4 | None = None
    gateway6: Address6 | None = None
    dns6: Address6 | None = None
    mtu: Mtu = MAX_MTU
    host_loopback: bool = True

    def addresses(self, subnet: IPv4Network | None = None, subnet6: IPv6Network | None = None) -> NetworkAddresses:
        """The addresses, in these networks where the table says auto.

        None is the default network, for IPv6 the one beside that of IPv4.
        """
        net = (subnet or DEFAULT_SUBNET) if self.subnet == AUTO else IPv4Network(self.subnet)
        net6 = (subnet6 or subnet6_beside(net)) if self.subnet6 == AUTO else IPv6Network(self.subnet6)
        return NetworkAddresses(
            net,
            IPv4Address(self.gateway) if self.gateway else net[GATEWAY_OFFSET],
            IPv4Address(self.dns) if self.dns else net[DNS_OFFSET],
            net6,
            IPv6Address(self.gateway6) if self.gateway6 else net6[GATEWAY_OFFSET],
            IPv6Address(self.dns6) if self.dns6 else net6[DNS_OFFSET],
        )


def subnet6_beside(subnet: IPv4Network) -> IPv6Network:
    """The unique local network that goes with an IPv4 one: 192.168.5.0/24 has fd00:c0a8:5::/64."""
    first = subnet.network_address.packed
    return IPv6Network((b"\xfd\x00" + first[:2] + bytes([0, first[2], 0, first[3]]) + bytes(8), 64))


class LinkTable(Table):
    """[[link]]."""

    uri: LinkUri


class GuestTable(Table):
    """[[guest]]."""

    name: GuestName
    mac: Mac
    address: GuestAddress4 | None = None
    address6: Address6 | None = None


class PublishTable(Table):
    """[[publish]]."""

    spec: Forward
    on_conflict: Literal["error", "next", "loopback"] = "error"
    source: Literal["caller", "gateway"] = "caller"  # as whom the guest sees a caller


class RouteTable(Table):
    """[[dns.route]]."""

    domains: Annotated[tuple[RouteDomain, ...], Field(min_length=1)]
    upstreams: Annotated[tuple[Upstream, ...], Field(min_length=1)]
    interface: str = ""  # empty: as the host routes


class DnsTable(Table):
    """[dns]."""

    upstreams: tuple[Upstream, ...] = ()  # empty: the host's
    nameservers: tuple[Nameserver, ...] = ()  # the older name of upstreams, for plain addresses
    source: DnsSource = "auto"
    encryption: Literal["strict", "opportunistic"] = "strict"
    fallback: Literal["system", "none"] = "system"  # whom to ask where the host's nameservers are silent
    route: tuple[RouteTable, ...] = ()
    resolv_conf: Path = Path("/etc/resolv.conf")
    search: tuple[Domain, ...] = ()
    hosts: HostNames = {}
    hosts_file: Path = Path("/etc/hosts")
    hosts_loopback: Literal["gateway", "verbatim"] = "gateway"  # what loopback addresses in hosts_file mean to guests
    mdns: bool = True
    serve_stale: Annotated[int, Field(ge=0, le=604800)] = 0  # seconds; RFC 8767 5 suggests 1 to 3 days, 7 at most
    lenient_aaaa: bool = False
    rebind_protection: bool = False
    rebind_allow: tuple[RouteDomain, ...] = ()  # domains whose private addresses are right
    dns64: Nat64Prefix | None = None
    log_queries: bool = False


class PcapTable(Table):
    """[pcap]."""

    file: Path | None = None
    max_size: Size = 0  # bytes; 0: no limit


class ApiTable(Table):
    """[api]."""

    listen: tuple[ApiUri, ...] = ()
    token_file: Path | None = None


class LimitsTable(Table):
    """[limits]: what guests can make netstack hold. The defaults serve a dozen busy guests in some 200 MB."""

    flows: Annotated[int, Field(ge=16, le=1_000_000)] = 65536
    flows_per_guest: Annotated[int, Field(ge=16, le=1_000_000)] = 32768
    udp_flows_per_guest: Annotated[int, Field(ge=16, le=1_000_000)] = 2048
    dns_queries: Annotated[int, Field(ge=16, le=65536)] = 16_384  # netstack.dns.server: MAX_QUERIES
    dns_queries_per_guest: Annotated[int, Field(ge=16, le=65536)] = 10_000
    neighbors: Annotated[int, Field(ge=16, le=65536)] = 1024
    reassembly: Annotated[int, BeforeValidator(_parse_size), Field(ge=65536, le=1 << 30)] = 4 << 20


class LogTable(Table):
    """[log]."""

    level: LogLevel = "info"
    format: LogFormat = "console"


class StateTable(Table):
    """[state]."""

    dir: Path | None = None  # None: nothing is kept
