"""What all sources of upstream servers have in common: the interface, and a file that is looked at now and then.

A source reads one thing that says which servers the host asks: /etc/resolv.conf, systemd-resolved, NetworkManager,
macOS' configuration, the user's settings. Each is a module `source_*` of a pure parser, tested with recorded outputs of
hosts, and a watcher, which is nothing but I/O. `follower` merges what they give into the routing table.

Why files are polled: a stat of one path costs 2 us, and sees what inotify on that path does not: a rename over it, a
switched symlink anywhere on the way, a mount on top of it, a file system without notifications.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from netstack.dns.files import open_plain
from netstack.dns.routes import Scope

# Changes have to be in use within 2 s; with the follower's debouncing this leaves half of it.
POLL_INTERVAL = 1.0


class Source(Protocol):
    """One place that says whom the host asks."""

    name: str

    async def run(self, changed: Callable[[], None]) -> None:
        """Watch until cancelled; call `changed` after each change. Does not raise because of what it reads."""
        ...

    def current(self) -> list[Scope]:
        """What it says now, as last read; [] when it says nothing. Does no slow I/O."""
        ...


@dataclass(slots=True)
class WatchedFile:
    """A small file that others replace, rewrite, remove and bring back."""

    path: Path
    max_size: int
    _identity: tuple[int, ...] | None = field(init=False, default=None)

    def read_changed(self) -> bytes | None:
        """The first max_size bytes, when they may differ from those of last time; None when not, or unreadable.

        A missing file is no news: it is the middle of a rename, or a host that has none, and what was known stays.
        """
        try:
            status = self.path.stat()
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            if identity == self._identity:
                return None
            with open_plain(self.path) as file:
                data = file.read(self.max_size)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            self._identity = None
            return None
        self._identity = identity
        return data


async def poll(look: Callable[[], bool], changed: Callable[[], None], interval: float = POLL_INTERVAL) -> None:
    """Look again and again; say so when `look` saw a change."""
    while True:
        await trio.sleep(interval)
        if look():
            changed()
