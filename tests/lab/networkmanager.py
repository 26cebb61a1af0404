"""A real NetworkManager with a D-Bus of its own, in namespaces where nobody else is.

Theory of operation. As for `tests.lab.resolved`: a private bus, an empty /run, and the daemon from the Debian package,
installed or unpacked into .cache/networkmanager (scripts/setup-debian.sh), since installed it would take the machine's
network over. Three things make it believe that this is a host: /sys is read-only, so that it does not wait for udev;
what it writes into /etc, which is resolv.conf, goes into a layer on top of it; links are veth pairs, which it takes for
Ethernet. `nmcli` sets them.

Sources: NetworkManager(8), NetworkManager.conf(5), nmcli(1).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import ROOT, Namespace
from tests.lab.resolved import PrivateBus, check_program

UNPACKED = ROOT / ".cache" / "networkmanager"

SETTINGS = """\
[main]
plugins=keyfile
dns=default
rc-manager=file
systemd-resolved=false
no-auto-default=*
auth-polkit=false
"""


def find_networkmanager() -> tuple[Path, Path, Path]:
    """The daemon, nmcli, and where their libraries are. Raises LabUnavailableError."""
    if os.geteuid() != 0:
        raise LabUnavailableError("NetworkManager needs root")
    for root in (UNPACKED, Path("/")):
        daemon, control = root / "usr/sbin/NetworkManager", root / "usr/bin/nmcli"
        if daemon.exists() and control.exists():
            libraries = root / "usr/lib" / f"{platform.machine()}-linux-gnu"
            check_program("env", f"LD_LIBRARY_PATH={libraries}", daemon)
            return daemon, control, libraries
    raise LabUnavailableError("no NetworkManager; unpack it with: sudo scripts/setup-debian.sh")


class NetworkManager:
    """A NetworkManager in a namespace, with its bus."""

    def __init__(self, namespace: Namespace) -> None:
        daemon, self._control, self._libraries = find_networkmanager()
        self.namespace = namespace
        self.bus = PrivateBus(namespace)
        try:
            folder = self.bus.folder
            namespace.run("mkdir", "/run/etc", "/run/work")
            layers = "lowerdir=/etc,upperdir=/run/etc,workdir=/run/work"
            namespace.run("mount", "-t", "overlay", "-o", layers, "overlay", "/etc")
            namespace.run("mount", "-o", "remount,ro", "/sys")
            namespace.run("mkdir", "-p", "/run/NetworkManager")
            settings = folder / "NetworkManager.conf"
            settings.write_text(SETTINGS)
            for name in ("one", "two", "three"):
                (folder / name).mkdir()
            self.bus.start(
                *self._words(daemon),
                "--no-daemon",
                f"--config={settings}",
                f"--config-dir={folder}/one",
                f"--system-config-dir={folder}/two",
                f"--intern-config={folder}/intern.conf",
                f"--state-file={folder}/three/state",
            )
            self.bus.wait("NetworkManager", lambda: namespace.run(*self._words(self._control), "general", check=False))
        except BaseException:
            self.bus.close()
            raise

    def _words(self, program: Path) -> list[str | Path]:
        return ["env", f"LD_LIBRARY_PATH={self._libraries}", program]

    def control(self, *words: str) -> str:
        """Run nmcli."""
        return self.namespace.run(*self._words(self._control), *words).stdout

    def add_connection(self, name: str, address: str, *settings: str) -> None:
        """Make a device, and a connection for it, of this name; it is not up yet."""
        peer = f"{name}-peer"
        self.namespace.ip("link", "add", name, "type", "veth", "peer", "name", peer)
        for device in (name, peer):
            self.namespace.ip("link", "set", device, "up")
        words = ("type", "ethernet", "ifname", name, "con-name", name, "ip4", address, *settings)
        self.control("connection", "add", "save", "no", *words)

    def up(self, name: str) -> None:
        self.control("connection", "up", name)

    def down(self, name: str) -> None:
        self.control("connection", "down", name)

    def close(self) -> None:
        self.bus.close()
