"""What every command that runs a network shares: the signals that end it, its end in time, its API.

SIGTERM and SIGINT ask for the end, which comes within DRAIN_SECONDS whatever the network is doing; a second one ends
it at once. SIGHUP asks to read the settings again.
"""

from __future__ import annotations

import gc
import signal
from typing import TYPE_CHECKING

import trio

from netstack.cli.faults import INPUT_ERRNOS, CommandError, InputError, say
from netstack.control.api import ApiError, ApiListener, listen_tcp, listen_unix, serve_api

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from netstack.config import Config
    from netstack.control.log import Log
    from netstack.gateway import Network

# The promise is two seconds; the rest is for the interpreter's own end.
DRAIN_SECONDS = 1.6

# Python's are 700, 10 and 10: so many new objects for a look at those, so many of these looks for one at older ones, so
# many of those for one at all.
_COLLECT = (10_000, 20, 50)


class Signals:
    """The signals that a running network obeys."""

    def __init__(self, on_reload: Callable[[], None]) -> None:
        self.stop = trio.Event()  # set once the end is wished for
        self._on_reload = on_reload

    async def watch(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        """Turn signals into the wish to end, and hold `scope` to the time promised once there is one."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._on_reload()
                elif self.stop.is_set():
                    scope.cancel()
                else:
                    self.stop.set()
                    scope.deadline = trio.current_time() + DRAIN_SECONDS


def listen_for_api(config: Config, network: Network, asked_for: Sequence[str]) -> list[ApiListener]:
    """Listen where the API is to be served. Raises CommandError.

    `asked_for` are the addresses that the user named. A second netstack finds the default one taken: that is worth a
    line, not a refusal.
    """
    listeners: list[ApiListener] = []
    try:
        for spec in config.api_listeners():
            try:
                listener = listen_unix(spec.path) if spec.path else listen_tcp(spec.host, spec.port)
            except ApiError as error:
                if spec.uri in asked_for:
                    raise
                say(f"netstack: {error}")
                continue
            listeners.append(listener)
            if listener.token is not None:
                network.protect_port(listener.port)
                place = config.token_place(listener.port)
                listener.store_token(place)
                say(f"netstack: the API at {listener.uri} wants the token {listener.token}, also in {place}")
    except BaseException as error:
        for listener in listeners:
            listener.close()
        if not isinstance(error, ApiError):
            raise
        kind = InputError if error.errno in INPUT_ERRNOS else CommandError
        raise kind(str(error)) from None
    return listeners


def calm_collector() -> None:
    """Have Python look for reference cycles seldom: a look at 10,000 connections takes 50 ms and more, and all wait.

    With 2,000 new ones a second that would be every other second. The datapath makes no cycles (tests/core/test_stack);
    what makes some is the API, logs and errors, a little each. For the process that is a network's own, not for
    programs that use the library.
    """
    gc.collect()
    gc.freeze()  # what a start leaves, 20,000 objects and more, stays anyway
    gc.set_threshold(*_COLLECT)


async def serve_in_background(network: Network, listeners: Sequence[ApiListener], log: Log) -> None:
    """After the network is ready: import what a start need not wait for, and serve the API until cancelled."""
    try:
        await trio.to_thread.run_sync(log.warm_up)
        calm_collector()
        if listeners:
            await serve_api(network.api, listeners, log=log)
    finally:
        for listener in listeners:
            listener.close()
