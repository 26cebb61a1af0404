"""The peers that make a tap of their own inside the guest's namespace: no relay is between them and the guest.

slirp4netns and pasta read and write the tap frame by frame; netstack's has the virtio-net header, so that segments of
64 KiB cross it at any MTU.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from benchmarks.lab import LabError, run, wait_until
from benchmarks.peers import (
    ALL_CASES,
    GATEWAY,
    PREFIX_LENGTH,
    SHORT_CASES,
    SMALL,
    TAP,
    TAP_LINK,
    Attachment,
    Netstack,
    Peer,
    Surroundings,
    configure_tap,
    debian_version,
    first_line,
    passt_options,
)

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from benchmarks.lab import Namespace


class TapPeer(Peer):
    """Makes its own tap inside the guest's namespace."""

    host_address = GATEWAY

    def attach(self, around: Surroundings, mtu: int) -> Attachment:
        guest = around.lab.guest(self.name)
        process = self.start(around, mtu, guest)
        return Attachment(self.name, mtu, guest, self.host_address, process)


class Slirp4netns(TapPeer):
    """slirp4netns with the options that its callers give for speed: none but the MTU."""

    name, program = "slirp4netns", "slirp4netns"
    host_address = "10.0.2.2"
    options: tuple[str, ...] = ()

    def version(self) -> str:
        return debian_version("slirp4netns") or first_line(["slirp4netns", "--version"])

    def start(self, around: Surroundings, mtu: int, guest: Namespace) -> subprocess.Popen[bytes]:
        receive, send = os.pipe()
        os.set_inheritable(send, True)
        argv = [
            "slirp4netns", "--configure", f"--mtu={mtu}", f"--ready-fd={send}", *self.options, "--netns-type=path",
            guest.path, TAP,
        ]  # fmt: skip
        process = around.lab.spawn(around.host, argv, pass_fds=[send])
        os.close(send)
        with os.fdopen(receive, "rb") as ready:
            if ready.read(1) != b"1":
                raise LabError("slirp4netns did not start")
        return process


class Pasta(TapPeer):
    """passt's other mode, a tap in a namespace; ready when the interface has its address."""

    name, program = "pasta", "pasta"
    cases = (*SHORT_CASES, "udp")

    def version(self) -> str:
        return debian_version("passt") or first_line(["pasta", "--version"])

    def start(self, around: Surroundings, mtu: int, guest: Namespace) -> subprocess.Popen[bytes]:
        argv = [
            "pasta", "--foreground", "--quiet", "--ipv4-only", "--config-net", "--ns-ifname", TAP, *passt_options(mtu),
            *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
            "--netns", guest.path,
        ]  # fmt: skip
        process = around.lab.spawn(around.host, argv)

        def has_route() -> bool:
            return f"default via {GATEWAY}" in run(["ip", "-n", guest.name, "route"]) or process.poll() is not None

        wait_until(has_route, "pasta being ready")
        if process.poll() is not None:
            raise LabError(f"pasta ended with status {process.returncode}")
        return process


class NetstackTap(Netstack):
    """`netstack run --link tap://...`: offload, so only MTU 1500 is of interest."""

    mtus = (SMALL,)
    cases = tuple(case for case in ALL_CASES if case not in ("start", "idle"))  # the stream link's are the same

    def __init__(self, name: str = TAP_LINK, checkout: Path | None = None, python: str = sys.executable) -> None:
        super().__init__(name, checkout, python)
        self._netns = ""

    def command(self, socket_path: Path, mtu: int, ready_fd: int) -> list[str]:
        return self._run(f"tap://{TAP}?netns={self._netns}", mtu, ready_fd)

    def attach(self, around: Surroundings, mtu: int) -> Attachment:
        guest = around.lab.guest(self.name.replace("-", "_"))
        self._netns = guest.path
        process = self.start(around, mtu, guest)
        configure_tap(guest, mtu, f"{self.guest_address}/{PREFIX_LENGTH}", self.host_address)
        return Attachment(self.name, mtu, guest, self.host_address, process)


NETSTACK_LINKS: dict[str, type[Netstack]] = {"stream": Netstack, "tap": NetstackTap}
