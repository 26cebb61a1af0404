"""Forwards to sockets that are bound to a guest's loopback: its agent makes the connections, from inside.

Theory of operation
-------------------
Nobody outside of a guest reaches its 127.0.0.1. So when a caller comes to such a forward, the gateway says to the agent

    relay TOKEN 127.0.0.1 8080

and the agent joins two connections: one to that socket, and one to the gateway's port 80, which begins with
"POST /agent/relay?TOKEN". That is the guest's connection, and the stack gives it the caller's socket for its host side
(`proxy.service.Guest.join`): an ordinary flow from there on. What the socket in the guest sees is a caller in its own
guest.

A token is good once, for the guest that it was said to, and for WAIT_SECONDS. Bounds: MAX_WAITING callers of one guest
that its agent has not come for.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from netstack.core.flows import flow_key

if TYPE_CHECKING:
    from netstack.core.ports import HostSocket, Link, TcpServiceCall
    from netstack.core.stack import Stack
    from netstack.core.tcp import TcpFlow

WAIT_SECONDS = 5.0
MAX_WAITING = 64

OnOpened = Callable[["TcpFlow | None", int], bool]


class _Caller(NamedTuple):
    """Somebody who waits for a guest's agent."""

    link: Link
    mac: bytes
    sock: HostSocket
    opened: OnOpened
    until: float


class GuestRelay:
    """The callers of all guests that wait."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._waiting: dict[str, _Caller] = {}

    def connect(
        self,
        link: Link,
        mac: bytes,
        say: Callable[[bytes], None] | None,
        address: str,
        port: int,
        sock: HostSocket,
        opened: OnOpened,
        now: float,
    ) -> None:
        """Have a guest's agent connect to this socket of its loopback. `say`: how to talk to it; None: it is gone."""
        many = sum(caller.link is link and caller.mac == mac for caller in self._waiting.values())
        if say is None or many >= MAX_WAITING:
            self._fail(sock, opened, errno.EHOSTUNREACH if say is None else errno.ENOBUFS)
            return
        token = secrets.token_hex(16)
        self._waiting[token] = _Caller(link, mac, sock, opened, now + WAIT_SECONDS)
        say(f"relay {token} {address} {port}\n".encode())

    def take(self, call: TcpServiceCall, received: bytes) -> HostSocket | None:
        """The caller's socket for a guest's connection that begins with these bytes; None: there is none. Untrusted."""
        line = received.partition(b" HTTP/")[0].decode("ascii", "replace")
        caller = self._waiting.get(line.rpartition("?")[2])
        neighbor = self._stack.neighbors.find(call.guest)
        if caller is None or caller.link is not call.link or neighbor is None or neighbor.mac != caller.mac:
            self._stack.counters.drop("agent_relay_unknown")
            return None
        del self._waiting[line.rpartition("?")[2]]
        flow = self._stack.flows.tcp.get(flow_key(call.guest, call.guest_port, call.address, call.port))
        if flow is None:
            self._fail(caller.sock, caller.opened, errno.EHOSTUNREACH)
            return None
        caller.opened(flow, 0)
        return caller.sock

    def sweep(self, now: float) -> None:
        """Give up those that nobody came for."""
        for token, caller in list(self._waiting.items()):
            if now > caller.until:
                del self._waiting[token]
                self._fail(caller.sock, caller.opened, errno.ETIMEDOUT)

    def close(self) -> None:
        """Give up all."""
        self.sweep(float("inf"))

    def _fail(self, sock: HostSocket, opened: OnOpened, error: int) -> None:
        if not opened(None, error):
            self._stack.host.reset(sock)
