"""What DNS costs a guest: the section `dns` of `python -m benchmarks`, by itself `python -m benchmarks --only dns`.

A guest on netstack's tap runs dnsperf against netstack's own DNS, and, over netstack's UDP path, against caching
forwarders on the host: dnsmasq and unbound, as Debian has them. All of them ask the same upstream, a dnsmasq on the
host's loopback that makes up an answer for every name. Everything runs in one process tree in one run, the contenders
one after the other in each round, and the median of the rounds counts; nothing leaves the machine (lab.py).

    cached    1,000 names that are in every cache: answers a second with 100 queries in flight, and p50 of one at a time
    missed    names that nobody has asked for: the p50 of one at a time, also of the upstream asked by the host itself
    flood     10,000 names in flight, of a zone whose server is silent: what netstack's memory grows by
    hosts     a hosts file of 100,000 lines: how long it takes to be read and used, and what queries notice of it

dnsperf and netstack and the servers share the machine's cores: the figures are good for ratios, not as such.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import shutil
import socket
import statistics
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import dns_metric
from benchmarks.lab import Lab, LabError, Namespace, read_memory, wait_until
from benchmarks.peers import GATEWAY, SMALL, TAP, TAP_LINK, Attachment, Surroundings, debian_version
from benchmarks.tap_peers import NetstackTap

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from benchmarks.figures import Figures

ROOT = Path(__file__).resolve().parents[1]
ASKER = Path(__file__).with_name("dns_asker.py")
FLOODER = Path(__file__).with_name("dns_flooder.py")
DNS = "192.168.5.3"
UPSTREAM, DNSMASQ, UNBOUND, SILENT = 5300, 5301, 5302, 5303
NAMES, IN_FLIGHT, FLOOD, HOSTS = 1000, 100, 10_000, 100_000

# Queries a second at which the flood comes, so that all are there before the first is given up.
FLOOD_RATE = 3000


@dataclass(frozen=True)
class Contender:
    """Somebody to ask, and from where."""

    name: str
    address: str
    port: int
    where: Namespace


def find_program(name: str) -> list[str]:
    """The words that run a program of Debian's, installed or unpacked by scripts/setup-debian.sh. Raises LabError."""
    for place in (shutil.which(name), shutil.which(name, path="/usr/sbin:/sbin")):
        if place is not None:
            return [place]
    unpacked = ROOT / ".cache" / "daemons"
    if (unpacked / "usr" / "sbin" / name).exists():
        libraries = ":".join(map(str, sorted(unpacked.glob("usr/lib/*-linux-gnu*"))))
        return ["env", f"LD_LIBRARY_PATH={libraries}", str(unpacked / "usr" / "sbin" / name)]
    raise LabError(f"no program {name}: run scripts/setup-debian.sh as root")


