"""A network as gvproxy's API shows it (`control.gvproxy_api.GvproxySource`)."""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from netstack.control.gvproxy import GvproxyForwards, GvproxyZones
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.gateway.network import Network

# gVisor's counters that gvproxy shows. Those which have no meaning here stay 0, so that a program finds them.
_IP = (
    "PacketsReceived InvalidDestinationAddressesReceived InvalidSourceAddressesReceived PacketsDelivered PacketsSent "
    "OutgoingPacketErrors MalformedPacketsReceived MalformedFragmentsReceived"
).split()
_TCP = (
    "ActiveConnectionOpenings PassiveConnectionOpenings CurrentEstablished CurrentConnected EstablishedResets "
    "EstablishedClosed EstablishedTimedout ListenOverflowSynDrop ListenOverflowAckDrop ListenOverflowSynCookieSent "
    "ListenOverflowSynCookieRcvd ListenOverflowInvalidSynCookieRcvd FailedConnectionAttempts ValidSegmentsReceived "
    "InvalidSegmentsReceived SegmentsSent SegmentSendErrors ResetsSent ResetsReceived Retransmits FastRecovery "
    "SACKRecovery SlowStartRetransmits FastRetransmit Timeouts"
).split()
_UDP = (
    "PacketsReceived UnknownPortErrors ReceiveBufferErrors MalformedPacketsReceived PacketsSent PacketSendErrors"
).split()


class GvproxyView:
    """The network for gvproxy's clients."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.forwards = GvproxyForwards(network.forwards)
        self.zones = GvproxyZones(network.dns_view, str(ip_address(network.addresses.gateway)))
        self._numbers: dict[str, int] = {}  # of links, by name

    def leases(self) -> dict[str, str]:
        """Address -> MAC, the gateway's own included."""
        network = self._network
        now = time.monotonic()
        found = {str(ip_address(network.addresses.gateway)): format_mac(network.addresses.mac)}
        for lease in network.leases.live(now):
            found[str(ip_address(lease.address))] = format_mac(lease.mac)
        return found

    def cam(self) -> dict[str, int]:
        """MAC -> the number of its link."""
        macs = self._network.stack.switch.macs()
        present = {link.name for link in macs.values()}
        self._numbers = {name: number for name, number in self._numbers.items() if name in present}
        for name in sorted(present - self._numbers.keys()):
            taken = set(self._numbers.values())
            self._numbers[name] = next(number for number in range(len(taken) + 1) if number not in taken)
        return {format_mac(mac): self._numbers[link.name] for mac, link in macs.items()}

    def stats(self) -> dict[str, Any]:
        """What gVisor counts, as far as we count it."""
        stack, counters = self._network.stack, self._network.stack.counters
        links = self._network.links
        ip, tcp, udp = dict.fromkeys(_IP, 0), dict.fromkeys(_TCP, 0), dict.fromkeys(_UDP, 0)
        ip["PacketsReceived"] = ip["PacketsDelivered"] = counters.frames_from_guest
        ip["PacketsSent"] = sum(link.frames_to_guest for link in links)
        tcp["PassiveConnectionOpenings"] = counters.tcp_opened
        tcp["CurrentEstablished"] = tcp["CurrentConnected"] = len(stack.flows)
        tcp["EstablishedClosed"] = counters.tcp_closed
        tcp["EstablishedTimedout"] = tcp["Timeouts"] = counters.tcp_timeouts
        tcp["FailedConnectionAttempts"] = counters.tcp_refused
        tcp["ResetsSent"] = counters.tcp_resets_sent
        tcp["Retransmits"] = counters.tcp_retransmits
        tcp["FastRetransmit"] = counters.tcp_fast_retransmits
        return {
            "BytesSent": sum(link.bytes_to_guest for link in links),
            "BytesReceived": sum(link.bytes_from_guest for link in links),
            "UnknownProtocolRcvdPackets": 0,
            "MalformedRcvdPackets": 0,
            "DroppedPackets": sum(counters.drops.values()),
            "IP": ip,
            "TCP": tcp,
            "UDP": udp,
        }
