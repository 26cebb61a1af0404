"""`netstack doctor`: what on this host will not work, and how to mend it.

A check that fails is something that netstack cannot do without; a warning is something that it does without, and what
is then missing. Only failures make the exit status 1. No check sends a packet.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from netstack.cli.faults import EXIT_FAILURE, one_line
from netstack.cli.output import print_json, print_lines

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(rich_markup_mode=None, add_completion=False)

PROGRAM_SECONDS = 10.0
DBUS_SECONDS = 0.5  # systemd-resolved and NetworkManager answer within milliseconds
MANY_FILES = 4096  # flows of a few busy guests; browsers hold some hundred each
NEEDED_NETDEVS = ("stream", "dgram", "vde", "vhost-user")


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "warning", "failure"]
    detail: str
    mend: str = ""


@app.command(epilog="Example: netstack doctor --json")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False) -> int:
    """Check this host and say what will not work and how to mend it."""
    checks = [check() for check in CHECKS]
    healthy = all(check.state != "failure" for check in checks)
    if as_json:
        print_json({"ok": healthy, "checks": [check._asdict() for check in checks]})
    else:
        marks = {"ok": "ok  ", "warning": "WARN", "failure": "FAIL"}
        for check in checks:
            print_lines([f"{marks[check.state]}  {check.name}: {check.detail}"])
            if check.mend:
                print_lines([f"      {check.mend}"])
    return 0 if healthy else EXIT_FAILURE


def check_python() -> Check:
    """The interpreter."""
    detail = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info < (3, 11):  # noqa: UP036 # pip holds people to it, a copied folder does not
        return Check("Python", "failure", detail, "Install Python 3.11 or newer.")
    return Check("Python", "ok", detail)


def check_runtime_directory() -> Check:
    """Where the sockets of netstack go."""
    from netstack.config import ConfigError, runtime_directory

    try:
        place = runtime_directory()
    except ConfigError as error:
        return Check("sockets", "failure", str(error), "Give XDG_RUNTIME_DIR a directory that only you can write to.")
    if place.parent == Path("/tmp"):  # noqa: S108 # where config puts it when there is nothing better
        mend = "Log in through a session that sets it (ssh, loginctl enable-linger), or set it."
        return Check("sockets", "warning", f"in {place}, for want of XDG_RUNTIME_DIR", mend)
    return Check("sockets", "ok", f"in {place}")


def check_open_files() -> Check:
    """How many flows there can be."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= MANY_FILES:
        return Check("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"up to {limit}")
    mend = "Raise the hard limit: LimitNOFILE= in a systemd unit, nofile in /etc/security/limits.conf."
    return Check("open files", "warning", f"at most {limit}, and each flow of a guest takes one", mend)


def check_nameservers() -> Check:
    """Whom the gateway's DNS will ask."""
    import trio

    from netstack.dns.follower import Follower
    from netstack.dns.source_auto import HostSource

    source = HostSource()
    follower = Follower(source)

    async def look() -> None:
        with trio.move_on_after(DBUS_SECONDS):
            await follower.run()

    trio.run(look)
    *some, rest = follower.table.describe()
    if not rest["servers"] and not some:
        mend = "Write a line such as `nameserver 192.0.2.1` into /etc/resolv.conf, or name upstreams in [dns]."
        return Check("DNS", "failure", f"{source.why} names no nameserver: guests resolve no names", mend)
    words = [f"{line['domain']} by {', '.join(line['servers'])}" for line in some[:3]]
    words += [f"{len(some) - 3} more domains"] if len(some) > 3 else []
    words.append(f"all other names by {', '.join(rest['servers']) or 'nobody'}" if some else ", ".join(rest["servers"]))
    return Check("DNS", "ok", f"{source.why}: {'; '.join(words)}")


def check_routes() -> Check:
    """Whether the host has a way out, by family."""
    missing = [name for name, family, address in _SOMEWHERE if not _has_route(family, address)]
    if not missing:
        return Check("routes", "ok", "default routes for IPv4 and IPv6")
    if len(missing) == 2:
        return Check("routes", "warning", "no default route: guests reach this host only", "Connect this host.")
    words = f"no default route for {missing[0]}: guests get addresses of it, but reach only this host and each other"
    return Check("routes", "warning", words, f"Give this host {missing[0]}, if guests are to have it.")


# Documentation addresses (RFC 5737, RFC 3849): nothing is sent to them, only routed.
_SOMEWHERE = (("IPv4", socket.AF_INET, "192.0.2.1"), ("IPv6", socket.AF_INET6, "2001:db8::1"))


def _has_route(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))  # UDP: looks the route up and sends nothing
    except OSError:
        return False
    return True


