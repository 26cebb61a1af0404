"""`netstack run` as a process: readiness, signals, what it leaves behind, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netstack.cli import main
from netstack.cli.service import PidFile, ReadyFd
from tests.cli.programs import SECONDS, environment, netstack, running

pytestmark = pytest.mark.timeout(90)


def link(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/guest.sock"


def test_ready_is_told_in_every_way_and_is_true(tmp_path: Path) -> None:
    read, write = os.pipe()
    pidfile = tmp_path / "n.pid"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(SECONDS)
        arguments = ("run", "--link", link(tmp_path), "--pidfile", str(pidfile), "--ready-fd", str(write))
        with running(tmp_path, *arguments, pass_fds=[write], NOTIFY_SOCKET=str(tmp_path / "notify")) as run:
            os.close(write)
            line = run.wait_for("ready")
            assert line.startswith("ready: network 192.168.")
            assert link(tmp_path) in line
            with os.fdopen(read) as pipe:
                assert pipe.read() == "ready\n"  # and the end of the file, since it was closed
            assert systemd.recv(1000).startswith(b"READY=1\n")
            assert pidfile.read_text() == f"{run.process.pid}\n"
            for path in (tmp_path / "guest.sock", tmp_path / "netstack" / "api.sock"):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
            assert stat.S_IMODE((tmp_path / "netstack" / "api.sock").stat().st_mode) == 0o600
            assert run.end() == 0
            assert systemd.recv(1000) == b"STOPPING=1"
    left = [path.name for path in tmp_path.rglob("*") if path.is_socket() or path.suffix == ".pid"]
    assert left == ["notify"]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_signals_end_it_well_and_in_time(number: int, tmp_path: Path) -> None:
    with running(tmp_path, "run", "--link", link(tmp_path)) as run:
        run.wait_for("ready")
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(tmp_path / "guest.sock"))  # a guest that says nothing and does not go away
            before = time.monotonic()
            assert run.end(number) == 0
            assert time.monotonic() - before < 2
        assert "Traceback" not in run.said


def test_status_is_served(tmp_path: Path) -> None:
    with running(tmp_path, "run", "--link", link(tmp_path), "--subnet", "10.99.0.0/24", "--mtu", "1400") as run:
        run.wait_for("ready")
        shown = netstack(tmp_path, "status", "--json")
        assert (shown.returncode, shown.stderr) == (0, "")
        state = json.loads(shown.stdout)
        assert state["pid"] == run.process.pid
        assert state["network"] | {} == {
            "subnet": "10.99.0.0/24",
            "gateway": "10.99.0.2",
            "dns": "10.99.0.3",
            "subnet6": state["network"]["subnet6"],
            "gateway6": state["network"]["gateway6"],
            "dns6": state["network"]["dns6"],
            "mtu": 1400,
        }
        assert state["flows"]["tcp"] == 0
        table = netstack(tmp_path, "status")
        assert (table.returncode, table.stderr) == (0, "")
        assert f"process {run.process.pid}" in table.stdout
        assert "10.99.0.0/24" in table.stdout
        assert run.end() == 0
    gone = netstack(tmp_path, "status")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith("netstack: nobody answers at unix://")


def test_without_a_link_it_prints_what_qemu_wants(tmp_path: Path) -> None:
    with running(tmp_path, "run") as run:
        line = run.wait_for("-netdev")
        path = tmp_path / "netstack" / "qemu.sock"
        assert (
            f"-netdev stream,id=net0,addr.type=unix,addr.path={path} -device virtio-net-pci,netdev=net0,mac=52:" in line
        )
        run.wait_for("ready")
        assert path.is_socket()
        assert run.end() == 0


def test_the_tcp_api_prints_and_keeps_its_token(tmp_path: Path) -> None:
    with running(tmp_path, "run", "--link", link(tmp_path), "--api", "tcp://127.0.0.1:0") as run:
        line = run.wait_for("token")
        uri = next(word for word in line.split() if word.startswith("tcp://"))
        port = uri.rpartition(":")[2]
        place = tmp_path / "netstack" / f"api-{port}.token"
        run.wait_for("ready")
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert place.read_text().strip() in line
        shown = netstack(tmp_path, "status", "--json", "--api", uri)
        assert json.loads(shown.stdout)["pid"] == run.process.pid
        wrong = tmp_path / "wrong"
        wrong.write_text("no")
        refused = netstack(tmp_path, "status", "--api", uri, "--token-file", str(wrong))
        assert refused.returncode == 1
        assert "refuses the token" in refused.stderr
        assert run.end() == 0
        assert not place.exists()


def test_a_second_one_finds_the_default_api_taken_and_runs_all_the_same(tmp_path: Path) -> None:
    with running(tmp_path, "run", "--link", link(tmp_path)) as first:
        first.wait_for("ready")
        with running(tmp_path, "run", "--link", f"unix://{tmp_path}/other.sock") as second:
            assert "another process listens there" in second.wait_for("API")
            second.wait_for("ready")
            assert second.end() == 0
        assert json.loads(netstack(tmp_path, "status", "--json").stdout)["pid"] == first.process.pid
        named = netstack(
            tmp_path, "run", "--link", f"unix://{tmp_path}/o.sock", "--api", f"unix://{tmp_path}/netstack/api.sock"
        )
        assert named.returncode == 1
        assert "another process listens there" in named.stderr
        taken = netstack(tmp_path, "run", "--link", link(tmp_path), "--api", "none")
        assert taken.returncode == 1
        assert "in use by another process; end what listens there, or take another" in taken.stderr
        assert first.end() == 0


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text(f'[log]\nformat = "json"\n[[link]]\nuri = "{link(tmp_path)}"\n')
    with running(tmp_path, "run", "-c", str(file)) as run:
        run.wait_for("ready")
        file.write_text(f'[log]\nformat = "json"\n[network]\nmtu = 1300\n[[link]]\nuri = "{link(tmp_path)}"\n')
        run.process.send_signal(signal.SIGHUP)
        assert json.loads(run.wait_for("cannot change"))["setting"].startswith("network")
        file.write_text("[log]\nlevel = 'loud'\n")
        run.process.send_signal(signal.SIGHUP)
        line = json.loads(run.wait_for("the old ones stay"))
        assert line["error"].startswith(f"{file}:2: log.level: loud must be")
        assert run.end() == 0
    with running(tmp_path, "run", "--link", link(tmp_path)) as run:
        run.wait_for("ready")
        run.process.send_signal(signal.SIGHUP)
        run.wait_for("without a file")
        assert run.end() == 0


def test_a_pid_file_is_held_against_a_second_one(tmp_path: Path) -> None:
    pidfile = tmp_path / "n.pid"
    with running(tmp_path, "run", "--link", link(tmp_path), "--pidfile", str(pidfile)) as run:
        run.wait_for("ready")
        second = netstack(tmp_path, "run", "--link", f"unix://{tmp_path}/o.sock", "--pidfile", str(pidfile))
        assert second.returncode == 1
        assert f"netstack runs already, as process {run.process.pid}" in second.stderr
        assert run.end() == 0


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    (
        (
            "--link unix:///no/such/place/n.sock",
            "/no/such/place/n.sock: No such file or directory; make its directory",
            2,
        ),
        ("--link fd://99", "descriptor 99 is not an open socket", 2),
        ("--link fd://0", "descriptor 0 is not", 2),
        ("--link unix://TMP/file", "TMP/file exists and is not a socket; name another path", 2),
        ("--link vde://TMP/file", "TMP/file exists and is not a directory; name another path", 2),
        ("--pcap TMP/gone/a.pcapng", "TMP/gone/a.pcapng: No such file or directory; make its directory first", 2),
        ("--pcap TMP", "TMP: Is a directory; name a file", 2),
        ("--api unix://TMP/gone/a.sock", "cannot listen for the API at TMP/gone/a.sock: No such file or directory", 2),
    ),
)
def test_what_cannot_be_is_one_line(
    arguments: str,
    words: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process, which is quicker.
    monkeypatch.setattr("netstack.cli.service.raise_file_limit", lambda: None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "file").write_text("precious")
    given = arguments.replace("TMP", str(tmp_path)).split()
    if "--link" not in given:
        given += ["--link", link(tmp_path)]
    assert main(["run", *given]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words.replace("TMP", str(tmp_path)) in shown.err
    assert shown.err.startswith("netstack: ")
    assert shown.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_a_capture_is_a_whole_file_after_sigterm(tmp_path: Path) -> None:
    capture = tmp_path / "a.pcapng"
    with running(
        tmp_path, "run", "--link", link(tmp_path), "--subnet", "192.168.5.0/24", "--pcap", str(capture)
    ) as run:
        run.wait_for("ready")
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(tmp_path / "guest.sock"))
            # An ARP request for the gateway, as QEMU sends it: a length before each frame.
            arp = bytes.fromhex("0001080006040001" + "525400123456" + "c0a8050f" + "000000000000" + "c0a80502")
            frame = b"\xff" * 6 + bytes.fromhex("525400123456" + "0806") + arp
            guest.sendall(len(frame).to_bytes(4, "big") + frame)
            guest.settimeout(SECONDS)
            # Router advertisements come too; the answer ends with our own addresses.
            received = b""
            while bytes.fromhex("525400123456" + "c0a8050f") not in received:
                received += guest.recv(65536)
        assert run.end() == 0
    shown = netstack(tmp_path, "pcap", "show", "--json", str(capture))
    frames = [json.loads(line) for line in shown.stdout.splitlines()]
    assert shown.returncode == 0
    assert [frame["to_guest"] for frame in frames if "ARP" in frame["layers"] and "192.168.5.2" in frame["summary"]]
    assert {frame["to_guest"] for frame in frames} == {True, False}
    assert stat.S_IMODE(capture.stat().st_mode) == 0o600


def test_a_closed_standard_error_is_no_reason_to_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "netstack", "run", "--link", link(tmp_path), "--api", "none", "--ready-fd", str(write)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[write],
    )
    os.close(write)
    assert process.stderr is not None
    process.stderr.close()
    with os.fdopen(read) as pipe:
        assert pipe.read() == "ready\n"
    process.terminate()
    assert process.wait(SECONDS) == 0


def test_there_may_be_no_standard_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    given = ["--link", link(tmp_path), "--api", "none", "--ready-fd", str(write)]
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "netstack", "run", *given],
        stdin=subprocess.DEVNULL,
        env=environment(tmp_path),
        pass_fds=[write],
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "ready\n"
    process.terminate()
    assert process.wait(SECONDS) == 0


def test_sighup_with_the_runtime_directory_gone_ends_nothing(tmp_path: Path) -> None:
    runtime = tmp_path / "session"
    runtime.mkdir()
    file = tmp_path / "n.toml"
    file.write_text(f'[[link]]\nuri = "{link(tmp_path)}"\n')
    with running(tmp_path, "run", "-c", str(file), XDG_RUNTIME_DIR=str(runtime)) as run:
        run.wait_for("ready")
        shutil.rmtree(runtime)  # as at the end of a login session
        run.process.send_signal(signal.SIGHUP)
        assert "No such file or directory" in run.wait_for("the old ones stay")
        assert run.end() == 0


def test_the_pid_file_goes_when_the_sockets_have_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    remove = PidFile.remove

    def look_and_remove(pidfile: PidFile) -> None:
        seen.append((tmp_path / "guest.sock").exists())
        remove(pidfile)

    def tell(ready_fd: ReadyFd) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("netstack.cli.service.raise_file_limit", lambda: None)
    monkeypatch.setattr(PidFile, "remove", look_and_remove)
    monkeypatch.setattr(ReadyFd, "tell", tell)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    given = ["--link", link(tmp_path), "--api", "none", "--pidfile", str(tmp_path / "n.pid"), "--ready-fd", "2"]
    assert main(["run", *given]) == 0
    assert seen == [False]
    assert not (tmp_path / "n.pid").exists()


@pytest.mark.parametrize("kind", (socket.SOCK_STREAM, socket.SOCK_DGRAM), ids=("unconnected", "datagram"))
def test_a_descriptor_of_the_wrong_kind_is_bad_input(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("netstack.cli.service.raise_file_limit", lambda: None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with socket.socket(socket.AF_UNIX, kind) as wrong:
        assert main(["run", "--link", f"fd://{wrong.fileno()}", "--api", "none"]) == 2
        assert f"descriptor {wrong.fileno()} is not a" in capsys.readouterr().err


def test_a_refused_start_leaves_no_api_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("netstack.cli.service.raise_file_limit", lambda: None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))  # where the token would go
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    given = ["--link", link(tmp_path), "--api", f"unix://{tmp_path}/api.sock", "--api", "tcp://127.0.0.1:0"]
    assert main(["run", *given]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_socket()] == []


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_before_it_is_ready_is_a_normal_end_too(number: signal.Signals) -> None:
    """It comes while the modules are being loaded: in place of the command line's work."""
    program = f"""
import os, sys, netstack.cli
netstack.cli._run = lambda given: os.kill(os.getpid(), {int(number)}) or 7
sys.argv = ["netstack", "run"]
sys.exit(netstack.cli.main())
"""
    done = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
