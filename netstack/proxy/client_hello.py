"""The name in a TLS ClientHello (RFC 8446 4.1.2, RFC 6066 3), without speaking TLS.

    record      type 1 (22: handshake), version 2, length 2, then fragments of handshake messages
    handshake   type 1 (1: ClientHello), length 3, then
    hello       version 2, random 32, session id <0..32>, cipher suites <2..2^16>, compression <1..255>, extensions
    extension   type 2 (0: server_name), length 2, list length 2, then name type 1 (0), length 2, name

A ClientHello may lie in several records, and come in any number of pieces: with the keys of post-quantum algorithms
it is longer than a segment. With an encrypted ClientHello (ECH) the name is that of the provider, which is where the
connection has to go.
"""

from __future__ import annotations

import re
from typing import Final

# RFC 8446 4: no limit but 2**24; real ones are below 4 KiB, with two post-quantum key shares.
MAX_HELLO: Final = 16 * 1024

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_NAME = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")


class MoreNeeded(Exception):  # noqa: N818 - it is none
    """What has come can be the beginning of a ClientHello."""


def looks_like_tls(data: bytes | bytearray) -> bool:
    """Whether these first bytes, however few, can begin a TLS connection. Untrusted."""
    return all(
        (data[0:1] in (b"", b"\x16"), data[1:2] in (b"", b"\x03"), len(data) < 6 or data[5] == _CLIENT_HELLO)
    ) and (len(data) < 5 or 0 < int.from_bytes(data[3:5], "big") <= 1 << 14)


def parse_server_name(data: bytes | bytearray) -> str | None:
    """The name of a ClientHello, in lower case; None where it has none that can be used. Untrusted.

    Raises MoreNeeded when it is not all there yet, and ValueError when it is no ClientHello.
    """
    hello = _gather(data)
    try:
        return _find_name(hello)
    except IndexError:
        raise ValueError("a length in the ClientHello is wrong") from None


def _gather(data: bytes | bytearray) -> bytes:
    """The ClientHello's body out of its records."""
    message = bytearray()
    at = 0
    while True:
        if len(data) < at + 5:
            raise MoreNeeded
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] != _HANDSHAKE or data[at + 1] != 3 or not 0 < length <= 1 << 14:
            raise ValueError("not a handshake record")
        message += data[at + 5 : at + 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            raise ValueError("not a ClientHello")
        if len(message) >= 4:
            wanted = int.from_bytes(message[1:4], "big")
            if wanted > MAX_HELLO:
                raise ValueError("the ClientHello is too long")
            if len(message) >= 4 + wanted:
                return bytes(message[4 : 4 + wanted])
        at += 5 + length
        if at > 2 * MAX_HELLO:
            raise ValueError("the ClientHello is too long")


def _find_name(hello: bytes) -> str | None:
    at = 2 + 32
    at += 1 + hello[at]
    at += 2 + int.from_bytes(_take(hello, at, 2), "big")
    at += 1 + hello[at]
    if at == len(hello):
        return None  # before TLS 1.3 a hello may end here
    end = at + 2 + int.from_bytes(_take(hello, at, 2), "big")
    at += 2
    if end > len(hello):
        raise IndexError
    while at < end:
        kind = int.from_bytes(_take(hello, at, 2), "big")
        body = _take(hello, at + 4, int.from_bytes(_take(hello, at + 2, 2), "big"))
        if kind == _SERVER_NAME:
            return _read_name(body)
        at += 4 + len(body)
    return None


def _read_name(body: bytes) -> str | None:
    """The one host name of the server_name extension; there are no other types of name (RFC 6066 3)."""
    if len(body) < 5 or body[2] != 0:
        return None
    name = _take(body, 5, int.from_bytes(body[3:5], "big"))
    if _NAME.fullmatch(name) is None:
        return None
    text = name.decode("ascii").lower()
    return None if text.replace(".", "").isdigit() else text  # not an address: RFC 6066 3 forbids them


def _take(data: bytes, at: int, count: int) -> bytes:
    piece = data[at : at + count]
    if len(piece) < count:
        raise IndexError
    return piece
