"""Forwards, from ports of the host to a guest: the section `forwards` of `python -m benchmarks`.

The guest serves, a caller on the host's loopback connects to a port that is forwarded: netstack's `-p`, passt's
`-t`, slirp4netns' add_hostfwd. In each round all peers are measured one after another, at MTU 65520.

    in, out      iperf3 with one stream, from the caller to the guest and back
    share        `in` over the same peer's host-to-guest throughput in a connection that the guest opened: what going
                 through a forward costs, in a figure that peers of different speed have in common
    connect      from the caller's connect() to the return of accept() in the guest
    greeting     from connect() until the caller has what a guest says that speaks first
    lost         of 30,000 datagrams a second of 200 bytes, from the caller to the guest; and what they cost
    open         1,000 forwards that are asked for one by one over the API, and by one SPEC as a range
    idle         what 1,000 forwards cost that nobody calls
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import load
from benchmarks.figures import forward_metric
from benchmarks.lab import Lab, LabError, is_listening, read_cpu_seconds, read_memory, stop, wait_until
from benchmarks.peers import GUEST, LARGE, Attachment, Netstack, Passt, Peer, Surroundings
from benchmarks.tap_peers import NetstackTap, Slirp4netns

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

    from benchmarks.figures import Figures
    from benchmarks.lab import Namespace

CALLER = [sys.executable, "-I", str(Path(__file__).with_name("forward_caller.py"))]
IPERF, GREETER = 5201, 5301  # the guest's ports; the host's are so much higher:
ABOVE = 10_000
MANY = 1000
FIRST_OF_MANY = 3000  # below what the host gives to connections
IDLE_SECONDS = 10.0
DATAGRAMS, DATAGRAM = 30_000, 200  # a second; bytes
WINDOW = 4 << 20  # of iperf3's own sockets: it is not what is measured
LOOPBACK = "127.0.0.1"


class ForwardingPasst(Passt):
    """passt with both ports."""

    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]:
        return [
            *super().command(socket_path, mtu, ready_fd),
            "--tcp-ports",
            _passt_ports(),
            "--udp-ports",
            _passt_ports(),
        ]


class ForwardingSlirp4netns(Slirp4netns):
    """slirp4netns, told of both ports over its own API."""

    def start(self, around: Surroundings, mtu: int, guest: Namespace) -> subprocess.Popen[bytes]:
        api = str(around.lab.directory / "slirp4netns.sock")
        self.options = ("--api-socket", api)
        process = super().start(around, mtu, guest)
        for protocol, port in (("tcp", IPERF), ("tcp", GREETER), ("udp", IPERF)):
            asked = {"proto": protocol, "host_addr": LOOPBACK, "host_port": port + ABOVE, "guest_port": port}
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(api)
                sock.sendall(json.dumps({"execute": "add_hostfwd", "arguments": asked}).encode())
                sock.shutdown(socket.SHUT_WR)
                said = json.loads(sock.makefile().read() or "{}")
            if "error" in said:
                raise LabError(f"slirp4netns: {said['error']}")
        return process


def _passt_ports() -> str:
    return f"{LOOPBACK}/" + ",".join(f"{port + ABOVE}:{port}" for port in (IPERF, GREETER))


@dataclass
class Served:
    """A peer with its guest, and the guest's greeter."""

    attachment: Attachment
    greeter: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return self.attachment.peer


