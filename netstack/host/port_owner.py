"""Which process of the host has a port: for an error that says more than "address in use".

Linux: the port's socket is in /proc/net/{tcp,tcp6,udp,udp6} with its inode, and /proc/PID/fd shows who has that inode
open. Other users' processes can be read by root alone; then the port's user is named. macOS: lsof, for 2 s at most.
Looked for only when a port is in use, and not for long.
"""

from __future__ import annotations

import contextlib
import ipaddress
import pwd
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Final

# A host may have 100,000 descriptors open.
_PATIENCE: Final = 0.25
_LSOF_PATIENCE: Final = 2.0
_LISTEN: Final = "0A"  # TCP_LISTEN of Linux' include/net/tcp_states.h
_ANY: Final = ("0.0.0.0", "::")


def find_owner(protocol: str, host: str, ports: Container[int]) -> str:
    """Who has one of these ports at this address, in words such as "nginx (process 812)"; "" when it cannot be told."""
    if sys.platform == "linux":
        inodes = dict(_sockets(protocol, host, ports))
        return _holder(inodes) if inodes else ""
    return _ask_lsof(protocol, ports)


def _sockets(protocol: str, host: str, ports: Container[int]) -> Iterator[tuple[str, int]]:
    """The inodes of the sockets that are in the way, and whose they are."""
    for family in ("", "6"):
        try:
            lines = Path(f"/proc/net/{protocol}{family}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) < 10 or (protocol == "tcp" and fields[3] != _LISTEN):
                continue
            address, _, port = fields[1].partition(":")
            if int(port, 16) in ports and _clash(host, _address(address)):
                yield fields[9], int(fields[7])


def _address(text: str) -> str:
    """/proc shows addresses as words of 32 bits in the host's own order."""
    raw = bytes.fromhex(text)
    words = (raw[i : i + 4] for i in range(0, len(raw), 4))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _clash(ours: str, theirs: str) -> bool:
    return ours == theirs or ours in _ANY or theirs in _ANY


def _holder(inodes: dict[str, int]) -> str:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    until = time.monotonic() + _PATIENCE
    for process in Path("/proc").iterdir():
        if time.monotonic() > until:
            break
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(fd.readlink()) in wanted:
                        return f"{_name(process)} (process {process.name})"
    uid = next(iter(inodes.values()))
    try:
        return f"a process of {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"a process of user {uid}"


def _name(process: Path) -> str:
    try:
        name = (process / "comm").read_text().strip()
    except (OSError, ValueError):
        return "a process"
    return name if name.isprintable() and name else "a process"


def _ask_lsof(protocol: str, ports: Container[int]) -> str:
    """Lines of `lsof -F`: p is a process, c its command, n a socket's address."""
    kind = ["-iTCP", "-sTCP:LISTEN"] if protocol == "tcp" else ["-iUDP"]
    try:
        told = subprocess.run(
            ["/usr/sbin/lsof", "-nP", *kind, "-Fpcn"],
            capture_output=True,
            timeout=_LSOF_PATIENCE,
            check=False,
            text=True,
            errors="replace",
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    process = name = ""
    for line in told.splitlines():
        if line.startswith("p"):
            process = line[1:]
        elif line.startswith("c"):
            name = line[1:]
        elif line.startswith("n"):
            port = line.rpartition(":")[2]
            if port.isdigit() and int(port) in ports:
                return f"{name} (process {process})"
    return ""
