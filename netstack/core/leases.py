"""Leases: which guest holds which address. One table serves DHCP, DHCPv6 and the guests' names.

Theory of operation
-------------------
A guest is its MAC address. RFC 2131 4.2 makes the client identifier the key instead, and for virtual machines that
fails twice: machines cloned from one disk share an identifier (it is derived from /etc/machine-id) and would be given
one address; and the firmware that boots a machine over the network, its initial ramdisk and its system each send
another identifier and would be given three, of which no forward leads to the last. So a record is looked for

1. by client identifier and MAC,
2. by MAC alone, unless that guest has refused an address (DECLINE): then several clients do share its MAC,
3. by client identifier alone, if the machine that had it is gone: the same machine with a new MAC.

Each record is one host number of the network, and that number is the guest's in both families: host 15 is 192.168.5.15
and fd00:c0a8:5::15, the same digits. IPv4 and IPv6 run out separately; a number is free when both have.

A guest that comes back gets its old address because records outlive their leases. A new guest gets, in this order: the
address that it asks for, if that is free; the lowest number never given out that nobody uses without a lease; the
number whose lease ended longest ago; the oldest offer that nobody took up. Live leases are never taken away, so a guest
that invents MACs only delays strangers: it cycles through its own offers, and of confirmed leases one link can hold
three quarters at most.

An address that a guest declines stays out of use for ten minutes; at most a quarter of the pool does at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from netstack.core.guest_names import GuestNames, clean_name
from netstack.core.lease import MAX_CLIENT_ID, NEVER, Lease, StaticLease, mirror_host

__all__ = ["LEASE_TIME", "NEVER", "Lease", "LeaseTable", "StaticLease"]

# One day, as libslirp has it. A guest renews after half of it, so the traffic is nothing; and a guest that is gone for
# good gives its address back. Longer is not needed for a machine that is paused over a weekend: its record outlives
# the lease, others get it only when no fresh number is left, and the renewal of an expired lease is granted.
LEASE_TIME: Final = 86400

# How long an offer is kept for the guest: udhcpc and dhclient answer within seconds, and retry within a minute.
OFFER_TIME: Final = 60.0

# How long a declined address is left alone; dnsmasq's figure too.
QUARANTINE_TIME: Final = 600.0

# How many addresses in use are passed over for a new guest: one that claims them all must not keep us counting.
_IN_USE_TRIES: Final = 64

# Bounds the table and the search for the least recently used, whatever the size of the network.
MAX_LEASES: Final = 1024

# The first number that is given out when the network is large enough; slirp's and Lima's.
FIRST_HOST: Final = 15

# Distance of the IPv6 addresses that a guest tries when it finds ::15 taken. Beyond 0x65534, the largest number that
# mirrors an IPv4 host number of a /16, so that no two records meet.
ALTERNATE_STEP: Final = 0x100000


@dataclass(slots=True)
class LeaseTable:
    """The pool of one network and who holds what. The one owner of leases.

    network and prefix6 are the network addresses (prefix6 is a /64, or None when there is no IPv6); reserved are the
    addresses never given out (the gateway's). `version` grows with every change that a restart should remember.
    is_present(mac) says whether that guest is on a link now, is_in_use(address, mac) whether a guest with another MAC
    uses an IPv4 address. on_event(what, lease) is called with "offered", "bound",
    "renewed", "released", "declined"; it must not raise.
    """

    network: bytes
    prefix_length: int
    reserved: Iterable[bytes] = ()
    prefix6: bytes | None = None
    statics: Iterable[StaticLease] = ()
    lease_time: float = LEASE_TIME
    is_present: Callable[[bytes], bool] = lambda mac: True
    is_in_use: Callable[[bytes, bytes], bool] = lambda address, mac: False
    on_event: Callable[[str, Lease], None] | None = None
    version: int = 0
    first: int = field(init=False)
    last: int = field(init=False)
    _by_host: dict[int, Lease] = field(init=False, default_factory=dict)
    _by_address6: dict[bytes, Lease] = field(init=False, default_factory=dict)
    _by_mac: dict[bytes, list[Lease]] = field(init=False, default_factory=dict)
    _by_client_id: dict[bytes, list[Lease]] = field(init=False, default_factory=dict)
    # What nobody took up, and what was declined: both in the order in which they end.
    _offers: dict[int, Lease] = field(init=False, default_factory=dict)
    _quarantined: dict[int, Lease] = field(init=False, default_factory=dict)
    _names: GuestNames = field(init=False, default_factory=GuestNames)
    # What the settings give to whom: guests by MAC, and the MACs that host numbers and IPv6 addresses belong to.
    _static_by_mac: dict[bytes, StaticLease] = field(init=False, default_factory=dict)
    _static_hosts: dict[int, bytes] = field(init=False, default_factory=dict)
    _static_addresses6: dict[bytes, bytes] = field(init=False, default_factory=dict)
    # Addresses outside the network that the settings give, and who has them. Such a record takes a host number as any
    # other does, for the IPv6 address that goes with it.
    _outside: set[bytes] = field(init=False, default_factory=set)
    _by_outside: dict[bytes, Lease] = field(init=False, default_factory=dict)
    _reserved_hosts: set[int] = field(init=False, default_factory=set)
    # Bit n: the number first + n has no record, and is nobody's by the settings.
    _fresh: int = field(init=False, default=0)
    # No confirmed lease ends before this.
    _none_ends_before: float = field(init=False, default=NEVER)

    def __post_init__(self) -> None:
        size = 1 << (32 - self.prefix_length)
        # 0 is the network, the last one is broadcast. In a network too small for number 15 the pool begins at 1: the
        # reserved addresses are skipped anyway.
        self.first = FIRST_HOST if size > FIRST_HOST + 1 else 1
        self.last = min(size - 2, self.first + MAX_LEASES - 1)
        self._reserved_hosts = {host for address in self.reserved if (host := self._host_of(address)) is not None}
        self.set_statics(self.statics)

    def set_statics(self, statics: Iterable[StaticLease]) -> None:
        """Replace the static leases. Records that they contradict go away when their guests ask the next time."""
        self._static_by_mac = {static.mac: static for static in statics}
        given = list(self._static_by_mac.values())
        hosts = [(self._host_of(static.address or b""), static.mac) for static in given]
        self._static_hosts = {host: mac for host, mac in hosts if host is not None}
        self._outside = {static.address for static in given if static.address and self._host_of(static.address) is None}
        self._static_addresses6 = {static.address6: static.mac for static in given if static.address6 is not None}
        self._names.statics = {name: static.mac for static in given if (name := clean_name(static.name))}
        self._fresh = 0
        for host in range(self.first, self.last + 1):
            if host not in self._by_host:
                self._mark_fresh(host)
        self._none_ends_before = NEVER  # of those that the settings kept, one may have
        for lease in self._by_host.values():
            outside = self._is_outside(lease.mac, lease.address)
            lease.static = outside or self._static_hosts.get(lease.host) == lease.mac
            if lease.static or lease.host in self._static_hosts:
                # Else a stranger would be given it, as the oldest offer.
                self._offers.pop(lease.host, None)
            elif not lease.confirmed and lease.host not in self._quarantined:
                self._offers.setdefault(lease.host, lease)

    # What others ask about guests.

    def __iter__(self) -> Iterator[Lease]:
        return iter(sorted(self._by_host.values(), key=lambda lease: lease.host))

    def __len__(self) -> int:
        return len(self._by_host)

    def live(self, now: float) -> list[Lease]:
        """Give the leases that guests hold now, by host number."""
        return [lease for lease in self if lease.is_live(now)]

    def find_address(self, address: bytes) -> Lease | None:
        """Give the record of an address of either family, live or not."""
        if len(address) == 4:
            host = self._host_of(address)
            return self._by_outside.get(address) if host is None else self._by_host.get(host)
        return self._by_address6.get(address)

    def owner_of(self, address: bytes, now: float) -> bytes | None:
        """Give the MAC of the guest that holds this address of either family now, or has it in the settings."""
        lease = self.find_address(address)
        if lease is not None and lease.is_live(now):
            return lease.mac
        host = self._host_of(address)
        return None if host is None else self._static_hosts.get(host)

    def is_outside(self, lease: Lease) -> bool:
        """Whether its address is not one of the network's: the host's, which may be another one tomorrow."""
        return self._host_of(lease.address) is None

    def find_mac(self, mac: bytes) -> Lease | None:
        """Give the record of a guest, live or not; the one used last if it has several."""
        return max(self._by_mac.get(mac, ()), key=Lease.free_at, default=None)

    def find_name(self, name: str, now: float) -> Lease | None:
        """Give the live lease of the guest with this name (one label, any case)."""
        return self._names.find(name, now)

    # What the servers do. Each gives the lease, or None when the guest cannot have it.

    def offer(
        self, mac: bytes, now: float, *, client_id: bytes = b"", requested: bytes | None = None, link: str = ""
    ) -> Lease | None:
        """Choose an address and hold it for the guest, for a minute unless it takes it up (DISCOVER, SOLICIT)."""
        lease = self._find(mac, client_id, now)
        if lease is None or not self._still_fits(lease):
            lease = self._allocate(mac, now, requested, link)
            if lease is None:
                return None
        self._claim(lease, mac, client_id, link)
        lease.expires_at = max(lease.expires_at, now + OFFER_TIME)
        self._offered(lease)
        return lease

    def bind(
        self, mac: bytes, address: bytes, now: float, *, client_id: bytes = b"", name: str = "", link: str = ""
    ) -> Lease | None:
        """Give the guest this very IPv4 address (REQUEST in all its forms), or None when it cannot have it.

        A guest without a record gets any free address that it asks for: nobody else serves this network, so an unknown
        guest is one whose lease was forgotten, and need not start over.
        """
        lease = self._find(mac, client_id, now)
        if lease is None or not self._still_fits(lease):
            lease = self._create_asked(mac, address, now, link)
            if lease is None:
                return None
        elif lease.address != address:
            return None
        self._claim(lease, mac, client_id, link)
        renewed = lease.is_live(now)
        lease.expires_at = now + self.lease_time
        self._confirm(lease, name, now, renewed)
        return lease

    def _create_asked(self, mac: bytes, address: bytes, now: float, link: str) -> Lease | None:
        """Make the record of a guest that is not known and asks for this address, if it can have it."""
        if self._is_outside(mac, address):
            return self._allocate(mac, now, None, link)
        host = self._host_of(address)
        wanted = self._static_by_mac.get(mac)
        if host is None or (wanted is not None and wanted.address not in (None, address)):
            return None
        if not self._is_free(host, now, mac) or self._is_greedy(link, now):
            return None
        return self._create(host, mac, now)

    def bind6(
        self, mac: bytes, now: float, *, duid: bytes = b"", name: str = "", link: str = "", commit: bool = True
    ) -> Lease | None:
        """Give the guest its IPv6 address (REQUEST, RENEW, SOLICIT); with commit false only hold it for a minute."""
        if self.prefix6 is None:
            return None
        lease = self._find(mac, b"", now)
        if lease is None or not self._still_fits(lease):
            lease = self._allocate(mac, now, None, link)
            if lease is None:
                return None
        self._claim(lease, mac, b"", link)
        lease.duid = duid[:MAX_CLIENT_ID] or lease.duid
        if commit:
            renewed = lease.is_live(now)
            lease.expires6_at = now + self.lease_time
            self._confirm(lease, name, now, renewed)
        else:
            lease.expires6_at = max(lease.expires6_at, now + OFFER_TIME)
            self._offered(lease)
        return lease

    def release(self, mac: bytes, address: bytes, now: float) -> Lease | None:
        """End a lease at the guest's word (RELEASE). The record stays, so that the guest gets the address again."""
        lease = self.find_address(address)
        if lease is None or lease.mac != mac:
            return None
        if (lease.expires_at if len(address) == 4 else lease.expires6_at) <= now:
            return lease  # over already: a guest that says so for ever has nothing written
        if len(address) == 4:
            lease.expires_at = now
        else:
            lease.expires6_at = now
        self._none_ends_before = min(self._none_ends_before, now)
        self.version += 1
        self._tell("released", lease)
        return lease

    def decline(self, mac: bytes, address: bytes, now: float) -> Lease | None:
        """Take an address out of use because the guest found another machine there (DECLINE)."""
        lease = self.find_address(address)
        if lease is None or lease.mac != mac:
            return None
        if len(address) == 16:
            return self._decline6(lease, now)
        if lease.static:
            # The settings say who has this address; all there is to do is to tell.
            self._tell("declined", lease)
            return lease
        # First: declined once more, it must not be what makes room for itself.
        self._unlist(lease)
        if len(self._quarantined) >= max(1, (self.last - self.first + 1) // 4):
            self._forget(next(iter(self._quarantined.values())))
        lease.expires_at = lease.expires6_at = min(lease.free_at(), now)
        lease.quarantined_until = now + QUARANTINE_TIME
        lease.confirmed = False
        self._quarantined[lease.host] = lease
        self.version += 1
        self._tell("declined", lease)
        return lease

    def _decline6(self, lease: Lease, now: float) -> Lease:
        """Give the record another IPv6 address. There are enough of them, so the guest keeps its IPv4 address."""
        static = self._static_by_mac.get(lease.mac)
        if lease.address6 is not None and (static is None or static.address6 is None):
            other = self._find_free6(int.from_bytes(lease.address6, "big"))
            self._drop_index(lease)
            lease.address6 = other
            self._add_index(lease)
            lease.expires6_at = min(lease.expires6_at, now)
            self._none_ends_before = min(self._none_ends_before, now)
        self._tell("declined", lease)
        return lease

    def restore(self, old: Lease, now: float) -> bool:
        """Take a confirmed record back after a restart: its guest, name and times. False when it fits no longer."""
        host = self._host_of(old.address)
        if host is None or host in self._by_host or not self._is_free(host, now, old.mac):
            return False
        lease = self._create(host, old.mac, now)
        self._claim(lease, old.mac, old.client_id, "")
        lease.duid = old.duid[:MAX_CLIENT_ID]
        # A clock that was set back in between must not prolong a lease beyond its full time.
        lease.expires_at = min(old.expires_at, now + self.lease_time)
        lease.expires6_at = min(old.expires6_at, now + self.lease_time)
        lease.confirmed = True
        self._unlist(lease)
        self._none_ends_before = min(self._none_ends_before, lease.free_at())
        self._names.give(lease, old.name, now)
        return True

    def withdraw_offer(self, mac: bytes, client_id: bytes, now: float) -> None:
        """Forget what was offered: the guest took another server's offer (RFC 2131 4.3.2, SELECTING)."""
        lease = self._find(mac, client_id, now)
        if lease is not None and not lease.confirmed:
            self._forget(lease)

    # How it is found out.

    def _find(self, mac: bytes, client_id: bytes, now: float) -> Lease | None:
        """Give the record of this guest, by the three rules of the head of this file."""
        client_id = client_id[:MAX_CLIENT_ID]
        own = [lease for lease in self._by_mac.get(mac, ()) if lease.quarantined_until <= now]
        same = [lease for lease in own if lease.client_id == client_id]
        if same:
            return max(same, key=Lease.free_at)
        if own and len(own) == len(self._by_mac[mac]):
            return max(own, key=Lease.free_at)
        if client_id and mac not in self._static_by_mac:
            for lease in self._by_client_id.get(client_id, ()):
                # A machine that is on a link keeps its record: the other one is its clone.
                gone = lease.free_at() <= now or not self.is_present(lease.mac)
                if lease.mac != mac and gone and not lease.static and lease.quarantined_until <= now:
                    return lease
        return None

    def _still_fits(self, lease: Lease) -> bool:
        """Whether the settings still allow this record; forgets it otherwise."""
        wanted = self._static_by_mac.get(lease.mac)
        fits = self._static_hosts.get(lease.host, lease.mac) == lease.mac
        fits &= wanted is None or wanted.address in (None, lease.address)
        fits &= wanted is None or wanted.address6 in (None, lease.address6)
        fits &= self._host_of(lease.address) is not None or self._is_outside(lease.mac, lease.address)
        if not fits:
            self._forget(lease)
        return fits

    def _allocate(self, mac: bytes, now: float, requested: bytes | None, link: str) -> Lease | None:
        """Find a host number for a guest without a record, in the order that the head of this file gives."""
        static = self._static_by_mac.get(mac)
        if static is not None and static.address is not None and static.address not in self._outside:
            host = self._host_of(static.address)
            if host is None:
                return None
            if host in self._by_host:
                # Somebody got it before the settings said otherwise. That guest's renewal will be refused.
                self._forget(self._by_host[host])
            return self._create(host, mac, now)
        if self._is_greedy(link, now):
            return None
        host = self._host_of(requested) if requested is not None else None
        if host is not None and self._is_free(host, now, mac):
            return self._create(host, mac, now)
        for unconfirmed in (self._offers, self._quarantined):
            # They are not worth remembering once they are over.
            while unconfirmed and (lease := next(iter(unconfirmed.values()))).free_at() <= now:
                self._forget(lease)
        if self._fresh:
            return self._create(self._choose_fresh(mac), mac, now)
        oldest = self._find_expired(now) or next(iter(self._offers.values()), None)
        return None if oldest is None else self._create(oldest.host, mac, now)

    def _is_outside(self, mac: bytes, address: bytes) -> bool:
        """Whether the settings give this guest this address, which is not one of the network's."""
        static = self._static_by_mac.get(mac)
        return address in self._outside and static is not None and static.address == address

    def _address_of(self, host: int) -> bytes:
        return (int.from_bytes(self.network, "big") + host).to_bytes(4, "big")

    def _choose_fresh(self, mac: bytes) -> int:
        """The lowest fresh number whose address no other guest uses without a lease (RFC 2131 3.1: SHOULD probe)."""
        first = fresh = self._fresh
        for _ in range(_IN_USE_TRIES):
            host = self.first + (fresh & -fresh).bit_length() - 1
            if not self.is_in_use(self._address_of(host), mac):
                return host
            fresh &= fresh - 1
            if not fresh:
                break
        return self.first + (first & -first).bit_length() - 1

    def _find_expired(self, now: float) -> Lease | None:
        """Give the confirmed record whose lease ended longest ago. Looks through all of them only when one may have."""
        if now < self._none_ends_before:
            return None
        kept = self._static_hosts
        confirmed = (lease for lease in self._by_host.values() if lease.confirmed and lease.host not in kept)
        oldest = min(confirmed, key=Lease.free_at, default=None)
        if oldest is not None and oldest.free_at() <= now:
            return oldest
        self._none_ends_before = oldest.free_at() if oldest is not None else now
        return None

    def _is_free(self, host: int, now: float, mac: bytes) -> bool:
        """Whether this number may go to this guest, at its own wish."""
        static = self._static_by_mac.get(mac)
        if static is not None and static.address is not None:
            return self._host_of(static.address) == host
        if not self.first <= host <= self.last or host in self._reserved_hosts or host in self._static_hosts:
            return False
        lease = self._by_host.get(host)
        return lease is None or (lease.free_at() <= now and not lease.static)

    def _is_greedy(self, link: str, now: float) -> bool:
        """Whether a link already holds so many leases that its next one would come out of the others' share."""
        size = self.last - self.first + 1
        if not link or (len(self._by_host) - len(self._offers)) * 4 < size * 3:
            return False
        return sum(lease.link == link and lease.is_live(now) for lease in self._by_host.values()) * 4 >= size * 3

    def _host_of(self, address: bytes) -> int | None:
        """Give the host number of an IPv4 address, None when it is not one of this network's hosts."""
        host = int.from_bytes(address, "big") - int.from_bytes(self.network, "big")
        return host if len(address) == 4 and 0 < host < (1 << (32 - self.prefix_length)) - 1 else None

    def _create(self, host: int, mac: bytes, now: float) -> Lease:
        """Make the record of a host number, in place of an expired one."""
        if host in self._by_host:
            self._forget(self._by_host[host])
        static = self._static_by_mac.get(mac)
        address = self._address_of(host)
        if static is not None and static.address in self._outside:
            address = static.address or address
        lease = Lease(host, address, self._choose6(host, static), mac)
        lease.static = static is not None and static.address is not None
        self._by_host[host] = lease
        if self.first <= host <= self.last:
            self._fresh &= ~(1 << (host - self.first))
        if not lease.static:
            self._offers[host] = lease
        self._add_index(lease)
        return lease

    def _choose6(self, host: int, static: StaticLease | None) -> bytes | None:
        """Give the IPv6 address that goes with a host number, or the one in the settings."""
        if static is not None and static.address6 is not None:
            if static.address6 in self._by_address6:
                self._forget(self._by_address6[static.address6])
            return static.address6
        if self.prefix6 is None:
            return None
        return self._find_free6(int.from_bytes(self.prefix6, "big") + mirror_host(host))

    def _find_free6(self, number: int) -> bytes:
        """Give the first IPv6 address that is nobody's: this one, or one in steps behind it."""
        while (address := number.to_bytes(16, "big")) in self._by_address6 or address in self._static_addresses6:
            number += ALTERNATE_STEP
        return address

    def _claim(self, lease: Lease, mac: bytes, client_id: bytes, link: str) -> None:
        """Write down who the record belongs to now, and keep the indexes right."""
        client_id = client_id[:MAX_CLIENT_ID] or lease.client_id
        if (lease.mac, lease.client_id) != (mac, client_id):
            self._drop_index(lease)
            lease.mac, lease.client_id = mac, client_id
            self._add_index(lease)
        lease.link = link or lease.link

    def _offered(self, lease: Lease) -> None:
        if not lease.confirmed and not lease.static:
            # To the end: the order is that in which they end.
            self._unlist(lease)
            self._offers[lease.host] = lease
        self._tell("offered", lease)

    def _unlist(self, lease: Lease) -> None:
        """Take a record off the lists of those that are unconfirmed."""
        self._offers.pop(lease.host, None)
        self._quarantined.pop(lease.host, None)

    def _confirm(self, lease: Lease, name: str, now: float, renewed: bool) -> None:
        lease.confirmed = True
        self._unlist(lease)
        self._none_ends_before = min(self._none_ends_before, lease.free_at())
        self._names.give(lease, name, now)
        self.version += 1
        self._tell("renewed" if renewed else "bound", lease)

    def _forget(self, lease: Lease) -> None:
        del self._by_host[lease.host]
        self._unlist(lease)
        self._names.drop(lease)
        self._drop_index(lease)
        self._mark_fresh(lease.host)
        self.version += lease.confirmed

    def _mark_fresh(self, host: int) -> None:
        """Have the number given out, unless the settings keep it."""
        if self.first <= host <= self.last and host not in self._reserved_hosts and host not in self._static_hosts:
            self._fresh |= 1 << (host - self.first)

    def _add_index(self, lease: Lease) -> None:
        if lease.address6 is not None:
            self._by_address6[lease.address6] = lease
        if lease.address in self._outside:
            self._by_outside[lease.address] = lease
        self._by_mac.setdefault(lease.mac, []).append(lease)
        if lease.client_id:
            self._by_client_id.setdefault(lease.client_id, []).append(lease)

    def _drop_index(self, lease: Lease) -> None:
        if lease.address6 is not None:
            del self._by_address6[lease.address6]
        if self._by_outside.get(lease.address) is lease:
            del self._by_outside[lease.address]
        for index, key in ((self._by_mac, lease.mac), (self._by_client_id, lease.client_id)):
            if not key:
                continue
            rest = [other for other in index[key] if other is not lease]
            if rest:
                index[key] = rest
            else:
                del index[key]

    def _tell(self, what: str, lease: Lease) -> None:
        if self.on_event is not None:
            self.on_event(what, lease)
