"""The API with a Linux kernel as the guest: tunnels into it, what is told of it, and what it may not reach."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.namespaces import HOST4, wait_until
from tests.lab.rootfs.pattern import pattern_blocks, pattern_digest
from tests.netns.net import (
    AT_ONCE,
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    MEGABYTE,
    PATIENCE,
    Net,
    address4_of,
    address6_of,
    connect,
    listen,
    mac_of,
    port_of,
    receive_all,
    reset,
)
from tests.netns.test_tcp import digest_of, send_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.namespaces import TapNamespace

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

GUEST4, GUEST6 = address4_of(0), address6_of(0)
BOTH_FAMILIES = pytest.mark.parametrize("address", (GUEST4, GUEST6), ids=("ipv4", "ipv6"))


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """With the API on TCP as well: what no guest may reach."""
    with contextlib.ExitStack() as stack:
        yield Net(stack, arguments=["--api", "tcp://127.0.0.1:0", "--api", "tcp://[::1]:0"])


def ask(net: Net, request: str) -> socket.socket:
    """A connection to the API on which this was asked."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(str(net.netstack.api_path))
    sock.sendall(f"{request} HTTP/1.1\r\nHost: base\r\n\r\n".encode())
    return sock


def tunnel(net: Net, address: str, port: int) -> socket.socket:
    sock = ask(net, f"POST /tunnel?ip={address}&port={port}")
    assert sock.recv(2, socket.MSG_WAITALL) == b"OK"
    return sock


def command(net: Net, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    """A command of netstack's, which talks to the one that runs."""
    line = [sys.executable, "-m", "netstack", *words, "--api", f"unix://{net.netstack.api_path}"]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


# ---- tunnels ----


@BOTH_FAMILIES
def test_a_tunnel_leads_to_the_guest_and_each_side_ends_by_itself(net: Net, guest: TapNamespace, address: str) -> None:
    with listen(guest, address) as listener, tunnel(net, address, port_of(listener)) as ours:
        theirs, peer = listener.accept()
        with theirs:
            assert peer[0] == (GATEWAY6 if ":" in address else GATEWAY4)
            ours.sendall(b"question")
            ours.shutdown(socket.SHUT_WR)
            assert receive_all(theirs) == b"question"
            theirs.sendall(b"answer")
            theirs.shutdown(socket.SHUT_WR)
            assert receive_all(ours) == b"answer"


@pytest.mark.slow
def test_twenty_megabytes_each_way_through_a_tunnel(net: Net, guest: TapNamespace) -> None:
    length = 20 * MEGABYTE
    with listen(guest, GUEST4) as listener, tunnel(net, GUEST4, port_of(listener)) as ours:
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(PATIENCE)
            for sender, receiver in ((ours, theirs), (theirs, ours)):
                thread = send_pattern(sender, length)
                assert digest_of(receiver) == pattern_digest(length)
                thread.join()


def test_a_closed_port_ends_a_tunnel_and_is_told_by_connect(net: Net, guest: TapNamespace) -> None:
    with listen(guest, GUEST4) as gone:
        port = port_of(gone)
    before = time.monotonic()
    with tunnel(net, GUEST4, port) as ours:
        assert ours.recv(1) == b""
    with ask(net, f"POST /v1/connect?guest={GUEST4}&port={port}") as ours:
        answer = receive_all(ours)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert answer.endswith(f"{GUEST4} port {port}: Connection refused\n".encode())
    assert time.monotonic() - before < 2 * AT_ONCE


def test_a_reset_of_the_guest_and_one_of_the_caller_are_carried_through(net: Net, guest: TapNamespace) -> None:
    with listen(guest, GUEST4) as listener:
        with tunnel(net, GUEST4, port_of(listener)) as ours:
            theirs, _ = listener.accept()
            reset(theirs)
            with contextlib.suppress(ConnectionResetError):  # unix sockets know no reset, only an end
                assert ours.recv(1) == b""
        ours = tunnel(net, GUEST4, port_of(listener))
        theirs, _ = listener.accept()
        ours.close()
        with theirs:
            theirs.settimeout(PATIENCE)
            assert theirs.recv(1) == b""


def test_nobody_is_asked_for_outside_the_guests_network(net: Net, guest: TapNamespace) -> None:
    for address in ("192.168.5.2", "127.0.0.1", "8.8.8.8", "fe80::1%2", "nobody"):
        with ask(net, f"POST /v1/connect?guest={address}&port=22") as ours:
            assert receive_all(ours).startswith(b"HTTP/1.1 404 "), address
        with tunnel(net, address, 22) as ours:
            assert ours.recv(1) == b""


def test_the_connect_command_is_a_pipe_to_the_guest(net: Net, guest: TapNamespace) -> None:
    length = 2 * MEGABYTE
    with listen(guest, GUEST4) as listener:
        process = command(net, "connect", f"{GUEST4}:{port_of(listener)}")
        assert process.stdin is not None
        assert process.stdout is not None
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(PATIENCE)

            def feed() -> None:
                assert process.stdin is not None
                for block in pattern_blocks(length):
                    process.stdin.write(block)
                process.stdin.close()

            feeder = threading.Thread(target=feed)
            feeder.start()
            assert digest_of(theirs) == pattern_digest(length)
            feeder.join()
            theirs.sendall(b"the answer comes after the end of the question")
        assert process.stdout.read() == b"the answer comes after the end of the question"
        assert process.wait(PATIENCE) == 0
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_the_connect_command_says_why_it_cannot(net: Net, guest: TapNamespace) -> None:
    with listen(guest, GUEST4) as gone:
        port = port_of(gone)
    for where, status, words in (
        (f"{GUEST4}:{port}", 1, f"netstack: {GUEST4} port {port}: Connection refused"),
        ("nobody:22", 1, "netstack: there is no guest 'nobody' now"),
        ("nobody:0", 2, "netstack: nobody:0: must be GUEST:PORT"),
    ):
        process = command(net, "connect", where)
        out, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (status, b""), errors
        assert errors.decode().startswith(words)
        assert errors.count(b"\n") == 1


def test_the_connection_can_be_passed_on_as_ssh_wants_it(net: Net, guest: TapNamespace) -> None:
    ours, its = socket.socketpair()
    with ours, its, listen(guest, GUEST4) as listener:
        line = [sys.executable, "-m", "netstack", "connect", f"{GUEST4}:{port_of(listener)}", "--pass-fd"]
        line += ["--api", f"unix://{net.netstack.api_path}"]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=its.fileno())
        assert process.wait(PATIENCE) == 0
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        theirs, _ = listener.accept()
        with theirs, socket.socket(fileno=descriptor) as passed:
            passed.sendall(b"hello")
            assert theirs.recv(5, socket.MSG_WAITALL) == b"hello"


