"""A running network between no guests: its settings, its lease file, its log. No packet is sent."""

from __future__ import annotations

import errno
import io
import json
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

import netstack
from netstack.control.log import Log
from netstack.core.flows import flow_key
from netstack.core.tcp import TcpFlow
from netstack.core.udp import UdpFlow
from netstack.gateway import local_names
from netstack.host import state
from netstack.wire.tcp import ACK, FIN
from tests.dns.nameserver import open_nameserver
from tests.fakes import FakeLink
from tests.world import WORLD4

MAC = bytes.fromhex("525400123456")
SECONDS = 10.0  # a deadline, never a time that is waited


def settings(tmp_path: Path) -> netstack.Config:
    return netstack.Config(network={"subnet": "10.98.7.0/24"}, state={"dir": tmp_path / "state"})


def give_lease(network: netstack.Network, mac: bytes) -> None:
    now = time.monotonic()
    lease = network.leases.offer(mac, now)
    assert lease is not None
    assert network.leases.bind(mac, lease.address, now) is not None


async def test_leases_are_written_again_when_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netstack.gateway.network._SAVE_DELAY", 0.01)
    monkeypatch.setattr("netstack.gateway.network._SAVE_AGAIN", 0.01)
    write = state.write_json
    tries = 0

    def write_when_there_is_room(path: Path, data: object) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(state, "write_json", write_when_there_is_room)
    stream = io.StringIO()
    async with netstack.open_network(settings(tmp_path), log=Log("info", "json", stream=stream)) as network:
        give_lease(network, MAC)
        file = tmp_path / "state" / "leases-10.98.7.0-24.json"
        with trio.fail_after(SECONDS):
            while not file.exists():  # noqa: ASYNC110 # written by a thread
                await trio.sleep(0.01)
        assert "52:54:00:12:34:56" in file.read_text()
    warnings = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["level"] == "warning"]
    assert [(line["event"], line["error"]) for line in warnings] == [
        ("cannot keep the leases", "No space left on device")
    ]


async def test_a_slow_disk_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netstack.gateway.network._SAVE_DELAY", 0.01)
    where: list[threading.Thread] = []
    monkeypatch.setattr(state, "write_json", lambda path, data: where.append(threading.current_thread()))
    async with netstack.open_network(settings(tmp_path), log=Log("error")) as network:
        give_lease(network, MAC)
        with trio.fail_after(SECONDS):
            while not where:  # noqa: ASYNC110 # filled by a thread
                await trio.sleep(0.01)
        assert where[0] is not threading.main_thread()


async def test_close_closes_what_waits_for_a_host_that_does_not_read(tmp_path: Path) -> None:
    with ExitStack() as stack:
        async with netstack.open_network(settings(tmp_path), log=Log("error")) as network:
            link, now = FakeLink(), time.monotonic()
            network.stack.add_link(link, now)
            guest = bytes((10, 98, 7, 15))
            key = flow_key(guest, 1, WORLD4, 2)
            flow = TcpFlow(network.stack, link, MAC, key, guest, 1, WORLD4, 2, now)
            ours, _theirs = map(stack.enter_context, socket.socketpair())
            ours.setblocking(False)
            flow.take_syn(0, 65535, 1460, None)
            network.stack.flows.add(flow)
            flow.open_from_guest(ours, connected=True, now=now)
            with suppress(BlockingIOError):
                while True:
                    ours.send(bytes(65536))
            flow.on_segment(1, flow.snd_nxt, ACK | FIN, 65535, memoryview(b"the rest"), 0, 8, now)
            network.stack.end_round(now)
            flow.finish_batch(now)
            flow.let_go(now)
            assert flow not in network.stack.flows
            assert ours.fileno() >= 0
        assert ours.fileno() < 0
        assert network.stack.bytes_for_host == 0


