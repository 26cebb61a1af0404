"""What DNS costs a guest: `python -m benchmarks.bench_dns [--quick] [--out FILE]`.

A guest on netstack's tap runs dnsperf against netstack's own DNS, and, over netstack's UDP path, against caching
forwarders on the host: dnsmasq and unbound, as Debian has them. All of them ask the same upstream, a dnsmasq on the
host's loopback that makes up an answer for every name. Everything runs in one process tree in one run, the contenders
one after the other in each round, and the median of the rounds counts; nothing leaves the machine (lab.py).

    cached    1,000 names that are in every cache: answers a second with 100 queries in flight, and p50 of one at a time
    missed    names that nobody has asked for: the p50 of one at a time, also of the upstream asked by the host itself
    flood     10,000 names at once, of a zone whose server is silent: what netstack's memory grows by
    hosts     a hosts file of 100,000 lines: how long it takes to be read and used, and what queries notice of it

dnsperf and netstack and the servers share the machine's cores: the figures are good for ratios, not as such.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lab import Lab, LabError, Namespace, read_memory, wait_until
from benchmarks.peers import GATEWAY, SMALL, Attachment, Surroundings, debian_version
from benchmarks.tap_peers import NetstackTap

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
ASKER = Path(__file__).with_name("dns_asker.py")
DNS = "192.168.5.3"
UPSTREAM, DNSMASQ, UNBOUND, SILENT = 5300, 5301, 5302, 5303
NAMES, IN_FLIGHT, FLOOD, HOSTS = 1000, 100, 10_000, 100_000

# The targets of "Speed" in the issue that this measures; (what, sign, bound, unit).
TARGETS = {
    "cached_rate": (">=", 8000.0, "answers/s from our cache"),
    "cached_rate_ratio": (">=", 1.0, "of the same queries relayed to dnsmasq"),
    "cached_p50_ratio": ("<=", 1.0, "of the p50 of the same queries relayed to dnsmasq"),
    "missed_added_ms": ("<", 0.3, "ms that a miss adds to the upstream's own time"),
    "flood_mib": ("<", 64.0, "MiB of growth with 10,000 names in flight"),
    "hosts_s": ("<", 1.0, "s to read 100,000 lines of hosts"),
}


@dataclass(frozen=True)
class Contender:
    """Somebody to ask, and from where."""

    name: str
    address: str
    port: int
    where: Namespace
    remark: str


@dataclass
class Figures:
    """What was measured, by contender."""

    rate: dict[str, list[float]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    cached_ms: dict[str, list[float]] = field(default_factory=dict)
    missed_ms: dict[str, list[float]] = field(default_factory=dict)
    flood: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The figures that have targets."""
        rate, p50, missed = (_medians(table) for table in (self.rate, self.cached_ms, self.missed_ms))
        return {
            "cached_rate": rate["netstack"],
            "cached_rate_ratio": rate["netstack"] / rate["dnsmasq"],
            "cached_p50_ratio": p50["netstack"] / p50["dnsmasq"],
            "missed_added_ms": missed["netstack"] - missed["upstream, by the host"],
            "flood_mib": self.flood["growth_mib"],
            "hosts_s": self.hosts["load_s"],
        }


def _medians(table: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in table.items()}


def find_program(name: str) -> str:
    """A program of Debian's, installed or unpacked by scripts/setup-debian.sh. Raises LabError."""
    for place in (shutil.which(name), shutil.which(name, path="/usr/sbin:/sbin")):
        if place is not None:
            return place
    unpacked = ROOT / ".cache" / "debian" / "usr" / "sbin" / name
    if unpacked.exists():
        return str(unpacked)
    raise LabError(f"no program {name}: run scripts/setup-debian.sh as root")


