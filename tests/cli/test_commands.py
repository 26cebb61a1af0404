"""What every command owes: help with an example, one line for a mistake, and the right exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netstack.cli import COMMANDS, main
from netstack.version import __version__
from tests.cli.programs import netstack

EVERY_COMMAND = [[], *([name] for name in COMMANDS), ["pcap", "show"]]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
@pytest.mark.parametrize("flag", ("--help", "-h"))
def test_help_has_an_example(command: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, flag]) == 0
    shown = capsys.readouterr()
    words = " ".join(["netstack", *command])
    assert shown.out.startswith(f"Usage: {words}")
    assert f"Example: {words}" in " ".join(shown.out.split())
    assert shown.err == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"netstack {__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    (
        ("nonsense", "No such command 'nonsense'; see netstack --help"),
        ("--nonsense", "No such option: --nonsense"),
        ("run --mtuu 3", "No such option: --mtuu"),
        ("run --mtu", "--mtu"),
        ("run --mtu x", "Invalid value for '--mtu'"),
        ("run --mtu 1", "--mtu 1 must be 1280 or more"),
        ("run --subnet 192.168.5.7/24", "--subnet 192.168.5.7/24 is an address in a network; write 192.168.5.0/24"),
        ("run --link stdio:", "--link stdio:: links of the kind stdio: are not supported yet"),
        ("run --link tap://tap0", "--link tap://tap0: say in which network namespace the tap is to be"),
        ("run --link tap://t?netns=/none", "network namespace /none: No such file or directory; make it first"),
        ("run --api tcp://0.0.0.0:1", "--api tcp://0.0.0.0:1: the API is served on loopback only"),
        ("run --log-level loud", "--log-level loud must be"),
        ("run --log-format xml", "--log-format xml must be 'console' or 'json'"),
        ("run -p 8080", "-p 8080: which port of the host?"),
        ("run --config /none.toml", "/none.toml: No such file or directory"),
        ("run --ready-fd 999", "--ready-fd 999: no such open file descriptor"),
        ("run --pidfile /none/n.pid", "--pidfile /none/n.pid: there is no directory /none"),
        ("run surplus", "Got unexpected extra argument(s) (surplus)"),
        ("qemu", "Missing argument"),
        ("qemu -- no-such-qemu", "no-such-qemu: no such program; install QEMU"),
        ("qemu --mac 1 -- true", "--mac 1 must be a MAC address"),
        ("qemu -- true -daemonize", "-daemonize: this network lives as long as QEMU does"),
        ("qemu --mtu 1 -- true", "--mtu 1 must be 1280 or more"),
        ("status --api http://x", "http://x: the API listens at unix:///PATH"),
        ("status --api tcp://127.0.0.1:9", "name the API's token with --token-file"),
        ("pcap show /none.pcap", "/none.pcap: No such file or directory"),
        ("pcap show /", "/: Is a directory"),
        ("pcap show --limit -1 x", "Invalid value for '--limit'"),
    ),
)
def test_bad_input_is_one_line_and_status_2(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("netstack: ")
    assert words in shown.err
    assert shown.err.count("\n") == 1


def test_a_mistake_in_the_file_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "n.toml"
    file.write_text("[network]\nmtu = 1500\nsubnett = 'auto'\n")
    assert main(["run", "-c", str(file)]) == 2
    assert capsys.readouterr().err == f"netstack: {file}:3: unknown key 'subnett' in network; did you mean subnet?\n"


def test_nothing_to_do_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["pcap"]):
        assert main(command) == 2
        assert "Usage: netstack" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    shown = netstack(tmp_path, "--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"netstack {__version__}\n", "")


def test_a_start_imports_nothing_that_it_does_not_use() -> None:
    # What `netstack run` imports before it is ready; the time it has for that is half a second.
    program = (
        "import sys, netstack.cli.run, netstack.cli.service, netstack.cli.serving, netstack.gateway;"
        "heavy = {'rich', 'structlog', 'scapy', 'hypercorn', 'starlette', 'httpx', 'h11', 'asyncio', 'tomllib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("[pcap]\nfile = '~no-such-user/x'\n", ":2: pcap.file: ~no-such-user/x: nobody knows that home directory"),
        ("a = " + "[" * 5000, ": nests too deeply"),
        ("a = " + "1" * 5000, ": nests too deeply, or has a number of too many digits"),
    ),
    ids=("home", "nested", "digits"),
)
def test_an_odd_file_is_one_line(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "n.toml"
    file.write_text(text)
    assert main(["run", "-c", str(file)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"netstack: {file}{words}")
    assert shown.count("\n") == 1


def test_a_user_without_a_home_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["run", "--link", f"unix://{tmp_path}/n.sock", "--api", "none"]) == 2
    assert "set HOME or XDG_STATE_HOME, or give --state-dir" in capsys.readouterr().err


@pytest.mark.parametrize("content", (b"", b"\n", b"two\nlines", "schlüssel".encode()))
def test_a_token_file_without_a_token_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    assert main(["status", "--api", "tcp://127.0.0.1:9", "--token-file", str(file)]) == 2
    assert capsys.readouterr().err == f"netstack: {file} holds no token: name the API's token with --token-file\n"


def test_a_token_file_that_is_no_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\xff\xfe")
    assert main(["status", "--api", "tcp://127.0.0.1:9", "--token-file", str(file)]) == 2
    assert capsys.readouterr().err == f"netstack: {file} holds no token: name the API's token with --token-file\n"


@pytest.mark.parametrize("answer", ({}, {"network": 1, "flows": []}))
def test_an_api_that_is_not_ours_is_one_line(
    answer: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("netstack.cli.status.ask_api", lambda *given: answer)
    assert main(["status"]) == 1
    assert capsys.readouterr().err.startswith("netstack: what answers is not netstack")


@pytest.mark.parametrize("command", ("doctor", "doctor --json", "pcap show FILE"))
def test_results_that_a_full_disk_swallowed_are_a_failure(command: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pcap"
    header = bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000")
    file.write_bytes(header + bytes(8) + (60).to_bytes(4, "little") * 2 + bytes(60))
    arguments = [str(file) if word == "FILE" else word for word in command.split()]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [sys.executable, "-m", "netstack", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=inherited | {"XDG_RUNTIME_DIR": str(tmp_path)},
        )
    assert ended.returncode == 1
    assert ended.stderr == "netstack: standard output: No space left on device; make room, or take another place\n"
