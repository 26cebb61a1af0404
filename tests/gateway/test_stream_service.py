"""TCP services of the gateway: what goes wrong with one connection."""

from __future__ import annotations

import socket
from typing import Any

import trio
import trio.testing

from netstack.gateway.names import StreamService
from tests.dns.relay import Events


async def test_a_bug_in_a_service_ends_its_connection_and_nothing_else(nursery: trio.Nursery) -> None:
    async def serve(stream: trio.abc.Stream, call: Any) -> None:
        assert await stream.receive_some() == b"x"
        raise OverflowError("a bug")

    events = Events()
    service = StreamService(nursery, serve, events)
    call: Any = None
    for count in (1, 2):
        theirs = service.open(call)
        assert isinstance(theirs, socket.socket)
        with theirs:
            theirs.send(b"x")
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(theirs)
            await trio.testing.wait_all_tasks_blocked()
            assert theirs.recv(1) == b""
        assert len(events.warnings) == count
        assert "OverflowError" in events.warnings[0]
