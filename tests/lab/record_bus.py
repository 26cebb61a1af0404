"""Records what a service says on the system's D-Bus: `python -m tests.lab.record_bus resolved|networkmanager`.

Prints what the source of `netstack.dns` for it reads, as JSON: properties by object, bytes as {"hex": ...}. Such files,
from hosts of all kinds, are the test data of the parsers: tests/dns/recorded. Look through one before it is given away:
it names the host's nameservers and domains.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import trio

from netstack.dns import source_networkmanager, source_resolved
from netstack.dns.dbus import Service, follow


def to_json(value: object) -> Any:
    """What a parser is given, as JSON."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(value: Any) -> Any:
    """The other way round. All sequences are lists, which the parsers take like tuples."""
    if isinstance(value, dict):
        if value.keys() == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def write(found: dict[str, Any]) -> str:
    """JSON with a line for each property."""
    parts = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


async def record(kind: str) -> None:
    """Print it once."""

    async def read_resolved(service: Service) -> None:
        manager = await service.properties(*source_resolved._MANAGER)
        links, names = {}, source_resolved._names_of(source_resolved.links_of(manager))
        for ifindex in names:
            path = source_resolved.link_path(ifindex)
            links[ifindex] = await service.properties(path, source_resolved._LINK_INTERFACE)
        finish({"manager": manager, "links": links, "names": names})

    async def read_networkmanager(service: Service) -> None:
        properties = await service.properties(*source_networkmanager._DNS_MANAGER)
        finish({"properties": properties, "default_routes": sorted(source_networkmanager._read_default_routes())})

    def finish(found: dict[str, Any]) -> None:
        print(write(to_json(found)))
        scope.cancel()

    def gone(reason: str) -> None:
        if not scope.cancel_called:  # jeepney may complain when it is cancelled
            sys.exit(f"record_bus: {reason}")

    with trio.CancelScope() as scope:
        if kind == "resolved":
            await follow(source_resolved.NAME, read_resolved, gone)
        else:
            await follow(source_networkmanager.NAME, read_networkmanager, gone)


if __name__ == "__main__":
    trio.run(record, sys.argv[1])
