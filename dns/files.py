"""Opening the files that the settings name, so that a wrong one is an error and not a wait.

A FIFO blocks who opens it until somebody writes, and a device gives bytes without end; both would stop the thread, or
the event loop, that reads. /dev/null is what people name to have nothing read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file, or /dev/null, for reading. Raises OSError for all others."""
    # O_NONBLOCK: to find out what it is one has to open it.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        is_null = stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode) and not is_null:
            raise OSError(errno.EINVAL, "not a regular file")
    except BaseException:
        os.close(file)
        raise
    return os.fdopen(file, "rb")
