"""Running the real command as a process of its own, and waiting for what it says."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 30.0  # generous: a deadline for a machine that is busy, never a time that is waited


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """An environment in which every file of netstack is in `tmp_path`."""
    private = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "NO_COLOR": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "FORCE_COLOR")}
    return inherited | private | more


def netstack(tmp_path: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "netstack", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(tmp_path),
        **more,
    )


class Running:
    """A command that runs, and what it has said so far on standard error."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.said = ""

    def wait_for(self, words: str) -> str:
        """Read until `words` have been said; returns the line that holds them."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + SECONDS
        while words not in self.said or not self.said.split(words, 1)[1].count("\n"):
            ready, _, _ = select.select([self.process.stderr], [], [], deadline - time.monotonic())
            data = os.read(self.process.stderr.fileno(), 65536) if ready else b""
            assert data, f"{words!r} was never said, but:\n{self.said}"
            self.said += data.decode()
        return next(line for line in self.said.splitlines() if words in line)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end, reading what is still said."""
        _, rest = self.process.communicate(timeout=SECONDS)
        self.said += rest.decode()
        return self.process.returncode


@contextmanager
def running(tmp_path: Path, *arguments: str, pass_fds: Sequence[int] = (), **more: str) -> Iterator[Running]:
    """Start a command; it is killed if it still runs at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "netstack", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path, **more),
        pass_fds=pass_fds,
    )
    try:
        yield Running(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
