"""Where the demonstration plays: the host's side of it, and how it is shown. The play itself is examples/demo.py.

class Host is the host as netstack sees it: a network namespace of its own, whose only other end is itself, so that
nothing can leave this machine. Where the kernel grants none to this user, it is this host's loopback instead. A web
server, a resolver and a counterpart for measuring run there, real programs each with its log.

class Report writes headings, facts and failures: with colours on a terminal, and as plain text elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tests.lab.guest import find_qemu
from tests.lab.initramfs import LabUnavailableError, find_kernel
from tests.lab.namespaces import LEASH, Namespace, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from rich.status import Status

ROOT = Path(__file__).resolve().parents[1]
# The host's own addresses in its namespace. They are set aside for documentation (RFC 5737, RFC 3849).
HOST4, HOST6 = "198.51.100.1", "2001:db8:1::1"
NAME = "www.example.test"
WEB_SERVER = """
import sys
from tests.lab.servers import HttpServer
with HttpServer(sys.argv[1], int(sys.argv[2])) as server:
    print("ready")
    server.serve_forever()
"""
WIDEST = 100  # columns
LABEL = 14  # columns of the words before a fact
MARGIN = 4


class StepError(Exception):
    """A step of the demonstration went wrong; the text says what was expected, and what came instead."""


class Program:
    """A program on the host that runs while the demonstration does; what it writes is kept in a log."""

    def __init__(self, host: Host, log: Path, ready: str, *command: str | Path) -> None:
        """Start `command` and wait until it has written `ready`."""
        self._log = log
        words = [*(host.namespace.words() if host.namespace else LEASH), *command]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
        try:
            wait_until(lambda: ready in self.log or self._process.poll() is not None, f"{command[0]}: {ready!r}", 20)
            if self._process.poll() is not None:
                raise StepError(f"expected {command[0]} to run on the host; it ended and said: {self.log.strip()}")
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Host:
    """The host's side. `addresses` are those at which its servers listen."""

    def __init__(self, folder: Path) -> None:
        """Take a namespace, or do without; `folder` is for the servers' files and logs."""
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.namespace: Namespace | None = None
        self.no_namespace = ""
        try:
            self.namespace = self._stack.enter_context(Namespace("host"))
        except LabUnavailableError as lack:
            self.no_namespace = str(lack)
            self.addresses = ["127.0.0.1", *(["::1"] if can_bind("::1") else [])]
        else:
            self.addresses = self._lay_cable(self.namespace)

    def _lay_cable(self, namespace: Namespace) -> list[str]:
        """Give the host a network card with nobody at its other end, so that it has addresses and a default route."""
        namespace.ip("link", "add", "eth0", "type", "veth", "peer", "name", "nobody")
        if Path("/etc/resolv.conf").exists():  # without it, the resolver on the host itself is asked (resolv.conf(5))
            ours = self._folder / "resolv.conf"
            ours.write_text("nameserver 127.0.0.1\nsearch example.test\n")
            namespace.bind_file("/etc/resolv.conf", ours)
        for device in ("eth0", "nobody"):
            namespace.ip("link", "set", device, "up")
        namespace.add_address("eth0", f"{HOST4}/24")
        namespace.ip("route", "add", "default", "dev", "eth0")
        try:
            namespace.add_address("eth0", f"{HOST6}/64")
            namespace.ip("-6", "route", "add", "default", "dev", "eth0")
        except RuntimeError:  # a kernel without IPv6
            return [HOST4]
        return [HOST4, HOST6]

    def port(self, wanted: int) -> int:
        """The port for a server: `wanted` where all are ours, else one that is free."""
        if self.namespace is not None:
            return wanted
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def start_web(self, port: int) -> list[Program]:
        """The lab's web server: `/` is a page, `/bytes/N` a file; its log says who asks. One for each address."""
        return [
            self._start(f"web{number}", "ready", sys.executable, "-u", "-c", WEB_SERVER, address, str(port))
            for number, address in enumerate(self.addresses)
        ]

    def start_resolver(self, port: int, addresses: Sequence[str]) -> Program | None:
        """dnsmasq, which knows NAME and asks nobody else; None where it is not installed."""
        program = shutil.which("dnsmasq", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            return None
        # It stays the user that it is: in a user namespace there is no other.
        return self._start(
            "dnsmasq", "started", program, "--keep-in-foreground", "--user=", "--conf-file=/dev/null", "--pid-file=",
            "--bind-interfaces", "--listen-address=127.0.0.1", f"--port={port}", "--no-resolv", "--no-hosts",
            "--log-facility=-", "--log-queries", f"--host-record={NAME},{','.join(addresses)}",
        )  # fmt: skip

    def start_iperf(self, port: int) -> Program | None:
        """The other end of iperf3; None where it is not installed."""
        if shutil.which("iperf3") is None:
            return None
        listening = "Server listening"
        return self._start(
            "iperf3", listening, "iperf3", "-s", "-B", self.addresses[0], "-p", str(port), "--forceflush"
        )

    def _start(self, name: str, ready: str, *command: str | Path) -> Program:
        program = Program(self, self._folder / f"{name}.log", ready, *command)
        self._stack.callback(program.close)
        return program

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def can_bind(address: str) -> bool:
    """Whether this host has the address."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def writable(folder: Path) -> Path | None:
    """The folder, made where it is not there; None where this user may not write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def shown(path: Path) -> str:
    """A path as people would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def find_missing() -> list[str]:
    """What this machine lacks for the demonstration, and how to mend it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return [f"the demonstration needs Linux on x86-64; this is {sys.platform} on {platform.machine()}"]
    missing = []
    checks: tuple[Callable[[], object], ...] = (find_qemu, find_kernel)
    for check in checks:
        try:
            check()
        except LabUnavailableError as lack:
            missing.append(str(lack))
    return missing


class Report:
    """What people see."""

    def __init__(self) -> None:
        # What a guest or a terminal's settings bring about must not end the play.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self.console = Console(highlight=False)
        if not self.console.is_terminal or self.console.width > WIDEST:
            self.console.width = WIDEST
        plain = self.console.options.ascii_only
        self._good, self._bad = ("ok", "!!") if plain else ("✓", "✗")
        self._left_out = "-"
        self.failed = 0

    def heading(self, title: str) -> None:
        """A step begins."""
        self.console.print(f"\n[bold]{title}[/]")

    def fact(self, label: str, text: object, note: str = "") -> None:
        """One thing that was seen, and a word on it."""
        self._line(self._good, "green", label, text, note)

    def fail(self, label: str, text: object) -> None:
        """What was expected and what came instead."""
        self.failed += 1
        self._line(self._bad, "bold red", label, text, "")

    def leave_out(self, label: str, text: object) -> None:
        """What this machine cannot show, and how to mend that."""
        self._line(self._left_out, "yellow", label, text, "")

    def command(self, where: str, text: str) -> None:
        """What is typed, in the guest or on the host."""
        for line in Text(f"{where}$ {text}", style="cyan").wrap(self.console, self.console.width - MARGIN):
            line.rstrip()
            self.console.print(Text(" " * MARGIN) + line)

    def block(self, lines: Iterable[str]) -> None:
        """Output of a program, each line cut at the edge."""
        room = self.console.width - MARGIN
        for line in lines:
            cut = line if len(line) <= room else f"{line[: room - 3]}..."
            self.console.print(Text(" " * MARGIN + cut, style="dim"), no_wrap=True)

    def remark(self, text: str) -> None:
        """A sentence."""
        self.console.print(Text(" " * MARGIN + text, style="dim"))

    def wait(self, what: str) -> Status:
        """Shows, on a terminal, that something is being done. A context manager."""
        return self.console.status(what, spinner="line")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A small table."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(Padding(table, (0, 0, 0, MARGIN), expand=False))

    def _line(self, mark: str, style: str, label: str, text: object, note: str) -> None:
        words = Text(str(text).strip())
        if note:
            words.append(f"  {note}", style="dim")
        before = Text.assemble((f"{mark:>2}", style), f" {label:{LABEL}} ")
        for line in words.wrap(self.console, self.console.width - len(before)):
            line.rstrip()
            self.console.print(before + line)
            before = Text(" " * len(before))
