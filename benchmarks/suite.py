"""The order of a run: which figures are taken, how often, and in what order.

Machine noise is the enemy, and the machine is shared by the guest, the relay, the network process and both ends of the
load. So every round goes through all cases, and each case through all peers, one right after another and beginning with
another peer each round: what slows the machine for a while slows them all. All attachments exist from the start; those
not measured are idle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import (
    Figures,
    Metric,
    connections_metric,
    cpu_metric,
    idle_metric,
    memory_metric,
    pace_metric,
    round_trip_metric,
    start_metric,
    tcp_metric,
    udp_metric,
    udp_most_metric,
    vm_tcp_metric,
)
from benchmarks.lab import LabError, allow_files, read_memory
from benchmarks.many import measure_idle, measure_pace
from benchmarks.peers import LARGE, SMALL, Attachment, Netstack, Passt, Peer, QemuUser, Surroundings, measure_start
from benchmarks.relay_cost import measure_relay
from benchmarks.tap_peers import NetstackTap, Pasta, Slirp4netns
from benchmarks.targets import MANY, PACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = (
    "start", "tcp", "latency", "connections", "udp", "vm", "forwards", "proxy", "dns", "pace", "idle", "relay", "micro",
)  # fmt: skip
DIRECTIONS: tuple[load.Direction, ...] = ("up", "down")


@dataclass(frozen=True)
class Plan:
    """How long and how often. Seconds are per single run."""

    rounds: int = 3
    tcp_seconds: float = 3
    round_trip_seconds: float = 0.6
    round_trip_passes: int = 3  # short and often: the median of many runs is steadier than a long one
    connection_seconds: float = 2
    udp_seconds: float = 1
    udp_gbits: tuple[float, ...] = (0.5, 1.0, 2.0)
    start_runs: int = 10
    idle_counts: tuple[int, ...] = (1000, MANY)
    idle_watched: float = 10
    pace_seconds: float = 60
    dns_seconds: float = 2
    sections: tuple[str, ...] = ALL


QUICK = Plan(
    rounds=1, tcp_seconds=2, connection_seconds=1, udp_seconds=1, udp_gbits=(0.5,), start_runs=3, idle_counts=(1000,),
    pace_seconds=12, dns_seconds=1,
)  # fmt: skip

# Those that can hold ten thousand connections: slirp4netns takes a quarter of a MiB for each. And how many files passt
# needs for each (a timer besides the socket), which is more than some machines allow.
MANY_PEERS, PASST_FILES = ("netstack", "passt"), 2.1


def all_peers() -> list[Peer]:
    """netstack first; the order is that of the columns."""
    return [Netstack(), NetstackTap(), Passt(), Slirp4netns(), Pasta(), QemuUser()]


@dataclass
class Suite:
    """One run over a set of peers."""

    around: Surroundings
    servers: load.Servers
    peers: list[Peer]
    plan: Plan
    say: Callable[[str], None]
    figures: Figures = field(default_factory=Figures)
    attachments: dict[tuple[str, int], Attachment] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Figures:
        """Take all the figures of the plan."""
        wanted = self.plan.sections
        if "start" in wanted:
            self._take_starts()
        if set(wanted) & {"tcp", "latency", "connections", "udp"}:
            self._attach_all()
        for number in range(1, self.plan.rounds + 1):
            for case in ("tcp", "latency", "connections", "udp"):
                if case in wanted:
                    self.say(f"round {number} of {self.plan.rounds}: {case}")
                    getattr(self, f"_take_{case}")(number)
        if "tcp" in wanted:
            self._take_memory()
        self._detach_all()  # so that nobody has a part in what follows
        if "vm" in wanted:
            self._take_machine()
        if "pace" in wanted:
            self._take_pace()
        if "idle" in wanted:
            for number in range(1, self.plan.rounds + 1):
                self._take_idle(number)
        if "relay" in wanted:
            measure_relay(self.around, self.figures, self.plan.tcp_seconds, self.say)
        return self.figures

    def _attach_all(self) -> None:
        for peer in self.peers:
            for mtu in peer.mtus:
                try:
                    attachment = peer.attach(self.around, mtu)
                    load.measure_round_trips(attachment, "tcp", 1, 0.1)  # it works, and ARP is done
                except LabError as error:
                    self.figures.fail(memory_metric("start", mtu), peer.name, str(error))
                    self.say(f"  {peer.name} at MTU {mtu} is left out: {error}")
                    continue
                self.attachments[peer.name, mtu] = attachment
                started = read_memory(attachment.process.pid)
                self.figures.add(memory_metric("start", mtu), peer.name, started.rss / 1024)
        self.say(f"{len(self.attachments)} guests attached")

    def _detach_all(self) -> None:
        while self.attachments:
            self.attachments.popitem()[1].end()

    def _turns(self, number: int, mtu: int, case: str) -> Iterator[tuple[Peer, Attachment]]:
        """The attachments with this MTU that the case is for, beginning with another one each round."""
        having = [
            (peer, self.attachments[peer.name, mtu])
            for peer in self.peers
            if case in peer.cases and (peer.name, mtu) in self.attachments
        ]
        shift = number % len(having) if having else 0
        yield from having[shift:] + having[:shift]

    def _guard(self, metrics: list[Metric], peer: str, take: Callable[[], list[float | None]]) -> None:
        """Take the figures of these metrics, or note why there are none."""
        try:
            values = take()
        except LabError as error:
            for metric in metrics:
                self.figures.fail(metric, peer, str(error))
            self.say(f"  {metrics[0].title}: {peer}: {error}")
            return
        for metric, value in zip(metrics, values, strict=True):
            if value is not None:
                self.figures.add(metric, peer, value)
        shown = ", ".join(f"{value:.4g}" for value in values if value is not None)
        self.say(f"  {metrics[0].title}: {peer} {shown} {metrics[0].unit}")

    def _take_tcp(self, number: int) -> None:
        for mtu in (LARGE, SMALL):
            for streams in (1, 8):
                for direction in DIRECTIONS:
                    for peer, attachment in self._turns(number, mtu, "tcp" if streams == 1 else f"tcp.{streams}"):
                        take = functools.partial(self._tcp, attachment, direction, streams)
                        metrics = [tcp_metric(direction, mtu, streams)]
                        if streams == 1:
                            metrics += [cpu_metric(direction, mtu), cpu_metric(direction, mtu, relay=True)]
                        self._guard(metrics, peer.name, take)

    def _tcp(self, attachment: Attachment, direction: load.Direction, streams: int) -> list[float | None]:
        run = load.measure_tcp(self.servers, attachment, direction, streams, self.plan.tcp_seconds)
        return [run.gbits, run.cpu, run.relay_cpu] if streams == 1 else [run.gbits]

    def _take_latency(self, number: int) -> None:
        cases: tuple[tuple[load.Protocol, int], ...] = (("tcp", 1), ("tcp", 100), ("udp", 100))
        for protocol, size in cases * self.plan.round_trip_passes:
            for peer, attachment in self._turns(number, SMALL, "latency"):
                metrics = [round_trip_metric(protocol, size, which) for which in ("p50", "p99")]
                self._guard(metrics, peer.name, functools.partial(self._round_trips, attachment, protocol, size))

    def _round_trips(self, attachment: Attachment, protocol: load.Protocol, size: int) -> list[float | None]:
        run = load.measure_round_trips(attachment, protocol, size, self.plan.round_trip_seconds)
        return [run.p50, run.p99]

    def _take_connections(self, number: int) -> None:
        for concurrency in (1, 16):
            for peer, attachment in self._turns(number, SMALL, "connections"):
                take = functools.partial(self._connections, attachment, concurrency)
                self._guard([connections_metric(concurrency)], peer.name, take)

    def _connections(self, attachment: Attachment, concurrency: int) -> list[float | None]:
        return [load.measure_connections(attachment, concurrency, self.plan.connection_seconds)]

    def _take_udp(self, number: int) -> None:
        most: dict[tuple[str, str], float] = {}
        for gbits in self.plan.udp_gbits:
            for direction in DIRECTIONS:
                for peer, attachment in self._turns(number, SMALL, "udp"):
                    metrics = [udp_metric(direction, gbits, which) for which in ("delivered", "loss")]
                    self._guard(metrics, peer.name, functools.partial(self._udp, attachment, direction, gbits))
                    samples = self.figures.samples.get(metrics[0].key, {}).get(peer.name, [0.0])
                    delivered = samples[-1] * load.DATAGRAM_SIZE * 8 / 1e9
                    most[direction, peer.name] = max(most.get((direction, peer.name), 0), delivered)
        if max(self.plan.udp_gbits) >= 1:  # else it says what was offered
            for (way, name), value in most.items():
                self.figures.add(udp_most_metric(way), name, value)

    def _udp(self, attachment: Attachment, direction: load.Direction, gbits: float) -> list[float | None]:
        run = load.measure_udp(self.servers, attachment, direction, gbits, self.plan.udp_seconds)
        return [run.delivered, run.loss]

    def _take_memory(self) -> None:
        for (name, mtu), attachment in self.attachments.items():
            memory = read_memory(attachment.process.pid)
            self.figures.add(memory_metric("peak", mtu), name, memory.peak / 1024)
            self.figures.add(memory_metric("pss", mtu), name, memory.pss / 1024)

    def _take_idle(self, number: int) -> None:
        """On fresh attachments: what a process once needed for bulk data would hide what its connections take."""
        for count in self.plan.idle_counts:
            self.say(f"round {number} of {self.plan.rounds}: {count} idle connections")
            metrics = [idle_metric(which, count) for which in ("ratio", "bytes", "p50", "cpu")]
            for peer in self.peers:
                if "idle" not in peer.cases or (count >= MANY and peer.name not in MANY_PEERS):
                    continue
                if peer.name == "passt" and not allow_files(round(count * PASST_FILES)):
                    self.figures.fail(metrics[0], peer.name, "takes more files than this machine lets a process open")
                else:
                    self._guard(metrics, peer.name, functools.partial(self._idle, peer, count))

    def _idle(self, peer: Peer, count: int) -> list[float | None]:
        attachment = peer.attach(self.around, SMALL)
        try:
            watched = self.plan.idle_watched if count >= MANY else 0
            idle = measure_idle(self.around.lab, attachment, count, self.plan.round_trip_seconds, watched)
        finally:
            attachment.end()
        return [idle.round_trip_ratio, idle.bytes_each / 1024, idle.round_trip, idle.cpu_ms]

    def _take_pace(self) -> None:
        """Once, and at its full length: what grows slowly needs the time."""
        self.say(f"{PACE:,} connections a second for {self.plan.pace_seconds:g} s")
        names = (
            "rate",
            "failed",
            "p50.start",
            "p50.end",
            "slowing",
            "p99.end",
            "rss.start",
            "rss.end",
            "growth",
            "cpu",
        )
        metrics = [pace_metric(name, PACE) for name in names]
        for peer in self.peers:
            if peer.name in MANY_PEERS:
                self._guard(metrics, peer.name, functools.partial(self._pace, peer))

    def _pace(self, peer: Peer) -> list[float | None]:
        attachment = peer.attach(self.around, SMALL)
        try:
            run = measure_pace(self.around.lab, attachment, PACE, self.plan.pace_seconds)
        finally:
            attachment.end()
        return [
            *(run.rate, run.failed, run.early_p50, run.late_p50, run.late_p50 / run.early_p50, run.late_p99),
            *(run.early_rss, run.late_rss, run.late_rss / run.early_rss, run.cpu),
        ]

    def _take_machine(self) -> None:
        try:
            from benchmarks.vm import measure_machine

            kind = measure_machine(self.around, self.servers, self.plan, self._guard, self.say)
            self.notes.append(f"virtual machine: QEMU with {kind}")
        except (ImportError, LabError) as error:
            self.say(f"  no virtual machine: {error}")
            for name in ("netstack", "netstack-vhost", "qemu-user"):
                self.figures.fail(vm_tcp_metric("up", SMALL), name, str(error))

    def _take_starts(self) -> None:
        for _ in range(self.plan.start_runs):
            for peer in self.peers:
                if "start" in peer.cases:
                    metrics = [start_metric("ready"), start_metric("cpu")]
                    self._guard(metrics, peer.name, functools.partial(self._start, peer))

    def _start(self, peer: Peer) -> list[float | None]:
        return list(measure_start(peer, self.around))
