"""Files that outlive a restart, on a real file system."""

import stat
from pathlib import Path
from typing import Any

import pytest

from netstack.core.lease_records import read_leases, write_leases
from netstack.core.leases import LeaseTable
from netstack.host.state import MAX_SIZE, read_json, write_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "leases.json"
    write_json(path, {"a": [1, None, "\u00e9"]})
    assert read_json(path) == {"a": [1, None, "\u00e9"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [found.name for found in path.parent.iterdir()] == ["leases.json"]


def test_no_file_is_no_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert read_json(tmp_path / "none", warn=warnings.append) is None
    assert warnings == []


@pytest.mark.parametrize(
    "content", (b"", b"{", b"\xff\xfe", b'{"a": 1}x', b"[" * 100_000, b" " * (MAX_SIZE + 1)), ids=range(6)
)
def test_a_bad_file_is_kept_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "leases.json"
    path.write_bytes(content)
    warnings: list[str] = []
    assert read_json(path, warn=warnings.append) is None
    assert len(warnings) == 1
    assert "leases.json.bad" in warnings[0]
    assert (tmp_path / "leases.json.bad").read_bytes() == content
    assert not path.exists()
    write_json(path, [])
    assert read_json(path) == []


def test_json_that_is_something_else_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    path.write_text('{"version": 7}')

    def check(data: Any) -> None:
        if data["version"] != 1:
            raise ValueError("version 7")

    warnings: list[str] = []
    assert read_json(path, check=check, warn=warnings.append) is None
    assert "version 7" in warnings[0]
    assert (tmp_path / "leases.json.bad").exists()


def test_a_directory_in_the_place_is_survived(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert read_json(tmp_path, warn=warnings.append) is None
    assert len(warnings) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": True}
    assert [found.name for found in tmp_path.iterdir()] == ["leases.json"]


def test_a_failed_rename_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "leases.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_json(tmp_path / "leases.json", {})
    assert [found.name for found in tmp_path.iterdir()] == ["leases.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """A descriptor opened before the write goes on to read the old version."""
    path = tmp_path / "leases.json"
    write_json(path, {"old": True})
    with path.open() as reader:
        write_json(path, {"new": True})
        assert "old" in reader.read()
    assert read_json(path) == {"new": True}


def test_leases_go_through_a_file(tmp_path: Path) -> None:
    before = LeaseTable(bytes((192, 168, 5, 0)), 24)
    assert before.bind(b"\x52\x54\0\0\0\1", bytes((192, 168, 5, 20)), 10.0, name="debian") is not None
    write_json(tmp_path / "leases.json", write_leases(before, 10.0, 1000.0))
    after = LeaseTable(bytes((192, 168, 5, 0)), 24)
    assert read_leases(after, read_json(tmp_path / "leases.json"), 0.0, 1010.0) == 0
    lease = after.find_name("debian", 0.0)
    assert lease is not None
    assert lease.address == bytes((192, 168, 5, 20))
