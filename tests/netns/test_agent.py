"""Ports of the host that open by themselves: the agent in a kernel guest, and what a guest may not have by it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.lab.namespaces import Namespace, TapNamespace, World, wait_until
from tests.lab.netstack import Netstack
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    address4_of,
    address6_of,
    connect,
    datagrams,
    family_of,
    mac_of,
    open_socket,
    receive_all,
)

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip", "busybox"), pytest.mark.timeout(90)]

SETTINGS = """
[dns]
source = "none"
[auto_publish]
enabled = true
[[auto_publish.rule]]
guest_port = 80
host_port = 8000
[[auto_publish.rule]]
guest_ports = "7000-7099"
ignore = true
"""
# The promises: 300 ms from listen() to the open port, 1 s from its end, 2 s from the end of the agent. The machine may
# be busy with something else, so single ones may take longer than they should, but not the middle of many.
OPENS, ENDS, STALE = 0.3, 1.0, 2.0
BUSY = 3.0


class Rig:
    """A host, a netstack on it, and two guests; the agent runs in the first one, where a test says so."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.world = stack.enter_context(World())
        self.world.check_isolation()
        self.settings = self.world.folder / "netstack.toml"
        self.settings.write_text(SETTINGS)
        path = self.world.folder / "q.sock"
        self.netstack = stack.enter_context(
            Netstack(
                self.world.host,
                self.world.folder / "n",
                links=[f"unix://{path}"],
                arguments=["-c", str(self.settings)],
            )
        )
        self.busybox = self.world.folder / "bin"
        self.busybox.mkdir()
        subprocess.run(["busybox", "--install", "-s", str(self.busybox)], check=True)
        self.guests = []
        for number in (0, 1):
            guest = stack.enter_context(TapNamespace(path, inside=self.world.host, mac=mac_of(number)))
            guest.set_addresses(f"{address4_of(number)}/24", f"{address6_of(number)}/64", gateways=(GATEWAY4, GATEWAY6))
            self.guests.append(guest)
        self.guest, self.other = self.guests

    def is_open(self, port: int, address: str = "127.0.0.1") -> bool:
        """Whether the host has this TCP port open."""
        with open_socket(self.world.host, socket.AF_INET) as sock:
            return sock.connect_ex((address, port)) == 0

    def wait_open(self, port: int, timeout: float = 10.0) -> float:
        """The seconds until it is."""
        began = time.monotonic()
        wait_until(lambda: self.is_open(port), f"port {port} opens; {self.netstack.log}", timeout)
        return time.monotonic() - began

    def wait_closed(self, port: int, timeout: float = 10.0) -> float:
        began = time.monotonic()
        wait_until(lambda: not self.is_open(port), f"port {port} closes", timeout)
        return time.monotonic() - began

    def forwards(self) -> list[str]:
        """The SPECs of what guests' sockets got."""
        listed = self.netstack.get("/v1/forwards")
        entries = listed["forwards"] if isinstance(listed, dict) else listed
        return sorted(entry["spec"] for entry in entries)

    def ask(self, guest: TapNamespace, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """A guest's request at the gateway's port 80: status and text."""
        words = ["curl", "-sS", "-m", "10", "-X", method, "-w", "%{http_code}", f"http://{GATEWAY4}{path}"]
        if body is not None:
            words += ["-d", body if isinstance(body, str) else json.dumps(body)]
        answer = guest.run(*words).stdout
        return int(answer[-3:]), answer[:-3]


def listen(namespace: Namespace, address: str, port: int) -> socket.socket:
    """A listening socket, at a port that a test before may have left with connections that wait for their end."""
    sock = open_socket(namespace, family_of(address))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(64)
    return sock


def accept(listener: socket.socket, caller: socket.socket) -> socket.socket:
    """The guest's end of this connection; those of is_open() came before it."""
    while True:
        found, peer = listener.accept()
        if peer[1] == caller.getsockname()[1]:
            found.settimeout(10)
            return found
        found.close()


class Agent:
    """The agent in a guest, as its user starts it, with all its processes."""

    def __init__(
        self, rig: Rig, guest: TapNamespace | None = None, *, way: str = "bash", shell: str = "sh", patience: int = 10
    ) -> None:
        self.rig = rig
        command = f"busybox wget -qO- http://{GATEWAY4}/agent | NETSTACK_AGENT_WAYS={way} {shell}"
        if shell == "busybox sh":  # as in a guest that has nothing else
            command = f"PATH={rig.busybox}; {command}"
        command = f"export NETSTACK_AGENT_PATIENCE={patience}; {command}"
        guest = guest or rig.guest
        self.process = guest.popen("sh", "-c", command, start_new_session=True, stdin=subprocess.DEVNULL)
        self.is_over = False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """A crash: everything is gone at once."""
        if not self.is_over:
            self.is_over = True
            self.signal(signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(stack)


@pytest.fixture(autouse=True)
def healthy(rig: Rig) -> Iterator[None]:
    """Whatever a test did, netstack runs on, and nothing of it is left open."""
    yield
    wait_until(lambda: not rig.forwards(), "all forwards end", 5)
    assert "Traceback" not in rig.netstack.log
    assert "internal_error" not in rig.netstack.status()["drops"]


def test_fifty_openings_are_seen_in_time_and_so_are_their_ends(rig: Rig) -> None:
    opened, closed = [], []
    with Agent(rig):
        with listen(rig.guest, "0.0.0.0", 5999):
            rig.wait_open(5999)  # the agent is there
        for first in range(6000, 6050, 5):
            with contextlib.ExitStack() as stack:
                began = time.monotonic()
                for port in range(first, first + 5):
                    stack.enter_context(listen(rig.guest, "0.0.0.0", port))
                for port in range(first, first + 5):
                    rig.wait_open(port, BUSY)
                    opened.append(time.monotonic() - began)
            began = time.monotonic()
            for port in range(first, first + 5):
                rig.wait_closed(port, BUSY)
                closed.append(time.monotonic() - began)
    assert len(opened) == 50
    assert statistics.median(opened) < OPENS, sorted(opened)
    assert statistics.median(closed) < ENDS, sorted(closed)
    assert statistics.quantiles(opened, n=10)[-1] < 2 * OPENS, sorted(opened)


@pytest.mark.parametrize(
    ("way", "shell"), (("bash", "sh"), ("nc", "busybox sh"), ("curl", "sh"), ("wget", "busybox sh"))
)  # fmt: skip
def test_whatever_the_guest_has_to_talk_with_is_enough(rig: Rig, way: str, shell: str) -> None:
    with Agent(rig, way=way, shell=shell) as agent, listen(rig.guest, "0.0.0.0", 8080) as listener:
        rig.wait_open(8080)
        with connect(rig.world.host, "127.0.0.1", 8080) as ours:
            theirs = accept(listener, ours)
            with theirs:
                ours.sendall(b"ping")
                assert theirs.recv(4) == b"ping"
        agent.kill()
        assert rig.wait_closed(8080, BUSY) < STALE


def test_an_agent_that_is_ended_ends_all_that_it_started(rig: Rig) -> None:
    for way, runs_in in (("bash", "sh"), ("nc", "busybox sh")):
        with Agent(rig, way=way, shell=runs_in) as agent, listen(rig.guest, "0.0.0.0", 8080):
            rig.wait_open(8080)
            listing = subprocess.run(
                ["ps", "-s", str(agent.process.pid), "-o", "pid=,ppid="], capture_output=True, text=True, check=False
            ).stdout
            pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
            shell = next(pid for pid, parent in pairs if parent == agent.process.pid)  # its wget has ended
            os.kill(shell, signal.SIGTERM)
            rig.wait_closed(8080)
            wait_until(lambda: _is_empty(agent.process.pid), "all its processes end")
            agent.is_over = True
            agent.process.wait()


def _is_empty(session: int) -> bool:
    listing = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True, check=False)
    return all(state.startswith("Z") for state in listing.stdout.split())


def test_an_agent_that_stops_answering_has_no_ports_until_it_speaks_again(rig: Rig) -> None:
    with Agent(rig) as agent, listen(rig.guest, "0.0.0.0", 8080):
        rig.wait_open(8080)
        agent.signal(signal.SIGSTOP)
        assert rig.wait_closed(8080, BUSY) < STALE
        agent.signal(signal.SIGCONT)
        assert rig.wait_open(8080) < BUSY


def test_sockets_of_both_families_and_protocols_are_published_where_they_can_be_reached(rig: Rig) -> None:
    host, guest = rig.world.host, rig.guest
    with (
        Agent(rig),
        listen(guest, "::", 8081) as listener,
        datagrams(guest, "0.0.0.0", 5000) as echo,
        datagrams(guest, "127.0.0.1", 5001),
        listen(guest, "127.0.0.1", 8082),
        listen(guest, "::1", 8083),
        listen(guest, "0.0.0.0", 443),  # the host's would be below 1024
        listen(guest, "0.0.0.0", 80),  # a rule gives it 8000
        listen(guest, "0.0.0.0", 7050),  # ignored by a rule
        listen(guest, address4_of(0), 8084),  # not one that the last rule matches
        listen(guest, "0.0.0.0", 8085),
    ):
        wait_until(lambda: len(rig.forwards()) >= 6, "six are published")
        rig.wait_open(8085)
        assert rig.forwards() == [
            f"127.0.0.1:{host_port}:{address4_of(0)}:{port}{suffix}"
            for host_port, port, suffix in (
                (5000, 5000, "/udp"),
                (8000, 80, ""),
                *((port, port, "") for port in (8081, 8082, 8083, 8085)),
            )
        ]
        found = next(one for one in rig.netstack.get("/v1/guests")["guests"] if one["mac"] == mac_of(0))["agent"]
        assert (found["agent"], found["published"]) == ("alive", rig.forwards())
        why = {one["socket"]: one["why"] for one in found["not_published"]}
        assert "loopback" in why["127.0.0.1:5001/udp"]
        assert "below 1024" in why["0.0.0.0:443/tcp"]
        assert why["0.0.0.0:7050/tcp"] == "ignored by a rule"
        with connect(host, "127.0.0.1", 8081) as ours:
            theirs = accept(listener, ours)
            with theirs:
                theirs.sendall(b"hello")
                assert ours.recv(5) == b"hello"
        with datagrams(host, "127.0.0.1") as ours:
            ours.sendto(b"ask", ("127.0.0.1", 5000))
            data, caller = echo.recvfrom(100)
            echo.sendto(data.upper(), caller)
            assert ours.recvfrom(100) == (b"ASK", ("127.0.0.1", 5000))


@pytest.mark.parametrize(("way", "shell"), (("bash", "sh"), ("nc", "busybox sh")))
def test_a_server_on_the_guests_loopback_is_reached_through_its_agent(rig: Rig, way: str, shell: str) -> None:
    host, data = rig.world.host, os.urandom(1_000_000)
    for address in ("127.0.0.1", "::1"):
        with Agent(rig, way=way, shell=shell), listen(rig.guest, address, 8080) as listener:
            rig.wait_open(8080)
            for _ in range(3):
                with connect(host, "127.0.0.1", 8080) as ours:
                    ours.sendall(b"ping")
                    while True:  # a caller that only looked has none of its own
                        theirs, peer = listener.accept()
                        theirs.settimeout(10)
                        if theirs.recv(4) == b"ping":
                            break
                        theirs.close()
                    with theirs:
                        assert peer[0] == address
                        theirs.sendall(data)
                        theirs.shutdown(socket.SHUT_WR)
                        assert receive_all(ours) == data
        rig.wait_closed(8080)


def test_a_guest_has_no_use_of_another_ones_callers(rig: Rig) -> None:
    with open_socket(rig.other, socket.AF_INET) as sock:
        sock.connect((GATEWAY4, 80))
        sock.sendall(b"POST /agent/relay?0123456789abcdef0123456789abcdef HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert rig.netstack.status()["drops"]["agent_relay_unknown"] >= 1


@pytest.mark.needs("nft", "iptables")
def test_ports_that_rules_hand_on_are_published_as_container_ports_are(rig: Rig) -> None:
    with Agent(rig), listen(rig.guest, "0.0.0.0", 8080):
        rig.wait_open(8080)
        rig.guest.ip("link", "add", "box0", "type", "veth", "peer", "name", "box1")  # as a container brings its own
        table = "table ip box { chain pre { type nat hook prerouting priority -100; tcp dport 8090 counter dnat to "
        rig.guest.run("nft", "-f", "-", stdin=f"{table}10.88.0.2:80; }}; }}")
        assert rig.wait_open(8090) < BUSY
        rig.guest.run(
            *"iptables -t nat -A PREROUTING -p tcp --dport 8091 -j DNAT --to-destination 10.88.0.3:80".split()
        )
        assert rig.wait_open(8091) < BUSY
        rig.guest.run("nft", "delete", "table", "ip", "box")
        rig.guest.run("iptables", "-t", "nat", "-F")
        rig.guest.ip("link", "del", "box0")
        assert rig.wait_closed(8090) < BUSY
        assert rig.wait_closed(8091) < BUSY


def test_a_port_that_is_taken_is_published_when_it_gets_free(rig: Rig) -> None:
    with Agent(rig), Agent(rig, rig.other):
        first = listen(rig.guest, "0.0.0.0", 8080)
        with first:
            rig.wait_open(8080)
            with listen(rig.other, "0.0.0.0", 8080):
                wait_until(lambda: "cannot publish a guest's port" in rig.netstack.log, "the log says so")
                assert rig.forwards() == [f"127.0.0.1:8080:{address4_of(0)}:8080"]
                first.close()
                there = [f"127.0.0.1:8080:{address4_of(1)}:8080"]
                wait_until(lambda: rig.forwards() == there, "the other guest has it")


def test_a_server_on_the_hosts_port_80_is_still_reached_by_guests(rig: Rig) -> None:
    body = os.urandom(3_000_000)
    with listen(rig.world.host, "127.0.0.1", 80) as server:
        asking = rig.guest.popen("curl", "-sS", "-m", "20", f"http://{GATEWAY4}/a?b=c", stdout=subprocess.PIPE)
        connection, _ = server.accept()
        with connection:
            request = connection.recv(4096)
            assert request.startswith(b"GET /a?b=c HTTP/1.1\r\n")
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        assert asking.communicate(timeout=20)[0] == body
        assert rig.ask(rig.guest, "GET", "/agent")[1].startswith("#!/bin/sh")


@pytest.mark.parametrize(
    ("method", "path"),
    (
        ("GET", "/v1/status"),
        ("GET", "/v1/forwards"),
        ("POST", "/v1/forwards"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/services/dns/all"),
        ("POST", "/services/dns/add"),
        ("GET", "/services/dhcp/leases"),
        ("GET", "/leases"),
        ("GET", "/cam"),
        ("GET", "/stats"),
        ("POST", "/tunnel?ip=192.168.5.21&port=22"),
        ("POST", "/connect"),
        ("GET", "/services/forwarder/../../v1/status"),
        ("GET", "/services/forwarder/all/../../../v1/status"),
        ("GET", "/"),
    ),
)
def test_nothing_else_of_the_api_is_reached_from_a_guest(rig: Rig, method: str, path: str) -> None:
    words = ["curl", "-sS", "--path-as-is", "-m", "10", "-X", method, "-w", "%{http_code}", "-d", "{}"]
    answer = rig.guest.run(*words, f"http://{GATEWAY4}{path}").stdout
    assert answer == "not found\n404"


def test_a_guest_exposes_its_own_ports_and_nothing_else(rig: Rig) -> None:
    own, other = address4_of(0), address4_of(1)

    def expose(local: str, remote: str, protocol: str = "tcp") -> tuple[int, str]:
        body = {"local": local, "remote": remote, "protocol": protocol}
        return rig.ask(rig.guest, "POST", "/services/forwarder/expose", body)

    with listen(rig.guest, "0.0.0.0", 8080) as listener:
        assert expose(":8080", ":8080") == (200, "")
        with connect(rig.world.host, "127.0.0.1", 8080) as ours:
            theirs = accept(listener, ours)
            with theirs:
                theirs.sendall(b"hello")
                assert ours.recv(5) == b"hello"
    assert expose(":8080", f"{own}:8080") == (500, "proxy already running for tcp on :8080\n")
    # Another spelling of the same place is no other one: or a guest could have us remember as many as it likes.
    taken = "listen tcp 127.0.0.1:8080: bind: address already in use\n"
    assert [expose(f"{spelling}:8080", ":8080") for spelling in ("a", "b")] == [(500, taken)] * 2
    assert expose("0.0.0.0:5000", f"{own}:5000", "udp") == (200, "")
    everything = [
        {"local": "0.0.0.0:5000", "remote": f"{own}:5000", "protocol": "udp"},
        {"local": ":8080", "remote": f"{own}:8080", "protocol": "tcp"},
    ]
    status, text = rig.ask(rig.guest, "GET", "/services/forwarder/all")
    assert (status, json.loads(text)) == (200, everything)
    assert json.loads(rig.ask(rig.other, "GET", "/services/forwarder/all")[1]) == []
    before = rig.forwards()
    with listen(rig.world.host, "127.0.0.1", 8095):  # a process that the guest is not told of
        taken = "listen tcp 127.0.0.1:8095: bind: address already in use\n"
        assert expose(":8095", ":8095") == (500, taken)
    refused = [
        expose(":8090", f"{other}:22"),
        expose(":8090", f"{GATEWAY4}:22"),
        expose(":8090", "127.0.0.1:22"),
        expose(":22", ":22"),
        expose(":8091", ":8090"),
        expose(":7010", ":7010"),  # ignored by a rule
        expose("/tmp/evil.sock", "tcp://192.168.5.20:22", "unix"),
        expose("/tmp/evil.sock", "ssh-tunnel://root@192.168.5.20/x?key=/etc/shadow", "unix"),
        expose("x", f"{own}:22", "npipe"),
    ]
    assert [status for status, _ in refused] == [403] * len(refused), refused
    bad = [
        rig.ask(rig.guest, "POST", "/services/forwarder/expose", text)
        for text in ("", "{", "[]", '{"local":1}', '{"remote":"x"}', '{"local":":1","remote":":99999"}', "x" * 5000)
    ]
    assert [status for status, _ in bad] == [400] * len(bad), bad
    assert rig.ask(rig.guest, "GET", "/services/forwarder/expose") == (400, "post only\n")
    assert rig.ask(rig.other, "POST", "/services/forwarder/unexpose", {"local": ":8080"}) == (500, "proxy not found\n")
    assert rig.forwards() == before
    assert rig.ask(rig.guest, "POST", "/services/forwarder/unexpose", {"local": ":8080"}) == (200, "")
    udp = {"local": "0.0.0.0:5000", "protocol": "udp"}
    assert rig.ask(rig.guest, "POST", "/services/forwarder/unexpose", udp) == (200, "")
    assert not Path("/tmp/evil.sock").exists()


def test_a_guest_that_is_unplugged_leaves_nothing_behind(rig: Rig) -> None:
    with Agent(rig, rig.other), listen(rig.other, "0.0.0.0", 8080):
        rig.wait_open(8080)
        body = {"local": ":8070", "remote": ":8070"}
        assert rig.ask(rig.other, "POST", "/services/forwarder/expose", body) == (200, "")
        rig.other.unplug()
        assert rig.wait_closed(8080, BUSY) < STALE
        assert rig.wait_closed(8070, BUSY) < STALE


@pytest.mark.parametrize(("way", "shell"), (("bash", "sh"), ("nc", "busybox sh")))
def test_an_agent_finds_its_way_back_when_netstack_crashed(way: str, shell: str) -> None:
    with contextlib.ExitStack() as stack:
        rig = Rig(stack)
        with Agent(rig, way=way, shell=shell, patience=2), listen(rig.guest, "0.0.0.0", 8080):
            rig.wait_open(8080)
            rig.netstack.kill()
            rig.netstack.start()
            # As QEMU does, the card comes back; nothing tells the guest that its connections are of the past.
            rig.guest.unplug()
            rig.guest.plug_in()
            rig.guest.set_addresses(f"{address4_of(0)}/24", gateways=(GATEWAY4,))
            rig.wait_open(8080, 30)


def test_it_is_switched_off_and_on_again_by_a_reload(rig: Rig) -> None:
    assert rig.netstack.process is not None
    with listen(rig.guest, "0.0.0.0", 8080), Agent(rig):
        rig.wait_open(8080)
        rig.settings.write_text(SETTINGS.replace("enabled = true", "enabled = false"))
        rig.netstack.process.send_signal(signal.SIGHUP)
        rig.wait_closed(8080)
        assert rig.ask(rig.guest, "GET", "/agent")[0] == 404
        rig.settings.write_text(SETTINGS)
        rig.netstack.process.send_signal(signal.SIGHUP)
        with Agent(rig):
            rig.wait_open(8080)


def test_a_guest_cannot_keep_netstack_busy_with_reports(rig: Rig) -> None:
    report = "hello 1 l 32768 60999\n" + "".join(f"tcp 0100A8C0:{port:04X}\n" for port in range(2000, 3000)) + ".\n"
    statuses = [rig.ask(rig.guest, "POST", "/agent/ports", report)[0] for _ in range(12)]
    assert statuses[0] == 204
    assert 429 in statuses


def test_a_guest_may_only_have_so_many_ports(rig: Rig) -> None:
    rig.settings.write_text(SETTINGS.replace("enabled = true", "enabled = true\nmax_ports = 3"))
    assert rig.netstack.process is not None
    rig.netstack.process.send_signal(signal.SIGHUP)
    try:
        with Agent(rig), contextlib.ExitStack() as stack:
            for port in range(8080, 8090):
                stack.enter_context(listen(rig.guest, "0.0.0.0", port))
            wait_until(lambda: len(rig.forwards()) == 3, "three are published")
            wait_until(lambda: "more ports than auto_publish.max_ports" in rig.netstack.log, "the log says so")
            assert rig.ask(rig.guest, "POST", "/services/forwarder/expose", {"local": ":9", "remote": ":9"})[0] == 403
            assert len(rig.forwards()) == 3
    finally:
        rig.settings.write_text(SETTINGS)
        rig.netstack.process.send_signal(signal.SIGHUP)
