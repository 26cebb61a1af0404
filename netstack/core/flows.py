"""The table of TCP flows, and the limits of the stack.

A key is the two addresses and the two ports as they stand in the guest's packets, so that the hot path looks a flow up
with what one unpack gave it: IPv4 `(source << 32 | destination, source port << 16 | destination port)`, IPv6 the same
with 32 bytes in place of the first integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netstack.core.ports import Link
    from netstack.core.tcp import TcpFlow

FlowKey = tuple[int | bytes, int]


def flow_key(src: bytes, src_port: int, dst: bytes, dst_port: int) -> FlowKey:
    """The key of the flow whose guest is `src`."""
    addresses = int.from_bytes(src + dst, "big") if len(src) == 4 else src + dst
    return addresses, src_port << 16 | dst_port


@dataclass(slots=True)
class Limits:
    """What a stack may hold.

    One guest, that is one link, gets at most the `_per_guest` part, so that others go on.
    """

    tcp_flows: int = 65536
    tcp_flows_per_guest: int = 32768
    udp_flows: int = 8192
    udp_flows_per_guest: int = 4096
    ping_flows: int = 256
    in_flight_bytes: int = 256 << 20  # sent to guests and not acknowledged
    for_host_bytes: int = 256 << 20  # accepted from guests and not yet taken by the host's sockets
    out_of_order_bytes: int = 64 << 20  # of guests' segments that wait for one before them, 128 more for each
    reassembly_bytes: int = 4 << 20
    neighbors: int = 4096
    forward_pending: int = 1024  # connections of all forwards that no guest has answered: each is a descriptor
    icmp_errors_per_second: int = 1000


class FlowTable:
    """Every TCP flow, by key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.tcp: dict[FlowKey, TcpFlow] = {}
        self._lingering: set[TcpFlow] = set()  # closed, but for what the host has not taken yet: see TcpFlow._linger
        self._of_link: dict[Link, int] = {}
        self._time_wait: dict[Link, dict[TcpFlow, None]] = {}  # of each link, since the longest first

    def __len__(self) -> int:
        return len(self.tcp)

    def __iter__(self) -> Iterator[TcpFlow]:
        return iter(list(self.tcp.values()))

    def count(self, link: Link) -> int:
        """How many flows this link's guest has, those that linger included."""
        return self._of_link.get(link, 0)

    def refusal(self, link: Link) -> str | None:
        """Why no further flow of this link's guest fits, as a drop reason; None when one does.

        The link is the unit, because a guest can have any number of addresses, but not of links.
        """
        if len(self.tcp) + len(self._lingering) >= self._limits.tcp_flows:
            return "tcp_flow_table_full"
        if self.count(link) >= self._limits.tcp_flows_per_guest:
            return "tcp_flows_of_guest"
        return None

    def add(self, flow: TcpFlow) -> None:
        self.tcp[flow.key] = flow
        self._of_link[flow.link] = self._of_link.get(flow.link, 0) + 1

    def remove(self, flow: TcpFlow) -> None:
        """Take the flow out; harmless when it is not in, or when another has its key by now."""
        if self.tcp.get(flow.key) is flow:
            del self.tcp[flow.key]
            self._leave(flow.link)
            self._end_time_wait(flow)

    def note_time_wait(self, flow: TcpFlow) -> None:
        """The flow is in TIME-WAIT: from now on it is what is given up first."""
        waiting = self._time_wait.setdefault(flow.link, {})
        waiting.pop(flow, None)
        waiting[flow] = None

    def oldest_time_wait(self, link: Link) -> TcpFlow | None:
        """Of this link's flows, the one that has been in TIME-WAIT the longest.

        2,000 connections a second leave 4,000 of them, and a guest that makes more is better served by a shorter wait
        than by silence (Linux does the same beyond tcp_max_tw_buckets).
        """
        return next(iter(self._time_wait.get(link, ())), None)

    def _end_time_wait(self, flow: TcpFlow) -> None:
        waiting = self._time_wait.get(flow.link)
        if waiting is not None:
            waiting.pop(flow, None)
            if not waiting:
                del self._time_wait[flow.link]

    def linger(self, flow: TcpFlow) -> None:
        """The flow leaves the table and keeps its host socket: it goes on to count, as descriptors are limited."""
        self._lingering.add(flow)
        self._of_link[flow.link] = self._of_link.get(flow.link, 0) + 1

    def end_linger(self, flow: TcpFlow) -> None:
        """Its socket is closed; harmless when it did not linger."""
        if flow in self._lingering:
            self._lingering.remove(flow)
            self._leave(flow.link)

    def drop_lingering(self) -> None:
        """The stack ends: what hosts have not taken yet they will not get."""
        for flow in list(self._lingering):
            flow.drop()

    def move(self, flow: TcpFlow, link: Link) -> None:
        """The flow's guest is on another link now; flow.link still says the old one."""
        if self.tcp.get(flow.key) is flow:
            self._leave(flow.link)
            self._of_link[link] = self._of_link.get(link, 0) + 1
            waiting = flow in self._time_wait.get(flow.link, ())
            self._end_time_wait(flow)
            if waiting:
                self._time_wait.setdefault(link, {})[flow] = None

    def _leave(self, link: Link) -> None:
        left = self._of_link[link] - 1
        if left:
            self._of_link[link] = left
        else:
            del self._of_link[link]
