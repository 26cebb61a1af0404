"""[auto_publish]: which listening sockets of guests get a port of the host by themselves. For users: docs/agent.md."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from netstack.config.problems import ConfigError
from netstack.config.tables import GuestName, Table

Ports = tuple[int, int]

# Below these, ports belong to root (RFC 6335 6).
_PRIVILEGED = 1024
_LAST = 65535


def _check_address(text: str) -> str:
    try:
        return str(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise ValueError("must be an address such as 127.0.0.1 or ::1") from None


def _parse_ports(value: object) -> object:
    """A range as "8000-8999", [8000, 8999], or one port."""
    found: list[int] | None = None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", value):
        found = [int(part) for part in value.split("-")]
    elif isinstance(value, int) and not isinstance(value, bool):
        found = [value]
    elif isinstance(value, list | tuple) and all(type(part) is int for part in value) and len(value) in (1, 2):
        found = list(value)
    if found is None or not all(1 <= port <= _LAST for port in found):
        raise ValueError('must be a port or a range of ports, such as "8000-8999"')
    if found[0] > found[-1]:
        raise ValueError("ends before it begins")
    return found[0], found[-1]


Port = Annotated[int, Field(ge=1, le=_LAST)]
PortRange = Annotated[Ports, BeforeValidator(_parse_ports)]
Address = Annotated[str, AfterValidator(_check_address)]


class AutoPublishRule(Table):
    """[[auto_publish.rule]]."""

    guest: GuestName | None = None
    guest_ip: Address | None = None
    guest_ip_must_be_zero: bool = False
    guest_port: Port | None = None
    guest_ports: PortRange | None = None
    host_ip: Address = "127.0.0.1"
    host_port: Port | None = None
    host_ports: PortRange | None = None
    proto: Literal["tcp", "udp", "any"] = "any"
    ignore: bool = False
    static: bool = False

    @property
    def guest_range(self) -> Ports:
        """The guest's ports that this rule is about."""
        if self.guest_port is not None:
            return self.guest_port, self.guest_port
        return self.guest_ports or (1, _LAST)

    @property
    def host_range(self) -> Ports:
        """The host's ports that they get, in the same order."""
        if self.host_port is not None:
            return self.host_port, self.host_port
        return self.host_ports or self.guest_range

    @property
    def bound_to(self) -> IPv4Address | IPv6Address:
        """The address that `guest_ip` means."""
        if self.guest_ip is not None:
            return ip_address(self.guest_ip)
        return IPv4Address("0.0.0.0" if self.ignore or self.guest_ip_must_be_zero else "127.0.0.1")


class AutoPublishTable(Table):
    """[auto_publish]."""

    enabled: bool = False
    privileged: bool = False
    fallback: bool = True
    on_conflict: Literal["error", "next", "loopback"] = "error"
    max_ports: Annotated[int, Field(ge=1, le=4096)] = 256
    rule: tuple[AutoPublishRule, ...] = ()


def check_auto_publish(table: AutoPublishTable) -> None:
    """What no key can tell for itself. Raises ConfigError."""
    for index, rule in enumerate(table.rule):
        problem = _problem_of(rule, privileged=table.privileged)
        if problem is not None:
            key, words = problem
            at = ("auto_publish", "rule", index, key)
            raise ConfigError(f"auto_publish.rule[{index + 1}].{key} {words}", at=at, reason=words)


def _problem_of(rule: AutoPublishRule, *, privileged: bool) -> tuple[str, str] | None:
    for side in ("guest", "host"):
        if getattr(rule, f"{side}_port") is not None and getattr(rule, f"{side}_ports") is not None:
            return f"{side}_ports", f"is there beside {side}_port; take one of them"
    guest, host = rule.guest_range, rule.host_range
    host_key = "host_port" if rule.host_port is not None else "host_ports"
    named = rule.host_port is not None or rule.host_ports is not None
    if rule.ignore and (named or rule.static):
        return ("static" if rule.static else host_key), "does not go with ignore, which publishes nothing"
    if guest[1] - guest[0] != host[1] - host[0]:
        words = f"has {host[1] - host[0] + 1} ports, and the guest's range {guest[1] - guest[0] + 1}; make them equal"
        return host_key, words
    if host[0] < _PRIVILEGED and named and not privileged:
        return host_key, f"is below {_PRIVILEGED}: that needs auto_publish.privileged = true"
    if rule.guest_ip_must_be_zero and not rule.bound_to.is_unspecified:
        return "guest_ip_must_be_zero", f"does not go with guest_ip = {rule.guest_ip!r}"
    if rule.static:
        if rule.guest_port is None and rule.guest_ports is None:
            return "static", "needs guest_port or guest_ports"
        if host[0] < _PRIVILEGED and not privileged:
            return "static", f"means the host's port {host[0]} here, and that needs auto_publish.privileged = true"
        if rule.guest_ip is not None and rule.guest is not None:
            return "guest_ip", "does not go with guest in a static rule; take one of them"
    return None
