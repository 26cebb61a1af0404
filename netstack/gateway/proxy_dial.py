"""Where the gateway's proxy connects to: names by our DNS, addresses by the rules that hold for guests.

Theory of operation
-------------------
What a guest asks the proxy for, it must not get if it could not have it without the proxy. Each address that a name
has goes through `Addresses.to_host`, as a SYN's does: so the proxy leads to the host's loopback only where the
gateway's own address does, never to a port that is protected, and never by another spelling: 127.1, ::ffff:127.0.0.1,
0.0.0.0, or a name that resolves to any of these. Other guests are not reached through the proxy: they are next door,
and a proxy on the host has no way there.

The host's proxies are the host's own affair: `dial_proxy` reaches loopback and any port.

Addresses are tried in the order in which they come, the families in turn, each with a head start of 250 ms before the
next one (RFC 8305 5), and the first that answers is taken.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

import trio

from netstack.core.addresses import LOOPBACK4, LOOPBACK6
from netstack.dns.message import CLASS_IN, NXDOMAIN, TYPE_A, TYPE_AAAA, parse_question, rcode_of
from netstack.dns.records import read_answers
from netstack.proxy.errors import RouteError, route_error
from netstack.proxy.settings import parse_address

if TYPE_CHECKING:
    from netstack.core.stack import Stack
    from netstack.dns.resolver import Resolver

# RFC 8305 8: connection attempt delay. Seconds.
_HEAD_START: Final = 0.25
# Linux gives up after 127 s (tcp_syn_retries), most programs before that.
_DIAL_TIMEOUT: Final = 60.0
_MAX_ADDRESSES: Final = 16

_HEADER = struct.Struct("!HHHHHH")
_RD: Final = 0x0100

Address = IPv4Address | IPv6Address


class ProxyDialler:
    """Connects for the proxy."""

    def __init__(self, stack: Stack, resolver: Resolver) -> None:
        self._stack = stack
        self._resolver = resolver

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        """What a guest asked for. Untrusted. Raises RouteError."""
        allowed: list[bytes] = []
        for address in await self._find(host):
            target = self._for_guest(address, port)
            if target is not None:
                allowed.append(target)
        if not allowed:
            self._stack.counters.drop("proxy_denied")
            raise RouteError(403, "destination_ip_prohibited", f"guests may not reach {host} port {port} by the proxy")
        return await _connect(allowed, host, port)

    async def dial_proxy(self, host: str, port: int) -> trio.SocketStream:
        """A proxy that the host's settings name. Raises RouteError."""
        addresses = [self._for_host(address) for address in await self._find(host, search=True)]
        return await _connect(addresses, host, port)

    async def dial_address(self, host: str, port: int) -> trio.SocketStream:
        """An address that a guest's own SYN named, and that was let through. Raises RouteError."""
        target = self._stack.addresses.to_host(ip_address(host).packed)
        if target is None:
            raise RouteError(403, "destination_ip_prohibited", f"guests may not reach {host}")
        return await _connect([target], host, port)

    async def resolve(self, host: str) -> Sequence[str]:
        """The addresses of a name, for a proxy that takes no names. Raises RouteError."""
        return [str(address) for address in await self._find(host)]

    # ---- which addresses -------------------------------------------------------------------------------------------

    def _for_guest(self, address: Address, port: int) -> bytes | None:
        """Where the host's socket connects to; None where a guest may not."""
        addresses = self._stack.addresses
        packed = address.packed
        if address.is_loopback or address.is_unspecified:
            # As in HTTP clients on the host: what the proxy calls the loopback is the host's.
            packed = addresses.gateway if address.version == 4 else addresses.gateway6
        if packed in addresses.own:
            if packed in (addresses.dns, addresses.dns6) or self._stack.is_protected(port):
                return None
            if address.version == 6 and packed != addresses.gateway6:
                return None
        return addresses.to_host(packed)

    def _for_host(self, address: Address) -> bytes:
        """The host's view: our DNS tells guests of the gateway where the host's own files say loopback."""
        addresses = self._stack.addresses
        if address.packed == addresses.gateway or (address.version == 4 and address.is_unspecified):
            return LOOPBACK4
        if address.packed == addresses.gateway6 or address.is_unspecified:
            return LOOPBACK6
        return address.packed

    async def _find(self, host: str, *, search: bool = False) -> list[Address]:
        """The addresses of a host part. `search`: a name without a dot is looked for in the host's search domains."""
        literal = parse_address(host)
        if literal is not None:
            return [literal]
        names = [host]
        if host == "localhost" or host.endswith(".localhost"):
            return [IPv4Address("127.0.0.1"), IPv6Address("::1")]
        if search and "." not in host:
            names += [f"{host}.{domain.strip('.')}" for domain in self._resolver.table.search]
        failure = "has no address"
        for name in names:
            six: list[Address] = []
            four: list[Address] = []
            words: list[str] = []

            async def ask(kind: int, found: list[Address], name: str = name, words: list[str] = words) -> None:
                answer = await self._ask(name, kind)
                if isinstance(answer, str):
                    words.append(answer)
                else:
                    found += answer

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, TYPE_AAAA, six)
                nursery.start_soon(ask, TYPE_A, four)
            both = [each for pair in zip_longest(four, six) for each in pair if each is not None]
            if both:
                return both[:_MAX_ADDRESSES]
            failure = words[0] if words else "has no address"
        raise RouteError(502, "dns_error", f"{host} {failure}")

    async def _ask(self, name: str, kind: int) -> list[Address] | str:
        """The addresses of one family, or why there are none."""
        wire = _write_query(name, kind)
        if wire is None:
            return "is no name"
        answer = await self._resolver.ask(wire, guest="proxy")
        rcode = rcode_of(answer)
        if rcode:
            return "does not exist" if rcode == NXDOMAIN else "cannot be resolved: the nameservers do not answer"
        question = parse_question(answer)
        records = read_answers(answer, question.end) if question is not None else None
        size = 4 if kind == TYPE_A else 16
        # Whatever the chain of CNAMEs was: the addresses at its end are all that is asked for.
        return [
            ip_address(record.data)
            for record in records or ()
            if record.type == kind and record.class_ == CLASS_IN and len(record.data) == size
        ]


