"""`netstack run`: a network for any number of guests, until it is told to end."""

from __future__ import annotations

import secrets
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from netstack.cli.faults import one_line, say
from netstack.cli.forwarding import PublishOption, describe_forwards

if TYPE_CHECKING:
    from collections.abc import Callable

    from netstack.cli.service import PidFile, ReadyFd, Systemd
    from netstack.config import Config
    from netstack.gateway import Network

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(epilog="Example: netstack run --link unix:///tmp/netstack.sock --subnet 192.168.7.0/24 --pcap all.pcapng")
def run(
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="Read settings from a TOML file.")
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Where guests attach, may be repeated: unix:///PATH, connect+unix:///PATH, tcp://ADDRESS:PORT, "
            "connect+tcp://ADDRESS:PORT, fd://NUMBER or vde:///DIRECTORY.",
        ),
    ] = None,
    subnet: Annotated[
        str | None,
        typer.Option(metavar="CIDR|auto", help="The guests' network. Default: 192.168.5.0/24, or the next free one."),
    ] = None,
    mtu: Annotated[int | None, typer.Option(metavar="N", help="The MTU that guests are told. Default: 65520.")] = None,
    publish: PublishOption = None,
    api: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI", help="Serve the API at unix:///PATH or also at tcp://127.0.0.1:PORT; or not at all: none."
        ),
    ] = None,
    pcap: Annotated[str | None, typer.Option(metavar="FILE", help="Write every frame to a pcapng file.")] = None,
    no_host_loopback: Annotated[
        bool, typer.Option("--no-host-loopback", help="Keep guests away from the host's loopback.")
    ] = False,
    state_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where leases are kept.")] = None,
    pidfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the number of this process there while it runs.")
    ] = None,
    ready_fd: Annotated[
        int | None, typer.Option(metavar="N", help="Write a line `ready` to this file descriptor when it is so.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="L", help="debug, info, warning or error. Default: info.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="F", help="console or json. Default: console.")] = None,
) -> None:
    """Run a network for virtual machines, until SIGINT or SIGTERM. SIGHUP reads FILE again.

    Without --link it listens at a socket of its own and prints the QEMU options to copy.
    """

    def settings() -> Config:
        from netstack.config import Config

        return Config.from_flags(
            config,
            link=link or (),
            subnet=subnet,
            mtu=mtu,
            publish=tuple(publish or ()),
            api=tuple(api or ()),
            pcap=pcap,
            host_loopback=False if no_host_loopback else None,
            state_dir=state_dir,
            log_level=log_level,
            log_format=log_format,
        )

    # The settings first: most mistakes are there, and all of this is imported for nothing then.
    given = settings()
    import trio

    from netstack.cli.service import PidFile, ReadyFd, Systemd, raise_file_limit
    from netstack.config import notify_socket

    service = _Service(
        given,
        again=settings if config is not None else None,
        ready_fd=None if ready_fd is None else ReadyFd(ready_fd),
        pidfile=None if pidfile is None else PidFile(pidfile),
        systemd=Systemd(notify_socket()),
    )
    raise_file_limit()
    trio.run(service.run)


class _Service:
    """One run, from the settings to the end."""

    def __init__(
        self,
        given: Config,
        *,
        again: Callable[[], Config] | None,
        ready_fd: ReadyFd | None,
        pidfile: PidFile | None,
        systemd: Systemd,
    ) -> None:
        from netstack.control.log import Log

        self._given = given
        self._config = given.for_service()
        self._again = again
        self._ready_fd = ready_fd
        self._pidfile = pidfile
        self._systemd = systemd
        self._network: Network | None = None
        self._log = Log(given.log.level, given.log.format)

    async def run(self) -> None:
        """Open the network, say so, wait for the end."""
        import trio

        from netstack.cli.serving import Signals, listen_for_api, serve_in_background
        from netstack.gateway import open_network

        signals = Signals(self._reload)
        async with trio.open_nursery() as nursery:
            await nursery.start(signals.watch, nursery.cancel_scope)
            try:
                network = open_network(self._config, log=self._log)
                async with network as self._network, trio.open_nursery() as background:
                    listeners = listen_for_api(self._config, self._network, self._given.api.listen)
                    background.start_soon(serve_in_background, self._network, listeners, self._log)
                    try:
                        self._tell_ready([listener.uri for listener in listeners])
                        await signals.stop.wait()
                    finally:
                        self._systemd.stopping()
                    background.cancel_scope.cancel()
            finally:
                # Last of all: whoever waits for it to go, to start the next one, finds our sockets free.
                if self._pidfile is not None:
                    self._pidfile.remove()
            nursery.cancel_scope.cancel()

    def _tell_ready(self, api: list[str]) -> None:
        """Tell everybody who waits. The pid file is there before anybody is told."""
        if self._pidfile is not None:
            self._pidfile.write()
        if not self._given.link:
            say(f"netstack: give QEMU these options: {qemu_options(self._config.link[0].uri)}")
        links = ", ".join(link.uri for link in self._config.link)
        assert self._network is not None
        forwards = describe_forwards(self._network)
        more = f"; forwards {forwards}" if forwards else ""
        say(f"ready: {self._summary()}; links {links}; API {', '.join(api) or 'off'}{more}")
        if self._ready_fd is not None:
            self._ready_fd.tell()
        self._systemd.ready(self._summary())

    def _summary(self) -> str:
        assert self._network is not None
        network = self._network.statistics()["network"]
        return f"network {network['subnet']} and {network['subnet6']}, gateway {network['gateway']}"

    def _reload(self) -> None:
        """Read the file again and take over what can change; the old settings stay when the new ones are wrong."""
        from netstack.config import ConfigError

        if self._network is None:
            return
        if self._again is None:
            self._log.warning("nothing to read again: netstack was started without a file (-c)")
            return
        self._systemd.reloading()
        try:
            fresh = self._again()
            config = fresh.for_service()
        except ConfigError as error:
            self._log.error("settings not taken over, the old ones stay", error=one_line(error))
        else:
            left = self._network.reload(config)
            self._log.info("settings read again")
            for name in left:
                self._log.warning("a setting cannot change while netstack runs: restart it", setting=name)
            self._given, self._config = fresh, config
        self._systemd.ready(self._summary())


def qemu_options(uri: str) -> str:
    """The options that attach a QEMU guest to a unix:// link, for people to copy."""
    from netstack.config import parse_link_uri

    # Two guests with QEMU's one default MAC could not be told apart. 52:54:00 is what QEMU and libvirt use.
    mac = ":".join(["52:54:00", *(f"{byte:02x}" for byte in secrets.token_bytes(3))])
    # A comma ends a value in QEMU's options, and two stand for one (qemu-option.c).
    path = parse_link_uri(uri).path.replace(",", ",,")
    netdev = f"stream,id=net0,addr.type=unix,addr.path={path}"
    return f"-netdev {shlex.quote(netdev)} -device virtio-net-pci,netdev=net0,mac={mac}"
