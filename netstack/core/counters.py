"""What the stack counts. Plain attributes, bumped on the hot path; drops by reason in one dict, off it."""

from __future__ import annotations


class Counters:
    """Totals since start. Names are what `netstack status`, /metrics and pcap comments show."""

    __slots__ = (
        "batches",
        "drops",
        "frames_from_guest",
        "frames_slow",
        "frames_switched",
        "icmp_errors_sent",
        "noted",
        "tcp_accepted",
        "tcp_closed",
        "tcp_fast_retransmits",
        "tcp_opened",
        "tcp_refused",
        "tcp_resets_sent",
        "tcp_retransmits",
        "tcp_timeouts",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)
        self.drops: dict[str, int] = {}
        # In pcap debug mode the reason of the frame at hand, for its comment; the stack takes it after each frame.
        self.noted: str | None = None

    def drop(self, reason: str) -> None:
        """Count one frame, packet or segment that was thrown away, and why."""
        self.drops[reason] = self.drops.get(reason, 0) + 1
        self.noted = reason

    def as_dict(self) -> dict[str, int]:
        """All totals but the drops."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("drops", "noted")}
