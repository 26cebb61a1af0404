"""The gateway's SOCKS 5 proxy (RFC 1928): CONNECT by address or name, and a clean no to everything else.

    guest    5, count, methods                         we    5, method: 0 (none), or 255 where that is not offered
    guest    5, command, 0, type, address, port        we    5, reply, 0, 1, 0.0.0.0, 0

There is no authentication: who can reach the gateway is a guest. BIND and UDP ASSOCIATE are answered with "command not
supported"; UDP needs no proxy here, a guest just sends it.
"""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import Final

import trio

from netstack.proxy.errors import RouteError
from netstack.proxy.heads import HeadError, Place, parse_place
from netstack.proxy.pages import write_page
from netstack.proxy.records import Record, Records
from netstack.proxy.service import Guest
from netstack.proxy.upstream import Connector, RefusedError

HANDSHAKE_TIMEOUT: Final = 30.0

_NO_METHOD: Final = b"\5\xff"
_CONNECT: Final = 1

# RFC 1928 6.
SUCCEEDED, FAILED, NOT_ALLOWED, _, HOST_UNREACHABLE, REFUSED, TIMED_OUT, NO_COMMAND, NO_TYPE = range(9)

_REPLIES: Final = {
    "connection_refused": REFUSED,
    "destination_ip_unroutable": HOST_UNREACHABLE,
    "dns_error": HOST_UNREACHABLE,
    "connection_timeout": TIMED_OUT,
    "destination_ip_prohibited": NOT_ALLOWED,
    "http_request_denied": NOT_ALLOWED,
}


class _HandshakeError(Exception):
    """The guest is to be told this, and that is all."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


def write_reply(code: int) -> bytes:
    """A reply; which address was bound is nobody's business."""
    return bytes((5, code, 0, 1, 0, 0, 0, 0, 0, 0))


async def serve_socks(guest: Guest, connector: Connector, records: Records) -> None:
    """Serve one connection to the SOCKS port. Untrusted."""
    place: Place | None = None
    with trio.move_on_after(HANDSHAKE_TIMEOUT) as patience:
        try:
            place = await _read_request(guest.stream)
        except _HandshakeError as error:
            records.counters[error.reason] += 1
            if error.answer:
                await guest.stream.send_all(error.answer)
            await guest.linger()
            return
    if patience.cancelled_caught or place is None:
        records.counters["proxy_socks_slow"] += 1
        return
    start = time.monotonic()

    def note(route: str, status: int, error: str = "") -> None:
        seconds = time.monotonic() - start
        records.add(Record(guest.address, "socks", "CONNECT", place.host, place.port, route, status, seconds, error))

    scheme = {80: "http", 443: "https"}.get(place.port, "tcp")
    try:
        routes = await connector.choose(scheme, place.host, place.port, f"{scheme}://{place.authority}/")
        upstream = await connector.open_tunnel(routes, place, [])
    except RouteError as error:
        note("", error.status, error.words)
        refused = isinstance(error, RefusedError) and error.status < 500
        await guest.stream.send_all(write_reply(NOT_ALLOWED if refused else _REPLIES.get(error.error, FAILED)))
        await guest.linger()
        return
    note(str(upstream.route), 200)
    try:
        await guest.stream.send_all(write_reply(SUCCEEDED) + upstream.connection.trailing_data[0])
    except BaseException:
        await upstream.close()
        raise
    await guest.join(upstream.stream, b"", records.counters)


async def _read_request(stream: trio.SocketStream) -> Place:
    """The handshake, as far as the place that the guest wants to reach."""
    version = (await _read(stream, 1))[0]
    if version == 4:
        raise _HandshakeError("proxy_socks4", b"\0\x5b\0\0\0\0\0\0")
    if version != 5:
        words = "this is a SOCKS 5 proxy: socks5h://, or take the HTTP proxy's port"
        is_http = 0x41 <= version <= 0x5A
        raise _HandshakeError("proxy_socks_malformed", write_page(400, words) if is_http else b"")
    count = (await _read(stream, 1))[0]
    if 0 not in await _read(stream, count):
        raise _HandshakeError("proxy_socks_method", _NO_METHOD)
    await stream.send_all(b"\5\0")
    version, command, _, kind = await _read(stream, 4)
    if version != 5:
        raise _HandshakeError("proxy_socks_malformed")
    if kind == 1:
        host = str(ip_address(await _read(stream, 4)))
    elif kind == 4:
        host = str(ip_address(await _read(stream, 16)))
    elif kind == 3:
        host = (await _read(stream, (await _read(stream, 1))[0])).decode("latin-1")
    else:
        raise _HandshakeError("proxy_socks_type", write_reply(NO_TYPE))
    port = int.from_bytes(await _read(stream, 2), "big")
    if command != _CONNECT:
        raise _HandshakeError("proxy_socks_command", write_reply(NO_COMMAND))
    try:
        return parse_place(f"[{host}]:{port}".encode() if kind == 4 else f"{host}:{port}".encode("latin-1"))
    except HeadError:
        raise _HandshakeError("proxy_bad_target", write_reply(FAILED)) from None


async def _read(stream: trio.SocketStream, count: int) -> bytes:
    """So many bytes exactly: what follows them belongs to the tunnel."""
    found = bytearray()
    while len(found) < count:
        piece = await stream.receive_some(count - len(found))
        if not piece:
            raise _HandshakeError("proxy_socks_malformed")
        found += piece
    return bytes(found)