async def test_a_trouble_that_repeats_is_told_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    async with netstack.open_network(settings(tmp_path), log=Log("info", "json", stream=stream)) as network:
        for link in ("a", "a", "b", "a"):
            network._links.tell("cannot accept a guest", link=link, error="Too many open files")
    assert [json.loads(line)["link"] for line in stream.getvalue().splitlines()] == ["a", "b"]


async def test_guests_cannot_flood_the_log_with_leases(tmp_path: Path) -> None:
    stream = io.StringIO()
    async with netstack.open_network(settings(tmp_path), log=Log("info", "json", stream=stream)) as network:
        for number in range(200):
            give_lease(network, MAC[:5] + bytes([number]))
    lines = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert lines.count("lease") == 50
    assert lines.count("too many changes of leases to show them all") == 1


async def test_what_a_reload_cannot_change_is_told_each_time(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path), log=Log("error")) as network:
        fresh = netstack.Config(
            network={"subnet": "10.98.7.0/24"},
            state={"dir": tmp_path / "state"},
            log={"level": "error", "format": "json"},
            dns={"nameservers": ["127.0.0.9"], "hosts_file": "/gone"},
        )
        for _ in range(2):
            assert sorted(network.reload(fresh)) == ["dns.hosts_file", "log.format"]
        assert network.config.dns.nameservers == ("127.0.0.9",)


async def test_a_guest_cannot_attach_again_through_the_gateway(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path), log=Log("error")) as network:
        link = await network.attach("tcp://127.0.0.1:0")
        port = int(link.address.rpartition(":")[2])  # type: ignore[attr-defined]
        assert network.stack.is_protected(port)


async def test_a_refused_start_leaves_an_old_capture_as_it_was(tmp_path: Path) -> None:
    capture = tmp_path / "old.pcapng"
    capture.write_text("precious")
    config = netstack.Config(network={"subnet": "10.98.7.0/24"}, pcap={"file": capture})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netstack.gateway.network.choose_addresses", _refuse)
        with pytest.raises(netstack.ConfigError):
            async with netstack.open_network(config, log=Log("error")):
                pass
    assert capture.read_text() == "precious"


def _refuse(config: netstack.Config, log: Log) -> None:
    raise netstack.ConfigError("taken")


async def test_no_nameserver_is_asked_before_a_guest_asks(tmp_path: Path) -> None:
    async with open_nameserver() as server:
        table = {"source": "none", "upstreams": [f"127.0.0.1:{server.port}"], "mdns": False}
        config = netstack.Config(network={"subnet": "10.98.7.0/24"}, dns=table)
        async with netstack.open_network(config, log=Log("error")) as network:
            network.reload(config.model_copy(update={"dns": config.dns.model_copy(update={"search": ("x.example",)})}))
            await network.dns_view.query("localhost")
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert server.probes == server.udp_queries == server.tcp_queries == []
            await network.dns_view.query("www.example.com")
            assert len(server.tcp_queries) == 1
            # And then one that finds out whether queries go in a circle.
            with trio.fail_after(2):
                while not server.probes:  # noqa: ASYNC110 - nobody can tell us
                    await trio.sleep(0.01)


async def test_a_bug_in_a_datagram_flow_ends_that_flow(tmp_path: Path) -> None:
    """It would stay readable, and be found ready again and again."""
    async with netstack.open_network(settings(tmp_path), log=Log("error", stream=io.StringIO())) as network:
        table = network.stack.udp
        flow = UdpFlow(table, FakeLink(), MAC, bytes((10, 98, 7, 15)), 40000)
        assert table.add(flow, bytes((10, 98, 7, 2)), 9, b"", time.monotonic())
        network._on_crash(flow, RuntimeError("a bug"))
        assert flow.closed
        assert network.stack.counters.drops["internal_error"] == 1


def test_what_is_imported_in_advance_may_fail_where_no_descriptors_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        raise OSError(errno.EMFILE, "Too many open files", name)

    monkeypatch.delitem(sys.modules, "dnslib")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec)])
    local_names._warm_up()
