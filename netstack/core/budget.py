"""Budgets of bytes that all guests draw on, and of which no guest can take what others need.

A budget has a limit for all, and each link has a share of it. A link may use as much as all together leave free: one
that takes what it can get stops at half of the budget, a second one then finds a quarter, and whoever comes later finds
something. (Dynamic thresholds with factor 1: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998; the
shared buffers of Ethernet switches are divided like this.) The link is the unit: a guest cannot lie about its link.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netstack.core.flows import Limits
    from netstack.core.ports import Link


class Budget:
    """A limit in bytes, and how much of it is used by all."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Share:
    """What one link uses of one budget."""

    __slots__ = ("budget", "used")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.used = 0

    def add(self, count: int) -> None:
        """Use more, or less where count is negative. It is never refused: ask room() before."""
        self.used += count
        self.budget.used += count

    def room(self) -> int:
        """How much more this link may use now; below 0 when it has too much already."""
        return self.budget.limit - self.budget.used - self.used


class Shares:
    """The shares of one link."""

    __slots__ = ("for_host", "in_flight", "out_of_order")

    def __init__(self, budgets: Budgets) -> None:
        self.in_flight = Share(budgets.in_flight)
        self.for_host = Share(budgets.for_host)
        self.out_of_order = Share(budgets.out_of_order)


class Budgets:
    """The budgets of a stack."""

    def __init__(self, limits: Limits) -> None:
        self.in_flight = Budget(limits.in_flight_bytes)
        self.for_host = Budget(limits.for_host_bytes)
        self.out_of_order = Budget(limits.out_of_order_bytes)
        self._shares: dict[Link, Shares] = {}

    def of(self, link: Link) -> Shares:
        """The shares of a link."""
        shares = self._shares.get(link)
        if shares is None:
            shares = self._shares[link] = Shares(self)
        return shares

    def forget(self, link: Link) -> None:
        """The link is gone. Its flows that still end hold on to their shares."""
        self._shares.pop(link, None)
