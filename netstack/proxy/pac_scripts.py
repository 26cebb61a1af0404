"""Where PAC scripts come from: fetched, kept, and fetched again.

Theory of operation. `get` is what the runner asks for each request; it answers from memory, except for the first
request of all, which waits for the fetch, FIRST_WAIT seconds at most. One task keeps the script of the current source
fresh:

    fetched        again after the max-age of the answer (a minute to an hour), or half an hour where it has none
    not fetched    again after 2, 8, 32, 120, 120 ... seconds; the last good script stays in use meanwhile
    refresh()      now: the host's network or DNS changed, so that the same URL may lead elsewhere
    a file         looked at every second (a stat); a data: URL or a script in the settings never changes

A URL is fetched directly and never by a proxy, for it says which one to use. TLS is verified against the host's own
store of certificates, where a company's is. What is longer than a megabyte (Chromium's limit), or holds no
FindProxyForURL, is not a script: captive portals answer everything with a page.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast
from urllib.parse import unquote_to_bytes

import trio

from netstack.proxy.settings import PacSource, local_path, redact_url

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

MAX_SCRIPT: Final = 1 << 20
FETCH_SECONDS: Final = 15.0
FIRST_WAIT: Final = 5.0
DEFAULT_AGE: Final = 1800.0
MIN_AGE, MAX_AGE = 60.0, 3600.0
RETRIES: Final = (2.0, 8.0, 32.0, 120.0)
FILE_INTERVAL: Final = 1.0
MAX_SOURCES: Final = 8

Discover = Callable[[], Awaitable[list[str]]]


class FetchError(Exception):
    """There is no script to be had. str() is one line without credentials."""


class Fetched(NamedTuple):
    """A script, where it came from, and for how many seconds it is good."""

    script: str
    url: str
    age: float


class PacScripts:
    """Keeps the script of one source, the one in use."""

    def __init__(
        self,
        discover: Discover | None = None,
        on_event: Callable[[str, str], None] = lambda what, words: None,
    ) -> None:
        """`discover` gives the URLs that WPAD would try; `on_event` is told "fetched" or "failed", with words."""
        self._discover = discover
        self._on_event = on_event
        self._source: PacSource | None = None
        self._changed = trio.Event()
        self._first = trio.Event()
        self.script: str | None = None
        self.url = ""
        self.problem = ""
        self.fetches = 0

    def use(self, source: PacSource | None) -> None:
        """Keep this source's script from now on."""
        if source == self._source:
            return
        self._source = source
        self.script, self.url, self.problem = None, "", ""
        self._first = trio.Event()
        if source is not None and source.script:
            self._take(Fetched(source.script, "", MAX_AGE))
        self._changed.set()

    def refresh(self) -> None:
        """Fetch anew, because the host's network changed."""
        self._changed.set()

    async def get(self, source: PacSource) -> str | None:
        """The script in use, or None where there is none (yet)."""
        if source != self._source:
            return None  # asked with settings of a moment ago
        if not self._first.is_set():
            with trio.move_on_after(FIRST_WAIT):
                await self._first.wait()
        return self.script

    async def run(self) -> None:
        """Fetch until cancelled."""
        failures = 0
        while True:
            self._changed = trio.Event()
            source = self._source
            if source is None or source.script:
                await self._changed.wait()
                failures = 0
                continue
            stamp = None
            try:
                fetched = await self._fetch(source)
            except FetchError as error:
                delay = RETRIES[min(failures, len(RETRIES) - 1)]
                failures += 1
                if source == self._source:
                    self._fail(str(error))
            else:
                failures, delay = 0, fetched.age
                stamp = stamp_of(fetched.url)
                if source == self._source:
                    self._take(fetched)
            await self._wait(source, delay, stamp)
            if source != self._source:
                failures = 0

    async def _wait(self, source: PacSource, delay: float, stamp: object) -> None:
        """Until the script is to be fetched again."""
        is_file = local_path(source.url) is not None
        with trio.move_on_after(delay if not is_file else float("inf")):
            if not is_file:
                await self._changed.wait()
                return
            while not self._changed.is_set() and stamp_of(source.url) == stamp:
                with trio.move_on_after(FILE_INTERVAL):
                    await self._changed.wait()

    async def _fetch(self, source: PacSource) -> Fetched:
        self.fetches += 1
        if not source.discover:
            return await fetch(source.url)
        urls = await self._discover() if self._discover is not None else []
        problems = []
        for url in urls[:8]:
            try:
                return await fetch(url)
            except FetchError as error:
                problems.append(str(error))
        raise FetchError("WPAD found nothing: " + ("; ".join(problems) or "the host knows no domain to look in"))

    def _take(self, fetched: Fetched) -> None:
        is_news = fetched.script != self.script
        self.script, self.url, self.problem = fetched.script, redact_url(fetched.url), ""
        self._first.set()
        if is_news:
            self._on_event("fetched", self.url or "a script in the settings")

    def _fail(self, words: str) -> None:
        is_news = words != self.problem
        self.problem = words
        self._first.set()
        if is_news:
            self._on_event("failed", words)


