"""The heap of deadlines: moved later for free, moved earlier, cancelled, swept; against a plain model."""

from __future__ import annotations

import random

import pytest

from netstack.core.timers import _SWEEP_MINIMUM, NEVER, Timers


class Owner:
    """Remembers when it was woken, and arms itself again if it is told to."""

    def __init__(self, timers: Timers) -> None:
        self.timers = timers
        self.timer_at = self.heap_at = NEVER
        self.woken: list[float] = []
        self.again: list[float] = []

    def on_timer(self, now: float) -> None:
        self.woken.append(now)
        if self.again:
            self.timers.arm(self, self.again.pop(0))


@pytest.fixture
def timers() -> Timers:
    return Timers()


def test_nothing_armed(timers: Timers) -> None:
    assert timers.next_deadline() == NEVER
    timers.run(1e9)


def test_due_and_not_due(timers: Timers) -> None:
    owner = Owner(timers)
    timers.arm(owner, 5.0)
    assert timers.next_deadline() == 5.0
    timers.run(4.999)
    assert owner.woken == []
    timers.run(5.0)
    assert owner.woken == [5.0]
    assert timers.next_deadline() == NEVER
    timers.run(100.0)
    assert owner.woken == [5.0]


def test_moved_later_by_a_plain_store(timers: Timers) -> None:
    """Hot paths write timer_at and do not touch the heap; the earlier entry then only looks again."""
    owner = Owner(timers)
    timers.arm(owner, 1.0)
    owner.timer_at = 3.0
    timers.run(1.0)
    assert owner.woken == []
    assert timers.next_deadline() == 3.0
    timers.run(3.0)
    assert owner.woken == [3.0]


def test_moved_earlier(timers: Timers) -> None:
    owner = Owner(timers)
    timers.arm(owner, 3.0)
    timers.arm(owner, 1.0)
    assert timers.next_deadline() == 1.0
    timers.run(10.0)
    assert owner.woken == [10.0]
    timers.run(20.0)
    assert owner.woken == [10.0]


def test_earlier_later_and_earlier_again_wakes_once_each(timers: Timers) -> None:
    owner = Owner(timers)
    owner.again = [5.0]
    timers.arm(owner, 5.0)
    timers.arm(owner, 2.0)
    timers.run(2.0)
    assert owner.woken == [2.0]
    timers.run(5.0)
    assert owner.woken == [2.0, 5.0]
    assert len(timers) == 0


def test_cancelled(timers: Timers) -> None:
    owner = Owner(timers)
    timers.arm(owner, 1.0)
    timers.cancel(owner)
    timers.cancel(owner)
    timers.run(10.0)
    assert owner.woken == []
    timers.arm(owner, 11.0)
    timers.run(11.0)
    assert owner.woken == [11.0]


def test_ties_run_in_the_order_they_were_armed(timers: Timers) -> None:
    order: list[int] = []

    class Numbered(Owner):
        number = 0

        def on_timer(self, now: float) -> None:
            order.append(self.number)

    for number in range(20):
        owner = Numbered(timers)
        owner.number = number
        timers.arm(owner, 1.0)
    timers.run(1.0)
    assert order == list(range(20))


def test_the_work_of_one_run_is_bounded(timers: Timers) -> None:
    owners = [Owner(timers) for _ in range(25)]
    for owner in owners:
        timers.arm(owner, 1.0)
    timers.run(1.0, limit=10)
    assert sum(len(owner.woken) for owner in owners) == 10
    assert timers.next_deadline() == 1.0
    timers.run(1.0, limit=10)
    timers.run(1.0, limit=10)
    assert all(len(owner.woken) == 1 for owner in owners)


def test_an_owner_that_is_always_due_does_not_hold_the_run(timers: Timers) -> None:
    owner = Owner(timers)
    owner.again = [0.0] * 5000
    timers.arm(owner, 0.0)
    timers.run(1.0, limit=1000)
    assert len(owner.woken) == 1000


