"""Files that the settings name, where they are none: nobody waits for a FIFO, and nobody reads a device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from netstack.dns.files import open_plain
from netstack.dns.hosts import HostsFile
from netstack.dns.sources import WatchedFile


@pytest.mark.timeout(10)
async def test_a_fifo_for_a_hosts_file_is_a_problem_and_no_wait(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    os.mkfifo(path)
    problems: list[str] = []
    file = HostsFile(path, on_problem=problems.append)
    file.load()
    with trio.fail_after(5):
        await file.check()
    assert problems == [f"{path}: not a regular file"]
    assert not file.table.addresses


@pytest.mark.timeout(10)
def test_a_fifo_for_a_resolv_conf_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    os.mkfifo(path)
    file = WatchedFile(path, 100)
    assert file.read_changed() is None
    path.unlink()
    path.write_bytes(b"nameserver 192.0.2.1\n")
    assert file.read_changed() == b"nameserver 192.0.2.1\n"


@pytest.mark.parametrize(("path", "why"), (("/dev/zero", "not a regular file"), ("/", "Is a directory")))
def test_devices_and_folders_are_refused(path: str, why: str) -> None:
    with pytest.raises(OSError, match=why):
        open_plain(Path(path))


def test_dev_null_is_an_empty_file() -> None:
    with open_plain(Path("/dev/null")) as file:
        assert file.read() == b""
