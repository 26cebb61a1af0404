"""Queries to nameservers by HTTPS (RFC 8484): POST, HTTP/2 where the server has it, connections that stay.

httpx does the HTTP. Two things are ours: the server is reached at the address that the settings give, with the name in
the URL for the certificate and the Host header, because to look that name up one would have to ask a nameserver; and
nothing of the environment is used, no proxy and no .netrc, so that a query goes where the settings say.

The ID is 0 (RFC 8484 4.1), and an answer must have the question that was asked. httpx takes 60 ms to import, so that is
done when the first such server is asked.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from netstack.dns.message import Question, is_answer_to
from netstack.dns.routes import OPPORTUNISTIC, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from ssl import SSLContext

    import httpx

_MEDIA_TYPE = "application/dns-message"
_MAX_MESSAGE = 65535
_TIMEOUT = 4.0
_CLOSE_TIMEOUT = 1.0


class Https:
    """Asks by HTTPS. tls_context gives the settings of TLS."""

    def __init__(self, tls_context: Callable[..., SSLContext]) -> None:
        self._tls_context = tls_context
        self._clients: dict[Server, httpx.AsyncClient] = {}

    async def ask(self, server: Server, query: bytes, question: Question) -> bytes:
        """Give the answer to a query. Raises OSError."""
        import httpx

        client = self._clients.get(server)
        if client is None:
            client = self._clients[server] = self._make_client(server)
        query = b"\0\0" + query[2:]
        url = urlsplit(server.name)
        host = url.hostname or server.address
        address = f"[{server.address}]" if ":" in server.address else server.address
        target = f"https://{address or host}:{url.port or server.port}{url.path or '/dns-query'}"
        headers = {"accept": _MEDIA_TYPE, "content-type": _MEDIA_TYPE, "host": url.netloc or host}
        try:
            async with client.stream(
                "POST", target, content=query, headers=headers, extensions={"sni_hostname": host}
            ) as response:
                if response.status_code != 200:
                    raise OSError(errno.EPROTO, f"HTTP {response.status_code}")
                answer = bytearray()
                # Read to its end, or until the query's deadline, though it is not all kept: httpx' generators cannot be
                # left in the middle without a warning.
                async for chunk in response.aiter_raw():
                    answer += chunk[: _MAX_MESSAGE + 1 - len(answer)]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(errno.EPROTO, f"HTTPS: {str(error) or type(error).__name__}") from None
        if len(answer) > _MAX_MESSAGE:
            raise OSError(errno.EMSGSIZE, "too long an answer")
        if not is_answer_to(bytes(answer), query, question):
            raise OSError(errno.EPROTO, "not an answer to the query")
        return bytes(answer)

    async def retain(self, servers: Collection[Server]) -> None:
        """Close the connections to all other servers."""
        # Taken out before anything is waited for: the network may change again meanwhile.
        gone = [self._clients.pop(server) for server in list(self._clients) if server not in servers]
        for client in gone:
            # Nothing depends on how it ends, and this runs in a task of its own.
            with trio.move_on_after(_CLOSE_TIMEOUT), contextlib.suppress(Exception):
                await client.aclose()

    def _make_client(self, server: Server) -> httpx.AsyncClient:
        import httpx

        options = []
        if server.interface and hasattr(socket, "SO_BINDTODEVICE"):
            options.append((socket.SOL_SOCKET, socket.SO_BINDTODEVICE, server.interface.encode() + b"\0"))
        transport = httpx.AsyncHTTPTransport(
            verify=self._tls_context(opportunistic=OPPORTUNISTIC in server.options),
            http2=True,
            trust_env=False,
            socket_options=options,
        )
        return httpx.AsyncClient(transport=transport, timeout=_TIMEOUT, trust_env=False)