def check_ping() -> Check:
    """Whether guests can ping the world."""
    refused = []
    for name, family, protocol in (
        ("IPv4", socket.AF_INET, socket.IPPROTO_ICMP),
        ("IPv6", socket.AF_INET6, socket.IPPROTO_ICMPV6),
    ):
        try:
            socket.socket(family, socket.SOCK_DGRAM, protocol).close()
        except OSError as error:
            refused.append(f"{name} ({error.strerror})")
    if not refused:
        return Check("ping", "ok", "ping sockets are allowed")
    detail = f"no ping sockets for {' and '.join(refused)}: guests cannot ping beyond the gateway"
    return Check("ping", "warning", detail, 'sysctl -w net.ipv4.ping_group_range="0 2147483647"')


def check_kvm() -> Check:
    """Whether virtual machines run at full speed."""
    from netstack.host.kvm import probe_kvm

    state = probe_kvm()
    if state.usable:
        return Check("KVM", "ok", state.reason)
    mend = f"{state.mend[:1].upper()}{state.mend[1:]}."
    return Check("KVM", "warning", f"{state.reason}; QEMU emulates, many times slower", mend if state.mend else "")


def check_qemu() -> Check:
    """Whether QEMU is there, and the ways it can attach."""
    from netstack.cli.qemu_options import parse_version

    program = (
        f"qemu-system-{ {'arm64': 'aarch64', 'amd64': 'x86_64'}.get(platform.machine().lower(), platform.machine()) }"
    )
    if shutil.which(program) is None:
        return Check("QEMU", "warning", f"no {program} in PATH", "Install it: Debian's package is qemu-system-x86.")
    version = parse_version(_output_of(program, "--version"))
    netdevs = set(_output_of(program, "-M", "none", "-netdev", "help").split())
    shown = f"{program} {'.'.join(map(str, version)) if version else 'of unknown version'}"
    missing = [kind for kind in NEEDED_NETDEVS if kind not in netdevs]
    if "stream" in missing:
        mend = "Use QEMU 7.2 or newer; with this one, only `netstack qemu` and vde:// links work."
        return Check("QEMU", "warning", f"{shown} has no -netdev stream", mend)
    if missing:
        return Check(
            "QEMU", "warning", f"{shown} has no -netdev {', '.join(missing)}", "Other kinds of links still work."
        )
    return Check("QEMU", "ok", f"{shown}, with -netdev {', '.join(NEEDED_NETDEVS)}")


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def check_subnet() -> Check:
    """Whether the guests' network is on the host already."""
    from netstack.config import Config
    from netstack.host.subnets import find_clash, list_taken

    wished = Config().network.addresses()
    taken = list_taken()
    clashes = [clash for clash in (find_clash(net, taken) for net in (wished.subnet, wished.subnet6)) if clash]
    if clashes:
        words = "; ".join(f"{clash.network} is on this host ({clash.why})" for clash in clashes)
        mend = "Name another network, such as --subnet 192.168.77.0/24, if scripts rely on its addresses."
        return Check("network", "warning", f"{words}: guests get the next free one", mend)
    return Check("network", "ok", f"{wished.subnet} and {wished.subnet6} are free")


def check_tun() -> Check:
    """Whether taps can be made."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        detail = f"{one_line(error)}: no tap links"
        return Check("tap", "warning", detail, "modprobe tun; in a container, give it the device /dev/net/tun.")
    return Check("tap", "ok", "/dev/net/tun opens")


def check_namespaces() -> Check:
    """Whether `netstack exec` can make namespaces, and taps in them."""
    if not sys.platform.startswith("linux"):
        return Check("namespaces", "warning", "not on this system: no netstack exec", "Run a virtual machine instead.")
    from netstack.host.namespaces import explain_refusal
    from netstack.vde.namespace import NamespaceError, try_namespaces

    try:
        try_namespaces()
    except NamespaceError as error:
        refusal, _, mend = explain_refusal(error.code, error.step).partition("; ")
        return Check("namespaces", "warning", f"{refusal}: no netstack exec", f"{mend}.")
    return Check("namespaces", "ok", "netstack exec can make its own, with a tap")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_runtime_directory,
    check_open_files,
    check_subnet,
    check_nameservers,
    check_routes,
    check_ping,
    check_tun,
    check_namespaces,
    check_qemu,
    check_kvm,
)
