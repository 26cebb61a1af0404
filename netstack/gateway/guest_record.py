"""What is known of one guest that asks for ports of the host: what it wants, what it has, and what it could not get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from netstack.control.agent.reports import Hello
from netstack.control.auto_publish import IpAddress, Listener, Publication, write_host
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.core.ports import Link
    from netstack.gateway.forwards import Forward

# A port that is taken may get free: soon, or not for a long time. One that the system refuses will not soon.
RETRY_SECONDS = 2.0
RETRY_SECONDS_AT_MOST = 60.0
CONFLICT_COST = 16.0

# A guest that starts may open all its ports at once; one whose ports come and go all the time is held back.
OPENINGS = 512.0
OPENINGS_PER_SECOND = 8.0

# What is shown of sockets that have no port: enough to see why.
_SHOWN = 64

Place = tuple[str, IpAddress, int]


class Failure(NamedTuple):
    """A publication that could not be opened."""

    publication: Publication
    why: str
    retry_at: float
    delay: float = RETRY_SECONDS


@dataclass(eq=False)
class Guest:
    """What one guest has asked for, and got."""

    link: Link
    mac: bytes
    address: bytes  # from which it spoke last
    listeners: list[Listener] = field(default_factory=list)
    hello: Hello = field(default_factory=Hello)
    exposed: dict[str, Publication] = field(default_factory=dict)  # by gvproxy's key, "tcp/127.0.0.1:8080"
    talk: object = None  # the talk that counts: a newer one takes its place
    say: Callable[[bytes], None] | None = None  # to an agent that relays
    heard_at: float = 0.0
    is_silent: bool = True
    forwards: dict[Place, tuple[Publication, Forward]] = field(default_factory=dict)
    failed: dict[Place, Failure] = field(default_factory=dict)
    refused: dict[Listener, str] = field(default_factory=dict)
    openings: float = OPENINGS  # left, as of openings_at
    openings_at: float = 0.0
    posts_at: float = 0.0  # not before then another posted report

    def may_open(self, now: float) -> bool:
        """Whether one more forward may be opened now: each is some work, and a line in the log."""
        self.openings = min(OPENINGS, self.openings + (now - self.openings_at) * OPENINGS_PER_SECOND)
        self.openings_at = now
        if self.openings < 1.0:
            return False
        self.openings -= 1.0
        return True

    def describe(self, name: str, now: float) -> dict[str, Any]:
        """All of it, as plain data."""
        missing = [*self.refused.items(), *((_listener(one.publication), one.why) for one in self.failed.values())]
        return {
            "guest": name,
            "address": str(ip_address(self.address)),
            "mac": format_mac(self.mac),
            "agent": "silent" if self.is_silent else "alive",
            "heard_seconds_ago": round(now - self.heard_at, 3),
            "listening": len(self.listeners),
            "published": sorted(str(forward.spec) for _, forward in self.forwards.values()),
            "not_published": [{"socket": _show(listener), "why": why} for listener, why in islice(missing, _SHOWN)],
        }


def _listener(publication: Publication) -> Listener:
    return Listener(publication.protocol, publication.guest, publication.guest_port)


def _show(listener: Listener) -> str:
    return f"{write_host(listener.address)}:{listener.port}/{listener.protocol}"