def test_cancelled_entries_are_swept_out(timers: Timers) -> None:
    """A closed flow is not kept alive by a deadline far away."""
    owners = [Owner(timers) for _ in range(4 * _SWEEP_MINIMUM)]
    for owner in owners:
        timers.arm(owner, 1e6)
    for owner in owners[:-10]:
        timers.cancel(owner)
    assert len(timers) <= 2 * _SWEEP_MINIMUM + 20
    timers.run(1e6)
    assert [len(owner.woken) for owner in owners[-11:]] == [0] + [1] * 10


def test_deadlines_that_move_to_and_fro_do_not_pile_up(timers: Timers) -> None:
    """A flow that speaks once a second has two: 0.2 s and minutes away. None of them ends, so nobody cancels."""
    owners = [Owner(timers) for _ in range(200)]
    now = 0.0
    for _ in range(100):
        now += 1.0
        for owner in owners:
            owner.again = [1e6]
            timers.arm(owner, now + 0.2)
        timers.run(now + 0.5)
    assert len(timers) <= 2 * _SWEEP_MINIMUM + 2 * len(owners)
    assert all(len(owner.woken) == 100 for owner in owners)
    for owner in owners:
        owner.woken.clear()
        assert (owner.timer_at, owner.heap_at) == (1e6, 1e6)
    timers.run(1e6)
    assert all(owner.woken == [1e6] for owner in owners)


def test_a_sweep_while_running(timers: Timers) -> None:
    """on_timer closes thousands of others."""
    victims = [Owner(timers) for _ in range(3 * _SWEEP_MINIMUM)]
    rest = [Owner(timers) for _ in range(5)]

    class Killer(Owner):
        def on_timer(self, now: float) -> None:
            for victim in victims:
                self.timers.cancel(victim)

    timers.arm(Killer(timers), 1.0)
    for owner in (*victims, *rest):
        timers.arm(owner, 2.0)
    timers.run(2.0, limit=100_000)
    assert not any(victim.woken for victim in victims)
    assert all(owner.woken == [2.0] for owner in rest)


def test_on_earlier_is_told_of_each_new_first_deadline() -> None:
    told: list[float] = []
    timers = Timers(told.append)
    one, two = Owner(timers), Owner(timers)
    timers.arm(one, 5.0)
    timers.arm(two, 7.0)
    timers.arm(two, 3.0)
    timers.arm(two, 4.0)
    assert told == [5.0, 3.0]


@pytest.mark.parametrize("seed", range(20))
def test_against_a_model(seed: int) -> None:
    """Whoever is due is woken exactly once, at the first run at or after its deadline."""
    chance = random.Random(seed)
    timers = Timers()
    owners = [Owner(timers) for _ in range(30)]
    due: dict[Owner, float] = {}
    now = 0.0
    for _ in range(2000):
        owner = chance.choice(owners)
        action = chance.random()
        if action < 0.4:
            due[owner] = now + chance.choice((0.0, 0.5, 1.0, 2.0, 10.0))
            timers.arm(owner, due[owner])
        elif action < 0.5 and due.get(owner, 0) > 0 and owner in due:
            due[owner] += 1.0
            owner.timer_at = due[owner]
        elif action < 0.6:
            timers.cancel(owner)
            due.pop(owner, None)
        else:
            now += chance.choice((0.0, 0.25, 1.0))
            assert timers.next_deadline() <= min(due.values(), default=NEVER)
            timers.run(now)
            for each in owners:
                if each in due and due[each] <= now:
                    assert each.woken == [now]
                    del due[each]
                else:
                    assert each.woken == []
                each.woken.clear()


def test_after_a_run_the_first_entry_is_a_deadline_that_has_not_moved(timers: Timers) -> None:
    """Nobody is woken for what was due and is not any more: a connection of a few milliseconds leaves such entries."""
    owners = [Owner(timers) for _ in range(3)]
    for owner in owners:
        timers.arm(owner, 1.0)
    timers.arm(Owner(timers), 0.5)
    owners[0].timer_at = 7.0  # moved, as flows do it: by a plain store
    owners[1].timer_at = NEVER
    timers.cancel(owners[2])
    timers.run(0.5)
    assert timers.next_deadline() == 7.0
    assert len(timers) == 1
    timers.run(7.0)
    assert timers.next_deadline() == NEVER
