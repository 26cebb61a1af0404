"""The network processes under test, and how a guest is attached to each.

A peer is a program with a name; attaching it makes a guest (a network namespace) and one process of that program that
serves it, and tells at which address the guest reaches the host's loopback. Two ways to attach:

- over the QEMU stream protocol: the program listens on a unix socket and the relay carries the guest's tap to it. passt
  and netstack are measured on exactly the same work, and so is QEMU's `-netdev user`, which a QEMU without a machine
  joins to a stream by a hub: libslirp as QEMU runs it, without the cost of emulating a computer.
- on a tap of its own inside the guest's namespace (tap_peers.py).

A third way, a real virtual machine, is in vm.py. A new kind of link is a new subclass and a line in suite.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.lab import Lab, LabError, Namespace, read_cpu_seconds, run, stop, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

GUEST = "192.168.5.15"
GATEWAY = "192.168.5.2"
PREFIX_LENGTH = 24
GUEST_MAC = "52:54:00:12:34:56"
TAP = "tap0"
SMALL, LARGE = 1500, 65520
NETSTACK, TAP_LINK, VHOST_LINK = "netstack", "netstack-tap", "netstack-vhost"

# The measurements that a peer takes part in; `tcp.8` is TCP with 8 streams.
SHORT_CASES = ("start", "tcp", "latency", "connections")
ALL_CASES = (*SHORT_CASES, "tcp.8", "udp", "idle")


@dataclass
class Attachment:
    """A guest and the process that serves it."""

    peer: str
    mtu: int
    guest: Namespace
    host_address: str  # where the guest reaches the host's loopback
    process: subprocess.Popen[bytes]
    relay: subprocess.Popen[bytes] | None = None

    def end(self) -> None:
        """End the processes; the namespace goes with the lab."""
        stop(self.process)
        if self.relay is not None:
            stop(self.relay)


@dataclass
class Surroundings:
    """What every peer needs to be attached: the lab, the namespace of the host and the relay's command."""

    lab: Lab
    host: Namespace
    relay: Sequence[str]
    extra: Sequence[str] = field(default_factory=tuple)  # more options for netstack


class Peer(ABC):
    """A program that gives guests a network."""

    name: str
    program: str
    mtus: tuple[int, ...] = (LARGE, SMALL)
    cases: tuple[str, ...] = ALL_CASES

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if shutil.which(self.program) else f"{self.program} is not installed"

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def start(self, around: Surroundings, mtu: int, guest: Namespace) -> subprocess.Popen[bytes]:
        """Start the process and return when it says that it is ready."""

    @abstractmethod
    def attach(self, around: Surroundings, mtu: int) -> Attachment: ...


def first_line(argv: Sequence[str]) -> str:
    try:
        return run(argv, seconds=10).splitlines()[0].strip()
    except (LabError, IndexError):
        return "unknown"


class StreamPeer(Peer):
    """Listens on a unix socket for the QEMU stream protocol; the guest's tap comes over the relay."""

    guest_address, host_address = GUEST, GATEWAY

    @abstractmethod
    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]: ...

    def is_ready(self, socket_path: Path, ready: int) -> bool:
        """By default when the socket is there: passt and QEMU make it as the last step."""
        return socket_path.exists()

    def environment(self, directory: Path) -> dict[str, str]:
        return {}

    def start(self, around: Surroundings, mtu: int, guest: Namespace) -> subprocess.Popen[bytes]:
        return self.listen(around, mtu, around.lab.directory / guest.name)

    def listen(self, around: Surroundings, mtu: int, directory: Path) -> subprocess.Popen[bytes]:
        """Start the process, its socket at `directory`/guest.sock, and return when it is ready."""
        directory.mkdir(exist_ok=True)
        socket_path = directory / "guest.sock"
        socket_path.unlink(missing_ok=True)
        receive, send = os.pipe2(os.O_NONBLOCK)
        os.set_inheritable(send, True)
        with (directory / f"{self.name}.log").open("wb") as log:
            process = around.lab.spawn(
                around.host,
                [*self.command(socket_path, mtu, send), *(around.extra if isinstance(self, Netstack) else ())],
                stdout=log,
                stderr=log,
                pass_fds=[send],
                environment=self.environment(directory),
            )
        os.close(send)
        try:
            wait_until(
                lambda: self.is_ready(socket_path, receive) or process.poll() is not None, f"{self.name} being ready"
            )
        finally:
            os.close(receive)
        if process.poll() is not None:
            said = Path(log.name).read_text(errors="replace").strip().splitlines() or ["nothing said"]
            raise LabError(f"{self.name} ended with status {process.returncode}: {said[-1]}")
        return process

    def attach(self, around: Surroundings, mtu: int) -> Attachment:
        guest = around.lab.guest(self.name.replace("-", "_"))
        process = self.start(around, mtu, guest)
        relay = attach_relay(around, guest, str(around.lab.directory / guest.name / "guest.sock"))
        configure_tap(guest, mtu, f"{self.guest_address}/{PREFIX_LENGTH}", self.host_address)
        return Attachment(self.name, mtu, guest, self.host_address, process, relay)


