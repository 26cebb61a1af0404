"""What was measured: figures by metric and peer, each a list of samples whose median counts.

A metric's key says what it is (`tcp.up.1500.8`), so that the JSON files of different versions can be compared by key.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Section = Literal[
    "tcp", "vm", "latency", "connections", "udp", "forwards", "dns", "pace", "idle", "cpu", "memory", "start", "relay",
    "micro", "proxy",
]  # fmt: skip

SECTIONS: dict[Section, str] = {
    "tcp": "TCP throughput",
    "vm": "In a virtual machine (QEMU, TCG where there is no KVM)",
    "latency": "Round trips",
    "connections": "Connections: connect, 1 byte there and back, close",
    "udp": "UDP, datagrams of 1,400 bytes",
    "forwards": "Forwards: a caller on the host, a server in the guest, MTU 65520",
    "proxy": "The gateway's proxy: CONNECT beside the guest's own connection",
    "dns": "DNS (a guest on a tap; all but ours over netstack's UDP path)",
    "pace": "Connections at a steady rate",
    "idle": "Idle connections",
    "cpu": "CPU of the network process, TCP with 1 stream",
    "memory": "Memory of the network process",
    "start": "Start",
    "relay": "What the guest's relay costs by itself",
    "micro": "The parsing path, without sockets",
}

ARROW = {"up": "guest → host", "down": "host → guest"}


COLUMNS = (
    "netstack", "netstack-tap", "netstack-vhost", "passt", "slirp4netns", "pasta", "qemu-user",
    "dnsmasq", "unbound", "upstream", "upstream, by the host",
)  # fmt: skip


def order_peers(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of the columns; those not known there come last."""
    unique = list(dict.fromkeys(names))
    return sorted(unique, key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))


