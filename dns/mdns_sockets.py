"""The sockets of a question to the host's neighbors: where it is asked from, and where answers to all are heard.

Questions leave from a port of their own on each interface (section 5.1), with TTL 255 (section 11). Answers to the
group are heard at port 5353, which is shared with the host's own responder: it sets the same options, and the kernel
gives what is for a group to all of its members.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import trio

from netstack.dns.interfaces import Interface

GROUP4: Final = "224.0.0.251"
GROUP6: Final = "ff02::fb"
PORT: Final = 5353


class Place(NamedTuple):
    """A socket on an interface; group is where to send questions, None where we only listen."""

    sock: trio.socket.SocketType
    interface: Interface
    group: tuple[Any, ...] | None


# struct ip_mreqn: group, address, index (ip(7); the same on macOS); struct ipv6_mreq: group, index.
def _mreqn(group: str, interface: Interface) -> bytes:
    return struct.pack("=4s4si", socket.inet_aton(group), socket.inet_aton(interface.address4), interface.number)


def _ask4(interface: Interface) -> Place | None:
    if not interface.address4:
        return None
    with _Making(socket.AF_INET) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, _mreqn("0.0.0.0", interface))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)  # RFC 6762 11
        sock.bind((interface.address4, 0))
        return Place(trio.socket.from_stdlib_socket(sock), interface, (GROUP4, PORT))


def _ask6(interface: Interface) -> Place | None:
    if not interface.address6:
        return None
    with _Making(socket.AF_INET6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface.number)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.bind((interface.address6, 0, 0, interface.number))
        return Place(trio.socket.from_stdlib_socket(sock), interface, (GROUP6, PORT, 0, interface.number))


def _hear4(interface: Interface) -> Place | None:
    if not interface.address4:
        return None
    with _Making(socket.AF_INET, share=True) as sock:
        # Bound to the group, so that what is for the host's own responder alone goes to it.
        sock.bind((GROUP4, PORT))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _mreqn(GROUP4, interface))
        return Place(trio.socket.from_stdlib_socket(sock), interface, None)


def _hear6(interface: Interface) -> Place | None:
    if not interface.address6:
        return None
    with _Making(socket.AF_INET6, share=True) as sock:
        sock.bind((GROUP6, PORT, 0, interface.number))
        group = socket.inet_pton(socket.AF_INET6, GROUP6) + struct.pack("=I", interface.number)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        return Place(trio.socket.from_stdlib_socket(sock), interface, None)


class _Making:
    """A socket that is closed unless its making succeeds."""

    def __init__(self, family: socket.AddressFamily, *, share: bool = False) -> None:
        self._sock = socket.socket(family, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        if share:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def __enter__(self) -> socket.socket:
        return self._sock

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._sock.close()


def open_places(interfaces: Iterable[Interface], stack: contextlib.ExitStack) -> list[Place]:
    """Open what can be opened on these interfaces. The stack closes it."""
    places = []
    for interface in interfaces:
        for make in (_ask4, _ask6, _hear4, _hear6):
            with contextlib.suppress(OSError):
                place = make(interface)
                if place is not None:
                    stack.enter_context(place.sock)
                    places.append(place)
    return places
