"""The gateway's own UDP services: who takes a guest's datagram, and the short way of those that answer at once.

Theory of operation
-------------------
A service is registered for a port, of some of the gateway's addresses, or of all of them and the groups. The slow road
(`core.ingress`) finds it with `find` and hands it a Datagram; what it answers, and when, is its own affair.

A service that mostly answers within the call (DNS, from its cache) may have a second function, which is given the bytes
of a datagram and the guest's address, and gives the bytes of the answer, or None: then the datagram takes the slow
road after all. For these the stack's fast path comes here. All that is the same for one guest and one address of the
service is kept in a `_Route`: the neighbor, whose right to send from there was checked on the slow road, the frame's
front, the sums of what does not change. So such a query costs no object but its bytes and those of the answer, which
leaves with the others of the batch.

A route holds for as long as the neighbor is the one that the table has, on this link, with this MAC: whatever changes
in that makes another Neighbor. Routes are bounded, and nothing is lost with them but time. A datagram that came in
fragments, or several in one frame, takes the slow road, and so does an answer that is too long for one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import TYPE_CHECKING

from netstack.core.flows import flow_key
from netstack.core.ports import Link, UdpService
from netstack.wire.checksum import pseudo_sum, sum_words
from netstack.wire.ethernet import MIN_FRAME
from netstack.wire.ipv4 import PROTOCOL_UDP

if TYPE_CHECKING:
    from netstack.core.neighbors import Neighbor
    from netstack.core.stack import Stack

QuickAnswer = Callable[[bytes, bytes], bytes | None]
"""(payload, guest's address) -> the answer's payload, where there is one at once. Must not raise."""

# Guest addresses, times addresses that they ask at: some 600 bytes each.
_ROUTES = 4096

# A query is shorter; what is longer may come from an interface that takes more than we know (Neighbor.mtu).
_LONGEST = 512

_TTL = 64

# IPv4 behind version, length and TOS: total length 2 | identification 2, DF 2, TTL 1, protocol 1 | checksum 2 |
# addresses 8; UDP: source port 2 | destination port 2 | length 2 | checksum 2
_HEADERS4 = Struct("!H6sH8sHHHH")
_MIDDLE4 = bytes((0, 0, 0x40, 0, _TTL, PROTOCOL_UDP))
_FIXED_SUM4 = 0x4500 + 0x4000 + (_TTL << 8 | PROTOCOL_UDP)
# IPv6 behind version, class and label: payload length 2 | next header, hop limit 2 | addresses 32; UDP as above
_HEADERS6 = Struct("!H2s32sHHHH")
_MIDDLE6 = bytes((PROTOCOL_UDP, _TTL))


class _Route:
    """One address of a guest, and one address and port of a service."""

    __slots__ = ("answer", "back", "fixed_sum", "front", "high", "ipv4", "low", "neighbor", "port", "pseudo", "service")

    def __init__(
        self, answer: QuickAnswer, neighbor: Neighbor, gateway_mac: bytes, service: bytes, port: int, prefix: int
    ) -> None:
        guest = neighbor.address
        self.answer = answer
        self.neighbor = neighbor
        self.service = service
        self.port = port
        # The MACs of its frames, as the fast path has them at hand (core.headers).
        macs = gateway_mac + neighbor.mac
        self.high = int.from_bytes(macs[:8], "big")
        self.low = int.from_bytes(macs[8:], "big")
        self.ipv4 = len(guest) == 4
        first = b"\x08\x00\x45\x00" if self.ipv4 else b"\x86\xdd\x60\x00\x00\x00"
        self.front = bytes(prefix) + neighbor.mac + gateway_mac + first
        self.back = service + guest
        self.fixed_sum = _FIXED_SUM4 + sum_words(self.back)
        self.pseudo = pseudo_sum(service, guest, PROTOCOL_UDP, port)


class UdpServices:
    """All UDP services of a stack."""

    def __init__(self, stack: Stack) -> None:
        self.quick_ports: set[int] = set()
        """Ports for which the fast path may come here."""
        self._stack = stack
        self._services: dict[int, list[tuple[frozenset[bytes] | None, UdpService, QuickAnswer | None]]] = {}
        self._routes: dict[tuple[int | bytes, int], _Route] = {}

    def register(
        self, port: int, service: UdpService, addresses: Iterable[bytes] | None, quick: QuickAnswer | None
    ) -> None:
        """Have datagrams to this port taken: at these addresses, or at any of the gateway's and any group."""
        where = frozenset(addresses) if addresses is not None else None
        self._services.setdefault(port, []).append((where, service, quick))
        if quick is not None:
            self.quick_ports.add(port)

    def find(self, dst: bytes, port: int) -> UdpService | None:
        """Who takes datagrams to this address, which is the gateway's or a group's."""
        for where, service, _ in self._services.get(port, ()):
            if where is None or dst in where:
                return service
        return None

    def remember(self, link: Link, mac: bytes, src: bytes, dst: bytes, port: int) -> None:
        """A datagram to a service was admitted on the slow road: the next may take the short way."""
        neighbor = self._stack.neighbors.find(src)
        if neighbor is None or neighbor.mac != mac or neighbor.link is not link:
            return
        for where, _, quick in self._services.get(port, ()):
            if quick is not None and where is not None and dst in where:
                key = flow_key(src, 0, dst, port)
                known = self._routes.get(key)
                if known is None or known.neighbor is not neighbor:
                    if len(self._routes) >= _ROUTES:
                        self._routes.clear()
                    self._routes[key] = _Route(quick, neighbor, self._stack.mac, dst, port, link.prefix)
                return

    def receive(
        self,
        link: Link,
        high: int,
        low: int,
        addresses: int | bytes,
        ports: int,
        buffer: memoryview,
        first: int,
        last: int,
        now: float,
    ) -> bool:
        """A datagram with its payload at buffer[first:last]; False: it takes the slow road. Untrusted."""
        route = self._routes.get((addresses, ports & 0xFFFF))
        if route is None or last - first > _LONGEST or route.high != high or route.low != low:
            return False
        neighbor = route.neighbor
        stack = self._stack
        guest = neighbor.address
        if neighbor.link is not link or stack.neighbors.find(guest) is not neighbor:
            return False
        answer = route.answer(bytes(buffer[first:last]), guest)
        if answer is None:
            return False
        neighbor.seen_at = now
        guest_port = ports >> 16
        size = len(answer) + 8
        # The length counts twice: in the pseudo-header and in the header.
        check = 65535 - (route.pseudo + size + size + guest_port + sum_words(answer)) % 65535
        if route.ipv4:
            total = size + 20
            field = 65535 - (route.fixed_sum + total) % 65535
            head = _HEADERS4.pack(total, _MIDDLE4, field, route.back, route.port, guest_port, size, check)
        else:
            total = size + 40
            head = _HEADERS6.pack(size, _MIDDLE6, route.back, route.port, guest_port, size, check)
        if not MIN_FRAME - 14 <= total <= neighbor.mtu or total > link.mtu:
            stack.send_udp(link, neighbor.mac, route.service, route.port, guest, guest_port, answer)
        elif link.offload is not None:
            link.queue_frame(route.front + head + answer)
        else:
            frame = bytearray(route.front + head + answer)
            link.write_prefix(frame, total + 14)
            link.queue_frame(frame)
        return True
