"""One netstack and two guests for each file of these tests: one with the MTU that netstack tells, one with 1500."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.netns.net import Net

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.namespaces import TapNamespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with contextlib.ExitStack() as stack:
        yield Net(stack)


@pytest.fixture(scope="module")
def guest(net: Net) -> Iterator[TapNamespace]:
    """Guest 0, MTU 65520."""
    with net.guest(0) as found:
        yield found


@pytest.fixture(scope="module")
def other(net: Net) -> Iterator[TapNamespace]:
    """Guest 1, MTU 1500."""
    with net.guest(1, mtu=1500) as found:
        yield found


@pytest.fixture(autouse=True)
def healthy(net: Net) -> Iterator[None]:
    """Whatever a test did, netstack runs on without an error of its own."""
    yield
    net.check_alive()
