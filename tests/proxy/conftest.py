"""What the tests of the proxy share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from tests.proxy.desk import Desk

if TYPE_CHECKING:
    import trio


@pytest.fixture
async def desk(nursery: trio.Nursery) -> AsyncIterator[Desk]:
    """A proxy, whose guests go when the test is over."""
    found = Desk(nursery)
    yield found
    found.close()
