"""Guests' connections to the proxy: taken from the stack, served by a task, and given back to it.

Theory of operation
-------------------
A connection comes as one end of a socket pair whose other end is the host's side of the guest's flow, as with every
TCP service. When the proxy has opened what a guest asked for, and all that is left to do is to carry bytes, it does
not carry them: `Guest.join()` gives the upstream's socket to the flow in place of the socket pair, and the task ends.
From there on the tunnel costs what a direct connection costs, resets and half-closed ends are those of the two TCPs,
and none of the proxy's bounds holds any more, because the flow's own do.

Where that cannot be (TLS to the proxy, a guest whose window is full at this moment), `relay()` copies.

Connections that are being served are bounded, in all and for each link.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Final, Protocol

import trio

from netstack.core.ports import Events, HostSocket, TcpServiceCall

# Each takes a task and three descriptors. Tunnels that are open do not count: their sockets are their flows'.
MAX_CONNECTIONS: Final = 1536
MAX_CONNECTIONS_OF_LINK: Final = 1024

# What is read at once of a body or a tunnel. A connection whose guest does not read holds two or three of these, all of
# one link's 200 MB at the most; 256 KiB made a large GET no faster (benchmarks, section proxy).
CHUNK: Final = 64 * 1024

# And of a head or a ClientHello, while it is not known what it will be.
HEAD_CHUNK: Final = 16 * 1024

# What is read from a guest that is not listened to any more, and for how long, so that our answer is not lost to a
# reset (RFC 9112 9.6).
_LINGER: Final = 2.0
_LINGER_BYTES: Final = 4 << 20

# How often a guest that has closed its half is looked at: whether it has closed the other one, too. Seconds.
_LOOK_INTERVAL: Final = 1.0
_HANG_UP: Final = select.POLLHUP | select.POLLERR if hasattr(select, "poll") else 0

# How long a guest may leave bytes to it unread before its tunnel is copied instead of joined. Seconds, and tries.
_JOIN_PAUSE: Final = 0.002
_JOIN_TRIES: Final = 5

_NOTSENT_LOWAT: Final[int | None] = getattr(socket, "TCP_NOTSENT_LOWAT", None)

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Joiner(Protocol):
    """The stack, as far as it is needed here."""

    def replace_socket(
        self, call: TcpServiceCall, old: HostSocket, new: HostSocket, early: bytes, now: float
    ) -> bool: ...

    def reset_service(self, call: TcpServiceCall, old: HostSocket, now: float) -> None: ...
    def end_round(self, now: float) -> None: ...


class Guest:
    """A guest's connection."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, call: TcpServiceCall, stack: Joiner) -> None:
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.call = call
        self.address = str(ip_address(call.guest))
        self._ours = ours
        self._theirs = theirs
        self._stack = stack

    async def join(self, upstream: Stream, early: bytes, counters: Counter[str]) -> None:
        """Carry bytes both ways to the end, or have the stack do it. `early`: what was read of the guest's.

        The upstream is closed, or the flow's, when this returns.
        """
        if isinstance(upstream, trio.SocketStream):
            sock = socket.socket(fileno=upstream.socket.detach())
            for attempt in range(_JOIN_TRIES):
                early = self._read_rest(early)
                if self._give(sock, early):
                    counters["proxy_joined"] += 1
                    return
                if attempt < _JOIN_TRIES - 1:
                    try:
                        await trio.sleep(_JOIN_PAUSE)
                    except BaseException:
                        sock.close()
                        raise
            upstream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        counters["proxy_relayed"] += 1
        if not await relay(self.stream, upstream, early):
            self.reset()  # what broke off must not look like an end

    def _read_rest(self, early: bytes) -> bytes:
        """What the guest has sent, to the last byte: `early` and what has come since."""
        waiting = [early] if early else []
        while True:
            try:
                piece = self._ours.recv(CHUNK)
            except OSError:
                break  # BlockingIOError: that was all
            if not piece:
                break
            waiting.append(piece)
        return b"".join(waiting)

    def _give(self, sock: socket.socket, early: bytes) -> bool:
        """Let the guest's flow have this socket. Nothing may be awaited since _read_rest()."""
        sock.setblocking(False)
        if _NOTSENT_LOWAT is not None and sock.family != socket.AF_UNIX:
            # trio sets it to 16 KiB, for the sake of latency; a flow wants to write as much as there is. 0: as before.
            sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, 0)
        now = time.monotonic()
        if not self._stack.replace_socket(self.call, self._theirs, sock, early, now):
            return False
        self._stack.end_round(now)
        return True

    def has_gone(self) -> bool:
        """Whether the guest's connection is at its end in both directions."""
        if not _HANG_UP:
            return False
        poll = select.poll()
        poll.register(self.stream.socket.fileno(), 0)
        return bool(poll.poll(0))

    async def wait_gone(self) -> None:
        """Return when the guest, which has closed its half, has closed the other one as well."""
        while not self.has_gone():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(_LOOK_INTERVAL)

    def reset(self) -> None:
        """Have the guest's connection reset: there is nothing that could be said in its protocol."""
        self._stack.reset_service(self.call, self._theirs, time.monotonic())

    async def linger(self) -> None:
        """The last answer is sent: close, and let the guest read it, whatever it is sending still."""
        try:
            await self.stream.send_eof()
            left = _LINGER_BYTES
            with trio.move_on_after(_LINGER):
                while left > 0 and (data := await self.stream.receive_some(CHUNK)):
                    left -= len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def relay(guest: trio.SocketStream, upstream: Stream, early: bytes) -> bool:
    """Copy both ways until both ends have closed, or one is broken: then False."""
    whole = True
    try:
        async with trio.open_nursery() as nursery:

            async def to_upstream() -> None:
                if early:
                    await upstream.send_all(early)
                await _copy(guest, upstream)

            nursery.start_soon(to_upstream)
            await _copy(upstream, guest)
            if isinstance(upstream, trio.SSLStream):
                nursery.cancel_scope.cancel()  # TLS has no half-closed connections (RFC 5246 7.2.1)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        whole = False
    finally:
        await trio.aclose_forcefully(upstream)
    return whole