def attach_relay(
    around: Surroundings, guest: Namespace, where: str, *, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Run the relay in the guest, its stream at a socket's path or at a descriptor that it inherits."""
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as ready, os.fdopen(send, "wb") as said:
        relay = around.lab.spawn(guest, [*around.relay, TAP, where], stdout=said, stderr=None, pass_fds=pass_fds)
        said.close()
        if ready.readline() != b"ready\n":
            raise LabError(f"the relay in {guest.name} did not start")
    return relay


def configure_tap(guest: Namespace, mtu: int, address: str, gateway: str | None, mac: str = GUEST_MAC) -> None:
    """Static addresses: what DHCP takes is no part of these measurements."""
    guest.ip("link", "set", TAP, "address", mac, "mtu", str(mtu), "up")
    guest.ip("address", "add", address, "dev", TAP)
    if gateway is not None:
        guest.ip("route", "add", "default", "via", gateway)


class Netstack(StreamPeer):
    """`netstack run --link unix://...`, with no state of the user's: the installed one, or that of a checkout."""

    program = "netstack"
    scheme = "unix"

    def __init__(self, name: str = NETSTACK, checkout: Path | None = None, python: str = sys.executable) -> None:
        self.name = name
        self.subnet = "192.168.5.0/24"
        self.counts: Path | None = None  # where cProfile is to leave what it counted
        self._checkout = checkout
        self._python = python

    def _command(self) -> list[str]:
        if self.counts is not None:
            return [self._python, "-m", "cProfile", "-o", str(self.counts), "-m", "netstack"]
        if self._checkout is not None:
            # -P keeps the working directory, which may be another checkout, out of the path; PYTHONPATH comes before
            # what is installed.
            return [self._python, "-P", "-m", "netstack"]
        script = Path(sys.executable).with_name("netstack")
        return [str(script)] if script.exists() else [sys.executable, "-m", "netstack"]

    def missing(self) -> str | None:
        try:
            run([*self._command(), "run", "--help"])
        except LabError as error:
            return f"netstack does not run: {error}"
        return None

    def version(self) -> str:
        return f"{first_line([*self._command(), '--version'])}, Python {sys.version.split()[0]}"

    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]:
        return self._run(f"{self.scheme}://{socket_path}", mtu, ready_fd)

    def _run(self, link: str, mtu: int, ready_fd: int) -> list[str]:
        return [
            *self._command(), "run", "--link", link, "--subnet", self.subnet, "--mtu", str(mtu),
            "--ready-fd", str(ready_fd),
        ]  # fmt: skip

    def is_ready(self, socket_path: Path, ready: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            return os.read(ready, 16).startswith(b"ready")
        return False

    def environment(self, directory: Path) -> dict[str, str]:
        names = ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HOME")
        checkout = {"PYTHONPATH": str(self._checkout)} if self._checkout is not None else {}
        return {name: str(directory) for name in names} | checkout


class Passt(StreamPeer):
    """passt in its socket mode, told to be where netstack is."""

    name, program = "passt", "passt"

    def version(self) -> str:
        return debian_version("passt") or first_line(["passt", "--version"])

    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]:
        return ["passt", "--foreground", "--quiet", "--ipv4-only", "--socket", str(socket_path), *passt_options(mtu)]


def passt_options(mtu: int) -> list[str]:
    # As root passt becomes `nobody`, who may not enter the namespaces made here: it stays root, as netstack does.
    runas = ["--runas", "0"] if os.geteuid() == 0 else []
    return [*runas, "--address", GUEST, "--netmask", str(PREFIX_LENGTH), "--gateway", GATEWAY, "--mtu", str(mtu)]


class QemuUser(StreamPeer):
    """QEMU's `-netdev user` without a computer: a hub joins it to a stream netdev. QEMU leaves libslirp at MTU 1500."""

    name, program = "qemu-user", "qemu-system-x86_64"
    mtus, cases = (SMALL,), SHORT_CASES  # the same libslirp as slirp4netns

    def version(self) -> str:
        return debian_version("qemu-system-x86") or first_line([self.program, "--version"])

    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]:
        return [
            self.program, "-machine", "none", "-nodefaults", "-display", "none", "-monitor", "none", "-serial", "none",
            "-netdev", f"user,id=user,net=192.168.5.0/{PREFIX_LENGTH},host={GATEWAY}",
            "-netdev", f"stream,id=stream,server=on,addr.type=unix,addr.path={socket_path}",
            "-netdev", "hubport,id=port0,hubid=0,netdev=user", "-netdev", "hubport,id=port1,hubid=0,netdev=stream",
        ]  # fmt: skip


def debian_version(package: str) -> str | None:
    try:
        return f"{package} {run(['dpkg-query', '--show', '--showformat=${Version}', package])}"
    except LabError:
        return None


def measure_start(peer: Peer, around: Surroundings) -> tuple[float, float]:
    """Seconds from the start of the program to its being ready, and of CPU until then; the process is ended again."""
    guest = around.lab.guest("start")
    before = time.monotonic()
    process = peer.start(around, LARGE if LARGE in peer.mtus else SMALL, guest)
    seconds, cpu = time.monotonic() - before, read_cpu_seconds(process.pid)
    stop(process)
    return seconds, cpu
