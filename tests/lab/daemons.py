"""Daemons of others that the tests of DNS use: unbound, knot and avahi, run in namespaces only.

Installed, they would start with the machine; scripts/setup-debian.sh unpacks them into .cache/daemons, with the
libraries that the machine lacks. Where a machine has them installed, those are taken.
"""

from __future__ import annotations

import shutil

from tests.lab.initramfs import ROOT, LabUnavailableError

UNPACKED = ROOT / ".cache" / "daemons"


def find_unpacked(name: str) -> str | None:
    """The path of an unpacked program."""
    for folder in ("usr/sbin", "usr/bin"):
        if (UNPACKED / folder / name).exists():
            return str(UNPACKED / folder / name)
    return None


def find_daemon(name: str) -> list[str]:
    """The words that run it. Raises LabUnavailableError where it is neither installed nor unpacked."""
    installed = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if installed is not None:
        return [installed]
    unpacked = find_unpacked(name)
    if unpacked is None:
        raise LabUnavailableError(f"no {name}; unpack it with: sudo scripts/setup-debian.sh")
    libraries = sorted(
        str(path) for pattern in ("usr/lib/*-linux-gnu*", "lib/*-linux-gnu*") for path in UNPACKED.glob(pattern)
    )
    return ["env", f"LD_LIBRARY_PATH={':'.join(libraries)}", unpacked]