# ---- what is told ----


def test_guests_and_flows_are_told_while_they_come_and_go(net: Net, guest: TapNamespace) -> None:
    heard: list[tuple[str, Any]] = []
    ready = threading.Event()
    with ask(net, "GET /v1/events?kinds=guest,flow,link") as stream:

        def read() -> None:
            rest = b""
            while data := stream.recv(65536):
                rest += data
                *whole, rest = rest.split(b"\n\n")
                for part in whole:
                    fields = dict(re.findall(rb"^(event|data): (.*?)\r?$", part, re.MULTILINE))
                    if fields:
                        heard.append((fields[b"event"].decode(), json.loads(fields[b"data"])))
                    ready.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert ready.wait(PATIENCE)
            with net.guest(7) as seventh, net.pair(guest, HOST4) as (ours, theirs):
                with pytest.raises(ConnectionRefusedError):
                    connect(seventh, GATEWAY4, 1)
                mine = f"{GUEST4}:{port_of(ours)}"  # flows of earlier tests may still end
                ours.sendall(b"x")
                assert theirs.recv(1) == b"x"
            wait_until(lambda: len([told for _, told in heard if told.get("guest") == mine]) > 1, "the flow's end")
            wait_until(lambda: any(told.get("what") == "closed" and kind == "link" for kind, told in heard), "its link")
        finally:
            stream.shutdown(socket.SHUT_RDWR)
            reader.join()
    told = [(kind, each["what"]) for kind, each in heard]
    assert told.index(("link", "up")) < told.index(("guest", "appeared")) < told.index(("guest", "gone"))
    appeared = next(each for kind, each in heard if kind == "guest" and each["address"] == address4_of(7))
    assert appeared["mac"] == mac_of(7)
    flows = [each for kind, each in heard if kind == "flow" and each["guest"] == mine]
    assert [each["what"] for each in flows] == ["opened", "closed"]
    assert flows[1]["bytes_from_guest"] == 1


