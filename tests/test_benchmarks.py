"""The benchmarks' arithmetic: targets are judged by the ratio that is hardest to reach, and only where measured."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures, targets
from benchmarks.peers import LARGE, SMALL, TAP_LINK, VHOST_LINK

ENDPOINTS = Path(targets.__file__).with_name("endpoints.py")


def judged(taken: figures.Figures, metric: figures.Metric, subject: str, bound: float) -> targets.Verdict:
    """The one verdict on this figure of this subject with this bound."""
    (found,) = (
        verdict
        for verdict in targets.judge(taken)
        if (verdict.target.key, verdict.target.subject, verdict.target.bound) == (metric.key, subject, bound)
    )
    return found


def test_the_better_of_two_peers_is_what_counts() -> None:
    taken, metric = figures.Figures(), figures.tcp_metric("up", SMALL, 1)
    for peer, value in ((TAP_LINK, 6.0), ("slirp4netns", 1.0), ("pasta", 2.0)):
        taken.add(metric, peer, value)
    verdict = judged(taken, metric, TAP_LINK, 5.0)
    assert (verdict.value, verdict.figure, verdict.other, verdict.met) == (3.0, 6.0, 2.0, False)


def test_a_target_can_be_set_against_another_figure_of_netstack_itself() -> None:
    taken, metric = figures.Figures(), figures.vm_tcp_metric("up", SMALL)
    taken.add(metric, VHOST_LINK, 1.5)
    taken.add(figures.vm_tcp_metric("up", LARGE), "netstack", 1.0)
    verdict = judged(taken, metric, VHOST_LINK, 1.0)
    assert (verdict.value, verdict.met) == (1.5, True)


def test_ratios_are_those_of_the_same_round() -> None:
    taken, metric = figures.Figures(), figures.round_trip_metric("tcp", 1, "p50")
    # The machine became slow after the first round, for both: the medians alone would give 0.5.
    for ours, theirs in ((50, 100), (100, 100), (100, 200), (200, 200), (200, 200)):
        taken.add(metric, TAP_LINK, ours)
        taken.add(metric, "slirp4netns", theirs)
    assert judged(taken, metric, TAP_LINK, 1.3).value == 1.0


def test_what_was_not_measured_is_not_judged() -> None:
    taken = figures.Figures()
    taken.add(figures.tcp_metric("up", SMALL, 1), "slirp4netns", 1.0)  # and nothing of netstack
    assert targets.judge(taken) == []


def test_a_steady_rate_is_kept_and_measured_at_both_ends() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-I", str(ENDPOINTS)]
    with subprocess.Popen([*command, "serve", "127.0.0.1", str(port)], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            arguments = ["pace", "127.0.0.1", str(port + 1), "100", "1.2"]
            done = subprocess.run([*command, *arguments], capture_output=True, check=True, timeout=20)
        finally:
            server.terminate()
    report = json.loads(done.stdout)
    assert report["per_second"] == pytest.approx(100, rel=0.05)
    assert report["failed"] == 0
    assert 0 < report["early_p50"] < 1e6
    assert 0 < report["late_p50"] <= report["late_p99"]
