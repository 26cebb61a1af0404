"""One lease: what is known about one guest, and what the settings may say about it. The table is core.leases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# A client identifier and a DUID are at most 255 and 130 bytes (RFC 2132 9.14, RFC 8415 11.1); records keep no more.
MAX_CLIENT_ID: Final = 255

NEVER: Final = float("-inf")


@dataclass(slots=True, frozen=True)
class StaticLease:
    """What the settings say about one guest. An address that is None is chosen as for any other guest.

    One outside the network is the host's: the guest has it in place of one of ours.
    """

    mac: bytes
    address: bytes | None = None
    address6: bytes | None = None
    name: str = ""


@dataclass(slots=True, eq=False)
class Lease:
    """One record: the addresses of one guest. Times are monotonic seconds; expired records are kept."""

    host: int
    address: bytes
    address6: bytes | None
    mac: bytes
    client_id: bytes = b""
    duid: bytes = b""
    name: str = ""
    link: str = ""
    expires_at: float = NEVER
    """End of the IPv4 lease, or of the offer."""
    expires6_at: float = NEVER
    confirmed: bool = False
    """Whether the guest ever took up the offer, in either family."""
    quarantined_until: float = NEVER
    static: bool = False

    def free_at(self) -> float:
        """When the record may go to another guest."""
        return max(self.expires_at, self.expires6_at, self.quarantined_until)

    def addresses(self, now: float) -> list[bytes]:
        """The addresses that the guest holds now: one of each family that it has a lease in."""
        found = []
        if self.is_live(now):
            if self.expires_at > now:
                found.append(self.address)
            if self.expires6_at > now and self.address6 is not None:
                found.append(self.address6)
        return found

    def is_live(self, now: float) -> bool:
        """Whether the guest holds this address now, in either family."""
        return self.confirmed and self.quarantined_until <= now < max(self.expires_at, self.expires6_at)


def mirror_host(host: int) -> int:
    """Give the IPv6 host number with the same digits: 15 -> 0x15, so that .15 goes with ::15."""
    return int(str(host), 16)
