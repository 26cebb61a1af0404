"""The composition root: builds one network from its settings. The only module that sees everything.

Theory of operation
-------------------
`open_network(config)` makes the stack, its services and the links, and runs them in a nursery of its own:

    poller   waits for the nested epoll of all links and host sockets, dispatches, ends rounds (`host.poller`)
    timers   sleeps until the stack's next deadline, runs what is due
    links    one task each: accept, reconnect (`vde.attachment`)
    dns      relays queries of guests (`dns.server`)
    leases   writes the leases to disk, soon after they changed
    api      serves the HTTP API, once asked for

The first two do all the work on frames; they never wait for anything else. When the block ends, what is in flight gets
a second to arrive, guests' connections are reset, and every socket and file is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from netstack.config import Config
from netstack.control.log import Events, Log
from netstack.gateway.network import Network

__all__ = ["Network", "open_network"]

# After this long, what is still in flight is lost: SIGTERM is to end the process within two seconds.
_DRAIN_SECONDS = 1.0


@asynccontextmanager
async def open_network(config: Config | None = None, *, log: Log | None = None) -> AsyncIterator[Network]:
    """Run a network for as long as the block: its links of `config`, and those that are attached later.

    Raises OSError when a link cannot be made or a file cannot be opened, `ConfigError` when settings do not fit this
    host (a subnet that is taken).
    """
    config = config or Config()
    log = log or Log(config.log.level, config.log.format)
    network = None
    try:
        async with trio.open_nursery() as nursery:
            network = Network(config, Events(log), log, nursery)
            try:
                await network.start()
                yield network
                with trio.move_on_after(_DRAIN_SECONDS):
                    await network.drain()
            finally:
                network.close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The nursery is ours and not the caller's: what its block raised comes out as it went in.
        error = _unwrap(group)
        if error is group:
            raise
        raise error from None
    finally:
        if network is not None:
            network.release()


def _unwrap(error: BaseException) -> BaseException:
    """The one exception in a group of one, of one, ...; else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
