"""The forwards of a network: who asked for which port of the host, and what stands behind it.

Theory of operation
-------------------
`add` is a plain call: when it returns, the port is open, and callers may come in this very moment. Nothing is half
made: of a range all ports are open, or none is, and what was opened is closed again.

Ports come from the settings, the API, guests' agents and gvproxy's API; `owner` says which. A port that another forward
of ours has is a conflict that names that forward; one that somebody else on the host has is a conflict that names the
process, where that can be read (`host.port_owner`). What happens then is the caller's wish:

    error      a ForwardError of the kind "conflict"
    next       the next free port, or for a range the next free run of ports; Forward.spec tells which
    loopback   the same port of a loopback address that is the guest's own: 127.0.5.15 for 192.168.5.15 (Linux, where
               all of 127/8 is the host's; elsewhere such an address must be made first)

When a forward is removed its port closes at once. TCP connections that are open go on to their own end: a server in the
guest that stops to listen drains them as well.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from netstack.config.forward_spec import ForwardSpec, parse_forward
from netstack.config.problems import ConfigError
from netstack.core.forwards import ForwardError, OpenToGuest
from netstack.core.ports import Events, Poller
from netstack.core.stack import Stack
from netstack.gateway.forward_ports import Ports, TcpPorts
from netstack.gateway.guest_lookup import GuestLookup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netstack.config.tables import PublishTable
    from netstack.control.log import Log

__all__ = ["Forward", "ForwardError", "Forwards"]

OnConflict = Literal["error", "next", "loopback"]
Source = Literal["caller", "gateway"]
CONFIG: Final = "config"
USER: Final = "user"

# Ports that on_conflict = "next" looks at.
_NEXT_TRIES: Final = 1024


class Forward:
    """One forward that is open."""

    def __init__(
        self,
        forwards: Forwards,
        ident: str,
        spec: ForwardSpec,
        ports: Ports,
        *,
        asked: ForwardSpec,
        owner: str,
        description: str,
        on_conflict: OnConflict,
        source: Source,
    ) -> None:
        self._forwards = forwards
        self._ports = ports
        self.id = ident
        self.spec = spec  # with the real port and address
        self.asked = asked  # as it was given
        self.owner = owner  # "config", "user", "agent:GUEST" or "gvproxy"
        self.description = description
        self.on_conflict = on_conflict
        self.source = source
        self.closed = False

    def close(self) -> None:
        """Give the port back. May be called twice."""
        self._forwards.remove(self.id)

    def describe(self) -> dict[str, Any]:
        """What it is and what went through, ready for JSON."""
        spec, traffic = self.spec, self._ports.engine.traffic()
        return {
            "id": self.id,
            "spec": str(spec),
            "protocol": spec.protocol,
            "host": spec.path or spec.host,
            "host_port": spec.host_port,
            "ports": spec.count,
            "guest": spec.guest,
            "guest_port": spec.guest_port,
            "owner": self.owner,
            "description": self.description,
            "source": self.source,
            "connections": {"open": traffic.open, "total": traffic.total, "refused": traffic.refused},
            "bytes_from_guest": traffic.bytes_from_guest,
            "bytes_to_guest": traffic.bytes_to_guest,
            "last_error": traffic.last_error,
        }

    def release(self, now: float) -> None:
        """Close the ports; Forwards has forgotten it."""
        self.closed = True
        self._ports.close(now)


class Forwards:
    """All forwards of one network."""

    def __init__(
        self,
        stack: Stack,
        poller: Poller,
        guests: GuestLookup,
        log: Log | None = None,
        events: Events | None = None,
        *,
        max_ports: int = 1024,
    ) -> None:
        """`max_ports`: each port is a descriptor, and guests' connections need them too."""
        self._stack = stack
        self._max_ports = max_ports
        self._poller = poller
        self._log = log
        self._events = events
        self._table: dict[str, Forward] = {}
        self._number = 0
        self._ports_open = 0
        self._closed = False
        self._refused_at = 0  # of a range, the port that could not be had, counted from the first
        self.guests = guests
        # Called with "added" or "removed" and the forward.
        self.on_change: list[Callable[[str, Forward], None]] = []

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Forward]:
        return iter(list(self._table.values()))

    def add(
        self,
        spec: str | ForwardSpec,
        *,
        on_conflict: str = "error",
        owner: str = USER,
        description: str = "",
        source: str = "caller",
        through: OpenToGuest | None = None,
    ) -> Forward:
        """Open a forward. Raises ForwardError, and then nothing has changed.

        `through` opens the connections of TCP in place of the stack: where the guest's socket cannot be reached so.
        """
        asked = _parse(spec)
        if self._closed:
            raise ForwardError(f"{asked}: the network is ending", "failed")
        if on_conflict not in ("error", "next", "loopback"):
            raise ForwardError(f"on_conflict is error, next or loopback, not {on_conflict!r}", "invalid")
        if source not in ("caller", "gateway"):
            raise ForwardError(f"source is caller or gateway, not {source!r}", "invalid")
        problem = self.guests.check(asked.guest) if asked.guest else None
        if problem is not None:
            raise ForwardError(f"{asked}: {problem}", "invalid")
        if self._ports_open + asked.count > self._max_ports:
            words = f"all forwards together may have {self._max_ports} ports; raise the limit of open files for more"
            raise ForwardError(f"{asked}: {words}", "denied")
        ports, spec = self._open(asked, on_conflict, through, as_gateway=source == "gateway")
        self._number += 1
        forward = Forward(
            self,
            f"f{self._number}",
            spec,
            ports,
            asked=asked,
            owner=owner,
            description=description,
            on_conflict=on_conflict,  # type: ignore[arg-type] # narrowed above
            source=source,  # type: ignore[arg-type]
        )
        self._table[forward.id] = forward
        self._ports_open += spec.count
        self._tell("added", forward)
        return forward

    def remove(self, ident: str) -> bool:
        """Close a forward; False when there is none with this id."""
        forward = self._table.pop(ident, None)
        if forward is None:
            return False
        self._ports_open -= forward.spec.count
        forward.release(time.monotonic())
        self._tell("removed", forward)
        return True

    def find(self, text: str | ForwardSpec) -> list[Forward]:
        """The forwards that are meant: by id, by SPEC as it is or as it was given, or by what of the host they take."""
        if isinstance(text, str):
            if text in self._table:
                return [self._table[text]]
            try:
                text = parse_forward(text)
            except ConfigError:
                return [forward for forward in self if text == forward.spec.host_side]
        return [forward for forward in self if text in (forward.spec, forward.asked)]

    def describe(self) -> list[dict[str, Any]]:
        """All of them, ready for JSON."""
        return [forward.describe() for forward in self]

    def apply(self, tables: Sequence[PublishTable], *, strict: bool = False) -> None:
        """Make the forwards of the settings what these tables say; those that stay as they are go on untouched.

        strict: raise the first ForwardError, else log them. What fails is tried again at the next reload.
        """
        wanted = {(parse_forward(table.spec), table.on_conflict, table.source): table for table in tables}
        for forward in self:
            if forward.owner == CONFIG:
                key = (forward.asked, forward.on_conflict, forward.source)
                if key in wanted:
                    del wanted[key]
                else:
                    self.remove(forward.id)
        for spec, on_conflict, source in wanted:
            try:
                self.add(spec, on_conflict=on_conflict, source=source, owner=CONFIG)
            except ForwardError as error:
                if strict:
                    raise
                if self._log is not None:
                    self._log.error("a forward cannot be made", error=str(error))

    def close(self) -> None:
        """The network ends."""
        self._closed = True
        for forward in self:
            self.remove(forward.id)

    # ---- opening ---------------------------------------------------------------------------------------------------

    def _open(
        self, asked: ForwardSpec, on_conflict: str, through: OpenToGuest | None, *, as_gateway: bool
    ) -> tuple[Ports, ForwardSpec]:
        try:
            return self._try(asked, through, as_gateway=as_gateway)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or on_conflict == "error" or asked.protocol == "unix":
                raise self._explain(asked, error) from None
        if on_conflict == "loopback":
            spec = replace(asked, host=self._own_loopback(asked))
            try:
                return self._try(spec, through, as_gateway=as_gateway)
            except OSError as error:
                raise self._explain(spec, error) from None
        first = asked.host_port + self._refused_at + 1
        while first < min(asked.host_port + 1 + _NEXT_TRIES, 65537 - asked.count):
            try:
                return self._try(replace(asked, host_port=first), through, as_gateway=as_gateway)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise self._explain(asked, error) from None
            # No run with that port in it can be had: to try them all could take seconds, in which no guest is served.
            first += self._refused_at + 1
        raise ForwardError(f"{asked}: the next {_NEXT_TRIES} ports are in use too; name another", "conflict")

    def _try(self, spec: ForwardSpec, through: OpenToGuest | None, *, as_gateway: bool) -> tuple[Ports, ForwardSpec]:
        """Open all of this. Raises OSError, and then nothing is open."""
        if spec.protocol == "unix" and any(_overlap(forward.spec, spec) for forward in self):
            raise OSError(errno.EADDRINUSE, "ours")  # or our own listener would be asked whether it lives

        find_guest = self.guests.finder(spec.guest)
        ports: Ports
        if spec.protocol == "udp":
            from netstack.gateway.udp_ports import UdpPorts

            ports = UdpPorts(self._stack, self._poller, find_guest, self._events, as_gateway=as_gateway)
        else:
            ports = TcpPorts(
                self._stack, self._poller, find_guest, self._events, as_gateway=as_gateway, through=through
            )
        try:
            if spec.protocol == "unix":
                assert isinstance(ports, TcpPorts)
                ports.open_path(spec.path, spec.guest_port)
            else:
                got: list[int] = []
                for i in range(spec.count):
                    self._refused_at = i
                    got.append(ports.open(spec.host, _nth(spec.host_port, i), spec.guest_port + i))
                spec = replace(spec, host_port=got[0])
            ports.start()
        except BaseException:
            ports.close(time.monotonic())
            raise
        return ports, spec

    def _own_loopback(self, spec: ForwardSpec) -> str:
        """127.0.5.15 for the guest 192.168.5.15."""
        guest = self.guests.find(spec.guest, 4, time.monotonic())
        if ":" in spec.host or guest is None or len(guest) != 4:
            words = "on_conflict = loopback is for IPv4, and for guests that are here"
            raise ForwardError(f"{spec}: the port is in use, and {words}", "conflict")
        return f"127.0.{guest[2]}.{guest[3]}"

    def _explain(self, spec: ForwardSpec, error: OSError) -> ForwardError:
        code = error.errno or 0
        if code == errno.EADDRINUSE:
            ours = next((forward for forward in self if _overlap(forward.spec, spec)), None)
            if ours is not None:
                who = f"the forward {ours.id} ({ours.spec}) has it"
            elif spec.protocol == "unix":
                who = "another process listens there"
            else:
                # Here, where the port's own descriptor is free again: an import needs one, and may fail like anything.
                from netstack.host.port_owner import find_owner

                owner = find_owner(spec.protocol, spec.host, range(spec.host_port, spec.host_port + spec.count))
                who = f"{owner} has it" if owner else "another process has it"
            what = "the socket" if spec.protocol == "unix" else "the port"
            return ForwardError(f"{spec}: {what} is in use: {who}; end it, or take another", "conflict")
        words, kind = _WORDS.get(code, (f"{error.strerror}", "failed"))
        return ForwardError(f"{spec}: {words}", kind)

    def _tell(self, what: str, forward: Forward) -> None:
        if self._log is not None:
            self._log.info(f"forward {what}", id=forward.id, spec=str(forward.spec), owner=forward.owner)
        for tell in tuple(self.on_change):
            tell(what, forward)


