"""core.budget: no guest can take what another one needs."""

from __future__ import annotations

import itertools

import pytest

from netstack.core.budget import Budgets, Shares
from netstack.core.flows import Limits
from tests.fakes import FakeLink


def fill(shares: Shares, step: int = 1000) -> int:
    """Take what one link can get; gives how much that was."""
    taken = 0
    while shares.in_flight.room() >= step:
        shares.in_flight.add(step)
        taken += step
    return taken


@pytest.fixture
def budgets() -> Budgets:
    return Budgets(Limits(in_flight_bytes=1_000_000))


def test_one_link_gets_half(budgets: Budgets) -> None:
    assert 490_000 < fill(budgets.of(FakeLink())) <= 500_000


def test_whoever_comes_later_finds_something(budgets: Budgets) -> None:
    taken = [fill(budgets.of(FakeLink())) for _ in range(5)]
    assert all(later > 0.4 * earlier for earlier, later in itertools.pairwise(taken))
    assert sum(taken) == budgets.in_flight.used <= 1_000_000


def test_what_is_given_back_is_free_again(budgets: Budgets) -> None:
    hog, other = budgets.of(FakeLink()), budgets.of(FakeLink())
    taken = fill(hog)
    before = other.in_flight.room()
    hog.in_flight.add(-taken)
    assert other.in_flight.room() == before + taken
    assert budgets.in_flight.used == 0


def test_the_shares_of_a_link_that_is_gone_end_with_its_flows(budgets: Budgets) -> None:
    link = FakeLink()
    old = budgets.of(link)
    old.in_flight.add(1000)
    budgets.forget(link)
    assert budgets.of(link) is not old
    assert budgets.in_flight.used == 1000
    old.in_flight.add(-1000)
    assert budgets.in_flight.used == 0
