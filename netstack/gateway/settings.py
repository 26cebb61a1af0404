"""From settings to the values that the parts of a network take."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address

from netstack.config import Config, ConfigError
from netstack.config.auto_publish import AutoPublishTable
from netstack.config.tables import AUTO, HOST, NetworkTable
from netstack.control.auto_publish import Rule, Rules
from netstack.control.log import Log
from netstack.core.addresses import Addresses
from netstack.core.flows import Limits
from netstack.core.leases import StaticLease
from netstack.dns.upstream_udp import MAX_SOCKETS
from netstack.host import state, subnets
from netstack.host.capture import Capture
from netstack.wire.ethernet import parse_mac

# 52:55 and the gateway's IPv4 address: locally administered (bit 1 of the first byte), and it names its network.
_MAC_PREFIX = b"\x52\x55"

# Descriptors that flows must leave: links (256 guests at most on one socket, but few in fact), the API's connections,
# files; and those of choose_dns_sockets().
_RESERVED_DESCRIPTORS = 256

# Ports of forwards: opening so many takes a third of a second, in which guests wait.
_MOST_PORTS = 16384


def choose_addresses(config: Config, log: Log) -> Addresses:
    """The network's addresses: those of the settings, or others where the host uses them already.

    Raises ConfigError when the settings name a subnet that clashes.
    """
    taken = subnets.list_taken()
    wanted = config.network
    try:
        if wanted.subnet == AUTO:
            network = wanted.addresses(_free_subnet(wanted, taken, log))
        else:
            network = wanted.addresses()
            subnets.check_subnet(network.subnet, taken)
    except subnets.SubnetError as error:
        raise ConfigError(f"--subnet {wanted.subnet}: {error}") from None
    try:
        subnets.check_subnet(network.subnet6, taken)
    except subnets.SubnetError as error:
        if wanted.subnet6 != AUTO:
            raise ConfigError(f"network.subnet6 {wanted.subnet6}: {error}") from None
        free = subnets.choose_subnet6(taken)
        log.warning("the host has the guests' IPv6 network; taking another", taken=str(error), subnet6=str(free))
        network = wanted.model_copy(update={"subnet6": str(free)}).addresses(network.subnet)
    gateway = network.gateway.packed
    return Addresses(
        _MAC_PREFIX + gateway,
        network.subnet,
        gateway,
        network.dns.packed,
        network.subnet6,
        network.gateway6.packed,
        network.dns6.packed,
        wanted.host_loopback,
    )


def _free_subnet(wanted: NetworkTable, taken: Sequence[subnets.Taken], log: Log) -> IPv4Network:
    """The default network, or the next free one."""
    default = wanted.addresses().subnet
    clash = subnets.find_clash(default, taken)
    if clash is None:
        return default
    free = subnets.choose_subnet(taken)
    log.warning(
        "the host has the default network already; taking another",
        taken=f"{clash.network}: {clash.why}",
        subnet=str(free),
    )
    return free


def static_leases(config: Config, host: bytes | None = None, host6: bytes | None = None) -> list[StaticLease]:
    """The `[[guest]]` entries; the guest that is the host gets these addresses."""
    leases = []
    for guest in config.guest:
        address6 = IPv6Address(guest.address6).packed if guest.address6 else None
        if guest.address == HOST:
            address, address6 = host, address6 or host6
        else:
            address = IPv4Address(guest.address).packed if guest.address else None
        leases.append(StaticLease(parse_mac(guest.mac), address, address6, guest.name))
    return leases


def choose_dns_sockets() -> int:
    """How many sockets queries to nameservers may take, before they share them."""
    return min(MAX_SOCKETS, _count_descriptors() // 8)


def _count_descriptors() -> int:
    """How many this process may have."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if descriptors == resource.RLIM_INFINITY else descriptors


def choose_limits(config: Config, log: Log) -> Limits:
    """The stack's limits: those of the settings, within what the process may have of descriptors.

    Each flow to the host is one. A reserve is kept for links, the API and files, and no guest gets all.
    """
    wanted = config.limits
    descriptors = _count_descriptors()
    free = max(64, descriptors - _RESERVED_DESCRIPTORS - choose_dns_sockets())
    udp = min(Limits().udp_flows, free // 4)
    tcp = min(wanted.flows, free - udp)
    if tcp < wanted.flows:
        log.debug("connections are limited by the number of open files (ulimit -n)", flows=tcp, open_files=descriptors)
    return Limits(
        tcp_flows=tcp,
        tcp_flows_per_guest=min(wanted.flows_per_guest, tcp * 3 // 4),
        udp_flows=udp,
        udp_flows_per_guest=min(wanted.udp_flows_per_guest, udp * 3 // 4),
        neighbors=wanted.neighbors,
        forward_pending=min(Limits().forward_pending, max(64, descriptors // 8)),  # half of the reserve, of 1,024
        reassembly_bytes=wanted.reassembly,
    )


def choose_ports() -> int:
    """How many ports of the host forwards may have open: each is a descriptor."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_PORTS if descriptors == resource.RLIM_INFINITY else min(_MOST_PORTS, max(16, descriptors // 4))


def claim_lease_file(config: Config, addresses: Addresses, log: Log) -> state.Claim | None:
    """Where the leases of this network are kept; None when nowhere, or when another netstack keeps its own there."""
    directory = config.state.dir
    if directory is None:
        return None
    net = addresses.subnet
    path = directory / f"leases-{net.network_address}-{net.prefixlen}.json"
    try:
        claim = state.claim(path)
    except OSError as error:
        log.warning("leases will not outlive this run", file=str(path), error=error.strerror)
        return None
    if claim is not None:
        return claim
    log.warning(
        "another netstack keeps the leases of this network; ours will not outlive this run",
        file=str(path),
        mend="give each its own --state-dir, or --subnet",
    )
    return None


def open_capture(config: Config, log: Log) -> Capture | None:
    """The pcapng file of `[pcap]`, or None when none is asked for. Raises OSError."""
    if config.pcap.file is None:
        return None
    return Capture(config.pcap.file, max_size=config.pcap.max_size, on_warning=log.warning)


def auto_publish_rules(table: AutoPublishTable) -> Rules:
    """The rules of `[auto_publish]`."""
    rules = tuple(
        Rule(
            rule.proto,
            rule.guest or "",
            rule.bound_to,
            rule.guest_ip_must_be_zero,
            rule.guest_range,
            ip_address(rule.host_ip),
            rule.host_range,
            rule.ignore,
            rule.static,
        )
        for rule in table.rule
    )
    return Rules(rules, fallback=table.fallback, privileged=table.privileged)
