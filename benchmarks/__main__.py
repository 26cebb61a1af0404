"""Measure netstack and its peers in one run; `python -m benchmarks profile` shows where netstack spends its time."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import load
from benchmarks.lab import Lab, LabError
from benchmarks.peers import Peer, Surroundings
from benchmarks.relay import build_relay
from benchmarks.report import (
    HERE,
    as_document,
    describe_machine,
    make_console,
    print_tables,
    write_readme,
    write_results,
)
from benchmarks.suite import ALL, QUICK, Plan, Suite, all_peers

EXAMPLES = """examples:
  python -m benchmarks                                 everything, some 23 minutes
  python -m benchmarks --quick                         one short round of everything
  python -m benchmarks --only tcp,latency --peers netstack,passt
  python -m benchmarks profile --mtu 1500 --load down  where netstack spends its time
  python -m benchmarks compare --other HEAD --load up  this checkout beside another, or beside a revision
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ", ".join(peer.name for peer in all_peers())
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--peers", metavar="NAMES", help=f"only these, separated by commas: {names}")
    parser.add_argument("--only", metavar="SECTIONS", help=f"only these, separated by commas: {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds whose median counts (3)")
    parser.add_argument(
        "--idle", metavar="COUNTS", help="numbers of idle connections, separated by commas (1000,10000)"
    )
    parser.add_argument("--python-relay", action="store_true", help="the relay in Python, as where no C compiler is")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where latest.json and latest.png go (benchmarks/results)"
    )
    return parser.parse_args(arguments)


def choose(wanted: str | None, known: list[str], what: str) -> list[str]:
    """The chosen names in the order of the known ones; ends the program when one is unknown."""
    if wanted is None:
        return known
    chosen = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"benchmarks: no {what} is called {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in chosen]


def make_plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else Plan()
    sections = choose(options.only, list(ALL), "section")
    plan = dataclasses.replace(plan, sections=tuple(sections))
    if options.rounds:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    if options.idle:
        plan = dataclasses.replace(plan, idle_counts=tuple(int(count) for count in options.idle.split(",")))
    return plan


def choose_peers(wanted: str | None, say: list[str]) -> list[Peer]:
    """The chosen peers that this machine has; why the others are left out goes into the notes."""
    everyone = all_peers()
    names = choose(wanted, [peer.name for peer in everyone], "peer")
    present = []
    for peer in everyone:
        if peer.name in names:
            reason = peer.missing()
            if reason is None:
                present.append(peer)
            else:
                say.append(f"left out: {peer.name}: {reason}")
    return present


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["profile"]:
        from benchmarks.profile import main as profile

        return profile(arguments[1:])
    if arguments[:1] == ["compare"]:
        from benchmarks.compare import main as compare

        return compare(arguments[1:])
    options = parse_arguments(arguments)
    plan = make_plan(options)
    if os.geteuid() != 0:
        print("benchmarks: network namespaces and taps need root: try `sudo make bench`", file=sys.stderr)
        return 1
    started, clock = datetime.now(UTC), time.monotonic()
    machine, notes = describe_machine(), list[str]()
    peers = choose_peers(options.peers, notes)
    console = make_console()
    with Lab() as lab:
        relay, relay_name = build_relay(lab.directory, compiled=not options.python_relay)
        notes.append(f"relay: {relay_name}")
        notes.append(
            "qemu-user: QEMU without a machine, its user netdev joined by a hub to the same stream as the others"
        )
        for note in notes:
            print(note, file=sys.stderr)
        host = lab.host()
        suite = Suite(
            Surroundings(lab, host, relay),
            load.Servers(lab, host),
            peers,
            plan,
            lambda text: print(f"[{time.monotonic() - clock:5.0f} s] {text}", file=sys.stderr, flush=True),
        )
        figures = suite.run()
        notes += suite.notes
        if "forwards" in plan.sections:
            from benchmarks.bench_forwards import measure_forwards

            try:
                measure_forwards(figures, relay, lab, seconds=plan.tcp_seconds, rounds=plan.rounds, say=suite.say)
            except LabError as error:
                notes.append(f"not all figures of forwards: {error}")
                print(notes[-1], file=sys.stderr)
        if "proxy" in plan.sections:
            from benchmarks.bench_proxy import measure_proxy

            try:
                measure_proxy(figures, relay, lab, seconds=plan.tcp_seconds, rounds=plan.rounds, say=suite.say)
            except LabError as error:
                notes.append(f"not all figures of the proxy: {error}")
                print(notes[-1], file=sys.stderr)
    if "micro" in plan.sections:
        from benchmarks.micro import measure_micro

        measure_micro(figures)
    versions = {peer.name: peer.version() for peer in peers}
    if "dns" in plan.sections:
        from benchmarks.bench_dns import measure_dns

        def say(text: str) -> None:
            print(f"[{time.monotonic() - clock:5.0f} s] {text}", file=sys.stderr, flush=True)

        try:
            versions |= measure_dns(figures, seconds=plan.dns_seconds, rounds=plan.rounds, say=say)
        except LabError as error:
            notes.append(f"no figures of DNS: {error}")
            print(notes[-1], file=sys.stderr)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    document = as_document(
        figures, started=started, command=command, machine=machine, versions=versions, notes=notes, rounds=plan.rounds
    )
    print_tables(figures, console)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Linux {machine['kernel']}; "
                  f"{'; '.join(versions.values())}; relay: {relay_name}; {time.monotonic() - clock:.0f} s")  # fmt: skip
    # Runs that are short or leave something out do not replace the figures of a whole one.
    whole = not (options.quick or options.only or options.peers or options.python_relay)
    out = options.out or HERE / "results"
    name = "latest" if whole or options.out else "partial"
    write_results(document, out / name, HERE / "history.jsonl" if options.out is None else None)
    if whole and options.out is None:
        write_readme(document, HERE / "README.md")
    try:
        from benchmarks.plot import write_plot

        caption = f"{command}, {started:%Y-%m-%d}, {machine['cpu']}, {machine['cores']} cores"
        write_plot(figures, out / f"{name}.png", caption)
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install matplotlib)")
    console.print(f"written: {out / name}.json, .md")
    return 0


def end(number: int, frame: object) -> None:
    """SIGTERM becomes an exception, so that the lab is taken down."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
