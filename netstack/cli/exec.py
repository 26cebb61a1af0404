"""`netstack exec`: a command in a network namespace of its own, behind a network of its own. Linux only.

Theory of operation
-------------------
Two processes. The one that was started forks at once; the child makes the namespaces and a tap in them, sends the tap
here, and waits (`cli.exec_guest`). Here the network starts with that tap as its one link, chooses the guest's addresses
as its DHCP server would, and sends them; the child configures its namespace and becomes the command. It is our child
and stays in our process group, so that it has the terminal as if it had been started without us.

Signals. What somebody sends to us is meant for the command and is passed on. What the terminal sends (Ctrl-C, a
hangup) has reached the command already, since it is in the same process group: passed on, it would count twice.
signalfd(2) tells the two apart by si_code. We ourselves end when the command does, with its status.

The end. What the command wrote last may still be in its kernel, whose connections live on without it. So the network
stays for as long as these make progress; then what is complete is left to the host's kernel, and the rest is reset.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.faults import CommandError, InputError
from netstack.cli.forwarding import PublishOption, tell_chosen_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from netstack.config import Config
    from netstack.gateway import Network

app = typer.Typer(rich_markup_mode=None, add_completion=False)

DEVICE = "tap0"

FORWARDED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h: the terminal driver, above all
_SIGINFO = struct.Struct("=Iii116x")  # signalfd(2): signo, errno, code, and what is of no interest here
_SFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC

# How long the command's connections may take for what it left them: without progress, and altogether.
_SETTLE_IDLE = 0.3
_SETTLE = 10.0


@app.command(
    name="exec",
    epilog="Example: netstack exec --no-host-loopback -- curl https://example.org",
    # All that follows the first word is the command's, even without the two dashes.
    context_settings={"allow_interspersed_args": False},
)
def exec_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command and its arguments.")],
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="Read settings from a TOML file.")
    ] = None,
    subnet: Annotated[str | None, typer.Option(metavar="CIDR|auto", help="The command's network.")] = None,
    mtu: Annotated[int | None, typer.Option(metavar="N", help="The MTU of its device. Default: 65520.")] = None,
    publish: PublishOption = None,
    api: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="Serve the API there. Default: not at all.")
    ] = None,
    pcap: Annotated[str | None, typer.Option(metavar="FILE", help="Write every frame to a pcapng file.")] = None,
    no_host_loopback: Annotated[
        bool, typer.Option("--no-host-loopback", help="Keep the command away from the host's loopback.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(metavar="L", help="debug, info, warning or error. Default: warning.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="F", help="console or json. Default: console.")] = None,
) -> int:
    """Run a command in a new network namespace behind netstack, and end with its exit status. Needs no root.

    The command sees a device tap0 with addresses, routes and DNS set, and root's rights over its own network. Files and
    processes are the host's; an ordinary user appears as root, and has no more rights than before.
    """
    if sys.platform != "linux":
        raise InputError("netstack exec needs Linux's namespaces; elsewhere, run a virtual machine: netstack qemu")
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]}: no such program; give its path, or install it")
    from netstack.config import Config
    from netstack.vde.namespace import NamespaceError, receive_tap

    def settings(link: str) -> Config:
        return Config.from_flags(
            config,
            link=(link,),
            subnet=subnet,
            mtu=mtu,
            publish=tuple(publish or ()),
            api=tuple(api or ()),
            pcap=pcap,
            host_loopback=False if no_host_loopback else None,
            log_level=log_level or (None if config else "warning"),
            log_format=log_format,
        )

    wanted = settings(f"tap://{DEVICE}?fd=0")  # mistakes first; which descriptor it will be is known later
    with Guest(command, wanted.network.mtu) as guest:
        try:
            tap = receive_tap(guest.sock)
        except NamespaceError as error:
            from netstack.host.namespaces import explain_refusal

            raise CommandError(explain_refusal(error.code, error.step)) from None
        import trio

        return trio.run(_run, settings(f"tap://{DEVICE}?fd={tap}"), guest)


class Guest:
    """The child that becomes the command, and the signals meant for it."""

    def __init__(self, command: list[str], mtu: int) -> None:
        """Fork. Must be called before anything has started a thread."""
        from netstack.cli.exec_guest import become_guest

        self.command = command
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Before there are threads: a signal goes to any thread that does not block it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            self.sock.close()
            become_guest(theirs, parent, mask, DEVICE, mtu, command)
        theirs.close()
        self._mask = mask
        self.status: int | None = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()  # one that waits still to be configured gives up
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.reap()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def reap(self) -> int:
        """Its exit status, as a shell says it; waits for its end."""
        if self.status is None:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.status = status if status >= 0 else 128 - status
        return self.status

    def configure(self, given: dict[str, Any]) -> None:
        """Let it go on."""
        self.sock.send(json.dumps(given).encode())

    def read_result(self) -> None:
        """Raises CommandError when it did not become the command. To be called when the socket is readable."""
        message = self.sock.recv(65536)
        if message:
            said = json.loads(message)
            from netstack.host.namespaces import explain_refusal

            raise CommandError(explain_refusal(said["errno"], said["step"]))

    async def forward_signals(self) -> None:
        """Pass on what is sent to us, until cancelled."""
        import trio

        with _signal_descriptor() as fd:
            while True:
                await trio.lowlevel.wait_readable(fd)
                number, _, code = _SIGINFO.unpack(os.read(fd, _SIGINFO.size))
                if code != _SI_KERNEL and self.status is None:
                    os.kill(self.pid, number)

    async def wait(self) -> int:
        """Its exit status, when it has ended."""
        import trio

        fd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
        return self.reap()


async def _run(config: Config, guest: Guest) -> int:
    """Run the network, and the command in it."""
    import trio

    from netstack.cli.service import raise_file_limit
    from netstack.cli.serving import listen_for_api, serve_in_background
    from netstack.control.log import Log
    from netstack.gateway import open_network

    log = Log(config.log.level, config.log.format)
    raise_file_limit()
    async with open_network(config, log=log) as network, trio.open_nursery() as background:
        tell_chosen_ports(network)
        listeners = listen_for_api(config, network, config.api.listen)
        background.start_soon(serve_in_background, network, listeners, log)
        guest.configure(_configuration(network))
        background.start_soon(guest.forward_signals)
        await trio.lowlevel.wait_readable(guest.sock)
        guest.read_result()
        status = await guest.wait()
        await _settle(network)
        background.cancel_scope.cancel()
    return status


def _configuration(network: Network) -> dict[str, Any]:
    """What the guest would have got from DHCP and from router advertisements, for `cli.exec_guest`."""
    from ipaddress import ip_address

    from netstack.vde.tap import TapLink

    addresses = network.addresses
    (link,) = network.links
    assert isinstance(link, TapLink)
    now = time.monotonic()
    lease = network.leases.offer(link.mac, now, link=link.name)
    if lease is None:
        raise CommandError(f"--subnet {addresses.subnet}: no address is left in it; take a larger one")
    network.leases.bind(link.mac, lease.address, now, link=link.name)
    broadcast = addresses.subnet.broadcast_address.packed
    given = [(lease.address.hex(), addresses.subnet.prefixlen, broadcast.hex())]
    gateways = [addresses.gateway.hex()]
    if lease.address6 is not None:
        network.leases.bind6(link.mac, now, link=link.name)
        given.append((lease.address6.hex(), addresses.subnet6.prefixlen, ""))
        if network.services.ndp.is_router:
            gateways.append(addresses.gateway6.hex())
    resolv_conf = [f"nameserver {ip_address(server)}" for server in (addresses.dns, addresses.dns6)]
    if network.services.dhcp.search:
        resolv_conf.append(f"search {' '.join(network.services.dhcp.search)}")
    return {
        "addresses": given,
        "gateways": gateways,
        "resolv_conf": "".join(f"{line}\n" for line in resolv_conf),
    }


async def _settle(network: Network) -> None:
    """Wait for what the command left in its connections; then leave those that are complete to the host's kernel."""
    import trio

    stack = network.stack
    now = last_at = time.monotonic()
    limit = now + _SETTLE
    before = -1
    while now < limit and now - last_at < _SETTLE_IDLE:
        open_flows = [flow for flow in stack.flows if not flow.is_finished_by_guest]
        if not open_flows and not stack.bytes_for_host:
            break
        received = sum(flow.bytes_from_guest for flow in open_flows) - stack.bytes_for_host
        if received != before:
            before, last_at = received, now
        await trio.sleep(0.01)
        now = time.monotonic()
    for flow in stack.flows:
        flow.let_go(now)


@contextlib.contextmanager
def _signal_descriptor() -> Iterator[int]:
    """A signalfd for FORWARDED. They must be blocked."""
    libc = ctypes.CDLL(None, use_errno=True)
    mask = (ctypes.c_ulong * 16)()  # sigset_t: 1,024 bits in glibc and musl
    libc.sigemptyset(mask)
    for number in FORWARDED:
        libc.sigaddset(mask, int(number))
    fd = libc.signalfd(-1, mask, _SFD_NONBLOCK_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield fd
    finally:
        os.close(fd)
