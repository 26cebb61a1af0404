"""Two checkouts of netstack in one run: `python -m benchmarks compare`. A claim about speed is one line of its output.

This checkout and another one are both attached to guests of their own at the beginning. Each round then does every
load on both, one right after the other, the one that begins changing from round to round: what slows the machine for
a while slows both. What is printed is the median of the ratios round by round, with the smallest and the largest of
them, and the CPU time of each process for the same work, which is steadier than the speed where others use the
machine too. Give it enough rounds that the span of the ratios does not hold 1, or say that nothing is known.

The other checkout is a directory, or a revision of this repository, which is unpacked for the run: `--other HEAD`
shows what the uncommitted changes bring. Both run under the same interpreter and its packages.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import format_figure
from benchmarks.lab import Lab, LabError, read_cpu_seconds, run
from benchmarks.peers import LARGE, Surroundings
from benchmarks.relay import build_relay
from benchmarks.tap_peers import NETSTACK_LINKS

if TYPE_CHECKING:
    from benchmarks.peers import Attachment, Netstack

LOADS = ("up", "down", "rr", "udp-rr", "crr", "crr-1", "udp-up", "udp-down")
ROOT = Path(__file__).resolve().parents[1]
THIS, OTHER = "this", "other"


@dataclass(frozen=True)
class Sample:
    """What one run of a load gave: the figure, its unit, and CPU time of the network process for one unit of work."""

    value: float
    unit: str
    cpu: float
    cpu_unit: str
    extra: float | None = None  # and another figure, with its words
    extra_words: str = ""


@dataclass
class Pair:
    """The samples of one load at one MTU, round by round."""

    this: list[Sample] = field(default_factory=list)
    other: list[Sample] = field(default_factory=list)


def take(kind: str, servers: load.Servers, attachment: Attachment, options: argparse.Namespace) -> Sample:
    """Do one load once."""
    seconds = options.seconds
    if kind in ("up", "down"):
        direction: load.Direction = "up" if kind == "up" else "down"
        run = load.measure_tcp(servers, attachment, direction, options.streams, seconds, warm_up=1)
        return Sample(run.gbits, "Gbit/s", run.cpu, "CPU s/GB")
    before = read_cpu_seconds(attachment.process.pid)

    def spent() -> float:
        return read_cpu_seconds(attachment.process.pid) - before

    if kind in ("rr", "udp-rr"):
        trips = load.measure_round_trips(attachment, "tcp" if kind == "rr" else "udp", 1, seconds)
        # A tenth of the time is warm-up, and its round trips are not in the count.
        return Sample(trips.p50, "µs", 0.9e6 * spent() / trips.count, "CPU µs each", trips.p99, "µs p99")
    if kind in ("crr", "crr-1"):
        rate = load.measure_connections(attachment, 16 if kind == "crr" else 1, seconds)
        return Sample(rate, "1/s", 1e6 * spent() / (rate * seconds), "CPU µs each")
    datagrams = load.measure_udp(servers, attachment, "up" if kind == "udp-up" else "down", options.gbits, seconds)
    each = 1e6 * spent() / max(1.0, datagrams.delivered * seconds)
    return Sample(datagrams.delivered, "1/s", each, "CPU µs each", datagrams.loss, "% lost")


class Virtual:
    """The two as two cards of one virtual machine (vm.py): up, down and rr."""

    def __init__(self, around: Surroundings, peers: dict[str, Netstack]) -> None:
        from benchmarks.vm import Machine, make_netstack_wire

        networks = {THIS: "192.168.5", OTHER: "192.168.6"}
        makers = {
            name: functools.partial(make_netstack_wire, netstack=peer, network=networks[name])
            for name, peer in peers.items()
        }
        self.machine = Machine(around, makers, strict=True)
        try:
            self.machine.boot()
        except BaseException:
            self.machine.end()
            raise
        self._wires = {wire.peer: wire for wire in self.machine.wires}

    def take(self, name: str, kind: str, mtu: int, servers: load.Servers, seconds: float) -> Sample:
        wire = self._wires[name]
        assert wire.process is not None
        self.machine.set_mtu(wire, mtu)
        before = read_cpu_seconds(wire.process.pid)
        if kind == "rr":
            p50 = self.machine.measure_round_trip(wire, seconds)
            each = 1e6 * (read_cpu_seconds(wire.process.pid) - before) / (seconds * 1e6 / p50)
            return Sample(p50, "µs", each, "CPU µs each")
        gbits = self.machine.measure_tcp(servers, wire, "up" if kind == "up" else "down", seconds)
        gigabytes = gbits * (seconds + 1) / 8  # with the second of warm-up
        return Sample(gbits, "Gbit/s", (read_cpu_seconds(wire.process.pid) - before) / gigabytes, "CPU s/GB")


def describe(kind: str, mtu: int, pair: Pair) -> str:
    """One paragraph: both medians, the ratio and its span, CPU."""
    ratios = [this.value / other.value for this, other in zip(pair.this, pair.other, strict=True) if other.value]
    if not ratios:
        return f"{kind}, MTU {mtu}: no figures"
    lines = []
    for name, samples in ((THIS, pair.this), (OTHER, pair.other)):
        value = statistics.median(sample.value for sample in samples)
        cpu = statistics.median(sample.cpu for sample in samples)
        extras = [sample.extra for sample in samples if sample.extra is not None]
        more = f"; {format_figure(statistics.median(extras))} {samples[0].extra_words}" if extras else ""
        figure, cost = format_figure(value), format_figure(cpu)
        lines.append(f"  {name:6}{figure:>10} {samples[0].unit:7}{cost:>8} {samples[0].cpu_unit}{more}")
    cpu_ratios = [this.cpu / other.cpu for this, other in zip(pair.this, pair.other, strict=True) if other.cpu]
    better = "lower is better" if kind.endswith("rr") and not kind.startswith("crr") else "higher is better"
    lines.append(
        f"  ratio {statistics.median(ratios):10.3f} ({min(ratios):.3f} to {max(ratios):.3f}; {better})"
        + (f"; CPU {statistics.median(cpu_ratios):.3f}" if cpu_ratios else "")
    )
    return "\n".join([f"{kind}, MTU {mtu}, {len(ratios)} rounds", *lines])


def find_checkout(where: str, lab: Lab) -> Path:
    """The directory of a checkout; a revision of this repository is unpacked into the lab's. Raises LabError."""
    path = Path(where).expanduser()
    if path.is_dir():
        path = path.resolve()
        if not (path / "netstack" / "__init__.py").is_file():
            raise LabError(f"{path} is no checkout: it has no netstack/__init__.py")
        return path
    try:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", where], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise LabError(f"{where!r} is neither a directory nor a revision of {ROOT}") from None
    folder = lab.directory / "other"
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    # Compiled once, here, and not by the first start that is measured.
    run([sys.executable, "-m", "compileall", "-q", str(folder / "netstack"), str(folder / "dns"), str(folder / "vde")])
    return folder


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", default="HEAD", metavar="DIR|REVISION", help="the other checkout (HEAD)")
    parser.add_argument("--this", type=Path, default=ROOT, metavar="DIR", help="this checkout, if another than ours")
    parser.add_argument("--load", default="up", help=f"one or more, separated by commas: {', '.join(LOADS)} (up)")
    parser.add_argument("--mtu", default=str(LARGE), help=f"one or more, separated by commas ({LARGE})")
    names = [*NETSTACK_LINKS, "vm-stream", "vm-vhost-user"]
    parser.add_argument(
        "--link",
        choices=names,
        default="stream",
        help="how guests are attached: vm-* are cards of a QEMU guest (stream)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--seconds", type=float, default=2, help="of each single run (2)")
    parser.add_argument("--streams", type=int, default=1, help="TCP streams of up and down (1)")
    parser.add_argument("--gbits", type=float, default=1.0, help="offered by udp-up and udp-down (1.0)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of this checkout (the running one)")
    parser.add_argument("--other-python", help="the interpreter of the other checkout (the same)")
    parser.add_argument("more", nargs="*", help="after --: more options for both netstack run")
    options = parser.parse_args(arguments)
    options.load = [name.strip() for name in options.load.split(",")]
    options.mtu = [int(mtu) for mtu in options.mtu.split(",")]
    for name in options.load:
        if name not in LOADS:
            parser.error(f"no load is called {name!r}; there are {', '.join(LOADS)}")
    if options.link.startswith("vm-") and set(options.load) - {"up", "down", "rr"}:
        parser.error("--link vm-...: the loads are up, down and rr")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    links = NETSTACK_LINKS
    if options.link.startswith("vm-"):
        from benchmarks.vm import VM_LINKS

        links = VM_LINKS
    with Lab() as lab, contextlib.ExitStack() as ending:
        checkouts = {THIS: find_checkout(str(options.this), lab), OTHER: find_checkout(options.other, lab)}
        pythons = {THIS: options.python, OTHER: options.other_python or options.python}
        peers = {name: links[options.link](name, checkouts[name], pythons[name]) for name in (THIS, OTHER)}
        print(f"this: {checkouts[THIS]}; other: {options.other} ({checkouts[OTHER]})", file=sys.stderr)
        relay, _ = build_relay(lab.directory)
        host = lab.host()
        around = Surroundings(lab, host, relay, options.more)
        servers = load.Servers(lab, host)
        if options.link.startswith("vm-"):
            virtual = Virtual(around, peers)
            ending.callback(virtual.machine.end)

            def measure(name: str, kind: str, mtu: int) -> Sample:
                return virtual.take(name, kind, mtu, servers, options.seconds)

        else:
            guests = {(name, mtu): peers[name].attach(around, mtu) for mtu in options.mtu for name in (THIS, OTHER)}
            for attachment in guests.values():
                load.measure_round_trips(attachment, "tcp", 1, 0.3)  # imports and ARP are no part of it

            def measure(name: str, kind: str, mtu: int) -> Sample:
                return take(kind, servers, guests[name, mtu], options)

        pairs = {(kind, mtu): Pair() for mtu in options.mtu for kind in options.load}
        for number in range(options.rounds):
            for (kind, mtu), pair in pairs.items():
                order = (THIS, OTHER) if number % 2 == 0 else (OTHER, THIS)
                try:
                    samples = {name: measure(name, kind, mtu) for name in order}
                except LabError as error:
                    print(f"{kind}, MTU {mtu}, round {number + 1}: {error}", file=sys.stderr)
                    continue
                this, other = samples[THIS], samples[OTHER]
                pair.this.append(this)
                pair.other.append(other)
                shown = f"{format_figure(this.value)} and {format_figure(other.value)} {this.unit}"
                print(f"  {kind}, MTU {mtu}, round {number + 1}: {shown}", file=sys.stderr)
        for (kind, mtu), pair in pairs.items():
            print(describe(kind, mtu, pair))
    return 0
