"""The picture of a run: one panel a group of figures, one bar a peer. matplotlib is imported only here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import ARROW, connections_metric, round_trip_metric, tcp_metric, udp_metric
from benchmarks.peers import LARGE, SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.figures import Figures

COLOURS = {
    "netstack": "#1b6ac9",
    "passt": "#e08214",
    "slirp4netns": "#7f7f7f",
    "pasta": "#f4b26b",
    "qemu-user": "#b3b3b3",
}


def panels() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """For each panel its title, its unit, and the label and the figure's key of each group of bars."""
    found = [
        (
            f"TCP, MTU {mtu} (higher is better)",
            "Gbit/s",
            [
                (
                    f"{ARROW[direction]}\n{streams} stream{'s' if streams > 1 else ''}",
                    tcp_metric(direction, mtu, streams).key,
                )
                for streams in (1, 8)
                for direction in ("up", "down")
            ],
        )
        for mtu in (LARGE, SMALL)
    ]
    found.append(
        (
            "Round trip (lower is better)",
            "µs",
            [
                (f"{protocol.upper()}, {size} B\n{which}", round_trip_metric(protocol, size, which).key)
                for protocol, size in (("tcp", 1), ("udp", 100))
                for which in ("p50", "p99")
            ],
        )
    )
    found.append(
        (
            "Connections and datagrams (higher is better)",
            "1/s",
            [
                ("connections,\none by one", connections_metric(1).key),
                ("connections,\n16 at once", connections_metric(16).key),
                ("datagrams up,\n1 Gbit/s offered", udp_metric("up", 1.0, "delivered").key),
                ("datagrams down,\n1 Gbit/s offered", udp_metric("down", 1.0, "delivered").key),
            ],
        )
    )
    return found


def write_plot(figures: Figures, path: Path, caption: str) -> None:
    """Draw latest.png. Raises ImportError where matplotlib is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [panel for panel in panels() if any(figures.samples.get(key) for _, key in panel[2])]
    if not shown:
        return
    rows = (len(shown) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 0.5 + 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (title, unit, groups) in zip(axes.flat, shown, strict=False):
        peers = [peer for peer in figures.peers() if any(figures.median(key, peer) is not None for _, key in groups)]
        width = 0.84 / max(1, len(peers))
        for place, peer in enumerate(peers):
            spots = [group + (place - (len(peers) - 1) / 2) * width for group in range(len(groups))]
            heights = [figures.median(key, peer) or 0.0 for _, key in groups]
            bars = axis.bar(spots, heights, width * 0.94, label=peer, color=COLOURS.get(peer))
            axis.bar_label(bars, labels=[f"{height:.3g}" if height else "" for height in heights], fontsize=7)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel(unit)
        axis.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
