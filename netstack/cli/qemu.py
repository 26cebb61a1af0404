"""`netstack qemu`: a network for one virtual machine, which lives exactly as long as its QEMU.

The network runs in this process and its link is one end of a socketpair, so there is no socket to name, to clean up
or to share by mistake. Where the guest's memory can be shared (vhost-user) QEMU wants a path to connect to: it is in a
directory of its own, which goes when QEMU does. Nothing is kept: no leases, no API unless it is asked for.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from netstack.cli import qemu_options
from netstack.cli.faults import InputError, say
from netstack.cli.forwarding import PublishOption, tell_chosen_ports

if TYPE_CHECKING:
    from netstack.config import Config

app = typer.Typer(rich_markup_mode=None, add_completion=False)

VERSION_SECONDS = 10.0
_LONG = 70
# Signals that QEMU gets when we get them; it ends on each of them. SIGINT comes to both from a terminal, and once
# more from us: QEMU does not mind.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@app.command(
    epilog="Example: netstack qemu --pcap vm.pcapng -- qemu-system-x86_64 -accel auto -m 1G -nographic disk.qcow2",
    # All that follows the first word is QEMU's, even without the two dashes.
    context_settings={"allow_interspersed_args": False},
)
def qemu(
    command: Annotated[list[str], typer.Argument(metavar="-- QEMU...", help="The QEMU command line.")],
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="Read settings from a TOML file.")
    ] = None,
    subnet: Annotated[str | None, typer.Option(metavar="CIDR|auto", help="The guest's network.")] = None,
    mtu: Annotated[int | None, typer.Option(metavar="N", help="The guest's MTU. Default: 65520.")] = None,
    mac: Annotated[str | None, typer.Option(metavar="MAC", help="The guest's MAC. Default: QEMU's.")] = None,
    publish: PublishOption = None,
    api: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="Serve the API there. Default: not at all.")
    ] = None,
    pcap: Annotated[str | None, typer.Option(metavar="FILE", help="Write every frame to a pcapng file.")] = None,
    no_host_loopback: Annotated[
        bool, typer.Option("--no-host-loopback", help="Keep the guest away from the host's loopback.")
    ] = False,
    no_vhost_user: Annotated[
        bool, typer.Option("--no-vhost-user", help="Do not share the guest's memory: frames go over a socket, slower.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(metavar="L", help="debug, info, warning or error. Default: warning.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="F", help="console or json. Default: console.")] = None,
) -> int:
    """Run a virtual machine with a network of its own, and end with QEMU's exit status.

    Adds a virtio network card to the QEMU command line, and where it can, memory for the guest that netstack shares
    (vhost-user), which is fastest. KVM is taken out of it, with a note, where it does not work; `-accel auto` takes KVM
    where it works.
    """
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]}: no such program; install QEMU (Debian: qemu-system-x86) or give its path")
    if {"-daemonize", "--daemonize"} & set(command):
        raise InputError("-daemonize: this network lives as long as QEMU does; leave it out, or use netstack run")
    from netstack.config import Config, check_mac

    try:
        card = None if mac is None else check_mac(mac)
    except ValueError as error:
        raise InputError(f"--mac {mac} {error}") from None

    line = choose_accelerator(command)
    version = qemu_version(line[0])
    memory = qemu_options.shareable_memory(line, version) if can_share_memory() and not no_vhost_user else None
    with contextlib.ExitStack() as stack:
        inherited: socket.socket | None = None
        backend = ""
        if memory is None:
            ours, inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.enter_context(ours)
            stack.enter_context(inherited)
            link = f"fd://{ours.detach()}"
        else:
            backend = str(Path(stack.enter_context(private_directory())) / "qemu")
            link = f"vhost-user://{quote(backend)}"
        settings = Config.from_flags(
            config,
            link=(link,),
            subnet=subnet,
            mtu=mtu,
            publish=tuple(publish or ()),
            api=tuple(api or ()),
            pcap=pcap,
            host_loopback=False if no_host_loopback else None,
            # Its console is the guest's as a rule, where lines about every lease would be in the way.
            log_level=log_level or (None if config else "warning"),
            log_format=log_format,
        )
        if inherited is not None:
            options = qemu_options.network_options(
                line, inherited.fileno(), version, mac=card, host_mtu=settings.network.mtu
            )
        else:
            assert memory is not None
            options = qemu_options.vhost_user_options(line, backend, memory, mac=card, host_mtu=settings.network.mtu)
        import trio

        return trio.run(_run, settings, [*line, *options], inherited)


def private_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory for a socket of ours: with a short path, as a socket's has 107 bytes at most."""
    usual = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(prefix="netstack-", dir=usual if len(usual) < _LONG else "/tmp")  # noqa: S108 - it is made there for us alone


def can_share_memory() -> bool:
    """Whether this host has what a vhost-user back-end needs; rings are little-endian."""
    return sys.platform == "linux" and sys.byteorder == "little"


def choose_accelerator(command: list[str]) -> list[str]:
    """The command line for this host: KVM only where it truly works, with a line for people where it was wished for."""
    if not qemu_options.wants_kvm(command):
        return command
    from netstack.host.kvm import probe_kvm

    state = probe_kvm()
    if state.usable:
        return qemu_options.with_kvm(command)
    mend = f"; to mend it, {state.mend}" if state.mend else ""
    say(f"netstack: QEMU runs without KVM, many times slower: {state.reason}{mend}")
    return qemu_options.without_kvm(command)


def qemu_version(program: str) -> tuple[int, int] | None:
    """The version of a QEMU, None when it does not say."""
    try:
        shown = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return qemu_options.parse_version(shown.stdout.decode(errors="replace"))


async def _run(config: Config, line: list[str], inherited: socket.socket | None) -> int:
    """Run the network, and QEMU in it."""
    import trio

    from netstack.cli.service import raise_file_limit
    from netstack.cli.serving import listen_for_api, serve_in_background
    from netstack.control.log import Log
    from netstack.gateway import open_network

    log = Log(config.log.level, config.log.format)
    files = raise_file_limit()
    with trio.open_signal_receiver(*FORWARDED) as signals:
        async with open_network(config, log=log) as network, trio.open_nursery() as background:
            tell_chosen_ports(network)
            listeners = listen_for_api(config, network, config.api.listen)
            background.start_soon(serve_in_background, network, listeners, log)
            passed = [] if inherited is None else [inherited.fileno()]
            process = await trio.lowlevel.open_process(line, pass_fds=passed)
            if inherited is not None:
                inherited.close()  # so that the link ends when QEMU does
            with contextlib.suppress(AttributeError, OSError):  # prlimit is Linux's
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, files)

            async def forward() -> None:
                async for number in signals:
                    process.send_signal(number)

            background.start_soon(forward)
            try:
                status = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
            background.cancel_scope.cancel()
    # As a shell says that a program died of a signal.
    return status if status >= 0 else 128 - status
