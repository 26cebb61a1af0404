"""The log: lines for people or JSON for machines on standard error, made with structlog.

structlog brings rich and asyncio along and takes 0.15 s to import, a third of the time that `netstack run` has to
become ready. So a `Log` imports it with its first line, and `warm_up` does so in a thread once the network is ready,
so that no guest waits for the first line.

Whoever waits for a guest must not wait for a terminal: the stack reports to `Events`, whose methods are plain calls off
the hot path, and warnings that a guest can cause are rate-limited by `RateLimiter`. Text that a guest chose (host
names) is shown with its control characters escaped, because a log is read on terminals.

A log that cannot be written (disk full, reader gone) is given up silently: it never ends the network.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

LogFormat = Literal["console", "json"]

# The numbers are those of the standard library's logging, which structlog filters by.
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

WARNING_INTERVAL = 10.0  # seconds between two warnings of one key
MAX_WARNING_KEYS = 256  # keys come from a fixed set of reasons, times the links: this only bounds what is remembered


class Log:
    """Structured lines at four levels. Every method is safe at any time and never raises because of the line."""

    def __init__(
        self,
        level: str = "info",
        log_format: LogFormat = "console",
        *,
        stream: TextIO | None = None,
        colors: bool | None = None,
    ) -> None:
        self.level = LEVELS[level]
        self._format = log_format
        self._stream = sys.stderr if stream is None else stream
        self._colors = colors  # None: whether the stream is a terminal
        self._logger: Any = None

    @property
    def debugging(self) -> bool:
        """Whether debug lines are shown: ask before making an expensive one."""
        return self.level <= LEVELS["debug"]

    def set_level(self, level: str) -> None:
        """Show lines of `level` and above from now on."""
        self.level = LEVELS[level]

    def debug(self, event: str, **fields: object) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write("error", event, fields)

    def warm_up(self) -> None:
        """Do now, in whatever thread this is, what the first line would otherwise wait for."""
        if self._logger is None:
            try:
                self._logger = self._make_logger()
            except (AttributeError, OSError, ValueError):  # the stream is closed, or None: see _write
                self.level = sys.maxsize

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        if LEVELS[level] < self.level:
            return
        try:
            self.warm_up()
            getattr(self._logger, level)(event, **fields)
        except (AttributeError, OSError, ValueError):
            # ValueError: the stream was closed. AttributeError: there never was one (sys.stderr is None). There
            # is nowhere left to complain to.
            self.level = sys.maxsize

    def _make_logger(self) -> Any:
        import structlog

        rendering: list[Any]
        if self._format == "json":
            # default=str: an address object in a field must not cost the line.
            rendering = [
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(default=str),
            ]
        else:
            rendering = [
                structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                escape_control_characters,
                structlog.dev.ConsoleRenderer(
                    colors=self._stream.isatty() if self._colors is None else self._colors,
                    pad_event_to=0,
                    pad_level=False,
                    exception_formatter=structlog.dev.plain_traceback,
                ),
            ]
        # wrap_logger, not configure(): the configuration is this object's, not the process's.
        return structlog.wrap_logger(
            structlog.WriteLogger(self._stream),
            processors=[structlog.processors.add_log_level, *rendering],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            cache_logger_on_first_use=True,
        )


def escape_control_characters(logger: object, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    r"""A structlog processor: show every character that is not printable as its escape, such as \x1b. Untrusted.

    Only a traceback keeps its line ends, and goes below the other fields.
    """
    if "traceback" in line:
        line["exception"] = line.pop("traceback")
    for key, value in line.items():
        if isinstance(value, str) and not value.isprintable():
            kept = "\n" if key == "exception" else ""
            line[key] = "".join(
                c if c.isprintable() or c == kept else c.encode("unicode_escape").decode() for c in value
            )
    return line


class RateLimiter:
    """Says which of many alike events to tell people about: of each key the first at once, then one per interval."""

    def __init__(self, interval: float = WARNING_INTERVAL, max_keys: int = MAX_WARNING_KEYS) -> None:
        self._interval = interval
        self._max_keys = max_keys
        # key -> [when the last was let through, how many were held back since]; the least recently told first
        self._keys: OrderedDict[str, list[float]] = OrderedDict()

    def admit(self, key: str, now: float) -> int | None:
        """None: hold this one back. Else: tell of it, and of so many that were held back before it."""
        entry = self._keys.get(key)
        if entry is None:
            if len(self._keys) >= self._max_keys:
                self._keys.popitem(last=False)
            self._keys[key] = [now, 0]
            return 0
        if now - entry[0] < self._interval:
            entry[1] += 1
            return None
        suppressed = int(entry[1])
        entry[:] = [now, 0]
        self._keys.move_to_end(key)
        return suppressed


class Events:
    """What happened in the network, told to a `Log`: the implementation of `netstack.core.ports.Events`."""

    def __init__(self, log: Log, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._limiter = RateLimiter()

    @property
    def debug(self) -> bool:
        """Whether lines for single flows are wanted. Ask before making their text."""
        return self._log.debugging

    def flow_opened(self, protocol: str, guest: str, peer: str) -> None:
        self._log.debug("flow opened", protocol=protocol, guest=guest, peer=peer)

    def flow_closed(self, protocol: str, guest: str, peer: str, why: str, from_guest: int, to_guest: int) -> None:
        """`from_guest` and `to_guest` are the bytes carried each way."""
        self._log.debug(
            "flow closed", protocol=protocol, guest=guest, peer=peer, why=why, from_guest=from_guest, to_guest=to_guest
        )

    def warning(self, key: str, message: str, **fields: object) -> None:
        """Warn, of each `key` at once and then at most every ten seconds, with the number of those left out."""
        self.admit_warning(key, message, **fields)

    def admit_warning(self, key: str, message: str, **fields: object) -> bool:
        """Like warning(); whether it was one to tell of."""
        suppressed = self._limiter.admit(key, self._clock())
        if suppressed is None:
            return False
        if suppressed:
            fields["suppressed"] = suppressed
        self._log.warning(message, **fields)
        return True

    def drop_warning(self, reason: str, link: str) -> None:
        """A frame of a kind that should not occur was dropped; `reason` is its counter's name."""
        self.warning(f"drop {reason} {link}", "frames dropped", reason=reason, link=link)

    def info(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)
