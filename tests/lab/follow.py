"""Prints the routing table, as a line of JSON, now and whenever it changes: `python -m tests.lab.follow [KIND]`.

Run in a namespace it is the follower as netstack has it, and nothing else of netstack.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import trio

from netstack.dns.follower import Follower
from netstack.dns.source_auto import HostSource, Kind

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from netstack.dns.routes import RoutingTable
    from tests.lab.namespaces import Namespace


def main(kind: str = "auto") -> None:
    """Follow this host until killed."""
    source = HostSource(cast("Kind", kind))
    follower = Follower(source)

    def show(was: RoutingTable, table: RoutingTable) -> None:
        view = {
            "at": time.monotonic(),
            "why": source.why,
            "routes": {line["domain"]: line["servers"] for line in table.describe()},
            "scopes": {scope.key: [str(server) for server in scope.servers] for scope in table.scopes},
            "interfaces": {line["domain"]: line["interfaces"] for line in table.describe()},
            "search": table.search,
            "changed": sorted(was.changed_keys(table)),
        }
        print(json.dumps(view), flush=True)

    follower.subscribe(show)
    show(follower.table, follower.table)
    trio.run(follower.run)


class Watcher:
    """The program above, in a namespace, seen from the test."""

    def __init__(self, namespace: Namespace, kind: str = "auto") -> None:
        import subprocess
        import threading

        command = (sys.executable, "-m", "tests.lab.follow", kind)
        self.process: subprocess.Popen[str] = namespace.popen(*command, stdout=subprocess.PIPE, text=True)
        self.views: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.views.append(json.loads(line))

    def wait(self, fits: Callable[[dict[str, Any]], bool], seconds: float = 10.0) -> dict[str, Any]:
        """The newest view, once it fits. Raises TimeoutError with what was seen instead."""
        deadline = time.monotonic() + seconds
        while not (self.views and fits(self.views[-1])):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not seen; last was {self.views[-1:]}")
            time.sleep(0.01)
        return self.views[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._thread.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
