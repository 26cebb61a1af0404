"""A gateway that gives addresses and nothing else, on one end of a veth pair: for real DHCP clients and a real kernel.

Run inside a network namespace of its own: `unshare -n python -m tests.rim.address_wire DIRECTORY COMMAND...`. It makes
the pair, runs the command with the guest's end (guest0) up, answers it through a packet socket, and ends when the
command does. What the servers counted is written to DIRECTORY/counters.json.
"""

from __future__ import annotations

import json
import random
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from netstack.core.dhcp import DhcpServer
from netstack.core.dhcpv6 import Dhcpv6Server
from netstack.core.leases import LeaseTable
from netstack.core.ndp import NDP_TYPES, NdpMessage, NdpResponder
from netstack.wire.ethernet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, write_ethernet
from netstack.wire.ipv4 import parse_ipv4, write_ipv4
from netstack.wire.ipv6 import parse_ipv6, write_ipv6
from netstack.wire.udp import write_udp

MAC = bytes.fromhex("5255c0a80502")
GATEWAY = bytes((192, 168, 5, 2))
DNS = bytes((192, 168, 5, 3))
PREFIX = bytes.fromhex("fd00c0a800050000") + bytes(8)
LINK_LOCAL = bytes.fromhex("fe800000000000005055c0fffea80502")
UDP = 17
ICMP6 = 58

SET_UP = """
ip link set lo up
ip link add gateway0 type veth peer name guest0
ip link set guest0 address 52:54:00:12:34:56 mtu 9000
sysctl -qw net.ipv6.conf.gateway0.disable_ipv6=1
ip link set gateway0 mtu 9000 up
ip link set guest0 up
"""


class AddressWire:
    """The servers, and the packet socket that they speak through."""

    def __init__(self) -> None:
        self.leases = LeaseTable(bytes((192, 168, 5, 0)), 24, reserved=(GATEWAY, DNS), prefix6=PREFIX)
        search = ("netstack.internal", "corp.example")
        self.dhcp = DhcpServer(
            self.leases, GATEWAY, (DNS,), 4000, domain="netstack.internal", search=search, ntp=(GATEWAY,)
        )
        dns6 = PREFIX[:15] + b"\x03"
        self.dhcpv6 = Dhcpv6Server(self.leases, MAC, dns=(dns6,), search=search)
        own = (LINK_LOCAL, PREFIX[:15] + b"\x02", dns6)
        self.ndp = NdpResponder(MAC, LINK_LOCAL, own, PREFIX, random.random, mtu=4000, dns=(dns6,), search=search)
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self.wire.bind(("gateway0", 0))

    def run_until(self, process: subprocess.Popen[bytes]) -> None:
        """Answer until the process has ended and nothing of it is left to be read."""
        waiting = True
        while process.poll() is None or waiting:
            now = time.monotonic()
            for message in self.ndp.on_timer(now):
                self.send6(message)
            waiting = bool(select.select([self.wire], [], [], 0.05)[0])
            if waiting:
                frame, source = self.wire.recvfrom(65536)
                if source[2] != socket.PACKET_OUTGOING:
                    self.on_frame(frame, time.monotonic())

    def on_frame(self, frame: bytes, now: float) -> None:
        mac = frame[6:12]
        ethertype = int.from_bytes(frame[12:14], "big")
        if ethertype == ETHERTYPE_IPV4:
            packet = parse_ipv4(frame, 14, len(frame))
            if packet is not None and packet.protocol == UDP:
                at = packet.payload_start
                if frame[at + 2 : at + 4] == b"\0\x43":
                    self.on_dhcp(frame[at + 8 : packet.payload_end], mac, now)
        elif ethertype == ETHERTYPE_IPV6:
            packet6 = parse_ipv6(frame, 14, len(frame))
            if packet6 is None:
                return
            at = packet6.payload_start
            body = frame[at : packet6.payload_end]
            if packet6.protocol == ICMP6 and body[0] in NDP_TYPES:
                for message in self.ndp.on_icmp6(packet6.src, packet6.dst, packet6.ttl, body, mac, now):
                    self.send6(message)
            elif packet6.protocol == UDP and body[2:4] == b"\x02\x23":
                answer = self.dhcpv6.answer(body[8:], mac, packet6.src, now)
                if answer is not None:
                    datagram = write_udp(LINK_LOCAL, packet6.src, 547, 546, answer)
                    self.send(mac, write_ipv6(LINK_LOCAL, packet6.src, UDP, len(datagram)) + datagram)

    def on_dhcp(self, payload: bytes, mac: bytes, now: float) -> None:
        reply = self.dhcp.answer(payload, mac, now)
        if reply is not None:
            datagram = write_udp(GATEWAY, reply.dst_address, 67, 68, reply.payload)
            self.send(reply.dst_mac, write_ipv4(GATEWAY, reply.dst_address, UDP, len(datagram)) + datagram)

    def send6(self, message: NdpMessage) -> None:
        head = write_ipv6(message.src, message.dst, ICMP6, len(message.body), ttl=255)
        self.send(message.dst_mac, head + message.body)

    def send(self, mac: bytes, packet: bytes) -> None:
        ethertype = ETHERTYPE_IPV4 if packet[0] >> 4 == 4 else ETHERTYPE_IPV6
        self.wire.send(write_ethernet(mac, MAC, ethertype) + packet)


def main(directory: Path, command: list[str]) -> int:
    subprocess.run(["sh", "-ec", SET_UP], check=True)
    wire = AddressWire()
    process = subprocess.Popen(command)
    wire.run_until(process)
    counters = wire.dhcp.counters + wire.dhcpv6.counters
    (directory / "counters.json").write_text(json.dumps(counters))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
