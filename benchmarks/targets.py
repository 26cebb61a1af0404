"""The speed that netstack must reach, each with its source: issue 2 (the stream link), issue 3 (offload, many flows).

A target is a bound on a figure: a factor of a peer's figure for the same thing in the same run, or a plain number. One
whose figures were not measured in a run is not judged in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers import LARGE, SMALL

if TYPE_CHECKING:
    from benchmarks.figures import Figures

ISSUE_2, ISSUE_3 = "issue 2", "issue 3"


@dataclass(frozen=True)
class Target:
    """`subject`'s figure for `key` is at least (or at most) `bound` times the best of `against`, or `bound` itself."""

    key: str
    at_least: bool
    bound: float
    against: tuple[str, ...]
    source: str
    subject: str = "netstack"

    def words(self) -> str:
        best = " or ".join(self.against)
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{' ' + best if best else ''}"


@dataclass(frozen=True)
class Verdict:
    """A target that was judged: the value is the ratio, or the figure itself."""

    target: Target
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.target.bound if self.target.at_least else self.value <= self.target.bound


def _at_least(key: str, bound: float, *against: str, source: str, subject: str = "netstack") -> Target:
    return Target(key, at_least=True, bound=bound, against=against, source=source, subject=subject)


def _at_most(key: str, bound: float, *against: str, source: str, subject: str = "netstack") -> Target:
    return Target(key, at_least=False, bound=bound, against=against, source=source, subject=subject)


TARGETS: tuple[Target, ...] = (
    _at_least(f"tcp.up.{LARGE}.1", 0.7, "passt", source=ISSUE_2),
    _at_least(f"tcp.down.{LARGE}.1", 0.7, "passt", source=ISSUE_2),
    _at_least(f"tcp.up.{LARGE}.1", 1.4, "slirp4netns", source=ISSUE_2),
    _at_least(f"tcp.down.{LARGE}.1", 1.2, "slirp4netns", source=ISSUE_2),
    _at_least(f"tcp.up.{SMALL}.1", 1.5, "slirp4netns", source=ISSUE_2),
    _at_least(f"tcp.down.{SMALL}.1", 0.8, "slirp4netns", source=ISSUE_2),
    _at_most("rr.tcp.1.p50", 1.5, "passt", source=ISSUE_2),
    _at_most("idle.1000.ratio", 1.2, source=ISSUE_2),
    _at_most("idle.1000.bytes", 6.0, source=ISSUE_2),
    _at_most("start.ready", 0.5, source=ISSUE_2),
)


def judge(figures: Figures) -> list[Verdict]:
    """Every target that this run has the figures for."""
    verdicts = []
    for target in TARGETS:
        value: float | None
        if target.against:
            # Against the better of several peers: the ratio that is hardest to reach.
            ratios = [figures.ratio(target.key, target.subject, peer) for peer in target.against]
            present = [ratio for ratio in ratios if ratio is not None]
            value = (min(present) if target.at_least else max(present)) if present else None
        else:
            value = figures.median(target.key, target.subject)
        if value is not None:
            verdicts.append(Verdict(target, value))
    return verdicts
