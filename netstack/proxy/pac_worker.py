"""The process in which a PAC script runs. Started by file name, without netstack: it imports nothing of ours.

Theory of operation. A script is somebody else's program, and may loop, recurse or allocate for ever. So it runs in a
process that can be killed, and that ends by itself where nobody kills it:

    memory   the engine's own limit, and RLIMIT_AS for all of the process
    time     a timer of CPU time (ITIMER_PROF), whose signal ends the process, armed for each evaluation; the engine's
             own time limit does not let Python be called, which DNS needs
    files    none can be written, none opened beyond a few

Messages are lines of JSON on standard input and output; the network's process is at the other end:

    <- {"load": [helpers, script]}                  -> {"loaded": true} or {"error": "..."}
    <- {"find": [url, host], "addresses": [...]}    -> any number of {"resolve": name}, each answered by {"addresses"}
                                                    -> {"result": "PROXY ..."}, {"result": null}, or
                                                       {"error": "...", "spent": whether memory ran out}

The end of standard input is the end of the process.

An error's words are the script's own, and go into the log. A script may throw the URL it was given, or a part of it,
and a guest's URL may hold tokens: so of each URL in these words only scheme and host are left, and what the path and
query of the URL in hand are made of is taken out wherever it stands (`redact`).
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import sys
from typing import Any

MEMORY = 64 << 20  # of the script; Chromium lets V8 have 64 MB for a PAC script
PROCESS_MEMORY = 1 << 30  # of address space: an interpreter, the engine and the script
STACK = 512 << 10
CPU_SECONDS = 1.0
MAX_LOOKUPS = 20  # for one evaluation: Chromium's limit (proxy_resolver_v8_tracing)
MAX_ERROR = 300
_MAX_RAW_ERROR = 8192  # as much of an error as is looked at: some three of the longest URLs
_MIN_PART = 4  # parts of a path that are shorter are left: words have them by chance, and no token is so short
_NO_MEMORY = "out of memory"


def main() -> None:
    """Serve until standard input ends."""
    _limit()
    sys.path += sys.argv[1:]  # where the engine is
    engine: _Engine | None = None
    while (message := _receive()) is not None:
        if "load" in message:
            engine = None  # the memory of the last one first
            try:
                engine = _Engine(*message["load"])
                answer: dict[str, Any] = {"loaded": True}
            except Exception as error:  # JSException, StackOverflow, ImportError: all of them are its words to us
                answer = {"error": _words(error)}
        elif engine is None:
            answer = {"error": "no script"}
        else:
            url, host = message["find"]
            answer = engine.find(url, host, message["addresses"])
        _send(answer)


class _Engine:
    def __init__(self, helpers: str, script: str) -> None:
        import quickjs

        self._lookups: dict[str, str] = {}
        self._context = quickjs.Context()
        self._context.set_memory_limit(MEMORY)
        self._context.set_max_stack_size(STACK)
        self._context.add_callable("__resolve", self._resolve)
        with _timer():
            self._context.eval(helpers)
            self._context.eval(script)  # by itself, so that its errors have its own line numbers
            if not self._context.eval("typeof FindProxyForURL === 'function'"):
                raise ValueError("there is no function FindProxyForURL in it")

    def find(self, url: str, host: str, addresses: list[str]) -> dict[str, Any]:
        self._lookups.clear()
        try:
            with _timer():
                self._context.eval(f"__addresses = {json.dumps(addresses)}")
                result = self._context.get("__find")(url, host)
        except Exception as error:
            return {"error": _words(error, url), "spent": _NO_MEMORY in _words(error)}
        return {"result": result if isinstance(result, str) else None}

    def _resolve(self, name: str) -> str:
        if name not in self._lookups:
            if len(self._lookups) >= MAX_LOOKUPS or len(name) > 255:
                return "[]"
            _send({"resolve": name})
            answer = _receive()
            if answer is None:
                sys.exit(0)
            self._lookups[name] = json.dumps(answer["addresses"])
        return self._lookups[name]


@contextlib.contextmanager
def _timer() -> Any:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the network, which then ends us
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for what, most in (
        (resource.RLIMIT_AS, PROCESS_MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        with contextlib.suppress(OSError, ValueError):  # macOS knows RLIMIT_AS, and does not let it be lowered
            resource.setrlimit(what, (most, most))


def _receive() -> Any:
    line = sys.stdin.buffer.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _send(message: dict[str, Any]) -> None:
    # ASCII, so that a lone surrogate of a script's text is text to the reader too.
    sys.stdout.buffer.write(json.dumps(message).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def redact(words: str, url: str) -> str:
    """The words without what stands behind scheme and host in URLs, and without the parts of this one. Untrusted."""
    from urllib.parse import unquote  # a few ms, which most workers never need

    tail = "".join(re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[1:])
    parts = {tail, *re.split(r"[/?#&=;,+]", tail)}
    parts |= {unquote(part) for part in parts}
    words = _URL.sub(lambda found: found[1] + found[3] + ("/..." if found[4].strip("/") else ""), words)
    known = sorted((part for part in parts if len(part) >= _MIN_PART), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, known)), "...", words, flags=re.IGNORECASE) if known else words


# Scheme, userinfo, host and port, and the rest as far as the next space: a path may hold nearly all other signs. Once
# more with what encodeURIComponent() makes of "://", "/" and "@".
_URL = re.compile(
    r"([a-z][a-z0-9+.-]{0,30}(?:://|%3a%2f%2f))((?:[^\s/?#%]|%(?!2f|3f|23|40))*(?:@|%40))?([a-z0-9._:\[\]-]*)(\S*)",
    re.IGNORECASE,
)


def _words(error: Exception, url: str = "") -> str:
    """What is wrong, and where: the engine's first two lines, without the whole stack, and nothing of a guest's."""
    text = str(error)[:_MAX_RAW_ERROR]
    if text.strip() == "null":  # with no memory left for an Error, the engine throws null
        return _NO_MEMORY
    lines = redact(text, url).splitlines()[:2]
    return " ".join(" ".join(lines).split())[:MAX_ERROR] or type(error).__name__


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
