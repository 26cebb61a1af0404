"""The probe of KVM: what it says must be what a virtual machine would find."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from netstack.host.kvm import PROBE_SECONDS, KvmState, probe_kvm


def test_no_device(tmp_path: Path) -> None:
    state = probe_kvm(str(tmp_path / "kvm"))
    assert state == KvmState(False, f"there is no {tmp_path}/kvm", state.mend)
    assert "kvm_intel" in state.mend


def test_a_device_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    for path in (str(tmp_path / "kvm"), "/dev/null"):
        state = probe_kvm(path)
        assert not state.usable
        assert "KVM_GET_API_VERSION failed: Inappropriate ioctl for device" in state.reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_that_may_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch(mode=0)
    assert "no permission" in probe_kvm(str(tmp_path / "kvm")).reason


def test_the_probe_ends_in_time_whatever_the_device_does() -> None:
    # Also where /dev/kvm is there and crawls: that is what the time limit is for.
    before = time.monotonic()
    state = probe_kvm()
    assert time.monotonic() - before < PROBE_SECONDS + 5
    assert state.reason
    if state.usable and platform.machine() == "x86_64":
        assert state.reason == "runs a guest"


def test_a_time_limit_of_nothing_means_unusable() -> None:
    assert not probe_kvm(seconds=0.0).usable
