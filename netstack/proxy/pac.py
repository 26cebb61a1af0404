"""Runs PAC scripts: which script is in use, and the worker processes in which it runs.

Theory of operation. `find_proxy` takes an idle worker, or starts one (WORKERS at most; who comes later waits), gives
it the script if it has not got that one, and asks. While a script runs it may want names resolved: those that are not
known yet it is told do not exist, its answer is thrown away, the host's resolver is asked, and the script is run
again (Chromium's proxy_resolver_v8_tracing). So nobody's slow names hold a worker that others wait for. Then the
worker is idle again.

What takes too long is killed: the worker ends itself after a second of CPU time, and we end it after SILENCE seconds
without a word. After TOTAL seconds, names and the wait for a worker in them, there is no answer. What fails says
nothing about the way, and the request goes direct (routes.py). A script that kills its worker STRIKES times in a row
is left alone for PAUSE seconds, because each time costs a second of a processor.

A worker that is asked by a request which was given up meanwhile is in the middle of its work, and killed for that
reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio

from netstack.proxy import pac_worker
from netstack.proxy.pac_script import HELPERS, parse_result
from netstack.proxy.routes import Routes
from netstack.proxy.settings import PacSource

WORKERS: Final = 4
SILENCE: Final = 3.0
TOTAL: Final = 10.0
STRIKES: Final = 3
PAUSE: Final = 60.0
IDLE: Final = 300.0  # after so long without a request workers are ended; starting one takes some 60 ms

# A script sees no more of a URL than this; a longer one could be made to keep its regular expressions busy.
MAX_URL: Final = 2048
_MAX_LINE: Final = 65536
_MAX_RECORDS: Final = 8
_MAX_ROUNDS: Final = 20  # pac_worker.MAX_LOOKUPS, one after the other
_MAX_ADDRESSES: Final = 32  # of a name, for a script

# Addresses for documentation (RFC 5737, RFC 3849): connecting a UDP socket sends nothing, and says which address of
# ours would be the source.
_FAR: Final = ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1"))
_OWN_SECONDS: Final = 5.0

Resolve = Callable[[str], Awaitable[Sequence[str]]]
GetScript = Callable[[PacSource], Awaitable[str | None]]


class PacError(Exception):
    """A script failed. str() is one line; `lethal` where its worker had to end."""

    def __init__(self, words: str, *, lethal: bool = False) -> None:
        super().__init__(words)
        self.lethal = lethal


@dataclass(slots=True)
class _Record:
    """How a script has done."""

    strikes: int = 0
    paused_until: float = 0.0
    problem: str = ""


class PacRunner:
    """Evaluates scripts (routes.PacEvaluator). It ends with `aclose()`, or when `run()` is cancelled."""

    def __init__(
        self,
        get_script: GetScript,
        resolve: Resolve,
        on_problem: Callable[[str], None] = lambda words: None,
        own_addresses: Callable[[], list[str]] | None = None,
    ) -> None:
        self._get_script = get_script
        self._resolve = resolve
        self._on_problem = on_problem
        self._own_addresses = own_addresses or own_addresses_now
        self._own: tuple[float, list[str]] = (-_OWN_SECONDS, [])
        self._idle: list[_Worker] = []
        self._limit = trio.CapacityLimiter(WORKERS)
        self._records: dict[str, _Record] = {}
        self._used_at = 0.0
        self.counters = {"pac_evaluations": 0, "pac_failures": 0, "pac_killed": 0}

    async def find_proxy(self, source: PacSource, url: str, host: str) -> Routes | None:
        """What the script says; None where it fails. Never raises. Untrusted: a guest names URL and host."""
        script = await self._get_script(source)
        if script is None:
            return None
        record = self._record_of(script)
        if time.monotonic() < record.paused_until:
            return None
        self.counters["pac_evaluations"] += 1
        if len(url) > MAX_URL:
            url = url[: url.find("/", url.find("://") + 3) + 1][:MAX_URL]
        try:
            result = await self._find(script, url, host)
        except PacError as error:
            self._on_failure(record, error)
            return None
        except OSError as error:  # no more processes or descriptors
            self._on_failure(record, PacError(f"cannot start a process for it: {error.strerror}"))
            return None
        record.strikes, record.problem = 0, ""
        return None if result is None else parse_result(result)

    async def _find(self, script: str, url: str, host: str) -> str | None:
        """What the script says, run again for as long as it asks for names that it was not told. Raises PacError."""
        known: dict[str, list[str]] = {}
        with trio.move_on_after(TOTAL):
            for _ in range(_MAX_ROUNDS):
                missed: set[str] = set()
                result, failure = None, None
                async with self._limit:
                    try:
                        result = await self._evaluate(script, url, host, known, missed)
                    except PacError as error:
                        if error.lethal or not missed:
                            raise
                        failure = error
                missed -= known.keys()
                if not missed:
                    if failure is not None:
                        raise failure
                    return result
                async with trio.open_nursery() as nursery:
                    for name in missed:
                        nursery.start_soon(self._look_up, name, known)
            raise PacError("the script asks for other names each time it is run")
        # It was names that took so long, or other guests: no fault of the script's.
        raise PacError(f"the script has no answer after {TOTAL:.0f} s")

    async def _look_up(self, name: str, known: dict[str, list[str]]) -> None:
        known[name] = [str(address) for address in await self._resolve(name)][:_MAX_ADDRESSES]

    async def warm(self, source: PacSource) -> None:
        """Have a worker ready, so that the first request need not wait for one; and see whether the script is one."""
        script = await self._get_script(source)
        if script is None:
            return
        record = self._record_of(script)
        try:
            async with self._limit:
                await self._evaluate(script)
        except PacError as error:
            self._on_failure(record, error)
        except OSError:  # the first request will say so
            pass

    async def run(self) -> None:
        """End workers that nobody needs, and all of them when cancelled."""
        try:
            while True:
                await trio.sleep(IDLE)
                if time.monotonic() - self._used_at >= IDLE:
                    await self.aclose()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the workers that are idle."""
        while self._idle:
            await self._idle.pop().end()

    @property
    def workers(self) -> int:
        """How many processes there are."""
        return len(self._idle) + self._limit.borrowed_tokens

    @property
    def problem(self) -> str:
        """Why the script that was run last has no answer; empty where it has."""
        return next(reversed(self._records.values())).problem if self._records else ""

    def _record_of(self, script: str) -> _Record:
        record = self._records.pop(script, None) or _Record()
        self._records[script] = record  # the last one that was asked stands last
        if len(self._records) > _MAX_RECORDS:
            del self._records[next(iter(self._records))]
        return record

    def _on_failure(self, record: _Record, error: PacError) -> None:
        self.counters["pac_failures"] += 1
        record.problem = str(error)
        self._on_problem(str(error))
        if not error.lethal:
            return
        self.counters["pac_killed"] += 1
        record.strikes += 1
        if record.strikes >= STRIKES:
            record.paused_until, record.strikes = time.monotonic() + PAUSE, 0

    async def _evaluate(
        self,
        script: str,
        url: str = "",
        host: str = "",
        known: Mapping[str, Sequence[str]] = MappingProxyType({}),
        missed: set[str] | None = None,
    ) -> str | None:
        """What the script says; without a URL it is only loaded. Raises PacError, OSError.

        Names that are not `known` are unknown to it, too, and added to `missed`: then the answer counts for nothing.
        """
        self._used_at = time.monotonic()
        worker = self._take_idle(script) or await _Worker.start()
        is_whole = False
        try:
            with trio.move_on_after(TOTAL) as scope:
                if worker.script != script:
                    await worker.load(script)
                result = await self._ask(worker, url, host, known, missed) if url or host else None
                is_whole = True
                return result
            assert scope.cancelled_caught
            raise PacError(f"the script has no answer after {TOTAL:.0f} s", lethal=True)
        except PacError as error:
            is_whole = not error.lethal
            raise
        finally:
            if is_whole:
                self._idle.append(worker)
            else:
                await worker.end()

    def _take_idle(self, script: str) -> _Worker | None:
        """A worker that has this script already, or any."""
        found = next((worker for worker in self._idle if worker.script == script), None)
        if found is not None:
            self._idle.remove(found)
            return found
        return self._idle.pop() if self._idle else None

    async def _ask(
        self, worker: _Worker, url: str, host: str, known: Mapping[str, Sequence[str]], missed: set[str] | None
    ) -> str | None:
        message: dict[str, Any] = {"find": [url, host], "addresses": self._own_now()}
        while True:
            answer = await worker.ask(message)
            name = answer.get("resolve")
            if not isinstance(name, str):
                break
            if name not in known and missed is not None:
                missed.add(name)
            message = {"addresses": list(known.get(name, ()))}
        if "error" in answer:
            raise PacError(f"the script failed: {answer['error']}", lethal=bool(answer.get("spent")))
        result = answer.get("result")
        return result if isinstance(result, str) else None

    def _own_now(self) -> list[str]:
        now = time.monotonic()
        if now - self._own[0] >= _OWN_SECONDS:
            self._own = (now, self._own_addresses() or ["127.0.0.1"])
        return self._own[1]


