"""What is done to a guest's network, and what is read off: one function for each kind of measurement.

Every function takes an attachment, does one run and returns numbers. Repeats, medians and the order of things are the
business of suite.py. A run that fails raises LabError: the figure is then missing, with the reason; the rest goes on.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.lab import LabError, Namespace, is_listening, read_cpu_seconds, stop, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.lab import Lab
    from benchmarks.peers import Attachment

ENDPOINTS = [sys.executable, "-I", str(Path(__file__).with_name("endpoints.py"))]
ECHO_PORT = 7000
DATAGRAM_SIZE = 1400
DATAGRAM_QUEUE = 1 << 20
RMEM_MAX = Path("/proc/sys/net/core/rmem_max")
GIGABYTE = 1e9

Direction = Literal["up", "down"]  # up: guest to host
Protocol = Literal["tcp", "udp"]


@dataclass
class Servers:
    """The host's servers, on its loopback: the echo server for good, iperf3 for one test each."""

    lab: Lab
    host: Namespace
    _ports: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(5201, 5301)))

    def __post_init__(self) -> None:
        echo = self._echo = self.lab.spawn(self.host, [*ENDPOINTS, "serve", "0.0.0.0", str(ECHO_PORT)])
        wait_until(lambda: is_listening(echo.pid, ECHO_PORT + 1), "the echo server listening")

    def end(self) -> None:
        stop(self._echo)

    @contextmanager
    def iperf3(self) -> Iterator[int]:
        """A fresh iperf3 server for one test: one that a failed test left busy cannot spoil the next."""
        port = next(self._ports)
        server = self.lab.spawn(self.host, ["iperf3", "--server", "--one-off", "--port", str(port)])
        try:
            wait_until(lambda: is_listening(server.pid, port), "iperf3 listening")
            yield port
        finally:
            stop(server)


def run_iperf3(guest: Namespace, address: str, port: int, seconds: float, *options: str) -> dict[str, Any]:
    """One iperf3 client in the guest, for whole seconds, as it knows no others (0 is for ever); its JSON."""
    seconds = max(1, round(seconds))
    argv = [
        "iperf3", "--client", address, "--port", str(port), "--time", str(seconds), "--json",
        "--connect-timeout", "5000", *options,
    ]  # fmt: skip
    try:
        done = subprocess.run(guest.command(argv), capture_output=True, text=True, timeout=seconds + 15, check=False)
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise LabError("iperf3 did not come to an end") from None
    except json.JSONDecodeError:
        raise LabError("iperf3 said nothing") from None
    if "error" in report:
        raise LabError(f"iperf3: {report['error']}")
    return report


@dataclass(frozen=True)
class TcpRun:
    """Throughput in Gbit/s; CPU seconds for each gigabyte, of the network process and of the relay."""

    gbits: float
    cpu: float
    relay_cpu: float | None


def measure_tcp(
    servers: Servers, attachment: Attachment, direction: Direction, streams: int, seconds: float, warm_up: int = 1
) -> TcpRun:
    """One iperf3 run. CPU is set against all bytes of the run, those of the warm-up too."""
    options = ["--parallel", str(streams), "--omit", str(warm_up), *(["--reverse"] if direction == "down" else [])]
    pids = [attachment.process.pid] + ([attachment.relay.pid] if attachment.relay else [])
    with servers.iperf3() as port:
        before = [read_cpu_seconds(pid) for pid in pids]
        report = run_iperf3(attachment.guest, attachment.host_address, port, seconds, *options)
        spent = [read_cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    gigabytes = sum(interval["sum"]["bytes"] for interval in report["intervals"]) / GIGABYTE
    if gigabytes == 0:
        raise LabError("no byte arrived")
    return TcpRun(
        gbits=report["end"]["sum_received"]["bits_per_second"] / 1e9,
        cpu=spent[0] / gigabytes,
        relay_cpu=spent[1] / gigabytes if attachment.relay else None,
    )


@dataclass(frozen=True)
class UdpRun:
    """Datagrams that arrived, per second, and what share of those sent did not, in per cent."""

    delivered: float
    loss: float


def measure_udp(servers: Servers, attachment: Attachment, direction: Direction, gbits: float, seconds: float) -> UdpRun:
    """Datagrams of 1,400 bytes at a given rate, iperf3's own queue large enough not to be what loses them."""
    options = ["--udp", "--length", str(DATAGRAM_SIZE), "--bitrate", f"{gbits * 1000:g}M"]
    options += ["--window", str(min(DATAGRAM_QUEUE, int(RMEM_MAX.read_text())))]
    options += ["--reverse"] if direction == "down" else []
    with servers.iperf3() as port:
        report = run_iperf3(attachment.guest, attachment.host_address, port, seconds, *options)
    total = report["end"]["sum"]
    if not total["packets"]:
        raise LabError("no datagram was sent or counted")
    return UdpRun(
        delivered=(total["packets"] - total["lost_packets"]) / total["seconds"],
        loss=100 * total["lost_packets"] / total["packets"],
    )


@dataclass(frozen=True)
class RoundTrips:
    """Microseconds, and how many there were."""

    p50: float
    p99: float
    count: int = 0


def run_endpoint(guest: Namespace, *arguments: str, seconds: float) -> dict[str, float]:
    report: dict[str, float] = json.loads(guest.run([*ENDPOINTS, *arguments], seconds=seconds + 15))
    return report


def measure_round_trips(attachment: Attachment, protocol: Protocol, size: int, seconds: float) -> RoundTrips:
    report = run_endpoint(
        attachment.guest, "rr", protocol, attachment.host_address, str(ECHO_PORT), str(size), f"{seconds:g}",
        seconds=seconds,
    )  # fmt: skip
    return RoundTrips(p50=report["p50"], p99=report["p99"], count=int(report["count"]))


def measure_connections(attachment: Attachment, concurrency: int, seconds: float) -> float:
    """Connections a second; raises LabError when more than one in a hundred failed."""
    report = run_endpoint(
        attachment.guest, "crr", attachment.host_address, str(ECHO_PORT + 1), str(concurrency), f"{seconds:g}",
        seconds=seconds,
    )  # fmt: skip
    if report["failed"] > report["per_second"] * seconds / 100:
        raise LabError(f"{report['failed']:.0f} connections failed, {report['per_second']:.0f} a second did not")
    return report["per_second"]
