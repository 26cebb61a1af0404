"""A grid of bad wires: everything arrives, once and in order, and what that costs is compared to a snapshot.

A cell that gets dearer or cheaper by more than the tolerance fails. When that was the purpose of a change, write the
snapshot again and look at its difference: `NETSIM_UPDATE=1 python -m pytest tests/netsim`. A cell that fails leaves a
pcap of its run behind.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

import pytest

from tests.netsim.wire import Conditions, Result, Simulation, write_pcap

SNAPSHOT = Path(__file__).with_name("snapshot.txt")
PCAPS = Path(__file__).parents[2] / ".cache" / "netsim"

# Costs may differ by so much: a change of policy that touches every cell a little is not a regression.
TOLERANCE = 0.3

WIRES = {
    "clean": Conditions(),
    "loss 0.1%": Conditions(loss=0.001),
    "loss 1%": Conditions(loss=0.01),
    "loss 5%": Conditions(loss=0.05),
    "loss 20%": Conditions(loss=0.2),
    "duplicates 10%": Conditions(duplication=0.1),
    "reordering 10%": Conditions(reordering=0.1),
    "all of it": Conditions(loss=0.02, duplication=0.02, reordering=0.05),
    "short queue": Conditions(bits_per_second=1e9, queue=64),
    "slow": Conditions(delay=0.05, bits_per_second=1e7, queue=100),
    "late": Conditions(delay=0.4),
    "dead for 3 s": Conditions(delay=0.002, bits_per_second=1e8, dead=(0.02, 3.02)),
}
SIZES = {"up": (1_500_000, 100), "down": (100, 1_500_000), "both": (750_000, 750_000)}
MTUS = (1500, 65520)

CELLS = [(wire, mtu, direction) for wire in WIRES for mtu in MTUS for direction in SIZES]


@cache
def simulate(wire: str, mtu: int, direction: str, *, record: bool = False) -> Result:
    """One cell; the same for the same arguments."""
    chance = random.Random(f"{wire} {mtu} {direction}")
    up, down = (chance.randbytes(size) for size in SIZES[direction])
    return Simulation(WIRES[wire], mtu, up, down, chance.randrange(1 << 30), record=record).run()


def _row(wire: str, mtu: int, direction: str, result: Result) -> str:
    costs = (
        f"{result.seconds:10.4f} {result.frames_up:6} {result.frames_down:6} {result.retransmits:6} {result.timeouts:6}"
    )
    return f"{wire:16} {mtu:6} {direction:5} {costs}  {result.states}"


HEAD = (
    f"{'wire':16} {'MTU':>6} {'':5} {'seconds':>10} {'up':>6} {'down':>6} {'again':>6} {'timer':>6}  states at the end"
)


def _snapshot() -> dict[tuple[str, int, str], list[float]]:
    rows = {}
    for line in SNAPSHOT.read_text().splitlines()[1:]:
        wire, rest = line[:16].strip(), line[16:].split()
        rows[wire, int(rest[0]), rest[1]] = [float(each) for each in rest[2:7]]
    return rows


@pytest.mark.parametrize(("wire", "mtu", "direction"), CELLS, ids=lambda value: str(value).replace(" ", "_"))
def test_everything_arrives_at_the_usual_cost(wire: str, mtu: int, direction: str) -> None:
    try:
        result = simulate(wire, mtu, direction)
        if not os.environ.get("NETSIM_UPDATE"):
            _compare(wire, mtu, direction, result)
    except AssertionError:
        _leave_pcap(wire, mtu, direction)
        raise


def _compare(wire: str, mtu: int, direction: str, result: Result) -> None:
    was = _snapshot()[wire, mtu, direction]
    now = [result.seconds, result.frames_up, result.frames_down, result.retransmits, result.timeouts]
    for name, before, after, slack in zip(
        ("seconds", "frames up", "frames down", "retransmissions", "timeouts"),
        was,
        now,
        (0.01, 10, 10, 5, 3),
        strict=True,
    ):
        assert abs(after - before) <= before * TOLERANCE + slack, f"{name}: {before:g} in the snapshot, {after:g} now"


def _leave_pcap(wire: str, mtu: int, direction: str) -> None:
    chance = random.Random(f"{wire} {mtu} {direction}")
    up, down = (chance.randbytes(size) for size in SIZES[direction])
    again = Simulation(WIRES[wire], mtu, up, down, chance.randrange(1 << 30), record=True)
    try:
        again.run()
    except AssertionError as error:
        print(error)
    PCAPS.mkdir(parents=True, exist_ok=True)
    path = PCAPS / f"{wire.replace(' ', '-')}-{mtu}-{direction}.pcap"
    write_pcap(str(path), Result(0, 0, 0, 0, 0, "", again.recorded))
    print(f"the frames of this run: {path}")


def test_the_snapshot_is_of_this_grid() -> None:
    if os.environ.get("NETSIM_UPDATE"):
        rows = [_row(*cell, simulate(*cell)) for cell in CELLS]
        SNAPSHOT.write_text("\n".join([HEAD, *rows]) + "\n")
    assert list(_snapshot()) == CELLS


def test_a_simulation_is_repeatable() -> None:
    one = simulate("all of it", 1500, "both")
    assert _row("", 0, "", one) == _row("", 0, "", simulate.__wrapped__("all of it", 1500, "both"))


def test_a_clean_wire_loses_nothing() -> None:
    for mtu in MTUS:
        for direction in SIZES:
            result = simulate("clean", mtu, direction)
            assert (result.retransmits, result.timeouts) == (0, 0)
            assert result.seconds < 0.1