class PacLibrary:
    """The scripts of all sources in use: mostly one, and more where a VPN has its own for its domain."""

    def __init__(self, make: Callable[[], PacScripts]) -> None:
        self._make = make
        self._kept: dict[PacSource, tuple[PacScripts, trio.CancelScope]] = {}
        self._nursery: trio.Nursery | None = None

    def use(self, sources: Sequence[PacSource]) -> None:
        """Keep the scripts of these from now on, the first MAX_SOURCES of them."""
        wanted = tuple(dict.fromkeys(sources))[:MAX_SOURCES]
        for source in [source for source in self._kept if source not in wanted]:
            self._kept.pop(source)[1].cancel()
        for source in wanted:
            if source not in self._kept:
                scripts = self._make()
                scripts.use(source)
                self._kept[source] = scripts, trio.CancelScope()
                if self._nursery is not None:
                    self._nursery.start_soon(self._run_one, *self._kept[source])

    def find(self, source: PacSource | None) -> PacScripts | None:
        """Who keeps the script of a source."""
        found = self._kept.get(source) if source is not None else None
        return found[0] if found is not None else None

    @property
    def problems(self) -> list[str]:
        """Why there are scripts that could not be fetched."""
        return [scripts.problem for scripts, _ in self._kept.values() if scripts.problem]

    async def get(self, source: PacSource) -> str | None:
        """See PacScripts.get."""
        scripts = self.find(source)
        return None if scripts is None else await scripts.get(source)

    def refresh(self) -> None:
        """See PacScripts.refresh."""
        for scripts, _ in self._kept.values():
            scripts.refresh()

    async def run(self) -> None:
        """Fetch until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for scripts, scope in self._kept.values():
                nursery.start_soon(self._run_one, scripts, scope)
            await trio.sleep_forever()

    async def _run_one(self, scripts: PacScripts, scope: trio.CancelScope) -> None:
        with scope:
            await scripts.run()


def stamp_of(url: str) -> object:
    """What changes when the file does; None where it is no file, or not there."""
    path = local_path(url)
    if path is None:
        return None
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


async def fetch(url: str) -> Fetched:
    """The script at a URL. Raises FetchError. Untrusted: whoever answers may be anybody."""
    shown = redact_url(url)
    path = local_path(url)
    if path is not None:
        age, data = MAX_AGE, _read_file(path)
    elif url[:5].lower() == "data:":
        age, data = MAX_AGE, _read_data(url)
    elif re.match(r"https?://", url, re.IGNORECASE):
        try:
            with trio.fail_after(FETCH_SECONDS):
                age, data = await _read_http(url, shown)
        except trio.TooSlowError:
            raise FetchError(f"{shown}: no answer within {FETCH_SECONDS:.0f} s") from None
    else:
        raise FetchError(f"{shown}: no URL of a script; write http://, https://, file:/// or a path")
    if len(data) > MAX_SCRIPT:
        raise FetchError(f"{shown}: longer than a megabyte; that is no PAC script")
    script = _decode(data)
    if "FindProxyForURL" not in script:
        raise FetchError(f"{shown}: no PAC script: there is no FindProxyForURL in it")
    return Fetched(script, url, age)


_HEADERS: Final = {"accept": "application/x-ns-proxy-autoconfig, */*;q=0.8", "accept-encoding": "identity"}


async def _read_http(url: str, shown: str) -> tuple[float, bytes]:
    await trio.to_thread.run_sync(_import_httpx)
    import ssl

    import httpx

    try:
        async with (
            httpx.AsyncClient(
                trust_env=False,
                follow_redirects=True,
                max_redirects=5,
                timeout=FETCH_SECONDS,
                # The system's store and not certifi's: a company's own authority is in it.
                verify=ssl.create_default_context(),
            ) as client,
            client.stream("GET", url, headers=_HEADERS) as answer,
        ):
            if answer.status_code != 200:
                raise FetchError(f"{shown}: the answer is {answer.status_code}")
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                raise FetchError(f"{shown}: the answer is compressed, which was not asked for")
            data = bytearray()
            # As it comes: unpacked, 600 bytes may be gigabytes before anybody has counted them.
            stream = cast("AsyncGenerator[bytes, None]", answer.aiter_raw(65536))
            # A generator that is left early is closed here, and not by the collector.
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    data += piece
                    if len(data) > MAX_SCRIPT:
                        break
            return _age_of(answer.headers.get("cache-control", "")), bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        # Their words may hold the URL, with its credentials.
        raise FetchError(f"{shown}: {_words(error)}") from None


def _words(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return {"ConnectTimeout": "no answer", "ReadTimeout": "no answer"}.get(type(error).__name__, type(error).__name__)


def _import_httpx() -> None:
    import httpx  # noqa: F401  # a tenth of a second, which guests need not wait for


def _age_of(cache_control: str) -> float:
    if re.search(r"\bno-(store|cache)\b", cache_control, re.IGNORECASE):
        return MIN_AGE
    found = re.search(r"\bmax-age=([0-9]{1,9})", cache_control, re.IGNORECASE)
    return min(max(float(found[1]), MIN_AGE), MAX_AGE) if found else DEFAULT_AGE


def _read_file(path: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO would block who opens it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FetchError(f"{path}: not a regular file")
            return file.read(MAX_SCRIPT + 1)
    except (OSError, ValueError) as error:
        raise FetchError(f"{path}: {getattr(error, 'strerror', None) or 'no path'}") from None


def _read_data(url: str) -> bytes:
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise FetchError("data: URL without a comma")
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4))
    except binascii.Error:
        raise FetchError("data: URL that is no base64") from None


def _decode(data: bytes) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
