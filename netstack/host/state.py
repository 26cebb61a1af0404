"""Small JSON files that outlive a restart: written whole or not at all, and never in the way of a start.

A file is written beside its place, flushed to the disk and renamed over it, so that a reader, or a machine that lost
its power, finds the old or the new one and nothing in between. A file that cannot be read is kept aside under another
name, for whoever wants to know what happened, and netstack starts without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A lease is some 200 bytes, and there are a thousand at most.
MAX_SIZE = 8 << 20

Warn = Callable[[str], None]


def _say_nothing(message: str) -> None:
    """Warn nobody."""


def read_json(path: Path, *, check: Callable[[Any], None] | None = None, warn: Warn = _say_nothing) -> Any:
    """Read a file that write_json wrote. None when there is none, or none that can be used: that one is set aside.

    check may raise ValueError for what is JSON but not what was expected. warn is told in words what went wrong.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"cannot read {path}: {error.strerror or error}; going on without")
        return None
    try:
        if len(text) > MAX_SIZE:
            raise ValueError("too large")
        data = json.loads(text)
        if check is not None:
            check(data)
    except (ValueError, RecursionError) as error:
        aside = set_aside(path)
        warn(f"{path} cannot be used ({error}); " + (f"kept as {aside}, " if aside else "") + "starting without")
        return None
    return data


def write_json(path: Path, data: object) -> None:
    """Write a file in one step, readable by its owner only. Raises OSError; the old file is then as it was."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes it 0600, and with a name that no other process uses.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123, there is no path to a descriptor
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            # Without it the rename may reach the disk before the contents do (ext4: auto_da_alloc is not for all).
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    _sync_directory(path.parent)


class Claim:
    """The right to keep a file, among all processes that ask for it: a lock beside it, gone with its holder."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        """Give it up. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def claim(path: Path) -> Claim | None:
    """Claim a file that need not exist yet; None when another process, or another network of ours, has it.

    Raises OSError when its directory cannot be made or written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        # A file system without locks (some network ones): two at once are rarer there than having to do without.
        pass
    return Claim(path, fd)


def set_aside(path: Path) -> Path | None:
    """Rename a bad file to NAME.bad, over an earlier one. None when that fails."""
    aside = path.with_name(path.name + ".bad")
    try:
        path.replace(aside)
    except OSError:
        return None
    return aside


def _sync_directory(directory: Path) -> None:
    """Have the rename on the disk too. Some file systems refuse it, and lose nothing but the latest version."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
