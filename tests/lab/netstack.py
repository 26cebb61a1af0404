"""netstack as its users run it, for tests: a process of its own, in the namespace that stands for the host.

class Netstack starts `netstack run`, waits until it says that it is ready, reads its status over the API's socket,
and ends it with SIGTERM as systemd would. Its log stays in the test's folder. State, sockets and configuration are in
that folder too: nothing of the user who runs the tests is read or changed.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.lab.namespaces import Namespace

READY_TIMEOUT = 20.0


class Netstack:
    """A running `netstack run`."""

    def __init__(
        self,
        namespace: Namespace | None,
        folder: Path,
        *,
        links: Sequence[str],
        arguments: Sequence[str] = (),
        state: Path | None = None,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare one with the link URIs `links`.

        `state`: the folder of its leases, if they are to outlive it; `pass_fds`: descriptors for its fd:// links;
        `environment`: variables besides ours.

        `folder` takes its log and its sockets: keep its path short, a socket's path has 107 bytes at most. Without a
        namespace it runs where the caller does.
        """
        self.folder = folder
        self.log_path = folder / "netstack.log"
        self.api_path = folder / "api.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_after = 0.0
        self._namespace = namespace
        self._pass_fds = list(pass_fds)
        self._environment = dict(environment or {})
        self._command = [
            *(
                sys.executable,
                "-m",
                "netstack",
                "run",
                "--api",
                f"unix://{self.api_path}",
            ),
            *("--state-dir", str(state or folder / "state")),
            *(word for link in links for word in ("--link", link)),
            *arguments,
        ]

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError with its log when it does not become so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NETSTACK_"))}
        # Python would compile all of netstack at every start.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["XDG_RUNTIME_DIR"] = environment["XDG_STATE_HOME"] = environment["XDG_CONFIG_HOME"] = str(
            self.folder
        )
        environment |= self._environment
        reader, writer = os.pipe()
        command = [*self._command, "--ready-fd", str(writer)]
        if self._namespace is not None:
            command = [*self._namespace.words(), *command]
        start = time.monotonic()
        with self.log_path.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writer, *self._pass_fds],
                env=environment,
            )
        os.close(writer)
        try:
            arrived = select.select([reader], [], [], READY_TIMEOUT)[0]
            if not arrived or not os.read(reader, 64).startswith(b"ready"):
                self.kill()
                raise RuntimeError(f"netstack did not become ready:\n{self.log}")
        finally:
            os.close(reader)
        self.ready_after = time.monotonic() - start

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self.log_path.read_text(errors="replace")

    def stop(self, timeout: float = 10.0) -> int:
        """End it with SIGTERM; return its exit status. Raises RuntimeError, with its log, when it does not end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"netstack did not end within {timeout} s of SIGTERM:\n{self.log}") from None

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        """The JSON answer of its API to a GET."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(10)
        connection.sock.connect(str(self.api_path))
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, f"GET {path}: {answer.status} {body!r}"
            return json.loads(body)
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """The status of its API's answer, and the JSON in it; None where there is nothing."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(10)
        connection.sock.connect(str(self.api_path))
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"} if text else {})
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data else None
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """What GET /v1/status says."""
        found: dict[str, Any] = self.get("/v1/status")
        return found

    def memory(self) -> int:
        """Its resident memory in bytes."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
