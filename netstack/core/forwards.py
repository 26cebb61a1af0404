"""Forwards, without I/O: a connection that the host has accepted becomes a connection to a guest.

Theory of operation
-------------------
A listening socket of the rim (`host.listeners`) accepts for a `TcpForward` and hands the connection over. Whom it is
for is found out at that moment, by name or lease, so a guest may reboot, change its address, or come later. Then the
stack opens a connection toward the guest for that socket (Stack.open_to_guest): ARP or neighbor discovery, SYN. Nothing
is read from the caller before the guest has answered, so what it sends waits in the kernel, and half close, reset and
back-pressure are those of any flow (`core.tcp`).

What the caller sees when the guest does not accept. Linux and macOS complete the caller's handshake by themselves, in
the listening socket's queue; a program cannot hold it back until the guest has answered. So a closed guest port is a
connection that is reset at once, within a round trip to the guest, and never one that closes in good order after
nothing: a caller that sends or reads gets ECONNRESET. A guest that is not there costs four ARP requests, one a second;
a guest that drops SYNs costs as long as TCP takes to give up, 127 s, and the caller may give up before.

Which of a guest's two addresses. The IPv4 one, but for callers over IPv6 whose own address the guest can be shown; if
that one refuses and the guest is known to be at the other, that is tried: many servers listen in one family only.

What the guest sees. The caller's own address and port, when the guest can answer to it through the gateway
(Addresses.caller): then the guest's logs and access rules work. For callers on the host's loopback, and where the
forward says so, it is the gateway's. The port is the caller's unless the guest has a connection with the same four
numbers already; a caller at a unix socket has none and gets any.

Bounds: a forward has at most MAX_PENDING connections that no guest has answered, and all together no more than
`Limits.forward_pending`, or callers of guests that are not there would take all descriptors; more wait in the kernel's
queue. Open connections count as flows of the guest's link (`core.flows.Limits`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Literal, Protocol

from netstack.core.addresses import is_link_local6
from netstack.core.flows import FlowKey, flow_key

if TYPE_CHECKING:
    from netstack.core.flows import FlowTable, Limits
    from netstack.core.ports import HostSocket
    from netstack.core.stack import Stack
    from netstack.core.tcp import TcpFlow

# Connections of one forward that wait for the guest's answer; as many as listen() queues on Linux before 5.4.
MAX_PENDING: Final = 128

# Where a port is made up, it is one that the guest knows as a client's (Linux: net.ipv4.ip_local_port_range).
FIRST_PORT: Final = 32768
LAST_PORT: Final = 60999
_TRIES: Final = 1024

ErrorKind = Literal["invalid", "conflict", "denied", "failed"]

# Says which address a forward's guest has now, of the family (4 or 6) that suits the caller where it has both.
FindGuest = Callable[[int, float], bytes | None]

# Stack.open_to_guest, or another way to a guest's socket.
OpenToGuest = Callable[
    ["HostSocket", bytes, int, bytes, int, Callable[["TcpFlow | None", int], bool], float],
    None,
]


class ForwardError(Exception):
    """A forward cannot be made; str() is one line that says what is in the way and what to do."""

    def __init__(self, words: str, kind: ErrorKind = "failed") -> None:
        super().__init__(words)
        self.kind = kind


@dataclass(slots=True)
class Traffic:
    """What went through a forward, since it was made."""

    open: int = 0  # connections, or flows of UDP
    total: int = 0
    refused: int = 0  # that did not reach the guest
    bytes_from_guest: int = 0
    bytes_to_guest: int = 0
    last_error: str = ""


class Engine(Protocol):
    """What does the work of a forward, behind its listening sockets. One for TCP and unix sockets, one for UDP."""

    def traffic(self) -> Traffic:
        """What went through, as of now."""
        ...

    def close(self, now: float) -> None:
        """The forward ends. No more connections; those that are open go on, or end where that is the protocol's way."""


