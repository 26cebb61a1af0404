"""A real systemd-resolved with a D-Bus of its own, in namespaces where nobody else is.

Theory of operation. The namespace gets an empty /run, so that the host's bus and the host's resolved are not seen; a
dbus-daemon whose policy allows everybody everything; a passwd with the user that resolved wants to become; and then
resolved itself, from the Debian package, installed or unpacked into .cache/resolved (scripts/setup-debian.sh), because
installed it would take over the machine's /etc/resolv.conf. Links are veth pairs: resolved uses those that are up, have
an address, and servers. `resolvectl` sets them, as VPN clients do.

Sources: systemd-resolved.service(8), resolvectl(1), dbus-daemon(1).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import ROOT, Namespace

if TYPE_CHECKING:
    from collections.abc import Callable

UNPACKED = ROOT / ".cache" / "resolved"

BUS_SETTINGS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <policy context="default">
    <allow user="*"/> <allow own="*"/> <allow send_type="*"/> <allow receive_type="*"/> <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


def find_resolved() -> tuple[Path, Path]:
    """The daemon and resolvectl. Raises LabUnavailableError."""
    if os.geteuid() != 0:
        raise LabUnavailableError("systemd-resolved becomes another user: needs root")
    for root in (UNPACKED, Path("/")):
        for folder in ("lib/systemd", "usr/lib/systemd"):
            daemon, control = root / folder / "systemd-resolved", root / "usr/bin/resolvectl"
            if daemon.exists() and control.exists():
                check_program(daemon)
                return daemon, control
    raise LabUnavailableError("no systemd-resolved; unpack it with: sudo scripts/setup-debian.sh")


def check_program(*command: str | Path) -> None:
    """Raise LabUnavailableError where a program does not even say its version: unpacked, it may lack libraries."""
    outcome = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=20)
    if outcome.returncode != 0:
        raise LabUnavailableError(f"{command[-1]} does not run here: {outcome.stderr.strip()}")


class PrivateBus:
    """A system bus for one namespace. Its /run is empty but for that."""

    def __init__(self, namespace: Namespace) -> None:
        if shutil.which("dbus-daemon") is None:
            raise LabUnavailableError("no program dbus-daemon; install it with: sudo apt-get install dbus-daemon")
        self.namespace = namespace
        self.folder = Path(tempfile.mkdtemp(prefix="netstack-bus-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        namespace.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        namespace.run("mkdir", "-p", "/run/dbus")
        settings = self.folder / "bus.conf"
        settings.write_text(BUS_SETTINGS)
        self.start("dbus-daemon", f"--config-file={settings}", "--nofork", "--nopidfile", "--nosyslog")
        self.wait("the bus", lambda: namespace.run("test", "-S", "/run/dbus/system_bus_socket", check=False))

    def start(self, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a daemon; what it says is in `log`."""
        with self.log.open("ab") as log:
            process: subprocess.Popen[bytes] = self.namespace.popen(*command, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def wait(self, what: str, look: Callable[[], subprocess.CompletedProcess[str]], seconds: float = 10.0) -> None:
        """Until `look` ends with status 0."""
        deadline = time.monotonic() + seconds
        while look().returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not come up:\n{self.log.read_text()}")
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(10)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Resolved:
    """A systemd-resolved in a namespace, with its bus."""

    def __init__(self, namespace: Namespace, settings: str = "") -> None:
        self._daemon, self._control = find_resolved()
        self.namespace = namespace
        self.bus = PrivateBus(namespace)
        try:
            self._prepare(settings)
            self.start()
        except BaseException:
            self.bus.close()
            raise

    def _prepare(self, settings: str) -> None:
        folder = self.bus.folder
        passwd = Path("/etc/passwd").read_text()
        if "\nsystemd-resolve:" not in passwd:
            passwd += "systemd-resolve:x:64990:65534:for tests:/:/usr/sbin/nologin\n"
        # No validation and no fallback servers, whatever the package says: nothing here may ask the world.
        resolved = f"[Resolve]\nFallbackDNS=\nDNSSEC=no\nLLMNR=no\nMulticastDNS=no\n{settings}"
        for name, text in (("passwd", passwd), ("resolved.conf", resolved)):
            (folder / name).write_text(text)
        self.namespace.bind_file("/etc/passwd", folder / "passwd")
        self.namespace.run("mkdir", "-p", "/run/systemd/resolve", "/run/systemd/resolved.conf.d")
        self.namespace.run("cp", folder / "resolved.conf", "/run/systemd/resolved.conf.d/test.conf")
        self.namespace.run("chown", "-R", "systemd-resolve:nogroup", "/run/systemd/resolve")

    def start(self) -> None:
        """Start the daemon, again perhaps, and wait until it answers on the bus."""
        # Becoming another user takes the leash off. So it gets a PID namespace, whose first process stays on it.
        leash = ("unshare", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", '"$0" & wait')
        self._process = self.bus.start(*leash, self._daemon)
        self.bus.wait("systemd-resolved", lambda: self.namespace.run(self._control, "dns", check=False))

    def stop(self) -> None:
        self.bus.stop(self._process)

    def control(self, *words: str) -> str:
        """Run resolvectl, as VPN clients do."""
        return self.namespace.run(self._control, *words).stdout

    def add_link(self, name: str, address: str) -> None:
        """Make a device that resolved takes for one to use."""
        peer = f"{name}-peer"
        self.namespace.ip("link", "add", name, "type", "veth", "peer", "name", peer)
        self.namespace.add_address(name, address)
        for device in (name, peer):
            self.namespace.ip("link", "set", device, "up")

    def use_stub(self) -> None:
        """Let the host's /etc/resolv.conf be resolved's stub, as on most desktops."""
        source = self.bus.folder / "resolv.conf"
        source.write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n")
        self.namespace.bind_file("/etc/resolv.conf", source)

    def close(self) -> None:
        self.bus.close()
