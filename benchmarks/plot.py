"""The picture of a run: one panel a group of figures, one bar a peer. matplotlib is imported only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.figures import (
    ARROW,
    connections_metric,
    cpu_metric,
    format_figure,
    round_trip_metric,
    tcp_metric,
    udp_metric,
    vm_tcp_metric,
)
from benchmarks.peers import LARGE, SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.figures import Figures

DIRECTIONS = ("up", "down")
COLOURS = {
    "netstack": "#1b6ac9",
    "netstack-tap": "#0b3c75",
    "netstack-vhost": "#5aa9f0",
    "passt": "#e08214",
    "slirp4netns": "#7f7f7f",
    "pasta": "#f4b26b",
    "qemu-user": "#b3b3b3",
}


@dataclass(frozen=True)
class Panel:
    """One diagram: groups of bars, each with its label and the key of its figure."""

    title: str
    unit: str
    groups: list[tuple[str, str]]
    logarithmic: bool = False


def make_panels(figures: Figures) -> list[Panel]:
    """Those that have something to show."""
    panels = [
        Panel(
            f"TCP, MTU {mtu} (higher is better)",
            "Gbit/s",
            [
                (
                    f"{ARROW[direction]}\n{streams} stream{'s' if streams > 1 else ''}",
                    tcp_metric(direction, mtu, streams).key,
                )
                for streams in (1, 8)
                for direction in DIRECTIONS
            ],
        )
        for mtu in (LARGE, SMALL)
    ]
    panels.append(
        Panel(
            "TCP in a virtual machine (higher is better)",
            "Gbit/s",
            [
                (f"{ARROW[direction]}\nMTU {mtu}", vm_tcp_metric(direction, mtu).key)
                for mtu in (SMALL, LARGE)
                for direction in DIRECTIONS
            ],
        )
    )
    panels.append(
        Panel(
            "Round trip (lower is better)",
            "µs",
            [
                (f"{protocol.upper()}, {size} B\n{which}", round_trip_metric(protocol, size, which).key)
                for protocol, size in (("tcp", 1), ("udp", 100))
                for which in ("p50", "p99")
            ],
            logarithmic=True,
        )
    )
    panels.append(
        Panel(
            "Connections (higher is better)",
            "1/s",
            [("one after another", connections_metric(1).key), ("16 at once", connections_metric(16).key)],
        )
    )
    offered = sorted(
        {float(key.split(".", 2)[2].removesuffix(".delivered")) for key in figures.samples if is_delivered(key)}
    )
    panels.append(
        Panel(
            "UDP datagrams of 1,400 bytes that arrived (higher is better)",
            "1/s",
            [
                (f"{ARROW[direction]}\n{gbits:g} Gbit/s offered", udp_metric(direction, gbits, "delivered").key)
                for direction in DIRECTIONS
                for gbits in offered
            ],
        )
    )
    panels.append(
        Panel(
            "CPU of the network process, 1 stream (lower is better)",
            "CPU s/GB",
            [
                (f"{ARROW[direction]}\nMTU {mtu}", cpu_metric(direction, mtu).key)
                for mtu in (LARGE, SMALL)
                for direction in DIRECTIONS
            ],
        )
    )
    return [panel for panel in panels if any(figures.samples.get(key) for _, key in panel.groups)]


def is_delivered(key: str) -> bool:
    return key.startswith("udp.") and key.endswith(".delivered")


def write_plot(figures: Figures, path: Path, caption: str) -> None:
    """Draw the picture; nothing when there is nothing to show. Raises ImportError where matplotlib is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = make_panels(figures)
    if not panels:
        return
    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 0.5 + 3.9 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        peers = [
            peer for peer in figures.peers() if any(figures.median(key, peer) is not None for _, key in panel.groups)
        ]
        width = 0.84 / len(peers)
        for place, peer in enumerate(peers):
            spots = [group + (place - (len(peers) - 1) / 2) * width for group in range(len(panel.groups))]
            heights = [figures.median(key, peer) or 0.0 for _, key in panel.groups]
            bars = axis.bar(spots, heights, width * 0.94, label=peer, color=COLOURS.get(peer), log=panel.logarithmic)
            labels = [format_figure(height) if height else "" for height in heights]
            axis.bar_label(bars, labels=labels, fontsize=6.5, padding=1)
        axis.set_title(panel.title, fontsize=11)
        axis.set_ylabel(panel.unit)
        axis.set_xticks(range(len(panel.groups)), [label for label, _ in panel.groups], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
