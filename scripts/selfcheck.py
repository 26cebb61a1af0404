"""Checks an installed netstack against its sources: run by .ci/run with the interpreter of an empty environment.

    python scripts/selfcheck.py /path/to/the/sources

Each module of the sources must import from the installation, not from the sources, and py.typed must be there. The
folders dns/ and vde/ reach the wheel through symbolic links and have no __init__.py: both are easy to lose on the way,
and nothing else would notice.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path


def modules_of(sources: Path) -> list[str]:
    """The names of all modules in the sources, the linked folders included (which Path.rglob would not follow)."""
    found = []
    for folder, _, names in os.walk(sources / "netstack", followlinks=True):
        for name in names:
            if name.endswith(".py") and name != "__main__.py":
                parts = Path(folder, name).relative_to(sources).with_suffix("").parts
                found.append(".".join(parts).removesuffix(".__init__"))
    return sorted(found)


def main() -> None:
    """Prints what was checked; any fault is an exception."""
    sources = Path(sys.argv[1]).resolve()
    modules = modules_of(sources)
    for package in ("netstack.dns", "netstack.vde", "netstack.wire"):
        assert any(name.startswith(f"{package}.") for name in modules), (
            f"{sources} has no {package}: is the link there?"
        )
    for name in modules:
        file = importlib.import_module(name).__file__
        assert file is not None, f"{name} is not a module"
        assert sources not in Path(file).resolve().parents, f"{name} came from the sources: {file}"
    installed = Path(importlib.import_module("netstack").__path__[0])
    assert (installed / "py.typed").is_file(), "py.typed is not installed: type checkers would ignore netstack"
    page = importlib.import_module("netstack.control.dashboard").dashboard_page()[0]
    assert page.startswith(b"<!doctype html>"), "the dashboard's page is not installed"
    assert (installed / "control" / "agent" / "agent.sh").is_file(), "the guests' agent is not installed"
    print(f"netstack {version('netstack')}: all {len(modules)} modules import from {installed}")


if __name__ == "__main__":
    main()
