"""The picture of a running network as plain data: `GET /v1/status`, `netstack status`, `Network.statistics()`."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from ipaddress import ip_address
from itertools import islice
from typing import TYPE_CHECKING, Any

from netstack.core.datagrams import format_endpoint
from netstack.core.tcp import STATE_NAMES, TIME_WAIT
from netstack.version import __version__
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.gateway.network import Network

# More flows than this are counted and not listed.
LISTED_FLOWS = 1000
LISTED_FORWARDS = 1000


def statistics_of(network: Network, flows: int = LISTED_FLOWS) -> dict[str, Any]:
    """Everything that is to be seen, ready for JSON; of the flows so many at most."""
    stack = network.stack
    addresses = network.addresses
    now = time.monotonic()
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started": network.started.isoformat(),
        "uptime": round(now - network.started_at, 3),
        "network": {
            "subnet": str(addresses.subnet),
            "gateway": _text(addresses.gateway),
            "dns": _text(addresses.dns),
            "subnet6": str(addresses.subnet6),
            "gateway6": _text(addresses.gateway6),
            "dns6": _text(addresses.dns6),
            "mtu": network.config.network.mtu,
        },
        "links": [
            {
                "name": link.name,
                "uri": link.name.split("#")[0],
                "guests": sum(1 for where in stack.switch.macs().values() if where is link),
                "frames_from_guest": link.frames_from_guest,
                "bytes_from_guest": link.bytes_from_guest,
                "frames_to_guest": link.frames_to_guest,
                "bytes_to_guest": link.bytes_to_guest,
                "drops_to_guest": link.drops_to_guest,
                "backlog": link.backlog,
                "connected": True,
            }
            for link in network.links
        ]
        + [{"name": uri, "uri": uri, "guests": 0, "connected": False} for uri in network.waiting_uris()],
        "guests": list_guests(network, now),
        "flows": {
            "tcp": len(stack.flows),
            "udp": len(stack.udp) + len(stack.udp_forwards),
            "icmp": len(stack.icmp.pings),
            "limit": stack.limits.tcp_flows,
            "list": list_flows(network, now, limit=flows),
        },
        "forwards": [forward.describe() for forward in islice(network.forwards, LISTED_FORWARDS)],
        "counters": stack.counters.as_dict()
        | network.services.dhcp.counters
        | network.services.dhcpv6.counters
        | network.services.sntp.counters
        | network.dns.view.counters()
        | network.proxy.counters()
        | network.proxy_ports.counters,
        "dns": {
            "cache_entries": len(network.dns.resolver.cache),
            "cache_bytes": network.dns.resolver.cache.bytes,
            "names": len(network.dns.local.names.added) + len(network.dns.local.names.configured),
            "hosts_file_names": len(network.dns.local.hosts.table.addresses),
            "scopes": len(network.dns.follower.table.scopes),
        },
        "drops": dict(sorted(stack.counters.drops.items())),
    }


def list_guests(network: Network, now: float) -> list[dict[str, Any]]:
    """One entry a MAC: what the neighbor table, the switch and the leases know of it."""
    stack = network.stack
    guests: dict[bytes, dict[str, Any]] = {}
    for neighbor in stack.neighbors.all():
        entry = guests.get(neighbor.mac)
        if entry is None:
            lease = network.leases.find_mac(neighbor.mac)
            entry = guests[neighbor.mac] = {
                "name": lease.name if lease is not None else "",
                "mac": format_mac(neighbor.mac),
                "addresses": [_text(address) for address in lease.addresses(now)] if lease is not None else [],
                "link": neighbor.link.name,
                "mtu": 0,
                "seen": now - neighbor.seen_at,
            }
        if _text(neighbor.address) not in entry["addresses"]:
            entry["addresses"].append(_text(neighbor.address))
        entry["mtu"] = max(entry["mtu"], neighbor.mtu)
        entry["seen"] = round(min(entry["seen"], now - neighbor.seen_at), 3)
    if network.agents is not None:
        for described in network.agents.describe():
            owner = next((entry for entry in guests.values() if entry["mac"] == described["mac"]), None)
            if owner is not None:
                owner["agent"] = {key: described[key] for key in ("agent", "listening", "published", "not_published")}
    return list(guests.values())


def list_flows(
    network: Network,
    now: float,
    *,
    protocols: Collection[str] = ("tcp", "udp", "icmp"),
    guests: Collection[bytes] | None = None,
    limit: int = LISTED_FLOWS,
) -> list[dict[str, Any]]:
    """Open flows, so many at most; `guests` are the addresses of those that are wanted, None for all."""
    stack = network.stack
    listed: list[dict[str, Any]] = []
    for flow in stack.flows if "tcp" in protocols else ():
        if len(listed) >= limit:
            return listed
        if flow.state == TIME_WAIT or (guests is not None and flow.guest not in guests):
            continue
        guest, peer = flow.endpoints()
        listed.append(
            {
                "protocol": "tcp",
                "guest": guest,
                "peer": peer,
                "state": STATE_NAMES[flow.state],
                "age": round(now - flow.opened_at, 3),
                "bytes_from_guest": flow.bytes_from_guest,
                "bytes_to_guest": flow.bytes_to_guest,
            }
        )
    for name, flows in (("udp", stack.udp), ("udp", stack.udp_forwards), ("icmp", stack.icmp.pings)):
        for datagrams in flows if name in protocols else ():
            if len(listed) >= limit:
                return listed
            if guests is not None and datagrams.guest not in guests:
                continue
            listed.append(
                {
                    "protocol": name,
                    "guest": format_endpoint(datagrams.guest, datagrams.port),
                    "peer": format_endpoint(*datagrams.peer),
                    "state": "",
                    "age": round(now - datagrams.opened_at, 3),
                    "bytes_from_guest": datagrams.bytes_from_guest,
                    "bytes_to_guest": datagrams.bytes_to_guest,
                }
            )
    return listed


def list_leases(network: Network, now: float) -> list[dict[str, Any]]:
    """Every address that was given out, by host number."""
    return [
        {
            "name": lease.name,
            "mac": format_mac(lease.mac),
            "address": _text(lease.address),
            "address6": _text(lease.address6) if lease.address6 is not None else None,
            "link": lease.link,
            "static": lease.static,
            "live": lease.is_live(now),
            "expires_in": _left(lease.expires_at, now),
            "expires6_in": _left(lease.expires6_at, now),
        }
        for lease in network.leases
        if lease.confirmed
    ]


def _left(deadline: float, now: float) -> float | None:
    """Seconds that are left; None when it was never given or is over."""
    return round(deadline - now, 1) if deadline > now else None


def _text(address: bytes) -> str:
    return str(ip_address(address))
