"""ICMP and ICMPv6 from guests: echo for the gateway, echo to the world, errors. Neighbor discovery is elsewhere.

Echo to one of the gateway's addresses is answered here, also when the host's loopback is out of the guests' reach: it
is the gateway that was asked.

Echo to the world goes through ping sockets of the host, which need no privilege (Linux: SOCK_DGRAM with IPPROTO_ICMP,
net/ipv4/ping.c). One socket stands for one (guest address, identifier); the kernel gives it an identifier of its own,
and what comes back gets the guest's again, in replies and in what ICMP errors quote. TTLs are carried and errors come
from whoever sent them, so that a traceroute with echo requests works. `core.datagrams` says the rest.

Where the host forbids ping sockets (Linux: net.ipv4.ping_group_range), guests get "administratively prohibited".

Counted as dropped, besides what `core.datagrams` lists for "ping": icmp_malformed, icmp_unsupported, ping_forbidden (no
ping sockets here), ping_unexpected (the host handed out something other than an echo reply), icmp_error_from_guest,
udp_refused_by_guest (such an error about a UDP flow that is there).
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from netstack.core.addresses import Addresses
from netstack.core.datagram_table import DatagramFlows
from netstack.core.datagrams import BURST, RESOLUTION, DatagramFlow, Stack
from netstack.core.ports import Buffer, DatagramSocket, Link
from netstack.core.udp import UdpFlows
from netstack.wire.icmp import (
    ECHO_REPLY,
    ECHO_REPLY6,
    ECHO_REQUEST,
    ECHO_REQUEST6,
    HEADER_LENGTH,
    NO_ROUTE,
    PORT_UNREACHABLE,
    TTL_EXCEEDED,
    UNREACHABLE,
    UNREACHABLE6,
    Icmp,
    is_error,
    is_error6,
    parse_icmp,
    parse_icmp6,
    parse_quoted,
    write_echo,
    write_echo6,
)
from netstack.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Ipv4, write_ipv4
from netstack.wire.ipv6 import PROTOCOL_ICMPV6, Ipv6, write_ipv6

# RFC 5508 REQ-2: an ICMP query session must not expire in less than 60 seconds.
IDLE = 60.0


class IcmpStack(Stack, Protocol):
    """What ICMP asks of the stack besides."""

    @property
    def addresses(self) -> Addresses: ...
    @property
    def udp(self) -> UdpFlows: ...
    def on_syn_refused(self, guest: bytes, guest_port: int, peer: bytes, peer_port: int, seq: int) -> bool: ...


class PingFlow(DatagramFlow):
    """Echo requests of one guest with one identifier (`port`)."""

    __slots__ = ()

    protocol: ClassVar[str] = "ping"
    table: PingFlows

    def receive(self, mtu: int, now: float) -> None:
        scratch = self.table.scratch
        for _ in range(BURST):
            try:
                length, _, address, _ = self.sock.receive_from(scratch)
            except BlockingIOError:
                return
            except OSError:
                self.drain_errors()  # the echo of an ICMP error; its substance is in the queue
                continue
            self._deliver(scratch[:length], self.stack.from_host(address))
            if self.link.congested:
                return

    def _deliver(self, message: memoryview, src: bytes) -> None:
        stack = self.stack
        guest = self.guest
        if len(message) < HEADER_LENGTH or message[0] != (ECHO_REPLY if len(guest) == 4 else ECHO_REPLY6):
            stack.counters.drop("ping_unexpected")
            return
        sequence = message[6] << 8 | message[7]
        self.bytes_to_guest += len(message)
        send_reply(stack, self.link, self.mac, src, guest, self.port, sequence, message[HEADER_LENGTH:])

    def rebuild(self, dst: bytes, port: int, payload: Buffer, ttl: int) -> bytes:
        """`payload` is the echo request, with the guest's identifier or with the host's."""
        if len(payload) < HEADER_LENGTH:
            return b""
        return write_request(self.guest, dst, self.port, payload[6] << 8 | payload[7], payload[HEADER_LENGTH:], ttl)


class PingFlows(DatagramFlows[PingFlow]):
    """All ping flows."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack, "ping")
        self._warned = False

    def limit(self) -> int:
        return self.stack.limits.ping_flows

    def share(self) -> int:
        # All of them: when they are out, the link that has the most loses one.
        return self.stack.limits.ping_flows

    def open_socket(self, flow: PingFlow) -> DatagramSocket:
        return self.stack.host.open_ping(flow.guest)

    def on_open_failed(self, error: OSError) -> str:
        if not isinstance(error, PermissionError):
            return super().on_open_failed(error)
        events = self.stack.events
        if events is not None and not self._warned:
            self._warned = True
            events.warning(
                "ping_forbidden",
                "this host forbids ping sockets, so guests cannot ping beyond the gateway; on Linux, allow them with "
                "sysctl -w net.ipv4.ping_group_range='0 2147483647'",
            )
        return "forbidden"

    def on_request(
        self,
        link: Link,
        mac: bytes,
        src: bytes,
        dst: bytes,
        ident: int,
        payload: memoryview,
        ttl: int,
        dont_fragment: bool,
        now: float,
    ) -> None:
        """A guest's echo request to the world; `payload` is the whole message. Untrusted."""
        stack = self.stack
        target = stack.to_host(dst)
        if target is None or ttl <= 1:
            stack.counters.drop("ping_denied" if target is None else "ping_ttl_exceeded")
            packet = write_request(src, dst, ident, payload[6] << 8 | payload[7], payload[HEADER_LENGTH:], ttl)
            stack.send_error(link, mac, None, packet, NO_ROUTE if target is None else TTL_EXCEEDED)
            return
        flow = self.flows.get((src, ident))
        if flow is None:
            flow = PingFlow(self, link, mac, src, ident, IDLE)
            if not self.add(flow, dst, 0, payload, now):
                return
        elif flow.link is not link:
            self.move(flow, link)
        flow.mac = mac
        if now - flow.used_at >= RESOLUTION:
            self.touch(flow, now)
        try:
            flow.sock.send_to(payload, target, 0, ttl - 1, dont_fragment)
        except OSError as error:
            flow.on_send_error(error, payload, dst, target, 0, ttl - 1, dont_fragment)
            return
        flow.bytes_from_guest += len(payload)