class Bench:
    """One run."""

    def __init__(self, lab: Lab, figures: Figures, seconds: float) -> None:
        self.lab = lab
        self.seconds = seconds
        self.figures = figures
        self._host = lab.host()
        self._hosts_file = lab.directory / "hosts"
        self._hosts_file.write_text("192.0.2.1 first.example\n")
        self._cached = lab.directory / "cached.txt"
        self._cached.write_text("".join(f"n{number}.bench.example A\n" for number in range(NAMES)))
        self._start_servers()
        self._attachment = self._start_netstack()
        guest = self._attachment.guest
        self.contenders = [
            Contender(TAP_LINK, DNS, 53, guest),
            Contender("dnsmasq", GATEWAY, DNSMASQ, guest),
            Contender("unbound", GATEWAY, UNBOUND, guest),
        ]
        self.upstreams = [
            Contender("upstream", GATEWAY, UPSTREAM, guest),
            Contender("upstream, by the host", "127.0.0.1", UPSTREAM, self._host),
        ]

    def run(self, rounds: int, say: Callable[[str], None]) -> None:
        """Measure everything. `dnsmasq` and `unbound` are reached over netstack's UDP path, as is `upstream`."""
        for contender in self.contenders:
            self._dnsperf(contender, self._cached, "-n", "2", "-q", "20")  # into the caches
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}: dns")
            for contender in self.contenders:
                self._take_rate(contender)
            for contender in self.contenders:
                self._note("cached", contender, statistics.median(self._latencies(contender, self._cached)))
            missed = {}
            for contender in (*self.contenders, *self.upstreams):
                missed[contender.name] = statistics.median(self._latencies(contender, self._fresh_names(4000)))
                self._note("missed", contender, missed[contender.name])
            added = missed[TAP_LINK] - missed["upstream, by the host"]
            self._note("added", self.contenders[0], added)
        say("dns: a hosts file of 100,000 lines, and 10,000 names in flight")
        self._take_hosts()
        self._take_flood()

    # ---- surroundings ----------------------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        directory = self.lab.directory
        dnsmasq = [
            *find_program("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
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
        self._spawn(*find_program("unbound"), "-d", "-c", str(config))
        silent = (
            "import socket, signal; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
            f"s.bind(('127.0.0.1', {SILENT})); signal.pause()"
        )
        self._spawn(sys.executable, "-c", silent)
        probe = self.lab.directory / "probe.txt"
        probe.write_text("probe.bench.example A\n")
        for port in (UPSTREAM, DNSMASQ, UNBOUND):
            there = Contender("probe", "127.0.0.1", port, self._host)
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
        argv = [
            *find_program("dnsperf"),
            "-s",
            contender.address,
            "-p",
            str(contender.port),
            "-d",
            str(names),
            *options,
        ]
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
        self._note("rate", contender, float(found[1]))
        self._note("lost", contender, float(lost[1]))

    def _latencies(self, contender: Contender, names: Path, seconds: float | None = None) -> list[float]:
        """Milliseconds of each query, one at a time."""
        length = min(self.seconds, 3.0) if seconds is None else seconds
        again = ("again",) if names == self._cached else ()
        argv = [sys.executable, str(ASKER), contender.address, str(contender.port), f"{length:g}", str(names), *again]
        found: list[float] = json.loads(contender.where.run(argv, seconds=length + 20))
        return found

    def _note(self, which: str, contender: Contender, value: float) -> None:
        self.figures.add(dns_metric(which), contender.name, value)

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
        if state()["version"] != version + 1:
            raise LabError("the hosts file was read more than once")
        self._note("hosts", own, state()["load_ms"] / 1000)
        self._note("hosts.p99", own, statistics.quantiles(latencies, n=100)[98])
        self._note("hosts.max", own, max(latencies))

    def _take_flood(self) -> None:
        """10,000 names in flight at the same time: they are asked for within 3.4 s, and given up after 4.5."""
        own = self.contenders[0]
        pid = self._attachment.process.pid
        before = read_memory(pid).rss
        names = self._fresh_names(FLOOD, "silent.example")
        # A tap holds 500 packets (drivers/net/tun.c: TUN_READQ_SIZE), and what is beyond is lost before it comes to us.
        self._attachment.guest.run(["ip", "link", "set", TAP, "txqueuelen", str(FLOOD)])
        # Written to /proc/PID/clear_refs, 5 sets the peak back to what is resident now (proc(5)).
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        over = threading.Event()
        in_flight = [0]

        def watch() -> None:
            while not over.wait(0.1):
                in_flight.append(self._ask_api("/v1/dns")["in_flight"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            argv = [sys.executable, str(FLOODER), DNS, "53", str(FLOOD_RATE), str(names)]
            found = json.loads(self._attachment.guest.run(argv, seconds=30))
        finally:
            over.set()
            watcher.join()
        after = read_memory(pid)
        if found["codes"] != {"2": FLOOD}:
            raise LabError(f"names of a silent server are to end as SERVFAIL, each: {found}")
        self._note("flood.queries", own, float(max(in_flight)))
        self._note("flood", own, (after.peak - before) / 1024)

    def end(self) -> None:
        """End what the lab does not."""
        self._attachment.end()


def measure_dns(figures: Figures, *, seconds: float, rounds: int, say: Callable[[str], None]) -> dict[str, str]:
    """A whole run, in a lab of its own; gives the versions of who took part. Raises LabError."""
    with Lab() as lab:
        bench = Bench(lab, figures, seconds)
        try:
            bench.run(rounds, say)
        finally:
            bench.end()
    return {name: debian_version(package) or name for name, package in _PACKAGES}


_PACKAGES = (("dnsmasq", "dnsmasq-base"), ("unbound", "unbound"), ("dnsperf", "dnsperf"))
