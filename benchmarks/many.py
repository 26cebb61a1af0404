"""Many connections: what idle ones cost, and whether a steady stream of short ones leaves something behind.

Idle: a fresh process, round trips without the connections, with them and without them again, the growth of its resident
memory, and its CPU time in some seconds in which nobody sends anything. Pace: short connections at a given rate for a
minute; memory and latency at its end must be what they were at its beginning. The beginning is not the very first
seconds: pools fill, and flows stay in TIME-WAIT for a while, which is no growth.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.lab import LabError, read_cpu_seconds, read_memory, stop
from benchmarks.load import ECHO_PORT, ENDPOINTS, measure_round_trips

if TYPE_CHECKING:
    from benchmarks.lab import Lab
    from benchmarks.peers import Attachment

MIB = 1024  # KiB


def read_running_ms(pid: int) -> float:
    """Milliseconds of CPU that a process took so far, threads that have ended included.

    Its CPU clock is finer than the ticks of /proc/PID/stat: clock_getcpuclockid(3), whose arithmetic is that of
    linux/posix-timers.h (CPUCLOCK_SCHED is 2).
    """
    return time.clock_gettime(~pid << 3 | 2) * 1000


@dataclass(frozen=True)
class Idle:
    """What idle connections cost: resident bytes for each, the p50 round trip with them over that without, and CPU.

    `cpu_ms`: milliseconds in the time that was watched, less those without the connections.
    """

    bytes_each: float
    round_trip_ratio: float
    round_trip: float
    cpu_ms: float | None


def measure_idle(lab: Lab, attachment: Attachment, count: int, seconds: float, watched: float = 0) -> Idle:
    """Round trips without, then with `count` connections that were used once and are held open, then without again.

    The ratio is against the mean of before and after, so that a slow drift of the machine cancels. `watched`: for how
    many seconds CPU time is looked at while nobody sends, with and without the connections; 0 leaves that out.
    """
    pid = attachment.process.pid
    before = _typical_round_trip(attachment, seconds)
    memory = read_memory(pid)
    quiet = _watch(pid, watched) if watched else 0.0
    arguments = ["hold", attachment.host_address, str(ECHO_PORT), str(count)]
    holder = lab.spawn(
        attachment.guest, [*ENDPOINTS, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise LabError(f"{count} connections could not be opened")
        grown = read_memory(pid).rss - memory.rss
        during = _typical_round_trip(attachment, seconds)
        cpu = _watch(pid, watched) - quiet if watched else None
    finally:
        stop(holder)
    after = _typical_round_trip(attachment, seconds)
    return Idle(
        bytes_each=grown * 1024 / count,
        round_trip_ratio=2 * during / (before + after),
        round_trip=during,
        cpu_ms=cpu,
    )


def _typical_round_trip(attachment: Attachment, seconds: float) -> float:
    """The median p50 of nine short runs: one in ten has another rhythm, whoever else runs on the machine."""
    return statistics.median(measure_round_trips(attachment, "tcp", 1, seconds / 3).p50 for _ in range(9))


def _watch(pid: int, seconds: float) -> float:
    """Milliseconds of CPU that a process takes while nothing is sent."""
    time.sleep(1)  # delayed acknowledgements and the like are not idleness
    before = read_running_ms(pid)
    time.sleep(seconds)
    return read_running_ms(pid) - before


@dataclass(frozen=True)
class Pace:
    """Connections done a second and failed in all, microseconds, MiB, and CPU microseconds for each connection."""

    rate: float
    failed: float
    early_p50: float
    late_p50: float
    late_p99: float
    early_rss: float
    late_rss: float
    cpu: float


def measure_pace(lab: Lab, attachment: Attachment, rate: int, seconds: float) -> Pace:
    """Short connections at a steady rate."""
    pid = attachment.process.pid
    cpu = read_cpu_seconds(pid)
    arguments = ["pace", attachment.host_address, str(ECHO_PORT + 1), str(rate), f"{seconds:g}"]
    client = lab.spawn(attachment.guest, [*ENDPOINTS, *arguments], stdout=subprocess.PIPE, stderr=None)
    try:
        time.sleep(seconds / 4)  # the middle of what the client takes as the beginning
        early = read_memory(pid).rss
        time.sleep(seconds * 0.7)
        late = read_memory(pid).rss
        said, _ = client.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        raise LabError(f"{rate} connections a second did not come to an end") from None
    finally:
        stop(client)
    if client.returncode:
        raise LabError(f"{rate} connections a second: the client ended with status {client.returncode}")
    report: dict[str, float] = json.loads(said)
    return Pace(
        rate=report["per_second"],
        failed=report["failed"],
        early_p50=report["early_p50"],
        late_p50=report["late_p50"],
        late_p99=report["late_p99"],
        early_rss=early / MIB,
        late_rss=late / MIB,
        cpu=1e6 * (read_cpu_seconds(pid) - cpu) / max(1.0, report["per_second"] * seconds),
    )
