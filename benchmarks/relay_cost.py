"""What the relay costs by itself: two guests whose relays are joined back to back, beside the same two on a veth pair.

No user-mode network is between them, so what two relays take from the throughput, and add to a round trip, is twice
what one takes and adds in the figures of the peers that sit behind a relay. The guests' kernels are in both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Figures, Metric
from benchmarks.lab import Lab, LabError
from benchmarks.peers import LARGE, SMALL, TAP, Attachment, Surroundings, attach_relay, configure_tap

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST, SECOND = "192.168.7.1", "192.168.7.2"
RELAYS, VETH = "two relays", "veth"


def throughput_metric(mtu: int, streams: int) -> Metric:
    words = f"guest → guest, MTU {mtu}, {streams} stream{'s' if streams > 1 else ''}"
    return Metric(f"relay.tcp.{mtu}.{streams}", "relay", words, "Gbit/s", more_is_better=True)


ROUND_TRIP = Metric("relay.rr.p50", "relay", "round trip guest ↔ guest, TCP, 1 byte, p50", "µs")


def join_with_relays(around: Surroundings, mtu: int) -> tuple[Attachment, load.Servers]:
    """Two guests, each with a tap and a relay, the relays' streams the two ends of a socket pair."""
    client, server = around.lab.guest("client"), around.lab.guest("server")
    one, other = socket.socketpair()
    with one, other:
        for end in (one, other):
            os.set_inheritable(end.fileno(), True)
        near = attach_relay(around, client, str(one.fileno()), pass_fds=[one.fileno()])
        far = attach_relay(around, server, str(other.fileno()), pass_fds=[other.fileno()])
    configure_tap(client, mtu, f"{FIRST}/24", None, "52:54:00:00:00:01")
    configure_tap(server, mtu, f"{SECOND}/24", None, "52:54:00:00:00:02")
    return Attachment(RELAYS, mtu, client, SECOND, near, far), load.Servers(around.lab, server)


def join_with_veth(lab: Lab, mtu: int) -> tuple[Attachment, load.Servers]:
    """Two guests on a veth pair; nobody's process is between them, so the attachment's is a server that sleeps."""
    client, server = lab.guest("client"), lab.guest("server")
    client.ip("link", "add", TAP, "type", "veth", "peer", "name", TAP, "netns", server.name)
    configure_tap(client, mtu, f"{FIRST}/24", None, "52:54:00:00:00:01")
    configure_tap(server, mtu, f"{SECOND}/24", None, "52:54:00:00:00:02")
    # Without offload, as the taps are: else the kernel hands 64 KiB segments across at any MTU.
    for guest in (client, server):
        with contextlib.suppress(LabError):  # no ethtool here: the veth is then faster than it ought to be
            guest.run(["ethtool", "--offload", TAP, "tso", "off", "gso", "off", "gro", "off", "tx", "off"])
    sleeper = lab.spawn(client, ["sleep", "infinity"])
    return Attachment(VETH, mtu, client, SECOND, sleeper), load.Servers(lab, server)


def measure_relay(around: Surroundings, figures: Figures, seconds: float, say: Callable[[str], None]) -> None:
    """Both ways of joining, in turns: throughput three times for each MTU, round trips in several short runs.

    With 1 and with 8 streams: what becomes less there by itself cannot be kept up by whoever is behind a relay.
    """
    for mtu in (LARGE, SMALL):
        pairs = (join_with_relays(around, mtu), join_with_veth(around.lab, mtu))
        for streams, (attachment, servers) in itertools.product((1, 8, 1, 8, 1, 8), pairs):
            metric = throughput_metric(mtu, streams)
            try:
                run = load.measure_tcp(servers, attachment, "up", streams, seconds)
            except LabError as error:
                figures.fail(metric, attachment.peer, str(error))
                continue
            figures.add(metric, attachment.peer, run.gbits)
            say(f"  {metric.title}: {attachment.peer} {run.gbits:.1f} Gbit/s")
        if mtu == SMALL:
            for attachment, _ in pairs * 5:
                figures.add(ROUND_TRIP, attachment.peer, load.measure_round_trips(attachment, "tcp", 1, 0.5).p50)
        for attachment, servers in pairs:
            attachment.end()
            servers.end()


def relay_microseconds(figures: Figures) -> float | None:
    """What one relay adds to a round trip."""
    relays, veth = figures.median(ROUND_TRIP.key, RELAYS), figures.median(ROUND_TRIP.key, VETH)
    return (relays - veth) / 2 if relays is not None and veth is not None else None
