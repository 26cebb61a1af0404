"""Where netstack spends its time: `python -m benchmarks profile`. One guest, one load, one sampler.

py-spy (from PyPI, `pip install py-spy`) samples the running process from outside and does not slow it: the shares are
those of real work. cProfile counts every call, which slows Python code several times over and C code not at all: use it
for the counts. strace counts system calls. Where a figure is far from its target, this says why.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import pstats
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.lab import Lab, LabError, read_cpu_seconds, read_memory, stop
from benchmarks.peers import LARGE, Surroundings
from benchmarks.relay import build_relay
from benchmarks.tap_peers import NETSTACK_LINKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.peers import Attachment
    from benchmarks.vm import Machine, Wire

# Where the process waits for something to do: no work, and not counted.
WAITING = ("EpollIOManager.get_events", "KqueueIOManager.get_events")

LOADS = ("up", "down", "rr", "crr", "udp-up", "udp-down")


def make_load(kind: str, servers: load.Servers, attachment: Attachment, options: argparse.Namespace) -> str:
    """Run one load to its end; what came of it, in words."""
    streams, seconds = options.streams, options.seconds
    if kind in ("up", "down"):
        run = load.measure_tcp(servers, attachment, "up" if kind == "up" else "down", streams, seconds, warm_up=0)
        return f"{run.gbits:.2f} Gbit/s, {run.cpu:.2f} CPU s/GB"
    if kind == "rr":
        trips = load.measure_round_trips(attachment, "tcp", 1, seconds)
        return f"p50 {trips.p50:.1f} µs, p99 {trips.p99:.1f} µs"
    if kind == "crr":
        return f"{load.measure_connections(attachment, 16, seconds):.0f} connections a second"
    datagrams = load.measure_udp(servers, attachment, "up" if kind == "udp-up" else "down", options.gbits, seconds)
    return f"{datagrams.delivered:.0f} datagrams a second, {datagrams.loss:.1f} % lost"


def make_vm_load(kind: str, servers: load.Servers, machine: Machine, wire: Wire, seconds: float) -> str:
    """The same in a virtual machine, for those loads that are there."""
    if kind == "rr":
        return f"p50 {machine.measure_round_trip(wire, seconds):.1f} µs"
    return f"{machine.measure_tcp(servers, wire, 'up' if kind == 'up' else 'down', seconds):.2f} Gbit/s"


def print_shares(title: str, counts: collections.Counter[str], total: int, top: int) -> None:
    print(f"\n{title}")
    for name, count in counts.most_common(top):
        print(f"  {100 * count / total:5.1f} %  {name}")


def shorten(frame: str) -> str:
    """`name (file:line)` with the file as a path inside the package."""
    for marker in ("site-packages/", "netstack/netstack/", "/main/"):
        head, found, rest = frame.partition(marker)
        if found:
            return f"{head.partition(' (')[0]} ({rest}"
    return frame


def print_samples(path: Path, top: int) -> None:
    """Folded stacks, `frame;frame;frame count`: shares by line, by function, and by function with all it calls."""
    lines: collections.Counter[str] = collections.Counter()
    functions: collections.Counter[str] = collections.Counter()
    inclusive: collections.Counter[str] = collections.Counter()
    total = waiting = 0
    for line in path.read_text().splitlines():
        stack, _, count_text = line.rpartition(" ")
        count = int(count_text)
        frames = [shorten(frame) for frame in stack.split(";")]
        names = [frame.rpartition(":")[0] + ")" for frame in frames]
        if names[-1].startswith(WAITING):
            waiting += count
            continue
        total += count
        lines[frames[-1]] += count
        functions[names[-1]] += count
        for name in set(names):
            inclusive[name] += count
    if not total:
        raise LabError("py-spy saw no sample: the process was idle, or may not be traced")
    everywhere = [name for name, count in inclusive.items() if count > 0.97 * total]
    for name in everywhere:
        del inclusive[name]  # what led here: the command line, trio's loop
    print(f"{total} samples at work, {waiting} while waiting")
    print_shares("by line", lines, total, top)
    print_shares("by function", functions, total, top)
    print_shares("by function and what it calls", inclusive, total, top)


def sample(pid: int, options: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    spy = Path(sys.executable).with_name("py-spy")
    program = str(spy) if spy.exists() else shutil.which("py-spy")
    if program is None:
        raise LabError("py-spy is not installed: pip install py-spy")
    argv = [program, "record", "--pid", str(pid), "--format", "raw", "--output", str(output), "--nonblocking"]
    argv += [
        "--rate",
        str(options.rate),
        "--duration",
        f"{options.seconds:g}",
        *(["--native"] if options.native else []),
    ]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run_sampled(pid: int, options: argparse.Namespace, work: Callable[[], str], directory: Path) -> None:
    output = options.output or directory / "samples"
    sampler = sample(pid, options, output)
    try:
        print(work())
        _, said = sampler.communicate(timeout=options.seconds + 30)
    finally:
        stop(sampler)
    if sampler.returncode:
        raise LabError(f"py-spy: {said.decode(errors='replace').strip()}")
    print_samples(output, options.top)


def run_traced(pid: int, work: Callable[[], str], directory: Path) -> None:
    output = directory / "calls"
    argv = ["strace", "-c", "-f", "-q", "-o", str(output), "-p", str(pid)]
    with contextlib.ExitStack() as ending:
        tracer = subprocess.Popen(argv)
        ending.callback(stop, tracer)
        print(work())
    print(output.read_text())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", choices=LOADS, default="up", help="what the guest does (up)")
    parser.add_argument("--mtu", type=int, default=LARGE, help=f"the guest's MTU ({LARGE})")
    links = [*NETSTACK_LINKS, "vm-stream", "vm-vhost-user"]
    parser.add_argument("--link", choices=links, default="stream", help="how the guest is attached (stream)")
    parser.add_argument("--gbits", type=float, default=1.0, help="offered by udp-up and udp-down (1.0)")
    parser.add_argument("--streams", type=int, default=1, help="TCP streams of up and down (1)")
    parser.add_argument("--seconds", type=float, default=5, help="how long (5)")
    parser.add_argument("--tool", choices=("py-spy", "cprofile", "strace", "none"), default="py-spy")
    parser.add_argument("--rate", type=int, default=500, help="samples a second (500)")
    parser.add_argument("--native", action="store_true", help="C frames too (py-spy)")
    parser.add_argument("--top", type=int, default=25, help="lines of each list (25)")
    parser.add_argument("--output", type=Path, help="keep the samples (folded stacks) or the cProfile file there")
    parser.add_argument("more", nargs="*", help="after --: more options for netstack run")
    options = parser.parse_args(arguments)
    if options.link.startswith("vm-") and options.load not in ("up", "down", "rr"):
        parser.error("--link vm-...: the loads are up, down and rr")
    with Lab() as lab, contextlib.ExitStack() as ending:
        relay, _ = build_relay(lab.directory)
        host = lab.host()
        around, servers = Surroundings(lab, host, relay, options.more), load.Servers(lab, host)
        counts = options.output or lab.directory / "counts"
        if options.link in NETSTACK_LINKS:
            peer = NETSTACK_LINKS[options.link]()
            peer.counts = counts if options.tool == "cprofile" else None
            attachment = peer.attach(around, options.mtu)
            process = attachment.process
            load.measure_round_trips(attachment, "tcp", 1, 0.2)  # imports and ARP are no part of it

            def run_load() -> str:
                return make_load(options.load, servers, attachment, options)

        else:
            from benchmarks.vm import VM_LINKS, Machine, make_netstack_wire

            peer = VM_LINKS[options.link]()
            peer.counts = counts if options.tool == "cprofile" else None
            machine = Machine(around, {"vm": lambda around: make_netstack_wire(around, peer, "192.168.5")}, strict=True)
            ending.callback(machine.end)
            machine.boot()
            (wire,) = machine.wires
            assert wire.process is not None
            process = wire.process
            machine.set_mtu(wire, options.mtu)
            machine.measure_round_trip(wire, 0.2)

            def run_load() -> str:
                return make_vm_load(options.load, servers, machine, wire, options.seconds)

        def work() -> str:
            before, clock = read_cpu_seconds(process.pid), time.monotonic()
            words = run_load()
            share = (read_cpu_seconds(process.pid) - before) / (time.monotonic() - clock)
            memory = read_memory(process.pid)
            return f"{options.load}, MTU {options.mtu}: {words}; {share:.0%} of a core; peak {memory.peak // 1024} MiB"

        if options.tool == "py-spy":
            run_sampled(process.pid, options, work, lab.directory)
        elif options.tool == "strace":
            run_traced(process.pid, work, lab.directory)
        else:
            print(work())
        stop(process)
        if options.tool == "cprofile":
            pstats.Stats(str(counts)).sort_stats("tottime").print_stats(options.top)
    return 0
