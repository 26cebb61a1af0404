"""Network namespaces for tests: a small internet that begins and ends on this machine.

Theory of operation. A namespace lives as long as a process is in it: each one here is held by a `cat` that reads a
pipe from the test, and ends with it, however the test ends. So there is no name under /run/netns that could clash
with another run's, and nothing to clean up after a crash. Where the tests do not run as root, the namespaces belong
to a new user namespace, in which they are root.

    host      where netstack runs: 198.51.100.1, 2001:db8:1::1, its own loopback, its own /etc/resolv.conf
    router    one hop away: 198.51.100.254, 2001:db8:1::ff; answers for addresses that cannot be reached
    far       behind the router: 203.0.113.1, 2001:db8:2::1

No link leads out of these three: that is the point, and World.check_isolation() proves it. The addresses are those set
aside for documentation (RFC 5737, RFC 3849), so that even a mistake reaches nobody.

Sources: namespaces(7), user_namespaces(7), nsenter(1), ip-link(8).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from tests.lab.initramfs import LabUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
RELAY = Path(__file__).with_name("relay.py")

HOST4, HOST6 = "198.51.100.1", "2001:db8:1::1"
ROUTER4, ROUTER6 = "198.51.100.254", "2001:db8:1::ff"
FAR4, FAR6 = "203.0.113.1", "2001:db8:2::1"
# The router drops what is sent there, without a word.
BLACKHOLE4, BLACKHOLE6 = "203.0.113.66", "2001:db8:2::66"
# The router says: host unreachable; communication administratively prohibited.
UNREACHABLE4, UNREACHABLE6 = "203.0.113.67", "2001:db8:2::67"
PROHIBITED4, PROHIBITED6 = "203.0.113.68", "2001:db8:2::68"
FAR_MTU = 1400  # between router and far, so that there is a path MTU to find

# What processes in a namespace have to be told by setpriv: to end with the test.
LEASH = ("setpriv", "--pdeathsig", "KILL")


@functools.cache
def check_namespaces() -> None:
    """Raise LabUnavailableError, with the reason, where no network namespace can be made."""
    for program, package in (("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            raise LabUnavailableError(f"no program {program}; install it with: sudo apt-get install {package}")
    trial = [*_unshare_words(), "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    outcome = subprocess.run(trial, capture_output=True, text=True, check=False, timeout=20)
    if outcome.returncode != 0:
        who = "root" if os.geteuid() == 0 else "an ordinary user (run the tests as root, or allow user namespaces)"
        raise LabUnavailableError(f"no network namespaces for {who}: {outcome.stderr.strip()}")


def _unshare_words() -> list[str]:
    """The command that makes namespaces of our own: for an ordinary user, with a user namespace around them."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--propagation", "private"]