class Bench:
    """One run."""

    def __init__(self, lab: Lab, seconds: float, rounds: int) -> None:
        self.lab = lab
        self.seconds = seconds
        self.rounds = rounds
        self.figures = Figures()
        self._host = lab.host()
        self._hosts_file = lab.directory / "hosts"
        self._hosts_file.write_text("192.0.2.1 first.example\n")
        self._cached = lab.directory / "cached.txt"
        self._cached.write_text("".join(f"n{number}.bench.example A\n" for number in range(NAMES)))
        self._start_servers()
        self._attachment = self._start_netstack()
        guest = self._attachment.guest
        self.contenders = [
            Contender("netstack", DNS, 53, guest, "its own DNS"),
            Contender("dnsmasq", GATEWAY, DNSMASQ, guest, "on the host, over netstack's UDP path"),
            Contender("unbound", GATEWAY, UNBOUND, guest, "on the host, over netstack's UDP path"),
        ]
        self.upstreams = [
            Contender("upstream", GATEWAY, UPSTREAM, guest, "over netstack's UDP path"),
            Contender("upstream, by the host", "127.0.0.1", UPSTREAM, self._host, "without a guest"),
        ]

    def run(self) -> Figures:
        """Measure everything."""
        for contender in self.contenders:
            self._dnsperf(contender, self._cached, "-n", "2", "-q", "20")  # into the caches
        for _ in range(self.rounds):
            for contender in self.contenders:
                self._take_rate(contender)
            for contender in self.contenders:
                self._note(self.figures.cached_ms, contender, self._latencies(contender, self._cached))
            for contender in (*self.contenders, *self.upstreams):
                with_fresh_names = self._fresh_names(4000)
                self._note(self.figures.missed_ms, contender, self._latencies(contender, with_fresh_names))
        self._take_hosts()
        self._take_flood()
        return self.figures

    # ---- surroundings ----------------------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        directory = self.lab.directory
        dnsmasq = [
            find_program("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
            "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file=", "--user=root",
        ]  # fmt: skip
        made_up = ("--address=/example/192.0.2.7", "--local-ttl=3600")
        self._spawn(*dnsmasq, f"--port={UPSTREAM}", *made_up)
        self._spawn(*dnsmasq, f"--port={DNSMASQ}", f"--server=127.0.0.1#{UPSTREAM}", "--cache-size=10000")
        config = directory / "unbound.conf"
        config.write_text(
            f"server:\n  interface: 127.0.0.1@{UNBOUND}\n  chroot: ''\n  username: ''\n  use-syslog: no\n"
            f"  pidfile: ''\n"
            f"  directory: '{directory}'\n  do-not-query-localhost: no\n  module-config: iterator\n  num-threads: 1\n"
            f"forward-zone:\n  name: .\n  forward-addr: 127.0.0.1@{UPSTREAM}\nremote-control:\n  control-enable: no\n"
        )
        self._spawn(find_program("unbound"), "-d", "-c", str(config))
        silent = (
            "import socket, signal; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
            f"s.bind(('127.0.0.1', {SILENT})); signal.pause()"
        )
        self._spawn(sys.executable, "-c", silent)
        probe = self.lab.directory / "probe.txt"
        probe.write_text("probe.bench.example A\n")
        for port in (UPSTREAM, DNSMASQ, UNBOUND):
            there = Contender("probe", "127.0.0.1", port, self._host, "")
            wait_until(lambda there=there: self._answers(there, probe), f"a nameserver at port {there.port}")  # type: ignore[misc]

    def _spawn(self, *argv: str) -> subprocess.Popen[bytes]:
        return self.lab.spawn(self._host, argv)

    def _answers(self, contender: Contender, names: Path) -> bool:
        return "NOERROR" in self._dnsperf(contender, names, "-n", "1", "-t", "1")

    def _start_netstack(self) -> Attachment:
        config = self.lab.directory / "netstack.toml"
        config.write_text(
            f'[dns]\nsource = "none"\nupstreams = ["127.0.0.1:{UPSTREAM}"]\nhosts_file = "{self._hosts_file}"\n'
            f'[[dns.route]]\ndomains = ["silent.example"]\nupstreams = ["127.0.0.1:{SILENT}"]\n'
        )
        around = Surroundings(self.lab, self._host, (), ("-c", str(config)))
        attachment = NetstackTap().attach(around, SMALL)
        wait_until(lambda: self._api_path(attachment).exists(), "netstack's API")
        return attachment

    def _api_path(self, attachment: Attachment) -> Path:
        return self.lab.directory / attachment.guest.name / "netstack" / "api.sock"

    def _ask_api(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("netstack")
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with connection.sock:
            connection.sock.settimeout(10.0)
            connection.sock.connect(str(self._api_path(self._attachment)))
            connection.request("GET", path)
            document: dict[str, Any] = json.load(connection.getresponse())
            return document

    # ---- measuring -------------------------------------------------------------------------------------------------

    def _dnsperf(self, contender: Contender, names: Path, *options: str, seconds: float = 60.0) -> str:
        argv = [find_program("dnsperf"), "-s", contender.address, "-p", str(contender.port), "-d", str(names), *options]
        return contender.where.run(argv, seconds=seconds + 30)

    def _take_rate(self, contender: Contender) -> None:
        words = self._dnsperf(
            contender, self._cached, "-c", "10", "-q", str(IN_FLIGHT), "-l", f"{self.seconds:g}", seconds=self.seconds
        )
        found = re.search(r"Queries per second:\s+([0-9.]+)", words)
        lost = re.search(r"Queries lost:\s+([0-9]+)", words)
        codes = re.search(r"Response codes:\s+NOERROR ([0-9]+) \(([0-9.]+)%\)", words)
        if not found or not lost or not codes or float(codes[2]) < 99.9:
            raise LabError(f"{contender.name}: not all answers are there: {words.strip().splitlines()[-12:]}")
        self.figures.rate.setdefault(contender.name, []).append(float(found[1]))
        self.figures.lost[contender.name] = self.figures.lost.get(contender.name, 0) + int(lost[1])

    def _latencies(self, contender: Contender, names: Path, seconds: float | None = None) -> list[float]:
        """Milliseconds of each query, one at a time."""
        length = min(self.seconds, 3.0) if seconds is None else seconds
        again = ("again",) if names == self._cached else ()
        argv = [sys.executable, str(ASKER), contender.address, str(contender.port), f"{length:g}", str(names), *again]
        found: list[float] = json.loads(contender.where.run(argv, seconds=length + 20))
        return found

    def _note(self, table: dict[str, list[float]], contender: Contender, latencies: list[float]) -> None:
        table.setdefault(contender.name, []).append(statistics.median(latencies))

    def _fresh_names(self, count: int, zone: str = "bench.example") -> Path:
        stem = secrets.token_hex(4)
        path = self.lab.directory / f"fresh-{stem}.txt"
        path.write_text("".join(f"{stem}-{number}.{zone} A\n" for number in range(count)))
        return path

    def _take_hosts(self) -> None:
        own = self.contenders[0]
        version = self._ask_api("/v1/dns")["local"]["hosts_file"]["version"]
        self._hosts_file.write_text("".join(f"0.0.0.0 ads{number}.blocked.example\n" for number in range(HOSTS)))
        # In the middle of this it is noticed, read, and used.
        latencies = self._latencies(own, self._cached, 3.0)

        def state() -> dict[str, Any]:
            found: dict[str, Any] = self._ask_api("/v1/dns")["local"]["hosts_file"]
            return found

        wait_until(lambda: state()["names"] == HOSTS, "the hosts file being used", seconds=5.0)
        self.figures.hosts = {
            "load_s": state()["load_ms"] / 1000,
            "versions": state()["version"] - version,
            "p50_ms": statistics.median(latencies),
            "p99_ms": statistics.quantiles(latencies, n=100)[98],
            "max_ms": max(latencies),
        }

    def _take_flood(self) -> None:
        own = self.contenders[0]
        pid = self._attachment.process.pid
        before = read_memory(pid).rss
        names = self._fresh_names(FLOOD, "silent.example")
        # Written to /proc/PID/clear_refs, 5 sets the peak back to what is resident now (proc(5)).
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        words = self._dnsperf(own, names, "-c", "20", "-q", str(FLOOD), "-n", "1", "-t", "6", "-b", "4096")
        after = read_memory(pid)
        codes = re.search(r"Response codes:\s+(.*)", words)
        lost = re.search(r"Queries lost:\s+([0-9]+)", words)
        self.figures.flood = {
            "growth_mib": (after.peak - before) / 1024,
            "left_mib": (after.rss - before) / 1024,
            "lost": float(lost[1]) if lost else -1.0,
        }
        if codes is None or "SERVFAIL" not in codes[1]:
            raise LabError(f"a silent server is to end as SERVFAIL: {words.strip().splitlines()[-12:]}")

    def end(self) -> None:
        """End what the lab does not."""
        self._attachment.end()


def judge(summary: dict[str, float]) -> Iterator[tuple[str, float, bool, str]]:
    """Each target: its key, the figure, whether it is met, words."""
    for key, (sign, bound, words) in TARGETS.items():
        value = summary[key]
        met = value >= bound if sign == ">=" else value <= bound if sign == "<=" else value < bound
        yield key, value, met, f"{sign} {bound:g} {words}"


def measure(*, quick: bool = False) -> dict[str, Any]:
    """A whole run, ready for JSON: figures, summary, targets, versions. Raises LabError."""
    with Lab() as lab:
        bench = Bench(lab, *((1.0, 1) if quick else (2.0, 3)))
        try:
            figures = bench.run()
        finally:
            bench.end()
    summary = figures.summary()
    return {
        "figures": {
            "answers_per_second": _medians(figures.rate),
            "lost": figures.lost,
            "cached_p50_ms": _medians(figures.cached_ms),
            "missed_p50_ms": _medians(figures.missed_ms),
            "flood": figures.flood,
            "hosts": figures.hosts,
        },
        "summary": summary,
        "targets": [
            {"target": key, "value": value, "met": met, "bound": words} for key, value, met, words in judge(summary)
        ],
        "versions": {name: debian_version(package) for name, package in _PACKAGES},
        "seconds": bench.seconds,
        "rounds": bench.rounds,
    }


_PACKAGES = (("dnsmasq", "dnsmasq-base"), ("unbound", "unbound"), ("dnsperf", "dnsperf"))


def show(document: dict[str, Any]) -> None:
    """The figures, for people."""
    figures = document["figures"]
    print(f"{'':24}{'answers/s':>12}{'p50 ms':>10}{'miss p50 ms':>14}{'lost':>8}")
    for name, missed in figures["missed_p50_ms"].items():
        rate, p50 = figures["answers_per_second"].get(name), figures["cached_p50_ms"].get(name)
        shown = f"{rate:12.0f}{p50:10.3f}" if rate is not None else f"{'-':>12}{'-':>10}"
        print(f"{name:24}{shown}{missed:14.3f}{figures['lost'].get(name, 0):8}")
    for section in ("flood", "hosts"):
        print(f"{section}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures[section].items()))
    for target in document["targets"]:
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['value']:10.3f}  {target['bound']}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_dns", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.error("needs root, for network namespaces")
    began = time.monotonic()
    try:
        document = measure(quick=options.quick)
    except LabError as error:
        print(f"bench_dns: {error}", file=sys.stderr)
        return 1
    show(document)
    print(f"took {time.monotonic() - began:.0f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
