"""The DHCP server of the gateway (RFC 2131), BOOTP included.

Theory of operation
-------------------
The server is one function: a message comes in, an answer or nothing goes out. What it knows about guests is in the
LeaseTable. It is the only server of its network, so it is authoritative: a guest that asks for an address that it
cannot have is told so at once (NAK), and one that we do not know but that asks for a free address gets it, where RFC
2131 4.3.2 wants silence in case another server knows it. That lets guests go on when the leases were lost.

The four kinds of REQUEST (RFC 2131 4.3.2), told apart by what they carry:

    state        server identifier   requested address   ciaddr   answer
    SELECTING    ours                as offered          0        ACK, or NAK when it is not to be had
    SELECTING    another's           any                 0        none; our offer is withdrawn
    INIT-REBOOT  none                the former one      0        ACK or NAK
    RENEWING     none                none                its own  ACK or NAK, sent to ciaddr
    REBINDING    none                none                its own  the same: whether it came by broadcast is no matter

Answers go (RFC 2131 4.1) to ciaddr if the guest has one, else by broadcast if it asks for that, else to the address
that it is given, at its hardware address. A NAK is always broadcast.

Relayed messages (giaddr) are dropped: there is no relay agent on a link between a machine and us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from netstack.core.leases import Lease, LeaseTable
from netstack.wire.dhcp import (
    ACK,
    BOOTREPLY,
    BOOTREQUEST,
    DECLINE,
    DEFAULT_MAX_LENGTH,
    DISCOVER,
    FLAG_BROADCAST,
    INFORM,
    MIN_LENGTH,
    NAK,
    OFFER,
    OPTION_BROADCAST,
    OPTION_CLIENT_FQDN,
    OPTION_CLIENT_ID,
    OPTION_DNS,
    OPTION_DOMAIN_NAME,
    OPTION_HOST_NAME,
    OPTION_LEASE_TIME,
    OPTION_MAX_MESSAGE_SIZE,
    OPTION_MESSAGE,
    OPTION_MESSAGE_TYPE,
    OPTION_MTU,
    OPTION_NTP,
    OPTION_PARAMETER_LIST,
    OPTION_RAPID_COMMIT,
    OPTION_REQUESTED_ADDRESS,
    OPTION_ROUTER,
    OPTION_ROUTES,
    OPTION_SEARCH,
    OPTION_SERVER_ID,
    OPTION_SUBNET_MASK,
    OPTION_T1,
    OPTION_T2,
    OPTION_WPAD,
    RELEASE,
    REQUEST,
    DhcpMessage,
    Route,
    parse_dhcp,
    write_dhcp,
    write_routes,
)
from netstack.wire.domains import write_domains

SERVER_PORT: Final = 67
CLIENT_PORT: Final = 68

# What a guest whose address follows the host's is told: it renews after half of it, in seconds.
OUTSIDE_LEASE_TIME: Final = 600

_ETHERNET: Final = 1  # htype (RFC 1700, "Hardware Types")
_BROADCAST_MAC: Final = b"\xff" * 6
_BROADCAST_ADDRESS: Final = b"\xff" * 4
_NO_ADDRESS: Final = bytes(4)

# A guest may say that it takes larger messages (option 57). More than fits an Ethernet frame of 1500 we do not send, so
# that no answer needs fragments.
_MAX_LENGTH: Final = 1500 - 28

# What the guest gets whether or not it asks: without these it cannot work, or (the MTU) works at a tenth of the speed.
_ALWAYS: Final = (OPTION_SUBNET_MASK, OPTION_ROUTER, OPTION_DNS, OPTION_MTU)

# Given when asked for, and all of them to a guest that brings no parameter request list.
_ON_REQUEST: Final = (
    OPTION_HOST_NAME,
    OPTION_DOMAIN_NAME,
    OPTION_BROADCAST,
    OPTION_NTP,
    OPTION_SEARCH,
    OPTION_ROUTES,
    OPTION_WPAD,
)


class OutsideNetwork(NamedTuple):
    """Where an address belongs that is not one of the guests' network."""

    prefix_length: int
    router: bytes


