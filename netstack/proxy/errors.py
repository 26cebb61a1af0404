"""Why a connection could not be made, in the words of HTTP, of SOCKS and of people."""

from __future__ import annotations

import errno


class RouteError(Exception):
    """A connection could not be made. `status` is for HTTP, `error` from RFC 9209 2.3, `words` for people."""

    def __init__(self, status: int, error: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.error = error
        self.words = words


def route_error(error: OSError, host: str) -> RouteError:
    """What a failed connect() is to a guest."""
    if error.errno == errno.ECONNREFUSED:
        return RouteError(502, "connection_refused", f"{host} refuses the connection")
    if error.errno == errno.ETIMEDOUT:
        return RouteError(504, "connection_timeout", f"{host} does not answer")
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN):
        return RouteError(502, "destination_ip_unroutable", f"{host} cannot be reached: {error.strerror}")
    return RouteError(503, "proxy_internal_error", f"{host} cannot be reached: {error.strerror}")
