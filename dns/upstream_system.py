"""The system's own resolver, getaddrinfo(3), as the last one to ask.

There are hosts where a program may not speak to nameservers itself: endpoint security and VPN filters let the system's
resolver through and nobody else. There, and only there, the answer comes from here: when the host's nameservers are
silent or cannot be reached, though the system can. It is asked only for names that no scope claims by a suffix (a
VPN's names must not be told to the home router), or where its routes are the very ones that we read (macOS); never for
names in .local, which it may ask for by mDNS. The user's own upstreams have no such substitute.

It is the last resort because it tells so little: addresses (A, AAAA) and names of addresses (PTR), no TTL, no other
type, no DNSSEC, and one word for "no such name" and "no such address", which are told apart by asking for any address.
A look-up blocks, for as long as the C library likes, so it has a thread of its own, and there are not many of these:
when all are busy the answer is no.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Callable
from struct import Struct
from typing import Any

import trio

from netstack.dns.message import (
    CLASS_IN,
    HEADER_LENGTH,
    NOERROR,
    NXDOMAIN,
    QR,
    RA,
    RD,
    TYPE_A,
    TYPE_AAAA,
    TYPE_PTR,
    Question,
)
from netstack.dns.reverse import parse_reverse
from netstack.dns.routes import Server

SYSTEM = Server("", 0, "system", "the system's resolver")

# Seconds. What the system's own cache thinks is not to be had; short, since it has one.
TTL = 30

# glibc blocks a look-up for 10 s and more where nobody answers.
_THREADS = 16

_MAX_ADDRESSES = 32

# What getaddrinfo is given: letters, digits, hyphen and underscore (service names). Anything else is no host's name.
_LABEL = re.compile(rb"[a-z0-9_-]{1,63}")

_RECORD = Struct("!HHHIH")
_OWNER = 0xC000 | HEADER_LENGTH  # a pointer to the question's name (RFC 1035 4.1.4)

_NO_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

Look = Callable[..., Any]


class System:
    """Asks the system's resolver. `addresses` and `names` are getaddrinfo and getnameinfo."""

    def __init__(self, addresses: Look = socket.getaddrinfo, names: Look = socket.getnameinfo) -> None:
        self._addresses = addresses
        self._names = names
        self._threads = trio.CapacityLimiter(_THREADS)

    def can_tell(self, question: Question) -> bool:
        """Whether this is a question that it can be asked."""
        if question.class_ != CLASS_IN:
            return False
        if question.type == TYPE_PTR:
            return parse_reverse(question.labels) is not None
        return (
            question.type in (TYPE_A, TYPE_AAAA)
            and bool(question.labels)
            and all(map(_LABEL.fullmatch, question.labels))
        )

    async def ask(self, server: Server, query: bytes, question: Question) -> bytes:
        """The answer, as a message. Raises OSError when there is none."""
        if not self.can_tell(question):
            raise OSError(errno.EOPNOTSUPP, "the system's resolver does not tell this type")
        if not self._threads.available_tokens:
            raise OSError(errno.EBUSY, "the system's resolver is busy")
        find = self._find_names if question.type == TYPE_PTR else self._find_addresses
        found = await trio.to_thread.run_sync(find, question, abandon_on_cancel=True, limiter=self._threads)
        return _write(query, question, found)

    def _find_addresses(self, question: Question) -> list[bytes] | None:
        """In a thread. None: there is no such name."""
        # The dot at the end keeps the host's search list out of it.
        name = b".".join(question.labels) + b"."
        family = socket.AF_INET if question.type == TYPE_A else socket.AF_INET6
        try:
            return self._look(name, family)
        except socket.gaierror as error:
            if error.errno not in _NO_NAME:
                raise OSError(errno.EHOSTUNREACH, f"the system's resolver: {error.strerror}") from None
        try:
            self._look(name, socket.AF_UNSPEC)
        except socket.gaierror as error:
            if error.errno not in _NO_NAME:
                raise OSError(errno.EHOSTUNREACH, f"the system's resolver: {error.strerror}") from None
            return None
        return []

    def _look(self, name: bytes, family: int) -> list[bytes]:
        found = self._addresses(name, None, family=family, type=socket.SOCK_DGRAM)
        texts = dict.fromkeys(entry[4][0] for entry in found)
        # A scope has no place in a record.
        return [socket.inet_pton(entry_family(text), text) for text in texts if "%" not in text][:_MAX_ADDRESSES]

    def _find_names(self, question: Question) -> list[bytes] | None:
        """In a thread. None: the address has no name."""
        packed = parse_reverse(question.labels)
        assert packed is not None
        try:
            name, _ = self._names((str(ipaddress.ip_address(packed)), 0), socket.NI_NAMEREQD | socket.NI_NUMERICSERV)
        except socket.gaierror as error:
            if error.errno not in _NO_NAME:
                raise OSError(errno.EHOSTUNREACH, f"the system's resolver: {error.strerror}") from None
            return None
        labels = name.rstrip(".").encode("ascii", "replace").split(b".")
        if not all(1 <= len(label) <= 63 for label in labels) or sum(len(label) + 1 for label in labels) > 254:
            return None
        return [b"".join(bytes((len(label),)) + label for label in labels) + b"\0"]


def entry_family(text: str) -> socket.AddressFamily:
    """The family of an address as text."""
    return socket.AF_INET6 if ":" in text else socket.AF_INET


def _write(query: bytes, question: Question, found: list[bytes] | None) -> bytes:
    """The message that says so."""
    records = b"".join(_RECORD.pack(_OWNER, question.type, CLASS_IN, TTL, len(data)) + data for data in found or ())
    flags = QR | RD | RA | (NXDOMAIN if found is None else NOERROR)
    counts = b"\0\1" + len(found or ()).to_bytes(2, "big") + bytes(4)
    return query[:2] + flags.to_bytes(2, "big") + counts + query[HEADER_LENGTH : question.end] + records
