"""The gateway's proxy against no proxy: the section `proxy` of `python -m benchmarks`.

A guest talks to a server on the host's loopback, by a connection of its own and through `http://gateway:3128`, one
after the other in each round, over the tap link at MTU 1500 with offload and over the stream link at MTU 65520.

    up, down     one stream through CONNECT; and over the throughput of the direct flow ("share")
    get          bodies of 64 MiB that the proxy reads and passes on (no CONNECT), over the same without a proxy
    first        from connect() to the server's first byte: what the proxy adds at the median
    many         500 tunnels that are asked for at once: until the last server has answered
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import proxy_metric
from benchmarks.lab import Lab, LabError, is_listening, stop, wait_until
from benchmarks.peers import GATEWAY, LARGE, SMALL, Netstack, Surroundings
from benchmarks.tap_peers import NetstackTap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.figures import Figures
    from benchmarks.peers import Attachment

CALLER = [sys.executable, "-I", str(Path(__file__).with_name("proxy_caller.py"))]
PORT, PROXY_PORT, MANY = 5401, 3128, 500


class Bench:
    """One run."""

    def __init__(self, lab: Lab, figures: Figures, relay: Sequence[str], seconds: float) -> None:
        self.lab = lab
        self.figures = figures
        self.seconds = seconds
        self.host = lab.host()
        config = lab.directory / "proxy.toml"
        config.write_text('[dns]\nsource = "none"\n[proxy]\nsources = ["settings"]\n')
        self._around = Surroundings(lab, self.host, relay, ("-c", str(config)))

    def take(self, peer: Netstack, mtu: int) -> None:
        """All figures of one link in one round."""
        server = self.lab.spawn(self.host, [*CALLER, "serve", str(PORT)])
        attachment = peer.attach(self._around, mtu)
        try:
            wait_until(lambda: is_listening(server.pid, PORT), "the server listening")
            self._take(attachment)
        finally:
            attachment.end()
            stop(server)

    def _take(self, attachment: Attachment) -> None:
        self._call(attachment, "first", "connect", "0.2")  # the proxy's code is imported by its first connection
        for way in ("up", "down"):
            direct = self._call(attachment, "stream", way, "direct", f"{self.seconds:g}")
            tunnel = self._call(attachment, "stream", way, "connect", f"{self.seconds:g}")
            self._note(attachment, f"tcp.{way}", tunnel)
            self._note(attachment, f"share.{way}", tunnel / direct)
        short = min(self.seconds, 2.0)
        rates = self._call(attachment, "get", f"{short:g}")
        self._note(attachment, "tcp.get", rates["proxy"])
        self._note(attachment, "share.get", rates["proxy"] / rates["direct"])
        times = {how: self._call(attachment, "first", how, f"{short:g}") for how in ("direct", "connect")}
        self._note(attachment, "first", times["connect"]["p50"])
        self._note(attachment, "first.added", times["connect"]["p50"] - times["direct"]["p50"])
        self._note(attachment, "many", self._call(attachment, "many", str(MANY)))

    def _call(self, attachment: Attachment, *words: str) -> Any:
        places = [f"SERVER={GATEWAY}:{PORT}", f"PROXY={GATEWAY}:{PROXY_PORT}"]
        return json.loads(attachment.guest.run(["env", *places, *CALLER, *words], seconds=self.seconds + 60))

    def _note(self, attachment: Attachment, which: str, value: float) -> None:
        self.figures.add(proxy_metric(which), attachment.peer, value)


def measure_proxy(
    figures: Figures, relay: Sequence[str], lab: Lab, *, seconds: float, rounds: int, say: Callable[[str], None]
) -> None:
    """Take the figures of this section; what cannot be taken is said."""
    bench = Bench(lab, figures, relay, seconds)
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}: proxy")
        for peer, mtu in ((NetstackTap(), SMALL), (Netstack(), LARGE)):
            try:
                bench.take(peer, mtu)
            except LabError as error:
                figures.fail(proxy_metric("share.up"), peer.name, str(error))
                say(f"  {peer.name}: {error}")
