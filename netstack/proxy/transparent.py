"""Connections of guests that know of no proxy, taken on their way to the world.

Theory of operation
-------------------
A guest connects to an address; a proxy wants a name, and decides by it. So the connection is accepted first, and the
guest's first bytes are looked at:

    HTTP                    each request goes the way that holds for its Host (`session`); direct: see below
    TLS                     the name in the ClientHello, or the one by which our DNS gave the guest this address, or the
                            address itself: CONNECT to that
    anything else           as it is, to the address; by CONNECT to it only where that fails
    nothing, for a while    the peer speaks first, perhaps: connect to the address, and see who says something

"Direct" is a connection to the address that the guest chose, never to another one of the same name. A refusal of the
proxy reaches a guest that speaks HTTP as a page and any other as a reset: a page in the middle of TLS would only be
read as "wrong version number".

The host's proxy may itself run in a guest, and its connections to the world would come here, go to it, come here again.
Such a one is known by what it carries: a request by our Via, TLS by the random number in its ClientHello (32 bytes, RFC
8446 4.1.2), which no two connections share. It goes direct.

The guest's SYN is answered before the peer has answered ours: that is the price, and why a flow is only taken here
while the host has a proxy for its port.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import trio

from netstack.proxy.client_hello import MAX_HELLO, MoreNeeded, looks_like_tls, parse_server_name
from netstack.proxy.errors import RouteError
from netstack.proxy.heads import Place
from netstack.proxy.records import Record, Records
from netstack.proxy.routes import DIRECT, Routes
from netstack.proxy.service import HEAD_CHUNK, Guest
from netstack.proxy.session import Session
from netstack.proxy.settings import ProxyServer
from netstack.proxy.upstream import Connector, Dial, Upstream

# Seconds. A guest that speaks first does so at once; where the machine is busy it may take long, and nothing is lost
# then: whoever speaks first decides, see _wait_both.
SILENCE: Final = 0.3
# For the rest of a head or ClientHello; and for a guest to say anything at all where its peer cannot be reached.
HELLO_TIMEOUT: Final = 10.0
SILENCE_TIMEOUT: Final = 60.0

# A circle closes within milliseconds.
_MAX_HELLOS: Final = 1024
_RANDOM: Final = slice(11, 43)  # behind the heads of record and handshake and the version

# A request line has its version at the end; a method and a blank are enough to tell HTTP from what is not.
_LONGEST_METHOD: Final = 32
_METHOD: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")

NameOf = Callable[[bytes, bytes], str | None]
"""The name by which a guest (its address) got this address from our DNS, both packed."""

HTTP, TLS, OTHER, UNSURE = "http", "tls", "tcp", "unsure"


def classify(data: bytes | bytearray) -> str:
    """What these first bytes of a connection begin. Untrusted."""
    if not data:
        return UNSURE
    if data[0] == 0x16:
        if not looks_like_tls(data):
            return OTHER
        return TLS if len(data) >= 6 else UNSURE
    method, blank, rest = bytes(data[: _LONGEST_METHOD + 2]).partition(b" ")
    if not all(letter in _METHOD for letter in method) or not method or len(method) > _LONGEST_METHOD:
        return OTHER
    if not blank or not rest:
        return UNSURE
    if rest[:1] not in b"/*[" and not rest[:1].isalnum():
        return OTHER
    line, end, _ = bytes(data[:8192]).partition(b"\n")
    if not end:
        return UNSURE if len(data) < 8192 else OTHER
    return HTTP if line.rstrip(b"\r").endswith((b" HTTP/1.1", b" HTTP/1.0")) else OTHER


class Hellos:
    """The ClientHellos that went to a proxy lately."""

    def __init__(self) -> None:
        self._randoms: OrderedDict[bytes, None] = OrderedDict()

    def is_new(self, hello: bytes | bytearray) -> bool:
        """Note one; False if it has been here already. Untrusted."""
        random = bytes(hello[_RANDOM])
        if len(random) < _RANDOM.stop - _RANDOM.start:
            return True  # cut off: it says nothing
        if random in self._randoms:
            return False
        self._randoms[random] = None
        if len(self._randoms) > _MAX_HELLOS:
            self._randoms.popitem(last=False)
        return True


class Interception:
    """One connection to `address` (packed) and `port`."""

    def __init__(
        self,
        guest: Guest,
        connector: Connector,
        records: Records,
        dial_address: Dial,
        name_of: NameOf,
        hellos: Hellos,
        host: str,
    ) -> None:
        """`host`: the address as text, as `dial_address` takes it."""
        self._hellos = hellos
        self._guest = guest
        self._connector = connector
        self._records = records
        self._dial = dial_address
        self._place = Place(host, guest.call.port)
        self._name = name_of(guest.call.guest, guest.call.address)
        self._received = bytearray()
        self._start = time.monotonic()

    async def run(self) -> None:
        """Serve the connection to its end. Untrusted."""
        kind = await self._look(SILENCE)
        if kind is None:
            await self._wait_both()
        elif kind == HTTP:
            await self._serve_http()
        elif kind == TLS:
            await self._serve_tls()
        else:
            await self._pass()

    # ---- the first bytes -------------------------------------------------------------------------------------------

    async def _look(self, patience: float) -> str | None:
        """What the guest speaks; None when it has said nothing."""
        deadline = trio.current_time() + patience
        while True:
            kind = classify(self._received)
            if kind != UNSURE:
                return kind
            data = b""
            with trio.move_on_at(deadline) as scope:
                data = bytes(await self._guest.stream.receive_some(HEAD_CHUNK))
            if not data:
                return None if scope.cancelled_caught and not self._received else OTHER
            if not self._received:
                deadline = trio.current_time() + HELLO_TIMEOUT
            self._received += data

    async def _wait_both(self) -> None:
        """Connect to where the guest wanted to go, and go on with what the first to speak says."""
        upstream: trio.SocketStream | None = None
        with contextlib.suppress(RouteError):  # where only the proxy gets out
            upstream = await self._dial(*self._place)
        try:
            spoken = trio.Event()
            with trio.move_on_after(SILENCE_TIMEOUT):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_guest, spoken)
                    if upstream is not None:
                        nursery.start_soon(self._wait_upstream, upstream, spoken)
                    await spoken.wait()
                    nursery.cancel_scope.cancel()
            kind = await self._look(HELLO_TIMEOUT) if self._received else OTHER
            if kind == OTHER and upstream is not None:
                self._note(self._place, "direct", 0)
                stream, upstream = upstream, None
                await self._guest.join(stream, bytes(self._received), self._records.counters)
                return
        finally:
            if upstream is not None:
                await trio.aclose_forcefully(upstream)
        if kind == HTTP:
            await self._serve_http()
        elif kind == TLS:
            await self._serve_tls()
        elif self._received:
            await self._pass()
        else:
            self._note(self._place, "", 0, "the guest said nothing, and its peer cannot be reached")
            self._guest.reset()

    async def _wait_guest(self, spoken: trio.Event) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # it has gone, without a word
            self._received += await self._guest.stream.receive_some(HEAD_CHUNK)
        spoken.set()

    async def _wait_upstream(self, upstream: trio.SocketStream, spoken: trio.Event) -> None:
        await trio.lowlevel.wait_readable(upstream.socket)
        spoken.set()

    # ---- what is done with it --------------------------------------------------------------------------------------

    async def _serve_http(self) -> None:
        session = Session(
            self._guest,
            self._connector,
            self._records,
            default=self._place,
            direct=self._dial_as_asked,
            received=bytes(self._received),
        )
        await session.run()

    async def _dial_as_asked(self, host: str, port: int) -> trio.SocketStream:
        """Direct, whatever the name: where the guest itself connected to."""
        del host, port
        return await self._dial(*self._place)

    async def _serve_tls(self) -> None:
        name = await self._read_name() or self._name
        place = Place(name, self._place.port) if name else self._place
        routes = await self._choose(place)
        if any(isinstance(route, ProxyServer) and route.host == place.host for route in routes):
            routes = (DIRECT,)  # the guest speaks to that proxy itself
        elif routes[0] is not DIRECT and not self._hellos.is_new(self._received):
            self._records.counters["proxy_loop"] += 1
            routes = (DIRECT,)
        await self._tunnel(routes, place, "transparent tls")

    async def _read_name(self) -> str | None:
        with trio.move_on_after(HELLO_TIMEOUT):
            while True:
                try:
                    return parse_server_name(self._received)
                except ValueError:
                    self._records.counters["proxy_bad_hello"] += 1
                    return None
                except MoreNeeded:
                    if len(self._received) > 2 * MAX_HELLO:
                        return None
                data = await self._guest.stream.receive_some(HEAD_CHUNK)
                if not data:
                    return None
                self._received += data
        self._records.counters["proxy_slow_hello"] += 1
        return None

    async def _choose(self, place: Place) -> Routes:
        return await self._connector.choose("https", place.host, place.port, f"https://{place.authority}/")

    async def _pass(self) -> None:
        """Neither HTTP nor TLS: as it is."""
        place = Place(self._name, self._place.port) if self._name else self._place
        routes = await self._choose(place)
        await self._tunnel((DIRECT, *(route for route in routes if route is not DIRECT)), place, "transparent tcp")

    async def _tunnel(self, routes: Routes, place: Place, kind: str) -> None:
        try:
            upstream: Upstream = await self._connector.open_tunnel(routes, place, [], direct=self._dial_as_asked)
        except RouteError as error:
            self._note(place, "", error.status, error.words, kind)
            self._guest.reset()
            return
        self._note(place, str(upstream.route), 0, kind=kind)
        first = upstream.connection.trailing_data[0]
        if first:
            try:
                await self._guest.stream.send_all(first)
            except BaseException:
                await upstream.close()
                raise
        await self._guest.join(upstream.stream, bytes(self._received), self._records.counters)

    def _note(self, place: Place, route: str, status: int, error: str = "", kind: str = "transparent tcp") -> None:
        seconds = time.monotonic() - self._start
        self._records.add(Record(self._guest.address, kind, "", place.host, place.port, route, status, seconds, error))
