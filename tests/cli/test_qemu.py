"""`netstack qemu`: the command line it makes, the life it shares with QEMU, and QEMU itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netstack.cli import qemu
from netstack.host.kvm import KvmState
from tests.cli.programs import SECONDS, environment, netstack, running

pytestmark = pytest.mark.timeout(90)

Shown = subprocess.CompletedProcess[str]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A program that says it is QEMU, shows its command line, and then does what the test wants of it."""
    path = tmp_path / "qemu-system-x86_64"
    path.write_text(
        """#!/bin/sh
        if [ "$1" = --version ]; then echo "QEMU emulator version ${FAKE_VERSION:-8.1.0}"; exit 0; fi
        echo "$@"
        eval "$FAKE_BODY"
        """
    )
    path.chmod(0o755)
    return path


def run_fake(
    tmp_path: Path, fake: Path, body: str, *arguments: str, version: str = "8.1.0", line: str = "-m 1G"
) -> Shown:
    return subprocess.run(
        [sys.executable, "-m", "netstack", "qemu", *arguments, "--", str(fake), *line.split()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(tmp_path, FAKE_BODY=body, FAKE_VERSION=version, TMPDIR=str(tmp_path)),
    )


def test_the_status_is_qemus(tmp_path: Path, fake: Path) -> None:
    for body, status in (("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)):
        shown = run_fake(tmp_path, fake, body)
        assert (shown.returncode, shown.stderr) == (status, "")


def test_the_options_are_added(tmp_path: Path, fake: Path) -> None:
    card = ("--mtu", "1400", "--mac", "52-54-00-00-00-0A")
    shown = run_fake(tmp_path, fake, "exit 0", "--no-vhost-user", *card).stdout
    assert shown.startswith("-m 1G -netdev stream,id=netstack0,addr.type=fd,addr.str=")
    assert shown.endswith(" -device virtio-net-pci,netdev=netstack0,host_mtu=1400,mac=52:54:00:00:00:0a\n")
    shown = run_fake(tmp_path, fake, "exit 0", "--no-vhost-user", version="6.2.0").stdout
    assert "-netdev socket,id=netstack0,fd=" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (vhost-user)")
def test_the_guests_memory_is_shared_where_it_can_be(tmp_path: Path, fake: Path) -> None:
    shown = run_fake(tmp_path, fake, "exit 0", "--mtu", "1400", "--mac", "52-54-00-00-00-0A").stdout
    assert shown.startswith("-m 1G -object memory-backend-memfd,id=netstack-memory,share=on,size=1G -machine memory-")
    assert "-netdev vhost-user,id=netstack0,chardev=netstack0" in shown
    assert shown.endswith(",vectors=0,mac=52:54:00:00:00:0a\n")
    shown = run_fake(tmp_path, fake, "exit 0", line="-m 1G -numa node,mem=1G").stdout
    assert "-netdev stream,id=netstack0,addr.type=fd" in shown


def test_qemu_gets_a_link_that_works(tmp_path: Path, fake: Path) -> None:
    """Through the descriptor on its command line, an ARP request is answered by the gateway."""
    body = f"""exec {sys.executable} - "$@" <<'END'
import socket, sys
fd = int(sys.argv[sys.argv.index("-netdev") + 1].rpartition("=")[2])
guest = socket.socket(fileno=fd)
guest.settimeout({SECONDS})
frame = bytes.fromhex("ffffffffffff5254001234560806000108000604000152540012345600000000000000000000c0a80502")
guest.sendall(len(frame).to_bytes(4, "big") + frame)
data = b""
while b"\\x08\\x06\\x00\\x01\\x08\\x00\\x06\\x04\\x00\\x02" not in data:
    piece = guest.recv(65536)
    assert piece
    data += piece
END"""
    shown = run_fake(tmp_path, fake, body, "--subnet", "192.168.5.0/24", "--no-vhost-user")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_the_link_ends_when_qemu_does_and_nothing_is_left(tmp_path: Path, fake: Path) -> None:
    run_fake(tmp_path, fake, "exit 0", "--api", f"unix://{tmp_path}/a.sock")
    run_fake(tmp_path, fake, "exit 0", "--no-vhost-user", "--api", f"unix://{tmp_path}/a.sock")
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == [fake.name]
    assert not list(tmp_path.glob("netstack-*"))


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_signals_are_passed_on(number: int, tmp_path: Path, fake: Path) -> None:
    body = "trap 'exit 9' TERM INT HUP; echo up >&2; while :; do sleep 0.05; done"
    with running(tmp_path, "qemu", str(fake), FAKE_BODY=body) as run:
        run.wait_for("up")
        assert run.end(number) == 9


def test_kvm_is_taken_only_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[KvmState] = []

    def probe(state: KvmState) -> None:
        def answer() -> KvmState:
            asked.append(state)
            return state

        monkeypatch.setattr("netstack.host.kvm.probe_kvm", answer)

    probe(KvmState(True, "runs a guest"))
    assert qemu.choose_accelerator(["q", "-accel", "auto"]) == ["q", "-accel", "kvm"]
    assert qemu.choose_accelerator(["q", "-m", "1G"]) == ["q", "-m", "1G"]
    assert len(asked) == 1  # and who does not ask for KVM does not wait for the probe
    assert capsys.readouterr().err == ""
    probe(KvmState(False, "/dev/kvm is there, but it crawls", "buy another machine"))
    assert qemu.choose_accelerator(["q", "-enable-kvm"]) == ["q", "-accel", "tcg"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "QEMU runs without KVM, many times slower: /dev/kvm is there, but it crawls" in line
    assert "to mend it, buy another machine" in line


@pytest.mark.needs("qemu-system-x86_64")
@pytest.mark.parametrize(
    ("options", "line", "kind"),
    (
        ([], "-M q35 -m 256", "vhost-user"),
        ([], "", "vhost-user"),
        ([], "-m 256M,slots=2,maxmem=1G", "stream"),
        (["--no-vhost-user"], "-m 256", "stream"),
    ),
)
def test_the_real_qemu_takes_the_options(tmp_path: Path, options: list[str], line: str, kind: str) -> None:
    program = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio", *line.split()]
    shown = subprocess.run(
        [sys.executable, "-m", "netstack", "qemu", *options, "--", *program],
        input="info network\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(tmp_path),
    )
    assert shown.returncode == 0, shown.stderr
    assert "model=virtio-net-pci" in shown.stdout
    assert f"netstack0: index=0,type={kind}" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.needs("qemu-system-x86_64")
def test_qemus_own_refusal_is_passed_on(tmp_path: Path) -> None:
    shown = netstack(tmp_path, "qemu", "--", "qemu-system-x86_64", "-no-such-option")
    assert shown.returncode == 1
    assert "no-such-option" in shown.stderr