class Namespace:
    """A network namespace, with a mount namespace of its own, that lasts until close()."""

    def __init__(self, name: str, inside: Namespace | None = None) -> None:
        """Make one; `inside`: a namespace whose user namespace it shares (needed where they are to be connected)."""
        check_namespaces()
        self.name = name
        if inside is None or os.geteuid() == 0:
            command = _unshare_words()
        else:
            command = [*inside.words(user_only=True), "unshare", "--net", "--mount", "--propagation", "private"]
        # sysfs shows the network devices of the namespace in which it was mounted.
        command += ["sh", "-c", "mount -t sysfs sysfs /sys; ip link set lo up && echo ready && exec cat"]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            _, errors = self._holder.communicate(timeout=5)
            raise LabUnavailableError(f"no network namespace: {errors.strip()}")

    @property
    def pid(self) -> int:
        """The process that holds the namespace open: /proc/PID/ns/net is its path."""
        return self._holder.pid

    @property
    def path(self) -> str:
        """The path of the network namespace, for setns(2) and `nsenter --net=`."""
        return f"/proc/{self.pid}/ns/net"

    def words(self, *, user_only: bool = False) -> list[str]:
        """The words to put before a command so that it runs in here, and ends when the calling process does."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        spaces = [] if user_only else ["--net", "--mount"]
        # Entering a mount namespace moves to its root directory; --wd brings us back to where we are.
        here = [] if user_only else [f"--wd={Path.cwd()}"]
        return ["nsenter", f"--target={self.pid}", *user, *spaces, *here, *([] if user_only else LEASH)]

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 30.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in here to its end; what it wrote is in the result. With `check`, raise when it fails."""
        outcome = subprocess.run(
            [*self.words(), *command], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and outcome.returncode != 0:
            raise RuntimeError(
                f"in namespace {self.name}: {command} ended with status {outcome.returncode}:\n"
                f"{outcome.stdout}{outcome.stderr}"
            )
        return outcome

    def popen(self, *command: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """Start a command in here; the pid of the result is the command's own. Options as for subprocess.Popen."""
        return subprocess.Popen([*self.words(), *command], **options)

    def ip(self, *words: str | int) -> str:
        """Run `ip` in here; return its output."""
        return self.run("ip", *(str(word) for word in words)).stdout

    def set_sysctl(self, name: str, value: object) -> None:
        """Set a kernel variable of this namespace, such as `net/ipv4/ip_forward`."""
        self.run("sh", "-c", 'printf %s "$2" >"/proc/sys/$1"', "sh", name, str(value))

    def add_address(self, device: str, *addresses: str) -> None:
        """Give a device addresses, as ADDRESS/LENGTH, ready for use at once (no duplicate address detection)."""
        for address in addresses:
            self.ip("addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []))

    def bind_file(self, target: str, source: Path) -> None:
        """Let the file `source` stand where `target` is, for the processes in here alone."""
        self.run("mount", "--bind", str(source), target)

    def close(self) -> None:
        """Let go of the namespace; it is gone with the last process in it."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(timeout=10)
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect_namespaces(left: Namespace, left_name: str, right: Namespace, right_name: str, mtu: int = 1500) -> None:
    """Lay a virtual cable (veth) between two namespaces, with the given names of its ends."""
    left.ip("link", "add", left_name, "mtu", mtu, "type", "veth", "peer", "name", right_name, "mtu", mtu,
            "netns", right.pid)  # fmt: skip
    for namespace, name in ((left, left_name), (right, right_name)):
        namespace.set_sysctl(f"net/ipv6/conf/{name}/accept_dad", 0)
        namespace.set_sysctl(f"net/ipv6/conf/{name}/accept_ra", 0)
        namespace.ip("link", "set", name, "up")


class World:
    """The host where netstack runs, a router one hop away, and a far machine behind it. See the module's picture."""

    def __init__(self, *, ping: bool = True, ipv6_route: bool = True) -> None:
        """`ping`: the host allows ping sockets; `ipv6_route`: it has an IPv6 default route."""
        self._stack = contextlib.ExitStack()
        try:
            self._build(ping=ping, ipv6_route=ipv6_route)
        except BaseException:
            self._stack.close()
            raise

    def _build(self, *, ping: bool, ipv6_route: bool) -> None:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="netstack-lab-")))
        self.host = self._stack.enter_context(Namespace("host"))
        self.router = self._stack.enter_context(Namespace("router", inside=self.host))
        self.far = self._stack.enter_context(Namespace("far", inside=self.host))
        connect_namespaces(self.host, "eth0", self.router, "eth0")
        connect_namespaces(self.router, "eth1", self.far, "eth0", mtu=FAR_MTU)
        self.host.add_address("eth0", f"{HOST4}/24", f"{HOST6}/64")
        self.router.add_address("eth0", f"{ROUTER4}/24", f"{ROUTER6}/64")
        self.router.add_address("eth1", "203.0.113.254/24", "2001:db8:2::ff/64")
        self.far.add_address("eth0", f"{FAR4}/24", f"{FAR6}/64")
        self.host.ip("route", "add", "default", "via", ROUTER4)
        if ipv6_route:
            self.host.ip("route", "add", "default", "via", ROUTER6)
        self.far.ip("route", "add", "default", "via", "203.0.113.254")
        self.far.ip("route", "add", "default", "via", "2001:db8:2::ff")
        for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            self.router.set_sysctl(variable, 1)
        for namespace in (self.host, self.router, self.far):
            # Else a second error within a second would be missing, and no test could say whose fault that was.
            namespace.set_sysctl("net/ipv4/icmp_ratelimit", 0)
            namespace.set_sysctl("net/ipv6/icmp/ratelimit", 0)
        for kind, addresses in (
            ("blackhole", (BLACKHOLE4, BLACKHOLE6)),
            ("unreachable", (UNREACHABLE4, UNREACHABLE6)),
            ("prohibit", (PROHIBITED4, PROHIBITED6)),
        ):
            for address in addresses:
                self.router.ip("route", "add", kind, address)
        self.allow_ping(ping)
        self.resolv_conf = self.folder / "resolv.conf"
        self.resolv_conf.write_text("nameserver 127.0.0.53\nsearch example.test\n")
        self.host.bind_file("/etc/resolv.conf", self.resolv_conf)
        # The machine's own D-Bus would tell whom the machine's systemd-resolved asks, out there.
        self.host.run("sh", "-c", "[ ! -d /run/dbus ] || mount -t tmpfs tmpfs /run/dbus")

    def allow_ping(self, allowed: bool) -> None:
        """Let the host's processes open ping sockets, or forbid it as some distributions do."""
        if allowed:
            self.host.set_sysctl("net/ipv4/ping_group_range", "0 0" if os.geteuid() else "0 2147483647")
        elif os.geteuid() == 0:
            self.host.set_sysctl("net/ipv4/ping_group_range", "1 0")
        # Else it cannot be said, as there is no group 1 in our user namespace; but a new namespace begins that way.

    def check_isolation(self) -> None:
        """Assert that no packet can leave: every device is the loopback, ours, or a tunnel that nobody configured."""
        for namespace, ours in ((self.host, {"eth0"}), (self.router, {"eth0", "eth1"}), (self.far, {"eth0"})):
            up = {
                line.split()[1].partition("@")[0].rstrip(":")
                for line in namespace.ip("-o", "link", "show", "up").splitlines()
            }
            assert up <= ours | {"lo"}, f"{namespace.name} has other devices: {up}"

    def close(self) -> None:
        """Let go of everything."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TapNamespace(Namespace):
    """A namespace whose kernel is a guest: its tap is carried over QEMU's stream framing by tests/lab/relay.py."""

    def __init__(
        self,
        connect: str | Path,
        *,
        inside: Namespace | None = None,
        mtu: int = 65520,
        mac: str | None = None,
        tap: str = "tap0",
        timeout: float = 10.0,
    ) -> None:
        """Make it, with a tap of the given name, MTU and MAC connected to the unix stream socket `connect`."""
        super().__init__("guest", inside)
        self.tap = tap
        self._words = ["--tap", tap, "--mtu", str(mtu), "--connect", str(connect), "--timeout", str(timeout)]
        if mac is not None:
            self._words += ["--mac", mac]
        try:
            self.plug_in()
        except BaseException:
            super().close()
            raise

    def plug_in(self) -> None:
        """Make the tap and connect it."""
        self.relay = self.popen(
            sys.executable, RELAY, *self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if output_of(self.relay).readline() != "ready\n":
            _, errors = self.relay.communicate(timeout=5)
            raise RuntimeError(f"the relay did not start: {errors.strip()}")

    def unplug(self) -> None:
        """Close the connection and remove the tap, with its addresses and routes."""
        self.relay.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.relay.wait(timeout=5)
        self.relay.kill()
        self.relay.communicate()

    def probe(self, *words: str | int, timeout: float = 30.0) -> dict[str, Any]:
        """Run one of the guests' test programs (tests/lab/rootfs/probe.py) in here; return what it found out."""
        probe = Path(__file__).with_name("rootfs") / "probe.py"
        arguments = [str(word) for word in words]
        answer = self.run("env", f"PYTHONPATH={ROOT}", sys.executable, probe, *arguments, timeout=timeout)
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def set_addresses(self, *addresses: str, gateways: Sequence[str] = ()) -> None:
        """Give the tap addresses (ADDRESS/LENGTH) and default routes."""
        self.add_address(self.tap, *addresses)
        for gateway in gateways:
            # Its own metric, because a router advertisement may have come already.
            self.ip("route", "add", "default", "via", gateway, "dev", self.tap, "metric", 100)

    def close(self) -> None:
        """Unplug the tap and let go of the namespace."""
        self.unplug()
        super().close()


def output_of(process: subprocess.Popen[Any]) -> IO[Any]:
    """The pipe from the standard output of a process that was started with one."""
    assert process.stdout is not None
    return process.stdout


def wait_until(condition: Any, what: str, timeout: float = 10.0) -> Any:
    """Call `condition` until it returns something true, and return that; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.02)
    return answer