def test_flows_can_be_asked_for_by_guest_and_protocol(net: Net, guest: TapNamespace, other: TapNamespace) -> None:
    with net.pair(guest, HOST4) as (ours, _), net.pair(other, HOST4):
        mine = f"{GUEST4}:{port_of(ours)}"
        found = net.netstack.get(f"/v1/flows?guest={GUEST4}&protocol=tcp")
        assert mine in [flow["guest"] for flow in found["list"]]
        assert all(flow["guest"].startswith(f"{GUEST4}:") for flow in found["list"])
        assert found["tcp"] >= 2
        assert net.netstack.get("/v1/flows?protocol=udp")["list"] == []
        assert len(net.netstack.get("/v1/flows?limit=1")["list"]) == 1
        assert net.netstack.get("/v1/flows?guest=nobody")["list"] == []


def test_guests_and_the_switch_are_shown_as_gvproxy_does(net: Net, guest: TapNamespace, other: TapNamespace) -> None:
    for namespace in (guest, other):
        with contextlib.suppress(OSError):
            connect(namespace, GATEWAY4, 1).close()
    cam = net.netstack.get("/cam")
    assert cam[mac_of(0)] != cam[mac_of(1)]
    assert net.netstack.get("/leases") == net.netstack.get("/services/dhcp/leases") == {GATEWAY4: GATEWAY_MAC}
    assert net.netstack.get("/stats")["BytesReceived"] > 0
    shown = {each["mac"]: each for each in net.netstack.get("/v1/guests")["guests"]}
    assert GUEST4 in shown[mac_of(0)]["addresses"]


def test_top_shows_rates_of_a_guest(net: Net, guest: TapNamespace) -> None:
    with net.pair(guest, HOST4) as (ours, theirs):
        process = command(net, "top", "--json", "--interval", "0.3", "--count", "3")
        assert process.stdout is not None
        process.stdout.readline()
        ours.sendall(b"x" * 100_000)
        received = 0
        while received < 100_000:
            received += len(theirs.recv(100_000))
        pictures = [json.loads(line) for line in process.stdout]
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    rates = [each["rate_from_guest"] for picture in pictures for each in picture["guests"] if each["mac"] == mac_of(0)]
    assert max(rates) > 50_000
    (flow,) = (flow for flow in pictures[-1]["flows"]["list"] if flow["bytes_from_guest"] == 100_000)
    assert flow["guest"].startswith(GUEST4)


# ---- what a guest may not ----


def api_ports(net: Net) -> list[int]:
    return [int(port) for port in re.findall(r"API at tcp://\S+:([0-9]+) wants the token", net.netstack.log)]


def test_a_guest_cannot_reach_the_api_by_any_of_the_gateways_addresses(net: Net, guest: TapNamespace) -> None:
    ports = api_ports(net)
    assert len(ports) == 2
    link_local = f"{net.status()['network']['gateway6']}"
    for port in ports:
        for address in (GATEWAY4, GATEWAY6, link_local):
            with pytest.raises(ConnectionRefusedError):
                connect(guest, address, port)
    # And the same ports answer on the host itself, so that it was not their being closed.
    for port, address in zip(ports, ("127.0.0.1", "::1"), strict=True):
        connect(net.host, address, port).close()


@pytest.mark.parametrize("address", (GATEWAY4, GATEWAY6))
@pytest.mark.parametrize(
    ("method", "path"),
    (
        ("GET", "/v1/status"),
        ("GET", "/v1/forwards"),
        ("POST", "/v1/forwards"),
        ("GET", "/metrics"),
        ("GET", "/"),
        ("POST", "/services/forwarder/expose"),
        ("GET", "/services/forwarder/all"),
        ("POST", "/services/dns/add"),
        ("GET", "/leases"),
        ("POST", "/tunnel?ip=127.0.0.1&port=22"),
    ),
)
def test_nothing_of_the_api_is_at_port_80_of_the_gateway(
    net: Net, guest: TapNamespace, address: str, method: str, path: str
) -> None:
    try:
        sock = connect(guest, address, 80)
    except ConnectionRefusedError:
        return
    with sock:
        body = b'{"local":":8080","remote":":80","spec":"0:80"}'
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert re.match(rb"HTTP/1\.1 (403|404) ", sock.recv(65536))
    assert net.netstack.get("/v1/forwards") == {"forwards": []}
