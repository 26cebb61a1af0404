"""From settings to the values that the parts of a network take."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from netstack.config import Config
from netstack.control.log import Log
from netstack.core.addresses import Addresses
from netstack.core.leases import StaticLease
from netstack.host.capture import Capture
from netstack.wire.ethernet import parse_mac

# 52:55 and the gateway's IPv4 address: locally administered (bit 1 of the first byte), and it names its network.
_MAC_PREFIX = b"\x52\x55"


def choose_addresses(config: Config, log: Log) -> Addresses:
    """The network's addresses: those of the settings, or others where the host uses them already.

    Raises ConfigError when the settings name a subnet that clashes.
    """
    network = config.network.addresses()
    gateway = network.gateway.packed
    return Addresses(
        _MAC_PREFIX + gateway,
        network.subnet,
        gateway,
        network.dns.packed,
        network.subnet6,
        network.gateway6.packed,
        network.dns6.packed,
        config.network.host_loopback,
    )


def static_leases(config: Config) -> list[StaticLease]:
    """The `[[guest]]` entries."""
    return [
        StaticLease(
            parse_mac(guest.mac),
            IPv4Address(guest.address).packed if guest.address else None,
            IPv6Address(guest.address6).packed if guest.address6 else None,
            guest.name,
        )
        for guest in config.guest
    ]


def open_capture(config: Config, log: Log) -> Capture | None:
    """The pcapng file of `[pcap]`, or None when none is asked for. Raises OSError."""
    if config.pcap.file is None:
        return None
    return Capture(config.pcap.file, max_size=config.pcap.max_size, on_warning=log.warning)
