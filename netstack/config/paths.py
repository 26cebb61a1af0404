"""Where netstack puts its sockets, its API token and its leases, by the XDG rules and the environment.

Sockets belong into $XDG_RUNTIME_DIR, which is private to the user and empty after a reboot. Where a session did not
set it (sudo, cron, containers), /run/user/UID is taken when it is there, else a directory in /tmp. /tmp is
everybody's, so that one is trusted only if it is ours alone: somebody else may have made it first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from netstack.config.problems import ConfigError


def runtime_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of sockets, made with mode 0700 if need be. Raises ConfigError."""
    uid = os.getuid()
    session = environment.get("XDG_RUNTIME_DIR", "")
    if session:
        if not Path(session).is_absolute():
            raise ConfigError(f"XDG_RUNTIME_DIR is {session!r}: it must be an absolute path")
        return _private_directory(Path(session) / "netstack", uid)
    if os.access(f"/run/user/{uid}", os.W_OK | os.X_OK):
        return _private_directory(Path(f"/run/user/{uid}/netstack"), uid)
    return _private_directory(Path(f"/tmp/netstack-{uid}"), uid)  # noqa: S108 # checked to be ours, see above


def state_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of what outlives a restart, such as leases, made by whoever writes there. Raises ConfigError."""
    home = environment.get("XDG_STATE_HOME", "")
    if Path(home).is_absolute():
        return Path(home) / "netstack"
    try:
        return Path("~").expanduser() / ".local" / "state" / "netstack"
    except RuntimeError:  # a container's user without an entry in passwd, and no HOME
        words = "no home directory to keep leases in; set HOME or XDG_STATE_HOME, or give --state-dir"
        raise ConfigError(words) from None


def notify_socket(environment: Mapping[str, str] = os.environ) -> str | None:
    """The datagram socket on which systemd waits for READY=1 (sd_notify(3)); None when nobody asked."""
    return environment.get("NOTIFY_SOCKET") or None


def _private_directory(path: Path, uid: int) -> Path:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of your own") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise ConfigError(f"{path} is not a directory that only you can write to; remove it or set XDG_RUNTIME_DIR")
    return path
