"""The host's side of one UDP forward: bound sockets, joined to `core.udp_forwards`."""

from __future__ import annotations

import errno
import os
import time

from netstack.core.forwards import FindGuest
from netstack.core.ports import Events, Poller
from netstack.core.stack import Stack
from netstack.core.udp_forwards import UdpForward


class UdpPorts:
    """Ports whose datagrams go to a guest's UDP ports. `Ports` of gateway.forward_ports."""

    def __init__(
        self, stack: Stack, poller: Poller, find_guest: FindGuest, events: Events | None, *, as_gateway: bool = False
    ) -> None:
        self._stack = stack
        self._events = events
        self.engine = UdpForward(stack.udp_forwards, find_guest, as_gateway=as_gateway)

    def open(self, host: str, host_port: int, guest_port: int) -> int:
        """Take a port of the host, of both families for "::"; which one it is. Raises OSError."""
        try:
            socks = self._stack.host.listen_udp(host, host_port)
        except OSError as error:
            # A guest's own datagrams leave by the port that they come from, where that is free (core.udp). A guest that
            # has spoken, as servers do, would so keep its own forward from being made.
            if error.errno != errno.EADDRINUSE or not self._stack.udp.give_way(host_port, time.monotonic()):
                raise
            socks = self._stack.host.listen_udp(host, host_port)
        for sock in socks:
            host_port = sock.port
            self.engine.add(sock, guest_port)
        return host_port

    def start(self) -> None:
        """Serve all that was opened. Raises OSError when the poller has no more room."""
        try:
            self.engine.start()
        except OSError as error:
            self._stack.counters.drop("forward_host_exhausted")
            if self._events is not None:
                words = os.strerror(error.errno or 0)
                self._events.warning("forward exhausted", "the host watches no more ports for forwards", error=words)
            raise

    def close(self, now: float) -> None:
        """Give the ports back; their callers' flows end."""
        self.engine.close(now)
