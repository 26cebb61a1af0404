"""Ports of the host that open by themselves: what guests' agents report, made into forwards as `[auto_publish]` says.

Theory of operation
-------------------
A guest is a MAC on a link. Whoever speaks from there at port 80 of the gateway speaks for that guest, and for no other:
the forwards of a guest lead to addresses that the switch and the leases let this MAC use, and to none else.

A guest asks for ports in two ways. Its agent reports which sockets listen, and the rules (`control.auto_publish`) say
what becomes of each; or a program in it calls gvproxy's /services/forwarder/expose, under the same rules. Both give a
set of wanted publications, and `_settle` makes the forwards be that set: those that are wanted no more are closed, new
ones are opened, and what could not be opened is tried again now and then, since its port may get free.

Forwards end with their reason: a socket with the next report, all of an agent's when it is silent (`conversation`), and
all of a guest's when its link is gone. Static rules are forwards of the settings, with no guest's say in it.

Bounds: `max_ports` forwards for each guest, and GUESTS_OF_LINK guests on one link, since a guest can have any number of
MACs. So many openings a second for each, of which one that finds its port taken counts for many, because whoever has it
is looked for in all of /proc. Reports that are posted are taken no faster than those that we ask for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trio

from netstack.control.agent import write_script
from netstack.control.agent.conversation import (
    INTERVAL,
    PAUSE,
    SILENCE_SECONDS,
    TooMuchError,
    converse,
    parse_posted,
)
from netstack.control.agent.reports import Hello
from netstack.control.auto_publish import IpAddress, Listener, Publication, Rules, write_host
from netstack.control.guest_http import GuestRequest, GuestResponse, StreamingRequest
from netstack.control.log import RateLimiter
from netstack.core.forwards import ForwardError, OpenToGuest
from netstack.gateway.guest_forwarder import GuestForwarder
from netstack.gateway.guest_record import CONFLICT_COST, RETRY_SECONDS, RETRY_SECONDS_AT_MOST, Failure, Guest, Place
from netstack.gateway.guest_relay import GuestRelay, OnOpened
from netstack.gateway.settings import auto_publish_rules
from netstack.wire.ethernet import format_mac

if TYPE_CHECKING:
    from netstack.config.auto_publish import AutoPublishTable
    from netstack.control.log import Log
    from netstack.core.leases import LeaseTable
    from netstack.core.ports import HostSocket, Link
    from netstack.core.stack import Stack
    from netstack.gateway.forwards import Forward, Forwards
    from netstack.gateway.guest_web import GuestWeb

GUESTS_OF_LINK = 64

# How often silence and lost links are looked for. With SILENCE_SECONDS and the interval of the agent's reports it is
# less than the 2 s that a forward may outlive its agent.
_SWEEP = 0.25

# A guest that nobody has heard of for so long, and that has nothing, is forgotten.
_FORGET_SECONDS = 60.0

AGENT_PATH = "/agent"
STREAM_PATH = "/agent/stream"
PORTS_PATH = "/agent/ports"
RELAY_PATH = "/agent/relay"


class GuestAgents:
    """All guests that speak to us about their ports."""

    def __init__(
        self, http: GuestWeb, forwards: Forwards, stack: Stack, leases: LeaseTable, log: Log, nursery: trio.Nursery
    ) -> None:
        self._http = http
        self._forwards = forwards
        self._stack = stack
        self._leases = leases
        self._log = log
        self._nursery = nursery
        self._lines = RateLimiter(interval=5.0)
        self._guests: dict[tuple[Link, bytes], Guest] = {}
        self._static: dict[str, Forward | None] = {}
        self._names: Mapping[bytes, str] = {}
        self._table: AutoPublishTable | None = None
        self._forwarder = GuestForwarder(self)
        self._relay = GuestRelay(stack)
        http.set_relay(self._relay)
        self.rules = Rules()
        self.enabled = False

    # ---- settings --------------------------------------------------------------------------------------------------

    def apply(self, table: AutoPublishTable, names: Mapping[bytes, str]) -> None:
        """Take what the settings say. `names`: what they call the guests, by MAC."""
        if table == self._table and names == self._names:
            return
        self._table, self._names = table, names
        self.rules = auto_publish_rules(table)
        if table.enabled and not self.enabled:
            self._register()
        elif self.enabled and not table.enabled:
            for path in (AGENT_PATH, STREAM_PATH, PORTS_PATH, RELAY_PATH, *self._forwarder.paths):
                self._http.unregister(path)
        self.enabled = table.enabled
        self._settle_static()
        now = time.monotonic()
        for guest in list(self._guests.values()):
            guest.exposed = {key: found for key, found in guest.exposed.items() if self._still_allowed(guest, found)}
            if not self.enabled:
                guest.talk = None
                guest.listeners = []
            guest.failed.clear()
            self._settle(guest, now)

    def _register(self) -> None:
        self._http.register("GET", AGENT_PATH, self._send_script)
        self._http.register("POST", PORTS_PATH, self._take_posted)
        self._http.register_stream("POST", STREAM_PATH, self._talk)
        self._http.register_raw(RELAY_PATH)
        for method in ("GET", "POST", "PUT", "DELETE"):  # gvproxy's take any, and say "post only" themselves
            for path, handler in self._forwarder.paths.items():
                self._http.register(method, path, handler)

    def _settle_static(self) -> None:
        wanted = self.rules.static_specs() if self.enabled else []
        for spec in [spec for spec in self._static if spec not in wanted]:
            forward = self._static.pop(spec)
            if forward is not None:
                forward.close()
        for spec in wanted:
            if self._static.get(spec) is None:
                self._static[spec] = None
                try:
                    # Not "config", whose forwards are those of [[publish]].
                    self._static[spec] = self._forwards.add(spec, on_conflict=self._conflict, owner="auto_publish")
                except ForwardError as error:
                    self._log.warning("cannot publish as auto_publish says", spec=spec, error=str(error))

    @property
    def _conflict(self) -> str:
        return self._table.on_conflict if self._table is not None else "error"

    # ---- agents ----------------------------------------------------------------------------------------------------

    async def _send_script(self, request: GuestRequest) -> GuestResponse:
        return GuestResponse(content_type="text/x-shellscript; charset=utf-8", body=write_script(request.gateway))

    async def _talk(self, stream: StreamingRequest) -> GuestResponse | None:
        """One agent's connection, for as long as it lasts. Untrusted."""
        guest = self.find_guest(stream.request)
        if guest is None:
            return GuestResponse(503, body=b"too many guests, or this one is not known\n")
        talk = guest.talk = object()

        def say(words: bytes) -> None:
            self._nursery.start_soon(_send, stream, words)

        def check() -> None:
            if guest.talk is not talk:
                raise _ReplacedError

        def on_report(listeners: list[Listener], hello: Hello) -> None:
            check()
            guest.say = say if hello.relays else None
            self._take(guest, listeners, hello)

        def on_sign(alive: bool) -> None:
            check()
            self._on_sign(guest, alive)

        self._log.debug("agent has come", guest=self.name_of(guest))
        try:
            await converse(stream, on_report, on_sign)
        except TooMuchError:
            self._stack.counters.drop("agent_too_much")
        except _ReplacedError:
            if guest.link not in self._stack.switch.links:
                return None  # it came back over another link, and so it shall begin anew
            await stream.send(b"stop another agent of this guest has taken over, or auto_publish was turned off\n")
        finally:
            if guest.talk is talk:
                guest.talk = guest.say = None
                self._on_sign(guest, alive=False)
        return None

    async def _take_posted(self, request: GuestRequest) -> GuestResponse:
        """The report of an agent that has no better way than one request for each. Untrusted."""
        began = time.monotonic()
        guest = self.find_guest(request)
        if guest is not None and began < guest.posts_at:
            return GuestResponse(429, body=b"too many reports\n")
        report = parse_posted(request.body)
        if report is None or guest is None:
            return GuestResponse(400 if report is None else 503, body=b"not a report of ours\n")
        guest.talk = guest.say = None
        self._take(guest, *report)
        self._on_sign(guest, alive=True)
        ended = time.monotonic()
        guest.posts_at = max(began + INTERVAL / 2, ended + (ended - began) * PAUSE)
        return GuestResponse(204)

    def _take(self, guest: Guest, listeners: list[Listener], hello: Hello) -> None:
        guest.listeners, guest.hello = listeners, hello
        guest.is_silent = False
        guest.heard_at = time.monotonic()
        self._settle(guest, guest.heard_at)

    def _on_sign(self, guest: Guest, alive: bool) -> None:
        now = time.monotonic()
        if alive:
            guest.heard_at = now
        if guest.is_silent is alive:
            guest.is_silent = not alive
            self._settle(guest, now)

    # ---- forwards --------------------------------------------------------------------------------------------------

    def find_guest(self, request: GuestRequest) -> Guest | None:
        """Who asks; None when nobody knows, or there are too many. Untrusted."""
        if request.mac is None:
            return None
        key = request.link, request.mac
        guest = self._guests.get(key)
        if guest is None:
            if sum(link is request.link for link, _ in self._guests) >= GUESTS_OF_LINK:
                self._stack.counters.drop("agent_too_many_guests")
                return None
            guest = self._guests[key] = Guest(request.link, request.mac, request.guest)
        guest.address = request.guest
        guest.heard_at = time.monotonic()
        return guest

    def name_of(self, guest: Guest) -> str:
        """The guest's name, for people."""
        name = self._names.get(guest.mac)
        if not name:
            lease = self._leases.find_mac(guest.mac)
            name = lease.name if lease is not None else ""
        return name or str(ipaddress.ip_address(guest.address))

    def decide(self, guest: Guest, listener: Listener) -> Publication | str:
        """What the rules, and what can be reached, say of one socket of this guest."""
        # Rules go by the names of the settings: a guest may give itself any other name.
        found = self.rules.decide(listener, self._names.get(guest.mac, ""), guest.hello.ephemeral)
        if isinstance(found, str):
            return found
        if not found.reachable:
            if found.protocol == "udp":
                return "a UDP socket bound to the guest's loopback, where nobody outside of it can reach it"
            return (
                found if guest.say else "bound to the guest's loopback, and its agent has no nc or bash to relay with"
            )
        if self._target(guest, found) is None:
            return f"{found.guest} is not an address of this guest on this network"
        return found

    def is_full(self, guest: Guest) -> bool:
        """Whether it has all the ports that it may have."""
        return self._table is None or len(guest.forwards) >= self._table.max_ports

    def settle(self, guest: Guest) -> None:
        """Make the forwards of a guest be what it wants."""
        self._settle(guest, time.monotonic())

    def _still_allowed(self, guest: Guest, found: Publication) -> bool:
        if not self.enabled:
            return False
        return self.decide(guest, Listener(found.protocol, found.guest, found.guest_port)) == found

    def _wanted(self, guest: Guest) -> dict[Place, Publication]:
        wanted: dict[Place, Publication] = {found.place: found for found in guest.exposed.values()}
        guest.refused = {}
        if guest.is_silent:
            return wanted
        good: list[Listener] = []
        for listener in guest.listeners:
            found = self.decide(guest, listener)
            if isinstance(found, str):
                guest.refused[listener] = found
            else:
                good.append(listener)
        name = self._names.get(guest.mac, "")
        for found in self.rules.publish(good, name, guest.hello.ephemeral):
            wanted.setdefault(found.place, found)
        limit = self._table.max_ports if self._table is not None else 0
        if len(wanted) > limit:
            self._stack.counters.drop("agent_too_many_ports")
            self._warn(guest, "ports", "a guest listens at more ports than auto_publish.max_ports", max_ports=limit)
            # What is open stays.
            order = sorted(wanted, key=lambda place: (place not in guest.forwards, place[0], place[2]))
            wanted = {place: wanted[place] for place in order[:limit]}
        return wanted

    def _settle(self, guest: Guest, now: float) -> None:
        wanted = self._wanted(guest) if self.enabled else {}
        for place, (publication, forward) in list(guest.forwards.items()):
            if wanted.get(place) != publication:
                del guest.forwards[place]
                forward.close()
        guest.failed = {
            place: failure for place, failure in guest.failed.items() if wanted.get(place) == failure.publication
        }
        for place, publication in wanted.items():
            if place in guest.forwards or (place in guest.failed and now < guest.failed[place].retry_at):
                continue
            if guest.may_open(now):
                self._open(guest, place, publication, now)
            else:
                guest.failed[place] = Failure(publication, "the guest's ports change too often", now + RETRY_SECONDS)

    def _open(self, guest: Guest, place: Place, publication: Publication, now: float) -> None:
        target = self._target(guest, publication)
        if target is None:
            return
        spec = (
            f"{write_host(publication.host)}:{publication.host_port}:"
            f"{write_host(target)}:{publication.guest_port}/{publication.protocol}"
        )
        name = self.name_of(guest)
        try:
            forward = self._forwards.add(
                spec,
                on_conflict=self._conflict,
                owner=f"agent:{name}",
                description="listens in the guest" if publication.reachable else "listens on the guest's loopback",
                through=None if publication.reachable else self._through(guest, publication),
            )
        except ForwardError as error:
            before = guest.failed.get(place)
            if before is None:
                self._warn(guest, str(place), "cannot publish a guest's port", spec=spec, error=str(error))
            delay = RETRY_SECONDS_AT_MOST
            if error.kind == "conflict":
                guest.openings -= CONFLICT_COST
                delay = RETRY_SECONDS if before is None else min(before.delay * 2, delay)
            guest.failed[place] = Failure(publication, str(error), now + delay, delay)
            return
        guest.failed.pop(place, None)
        guest.forwards[place] = publication, forward

    def _through(self, guest: Guest, publication: Publication) -> OpenToGuest:
        """How connections of callers get to a socket of the guest's loopback."""

        def open_to_guest(
            sock: HostSocket, address: bytes, port: int, peer: bytes, peer_port: int, opened: OnOpened, now: float
        ) -> None:
            where = str(publication.guest)
            self._relay.connect(guest.link, guest.mac, guest.say, where, port, sock, opened, now)

        return open_to_guest

    def _target(self, guest: Guest, publication: Publication) -> IpAddress | None:
        """The guest's address that a forward leads to; None when that socket is not this guest's to give away."""
        bound = publication.guest
        if bound.is_loopback:
            return ipaddress.ip_address(guest.address)  # for the eye: its agent makes the connection
        if not bound.is_unspecified:
            return bound if self._is_its_own(guest, bound.packed) else None
        spoken = ipaddress.ip_address(guest.address)
        lease = self._leases.find_mac(guest.mac)
        addresses = [guest.address, *((lease.address, lease.address6) if lease is not None else ())]
        if spoken.version == 6 or bound.version == 6:
            # Most sockets at :: answer to IPv4 too, and a socket at 0.0.0.0 to nothing else.
            for address in addresses:
                if address is not None and len(address) == 4 and self._is_its_own(guest, address):
                    return ipaddress.ip_address(address)
            return spoken if bound.version == 6 else None
        return spoken

    def _is_its_own(self, guest: Guest, address: bytes) -> bool:
        neighbor = self._stack.neighbors.find(address)
        return neighbor is not None and neighbor.mac == guest.mac and neighbor.link is guest.link

    # ---- time ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Notice silence and lost links, and try again what failed."""
        while True:
            await trio.sleep(_SWEEP)
            self._relay.sweep(time.monotonic())
            if self._guests:
                self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """One look at all guests."""
        links = self._stack.switch.links
        for key, guest in list(self._guests.items()):
            if guest.link not in links:
                guest.exposed.clear()
                guest.is_silent = True
                guest.talk = guest.say = None
            elif not guest.is_silent and now - guest.heard_at > SILENCE_SECONDS:
                guest.is_silent = True
            elif not any(now >= failure.retry_at for failure in guest.failed.values()) and not (
                guest.is_silent and guest.forwards
            ):
                if now - guest.heard_at > _FORGET_SECONDS and not (guest.talk or guest.exposed or guest.forwards):
                    del self._guests[key]
                continue
            self._settle(guest, now)
            if guest.link not in links:
                del self._guests[key]

    def close(self) -> None:
        """The network ends, and so do its forwards, by their owner."""
        self._relay.close()
        self._guests.clear()

    # ---- what is to be seen ----------------------------------------------------------------------------------------

    def describe(self) -> list[dict[str, Any]]:
        """All guests that have an agent, or have asked, as plain data."""
        now = time.monotonic()
        return [guest.describe(self.name_of(guest), now) for guest in self._guests.values()]

    def _warn(self, guest: Guest, key: str, message: str, **fields: object) -> None:
        if self._lines.admit(f"{format_mac(guest.mac)} warn {key}", time.monotonic()) is not None:
            self._log.warning(message, guest=self.name_of(guest), **fields)


async def _send(stream: StreamingRequest, words: bytes) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send(words)


class _ReplacedError(Exception):
    """Another talk with this guest counts now."""
