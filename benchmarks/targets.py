"""The speed that netstack must reach, each with its source: issues 2 (stream), 3 (offload, many), 4 (DNS), 6 (proxy).

A target is a bound on a figure: a factor of another figure of the same run (a peer's, or netstack's own for something
else), or a plain number. One whose figures were not measured in a run is not judged in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.figures import connections_metric as crr
from benchmarks.figures import (
    dns_metric,
    forward_metric,
    idle_metric,
    pace_metric,
    proxy_metric,
    round_trip_metric,
    start_metric,
    tcp_metric,
    udp_metric,
    udp_most_metric,
    vm_tcp_metric,
)
from benchmarks.peers import LARGE, NETSTACK, SMALL, TAP_LINK, VHOST_LINK

if TYPE_CHECKING:
    from benchmarks.figures import Figures, Metric

ISSUE_2, ISSUE_3, ISSUE_4, ISSUE_5, ISSUE_6 = "issue 2", "issue 3", "issue 4", "issue 5", "issue 6"
PACE = 2000  # connections a second
MANY = 10_000  # idle connections


@dataclass(frozen=True)
class Target:
    """`subject`'s figure for `key` is at least (or at most) `bound` times the best of `against`, or `bound` itself.

    `base`: the key of the figure that it is set against, where that is another one; `words` says what that is.
    """

    key: str
    at_least: bool
    bound: float
    against: tuple[str, ...]
    source: str
    subject: str = NETSTACK
    base: str = ""
    words: str = ""

    def describe(self) -> str:
        sign = "≥" if self.at_least else "≤"
        best = self.words or " or ".join(self.against)
        return f"{sign} {self.bound:g}{' × ' + best if best else ''}"


@dataclass(frozen=True)
class Verdict:
    """A target that was judged: the value is the ratio, or the figure itself; `other` what it was set against."""

    target: Target
    value: float
    figure: float
    other: float | None

    @property
    def met(self) -> bool:
        return self.value >= self.target.bound if self.target.at_least else self.value <= self.target.bound


def _at_least(
    metric: Metric, bound: float, *against: str, subject: str = NETSTACK, base: Metric | None = None, words: str = ""
) -> Target:
    return Target(metric.key, True, bound, against, ISSUE_3, subject, base.key if base else "", words)


def _at_most(metric: Metric, bound: float, *against: str, subject: str = NETSTACK) -> Target:
    return Target(metric.key, False, bound, against, ISSUE_3, subject)


def _issue_2(metric: Metric, bound: float, *against: str, at_least: bool = True) -> Target:
    return Target(metric.key, at_least, bound, against, ISSUE_2)


def _dns(which: str, bound: float, *against: str, at_least: bool = False) -> Target:
    return Target(dns_metric(which).key, at_least, bound, against, ISSUE_4, TAP_LINK)


def _forward(which: str, bound: float, *against: str, at_least: bool = False, subject: str = NETSTACK) -> Target:
    return Target(forward_metric(which).key, at_least, bound, against, ISSUE_5, subject)


def _proxy(which: str, bound: float, *, at_least: bool = False, subject: str = NETSTACK) -> Target:
    return Target(proxy_metric(which).key, at_least, bound, (), ISSUE_6, subject)


_OWN_STREAM = "its stream link at MTU 65520"

TARGETS: tuple[Target, ...] = (
    _issue_2(tcp_metric("up", LARGE, 1), 0.7, "passt"),
    _issue_2(tcp_metric("down", LARGE, 1), 0.7, "passt"),
    _issue_2(tcp_metric("up", LARGE, 1), 1.4, "slirp4netns"),
    _issue_2(tcp_metric("down", LARGE, 1), 1.2, "slirp4netns"),
    _issue_2(tcp_metric("up", SMALL, 1), 1.5, "slirp4netns"),
    _issue_2(tcp_metric("down", SMALL, 1), 0.8, "slirp4netns"),
    _issue_2(round_trip_metric("tcp", 1, "p50"), 1.5, "passt", at_least=False),
    _issue_2(idle_metric("ratio", 1000), 1.2, at_least=False),
    _issue_2(idle_metric("bytes", 1000), 6.0, at_least=False),
    _issue_2(start_metric("ready"), 0.5, at_least=False),
    # A tap with offload, against the two whose guests are on a tap too.
    _at_least(tcp_metric("up", SMALL, 1), 5.0, "slirp4netns", "pasta", subject=TAP_LINK),
    _at_least(tcp_metric("down", SMALL, 1), 3.0, "slirp4netns", "pasta", subject=TAP_LINK),
    _at_most(round_trip_metric("tcp", 1, "p50"), 1.3, "slirp4netns", subject=TAP_LINK),
    # QEMU's stream link.
    _at_least(tcp_metric("up", LARGE, 1), 1.0, "passt"),
    _at_least(tcp_metric("down", LARGE, 1), 0.9, "passt"),
    _at_least(tcp_metric("up", SMALL, 1), 2.5, "passt", "slirp4netns"),
    _at_least(tcp_metric("down", SMALL, 1), 1.0, "passt", "slirp4netns"),
    *(
        _at_least(tcp_metric(way, mtu, 8), 0.8, NETSTACK, base=tcp_metric(way, mtu, 1), words="its own with 1 stream")
        for mtu in (LARGE, SMALL)
        for way in ("up", "down")
    ),
    # vhost-user in a real guest, at MTU 1500.
    _at_least(vm_tcp_metric("up", SMALL), 2.5, "qemu-user", subject=VHOST_LINK),
    _at_least(vm_tcp_metric("down", SMALL), 1.5, "qemu-user", subject=VHOST_LINK),
    *(
        _at_least(
            vm_tcp_metric(way, SMALL), 1.0, NETSTACK, subject=VHOST_LINK, base=vm_tcp_metric(way, LARGE),
            words=_OWN_STREAM,
        )
        for way in ("up", "down")
    ),
    # Connections and datagrams.
    _at_least(crr(1), 0.7, "passt"),
    _at_least(crr(16), 0.7, "passt"),
    *(_at_least(udp_most_metric(way), 1.0, subject=TAP_LINK) for way in ("up", "down")),
    *(_at_most(udp_metric(way, 0.5, "loss"), 0.1, subject=TAP_LINK) for way in ("up", "down")),
    # DNS: answers of the gateway's own beside the same queries relayed to a caching dnsmasq on the host.
    _dns("rate", 1.0, "dnsmasq", at_least=True),
    _dns("rate", 8000, at_least=True),
    _dns("cached", 1.0, "dnsmasq"),
    _dns("added", 0.3),
    _dns("flood.queries", 9900, at_least=True),  # the rest may have been lost before it came to us
    _dns("flood", 64),
    _dns("hosts", 1.0),
    # Forwards. passt's is set against ours by what of a guest's own connection is left ("the same ratio").
    _forward("tcp.in", 0.9, "slirp4netns", at_least=True),
    _forward("tcp.in", 0.9, "slirp4netns", at_least=True, subject=TAP_LINK),
    _forward("share", 0.9, "passt", at_least=True),
    _forward("connect.p50", 300, subject=TAP_LINK),
    _forward("udp.lost", 0.0, subject=TAP_LINK),
    _forward("open", 2.0, subject=TAP_LINK),
    # Two ticks of the clock that counts CPU time (USER_HZ): the difference of two counts is no more exact.
    _forward("idle.cpu", 20, subject=TAP_LINK),
    # The gateway's proxy. The bound of `many` is ours: "500 concurrent CONNECTs" names no time.
    *(
        _proxy(f"share.{way}", 0.6, at_least=True, subject=subject)
        for subject in (TAP_LINK, NETSTACK)
        for way in ("up", "down")
    ),
    *(_proxy("first.added", 1000, subject=subject) for subject in (TAP_LINK, NETSTACK)),
    *(_proxy("many", 2.0, subject=subject) for subject in (TAP_LINK, NETSTACK)),
    # Many flows. The bounds of "without growth" are ours: 5 % of memory, 20 % of latency, 1 % of the rate.
    _at_least(pace_metric("rate", PACE), 0.99 * PACE),
    _at_most(pace_metric("failed", PACE), 0),
    _at_most(pace_metric("growth", PACE), 1.05),
    _at_most(pace_metric("slowing", PACE), 1.2),
    _at_most(idle_metric("ratio", MANY), 1.2),
    _at_most(idle_metric("bytes", MANY), 4.0),
    # 10 ms in 10 s would be 0.1 us a second for each of 10,000.
    _at_most(idle_metric("cpu", MANY), 10),
)  # fmt: skip


def judge(figures: Figures) -> list[Verdict]:
    """Every target that this run has the figures for."""
    verdicts = []
    for target in TARGETS:
        figure = figures.median(target.key, target.subject)
        if figure is None:
            continue
        if not target.against:
            verdicts.append(Verdict(target, figure, figure, None))
            continue
        # Against the better of several peers: the ratio that is hardest to reach.
        ratios = {
            peer: ratio
            for peer in target.against
            if (ratio := figures.ratio(target.key, target.subject, peer, target.base or target.key)) is not None
        }
        if ratios:
            choose = min if target.at_least else max
            hardest = choose(ratios, key=lambda peer: ratios[peer])
            other = figures.median(target.base or target.key, hardest)
            verdicts.append(Verdict(target, ratios[hardest], figure, other))
    return verdicts
