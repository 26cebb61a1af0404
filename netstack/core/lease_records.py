"""Leases as plain data that outlives a restart, for a small JSON file. The rim reads and writes the file.

Monotonic time means nothing after a restart, so the times are written as seconds of the wall clock. Addresses are text:
people read this file, and may edit it.

    {"version": 1, "leases": [{"mac": "52:54:00:12:34:56", "address": "192.168.5.15", "client_id": "01...", "duid": "",
                               "name": "debian", "expires": 1763640000.0, "expires6": null}]}
"""

from __future__ import annotations

import ipaddress
import math
from typing import Any

from netstack.core.leases import NEVER, Lease, LeaseTable

VERSION = 1


def write_leases(table: LeaseTable, now: float, wall: float) -> dict[str, Any]:
    """Give all confirmed records as plain data; wall is the wall clock (seconds since 1970) at `now`."""
    return {
        "version": VERSION,
        "leases": [
            {
                "mac": lease.mac.hex(":"),
                "address": str(ipaddress.IPv4Address(lease.address)),
                "client_id": lease.client_id.hex(),
                "duid": lease.duid.hex(),
                "name": lease.name,
                "expires": _to_wall(lease.expires_at, now, wall),
                "expires6": _to_wall(lease.expires6_at, now, wall),
            }
            for lease in table
            if lease.confirmed and not table.is_outside(lease)
        ],
    }


def check_leases(data: Any) -> None:
    """Raise ValueError when data as a whole is not what write_leases gives."""
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("leases"), list):
        raise ValueError("not a list of leases of version 1")


def read_leases(table: LeaseTable, data: Any, now: float, wall: float) -> int:
    """Put back what write_leases gave. Gives the number of entries left out: unreadable, or not of this network.

    Raises ValueError as check_leases does.
    """
    check_leases(data)
    skipped = 0
    for entry in data["leases"]:
        try:
            lease = _parse_entry(entry, now, wall)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            skipped += 1
            continue
        skipped += not table.restore(lease, now)
    return skipped


def _parse_entry(entry: Any, now: float, wall: float) -> Lease:
    mac = bytes.fromhex(entry["mac"].replace(":", ""))
    name = entry["name"]
    if len(mac) != 6 or not isinstance(name, str):
        raise ValueError(entry)
    return Lease(
        host=0,
        address=ipaddress.IPv4Address(entry["address"]).packed,
        address6=None,
        mac=mac,
        client_id=bytes.fromhex(entry["client_id"]),
        duid=bytes.fromhex(entry["duid"]),
        name=name,
        expires_at=_from_wall(entry["expires"], now, wall),
        expires6_at=_from_wall(entry["expires6"], now, wall),
    )


def _to_wall(at: float, now: float, wall: float) -> float | None:
    return None if at == NEVER else round(at - now + wall, 3)


def _from_wall(at: Any, now: float, wall: float) -> float:
    if at is None:
        return NEVER
    if not math.isfinite(at):
        raise ValueError(at)
    return float(at) - wall + now
