"""The DHCPv6 server of the gateway (RFC 8415), with addresses and without ("stateless").

Theory of operation
-------------------
As in core.dhcp the server is one function, and the LeaseTable knows the guests, by their MAC: the IPv6 address that a
guest gets mirrors its IPv4 address. So a guest has one address, whatever identifiers (DUID, IAID) it comes with: its
first IA_NA gets it, further ones get "no addresses". Addresses are also to be had without us, by SLAAC.

SOLICIT, REQUEST, RENEW and REBIND come down to one answer: this is your address, for so long, and any other one that
you still have is over (lifetime 0). There is no "no binding" in it: nobody else serves this network, so a guest that we
do not know simply gets its address again. ADVERTISE carries the highest preference, which spares the guest its wait for
other servers (RFC 8415 18.2.1).

Which identifiers a message must and must not carry is RFC 8415 16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from netstack.core.leases import Lease, LeaseTable
from netstack.wire.dhcpv6 import (
    ADVERTISE,
    CONFIRM,
    DECLINE,
    INFORMATION_REQUEST,
    MAX_DUID,
    MIN_DUID,
    NO_ADDRESSES,
    NO_BINDING,
    NO_PREFIX,
    NOT_ON_LINK,
    OPTION_CLIENT_FQDN,
    OPTION_CLIENT_ID,
    OPTION_DNS,
    OPTION_IA_NA,
    OPTION_IA_PD,
    OPTION_IA_TA,
    OPTION_PREFERENCE,
    OPTION_RAPID_COMMIT,
    OPTION_REFRESH_TIME,
    OPTION_REQUEST_LIST,
    OPTION_SEARCH,
    OPTION_SERVER_ID,
    REBIND,
    RELEASE,
    RENEW,
    REPLY,
    REQUEST,
    SOLICIT,
    SUCCESS,
    Association,
    Dhcpv6Message,
    Options,
    parse_association,
    parse_dhcpv6,
    write_address,
    write_association,
    write_dhcpv6,
    write_duid,
    write_status,
)
from netstack.wire.domains import write_domains

SERVER_PORT: Final = 547
CLIENT_PORT: Final = 546

# The groups that guests send to: All_DHCP_Relay_Agents_and_Servers and All_DHCP_Servers (RFC 8415 7.1).
SERVER_GROUPS: Final = (
    bytes.fromhex("ff020000000000000000000000010002"),
    bytes.fromhex("ff050000000000000000000000010003"),
)

# Answers to a guest without an address of ours: how soon it should ask again (seconds). RFC 8415 21.23 takes a day
# when nothing is said; the search list may change with the host's network.
REFRESH_TIME: Final = 3600

# A guest has one interface here, and so one IA_NA. What is beyond this is not answered.
_MAX_ASSOCIATIONS: Final = 8

# Which message must carry whose identifier (RFC 8415 16.2 to 16.12): the guest's, ours.
_MUST: Final = {
    SOLICIT: (True, False),
    REQUEST: (True, True),
    CONFIRM: (True, False),
    RENEW: (True, True),
    REBIND: (True, False),
    RELEASE: (True, True),
    DECLINE: (True, True),
}


@dataclass(slots=True)
class Dhcpv6Server:
    """The DHCPv6 server of one network. The settings may be changed at any time.

    mac is the gateway's and makes the server's identifier. counters counts answers by kind and drops by reason.
    """

    leases: LeaseTable
    mac: bytes
    dns: Sequence[bytes] = ()
    search: Sequence[str] = ()
    counters: Counter[str] = field(default_factory=Counter)

    def answer(self, payload: bytes, mac: bytes, src: bytes, now: float, link: str = "") -> bytes | None:
        """Answer a datagram that came to port 547 from this MAC and address, or give None. Untrusted."""
        message = parse_dhcpv6(payload)
        # RFC 8415 17.1: guests ask from a link-local address. From elsewhere somebody reflects packets off us.
        if message is None or src[:1] != b"\xfe" or not self._is_for_us(message):
            self.counters["dhcpv6_malformed"] += 1
            return None
        if message.kind == INFORMATION_REQUEST:
            self.counters["dhcpv6_inform"] += 1
            return self._write(REPLY, message, self._parameters(message, refresh=True))
        parsed = [
            parse_association(code, data)
            for code, data in message.options
            if code in (OPTION_IA_NA, OPTION_IA_TA, OPTION_IA_PD)
        ]
        associations = [association for association in parsed if association is not None][:_MAX_ASSOCIATIONS]
        if len(associations) != len(parsed):
            self.counters["dhcpv6_malformed"] += 1
            return None
        if message.kind == CONFIRM:
            return self._confirm(message, associations)
        if message.kind in (RELEASE, DECLINE):
            return self._end(message, associations, mac, now)
        return self._assign(message, associations, mac, now, link)

    def _is_for_us(self, message: Dhcpv6Message) -> bool:
        client, server = message.option(OPTION_CLIENT_ID), message.option(OPTION_SERVER_ID)
        if client is not None and not MIN_DUID <= len(client) <= MAX_DUID:
            return False
        if message.kind == INFORMATION_REQUEST:
            return server in (None, write_duid(self.mac))
        must = _MUST.get(message.kind)
        if must is None:
            return False
        return (client is not None, server is not None) == must and server in (None, write_duid(self.mac))

    def _assign(
        self, message: Dhcpv6Message, associations: Iterable[Association], mac: bytes, now: float, link: str
    ) -> bytes:
        """SOLICIT, REQUEST, RENEW, REBIND."""
        rapid = message.kind == SOLICIT and message.option(OPTION_RAPID_COMMIT) is not None
        commit = message.kind != SOLICIT or rapid
        lease = None
        if any(association.code == OPTION_IA_NA for association in associations):
            lease = self.leases.bind6(
                mac,
                now,
                duid=message.option(OPTION_CLIENT_ID) or b"",
                name=_guest_name(message),
                link=link,
                commit=commit,
            )
        options: Options = []
        free = lease
        for association in associations:
            options.append((association.code, self._fill(association, free)))
            if association.code == OPTION_IA_NA:
                free = None
        if rapid:
            options.append((OPTION_RAPID_COMMIT, b""))
        elif message.kind == SOLICIT:
            options.append((OPTION_PREFERENCE, b"\xff"))
        self.counters["dhcpv6_reply" if commit else "dhcpv6_advertise"] += 1
        return self._write(REPLY if commit else ADVERTISE, message, options + self._parameters(message))

    def _fill(self, association: Association, lease: Lease | None) -> bytes:
        """Give the data of the IA that answers a guest's."""
        code = association.code
        if code != OPTION_IA_NA or lease is None or lease.address6 is None:
            status = (NO_PREFIX, "no prefixes here") if code == OPTION_IA_PD else (NO_ADDRESSES, "no address for this")
            return write_association(code, association.iaid, [write_status(*status)])
        seconds = int(self.leases.lease_time)
        inner = [write_address(lease.address6, seconds, seconds)]
        # What else the guest has is not its any more (RFC 8415 18.3.4, 18.3.5).
        inner += [write_address(old, 0, 0) for old in dict.fromkeys(association.addresses) if old != lease.address6]
        # RFC 8415 21.4: 0.5 and 0.8 of the preferred lifetime.
        return write_association(code, association.iaid, inner, seconds // 2, seconds * 4 // 5)

    def _confirm(self, message: Dhcpv6Message, associations: Iterable[Association]) -> bytes | None:
        """CONFIRM: does this address still belong on this link? It is no matter whose it is (RFC 8415 18.3.3)."""
        addresses = [address for association in associations for address in association.addresses]
        if not addresses or self.leases.prefix6 is None:
            return None
        prefix = self.leases.prefix6[:8]
        if all(address[:8] == prefix for address in addresses):
            status = write_status(SUCCESS, "on link")
        else:
            status = write_status(NOT_ON_LINK, "not on this link")
        self.counters["dhcpv6_confirm"] += 1
        return self._write(REPLY, message, [status])

    def _end(self, message: Dhcpv6Message, associations: Iterable[Association], mac: bytes, now: float) -> bytes:
        """RELEASE and DECLINE: always thanked for, and the IA that is not known is named (RFC 8415 18.3.7, 18.3.8)."""
        end = self.leases.release if message.kind == RELEASE else self.leases.decline
        options = [write_status(SUCCESS, "thank you")]
        for association in associations:
            # All of them, not the first that is known.
            ended = [end(mac, address, now) for address in association.addresses]
            if not any(ended):
                status = write_status(NO_BINDING, "not your address")
                options.append((association.code, write_association(association.code, association.iaid, [status])))
        self.counters["dhcpv6_release" if message.kind == RELEASE else "dhcpv6_decline"] += 1
        return self._write(REPLY, message, options)

    def _parameters(self, message: Dhcpv6Message, *, refresh: bool = False) -> Options:
        """What the guest asks for in its list; all that there is when it brings none."""
        data = message.option(OPTION_REQUEST_LIST)
        asked = None if data is None else {data[at : at + 2] for at in range(0, len(data), 2)}
        values = [(OPTION_DNS, b"".join(self.dns)), (OPTION_SEARCH, write_domains(self.search))]
        if refresh:
            values.append((OPTION_REFRESH_TIME, REFRESH_TIME.to_bytes(4, "big")))
        return [
            (code, value) for code, value in values if value and (asked is None or code.to_bytes(2, "big") in asked)
        ]

    def _write(self, kind: int, message: Dhcpv6Message, options: Options) -> bytes:
        head: Options = [(OPTION_SERVER_ID, write_duid(self.mac))]
        client = message.option(OPTION_CLIENT_ID)
        if client is not None:
            head.append((OPTION_CLIENT_ID, client))
        return write_dhcpv6(kind, message.transaction, head + options)


def _guest_name(message: Dhcpv6Message) -> str:
    """Give the first label of what the guest calls itself (RFC 4704 4: one byte of flags, a name). Untrusted."""
    data = message.option(OPTION_CLIENT_FQDN) or b""
    return data[2 : 2 + data[1]].decode("latin-1") if len(data) > 1 else ""