class _Worker:
    """One process (pac_worker.py)."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = b""
        self.script = ""

    @classmethod
    async def start(cls) -> _Worker:
        engine = importlib.util.find_spec("quickjs")
        if engine is None or engine.origin is None:
            raise PacError("PAC scripts need the package quickjs-ng, which is not installed")
        # -I: no PYTHON* variables, and nothing is imported from the working directory. It leaves out the user's own
        # packages too, so the engine's place is told.
        command = [sys.executable, "-I", str(Path(pac_worker.__file__)), str(Path(engine.origin).parents[1])]
        return cls(
            await trio.lowlevel.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: value for key, value in os.environ.items() if key == "TZ"},  # scripts ask for the time
                cwd="/",
            )
        )

    async def load(self, script: str) -> None:
        answer = await self.ask({"load": [HELPERS, script]})
        if "error" in answer:
            self.script = ""
            raise PacError(f"the script cannot be used: {answer['error']}")
        self.script = script

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message, and the next one back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with trio.move_on_after(SILENCE):
                await self._process.stdin.send_all(json.dumps(message).encode("ascii") + b"\n")
                while b"\n" not in self._received:
                    more = await self._process.stdout.receive_some(_MAX_LINE)
                    if not more or len(self._received) > 16 * _MAX_LINE:
                        raise PacError("the script took more time or memory than it may, and was ended", lethal=True)
                    self._received += more
                line, _, self._received = self._received.partition(b"\n")
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return answer
        except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError):
            raise PacError("the script's process ended", lethal=True) from None
        raise PacError(f"the script said nothing for {SILENCE:.0f} s, and was ended", lethal=True)

    async def end(self) -> None:
        """End it now."""
        process = self._process
        process.kill()
        with trio.CancelScope(shield=True):  # a process that was killed is gone as soon as it is scheduled
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


def own_addresses_now() -> list[str]:
    """Our addresses toward the world, IPv4 first; none where there is no route. Sends nothing."""
    found = []
    for family, far in _FAR:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    return found
