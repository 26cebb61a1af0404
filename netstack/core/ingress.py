"""The slow road: every frame from a guest that the fast path of `core.stack` does not know.

One frame goes through four rooms: `on_frame` (Ethernet and the switch), `_on_ipv4`/`_on_ipv6` (who sent it, is it
whole, is it for us or for the world), then `_on_tcp`, `_on_udp` or ICMP. What does not fit is dropped and counted
under the name given here; nothing raises. Fragments go to `core.reassembly` and come back in as one packet.

Reasons: ethernet_short, ethernet_bad_source, ethertype_unknown, ipv4_malformed, ipv6_malformed, source_not_its_own,
beyond_scope (RFC 4007 9), fragment_* and reassembly_* (core.reassembly), not_forwarded (TCP to a group),
protocol_unknown, tcp_malformed, tcp_no_flow, tcp_no_route, tcp_flow_table_full, tcp_flows_of_guest, udp_bad_length,
offload_malformed (core.offload), ttl_exceeded.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from netstack.core.addresses import UNSPECIFIED4, UNSPECIFIED6, is_link_local6
from netstack.core.flows import flow_key
from netstack.core.offload import MAX_DATAGRAMS, has_request, read_request
from netstack.core.ports import Datagram, Link
from netstack.core.tcp import TIME_WAIT, TcpFlow
from netstack.wire import icmp
from netstack.wire.ethernet import ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from netstack.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Ipv4, parse_ipv4
from netstack.wire.ipv6 import NO_NEXT_HEADER, Ipv6, parse_ipv6
from netstack.wire.tcp import ACK, RST, SYN, Tcp, parse_options, parse_tcp, seq_gt, write_tcp
from netstack.wire.udp import parse_udp
from netstack.wire.virtio_net import HEADER_LENGTH, parse_virtio_net

if TYPE_CHECKING:
    from netstack.core.neighbors import Neighbor
    from netstack.core.stack import Stack

PROTOCOL_ICMP6 = 58
_PROTOCOL_IGMP = 2
_NO_MAC = bytes(6)
MAX_PACKET = 65535
_ARP = ETHERTYPE_ARP.to_bytes(2, "big")
_EXTENSIONS = (0, 43, 60)  # hop-by-hop, routing, destination options: what may stand before a neighbor advertisement
_ROUTER_ADVERTISEMENT = 134
_SOLICITATION = 135
_ADVERTISEMENT = 136
_REDIRECT = 137
# IEEE 802.1Q and 802.1ad tags. Linux takes a frame whose tags all say "no VLAN", 0, for one without
# (net/core/dev.c: __netif_receive_skb_core), so what stands behind them counts.
_TAGS = (0x8100, 0x88A8)

# RFC 4861 4 and RFC 2710/3810: router and neighbor discovery, redirect; multicast listener messages.
_NDP = range(133, 138)
_LISTENER = (130, 131, 132, 143)

# From the beginning of an IP packet back to that of the virtio-net header before its frame.
_TO_HEADER = 14 + HEADER_LENGTH

DHCP_SERVER = 67
DHCPV6_SERVER = 547

Packet = Ipv4 | Ipv6


class Ingress:
    """Takes frames apart that are not on the fast path."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._addresses = stack.addresses
        self._counters = stack.counters

    def on_frame(self, link: Link, buffer: memoryview, start: int, end: int, now: float) -> None:
        """One Ethernet frame. Untrusted."""
        if end - start < 14:
            self._counters.drop("ethernet_short")
            return
        stack = self._stack
        macs = bytes(buffer[start : start + 14])
        dst = macs[:6]
        src = macs[6:12]
        if src[0] & 1 or src in (stack.mac, _NO_MAC):
            self._counters.drop("ethernet_bad_source")
            return
        if not stack.switch.learn(src, link, now):
            return
        if dst == stack.mac:
            link.macs_high = int.from_bytes(macs[:8], "big")
            link.macs_low = int.from_bytes(macs[8:12], "big")
            if len(link.known_macs) < 4096:
                link.known_macs.add((link.macs_high, link.macs_low))
        else:
            if self._speaks_for_another(src, buffer, start, end):
                self._counters.drop("source_not_its_own")
                self._warn("source_not_its_own", link, "a guest speaks to others as somebody that it is not")
                if dst[0] & 1 and buffer[start + 12 : start + 14] == _ARP:
                    stack.neighbors.on_arp(link, src, buffer, start + 14, end, now)  # it hears of the conflict
                return
            stack.switch.forward(link, dst, buffer, start, end, now)
            if not dst[0] & 1:
                self._on_too_big(link, src, dst, buffer, start, end, now)
                return  # for another guest
            if self._is_for_one_host(buffer, start, end):
                # RFC 1122 3.3.6: sent to all on the wire, and to one host by IP: silently discarded by everybody, and
                # above all not answered with an error (3.2.2).
                self._counters.group_packets += 1
                return
        ethertype = macs[12] << 8 | macs[13]
        if ethertype == ETHERTYPE_IPV4:
            self._on_ipv4(link, src, buffer, start + 14, end, now)
        elif ethertype == ETHERTYPE_IPV6:
            self._on_ipv6(link, src, buffer, start + 14, end, now)
        elif ethertype == ETHERTYPE_ARP:
            stack.neighbors.on_arp(link, src, buffer, start + 14, end, now)
        else:
            self._counters.drop("ethertype_unknown")

    def _speaks_for_another(self, mac: bytes, buffer: memoryview, start: int, end: int) -> bool:
        """Whether a frame for other guests pretends to come from the gateway, or lies about who is where. Untrusted.

        Their kernels believe the last word about an address (RFC 826, RFC 4861 7.2.5): one frame, and what they send
        to the world, or to a guest that holds a lease, goes to that guest. An answer of a DHCP server, a router
        advertisement or a redirect (RFC 2131, RFC 8415, RFC 4861) has the same effect, and in this network they are the
        gateway's to send (RA-Guard, RFC 6105).
        """
        at = start + 12
        ethertype = buffer[at] << 8 | buffer[at + 1]
        while ethertype in _TAGS and end - at >= 6:
            at += 4
            ethertype = buffer[at] << 8 | buffer[at + 1]
        size = end - at
        if ethertype == ETHERTYPE_IPV4:
            if size < 22:
                return False
            ports = at + 2 + ((buffer[at + 2] & 15) << 2)
            return bytes(buffer[at + 14 : at + 18]) in self._addresses.own or (
                buffer[at + 11] == PROTOCOL_UDP
                and end - ports >= 2
                and not (buffer[at + 8] << 8 | buffer[at + 9]) & 0x1FFF
                and buffer[ports] << 8 | buffer[ports + 1] == DHCP_SERVER
            )
        if ethertype == ETHERTYPE_ARP:
            return size >= 20 and self._is_anothers(bytes(buffer[at + 16 : at + 20]), mac)
        if ethertype != ETHERTYPE_IPV6 or size < 42:
            return False
        src = bytes(buffer[at + 10 : at + 26])
        if src in self._addresses.own:
            return True
        body = at + 42
        protocol = buffer[at + 8]
        if protocol in _EXTENSIONS:
            packet = parse_ipv6(buffer, at + 2, end)
            if packet is None:
                return True  # we do not know what it says; others may read more headers than we do
            body, protocol = packet.payload_start, packet.protocol
        if protocol == PROTOCOL_UDP and end - body >= 2:
            return buffer[body] << 8 | buffer[body + 1] == DHCPV6_SERVER
        if protocol != PROTOCOL_ICMP6 or end - body < 1:
            return False
        if buffer[body] in (_ROUTER_ADVERTISEMENT, _REDIRECT):
            return True
        if buffer[body] not in (_SOLICITATION, _ADVERTISEMENT) or end - body < 24:
            return False
        about = bytes(buffer[body + 8 : body + 24]) if buffer[body] == _ADVERTISEMENT else src
        return self._is_anothers(about, mac)

    def _is_anothers(self, address: bytes, mac: bytes) -> bool:
        """Whether an address is the gateway's, or leased to another MAC.

        Where a guest has the host's address, the gateway also stands for all addresses outside the guests' network.
        """
        addresses = self._addresses
        if address in addresses.own:
            return True
        owner = self._stack.neighbors.owner_of(address)
        if owner is not None:
            return owner != mac
        if not addresses.borrowed or len(address) == 16 or address == UNSPECIFIED4:
            return False
        return not addresses.in_subnet(address)

    def _is_for_one_host(self, buffer: memoryview, start: int, end: int) -> bool:
        """Whether a frame carries an IP packet whose destination is no group. Untrusted."""
        ethertype = buffer[start + 12] << 8 | buffer[start + 13]
        if ethertype == ETHERTYPE_IPV4 and end - start >= 34:
            return not self._addresses.is_group(bytes(buffer[start + 30 : start + 34]))
        if ethertype == ETHERTYPE_IPV6 and end - start >= 54:
            return not self._addresses.is_group(bytes(buffer[start + 38 : start + 54]))
        return False

    def _on_too_big(
        self, link: Link, src: bytes, dst: bytes, buffer: memoryview, start: int, end: int, now: float
    ) -> None:
        """A frame for a guest whose link does not take it was dropped: say so, as a router would (RFC 1191, RFC 8201).

        A switch would keep silent, and datagrams between guests of different MTU would vanish for ever.
        """
        out = self._stack.switch.find(dst, now)
        size = end - start - 14
        if out is None or out is link or size <= out.mtu or size < 20:
            return
        if link.offload is not None and has_request(buffer, start):
            request = read_request(buffer, start, end)
            if request is None or request.largest_packet <= out.mtu:
                return
        if self._stack.neighbors.admit(link, src, self._source(buffer, start), now) is not None:
            original = buffer[start + 14 : end]
            self._stack.send_error(link, src, None, original, icmp.TOO_BIG, out.mtu)

    def _source(self, buffer: memoryview, start: int) -> bytes:
        """The source address of what may be an IP packet; nobody's when it is none."""
        if buffer[start + 14] >> 4 == 6:
            return bytes(buffer[start + 22 : start + 38])
        return bytes(buffer[start + 26 : start + 30])

    # ---- IP --------------------------------------------------------------------------------------------------------

    def _on_ipv4(self, link: Link, mac: bytes, buffer: memoryview, start: int, end: int, now: float) -> None:
        packet = parse_ipv4(buffer, start, end)
        if packet is None:
            self._counters.drop("ipv4_malformed")
            return
        neighbor = None
        if packet.src != UNSPECIFIED4:
            neighbor = self._admit(link, mac, packet, buffer, now)
            if neighbor is None:
                return
        elif packet.protocol != PROTOCOL_UDP:
            self._counters.drop("source_not_its_own")
            return
        if packet.more_fragments or packet.fragment_offset:
            self._on_fragment(link, mac, packet, buffer, now)
            return
        self._on_packet(link, mac, packet, neighbor, buffer, now)

    def _on_ipv6(self, link: Link, mac: bytes, buffer: memoryview, start: int, end: int, now: float) -> None:
        packet = parse_ipv6(buffer, start, end)
        if packet is None:
            self._counters.drop("ipv6_malformed")
            return
        neighbor = None
        if packet.src != UNSPECIFIED6:
            neighbor = self._admit(link, mac, packet, buffer, now)
            if neighbor is None:
                return
            if self._is_beyond_scope(packet):
                self._counters.drop("beyond_scope")
                original = buffer[packet.header_start : packet.payload_end]
                self._stack.send_error(link, mac, None, original, icmp.BEYOND_SCOPE)
                return
        elif packet.protocol != PROTOCOL_ICMP6:
            self._counters.drop("source_not_its_own")
            return
        if packet.more_fragments or packet.fragment_offset:
            self._on_fragment(link, mac, packet, buffer, now)
            return
        self._on_packet(link, mac, packet, neighbor, buffer, now)

    def _admit(self, link: Link, mac: bytes, packet: Packet, buffer: memoryview, now: float) -> Neighbor | None:
        neighbor = self._stack.neighbors.admit(link, mac, packet.src, now)
        if neighbor is None:
            self._counters.drop("source_not_its_own")
            self._warn("source_not_its_own", link, "a guest sends from an address that is not its own", packet.src)
            return None
        size = packet.payload_end - packet.header_start
        if size > neighbor.mtu and not self._segment_size(link, packet, buffer):
            neighbor.mtu = min(size, link.mtu)  # what it sends, it takes
        return neighbor

    def _segment_size(self, link: Link, packet: Packet, buffer: memoryview) -> int:
        """Of a frame that its guest left to be cut: into pieces of how many bytes. 0: it is one packet. Untrusted."""
        if link.offload is None:
            return 0
        header = parse_virtio_net(buffer, packet.header_start - _TO_HEADER)
        return header.gso_size or 1 if header.gso_type else 0

    def _warn(self, reason: str, link: Link, message: str, address: bytes | None = None) -> None:
        """Tell the log, at most every ten seconds for each reason and link."""
        events = self._stack.events
        if events is not None:
            more = {"address": str(ip_address(address))} if address is not None else {}
            events.warning(f"{reason} {link.name}", message, reason=reason, link=link.name, **more)

    def _on_fragment(self, link: Link, mac: bytes, packet: Packet, buffer: memoryview, now: float) -> None:
        whole = self._stack.reassembly.add(link, mac, packet, buffer, now)
        if whole is None:
            return
        view = memoryview(whole)
        again: Packet | None
        if len(packet.src) == 4:
            again = parse_ipv4(view, 0, len(view))
        else:
            again = parse_ipv6(view, 0, len(view))
        if again is None or again.more_fragments or again.fragment_offset:
            self._counters.drop("reassembly_malformed")
            return
        self._on_packet(link, mac, again, self._stack.neighbors.find(again.src), view, now, whole=False)

    def _on_packet(
        self,
        link: Link,
        mac: bytes,
        packet: Packet,
        neighbor: Neighbor | None,
        buffer: memoryview,
        now: float,
        *,
        whole: bool = True,
    ) -> None:
        """One whole packet from a guest that may send from its address. `whole`: it came as one packet."""
        protocol = packet.protocol
        if protocol == PROTOCOL_TCP:
            if neighbor is not None:
                self._on_tcp(link, mac, packet, neighbor, buffer, now)
        elif protocol == PROTOCOL_UDP:
            self._on_udp(link, mac, packet, buffer, now, whole=whole)
        elif protocol == PROTOCOL_ICMP and len(packet.src) == 4:
            if self._addresses.is_group(packet.dst):
                self._counters.group_packets += 1  # RFC 1122 3.2.2.6: an echo to a group may be ignored
            else:
                self._stack.icmp.on_icmp4(link, mac, packet, buffer, now, whole=whole)
        elif protocol == PROTOCOL_ICMP6 and len(packet.src) == 16:
            self._on_icmp6(link, mac, packet, buffer, now, whole=whole)
        elif protocol in (_PROTOCOL_IGMP, NO_NEXT_HEADER):
            self._counters.group_packets += 1
        else:
            self._counters.drop("protocol_unknown")
            parameter = packet.protocol_at - packet.header_start if isinstance(packet, Ipv6) else 0
            original = buffer[packet.header_start : packet.payload_end]
            self._stack.send_error(link, mac, None, original, icmp.PROTOCOL_UNREACHABLE, parameter)

    def _on_icmp6(self, link: Link, mac: bytes, packet: Packet, buffer: memoryview, now: float, *, whole: bool) -> None:
        if packet.payload_end - packet.payload_start < 4:
            self._counters.drop("icmp_malformed")
            return
        kind = buffer[packet.payload_start]
        if kind in _NDP:
            self._stack.on_ndp(link, mac, packet, buffer, now)
        elif kind in _LISTENER:
            self._counters.group_packets += 1
        elif packet.src == UNSPECIFIED6:
            self._counters.drop("source_not_its_own")
        elif packet.dst[0] == 0xFF and buffer[packet.payload_start] != icmp.ECHO_REQUEST6:
            self._counters.group_packets += 1
        else:
            self._stack.icmp.on_icmp6(link, mac, packet, buffer, now, whole=whole)

    # ---- UDP -------------------------------------------------------------------------------------------------------

    def _on_udp(self, link: Link, mac: bytes, packet: Packet, buffer: memoryview, now: float, *, whole: bool) -> None:
        datagram = parse_udp(buffer, packet.payload_start, packet.payload_end)
        if datagram is None:
            self._counters.drop("udp_bad_length")
            return
        stack = self._stack
        dst = packet.dst
        start = datagram.payload_start
        end = datagram.payload_end
        segment = self._segment_size(link, packet, buffer) if whole else 0
        if segment and end - start > segment * MAX_DATAGRAMS:
            self._counters.drop("offload_malformed")
            return
        caller = stack.udp_forwards.find(packet.src, datagram.src_port, dst, datagram.dst_port)
        if caller is not None:
            dont_fragment = packet.dont_fragment if len(dst) == 4 else whole
            view = buffer[start:end]
            stack.udp_forwards.on_datagram(caller, link, mac, view, packet.ttl, dont_fragment, now, segment)
            return
        group = self._addresses.is_group(dst)
        if group or dst in self._addresses.own:
            service = stack.udp_services.find(dst, datagram.dst_port)
            if service is not None:
                if datagram.dst_port in stack.udp_services.quick_ports:
                    stack.udp_services.remember(link, mac, packet.src, dst, datagram.dst_port)
                ports = datagram.src_port, datagram.dst_port
                for at in range(start, max(end, start + 1), segment or MAX_PACKET):
                    payload = bytes(buffer[at : min(at + (segment or MAX_PACKET), end)])
                    service(Datagram(payload, link, mac, packet.src, ports[0], dst, ports[1]), now)
                return
            if group:
                self._counters.group_packets += 1
                return
            if dst in (self._addresses.dns, self._addresses.dns6) or stack.is_protected(datagram.dst_port):
                original = buffer[packet.header_start : packet.payload_end]
                self._counters.drop("udp_no_service")
                stack.send_error(link, mac, dst, original, icmp.PORT_UNREACHABLE)
                return
        if packet.src in (UNSPECIFIED4, UNSPECIFIED6):
            self._counters.drop("source_not_its_own")
            return
        stack.udp.on_datagram(
            link,
            mac,
            packet.src,
            datagram.src_port,
            dst,
            datagram.dst_port,
            buffer,
            start,
            end,
            packet.ttl,
            packet.dont_fragment if len(dst) == 4 else whole,
            now,
            segment,
        )

    # ---- TCP -------------------------------------------------------------------------------------------------------

    def _on_tcp(
        self, link: Link, mac: bytes, packet: Packet, neighbor: Neighbor, buffer: memoryview, now: float
    ) -> None:
        segment = parse_tcp(buffer, packet.payload_start, packet.payload_end)
        if segment is None:
            self._counters.drop("tcp_malformed")
            return
        if self._addresses.is_group(packet.dst):
            self._counters.drop("not_forwarded")
            return
        stack = self._stack
        key = flow_key(packet.src, segment.src_port, packet.dst, segment.dst_port)
        flow = stack.flows.tcp.get(key)
        flags = segment.flags
        if flags & (SYN | ACK | RST) == SYN and flow is not None:
            # RFC 9293 3.10.7.4: in TIME-WAIT a SYN beyond what we have seen opens anew. CONNECTING: the guest gave up
            # on its first attempt and begins another one.
            if (flow.state == TIME_WAIT and seq_gt(segment.seq, flow.rcv_nxt)) or flow.is_superseded_by(segment.seq):
                flow.make_way(now)
                flow = None
        if flow is not None and flow.mac != mac:
            # The address has changed hands (Neighbors.admit), and nobody is left who knows of this connection.
            flow.abort(now, "guest replaced", tell_guest=False)
            flow = None
        if flow is None:
            if flags & (SYN | ACK | RST) == SYN:
                self._open_tcp(link, mac, packet, segment, neighbor, buffer, now)
            else:
                self._counters.drop("tcp_no_flow")
                self._reset(link, mac, packet, segment)
            return
        if flow.link is not link and not stack.move_flow(flow, link, mac):
            self._counters.drop("source_not_its_own")
            return
        options = None
        if flags & SYN:
            options = parse_options(buffer, segment.options_start, segment.payload_start)
            self._note_mss(neighbor, options.mss, link)
        flow.on_segment(
            segment.seq,
            segment.ack,
            flags,
            segment.window,
            buffer,
            segment.payload_start,
            packet.payload_end,
            now,
            options,
        )

    def _open_tcp(
        self,
        link: Link,
        mac: bytes,
        packet: Packet,
        segment: Tcp,
        neighbor: Neighbor,
        buffer: memoryview,
        now: float,
    ) -> None:
        """A SYN without a flow (RFC 9293 3.10.7.2)."""
        stack = self._stack
        dst = packet.dst
        if packet.ttl <= 1 and dst not in self._addresses.own:
            self._counters.drop("ttl_exceeded")
            original = buffer[packet.header_start : packet.payload_end]
            stack.send_error(link, mac, None, original, icmp.TTL_EXCEEDED)
            return
        if not segment.src_port or not segment.dst_port:
            self._counters.drop("tcp_malformed")
            return
        reason = stack.flows.refusal(link)
        if reason is not None:
            oldest = stack.flows.oldest_time_wait(link)
            if oldest is not None:
                oldest.make_way(now)
                reason = stack.flows.refusal(link)
        if reason is not None:
            self._counters.drop(reason)  # silence: the guest tries again, when flows have ended perhaps
            self._warn(reason, link, "a guest has as many connections as it may have; further ones get no answer")
            return
        options = parse_options(buffer, segment.options_start, segment.payload_start)
        self._note_mss(neighbor, options.mss, link)
        key = flow_key(packet.src, segment.src_port, dst, segment.dst_port)
        flow = TcpFlow(stack, link, mac, key, packet.src, segment.src_port, dst, segment.dst_port, now)
        stack.connect_flow(flow, segment, options, buffer[packet.header_start : packet.payload_end], now)

    def _note_mss(self, neighbor: Neighbor, mss: int | None, link: Link) -> None:
        """A guest's MSS option says what its interface takes."""
        if mss:
            size = mss + (40 if len(neighbor.address) == 4 else 60)
            if size > neighbor.mtu:
                neighbor.mtu = min(size, link.mtu)

    def _reset(self, link: Link, mac: bytes, packet: Packet, segment: Tcp) -> None:
        """RFC 9293 3.10.7.1: a segment for no connection, unless it is a reset itself."""
        flags = segment.flags
        if flags & RST:
            return
        if flags & ACK:
            seq, ack, answer = segment.ack, 0, RST
        else:
            length = packet.payload_end - segment.payload_start + (flags >> 1 & 1) + (flags & 1)
            seq, ack, answer = 0, (segment.seq + length) & 0xFFFFFFFF, RST | ACK
        self._counters.tcp_resets_sent += 1
        body = write_tcp(packet.dst, packet.src, segment.dst_port, segment.src_port, seq, ack, answer, 0)
        self._stack.send_transport(link, mac, packet.dst, packet.src, PROTOCOL_TCP, body)

    def _is_beyond_scope(self, packet: Ipv6) -> bool:
        """Whether a link-local source speaks to the world (RFC 4291 2.5.6), whose answer would have no way back."""
        addresses = self._addresses
        return is_link_local6(packet.src) and packet.dst not in addresses.own and not addresses.is_group(packet.dst)