def format_figure(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    key: str
    section: Section
    title: str
    unit: str
    more_is_better: bool = False


@dataclass
class Figures:
    """All samples of a run, and why some are missing."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, metric: Metric, peer: str, value: float) -> None:
        self.metrics[metric.key] = metric
        self.samples.setdefault(metric.key, {}).setdefault(peer, []).append(value)

    def fail(self, metric: Metric, peer: str, reason: str) -> None:
        self.metrics[metric.key] = metric
        self.failures.setdefault(metric.key, {})[peer] = reason

    def median(self, key: str, peer: str) -> float | None:
        samples = self.samples.get(key, {}).get(peer)
        return statistics.median(samples) if samples else None

    def ratio(self, key: str, peer: str, other: str, base: str = "") -> float | None:
        """How many times `other`'s figure `peer`'s is: the median of the ratios round by round.

        `base`: the key of `other`'s figure, where it is not the same.

        A shared machine is fast for a while and slow for a while (a round trip of the same program took 66 us and then
        136 us). Both peers of one round saw the same moment, so their ratio is steadier than that of two medians.
        """
        ours, theirs = self.samples.get(key, {}).get(peer), self.samples.get(base or key, {}).get(other)
        if not ours or not theirs or not statistics.median(theirs):
            return None
        if len(ours) == len(theirs) and all(theirs):
            return statistics.median(one / another for one, another in zip(ours, theirs, strict=True))
        return statistics.median(ours) / statistics.median(theirs)

    def peers(self) -> list[str]:
        """All peers with a figure, in the order of their columns."""
        return order_peers(peer for by_peer in self.samples.values() for peer in by_peer)


def tcp_metric(direction: str, mtu: int, streams: int) -> Metric:
    many = f"{streams} stream{'s' if streams > 1 else ''}"
    return Metric(
        f"tcp.{direction}.{mtu}.{streams}",
        "tcp",
        f"{ARROW[direction]}, MTU {mtu}, {many}",
        "Gbit/s",
        more_is_better=True,
    )


def cpu_metric(direction: str, mtu: int, *, relay: bool = False) -> Metric:
    key, section = ("relay.cpu", "relay") if relay else ("cpu", "cpu")
    title = f"{'relay beside it, ' if relay else ''}{ARROW[direction]}, MTU {mtu}"
    return Metric(f"{key}.{direction}.{mtu}", "cpu" if section == "cpu" else "relay", title, "CPU s/GB")


def round_trip_metric(protocol: str, size: int, which: str) -> Metric:
    many = f"{size} byte{'s' if size > 1 else ''}"
    return Metric(f"rr.{protocol}.{size}.{which}", "latency", f"{protocol.upper()}, {many}, {which}", "µs")


def connections_metric(concurrency: int) -> Metric:
    title = "one after another" if concurrency == 1 else f"{concurrency} at once"
    return Metric(f"crr.{concurrency}", "connections", title, "1/s", more_is_better=True)


def udp_metric(direction: str, gbits: float, which: str) -> Metric:
    offered = f"{ARROW[direction]}, {gbits:g} Gbit/s offered"
    if which == "delivered":
        return Metric(
            f"udp.{direction}.{gbits:g}.delivered", "udp", f"{offered}, delivered", "1/s", more_is_better=True
        )
    return Metric(f"udp.{direction}.{gbits:g}.loss", "udp", f"{offered}, lost", "%")


def udp_most_metric(direction: str) -> Metric:
    """The most that arrived at any of the offered rates."""
    title = f"{ARROW[direction]}, the most that was delivered"
    return Metric(f"udp.{direction}.most", "udp", title, "Gbit/s", more_is_better=True)


def vm_tcp_metric(direction: str, mtu: int) -> Metric:
    title = f"{ARROW[direction]}, MTU {mtu}, 1 stream"
    return Metric(f"vm.tcp.{direction}.{mtu}", "vm", title, "Gbit/s", more_is_better=True)


VM_ROUND_TRIP = Metric("vm.rr.tcp.1.p50", "vm", "round trip, TCP, 1 byte, p50", "µs")


def dns_metric(which: str) -> Metric:
    title, unit = {
        "rate": ("1,000 cached names, 100 queries in flight", "1/s"),
        "lost": ("of these without an answer", ""),
        "cached": ("a cached name, one query at a time, p50", "ms"),
        "missed": ("a name that nobody has asked for, one at a time, p50", "ms"),
        "added": ("a miss, less the upstream's own time without a guest", "ms"),
        "hosts": ("a hosts file of 100,000 lines is read in", "s"),
        "hosts.p99": ("cached names meanwhile, p99", "ms"),
        "hosts.max": ("cached names meanwhile, the longest", "ms"),
        "flood.queries": ("names of a silent server in flight, the most that was seen", ""),
        "flood": ("resident memory grows with these by, at most", "MiB"),
    }[which]
    return Metric(f"dns.{which}", "dns", title, unit, more_is_better=which == "rate")


def forward_metric(which: str) -> Metric:
    title, unit = {
        "tcp.in": ("caller → guest, 1 stream", "Gbit/s"),
        "tcp.out": ("guest → caller, 1 stream", "Gbit/s"),
        "flow": ("host → guest where the guest connected, beside it", "Gbit/s"),
        "share": ("caller → guest over that", "×"),
        "connect.p50": ("from connect() to accept() in the guest, p50", "µs"),
        "connect.p99": ("from connect() to accept() in the guest, p99", "µs"),
        "greeting.p50": ("from connect() to the guest's first words, p50", "µs"),
        "greeting.p99": ("from connect() to the guest's first words, p99", "µs"),
        "udp.lost": ("lost of 30,000 datagrams a second of 200 bytes", "%"),
        "udp.cpu": ("CPU for one of them", "µs"),
        "open": ("1,000 forwards are opened, one request each", "s"),
        "open.range": ("1,000 forwards are opened as one range", "s"),
        "idle.memory": ("memory of one of them", "KiB"),
        "idle.cpu": ("CPU in 10 s with 1,000 idle ones, less that without", "ms"),
    }[which]
    return Metric(f"forwards.{which}", "forwards", title, unit, more_is_better=which[:3] in ("tcp", "flo", "sha"))


def proxy_metric(which: str) -> Metric:
    title, unit = {
        "tcp.up": ("guest → host through CONNECT, 1 stream", "Gbit/s"),
        "tcp.down": ("host → guest through CONNECT, 1 stream", "Gbit/s"),
        "share.up": ("guest → host over the guest's own connection", "×"),
        "share.down": ("host → guest over the guest's own connection", "×"),
        "tcp.get": ("bodies of 64 MiB by GET, no CONNECT", "Gbit/s"),
        "share.get": ("the same over GET without the proxy", "×"),
        "first": ("from connect() through CONNECT to the server's first byte, p50", "µs"),
        "first.added": ("the same, less that without the proxy", "µs"),
        "many": ("500 tunnels asked for at once: all have answered", "s"),
    }[which]
    return Metric(f"proxy.{which}", "proxy", title, unit, more_is_better=which[:3] in ("tcp", "sha"))


def pace_metric(which: str, rate: int) -> Metric:
    title, unit = {
        "rate": (f"{rate:,} a second asked for, done", "1/s"),
        "failed": ("of these failed", ""),
        "p50.start": ("connect to close, p50, at the start", "µs"),
        "p50.end": ("connect to close, p50, at the end", "µs"),
        "p99.end": ("connect to close, p99, at the end", "µs"),
        "slowing": ("p50 at the end over that at the start", "×"),
        "rss.start": ("resident at the start", "MiB"),
        "rss.end": ("resident at the end", "MiB"),
        "growth": ("resident at the end over that at the start", "×"),
        "cpu": ("CPU for each connection", "µs"),
    }[which]
    return Metric(f"pace.{rate}.{which}", "pace", title, unit, more_is_better=which == "rate")


def memory_metric(which: str, mtu: int) -> Metric:
    title = {
        "start": "resident when started",
        "peak": "resident at most, after all of the above",
        "pss": "proportional (PSS), at the end",
    }
    return Metric(f"memory.{which}.{mtu}", "memory", f"{title[which]}, MTU {mtu}", "MiB")


def idle_metric(which: str, count: int) -> Metric:
    title, unit = {
        "bytes": (f"memory of one of {count:,} idle connections", "KiB"),
        "ratio": (f"round trip p50 with {count:,} idle connections over that without", "×"),
        "p50": (f"round trip p50 with {count:,} idle connections", "µs"),
        "cpu": (f"CPU in 10 s with {count:,} idle connections, less that without", "ms"),
    }[which]
    return Metric(f"idle.{count}.{which}", "idle", title, unit)


def start_metric(which: str) -> Metric:
    title = {"ready": "from exec to ready", "cpu": "CPU time until then"}
    return Metric(f"start.{which}", "start", title[which], "s")
