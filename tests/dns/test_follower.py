"""The follower: from a source's changes to the table that is in use, with a clock by hand."""

from collections.abc import Callable

import trio

from netstack.dns.follower import Follower
from netstack.dns.routes import RoutingTable, Scope, Server
from netstack.dns.source_settings import user_scopes

WIFI = Scope("wifi", (Server("192.0.2.1"),), default=True, search=("home.arpa",))
VPN = Scope("vpn", (Server("10.8.0.1"),), ("corp.example",), search=("corp.example",))


class ByHand:
    """A source that says what the test says."""

    name = "by hand"

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = list(scopes)
        self.changed: Callable[[], None] = lambda: None
        self.running = 0

    def current(self) -> list[Scope]:
        return list(self.scopes)

    async def run(self, changed: Callable[[], None]) -> None:
        self.changed = changed
        self.running += 1
        try:
            await trio.sleep_forever()
        finally:
            self.running -= 1

    def say(self, *scopes: Scope) -> None:
        self.scopes = list(scopes)
        self.changed()


class Told:
    """What subscribers heard, and when."""

    def __init__(self, follower: Follower) -> None:
        self.changes: list[tuple[float, RoutingTable, RoutingTable]] = []
        follower.subscribe(lambda was, now: self.changes.append((trio.current_time(), was, now)))


def test_the_first_table_is_there_at_once() -> None:
    follower = Follower(ByHand(WIFI), own=[bytes((192, 168, 5, 3))])
    assert [scope.key for scope in follower.table.route((b"x",))] == ["wifi"]


async def test_rule_50_a_change_is_in_use_after_a_tenth_of_a_second(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    source = ByHand(WIFI)
    follower = Follower(source)
    told = Told(follower)
    nursery.start_soon(follower.run)
    await trio.sleep(1)
    was = follower.table
    began_at = trio.current_time()
    source.say(WIFI, VPN)
    assert follower.table is was
    await trio.sleep(1)
    ((at, before, after),) = told.changes
    assert 0.1 <= at - began_at <= 0.3
    assert (before, after) == (was, follower.table)
    assert after.version == was.version + 1
    assert before.changed_keys(after) == {"vpn"}
    nursery.cancel_scope.cancel()


async def test_rule_50_a_row_of_changes_is_one_but_waits_no_longer_than_that(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    source = ByHand(WIFI)
    follower = Follower(source)
    told = Told(follower)
    nursery.start_soon(follower.run)
    await trio.sleep(1)
    began_at = trio.current_time()
    for number in range(20):
        source.say(WIFI, Scope("vpn", (Server(f"10.8.0.{number}"),), ("corp.example",)))
        await trio.sleep(0.05)
    await trio.sleep(1)
    times = [at - began_at for at, _, _ in told.changes]
    assert times[0] <= 0.31
    assert 3 <= len(times) <= 5
    assert follower.table.route((b"corp", b"example"))[0].servers == (Server("10.8.0.19"),)
    nursery.cancel_scope.cancel()


async def test_a_change_of_nothing_is_not_told(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    source = ByHand(WIFI)
    follower = Follower(source)
    told = Told(follower)
    nursery.start_soon(follower.run)
    await trio.sleep(1)
    version = follower.table.version
    source.say(WIFI)
    await trio.sleep(1)
    assert told.changes == []
    assert follower.table.version == version
    nursery.cancel_scope.cancel()


def test_settings_are_taken_at_once_and_their_search_list_replaces_the_hosts() -> None:
    follower = Follower(ByHand(WIFI, VPN))
    assert list(follower.table.search) == ["home.arpa", "corp.example"]
    follower.set_user_scopes(user_scopes(["192.0.2.9"], [], ["lab.example"]))
    assert list(follower.table.search) == ["lab.example"]
    assert [scope.key for scope in follower.table.route((b"x",))] == ["settings"]
    assert [scope.key for scope in follower.table.route((b"corp", b"example"))] == ["vpn"]
    follower.set_user_scopes([])
    assert list(follower.table.search) == ["home.arpa", "corp.example"]


def test_rule_48_the_gateway_is_left_out() -> None:
    follower = Follower(ByHand(WIFI), own=[bytes((192, 0, 2, 1))])
    assert follower.table.route((b"x",)) == ()


async def test_another_source_takes_over(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    first, second = ByHand(WIFI), ByHand(VPN)
    follower = Follower(first)
    nursery.start_soon(follower.run)
    await trio.sleep(1)
    follower.set_source(second)
    assert follower.table.route((b"x",)) == ()
    await trio.sleep(1)
    assert (first.running, second.running) == (0, 1)
    second.say(VPN, WIFI)
    await trio.sleep(1)
    assert [scope.key for scope in follower.table.route((b"x",))] == ["wifi"]
    nursery.cancel_scope.cancel()


async def test_a_subscribers_bug_does_not_end_the_following(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    source, failures = ByHand(WIFI), list[Exception]()
    follower = Follower(source, on_failure=failures.append)

    def fail(was: RoutingTable, now: RoutingTable) -> None:
        raise KeyError("a bug")

    follower.subscribe(fail)
    nursery.start_soon(follower.run)
    await trio.sleep(1)
    source.say(VPN)
    await trio.sleep(1)
    source.say(WIFI, VPN)
    await trio.sleep(1)
    assert len(failures) == 2
    assert [scope.key for scope in follower.table.route((b"corp", b"example"))] == ["vpn"]
    nursery.cancel_scope.cancel()
