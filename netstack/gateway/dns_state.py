"""DNS seen from outside: what `GET /v1/dns`, `netstack dns` and the counters show, and what they can change."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from struct import pack
from typing import TYPE_CHECKING, Any, Final

from netstack.dns.message import CLASS_IN, RD, TYPE_OPT, rcode_of
from netstack.dns.mnemonics import parse_type, rcode_name, type_name
from netstack.dns.routes import clean_domain, parse_name

if TYPE_CHECKING:
    from netstack.gateway.names import DnsService

# Who asked, in the log of queries, where it was no guest.
API: Final = "api"

# More scopes and queries than this are not shown; the resolver keeps as many queries.
_SHOWN_QUERIES: Final = 1000


class DnsView:
    """A running DNS service, for the API. Raises ValueError, with words for the user, for what cannot be done."""

    def __init__(self, service: DnsService) -> None:
        self._service = service

    def describe(self) -> dict[str, Any]:
        """Table, cache, counters and the last queries, ready for JSON."""
        service = self._service
        table = service.follower.table
        now = datetime.now(UTC)
        return {
            "source": {
                "name": service.source.name,
                "why": service.source.why,
                "failures": service.source.failures,
            },
            "routes": table.describe(),
            "search": list(table.search),
            "version": table.version,
            **service.resolver.describe(),
            "counters": self.counters(),
            "local": service.local.describe(),
            "queries": [
                {
                    "time": (now - timedelta(seconds=ago)).isoformat(timespec="milliseconds"),
                    "guest": guest,
                    "name": name,
                    "type": type_name(kind),
                    "route": route,
                    "rcode": rcode_name(rcode),
                    "ms": ms,
                    "cached": cached,
                }
                for ago, guest, name, kind, route, rcode, ms, cached in service.resolver.log()[:_SHOWN_QUERIES]
            ],
        }

    def counters(self) -> dict[str, int]:
        """Everything that was counted, by name."""
        service = self._service
        return {
            **service.server.counters,
            **service.resolver.counters,
            **service.local.mdns.counters,
            **service.guest_mdns.counters,
        }

    def flush(self, scope: str | None = None, name: str | None = None) -> int:
        """Empty the cache: of a scope, of a name, or all. How many answers that were."""
        service = self._service
        if scope is not None and not any(scope == known.key for known in service.follower.table.scopes):
            known = ", ".join(known.key for known in service.follower.table.scopes) or "none"
            raise ValueError(f"there is no scope {scope!r}; there are: {known}")
        wire = None if name is None else _name_to_wire(name)
        count = service.resolver.flush(scope=scope, name=wire)
        return count if scope is not None or name is not None else count + service.local.mdns.flush()

    def hosts(self) -> list[dict[str, object]]:
        """The names of the settings and of the API."""
        return self._service.local.names.describe()

    def add_hosts(self, entries: Mapping[str, str | Sequence[str] | None]) -> None:
        """Add names as [dns.hosts] has them; None takes one away that was added."""
        self._service.local.add(entries)

    async def query(self, name: str, kind: str = "A") -> dict[str, Any]:
        """Ask as a guest would. The answer's bytes are in it as they would leave, in hex."""
        number = parse_type(kind)
        if number is None:
            raise ValueError(f"{kind!r} is no type of record; write A, AAAA, MX or TYPE65280")
        wire = _name_to_wire(name)
        head = pack("!HHHHHH", secrets.randbits(16), RD, 1, 0, 0, 1)
        opt = pack("!xHHIH", TYPE_OPT, 4096, 0, 0)
        began = time.monotonic()
        query = head + wire + pack("!HH", number, CLASS_IN) + opt
        answer = await self._service.resolver.ask(query, tcp=True, guest=API)
        return {
            "name": clean_domain(name) or ".",
            "type": type_name(number),
            "rcode": rcode_name(rcode_of(answer)),
            "ms": round((time.monotonic() - began) * 1000, 3),
            "answer": answer.hex(),
        }


def _name_to_wire(text: str) -> bytes:
    labels = parse_name(text)
    if labels is None:
        raise ValueError(f"{text!r} is no domain name")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
