"""Readiness, pid files and systemd, each against the real thing: files, pipes, sockets."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from pathlib import Path

import pytest

from netstack.cli.faults import CommandError, InputError
from netstack.cli.service import PidFile, ReadyFd, Systemd, raise_file_limit


def test_the_ready_fd_gets_one_line_and_is_closed() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    ready = ReadyFd(write)
    assert not os.get_inheritable(write)  # or a QEMU that we start would hold the pipe open
    ready.tell()
    assert os.read(read, 100) == b"ready\n"
    assert os.read(read, 100) == b""
    os.close(read)


def test_a_parent_that_is_gone_is_no_reason_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    ready = ReadyFd(write)
    os.close(read)
    ready.tell()
    assert "Broken pipe" in capsys.readouterr().err
    os.close(write)


def test_a_ready_fd_that_is_not_open() -> None:
    for fd in (-1, 12345, 1 << 40):
        with pytest.raises(InputError, match=f"--ready-fd {fd}: no such open file descriptor"):
            ReadyFd(fd)


def test_the_pid_file_is_there_only_while_it_is_true(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    pidfile = PidFile(str(path))
    assert not path.exists()
    pidfile.write()
    assert path.read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == [path]
    pidfile.remove()
    assert not path.exists()
    pidfile.remove()


def test_a_stale_pid_file_is_replaced_and_a_held_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    path.write_text("1\n")  # that process lives, but it holds no lock
    first = PidFile(str(path))
    first.write()
    with pytest.raises(CommandError, match=f"netstack runs already, as process {os.getpid()}"):
        PidFile(str(path))
    first.remove()
    PidFile(str(path))


def test_a_pid_file_of_somebody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    pidfile = PidFile(str(path))
    pidfile.write()
    path.unlink()
    path.write_text("7\n")
    pidfile.remove()
    assert path.read_text() == "7\n"


def test_the_pid_files_lock_is_seen_by_others(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    pidfile = PidFile(str(path))
    pidfile.write()
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    pidfile.remove()


@pytest.mark.parametrize("kind", ("path", "abstract"))
def test_systemd_is_told(kind: str, tmp_path: Path) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@netstack-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        manager.settimeout(5)
        systemd = Systemd(name)
        systemd.ready("network 192.168.5.0/24")
        assert manager.recv(1000) == f"READY=1\nSTATUS=network 192.168.5.0/24\nMAINPID={os.getpid()}".encode()
        systemd.reloading()
        first, second = manager.recv(1000).decode().split("\n")
        assert first == "RELOADING=1"
        assert second.removeprefix("MONOTONIC_USEC=").isdigit()
        systemd.stopping()
        assert manager.recv(1000) == b"STOPPING=1"


def test_without_systemd_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Systemd(None).ready("x")
    assert capsys.readouterr().err == ""
    Systemd(str(tmp_path / "gone")).ready("x")
    assert "NOTIFY_SOCKET: No such file" in capsys.readouterr().err


def test_the_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        assert raise_file_limit() == (lower, hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pid_file_that_cannot_be_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory; name a file"):
        PidFile(str(tmp_path))
    path = tmp_path / "n.pid"
    pidfile = PidFile(str(path))
    path.mkdir()
    with pytest.raises(InputError, match=r"n\.pid: Is a directory; name a file"):
        pidfile.write()
    pidfile.remove()
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_that_start_together_one_gets_the_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    first, second = PidFile(str(path)), PidFile(str(path))
    first.write()
    with pytest.raises(CommandError, match="netstack runs already"):
        second.write()
    second.remove()
    assert path.read_text() == f"{os.getpid()}\n"
    first.remove()


def test_a_pid_file_is_never_written_into_a_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "n.pid"
    waiting = tmp_path / f".n.pid.{os.getpid()}"
    waiting.write_text("theirs\n")
    with waiting.open() as theirs:
        pidfile = PidFile(str(path))
        pidfile.write()
        assert theirs.read() == "theirs\n"
    pidfile.remove()
    assert list(tmp_path.iterdir()) == []
