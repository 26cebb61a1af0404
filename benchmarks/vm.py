"""A real virtual machine: the same guest on QEMU's own user network, on netstack's stream link and on its vhost-user.

One QEMU with three network cards, each card in a network of its own, so that the choice of the address is the choice of
the network, and all three are measured on the same guest, one right after the other. The guest is Debian's kernel with
iperf3 in a RAM file system (tests/lab). Without KVM it runs under TCG, which costs so much for each byte and interrupt
that the guest is most of what is measured; the ratios are therefore milder than the networks alone would give.

A network that cannot be attached is left out, with the reason, and the guest boots without it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import VM_ROUND_TRIP, vm_tcp_metric
from benchmarks.lab import LabError, stop
from benchmarks.load import ECHO_PORT
from benchmarks.peers import LARGE, NETSTACK, SMALL, VHOST_LINK, Netstack
from tests.lab.guest import Guest, GuestError, Nic, find_accelerator, stream_nic, vhost_user_nic
from tests.lab.initramfs import LabUnavailableError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping

    from benchmarks import load
    from benchmarks.figures import Metric
    from benchmarks.peers import Surroundings
    from benchmarks.suite import Plan

MEMORY = 512  # MiB
QEMU_USER = "qemu-user"
ENDPOINTS = Path(__file__).with_name("endpoints.py")


@dataclass(frozen=True)
class Wire:
    """One card of the guest and the network behind it: the host is x.x.x.2 there, the guest x.x.x.15."""

    peer: str
    network: str  # the first three bytes, as in "192.168.5"
    nic: Nic
    mtus: tuple[int, ...] = (SMALL, LARGE)
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"{self.network}.2"


class NetstackVhost(Netstack):
    """`netstack run --link vhost-user://...`."""

    scheme = "vhost-user"

    def __init__(self, name: str = VHOST_LINK, checkout: Path | None = None, python: str = sys.executable) -> None:
        super().__init__(name, checkout, python)


VM_LINKS: dict[str, type[Netstack]] = {"vm-stream": Netstack, "vm-vhost-user": NetstackVhost}


def make_user_wire(network: str) -> Wire:
    """libslirp inside QEMU: no process of its own, and MTU 1500, as QEMU has no option for it."""
    netdev = f"user,net={network}.0/24,host={network}.2"
    return Wire(QEMU_USER, network, Nic(netdev, _mac(network)), mtus=(SMALL,))


def make_netstack_wire(around: Surroundings, netstack: Netstack, network: str) -> Wire:
    """Starts the process. Raises LabError when it does not get ready."""
    folder = around.lab.directory / f"vm-{netstack.name}"
    netstack.subnet = f"{network}.0/24"
    process = netstack.listen(around, LARGE, folder)
    make_nic = vhost_user_nic if isinstance(netstack, NetstackVhost) else stream_nic
    return Wire(netstack.name, network, make_nic(folder / "guest.sock", _mac(network)), process=process)


def _mac(network: str) -> str:
    return f"52:54:00:00:{int(network.rpartition('.')[2]):02x}:15"


MAKERS: dict[str, Callable[[Surroundings], Wire]] = {
    QEMU_USER: lambda around: make_user_wire("192.168.7"),
    NETSTACK: lambda around: make_netstack_wire(around, Netstack(), "192.168.5"),
    VHOST_LINK: lambda around: make_netstack_wire(around, NetstackVhost(), "192.168.6"),
}


class Machine:
    """The guest and its wires; `end` ends them."""

    def __init__(
        self, around: Surroundings, makers: Mapping[str, Callable[[Surroundings], Wire]], *, strict: bool = False
    ) -> None:
        """With the wires that these make; `failed` says why it has not all of them. `strict`: all or LabError."""
        self._around = around
        self._ending = contextlib.ExitStack()
        self.failed: dict[str, str] = {}
        self.wires: list[Wire] = []
        for peer, make in makers.items():
            try:
                wire = make(around)
            except LabError as error:
                if strict:
                    self.end()
                    raise
                self.failed[peer] = str(error)
                continue
            self.wires.append(wire)
            if wire.process is not None:
                self._ending.callback(stop, wire.process)

    def end(self) -> None:
        self._ending.close()

    def boot(self) -> None:
        """Start it and give its cards their addresses. Raises LabError."""
        self.guest = Guest(
            [wire.nic for wire in self.wires],
            self._around.lab.directory / "vm",
            memory=MEMORY,
            capture=None,
            prefix=["nsenter", f"--net={self._around.host.path}"],
        )
        try:
            self.guest.start()
            self._ending.callback(self.guest.stop)
            self.guest.write_file("/tmp/endpoints.py", ENDPOINTS.read_bytes())
            for number, wire in enumerate(self.wires):
                self.guest.check(f"ip addr add {wire.network}.15/24 dev eth{number} && ip link set eth{number} up")
        except (GuestError, LabUnavailableError) as error:
            raise LabError(f"the virtual machine: {str(error).splitlines()[0]}") from None

    def set_mtu(self, wire: Wire, mtu: int) -> None:
        self._check(f"ip link set eth{self.wires.index(wire)} mtu {mtu}", 10)

    def measure_tcp(self, servers: load.Servers, wire: Wire, direction: load.Direction, seconds: float) -> float:
        """One iperf3 run, one stream; Gbit/s."""
        seconds = max(1, round(seconds))  # iperf3 knows no others
        with servers.iperf3() as port:
            words = [
                "iperf3", "--client", wire.host, "--port", str(port), "--time", str(seconds), "--omit", "1",
                "--json", "--connect-timeout", "5000", *(["--reverse"] if direction == "down" else []),
            ]  # fmt: skip
            report = json.loads(self._check(shlex.join(words), seconds + 20))
        if "error" in report:
            raise LabError(f"iperf3: {report['error']}")
        gbits: float = report["end"]["sum_received"]["bits_per_second"] / 1e9
        return gbits

    def measure_round_trip(self, wire: Wire, seconds: float) -> float:
        """The p50 of round trips of one byte, in microseconds."""
        words = ["python3", "/tmp/endpoints.py", "rr", "tcp", wire.host, str(ECHO_PORT), "1", f"{seconds:g}"]
        p50: float = json.loads(self._check(shlex.join(words), seconds + 20).splitlines()[-1])["p50"]
        return p50

    def _check(self, command: str, timeout: float) -> str:
        try:
            return self.guest.check(command, timeout)
        except GuestError as error:
            raise LabError(" ".join(str(error).split())[:200]) from None
        except OSError as error:  # QEMU has ended
            raise LabError(f"the virtual machine: {error}") from None


@contextlib.contextmanager
def start_machine(around: Surroundings) -> Iterator[Machine]:
    """The machine with all its wires; without vhost-user where QEMU or netstack does not get along with it."""
    machine = Machine(around, MAKERS)
    try:
        try:
            machine.boot()
        except LabError as error:
            machine.end()
            if VHOST_LINK in machine.failed:
                raise
            machine = Machine(around, {peer: make for peer, make in MAKERS.items() if peer != VHOST_LINK})
            machine.failed[VHOST_LINK] = str(error)
            machine.boot()
        yield machine
    finally:
        machine.end()


def measure_machine(
    around: Surroundings,
    servers: load.Servers,
    plan: Plan,
    guard: Callable[[list[Metric], str, Callable[[], list[float | None]]], None],
    say: Callable[[str], None],
) -> str:
    """All rounds in one boot; returns how the guest was run, for the notes of the run."""
    with start_machine(around) as machine:

        def not_there(reason: str) -> list[float | None]:
            raise LabError(reason)

        for peer, reason in machine.failed.items():
            guard([vm_tcp_metric("up", SMALL)], peer, functools.partial(not_there, reason))
        for number in range(1, plan.rounds + 1):
            say(f"round {number} of {plan.rounds}: a virtual machine")
            shift = number % len(machine.wires)
            order = machine.wires[shift:] + machine.wires[:shift]
            for mtu in (SMALL, LARGE):
                having = [wire for wire in order if mtu in wire.mtus]
                for wire in having:
                    machine.set_mtu(wire, mtu)
                for direction in ("up", "down"):
                    for wire in having:
                        take = functools.partial(_tcp, machine, servers, wire, direction, plan.tcp_seconds)
                        guard([vm_tcp_metric(direction, mtu)], wire.peer, take)
            for wire in order:
                guard([VM_ROUND_TRIP], wire.peer, functools.partial(_round_trip, machine, wire, plan))
        return find_accelerator().upper()


def _tcp(
    machine: Machine, servers: load.Servers, wire: Wire, direction: load.Direction, seconds: float
) -> list[float | None]:
    return [machine.measure_tcp(servers, wire, direction, seconds)]


def _round_trip(machine: Machine, wire: Wire, plan: Plan) -> list[float | None]:
    return [machine.measure_round_trip(wire, plan.round_trip_seconds)]
