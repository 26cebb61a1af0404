"""`netstack doctor`: that each check says what is so on this machine, and the exit status."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from netstack.cli import doctor, main
from netstack.cli.doctor import Check
from netstack.host.kvm import KvmState


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    # tests/rim/test_kvm.py has the real one, which may take its time.
    monkeypatch.setattr("netstack.host.kvm.probe_kvm", lambda: KvmState(False, "no", "do this"))


def test_json_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["ok"] else 1)
    assert len(report["checks"]) == len(doctor.CHECKS)
    for check in report["checks"]:
        assert set(check) == {"name", "state", "detail", "mend"}
        assert check["state"] in ("ok", "warning", "failure")
        assert check["detail"]
        assert check["state"] == "ok" or check["mend"]


def test_people_see_the_same_with_the_mending_below(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "WARN  KVM: no; QEMU emulates, many times slower\n      Do this.\n" in shown.out


def test_only_failures_make_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("a", "ok", "x"), lambda: Check("b", "warning", "x", "y")))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("a", "failure", "x", "Mend."),))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("FAIL  a: x\n      Mend.\n")


def test_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_runtime_directory() == Check("sockets", "ok", f"in {tmp_path}/netstack")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert doctor.check_runtime_directory().state == "failure"


def test_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    check = doctor.check_open_files()
    assert (check.state == "ok") == (hard == resource.RLIM_INFINITY or hard >= doctor.MANY_FILES)
    assert soft <= hard or hard == resource.RLIM_INFINITY


def test_tap_says_what_open_says() -> None:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError:
        assert doctor.check_tun().state == "warning"
    else:
        assert doctor.check_tun().state == "ok"


def test_ping_says_what_the_kernel_says() -> None:
    path = Path("/proc/sys/net/ipv4/ping_group_range")
    if not path.exists():
        pytest.skip("needs Linux")
    low, high = map(int, path.read_text().split())
    allowed = any(low <= group <= high for group in {os.getegid(), *os.getgroups()})
    check = doctor.check_ping()
    assert (check.state == "ok") == allowed
    assert allowed or "sysctl -w net.ipv4.ping_group_range" in check.mend


@pytest.mark.needs("qemu-system-x86_64")
def test_qemu_is_found() -> None:
    check = doctor.check_qemu()
    assert check.detail.startswith("qemu-system-")


def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check = doctor.check_qemu()
    assert (check.state, "in PATH" in check.detail) == ("warning", True)
