"""The names that netstack answers by itself, put together from settings, leases and the host's files.

The order is that of rule 51: the gateway's and guests' own names; those of the API, of `[dns.hosts]` and of the host's
/etc/hosts; special names. mDNS, which takes time, comes behind all of these, and after it the cache and the upstreams,
which are not here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

import trio

from netstack.config import Config
from netstack.core.addresses import Addresses
from netstack.core.leases import LeaseTable
from netstack.core.ports import Events
from netstack.dns.answers import AnswerWriter, Labels
from netstack.dns.hosts import HostsFile
from netstack.dns.local import DOMAIN, HOST_NAMES, LocalNames
from netstack.dns.mdns import Mdns
from netstack.dns.message import Question
from netstack.dns.names import Entry, ExtraNames, merge_entries, parse_entry
from netstack.dns.routes import RoutingTable
from netstack.dns.special import SpecialNames

# When the network is up, what the first answer needs is imported, so that it need not wait.
_WARM_UP_AFTER: Final = 0.5

# Where a nameserver is somebody's own: RFC 1918, RFC 4193, loopback, link-local, and RFC 6598, which Tailscale uses.
_PRIVATE: Final = tuple(
    map(
        ipaddress.ip_network,
        "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 "
        "fc00::/7 fe80::/10 ::1/128".split(),
    )
)


class LocalData:
    """All local names of one network. table gives the routing table of the moment."""

    def __init__(
        self,
        addresses: Addresses,
        leases: LeaseTable,
        config: Config,
        nursery: trio.Nursery,
        events: Events,
        table: Callable[[], RoutingTable],
    ) -> None:
        self._leases = leases
        self._table = table
        self._nursery = nursery
        both = (addresses.gateway, addresses.gateway6)
        writer = AnswerWriter()
        networks: Sequence[IPv4Network | IPv6Network] = (addresses.subnet, addresses.subnet6)
        own: dict[str, Sequence[bytes]] = dict.fromkeys(HOST_NAMES, both)
        self.builtin = LocalNames(DOMAIN, own, networks, self._find_guest, self._find_name, writer)
        self.names = ExtraNames(writer, self._find_local)
        self.hosts = HostsFile(
            config.dns.hosts_file,
            both if config.dns.hosts_loopback == "gateway" else None,
            writer,
            lambda words: events.warning("hosts", "the hosts file cannot be read", error=words),
        )
        self.special = SpecialNames(writer, self._is_routed, self._is_private, mdns=config.dns.mdns)
        self.mdns = Mdns(nursery, writer, self._is_routed, enabled=config.dns.mdns)
        self._sources = (self.builtin.answer, self.names.answer, self.hosts.answer, self.special.answer)
        self.hosts.load()
        self.apply(config)

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer what is known here, at once. Nothing is, of an alias of a name elsewhere: see `names.target`."""
        for answer in self._sources:
            if (found := answer(query, question)) is not None:
                return found
        return None

    @property
    def version(self) -> int:
        """Counts the changes of names that are known here, guests' apart, which are below a domain of our own."""
        return self.hosts.version + self.names.version

    def apply(self, config: Config) -> None:
        """Take the names of the settings."""
        self.names.configure(merge_entries(parse_entry(name, value) for name, value in config.dns.hosts.items()))

    async def run(self) -> None:
        """Follow the host's files until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hosts.run)
            await trio.sleep(_WARM_UP_AFTER)
            await trio.to_thread.run_sync(_warm_up)

    def add(self, entries: Mapping[str, str | Sequence[str] | None]) -> None:
        """Add names, as [dns.hosts] has them; None takes an added one away. Raises ValueError with the name."""
        parsed: dict[Labels, Entry | None] = {}
        for name, value in entries.items():
            try:
                labels, entry = parse_entry(name, "192.0.2.1" if value is None else value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            parsed[labels] = None if value is None else entry
        self.names.add(parsed)

    def describe(self) -> dict[str, Any]:
        """What there is, for GET /v1/dns."""
        hosts = self.hosts
        return {
            "names": len(self.names.added) + len(self.names.configured),
            "hosts_file": {
                "path": str(hosts.path),
                "names": len(hosts.table.addresses),
                "version": hosts.version,
                "load_ms": round(hosts.seconds * 1000, 1),
            },
            "mdns": self.mdns.enabled,
        }

    def _is_routed(self, labels: Labels) -> bool:
        return self._table().claim(labels) is not None

    def _is_private(self, labels: Labels) -> bool:
        servers = [server for scope in self._table().route(labels) for server in scope.servers]
        packed = [server.packed() for server in servers]
        return bool(packed) and all(map(_is_private, packed))

    def _find_local(self, labels: Labels) -> Sequence[bytes] | None:
        found = self.builtin.find(labels)
        return self.hosts.find(labels) if found is None else found

    def _find_guest(self, label: str) -> Sequence[bytes] | None:
        now = time.monotonic()
        lease = self._leases.find_name(label, now)
        return lease.addresses(now) if lease is not None else None

    def _find_name(self, address: bytes) -> str | None:
        now = time.monotonic()
        lease = self._leases.find_address(address)
        return lease.name or None if lease is not None and address in lease.addresses(now) else None


def _warm_up() -> None:
    with contextlib.suppress(OSError):  # no descriptors are left at the moment: whoever needs it will import it
        import dnslib  # noqa: F401


def _is_private(packed: bytes) -> bool:
    if not packed:  # a DoH server without an address
        return False
    address = ipaddress.ip_address(packed)
    return any(address.version == network.version and address in network for network in _PRIVATE)
