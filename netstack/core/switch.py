"""The learning switch between links, and toward the gateway (IEEE 802.1D section 7.8, without spanning tree).

A MAC belongs to the link it was last seen on. Frames for the gateway's MAC go up; unicast for a known MAC goes to its
link; the rest is flooded to all other links. The table is bounded: when it is full, the link that has most MACs in it
loses the one not heard for longest. So a guest that floods MACs pushes out its own: it could otherwise have another
guest's forgotten, and take it over.

A frame whose checksum or segmentation its guest left to somebody else goes on as it is to links that take that, and
complete to others (`core.offload`).

Counted as dropped: mac_of_another_link (in use there), link_gone (the rest of a batch whose link has closed),
frame_too_big_for_link, offload_malformed.
"""

from __future__ import annotations

from netstack.core import offload
from netstack.core.counters import Counters
from netstack.core.ports import Link
from netstack.wire.ethernet import MIN_FRAME

# vde_switch's and Linux bridges' tables are of this order.
_TABLE = 4096

# IEEE 802.1D table 7-5: ageing time 300 s.
_AGEING = 300.0

# A MAC heard so recently is in use. More than the 20 s between two calls of refresh(), so that a guest in the middle of
# a transfer, whose frames take the fast path, counts as heard.
_IN_USE = 30.0


class Switch:
    """MAC -> link, and the links."""

    def __init__(self, gateway_mac: bytes, counters: Counters) -> None:
        self.links: list[Link] = []
        self._gateway_mac = gateway_mac
        self._counters = counters
        self._table: dict[bytes, tuple[Link, float]] = {}
        self._of_link: dict[Link, dict[bytes, None]] = {}  # each link's MACs, in the order last heard, roughly

    def add(self, link: Link) -> None:
        self.links.append(link)
        self._of_link[link] = {}

    def remove(self, link: Link) -> None:
        """The link is gone, and the MACs behind it."""
        if link in self.links:
            self.links.remove(link)
        for mac in self._of_link.pop(link, ()):
            del self._table[mac]

    def learn(self, mac: bytes, link: Link, now: float) -> bool:
        """`mac` sent a frame on `link`. False when that is to be dropped: it is in use on another link. Untrusted.

        A guest could otherwise take over another one's frames by sending with its MAC. One that really moves closes its
        old link, which forgets it.
        """
        entry = self._table.get(mac)
        if entry is not None and entry[0] is link and now - entry[1] < 1.0:
            return True
        own = self._of_link.get(link)
        if own is None:  # it closed, and this is the rest of its last batch
            self._counters.drop("link_gone")
            return False
        if entry is not None:
            was, heard_at = entry
            if was is not link:
                if now - heard_at < _IN_USE:
                    self._counters.drop("mac_of_another_link")
                    return False
                was.forget_macs()
            del self._of_link[was][mac]
        elif len(self._table) >= _TABLE:
            most, macs = max(self._of_link.items(), key=lambda item: len(item[1]))
            oldest = next(iter(macs))
            most.forget_macs()
            del macs[oldest]
            del self._table[oldest]
        own[mac] = None
        self._table[mac] = (link, now)
        return True

    def refresh(self) -> None:
        """Have the next frame of each guest take the slow road, which notes that it is still there. Every 20 s."""
        for link in self.links:
            link.forget_macs()

    def find(self, mac: bytes, now: float) -> Link | None:
        """The link behind which this MAC is."""
        entry = self._table.get(mac)
        if entry is None or now - entry[1] > _AGEING:
            return None
        return entry[0]

    def where(self, mac: bytes) -> Link | None:
        """Like find(), without ageing: hot paths do not refresh the table."""
        entry = self._table.get(mac)
        return entry[0] if entry else None

    def macs(self) -> dict[bytes, Link]:
        """All that is known."""
        return {mac: link for mac, (link, _) in self._table.items()}

    def forward(self, link: Link, dst: bytes, buffer: memoryview, start: int, end: int, now: float) -> None:
        """Send a frame on to the link of `dst`, or to all others when that is unknown or a group. Untrusted."""
        if len(self.links) < 2:
            return
        out = None if dst[0] & 1 else self.find(dst, now)
        if out is link:
            return  # its destination heard it already
        request = None
        if link.offload is not None and offload.has_request(buffer, start):
            request = offload.read_request(buffer, start, end)
            if request is None:
                self._counters.drop("offload_malformed")
                return
        frame = bytes(buffer[start:end])
        self._counters.frames_switched += 1
        whole: list[bytes] | None = None
        for other in (out,) if out is not None else tuple(self.links):
            if other is link:
                continue
            if request is None:
                self.send(other, frame)
            elif request.largest_packet > other.mtu:
                self._counters.drop("frame_too_big_for_link")
            elif offload.takes(other.offload, request):
                other.queue_frame(offload.write_request(request) + frame)
            else:
                if whole is None:
                    whole = offload.fulfil(frame, request)
                for each in whole:
                    self.send(other, each)

    def send(self, link: Link, frame: bytes) -> None:
        """Queue one whole frame on a link: prefix, frame, padding."""
        if len(frame) - 14 > link.mtu:
            self._counters.drop("frame_too_big_for_link")
            return
        size = max(len(frame), MIN_FRAME)
        head = bytearray(link.prefix + size)
        head[link.prefix : link.prefix + len(frame)] = frame
        link.write_prefix(head, size)
        link.queue_frame(head)
