"""`netstack qemu`: a network for one virtual machine, which lives exactly as long as its QEMU.

The network runs in this process and its link is one end of a socketpair, so there is no socket to name, to clean up
or to share by mistake. Nothing is kept: no leases, no API unless it is asked for.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Annotated

import typer

from netstack.cli import qemu_options
from netstack.cli.faults import InputError, say

if TYPE_CHECKING:
    from netstack.config import Config

app = typer.Typer(rich_markup_mode=None, add_completion=False)

VERSION_SECONDS = 10.0
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
    publish: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="SPEC", help="Forward a port of the host (comes with a later version)."),
    ] = None,
    api: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="Serve the API there. Default: not at all.")
    ] = None,
    pcap: Annotated[str | None, typer.Option(metavar="FILE", help="Write every frame to a pcapng file.")] = None,
    no_host_loopback: Annotated[
        bool, typer.Option("--no-host-loopback", help="Keep the guest away from the host's loopback.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(metavar="L", help="debug, info, warning or error. Default: warning.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="F", help="console or json. Default: console.")] = None,
) -> int:
    """Run a virtual machine with a network of its own, and end with QEMU's exit status.

    Adds a virtio network card to the QEMU command line. KVM is taken out of it, with a note, where it does not work;
    `-accel auto` takes KVM where it works.
    """
    if publish:
        raise InputError(f"-p {publish[0]}: forwards come with a later version of netstack; leave -p out for now")
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]}: no such program; install QEMU (Debian: qemu-system-x86) or give its path")
    if {"-daemonize", "--daemonize"} & set(command):
        raise InputError("-daemonize: this network lives as long as QEMU does; leave it out, or use netstack run")
    from netstack.config import Config, check_mac

    try:
        card = None if mac is None else check_mac(mac)
    except ValueError as error:
        raise InputError(f"--mac {mac} {error}") from None

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        settings = Config.from_flags(
            config,
            link=(f"fd://{ours.detach()}",),
            subnet=subnet,
            mtu=mtu,
            api=tuple(api or ()),
            pcap=pcap,
            host_loopback=False if no_host_loopback else None,
            # Its console is the guest's as a rule, where lines about every lease would be in the way.
            log_level=log_level or (None if config else "warning"),
            log_format=log_format,
        )
        line = choose_accelerator(command)
        options = qemu_options.network_options(
            line,
            theirs.fileno(),
            qemu_version(line[0]),
            mac=card,
            host_mtu=settings.network.mtu,
        )
        import trio

        return trio.run(_run, settings, [*line, *options], theirs)


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


async def _run(config: Config, line: list[str], theirs: socket.socket) -> int:
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
            listeners = listen_for_api(config, network, config.api.listen)
            background.start_soon(serve_in_background, network, listeners, log)
            process = await trio.lowlevel.open_process(line, pass_fds=[theirs.fileno()])
            theirs.close()  # so that the link ends when QEMU does
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