class Pending:
    """Connections of all forwards that no guest has answered."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = 0
        self._waiting: dict[TcpForward, None] = {}

    def enter(self) -> None:
        """One more."""
        self._count += 1

    def leave(self) -> None:
        """One less; those that wait are told."""
        self._count -= 1
        if self._waiting and self._count < self._limits.forward_pending:
            waiting, self._waiting = self._waiting, {}
            for forward in waiting:
                forward.on_room()

    def is_full_for(self, forward: TcpForward) -> bool:
        """Whether this forward has to wait until its on_room() is called."""
        if self._count < self._limits.forward_pending:
            return False
        self._waiting[forward] = None
        return True

    def forget(self, forward: TcpForward) -> None:
        """It waits no more."""
        self._waiting.pop(forward, None)


class TcpForward:
    """Takes the connections of one forward to its guest."""

    __slots__ = (
        "_as_gateway",
        "_closed",
        "_done",
        "_find_guest",
        "_flows",
        "_open_to_guest",
        "_pending",
        "_stack",
        "on_room",
    )

    def __init__(
        self, stack: Stack, find_guest: FindGuest, *, as_gateway: bool = False, through: OpenToGuest | None = None
    ) -> None:
        """`as_gateway`: guests see the gateway's address in place of the caller's. `through`: who opens connections."""
        self._stack = stack
        self._find_guest = find_guest
        self._as_gateway = as_gateway
        self._open_to_guest = through or stack.open_to_guest
        self._flows: set[TcpFlow] = set()
        self._pending = 0
        self._closed = False
        self._done = Traffic()  # of the connections that have ended
        self.on_room: Callable[[], None] = lambda: None  # called when full() is over

    def full(self) -> bool:
        """Whether listeners are to wait with accept()."""
        return self._pending >= MAX_PENDING or self._stack.forward_pending.is_full_for(self)

    def on_connection(
        self, sock: HostSocket, caller: bytes | None, caller_port: int, guest_port: int, now: float
    ) -> None:
        """Take a connection that the host has accepted. `caller` is None at a unix socket."""
        self._done.total += 1
        family = 6 if caller is not None and len(caller) == 16 and self._peer_for(caller, 16) == caller else 4
        guest = self._find_guest(family, now)
        if guest is None:
            self._fail("the guest is not there: no lease has its name")
            self._stack.host.reset(sock)
            return
        self._pending += 1
        self._stack.forward_pending.enter()
        self._stack.counters.forwarded += 1

        def open_to(guest: bytes, other: int, now: float) -> None:
            """`other`: the family of the guest's other address, or 0 when it has been tried."""

            def opened(flow: TcpFlow | None, error: int) -> bool:
                if error == errno.ECONNREFUSED and other:
                    second = self._find_guest(other, self._stack.now)
                    if second is not None and self._stack.neighbors.find(second) is not None and second != guest:
                        open_to(second, 0, self._stack.now)
                        return True
                self._on_opened(flow, error, guest, guest_port)
                return False

            peer = self._peer_for(caller, len(guest))
            if is_link_local6(guest):  # from there it answers to its own wire alone
                peer = self._stack.addresses.link_local
            self._open_to_guest(sock, guest, guest_port, peer, caller_port, opened, now)

        open_to(guest, 10 - family, now)

    def _peer_for(self, caller: bytes | None, length: int) -> bytes:
        """As whom a guest with an address of `length` bytes sees this caller."""
        addresses = self._stack.addresses
        if caller is None or self._as_gateway:
            return addresses.gateway if length == 4 else addresses.gateway6
        return addresses.caller(caller, length)

    def _on_opened(self, flow: TcpFlow | None, error: int, guest: bytes, guest_port: int) -> None:
        was_full = self._pending >= MAX_PENDING
        self._pending -= 1
        self._stack.forward_pending.leave()
        if error or flow is None:
            words = _WORDS.get(error, "the connection to {guest} port {port} failed")
            self._fail(words.format(guest=ip_address(guest), port=guest_port))
        else:
            flow.forward = self
            self._flows.add(flow)
        if was_full and not self._closed:
            self.on_room()

    def _fail(self, words: str) -> None:
        self._stack.counters.drop("forward_refused")
        self._done.refused += 1
        self._done.last_error = words

    def on_flow_closed(self, flow: TcpFlow) -> None:
        """One of its connections has ended."""
        self._flows.discard(flow)
        self._done.bytes_from_guest += flow.bytes_from_guest
        self._done.bytes_to_guest += flow.bytes_to_guest

    def traffic(self) -> Traffic:
        done = self._done
        return Traffic(
            open=len(self._flows),
            total=done.total,
            refused=done.refused,
            bytes_from_guest=done.bytes_from_guest + sum(flow.bytes_from_guest for flow in self._flows),
            bytes_to_guest=done.bytes_to_guest + sum(flow.bytes_to_guest for flow in self._flows),
            last_error=done.last_error,
        )

    def close(self, now: float) -> None:
        """No more connections come; those that are open, or are being opened, go on to their own end."""
        self._closed = True
        self._stack.forward_pending.forget(self)


_WORDS: Final = {
    errno.ECONNREFUSED: "{guest} refuses port {port}: nothing listens there",
    errno.EHOSTUNREACH: "nobody answers at {guest}",
    errno.ETIMEDOUT: "{guest} does not answer at port {port}",
    errno.ECONNABORTED: "the caller gave up before {guest} answered at port {port}",
    errno.ENOBUFS: "{guest} has all the connections that [limits] allow",
    errno.EADDRINUSE: "no port is left for another connection to {guest} port {port}",
}


def find_key(flows: FlowTable, guest: bytes, guest_port: int, peer: bytes, start: int) -> tuple[FlowKey, int] | None:
    """The key of a new flow from some port of `peer`, and the port; `start` spreads the search. None: none is free."""
    count = LAST_PORT - FIRST_PORT + 1
    for i in range(_TRIES):
        port = FIRST_PORT + (start + i) % count
        key = flow_key(guest, guest_port, peer, port)
        if key not in flows.tcp:
            return key, port
    return None
