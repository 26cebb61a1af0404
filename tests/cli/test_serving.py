"""What commands that run a network do in the background."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, cast

import pytest

from netstack.cli.serving import serve_in_background

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


class _Log:
    warmed_up = False

    def warm_up(self) -> None:
        self.warmed_up = True


async def test_reference_cycles_are_looked_for_seldom() -> None:
    """All connections wait while Python looks at them."""
    log = _Log()
    await serve_in_background(cast("Any", None), [], cast("Any", log))
    assert log.warmed_up
    assert gc.get_freeze_count() > 1000
    first, second, third = gc.get_threshold()
    assert first * second * third > 1_000_000
