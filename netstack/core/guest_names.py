"""Guests' names: what a guest calls itself, made fit for DNS and its own. It is NAME.netstack.internal then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from netstack.core.lease import Lease

# RFC 1035 2.3.4.
MAX_NAME: Final = 63

# What no guest may be called: these names, or the peers' forms of them, are the gateway's own; and with "wpad" or
# "isatap", which guests look for in the domains that they search, one guest would be the proxy or the router of the
# others (the two names of the global query block list of Windows' DNS server).
RESERVED_NAMES: Final = frozenset(
    {"dns", "gateway", "guest", "host", "http", "isatap", "localhost", "netstack", "proxy", "wpad"}
)


def clean_name(raw: str | bytes) -> str:
    """Make the first label of a name fit for DNS (RFC 1123 2.1): a-z, 0-9, inner hyphens. Untrusted; may be ''."""
    text = raw.decode("latin-1") if isinstance(raw, bytes) else raw
    label = text.partition(".")[0].partition("\0")[0].lower()[:MAX_NAME]
    cleaned = "".join(c if c.isascii() and c.isalnum() else "-" for c in label).strip("-")
    return "" if cleaned in RESERVED_NAMES else cleaned


@dataclass(slots=True)
class GuestNames:
    """Which lease has which name. statics are the names that the settings give, and the MACs of their guests."""

    statics: dict[str, bytes] = field(default_factory=dict)
    _holders: dict[str, Lease] = field(init=False, default_factory=dict)

    def find(self, name: str, now: float) -> Lease | None:
        """Give the live lease of the guest with this name, in any case of letters."""
        lease = self._holders.get(name.lower())
        return lease if lease is not None and lease.is_live(now) else None

    def give(self, lease: Lease, wanted: str | bytes, now: float) -> None:
        """Name a guest as the settings say, or as it wants, or NAME-2 and so on while another one has that name.

        Untrusted. A guest that says nothing usable keeps the name that it had.
        """
        name = next((name for name, mac in self.statics.items() if mac == lease.mac), "") or clean_name(wanted)
        if not name:
            return
        stem, count = name, 1
        while self._is_taken(name, lease, now):
            count += 1
            suffix = f"-{count}"
            name = stem[: MAX_NAME - len(suffix)] + suffix
        self.drop(lease)
        before = self._holders.get(name)
        if before is not None:
            # Its guest is gone, or the settings gave its name away. It gets another one when it comes back and has a
            # wish; until then it has none.
            before.name = ""
        lease.name = name
        self._holders[name] = lease

    def drop(self, lease: Lease) -> None:
        """Take its name from a guest that is forgotten."""
        if self._holders.get(lease.name) is lease:
            del self._holders[lease.name]

    def _is_taken(self, name: str, lease: Lease, now: float) -> bool:
        """Whether the name belongs to another guest: by the settings, or because it came first and is still here."""
        if name in self.statics:
            return self.statics[name] != lease.mac
        holder = self._holders.get(name)
        return holder is not None and holder is not lease and holder.is_live(now)
