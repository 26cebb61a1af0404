"""Reading from the system's D-Bus, by jeepney under trio: properties of one service, again after each of its signals.

The loop of `follow`: connect, subscribe to the service's PropertiesChanged and to its coming and going, then read
everything at once, and again on a signal, and at the latest after an interval, because some changes come without a
signal. Nothing here starts a service (NO_AUTO_START), writes to one, or needs a right that an ordinary user has not.

A bus that is not there, that ends, or a service that says no are states like others: the reader is told `gone`, and the
next round tries again. jeepney is imported once there is a bus to talk to, so a host without pays nothing.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from jeepney.io.trio import DBusRouter

SOCKET = Path("/run/dbus/system_bus_socket")

# Domains of a link, and whether it is a default route, change without a signal: with DEBOUNCE of the follower and the
# read itself this stays under 2 s.
POLL_INTERVAL = 1.25

# Seconds: a service that takes longer is asked again in the next round.
_PATIENCE = 2.0

# Signals come in a row; the last of them is what counts.
_SETTLE = 0.05

_PROPERTIES = "org.freedesktop.DBus.Properties"


class Service:
    """One service on the bus, while a connection lasts."""

    def __init__(self, router: DBusRouter, name: str) -> None:
        self._router = router
        self._name = name

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        """All properties of an interface, out of their variants. Raises LookupError when the service says no."""
        from jeepney import DBusAddress, MessageFlag, MessageType, new_method_call

        call = new_method_call(DBusAddress(path, self._name, _PROPERTIES), "GetAll", "s", (interface,))
        call.header.flags |= MessageFlag.no_auto_start
        with trio.fail_after(_PATIENCE):
            reply = await self._router.send_and_get_reply(call)
        if reply.header.message_type is not MessageType.method_return:
            raise LookupError(f"{self._name}: {reply.body[0] if reply.body else 'no answer'}")
        return {name: value for name, (_, value) in reply.body[0].items()}


Found = TypeVar("Found")


class BusSource(ABC, Generic[Found]):
    """A service that says whom the host asks. Until it was read once, and where it is not there, `found` is None.

    When the service goes away, what it said last stays: a restart takes a second, and the connections of the host are
    as they were.
    """

    def __init__(self, name: str, bus_name: str) -> None:
        self.name = name
        self.found: Found | None = None
        self.problem = "not read yet"
        self._bus_name = bus_name

    @abstractmethod
    async def read(self, service: Service) -> Found:
        """Read everything. Raises LookupError when the service says no."""

    async def run(self, changed: Callable[[], None]) -> None:
        """Follow it until cancelled; `changed` is called after each change, of what keeps it from being read, too."""

        async def read(service: Service) -> None:
            found = await self.read(service)
            self.problem = ""
            if found != self.found:
                self.found = found
                changed()

        def gone(reason: str) -> None:
            if self.problem != reason:
                self.problem = reason
                changed()

        await follow(self._bus_name, read, gone)


async def follow(name: str, read: Callable[[Service], Awaitable[None]], gone: Callable[[str], None]) -> None:
    """Have `read` called now, on each signal of the service, and every POLL_INTERVAL; `gone` with the reason if not."""
    while True:
        if not _has_bus():
            gone("there is no D-Bus")
        else:
            try:
                await _follow_connection(name, read, gone)
            except* Exception as group:
                # The bus ended, refused us, or spoke in tongues. jeepney has a dozen ways to say so, some in groups.
                gone(_reason(group))
        await trio.sleep(POLL_INTERVAL)


def _has_bus() -> bool:
    return "DBUS_SYSTEM_BUS_ADDRESS" in os.environ or SOCKET.exists()


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


async def _follow_connection(
    name: str, read: Callable[[Service], Awaitable[None]], gone: Callable[[str], None]
) -> None:
    from jeepney import MatchRule, message_bus
    from jeepney.io.trio import open_dbus_router

    async with open_dbus_router("SYSTEM") as router:
        owner = MatchRule(
            type="signal", sender="org.freedesktop.DBus", interface="org.freedesktop.DBus", member="NameOwnerChanged"
        )
        owner.add_arg_condition(0, name)
        # Which of the service's objects it comes from does not matter: all is read again.
        changes = MatchRule(type="signal", sender=name, interface=_PROPERTIES, member="PropertiesChanged")
        # What arrives has the sender's unique name, so all that the bus lets through is taken. One waiting is enough.
        async with router.filter(MatchRule(type="signal"), bufsize=1) as receiver:
            for rule in (owner, changes):
                with trio.fail_after(_PATIENCE):
                    await router.send_and_get_reply(message_bus.AddMatch(rule))
            service = Service(router, name)
            while True:
                try:
                    await read(service)
                except LookupError as error:
                    gone(str(error))
                with trio.move_on_after(POLL_INTERVAL):
                    await receiver.receive()
                    await trio.sleep(_SETTLE)
