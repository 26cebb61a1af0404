"""What the end-to-end tests share: a world, a netstack in it, and guests booted once for a whole file of tests.

Everything that a run leaves (netstack's log, the guests' consoles, what was typed into them, a pcap of each card)
goes to artifacts/e2e/NAME. It is removed when all tests of the file passed; else it stays, and the path is printed at
the end.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.guest import Guest, Nic, find_qemu, stream_nic, vde_nic, vhost_user_nic
from tests.lab.initramfs import LabUnavailableError, build_initramfs, find_kernel
from tests.lab.namespaces import FAR4, FAR6, TapNamespace, World, check_namespaces
from tests.lab.netstack import Netstack
from tests.lab.servers import Resolver, Servers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts" / "e2e"
KEPT = pytest.StashKey[list[Path]]()

MACS = ("52:54:00:12:34:01", "52:54:00:12:34:02", "52:54:00:12:34:03")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEPT] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says where to look."""
    for folder in config.stash[KEPT]:
        names = ", ".join(sorted(path.name for path in folder.rglob("*") if path.is_file()))
        terminalreporter.write_line(f"end-to-end tests failed; their logs and pcaps: {folder} ({names})", red=True)


@pytest.fixture(scope="session")
def machine() -> None:
    """Skips what needs guests, with the reason, on a machine that cannot have them."""
    try:
        check_namespaces()
        find_qemu()
        build_initramfs(find_kernel())
    except LabUnavailableError as lack:
        pytest.skip(str(lack))


def keep_if_failed(request: pytest.FixtureRequest, name: str) -> Iterator[Path]:
    """A folder for a run's leavings, which is removed unless a test failed while it was in use."""
    folder = ARTIFACTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failed_before = request.session.testsfailed
    yield folder
    if request.session.testsfailed > failed_before:
        request.config.stash[KEPT].append(folder)
    else:
        shutil.rmtree(folder)


class Lab:
    """One world with its servers and resolver, and the netstacks and guests that a file of tests starts in it."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, *, ping: bool = True, ipv6_route: bool = True
    ) -> None:
        self.folder = folder
        self.stack = stack
        self.world = stack.enter_context(World(ping=ping, ipv6_route=ipv6_route))
        self.servers = stack.enter_context(Servers(self.world.host))
        self.far_servers = stack.enter_context(Servers(self.world.far, FAR4, FAR6))
        self.resolver = stack.enter_context(Resolver(self.world.host, folder))

    @property
    def socket(self) -> Path:
        """Where netstack listens for QEMU."""
        return self.world.folder / "qemu.sock"

    @property
    def switch(self) -> Path:
        """The directory of netstack's VDE switch."""
        return self.world.folder / "vde.ctl"

    def link(self, kind: str) -> str:
        """The link's URI."""
        if kind == "vhost-user":
            return f"vhost-user://{self.socket}"
        return f"unix://{self.socket}" if kind == "stream" else f"vde://{self.switch}"

    def nic(self, kind: str, number: int) -> Nic:
        """The card of guest `number`, on the link of that kind."""
        if kind == "vhost-user":
            return vhost_user_nic(self.socket, MACS[number])
        return stream_nic(self.socket, MACS[number]) if kind == "stream" else vde_nic(self.switch, MACS[number])

    def netstack(
        self, links: Sequence[str], *arguments: str, state: Path | None = None, pass_fds: Sequence[int] = ()
    ) -> Netstack:
        """A netstack on the world's host, not yet started; its log is kept with the other leavings."""
        netstack = Netstack(
            self.world.host,
            self.world.folder / "n",
            links=links,
            arguments=arguments,
            state=state,
            pass_fds=pass_fds,
        )
        netstack.log_path = self.folder / "netstack.log"
        return netstack

    def guest(self, kind: str, number: int) -> Guest:
        """Guest `number`, not yet booted."""
        return Guest([self.nic(kind, number)], self.folder / f"guest{number}")

    def kernel_guest(self, number: int = 0, *, mtu: int = 65520) -> TapNamespace:
        """A namespace as a guest, at the socket: its kernel has the addresses that guest `number` would lease."""
        guest = self.stack.enter_context(TapNamespace(self.socket, inside=self.world.host, mtu=mtu, mac=MACS[number]))
        self.set_addresses(guest, number)
        return guest

    def set_addresses(self, guest: TapNamespace, number: int) -> None:
        """Give a kernel's tap the addresses of guest `number`, and the routes."""
        guest.set_addresses(
            f"192.168.5.{15 + number}/24",
            f"fd00:c0a8:5::{15 + number}/64",
            gateways=("192.168.5.2", "fd00:c0a8:5::2"),
        )


@contextlib.contextmanager
def open_lab(folder: Path, *, ping: bool = True, ipv6_route: bool = True) -> Iterator[Lab]:
    """A lab that is cleared away at the end."""
    with contextlib.ExitStack() as stack:
        lab = Lab(folder, stack, ping=ping, ipv6_route=ipv6_route)
        lab.world.check_isolation()
        yield lab


@pytest.fixture
def lab(request: pytest.FixtureRequest, machine: None) -> Iterator[Lab]:
    """A lab for one test alone."""
    for folder in keep_if_failed(request, request.node.name):
        with open_lab(folder) as lab:
            yield lab