class IcmpLayer:
    """Where the stack hands in the ICMP messages of guests."""

    def __init__(self, stack: IcmpStack) -> None:
        self._stack = stack
        self.pings = PingFlows(stack)

    def on_icmp4(
        self, link: Link, mac: bytes, packet: Ipv4 | Ipv6, buffer: memoryview, now: float, *, whole: bool = True
    ) -> None:
        """A message to a unicast address. Untrusted. `whole`: it came as one packet."""
        message = parse_icmp(buffer, packet.payload_start, packet.payload_end)
        if message is None:
            self._stack.counters.drop("icmp_malformed")
        elif message.type == ECHO_REQUEST:
            self._on_echo_request(link, mac, packet, message, buffer, whole and packet.dont_fragment, now)
        elif is_error(message.type):
            self._on_error(packet, message, buffer, PORT_UNREACHABLE.type4, PORT_UNREACHABLE.code4)
        else:
            self._stack.counters.drop("icmp_unsupported")

    def on_icmp6(
        self, link: Link, mac: bytes, packet: Ipv4 | Ipv6, buffer: memoryview, now: float, *, whole: bool = True
    ) -> None:
        """A message, not of neighbor or listener discovery, to a unicast address, or an echo request to a group.

        Untrusted. `whole`: it came as one packet, and so must not be fragmented by the host.
        """
        message = parse_icmp6(buffer, packet.payload_start, packet.payload_end)
        if message is None:
            self._stack.counters.drop("icmp_malformed")
        elif message.type == ECHO_REQUEST6:
            self._on_echo_request(link, mac, packet, message, buffer, whole, now)
        elif is_error6(message.type):
            self._on_error(packet, message, buffer, PORT_UNREACHABLE.type6, PORT_UNREACHABLE.code6)
        else:
            self._stack.counters.drop("icmp_unsupported")

    def close_link(self, link: Link, now: float) -> None:
        """The link is gone."""
        self.pings.close_link(link, now)

    def close_all(self, now: float) -> None:
        """The stack ends."""
        self.pings.close_all(now)

    def _on_echo_request(
        self,
        link: Link,
        mac: bytes,
        packet: Ipv4 | Ipv6,
        message: Icmp,
        buffer: memoryview,
        dont_fragment: bool,
        now: float,
    ) -> None:
        stack = self._stack
        src, dst = packet.src, packet.dst
        group = len(dst) == 16 and dst[0] == 0xFF
        if group or stack.is_gateway(dst):
            # RFC 4443 4.2: the answer to a request to a group comes from a unicast address.
            from_ = stack.addresses.router_for(src) if group else dst
            payload = buffer[message.payload_start : message.payload_end]
            send_reply(stack, link, mac, from_, src, message.ident, message.sequence, payload)
            return
        payload = buffer[packet.payload_start : packet.payload_end]
        self.pings.on_request(link, mac, src, dst, message.ident, payload, packet.ttl, dont_fragment, now)

    def _on_error(self, packet: Ipv4 | Ipv6, message: Icmp, buffer: memoryview, closed: int, code: int) -> None:
        """A guest complains about a packet that we delivered, or forges that; `closed`, `code`: its port. Untrusted."""
        quoted = parse_quoted(buffer, message.payload_start, message.payload_end)
        if quoted is not None and quoted.protocol == PROTOCOL_UDP and quoted.dst == packet.src:
            refused = (message.type, message.code) == (closed, code)
            self._stack.udp.on_error_from_guest(
                quoted.dst, quoted.dst_port, quoted.src, quoted.src_port, refused=refused
            )
        elif (
            quoted is None
            or quoted.protocol != PROTOCOL_TCP
            or quoted.dst != packet.src
            or message.type != (UNREACHABLE if len(packet.src) == 4 else UNREACHABLE6)
            or not self._stack.on_syn_refused(quoted.dst, quoted.dst_port, quoted.src, quoted.src_port, quoted.seq)
        ):
            self._stack.counters.drop("icmp_error_from_guest")


def write_request(src: bytes, dst: bytes, ident: int, sequence: int, payload: Buffer, ttl: int) -> bytes:
    """A whole IP packet with an echo request."""
    if len(dst) == 4:
        message = write_echo(ident, sequence, payload, reply=False)
        return write_ipv4(src, dst, PROTOCOL_ICMP, len(message), ttl=ttl) + message
    message = write_echo6(src, dst, ident, sequence, payload, reply=False)
    return write_ipv6(src, dst, PROTOCOL_ICMPV6, len(message), ttl=ttl) + message


def send_reply(
    stack: Stack, link: Link, mac: bytes, src: bytes, guest: bytes, ident: int, sequence: int, payload: Buffer
) -> None:
    """Send an echo reply to a guest."""
    if len(guest) == 4:
        message = write_echo(ident, sequence, payload, reply=True)
        stack.send_transport(link, mac, src, guest, PROTOCOL_ICMP, message)
    else:
        message = write_echo6(src, guest, ident, sequence, payload, reply=True)
        stack.send_transport(link, mac, src, guest, PROTOCOL_ICMPV6, message)
