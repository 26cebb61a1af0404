"""The guest that is the host, in a running network: what the host's troubles, and a reload, do to it."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest
import trio

import netstack
from netstack.control.log import Log
from netstack.gateway import host_guest
from netstack.host.outward import Outward
from tests.fakes import FakeLink
from tests.world import GUEST_MAC, OTHER_MAC

HOST = bytes((198, 51, 100, 7))
OUTWARD = Outward(HOST, 24, bytes((198, 51, 100, 1)), None, frozenset((HOST,)))
TEXTS = {GUEST_MAC: "52:54:00:12:34:56", OTHER_MAC: "52:54:00:ab:cd:ef"}


def settings(mac: bytes | None = GUEST_MAC) -> netstack.Config:
    guests: list[dict[str, Any]] = [{"mac": TEXTS[mac], "name": "k3s", "address": "host"}] if mac else []
    return netstack.Config(network={"subnet": "10.98.9.0/24"}, dns={"source": "none"}, guest=guests)


async def test_a_host_without_descriptors_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests use descriptors up, and what looks at the host is a task of the network."""
    monkeypatch.setattr("netstack.gateway.network._ROUTE_INTERVAL", 0.001)
    monkeypatch.setattr(host_guest, "find_outward", lambda: OUTWARD)
    async with netstack.open_network(settings(), log=Log("error")) as network:
        looks = 0

        def find_outward() -> Outward:
            nonlocal looks
            looks += 1
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(host_guest, "find_outward", find_outward)
        with trio.fail_after(10):
            while looks < 3:  # noqa: ASYNC110 # by a task
                await trio.sleep(0.001)
        assert network.addresses.borrowed == {HOST}
        assert network.host_guest.statics(network.config)[0].address == HOST


@pytest.mark.parametrize("after", (None, OTHER_MAC), ids=("no guest is it any more", "another guest is"))
async def test_who_is_the_host_no_more_does_not_speak_as_it(
    monkeypatch: pytest.MonkeyPatch, after: bytes | None
) -> None:
    monkeypatch.setattr(host_guest, "find_outward", lambda: OUTWARD)
    async with netstack.open_network(settings(), log=Log("error")) as network:
        now = time.monotonic()
        stack = network.stack
        links = {mac: FakeLink(text) for mac, text in TEXTS.items()}
        for mac, link in links.items():
            stack.add_link(link, now)
            stack.switch.learn(mac, link, now)
        assert stack.neighbors.admit(links[GUEST_MAC], GUEST_MAC, HOST, now) is not None
        network.reload(settings(after))
        assert stack.neighbors.admit(links[GUEST_MAC], GUEST_MAC, HOST, now) is None
        found = stack.neighbors.current(HOST, now)
        assert (found.mac if found is not None else None) == after