async def _copy(source: Stream, target: Stream) -> None:
    while data := await source.receive_some(CHUNK):
        await target.send_all(data)
    if isinstance(target, trio.SocketStream):
        await target.send_eof()


Serve = Callable[[Guest], Awaitable[None]]


class Gate:
    """Counts the connections that are being served, by all ports of the proxy together."""

    def __init__(self) -> None:
        self.total = 0
        self._of_link: Counter[object] = Counter()

    def enter(self, link: object) -> bool:
        """Whether one more may come in."""
        if self.total >= MAX_CONNECTIONS or self._of_link[link] >= MAX_CONNECTIONS_OF_LINK:
            return False
        self.total += 1
        self._of_link[link] += 1
        return True

    def leave(self, link: object) -> None:
        self.total -= 1
        self._of_link[link] -= 1
        if not self._of_link[link]:
            del self._of_link[link]


class ProxyService:
    """A TCP service of the stack. `passes` says which peers are left alone, where this intercepts connections."""

    def __init__(
        self,
        nursery: trio.Nursery,
        stack: Joiner,
        gate: Gate,
        serve: Serve,
        events: Events,
        counters: Counter[str],
        passes: Callable[[bytes, int], bool] = lambda address, port: False,
    ) -> None:
        self._nursery = nursery
        self._stack = stack
        self._gate = gate
        self._serve = serve
        self._events = events
        self._counters = counters
        self._passes = passes

    def wants(self, address: bytes, port: int) -> bool:
        """Whether a connection to this peer is intercepted."""
        return not self._passes(address, port)

    def open(self, call: TcpServiceCall) -> HostSocket | None:
        """The flow's end; a task has the other one."""
        if not self._gate.enter(call.link):
            self._counters["proxy_too_many"] += 1
            self._events.warning("proxy_too_many", "too many connections to the proxy at once: refusing more")
            return None
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            self._gate.leave(call.link)
            self._counters["proxy_too_many"] += 1
            return None
        theirs.setblocking(False)
        self._nursery.start_soon(self._run, ours, theirs, call)
        return theirs

    async def _run(self, ours: socket.socket, theirs: socket.socket, call: TcpServiceCall) -> None:
        try:
            await self._serve(Guest(ours, theirs, call, self._stack))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the guest has gone
        except Exception as error:
            # One connection's bug must not end the network of all guests. No repr: a request may hold secrets.
            self._counters["proxy_internal_error"] += 1
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else ""
            self._events.warning(
                "proxy", "internal error: a connection to the proxy was lost", error=type(error).__name__, where=line
            )
        finally:
            ours.close()
            self._gate.leave(call.link)