_WORDS: Final[dict[int, tuple[str, Literal["invalid", "conflict", "denied", "failed"]]]] = {
    errno.EACCES: ("the host does not allow it; ports below 1024 are root's, take a higher one", "denied"),
    errno.EPERM: ("the host does not allow it", "denied"),
    errno.EADDRNOTAVAIL: ("the host does not have this address; take one that it has, or 0.0.0.0 or [::]", "invalid"),
    errno.EAFNOSUPPORT: ("the host has no IPv6", "failed"),
    errno.EMFILE: ("no more files can be open; raise the limit (netstack doctor)", "failed"),
    errno.ENFILE: ("the host has no more files that can be open", "failed"),
    errno.EEXIST: ("a file that is no socket is there; name another path", "conflict"),
    errno.ENOENT: ("its directory is not there; make it first", "invalid"),
    errno.ENOTDIR: ("its directory is none; name another path", "invalid"),
}


def _parse(spec: str | ForwardSpec) -> ForwardSpec:
    if isinstance(spec, ForwardSpec):
        return spec
    try:
        return parse_forward(spec)
    except ConfigError as error:
        raise ForwardError(str(error), "invalid") from None


def _nth(first: int, i: int) -> int:
    return first + i if first else 0


def _overlap(ours: ForwardSpec, theirs: ForwardSpec) -> bool:
    """Whether two forwards want the same of the host."""
    if "unix" in (ours.protocol, theirs.protocol):
        return ours.protocol == theirs.protocol and ours.path == theirs.path
    apart = ours.host_port + ours.count <= theirs.host_port or theirs.host_port + theirs.count <= ours.host_port
    hosts = {ours.host, theirs.host}
    everywhere = "::" in hosts or ("0.0.0.0" in hosts and not any(":" in host for host in hosts))
    return ours.protocol == theirs.protocol and not apart and (len(hosts) == 1 or everywhere)
