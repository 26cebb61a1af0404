"""`netstack top`: rates from counts, and the pictures on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from netstack.cli.top import Sampler, draw
from tests.cli.programs import SECONDS, environment, netstack, running

ADDRESSES = ["192.168.5.15", "fd00::15"]
GUEST = {"name": "debian", "mac": "52:54:00:00:00:01", "addresses": ADDRESSES, "link": "q#1", "seen": 1}


def state(link: int, *flows: tuple[str, int], drops: int = 0, queries: int | None = None) -> dict[str, Any]:
    return {
        "version": "9",
        "uptime": 1.0,
        "network": {"subnet": "192.168.5.0/24", "subnet6": "fd00::/64"},
        "links": [{"name": "q#1", "connected": True, "bytes_from_guest": link, "bytes_to_guest": 2 * link}],
        "guests": [GUEST],
        "flows": {
            "tcp": len(flows),
            "udp": 0,
            "icmp": 0,
            "limit": 9,
            "list": [
                {"protocol": "tcp", "guest": guest, "peer": "192.0.2.1:80", "state": "ESTABLISHED", "age": 1.0}
                | {"bytes_from_guest": count, "bytes_to_guest": 0}
                for guest, count in flows
            ],
        },
        "counters": {} if queries is None else {"dns_udp_queries": queries},
        "drops": {"too_short": drops},
    }


def test_rates_are_what_changed_over_the_time_between() -> None:
    sampler = Sampler()
    first = sampler.sample(state(1000, ("192.168.5.15:1", 500), drops=3), 10.0)
    assert first["links"][0]["rate_from_guest"] == 0
    second = sampler.sample(state(3000, ("192.168.5.15:1", 900), ("[fd00::15]:2", 100), drops=4, queries=6), 12.0)
    (link,) = second["links"]
    assert (link["rate_from_guest"], link["rate_to_guest"]) == (1000, 2000)
    assert [(flow["guest"], flow["rate_from_guest"]) for flow in second["flows"]["list"]] == [
        ("192.168.5.15:1", 200),
        ("[fd00::15]:2", 50),
    ]
    (guest,) = second["guests"]
    assert (guest["rate_from_guest"], guest["flows"]) == (250, 2)
    assert second["drops"] == {"too_short": {"total": 4, "rate": 0.5}}
    assert second["dns"] == {"queries": {"total": 6, "rate": 3}}
    # A flow with the same name that has begun anew, and no time at all.
    third = sampler.sample(state(3000, ("192.168.5.15:1", 10)), 13.0)
    assert third["flows"]["list"][0]["rate_from_guest"] == 0
    assert sampler.sample(state(9000), 13.0)["links"][0]["rate_from_guest"] == 0


def test_the_busiest_flows_are_drawn_first_and_no_more_than_fit() -> None:
    from rich.console import Console

    sampler = Sampler()
    sampler.sample(state(0), 0.0)
    flows = [(f"192.168.5.15:{port}", port) for port in range(1, 100)]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(draw(sampler.sample(state(0, *flows), 1.0), 3))
    text = console.export_text()
    assert "Busiest flows (96 more)" in text
    assert re.findall(r"192\.168\.5\.15:(\d+)", text) == ["99", "98", "97"]
    console.file.close()


def test_names_of_guests_cannot_write_to_the_terminal() -> None:
    from rich.console import Console

    hostile = state(0)
    hostile["guests"] = [{**GUEST, "name": "\x1b[2J[red]x"}]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(draw(Sampler().sample(hostile, 0.0)))
    text = console.export_text()
    assert "\\x1b[2J[red]x" in text
    assert "\x1b[2J" not in text
    console.file.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("top")
    folder.joinpath("n.toml").write_text('[dns]\nsource = "none"\nmdns = false\n')
    with running(folder, "run", "-c", str(folder / "n.toml"), "--link", f"unix://{folder}/q") as run:
        run.wait_for("ready")
        yield folder


def test_pictures_follow_each_other_in_a_pipe(place: Path) -> None:
    done = netstack(place, "top", "--count", "2", "--interval", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Guests") == 2
    assert "DNS: no queries yet" in done.stdout
    done = netstack(place, "top", "--count", "2", "--interval", "0.1", "--json")
    assert [sorted(json.loads(line)) for line in done.stdout.splitlines()] == [
        sorted(("version", "uptime", "network", "flows", "links", "guests", "forwards", "dns", "drops"))
    ] * 2


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_on_a_terminal_it_draws_until_it_is_told_to_end(place: Path, number: int) -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "netstack", "top", "--interval", "0.1"]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment(place, TERM="xterm"))
    os.close(its)
    drawn = b""
    deadline = time.monotonic() + SECONDS
    while drawn.count(b"Busiest flows") < 3 and time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            drawn += os.read(ours, 65536)
    assert b"\x1b[?1049h" in drawn  # the alternate screen
    process.send_signal(number)
    rest = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
        while select.select([ours], [], [], deadline - time.monotonic())[0]:
            rest += os.read(ours, 65536)
    process.wait(SECONDS)
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[?1049l" in rest
    assert b"Traceback" not in rest


def test_it_ends_when_the_network_does(tmp_path: Path) -> None:
    done = netstack(tmp_path, "top", "--count", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("netstack: nobody answers at unix://")
    assert done.stderr.count("\n") == 1
    assert netstack(tmp_path, "top", "--interval", "0").returncode == 2


def test_leases_and_flows_are_shown(place: Path) -> None:
    assert netstack(place, "leases").stdout == "Leases: none\n"
    assert json.loads(netstack(place, "leases", "--json").stdout) == {"leases": []}
    assert netstack(place, "flows").stdout == "Flows: none\nof 0 TCP, 0 UDP and 0 ICMP flows in all\n"
    assert json.loads(netstack(place, "flows", "--json", "--protocol", "udp").stdout)["list"] == []
    done = netstack(place, "flows", "--protocol", "sctp")
    assert (done.returncode, done.stderr) == (2, "netstack: --protocol sctp: must be one of tcp, udp, icmp\n")
    assert netstack(place, "flows", "--limit", "-1").returncode == 2
