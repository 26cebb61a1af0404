"""How a command ends when it cannot go on: one line for people, and an exit status for programs."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

EXIT_FAILURE = 1  # it failed while running
EXIT_BAD_INPUT = 2  # a flag, a file or an address that cannot be used


class CommandError(Exception):
    """A command cannot go on; str() is one line that says what is at fault and what to do."""

    exit_code = EXIT_FAILURE


class InputError(CommandError):
    """What the user gave cannot be used."""

    exit_code = EXIT_BAD_INPUT


def say(line: str) -> None:
    """Write a line for people, on standard error. That nobody can read it is no reason to end."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # AttributeError: there never was one (sys.stderr is None)
        pass


def check_choice(flag: str, value: str, among: Collection[str]) -> None:
    """Refuse what a flag cannot be, before anybody is asked. Raises InputError."""
    if value not in among:
        raise InputError(f"{flag} {value}: must be one of {', '.join(among)}")


def one_line(error: BaseException) -> str:
    """An exception in one line, for people."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# What the system says when a path or an address that it was given cannot be; anything else failed while running.
INPUT_ERRNOS = {
    errno.EACCES,
    errno.EADDRNOTAVAIL,
    errno.EBADF,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTCONN,
    errno.ENOTDIR,
    errno.ENOTSOCK,
    errno.ENXIO,
    errno.EPERM,
    errno.EPROTOTYPE,
    errno.EROFS,
}


def what_to_do(error: OSError) -> str:
    """Advice to go behind the system's words, "" when there is none."""
    mend: str | None = getattr(error, "mend", None)  # whoever raised it knew better (vde.namespace)
    if mend is not None:
        return f"; {mend}" if mend else ""
    advice = {
        errno.EACCES: "take a place where you may write",
        errno.EADDRINUSE: "end what listens there, or take another",
        errno.EADDRNOTAVAIL: "take an address of this host",
        errno.EBADF: "the parent must leave it open",
        errno.EEXIST: "name another path",
        errno.EISDIR: "name a file",
        errno.EMFILE: "raise the limit of open files (netstack doctor)",
        errno.ENOENT: "make its directory first",
        errno.ENOTCONN: "the parent must connect it",
        errno.ENOTDIR: "name another path",
        errno.ENOSPC: "make room, or take another place",
        errno.ENOTSOCK: "it must be a socket",
        errno.ENXIO: "nobody reads it",
        errno.EPERM: "take a place where you may write",
        errno.EPROTOTYPE: "the parent must leave a stream socket open",
        errno.EROFS: "take a place where you may write",
    }.get(error.errno or 0)
    return f"; {advice}" if advice else ""


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, of whatever depth; trio's nurseries wrap even a single one."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
