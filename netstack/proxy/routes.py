"""Which way a request goes: direct, or to which proxies in turn.

Theory of operation. `choose()` is asked once for each request or tunnel, and answers from `ProxyRouter.current`, so
that a change of the host's settings holds from the next request on; what is open stays as it is.

    is the host the gateway, a guest, a name of ours, loopback      -> direct
    are there settings for a domain it is in (a VPN on macOS)       -> these, the longest domain
    is it in no_proxy                                               -> direct
    is the scheme decided by a PAC script                           -> what the script says, see below
    is there a proxy for the scheme                                 -> that proxy
    else                                                            -> direct

Schemes are "http" (a request that is forwarded), "https" (a tunnel: CONNECT, or TLS taken transparently), and "tcp" for
anything else (SOCKS to another port), which goes to the proxy for all traffic where there is one.

A PAC script that fails (it raises, loops, takes too much memory, or was never fetched) means direct: what browsers do
without one. Of several ways, the proxies that failed lately go to the end of the list for RETRY_AFTER seconds, behind
DIRECT too, as in browsers; who dials tells us with `note_failure` and `note_success`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from netstack.proxy.settings import NO_SETTINGS, Credentials, PacSource, ProxyServer, ProxySettings, is_loopback

# Seconds that a proxy which failed is asked last. Browsers take 5 minutes (Chromium) to 30 (Firefox), but a
# VPN that comes up again is not waited for so long here: asking last costs nothing where another proxy works.
RETRY_AFTER: Final = 300.0

# Proxies that failed and are remembered.
_MAX_FAILED: Final = 256


class Direct:
    """No proxy: a connection to the host itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "DIRECT"

    def __str__(self) -> str:
        return "direct"


DIRECT: Final = Direct()

Route = Direct | ProxyServer
Routes = tuple[Route, ...]

# choose(scheme, host, port, url): the ways to try, in order; never empty and never raises.
Choose = Callable[[str, str, int, str], Awaitable[Routes]]


class PacEvaluator(Protocol):
    """Runs a PAC script."""

    async def find_proxy(self, source: PacSource, url: str, host: str) -> Routes | None:
        """The script's answer, or None where it has none: it failed, or could not be fetched."""
        ...


class ProxyRouter:
    """The host's settings as they are now, and the answer to "which way"."""

    def __init__(
        self,
        pac: PacEvaluator | None = None,
        is_own: Callable[[str], bool] = is_loopback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_own` says which hosts are in this network, or are us."""
        self.current: ProxySettings = NO_SETTINGS
        self._pac = pac
        self._is_own = is_own
        self._clock = clock
        self._failed_at: dict[ProxyServer, float] = {}
        # By "host:port", or by "host" for all its ports: of proxies that were named without any.
        self.credentials: Mapping[str, Credentials] = {}

    async def choose(self, scheme: str, host: str, port: int, url: str) -> Routes:
        """The ways to try, in order. Never empty, never raises. Untrusted: a guest names all of it."""
        if self._is_own(host) or is_loopback(host):
            # In whatever spelling: a proxy on the host's loopback would take it for its own.
            return (DIRECT,)
        settings = _settings_for(self.current, host)
        if not settings.may_proxy(scheme) or settings.no_proxy.match(host, port) is not None:
            return (DIRECT,)
        if scheme in settings.pac_schemes and settings.pac is not None:
            found = None if self._pac is None else await self._pac.find_proxy(settings.pac, _pac_url(url, host), host)
            return self._order(tuple(map(self._introduce, found))) if found else (DIRECT,)
        server = settings.server_for(scheme)
        return (DIRECT,) if server is None else (self._introduce(server),)

    def may_proxy(self, scheme: str) -> bool:
        """Whether any request of this scheme could go to a proxy now; what is asked for each new flow."""
        return self.current.may_proxy(scheme)

    def note_failure(self, server: ProxyServer) -> None:
        """A proxy could not be reached."""
        if len(self._failed_at) >= _MAX_FAILED:
            self._failed_at.pop(next(iter(self._failed_at)))
        self._failed_at[server] = self._clock()

    def note_success(self, server: ProxyServer) -> None:
        """A proxy could be reached."""
        self._failed_at.pop(server, None)

    def forget_failures(self) -> None:
        """The host's network changed: what was out of reach may not be any more."""
        self._failed_at.clear()

    def _introduce(self, route: Route) -> Route:
        """The same way, with the credentials for it."""
        if not isinstance(route, ProxyServer) or route.has_credentials or not self.credentials:
            return route
        found = self.credentials.get(route.authority) or self.credentials.get(route.host)
        return route if found is None else route.with_credentials(found)

    def _order(self, routes: Routes) -> Routes:
        if len(routes) < 2 or not self._failed_at:
            return routes
        since = self._clock() - RETRY_AFTER

        def has_failed(route: Route) -> bool:
            return isinstance(route, ProxyServer) and self._failed_at.get(route, since) > since

        return tuple(sorted(routes, key=has_failed))

    def describe(self) -> dict[str, Any]:
        """What holds now, and which proxies failed lately, and how many seconds ago. No credentials are in it."""
        now = self._clock()
        failed = {str(server): round(now - at, 1) for server, at in self._failed_at.items() if now - at < RETRY_AFTER}
        return {"effective": describe_settings(self.current), "failed": failed}


def _settings_for(settings: ProxySettings, host: str) -> ProxySettings:
    if not settings.domains:
        return settings
    name = host.rstrip(".").lower()
    best, found = "", settings
    for domain, scoped in settings.domains:
        if (name == domain or name.endswith("." + domain)) and len(domain) > len(best):
            best, found = domain, scoped
    return found


def _pac_url(url: str, host: str) -> str:
    """The URL as a script sees it: of https only scheme and host, which is all that browsers tell it."""
    scheme, divider, rest = url.partition("://")
    if not divider:
        return f"https://{host}/"
    authority = rest.partition("/")[0]
    if scheme.lower() in ("https", "wss"):
        return f"{scheme}://{authority.rpartition('@')[2]}/"
    path = rest[len(authority) :]
    return f"{scheme}://{authority.rpartition('@')[2]}{path.partition('#')[0] or '/'}"


def describe_settings(settings: ProxySettings) -> dict[str, Any]:
    """Settings as plain data, without credentials."""
    return {
        "http": str(settings.http or "") or None,
        "https": str(settings.https or "") or None,
        "socks": str(settings.socks or "") or None,
        "all": str(settings.all or "") or None,
        "no_proxy": list(settings.no_proxy.entries),
        "pac": str(settings.pac or "") or None,
        "pac_schemes": sorted(settings.pac_schemes),
        "source": settings.source,
        "domains": {domain: describe_settings(scoped) for domain, scoped in settings.domains},
    }