class DhcpReply(NamedTuple):
    """An answer: UDP payload from the gateway's port 67 to port 68 of dst_address, in a frame to dst_mac."""

    payload: bytes
    dst_mac: bytes
    dst_address: bytes


@dataclass(slots=True)
class DhcpServer:
    """The DHCP server of one network.

    gateway is the server's own address. The other fields are what guests are told; they may be changed at any time and
    hold from the next answer on. counters counts answers by kind and drops by reason.
    """

    leases: LeaseTable
    gateway: bytes
    dns: Sequence[bytes]
    mtu: int
    domain: str = ""
    search: Sequence[str] = ()
    ntp: Sequence[bytes] = ()
    wpad: str = ""  # the URL of a proxy auto-config script
    routes: Sequence[Route] = ()
    outside: Mapping[bytes, OutsideNetwork] = field(default_factory=dict)
    """Of leases that lie outside the network, which is theirs."""
    moving: Collection[bytes] = ()
    """The MACs of guests whose address is the host's, and may be another one tomorrow."""
    counters: Counter[str] = field(default_factory=Counter)

    def answer(self, payload: bytes, mac: bytes, now: float, link: str = "") -> DhcpReply | None:
        """Answer a datagram that came to port 67 from this MAC on this link, or give None. Untrusted."""
        message = parse_dhcp(payload)
        if message is None or message.op != BOOTREQUEST or message.htype != _ETHERNET or len(message.chaddr) != 6:
            return self._drop("dhcp_malformed")
        # A group address as the hardware address would make us send to everybody.
        if message.chaddr[0] & 1 or message.chaddr == bytes(6):
            return self._drop("dhcp_malformed")
        if message.giaddr != _NO_ADDRESS:
            return self._drop("dhcp_relayed")
        # Who is on a link speaks for itself: another guest must not rename it, nor take its record over. A bridge
        # inside a guest may ask for machines whose own MAC never comes here.
        if mac != message.chaddr and self.leases.is_present(message.chaddr):
            return self._drop("dhcp_not_its_own")
        if OPTION_MESSAGE_TYPE not in message.options:
            return self._on_bootp(message, now, link)
        kind = message.byte(OPTION_MESSAGE_TYPE)
        if kind == DISCOVER:
            return self._on_discover(message, now, link)
        if kind == REQUEST:
            return self._on_request(message, now, link)
        if kind in (DECLINE, RELEASE):
            return self._on_farewell(kind, message, mac, now)
        if kind == INFORM:
            return self._on_inform(message)
        return self._drop("dhcp_malformed")

    def _on_discover(self, message: DhcpMessage, now: float, link: str) -> DhcpReply | None:
        client_id = message.options.get(OPTION_CLIENT_ID, b"")
        requested = message.address(OPTION_REQUESTED_ADDRESS)
        lease = self.leases.offer(message.chaddr, now, client_id=client_id, requested=requested, link=link)
        if lease is None:
            return self._drop("dhcp_no_address")
        if OPTION_RAPID_COMMIT in message.options:
            bound = self.leases.bind(
                message.chaddr, lease.address, now, client_id=client_id, name=_guest_name(message), link=link
            )
            if bound is not None:
                return self._grant(ACK, message, bound, {OPTION_RAPID_COMMIT: b""})
        return self._grant(OFFER, message, lease, {})

    def _on_request(self, message: DhcpMessage, now: float, link: str) -> DhcpReply | None:
        server = message.address(OPTION_SERVER_ID)
        client_id = message.options.get(OPTION_CLIENT_ID, b"")
        if server is not None and server != self.gateway:
            self.leases.withdraw_offer(message.chaddr, client_id, now)
            return self._drop("dhcp_other_server")
        requested = message.address(OPTION_REQUESTED_ADDRESS) or _NO_ADDRESS
        # In SELECTING ciaddr has to be 0. Guests that fill it in nonetheless mean what they request.
        if requested == _NO_ADDRESS or (server is None and message.ciaddr != _NO_ADDRESS):
            requested = message.ciaddr
        if requested == _NO_ADDRESS:
            return self._drop("dhcp_malformed")
        lease = self.leases.bind(
            message.chaddr, requested, now, client_id=client_id, name=_guest_name(message), link=link
        )
        if lease is None:
            return self._refuse(message, "address not available")
        return self._grant(ACK, message, lease, {})

    def _on_farewell(self, kind: int, message: DhcpMessage, mac: bytes, now: float) -> DhcpReply | None:
        """RELEASE and DECLINE, which get no answer."""
        # Nothing is asked back, so the sender of the frame has to be the guest itself: no guest ends another's lease.
        if mac != message.chaddr or message.address(OPTION_SERVER_ID) not in (None, self.gateway):
            return self._drop("dhcp_malformed")
        if kind == RELEASE:
            done = self.leases.release(mac, message.ciaddr, now)
        else:
            done = self.leases.decline(mac, message.address(OPTION_REQUESTED_ADDRESS) or _NO_ADDRESS, now)
        self.counters["dhcp_release" if kind == RELEASE else "dhcp_decline"] += done is not None
        return None

    def _on_inform(self, message: DhcpMessage) -> DhcpReply:
        """INFORM: the guest has an address and wants the rest (RFC 2131 4.3.5): no yiaddr, no times."""
        self.counters["dhcp_inform"] += 1
        lease = self.leases.find_mac(message.chaddr)
        options = self._head(ACK, message) | self._parameters(message, lease)
        return self._send(message, options, _NO_ADDRESS)

    def _on_bootp(self, message: DhcpMessage, now: float, link: str) -> DhcpReply | None:
        """Plain BOOTP (RFC 951, RFC 1497). The guest keeps the address for good, and never says so again.

        The record expires as any other; it is given to others only when every fresh number is used up.
        """
        lease = self.leases.offer(message.chaddr, now, link=link)
        if lease is not None:
            lease = self.leases.bind(message.chaddr, lease.address, now, link=link)
        if lease is None:
            return self._drop("dhcp_no_address")
        self.counters["dhcp_bootp"] += 1
        options = self._parameters(message, lease) if message.is_dhcp else {}
        return self._send(message, options, lease.address, max_length=MIN_LENGTH)

    def _grant(self, kind: int, message: DhcpMessage, lease: Lease, extra: dict[int, bytes]) -> DhcpReply:
        self.counters["dhcp_offer" if kind == OFFER else "dhcp_ack"] += 1
        seconds = OUTSIDE_LEASE_TIME if lease.mac in self.moving else int(self.leases.lease_time)
        options = self._head(kind, message)
        options[OPTION_LEASE_TIME] = seconds.to_bytes(4, "big")
        # RFC 2131 4.4.5: a half and seven eighths.
        options[OPTION_T1] = (seconds // 2).to_bytes(4, "big")
        options[OPTION_T2] = (seconds * 7 // 8).to_bytes(4, "big")
        options |= extra
        options |= self._parameters(message, lease)
        return self._send(message, options, lease.address)

    def _refuse(self, message: DhcpMessage, why: str) -> DhcpReply:
        self.counters["dhcp_nak"] += 1
        options = self._head(NAK, message)
        options[OPTION_MESSAGE] = why.encode("ascii")
        reply = DhcpMessage(BOOTREPLY, message.xid, message.chaddr, flags=message.flags, options=options)
        return DhcpReply(write_dhcp(reply), _BROADCAST_MAC, _BROADCAST_ADDRESS)

    def _head(self, kind: int, message: DhcpMessage) -> dict[int, bytes]:
        options = {OPTION_MESSAGE_TYPE: bytes((kind,)), OPTION_SERVER_ID: self.gateway}
        # RFC 6842 3: what identifies the guest comes back to it, in every answer.
        if OPTION_CLIENT_ID in message.options:
            options[OPTION_CLIENT_ID] = message.options[OPTION_CLIENT_ID]
        return options

    def _parameters(self, message: DhcpMessage, lease: Lease | None) -> dict[int, bytes]:
        """Give the options that configure the guest: what it must have, then what it asks for, in its order."""
        bits, router = self.leases.prefix_length, self.gateway
        network = int.from_bytes(self.leases.network, "big")
        outside = self.outside.get(lease.address) if lease is not None else None
        if lease is not None and outside is not None:
            bits, router = outside
            network = int.from_bytes(lease.address, "big") >> (32 - bits) << (32 - bits)
        mask = (0xFFFFFFFF << (32 - bits) & 0xFFFFFFFF).to_bytes(4, "big")
        routes = (*self.routes, Route(_NO_ADDRESS, 0, router)) if self.routes else ()
        values = {
            OPTION_SUBNET_MASK: mask,
            OPTION_ROUTER: router,
            OPTION_DNS: b"".join(self.dns),
            OPTION_HOST_NAME: lease.name.encode("ascii") if lease is not None else b"",
            OPTION_DOMAIN_NAME: self.domain.encode("ascii", "ignore"),
            OPTION_MTU: self.mtu.to_bytes(2, "big"),
            OPTION_BROADCAST: (network | (1 << (32 - bits)) - 1).to_bytes(4, "big"),
            OPTION_NTP: b"".join(self.ntp),
            OPTION_SEARCH: write_domains(self.search),
            # RFC 3442: a guest that reads this option ignores option 3, so the default route stands in it too.
            OPTION_ROUTES: write_routes(routes),
            OPTION_WPAD: self.wpad.encode("ascii", "ignore"),
        }
        asked = message.options.get(OPTION_PARAMETER_LIST)
        wanted = _ON_REQUEST if asked is None else tuple(dict.fromkeys(asked))
        return {code: values[code] for code in (*_ALWAYS, *wanted) if values.get(code)}

    def _send(
        self, message: DhcpMessage, options: dict[int, bytes], yiaddr: bytes, max_length: int | None = None
    ) -> DhcpReply:
        if max_length is None:
            # Option 57 counts the IP and UDP headers; under 576 is against RFC 2132 9.10.
            size = message.number(OPTION_MAX_MESSAGE_SIZE) or 0
            max_length = max(DEFAULT_MAX_LENGTH, min(size - 28, _MAX_LENGTH))
        reply = DhcpMessage(
            BOOTREPLY,
            message.xid,
            message.chaddr,
            flags=message.flags,
            ciaddr=message.ciaddr,
            yiaddr=yiaddr,
            options=options,
            is_dhcp=message.is_dhcp,
        )
        payload = write_dhcp(reply, max_length=max_length)
        if message.ciaddr != _NO_ADDRESS:
            return DhcpReply(payload, message.chaddr, message.ciaddr)
        if message.flags & FLAG_BROADCAST or yiaddr == _NO_ADDRESS:
            return DhcpReply(payload, _BROADCAST_MAC, _BROADCAST_ADDRESS)
        return DhcpReply(payload, message.chaddr, yiaddr)

    def _drop(self, reason: str) -> DhcpReply | None:
        self.counters[reason] += 1
        return None


def _guest_name(message: DhcpMessage) -> str:
    """Give what the guest calls itself: option 12, or else the first label of option 81. Untrusted, not cleaned."""
    name = message.options.get(OPTION_HOST_NAME, b"")
    if not name:
        # RFC 4702 2: one byte of flags, two that nobody uses; with flag E (4) the name is in wire form, else in ASCII.
        fqdn = message.options.get(OPTION_CLIENT_FQDN, b"")
        name = fqdn[3:]
        if len(fqdn) > 3 and fqdn[0] & 4:
            name = fqdn[4 : 4 + fqdn[3]]
    return name.decode("latin-1")