class Bench:
    """One run."""

    def __init__(self, lab: Lab, figures: Figures, relay: Sequence[str], seconds: float) -> None:
        self.lab = lab
        self.figures = figures
        self.seconds = seconds
        self.host = lab.host()
        self.servers = load.Servers(lab, self.host)
        self._around = Surroundings(lab, self.host, relay, _forward_options())

    def _serve(self, attachment: Attachment) -> Served:
        greeter = self.lab.spawn(attachment.guest, [*CALLER, "greet", "0.0.0.0", str(GREETER)])
        wait_until(lambda: is_listening(greeter.pid, GREETER), "the greeter listening")
        return Served(attachment, greeter)

    def take(self, peer: Peer, say: Callable[[str], None]) -> None:
        """All figures of one peer in one round."""
        served = self._serve(peer.attach(self._around, LARGE))
        parts = {"tcp.in": self._take_streams, "connect.p50": self._take_greetings, "udp.lost": self._take_datagrams}
        try:
            for which, part in parts.items():
                try:
                    part(served)
                except LabError as error:  # passt of 2023 loses what a guest says that closes at once, for example
                    self.figures.fail(forward_metric(which), peer.name, str(error))
                    say(f"  {peer.name}: {error}")
        finally:
            stop(served.greeter)
            served.attachment.end()

    def _take_streams(self, served: Served) -> None:
        rates = {way: self._through(served, way) for way in ("in", "out")}
        opened = load.measure_tcp(self.servers, served.attachment, "down", 1, self.seconds)
        for way, gbits in rates.items():
            self._note(f"tcp.{way}", served, gbits)
        self._note("flow", served, opened.gbits)
        self._note("share", served, rates["in"] / opened.gbits)

    def _through(self, served: Served, way: str) -> float:
        guest = served.attachment.guest
        server = self.lab.spawn(guest, ["iperf3", "--server", "--one-off", "--port", str(IPERF)])
        try:
            wait_until(lambda: is_listening(server.pid, IPERF), "iperf3 listening")
            reverse = ["--reverse"] if way == "out" else []
            report = load.run_iperf3(self.host, LOOPBACK, IPERF + ABOVE, self.seconds, "--omit", "1", *reverse)
        finally:
            stop(server)
        gbits: float = report["end"]["sum_received"]["bits_per_second"] / 1e9
        return gbits

    def _take_greetings(self, served: Served) -> None:
        seconds = min(self.seconds, 2.0)
        argv = [*CALLER, "call", LOOPBACK, str(GREETER + ABOVE), f"{seconds:g}"]
        found = json.loads(self.host.run(argv, seconds=seconds + 15))
        for which in ("connect.p50", "connect.p99", "greeting.p50", "greeting.p99"):
            self._note(which, served, found[which])

    def _take_datagrams(self, served: Served) -> None:
        """What an application that sends small datagrams at a steady pace loses."""
        pid = served.attachment.process.pid
        server = self.lab.spawn(served.attachment.guest, ["iperf3", "--server", "--one-off", "--port", str(IPERF)])
        rate = f"{DATAGRAMS * DATAGRAM * 8}"
        options = ["--udp", "--length", str(DATAGRAM), "--bitrate", rate, "--window", str(WINDOW)]
        try:
            wait_until(lambda: is_listening(server.pid, IPERF), "iperf3 listening")
            before = read_cpu_seconds(pid)
            report = load.run_iperf3(self.host, LOOPBACK, IPERF + ABOVE, self.seconds, *options)
            spent = read_cpu_seconds(pid) - before
        finally:
            stop(server)
        found = report["end"]["sum"]
        self._note("udp.lost", served, found["lost_percent"])
        self._note("udp.cpu", served, spent / found["packets"] * 1e6)

    def take_many(self, peer: Netstack) -> None:
        """A thousand forwards: to open, and to have."""
        attachment = peer.attach(self._around, LARGE)
        path = self.lab.directory / attachment.guest.name / "netstack" / "api.sock"
        Api(path).close()
        name, pid = attachment.peer, attachment.process.pid
        try:
            before, rest = read_memory(pid).rss, self._cpu_at_rest(pid)
            api = Api(path)  # one that has been idle for 5 s is closed
            begun = time.monotonic()
            for number in range(MANY):
                api.ask("POST", "/v1/forwards", {"spec": f"{FIRST_OF_MANY + number}:80"})
            self.figures.add(forward_metric("open"), name, time.monotonic() - begun)
            self.figures.add(forward_metric("idle.memory"), name, (read_memory(pid).rss - before) / MANY)
            self.figures.add(forward_metric("idle.cpu"), name, (self._cpu_at_rest(pid) - rest) * 1000)
            api = Api(path)
            begun = time.monotonic()
            first = FIRST_OF_MANY + MANY
            api.ask("POST", "/v1/forwards", {"spec": f"{first}-{first + MANY - 1}:{first}-{first + MANY - 1}"})
            self.figures.add(forward_metric("open.range"), name, time.monotonic() - begun)
        finally:
            attachment.end()

    def _cpu_at_rest(self, pid: int) -> float:
        before = read_cpu_seconds(pid)
        time.sleep(IDLE_SECONDS)
        return read_cpu_seconds(pid) - before

    def _note(self, which: str, served: Served, value: float) -> None:
        self.figures.add(forward_metric(which), served.name, value)


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket, connected again whenever the server has closed it."""

    def __init__(self, path: Path) -> None:
        super().__init__("netstack", timeout=10.0)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10.0)
        self.sock.connect(str(self._path))


class Api:
    """netstack's API."""

    def __init__(self, path: Path) -> None:
        wait_until(path.exists, "netstack's API")
        self._connection = Connection(path)
        self.ask("GET", "/v1/forwards")  # it serves

    def close(self) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer. Raises LabError when that is none of success."""
        text = None if body is None else json.dumps(body)
        self._connection.request(method, path, text, {"Content-Type": "application/json"} if text else {})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status >= 300:
            raise LabError(f"{method} {path}: {answer.status} {data[:200]!r}")
        return json.loads(data)


def _forward_options() -> tuple[str, ...]:
    ports = (f"{IPERF}", f"{GREETER}", f"{IPERF}/udp")
    return tuple(word for port in ports for word in ("-p", f"{int(port[:4]) + ABOVE}:{GUEST}:{port}"))


def measure_forwards(
    figures: Figures, relay: Sequence[str], lab: Lab, *, seconds: float, rounds: int, say: Callable[[str], None]
) -> None:
    """Take the figures of this section; what cannot be taken is said."""
    bench = Bench(lab, figures, relay, seconds)
    peers: list[Peer] = [Netstack(), NetstackTap(), ForwardingPasst(), ForwardingSlirp4netns()]
    here = [peer for peer in peers if peer.missing() is None]
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}: forwards")
        for peer in here[number % len(here) :] + here[: number % len(here)]:
            try:
                bench.take(peer, say)
            except LabError as error:
                figures.fail(forward_metric("tcp.in"), peer.name, str(error))
                say(f"  {peer.name}: {error}")
    say("1,000 forwards")
    bench.take_many(NetstackTap())
