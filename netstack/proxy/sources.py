"""The sources of proxy settings, watched: each gives a `Layer`, and says when it may be another one.

Theory of operation. What a source reads is parsed by a module `source_*` of its own, which does no I/O. Here it is:

    environment   read once: no process's environment changes from outside
    settings      [proxy] of the configuration, put in by whoever reads it again
    macOS         `scutil --proxy` after each word of a scutil that watches State:/Network/Global/Proxies, and every
                  30 s in any case, since scoped settings change without that key
    GNOME         `gsettings list-recursively` after each change of a dconf database (a stat of each, once a second)
    KDE           the files kioslaverc, looked at once a second

"system" stands for those of the system, on macOS the first, else GNOME and KDE, where the desktop in use goes first
($XDG_CURRENT_DESKTOP). A program that is missing is a source that says nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import trio

from netstack.proxy import source_gnome, source_kde, source_scutil
from netstack.proxy.layers import Layer
from netstack.proxy.source_environment import parse_environment
from netstack.proxy.wpad import run_program

POLL_INTERVAL: Final = 1.0
_SCUTIL_INTERVAL: Final = 30.0
_RESTART: Final = 5.0

DCONF_DATABASES: Final = Path("/etc/dconf/db")
_MAX_FILES: Final = 32


class Source(Protocol):
    """One place that says something about proxies."""

    name: str

    def current(self) -> Layer:
        """What it says, as last read. Does no slow I/O."""
        ...

    async def run(self, changed: Callable[[], None]) -> None:
        """Watch until cancelled; call `changed` after each change."""
        ...


class FixedSource:
    """A source that is told what it says: the environment, and our own settings."""

    def __init__(self, layer: Layer) -> None:
        self.name = layer.name
        self._layer = layer

    def current(self) -> Layer:
        return self._layer

    async def run(self, changed: Callable[[], None]) -> None:
        await trio.sleep_forever()


class EnvironmentSource(FixedSource):
    """The environment of this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(parse_environment(environment))


class ProgramSource:
    """A source that is a program's output: read at the start, and whenever what it depends on changed."""

    def __init__(self, name: str, command: Sequence[str], parse: Callable[[str], Layer]) -> None:
        self.name = name
        self._command = tuple(command)
        self._parse = parse
        self._layer = Layer(name, f"{command[0]} was not asked yet")

    def current(self) -> Layer:
        return self._layer

    async def run(self, changed: Callable[[], None]) -> None:
        while True:
            await self.read(changed)
            await self._wait()

    async def _wait(self) -> None:
        await trio.sleep_forever()

    async def read(self, changed: Callable[[], None]) -> None:
        """Ask the program now."""
        output = await run_program(self._command)
        layer = Layer(self.name, f"{self._command[0]} has no answer") if output is None else self._parse(output)
        if layer != self._layer:
            self._layer = layer
            changed()


class ScutilSource(ProgramSource):
    """macOS."""

    def __init__(self, command: Sequence[str] = source_scutil.COMMAND) -> None:
        super().__init__(source_scutil.NAME, command, source_scutil.parse_scutil_proxy)
        self._told = trio.Event()

    async def run(self, changed: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            await super().run(changed)

    async def _wait(self) -> None:
        with trio.move_on_after(_SCUTIL_INTERVAL):
            await self._told.wait()
        self._told = trio.Event()

    async def _watch(self) -> None:
        """A scutil that says something at each change, for as long as its input is open."""
        while True:
            try:
                process = await trio.lowlevel.open_process(
                    [self._command[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError:
                await trio.sleep_forever()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                await process.stdin.send_all(b"n.add State:/Network/Global/Proxies\nn.watch\n")
                while await process.stdout.receive_some(65536):
                    self._told.set()
            except trio.BrokenResourceError:
                pass
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
                    await process.stdin.aclose()
                    await process.stdout.aclose()
            await trio.sleep(_RESTART)


class GsettingsSource(ProgramSource):
    """GNOME."""

    def __init__(
        self,
        environment: Mapping[str, str],
        home: Path,
        command: Sequence[str] = source_gnome.COMMAND,
        databases: Path = DCONF_DATABASES,
    ) -> None:
        super().__init__(source_gnome.NAME, command, source_gnome.parse_gsettings)
        config = environment.get("XDG_CONFIG_HOME", "")
        self._user = (Path(config) if config else home / ".config") / "dconf" / "user"
        self._databases = databases
        self._is_desktop = bool(environment.get("XDG_CURRENT_DESKTOP"))
        self._stamp: list[object] = []

    async def read(self, changed: Callable[[], None]) -> None:
        self._stamp = self._look()
        if self._is_desktop or any(self._stamp):
            await super().read(changed)
        else:
            # A server, where starting the program would be work for nothing.
            self._layer = Layer(self.name, "there is no dconf database")

    async def _wait(self) -> None:
        while True:
            await trio.sleep(POLL_INTERVAL)
            if self._look() != self._stamp:
                return

    def _look(self) -> list[object]:
        files = [self._user]
        with contextlib.suppress(OSError):
            files += sorted(path for path in self._databases.iterdir() if path.is_file())[:_MAX_FILES]
        return [stamp_of(path) for path in files]


class KioslaveSource:
    """KDE."""

    def __init__(self, environment: Mapping[str, str], home: Path) -> None:
        self.name = source_kde.NAME
        self._environment = environment
        self._paths = source_kde.kioslaverc_paths(environment, home)
        self._stamp = self._look()
        self._layer = self._read()

    def current(self) -> Layer:
        return self._layer

    async def run(self, changed: Callable[[], None]) -> None:
        while True:
            await trio.sleep(POLL_INTERVAL)
            stamp = self._look()
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            layer = self._read()
            if layer != self._layer:
                self._layer = layer
                changed()

    def _look(self) -> list[object]:
        return [stamp_of(path) for path in self._paths]

    def _read(self) -> Layer:
        texts, found = [], []
        for path in self._paths:
            try:
                if path.is_file():
                    with path.open("rb") as file:
                        texts.append(file.read(source_kde.MAX_FILE).decode("utf-8", "replace"))
                    found.append(str(path))
            except OSError:
                continue
        why = ", ".join(found) or "there is no kioslaverc"
        return source_kde.parse_kioslaverc(texts, self._environment, why)


def stamp_of(path: Path) -> object:
    """What changes when a file does; None for none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def system_sources(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> list[Source]:
    """Those of the system that we run on, the desktop in use first."""
    if platform == "darwin":
        return [ScutilSource()]
    home = Path(environment.get("HOME", "") or "/nonexistent")
    gnome, kde = GsettingsSource(environment, home), KioslaveSource(environment, home)
    return [kde, gnome] if "KDE" in environment.get("XDG_CURRENT_DESKTOP", "").upper().split(":") else [gnome, kde]
