"""What a run makes on the machine and removes again: namespaces, processes, a directory.

The guests are network namespaces with a tap, the host is a network namespace with a loopback and no way out, and every
network process under test runs in that host. Nothing that a benchmark sends can leave the machine.

Whatever happens, `Lab` ends the processes it started (by their pid) and deletes its namespaces; a run that was killed
hard leaves namespaces behind, and the next run removes those whose process is gone. Children die with us: setpriv asks
the kernel for it (PR_SET_PDEATHSIG), which survives the exec calls that follow.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

PREFIX = "nsbench"
NAMESPACES = Path("/run/netns")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class LabError(Exception):
    """Something could not be set up or measured; the message is for people."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace by the name that `ip netns` knows."""

    name: str

    @property
    def path(self) -> str:
        return str(NAMESPACES / self.name)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in this namespace, under its own pid."""
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={self.path}", *argv]

    def run(self, argv: Sequence[str], *, seconds: float = 30.0) -> str:
        """Run to the end and return standard output; raises LabError with what it said when it fails."""
        return run(self.command(argv), seconds=seconds)

    def ip(self, *arguments: str) -> None:
        run(["ip", "-n", self.name, *arguments])

    def sysctl(self, name: str, value: str) -> None:
        """Set /proc/sys/net/NAME in this namespace; the tree shows the namespace of the process that opens it."""
        self.run(["sh", "-c", f"echo '{value}' > /proc/sys/net/{name}"])


def run(argv: Sequence[str], *, seconds: float = 30.0) -> str:
    """Run to the end and return standard output; raises LabError with the last line it said when it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)}: no end after {seconds:g} s") from None
    except OSError as error:
        raise LabError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing said"]
        raise LabError(f"{' '.join(argv)}: exit status {done.returncode}: {said[-1]}")
    return done.stdout


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 10.0) -> None:
    """Poll until the condition holds; raises LabError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not after {seconds:g} s")
        time.sleep(0.002)


def is_listening(pid: int, port: int) -> bool:
    """Whether some socket in the network namespace of `pid` listens on the TCP port."""
    wanted = f":{port:04X}"
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[1].endswith(wanted):
                return True
    return False


def allow_files(count: int) -> bool:
    """Whether the processes started from here may open so many files each; raises the limit where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        with contextlib.suppress(ValueError, OSError):  # not root, or a root without CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, count))
            return True
    return hard >= count


def read_cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads so far, without softirqs that ran meanwhile."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


@dataclass(frozen=True)
class Memory:
    """Memory of a process in KiB: resident now, resident at most, and its proportional share of what is shared."""

    rss: int
    peak: int
    pss: int


def read_memory(pid: int) -> Memory:
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()

    def field(name: str, text: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) if found else 0

    return Memory(rss=field("VmRSS", status), peak=field("VmHWM", status), pss=field("Pss", rollup))


class Lab:
    """A directory, namespaces and processes with one end of life: use as a context manager."""

    def __init__(self) -> None:
        self._cleanup = contextlib.ExitStack()
        self._namespaces = 0
        self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-"))
        self.directory.chmod(0o755)  # peers drop their privileges and must still reach their socket
        self._cleanup.callback(shutil.rmtree, self.directory, ignore_errors=True)
        remove_stale_namespaces()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def namespace(self, role: str) -> Namespace:
        """A new namespace with its loopback up and nothing else."""
        self._namespaces += 1
        namespace = Namespace(f"{PREFIX}-{os.getpid()}-{self._namespaces}-{role}")
        run(["ip", "netns", "add", namespace.name])
        self._cleanup.callback(_delete_namespace, namespace.name)
        namespace.ip("link", "set", "lo", "up")
        return namespace

    def host(self) -> Namespace:
        """The host: a loopback, and an uplink that leads nowhere, for peers that refuse to start without a route."""
        host = self.namespace("host")
        host.ip("link", "add", "uplink", "type", "veth", "peer", "name", "nowhere")
        host.ip("address", "add", "10.99.0.1/24", "dev", "uplink")
        host.ip("link", "set", "nowhere", "up")
        host.ip("link", "set", "uplink", "up")
        host.ip("route", "add", "default", "via", "10.99.0.2")
        host.sysctl("ipv4/ip_local_port_range", "10000 65000")
        host.sysctl("ipv4/ping_group_range", "0 2147483647")
        return host

    def guest(self, role: str) -> Namespace:
        """A guest; its interface comes later. Many ports, so that thousands of short connections find one each."""
        guest = self.namespace(role)
        guest.sysctl("ipv4/ip_local_port_range", "10000 65000")
        return guest

    def spawn(
        self,
        namespace: Namespace,
        argv: Sequence[str],
        *,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process that `stop` or the end of the lab ends."""
        everything = {**os.environ, **(environment or {})}
        # An installed program has its bytecode; without it every start would compile netstack's modules again.
        everything.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(
            namespace.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            env=everything,
        )
        self._cleanup.callback(stop, process)
        return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process: politely, then not. Does nothing when it is gone already."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _delete_namespace(name: str) -> None:
    with contextlib.suppress(LabError):
        run(["ip", "netns", "delete", name])


def remove_stale_namespaces() -> None:
    """Delete the namespaces of runs that were killed before they could."""
    if not NAMESPACES.is_dir():
        return
    for path in NAMESPACES.iterdir():
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\d+-\w+", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _delete_namespace(path.name)