def _write_query(name: str, kind: int) -> bytes | None:
    labels = name.rstrip(".").encode("ascii", "replace").split(b".")
    if not all(0 < len(label) < 64 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        return None
    question = b"".join(bytes((len(label),)) + label for label in labels)
    return _HEADER.pack(0, _RD, 1, 0, 0, 0) + question + b"\0" + struct.pack("!HH", kind, CLASS_IN)


async def _connect(targets: Sequence[bytes], host: str, port: int) -> trio.SocketStream:
    """The first of these packed addresses that accepts. Raises RouteError."""
    winner: trio.socket.SocketType | None = None
    failure: OSError | None = None

    async def attempt(target: bytes, failed: trio.Event, scope: trio.CancelScope) -> None:
        nonlocal winner, failure
        family = socket.AF_INET if len(target) == 4 else socket.AF_INET6
        sock: trio.socket.SocketType | None = None
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await sock.connect((str(ip_address(target)), port))
        except OSError as error:
            # The first family's reason is the better one: a host without IPv6 has nothing to say about it.
            if failure is None or failure.errno in (errno.ENETUNREACH, errno.EAFNOSUPPORT):
                failure = error
            if sock is not None:
                sock.close()
            failed.set()
            return
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        if winner is None:
            winner = sock
            scope.cancel()
        else:
            sock.close()

    with trio.move_on_after(_DIAL_TIMEOUT):
        async with trio.open_nursery() as nursery:
            for target in targets:
                failed = trio.Event()
                nursery.start_soon(attempt, target, failed, nursery.cancel_scope)
                with trio.move_on_after(_HEAD_START):
                    await failed.wait()
    if winner is not None:
        return trio.SocketStream(winner)
    if failure is None:
        raise RouteError(504, "connection_timeout", f"{host} does not answer")
    raise route_error(failure, host)
