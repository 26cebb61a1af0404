"""The tables of datagram flows: who may have how many, and which one goes when there are too many.

Flows are kept in order of use, with a resolution of one second, so that the hot path need not touch the order for
every datagram. When there are too many, the least recently used goes; it is taken from the link that exceeds its
share, or at the overall limit from the link that has the most flows, so that no guest can evict another's. The unit
is the link, because a guest can lie about its addresses and its MAC, but not about the link it sits on.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from netstack.core.datagrams import RESOLUTION, DatagramFlow, Stack, format_endpoint
from netstack.core.ports import READABLE, Buffer, DatagramSocket, Link

# No more descriptors, in this process or on the host.
_NO_DESCRIPTOR = frozenset((errno.EMFILE, errno.ENFILE))

# Room for what is received in one wakeup. The largest datagram, or what the kernel merges into one, is 64 KiB
# (RFC 768: a length field of 16 bits), and there must be that much room to receive at all.
LARGEST = 65536
_SCRATCH = 4 * LARGEST


F = TypeVar("F", bound=DatagramFlow)


class DatagramFlows(Generic[F]):
    """All flows of one protocol, by guest address and port: the hot path looks into `flows` itself."""

    def __init__(self, stack: Stack, protocol: str) -> None:
        self.stack = stack
        self.protocol = protocol
        self.flows: dict[tuple[bytes, int], F] = {}
        # Of each link, its flows, least recently used first.
        self._shares: dict[Link, OrderedDict[tuple[bytes, int], F]] = {}
        # What one flow receives from the host in one wakeup; one buffer for all, since it is passed on at once.
        self.scratch = memoryview(bytearray(_SCRATCH))

    def limit(self) -> int:
        """How many flows there may be."""
        raise NotImplementedError

    def share(self) -> int:
        """How many flows one link may have."""
        raise NotImplementedError

    def open_socket(self, flow: F) -> DatagramSocket:
        """The host socket for this flow. Raises OSError."""
        raise NotImplementedError

    def on_open_failed(self, error: OSError) -> str:
        """The reason under which to count this, without the protocol's name."""
        return "no_socket"

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[F]:
        return iter(self.flows.values())

    def add(self, flow: F, dst: bytes, dst_port: int, payload: Buffer, now: float) -> bool:
        """Open the flow's socket and take it in; others may have to go. When that cannot be done, tell the guest."""
        link = flow.link
        own = self._shares.get(link)
        if own is not None and len(own) >= self.share():
            self._evict(own, now)
        elif self.flows and len(self.flows) >= self.limit():
            most = max(self._shares.values(), key=len)
            self._evict(own if own is not None and len(own) >= len(most) else most, now)
        error = self._try_open(flow)
        if error is not None and error.errno in _NO_DESCRIPTOR and link in self._shares:
            self._evict(self._shares[link], now)
            error = self._try_open(flow)
        stack = self.stack
        if error is not None:
            flow.refuse(error.errno or 0, 0, dst, dst_port, payload, 1, self.on_open_failed(error))
            return False
        flow.peer = (dst, dst_port)
        flow.opened_at = flow.used_at = now
        key = (flow.guest, flow.port)
        self.flows[key] = flow
        self._shares.setdefault(link, OrderedDict())[key] = flow
        stack.poller.register(flow.sock.fileno(), flow, READABLE)
        stack.timers.arm(flow, now + flow.timeout + RESOLUTION)
        events = stack.events
        if events is not None and events.debug:
            events.flow_opened(self.protocol, format_endpoint(flow.guest, flow.port), format_endpoint(*flow.peer))
        return True

    def _try_open(self, flow: F) -> OSError | None:
        try:
            flow.sock = self.open_socket(flow)
        except OSError as error:
            return error
        return None

    def touch(self, flow: F, now: float) -> None:
        """The flow is in use; to be called when its used_at is older than RESOLUTION."""
        flow.used_at = now
        self._shares[flow.link].move_to_end((flow.guest, flow.port))

    def move(self, flow: F, link: Link) -> None:
        """The guest is behind another link now."""
        key = (flow.guest, flow.port)
        self._leave_share(flow)
        flow.link = link
        self._shares.setdefault(link, OrderedDict())[key] = flow
        flow.on_drained(flow.used_at)  # the other link may not be congested

    def close(self, flow: F, now: float, why: str) -> None:
        """Close the flow's socket and forget it."""
        if flow.closed:
            return
        flow.closed = True
        stack = self.stack
        stack.timers.cancel(flow)
        stack.poller.unregister(flow.sock.fileno())
        flow.sock.close()
        del self.flows[flow.guest, flow.port]
        self._leave_share(flow)
        events = stack.events
        if events is not None and events.debug:
            guest, peer = format_endpoint(flow.guest, flow.port), format_endpoint(*flow.peer)
            events.flow_closed(self.protocol, guest, peer, why, flow.bytes_from_guest, flow.bytes_to_guest)

    def close_link(self, link: Link, now: float) -> None:
        """The link is gone, and with it the guests behind it."""
        for flow in list(self._shares.get(link, {}).values()):
            self.close(flow, now, "link closed")

    def close_all(self, now: float) -> None:
        """The stack ends."""
        for flow in list(self.flows.values()):
            self.close(flow, now, "shutdown")

    def _evict(self, share: OrderedDict[tuple[bytes, int], F], now: float) -> None:
        self.stack.counters.drop(f"{self.protocol}_flow_evicted")
        self.close(next(iter(share.values())), now, "evicted")

    def _leave_share(self, flow: F) -> None:
        share = self._shares[flow.link]
        del share[flow.guest, flow.port]
        if not share:
            del self._shares[flow.link]
