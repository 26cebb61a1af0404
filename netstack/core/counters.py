"""What the stack counts. Plain attributes, bumped on the hot path; drops by reason in one dict, off it."""

from __future__ import annotations


class Counters:
    """Totals since start. Names are what `netstack status`, /metrics and pcap comments show."""

    def __init__(self) -> None:
        self.batches = 0  # reads of links that brought frames
        self.frames_from_guest = 0
        self.frames_slow = 0  # of these, what the fast path did not know
        self.frames_in_runs = 0  # what was taken as one with its neighbours
        self.frames_switched = 0  # from guest to guest
        self.group_packets = 0  # broadcast and multicast that the switch flooded and no service of ours wanted
        self.icmp_errors_sent = 0
        self.tcp_opened = 0
        self.tcp_closed = 0
        self.tcp_refused = 0
        self.tcp_resets_sent = 0
        self.tcp_retransmits = 0
        self.tcp_fast_retransmits = 0
        self.tcp_timeouts = 0
        self.tcp_loss_probes = 0
        self.forwarded = 0  # connections of the host's that were sent on their way to a guest
        self.drops: dict[str, int] = {}
        self._noted: str | None = None

    def drop(self, reason: str) -> None:
        """Count one frame, packet or segment that was thrown away, and why."""
        self.drops[reason] = self.drops.get(reason, 0) + 1
        self._noted = reason

    def take_note(self) -> str | None:
        """The reason of the last drop since the last call: in pcap debug mode it becomes the frame's comment."""
        reason, self._noted = self._noted, None
        return reason

    def as_dict(self) -> dict[str, int]:
        """All totals but the drops."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}
