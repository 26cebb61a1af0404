"""HTTP for guests (`control.guest_http`), wired into the stack: port 80 of the gateway's addresses.

Until somebody registers a path the port is not ours at all, and connections to it are flows to the host like others.
After that a connection is ours for as long as it takes to see whose it is: one that is for the host's own server is
given back to the stack with the socket of that server, and is such a flow from there on, as fast as any.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import TYPE_CHECKING

import trio

from netstack.control.guest_http import PORT, GuestHttp, Outcome
from netstack.core.ports import Events, HostSocket, TcpServiceCall
from netstack.proxy.service import Guest

if TYPE_CHECKING:
    from netstack.core.stack import Stack
    from netstack.gateway.guest_relay import GuestRelay

# A connect() on the host's loopback is answered at once, or its server's queue is full.
_CONNECT_SECONDS = 10.0

# Connections that are looked at or answered; those that were given back do not count.
_CONNECTIONS = 1024


class _Port80:
    """The TCP service of the stack."""

    def __init__(self, stack: Stack, nursery: trio.Nursery, events: Events) -> None:
        self.http: GuestHttp
        self.relay: GuestRelay | None = None
        self.counters: Counter[str] = Counter()
        self._stack = stack
        self._nursery = nursery
        self._events = events
        self._open = 0

    def open(self, call: TcpServiceCall) -> HostSocket | None:
        """The flow's end; a task has the other one."""
        if self._open >= _CONNECTIONS:
            return None
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            return None
        theirs.setblocking(False)
        self._open += 1
        self._nursery.start_soon(self._run, ours, theirs, call)
        return theirs

    async def _run(self, ours: socket.socket, theirs: socket.socket, call: TcpServiceCall) -> None:
        guest = Guest(ours, theirs, call, self._stack)
        try:
            outcome, received = await self.http.serve_stream(guest.stream, call)
            if outcome is Outcome.RAW:
                head, _, rest = received.partition(b"\r\n\r\n")
                sock = self.relay.take(call, head) if self.relay is not None else None
                if sock is None:
                    guest.reset()
                else:
                    assert isinstance(sock, socket.socket)
                    await guest.join(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), rest, self.counters)
            elif outcome is not Outcome.DONE:
                host = await self._dial(call)
                if host is not None:
                    await guest.join(host, received, self.counters)
                elif outcome is Outcome.HOSTS_HTTP:
                    await self.http.send_not_found(guest.stream)
                else:
                    guest.reset()  # as a closed port answers
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the guest has gone
        except Exception as error:
            # One connection's bug must not end the network of all guests.
            self._events.warning("guest_http", "internal error: a TCP connection was lost", error=repr(error))
        finally:
            ours.close()
            self._open -= 1

    async def _dial(self, call: TcpServiceCall) -> trio.SocketStream | None:
        """The host's own server at this port: where the connection would have gone without us."""
        target = self._stack.addresses.to_host(call.address)
        if target is None or self._stack.is_protected(call.port):
            return None
        host = ".".join(map(str, target)) if len(target) == 4 else "::1"
        sock = trio.socket.socket(
            trio.socket.AF_INET if len(target) == 4 else trio.socket.AF_INET6, trio.socket.SOCK_STREAM
        )
        try:
            with trio.fail_after(_CONNECT_SECONDS):
                await sock.connect((host, call.port))
        except (OSError, trio.TooSlowError):
            sock.close()
            return None
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)


class GuestWeb(GuestHttp):
    """The server, with a place for the relay of guests' agents."""

    service: _Port80

    def set_relay(self, relay: GuestRelay) -> None:
        """Have connections of Outcome.RAW go there."""
        self.service.relay = relay


def serve_guest_http(stack: Stack, nursery: trio.Nursery, events: Events) -> GuestWeb:
    """Make the server; paths are registered with what this returns."""
    service = _Port80(stack, nursery, events)

    def mac_of(address: bytes) -> bytes | None:
        neighbor = stack.neighbors.find(address)
        return neighbor.mac if neighbor is not None else None

    def begin() -> None:
        addresses = stack.addresses
        where = (addresses.gateway, addresses.gateway6, addresses.link_local)
        stack.register_tcp(PORT, service, addresses=where)

    http = service.http = GuestWeb(mac_of, stack.counters.drop, events, on_used=begin)
    http.service = service
    return http
