"""The talk with one guest's agent: the gateway says when to look, the agent says what there is.

Theory of operation
-------------------
The agent answers and never asks, so the pace is the gateway's: every INTERVAL seconds it says "scan", and the answer is
a list, or "=" for the same as before. A socket that begins to listen is seen within INTERVAL, and the time that the
guest takes to look. That the answer comes is the sign of life: without it for SILENCE_SECONDS the agent counts as gone
until it speaks again, because a guest may have been paused.

An agent can at worst answer nonsense, slowly, or without end: a list has a largest size, and what does not fit ends the
talk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from netstack.control.agent.reports import MAX_LINE, Hello, parse_hello, parse_report
from netstack.control.auto_publish import Listener

# Half of the 300 ms within which a port is to open; the other half is for a slow guest.
INTERVAL = 0.15
# With INTERVAL and the time to close sockets less than the 2 s that a forward may outlive its agent.
SILENCE_SECONDS = 1.5
# A guest that is paused for longer comes back with a new connection.
PATIENCE_SECONDS = 60.0
HELLO_SECONDS = 10.0
MAX_REPORT = 96 << 10
# An agent with long lists that change all the time is asked so seldom that they take a tenth of our time at most.
PAUSE = 10.0


class Stream(Protocol):
    """The connection: `control.guest_http.StreamingRequest`."""

    async def receive(self) -> bytes: ...
    async def send(self, data: bytes) -> None: ...


class TooMuchError(Exception):
    """The agent says more than an agent has to say."""


class _Lines:
    """Lines out of what arrives in pieces."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._received = bytearray()
        self._report: list[str] = []
        self._size = 0

    async def next(self) -> str:
        """One line, without its end. Raises EOFError, TooMuchError. Untrusted."""
        while True:
            end = self._received.find(b"\n")
            if end >= 0:
                line = self._received[:end].decode("ascii", "replace").rstrip("\r")
                del self._received[: end + 1]
                return line
            if len(self._received) > MAX_LINE:
                raise TooMuchError
            piece = await self._stream.receive()
            if not piece:
                raise EOFError
            self._received += piece

    async def report(self) -> list[str] | None:
        """The lines of a list; None: as before. Cancelled, it goes on where it was with the next call. Untrusted."""
        while True:
            line = await self.next()
            if line == "=" and not self._report:
                return None
            if line == ".":
                report, self._report, self._size = self._report, [], 0
                return report
            self._size += len(line) + 1
            if self._size > MAX_REPORT:
                raise TooMuchError
            self._report.append(line)


async def converse(
    stream: Stream,
    on_report: Callable[[list[Listener], Hello], None],
    on_sign: Callable[[bool], None],
) -> None:
    """Talk with an agent until it, or its guest, has gone. Untrusted.

    on_report(listeners, hello) for each list; on_sign(True) when the agent answered, on_sign(False) when it did not for
    SILENCE_SECONDS. Raises BrokenResourceError, EOFError, TooMuchError.
    """
    lines = _Lines(stream)
    greeting = None
    with trio.move_on_after(HELLO_SECONDS):
        greeting = await lines.next()
    if greeting is None:
        return
    hello = parse_hello(greeting)
    if hello is None:
        await stream.send(b"stop this gateway speaks version 1 of the agent's language; get its script again\n")
        return
    while True:
        next_at = trio.current_time() + INTERVAL
        await stream.send(b"scan\n")
        report: list[str] | None = None
        give_up_at = trio.current_time() + PATIENCE_SECONDS
        while True:
            with trio.move_on_after(SILENCE_SECONDS) as patience:
                report = await lines.report()
            if not patience.cancelled_caught:
                break
            on_sign(False)
            if trio.current_time() > give_up_at:
                return
        if report is not None:
            began = trio.current_time()
            on_report(parse_report(report, hello), hello)
            spent = trio.current_time() - began
            next_at = max(next_at, began + spent * PAUSE)
        on_sign(True)
        await trio.sleep_until(next_at)


def parse_posted(body: bytes) -> tuple[list[Listener], Hello] | None:
    """A whole report in one body, hello and list; None when it is none. Untrusted."""
    lines = body.decode("ascii", "replace").split("\n")
    hello = parse_hello(lines[0])
    if hello is None:
        return None
    return parse_report((line[:MAX_LINE] for line in lines[1:]), hello), hello
