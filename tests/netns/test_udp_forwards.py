"""UDP forwards from real callers of the host to servers in a real kernel, and back."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, wait_until
from tests.lab.rootfs.pattern import pattern
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    PATIENCE,
    address4_of,
    address6_of,
    connect,
    datagrams,
    family_of,
    open_socket,
    port_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.namespaces import Namespace, TapNamespace
    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
UDP_SEGMENT = 103  # include/uapi/linux/udp.h

GUEST4, GUEST6 = address4_of(0), address6_of(0)
ADDRESSES = pytest.mark.parametrize(
    ("caller", "called", "guest_has", "seen"),
    (
        ("host", "127.0.0.1", GUEST4, GATEWAY4),
        ("host", "127.0.7.7", GUEST4, GATEWAY4),
        ("host", "::1", GUEST6, GATEWAY6),
        ("host", "::1", GUEST4, GATEWAY4),
        ("host", "127.0.0.1", GUEST6, GATEWAY6),
        ("far", HOST4, GUEST4, FAR4),
        ("far", HOST6, GUEST6, FAR6),
        ("far", HOST6, GUEST4, GATEWAY4),
    ),
)


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def call_api(net: Net, method: str, path: str, body: object = None) -> Any:
    """One request to netstack's API; the JSON of its answer, which must be a good one."""
    status, answer = net.netstack.ask(method, path, body)
    assert status < 300, f"{method} {path}: {status} {answer}"
    return answer


@contextlib.contextmanager
def forward(net: Net, spec: str) -> Iterator[dict[str, Any]]:
    """A forward for as long as the block lasts; what the API says of it."""
    made = call_api(net, "POST", "/v1/forwards", {"spec": spec})
    try:
        yield made
    finally:
        call_api(net, "DELETE", f"/v1/forwards/{made['id']}")


def describe(net: Net, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = call_api(net, "GET", f"/v1/forwards/{made['id']}")
    return found


def host_spec(address: str, guest: str, port: int, host_port: int = 0) -> str:
    return f"{bracketed(address)}:{host_port}:{bracketed(guest)}:{port}/udp"


def place(net: Net, name: str) -> Namespace:
    return net.host if name == "host" else net.world.far


def answer(server: socket.socket, *, count: int = 1) -> list[tuple[bytes, Any]]:
    """Receive and send back, reversed; what came, and from whom."""
    got = []
    for _ in range(count):
        payload, peer = server.recvfrom(1 << 16)
        server.sendto(payload[::-1], peer)
        got.append((payload, peer))
    return got


@ADDRESSES
@pytest.mark.parametrize("everywhere", (False, True), ids=("there", "everywhere"))
def test_the_guest_sees_the_caller_and_the_caller_is_answered_from_where_it_called(
    net: Net, guest: TapNamespace, caller: str, called: str, guest_has: str, seen: str, everywhere: bool
) -> None:
    bound = ("::" if ":" in called else "0.0.0.0") if everywhere else called
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, guest_has))
        made = stack.enter_context(forward(net, host_spec(bound, guest_has, port_of(server))))
        ours = stack.enter_context(open_socket(place(net, caller), family_of(called), socket.SOCK_DGRAM))
        # Connected: an answer from another address or port would not come through.
        ours.connect((called, made["host_port"]))
        for _ in range(3):
            ours.send(b"hello")
            [(payload, peer)] = answer(server)
            assert payload == b"hello"
            assert peer[0] == seen
            assert peer[1] == port_of(ours)
            assert ours.recv(100) == b"olleh"
        assert describe(net, made)["connections"]["open"] == 1


def test_everywhere_is_both_families(net: Net, guest: TapNamespace) -> None:
    with datagrams(guest, GUEST4) as server, forward(net, host_spec("::", GUEST4, port_of(server))) as made:
        for address in ("127.0.0.1", "::1", HOST4, HOST6):
            with open_socket(net.host, family_of(address), socket.SOCK_DGRAM) as ours:
                ours.connect((address, made["host_port"]))
                ours.send(b"x")
                answer(server)
                assert ours.recv(10) == b"x"


@pytest.mark.parametrize("length", (0, 1, 1400, 1473, 8000, 60000))
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mtu", (65520, 1500))
def test_datagrams_of_all_sizes(
    net: Net, guest: TapNamespace, other: TapNamespace, mtu: int, version: int, length: int
) -> None:
    address = (address4_of if version == 4 else address6_of)(0 if mtu == 65520 else 1)
    payload = pattern(length)
    called = "127.0.0.1" if version == 4 else "::1"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest if mtu == 65520 else other, address))
        made = stack.enter_context(forward(net, host_spec(called, address, port_of(server))))
        ours = stack.enter_context(open_socket(net.host, family_of(called), socket.SOCK_DGRAM))
        ours.connect((called, made["host_port"]))
        ours.send(payload)
        assert answer(server)[0][0] == payload
        assert ours.recv(1 << 16) == payload[::-1]


def test_callers_that_look_alike_to_the_guest_are_told_apart(net: Net, guest: TapNamespace) -> None:
    """Two callers of the host's loopback, with one port: the guest sees both as the gateway."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))))
        first = stack.enter_context(datagrams(net.host, "127.0.0.1"))
        second = stack.enter_context(datagrams(net.host, "127.0.0.2", port_of(first)))
        for _ in range(2):
            for sock, text in ((first, b"first"), (second, b"second")):
                sock.sendto(text, ("127.0.0.1", made["host_port"]))
            ports = {payload: peer[1] for payload, peer in answer(server, count=2)}
            assert ports[b"first"] == port_of(first)
            assert ports[b"second"] != port_of(first)
            assert first.recv(100) == b"tsrif"
            assert second.recv(100) == b"dnoces"


def test_a_callers_port_that_is_a_service_of_the_gateways_is_not_taken_from_it(net: Net, guest: TapNamespace) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))))
        ours = stack.enter_context(datagrams(net.host, "127.0.0.1", 123))  # NTP's, which the gateway answers
        ours.sendto(b"hello", ("127.0.0.1", made["host_port"]))
        [(_, peer)] = answer(server)
        assert peer[1] != 123
        assert ours.recv(100) == b"olleh"


def test_a_server_speaks_first_to_a_caller_that_is_silent(net: Net, guest: TapNamespace) -> None:
    """Once called, the guest may send as often as it likes."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))))
        ours = stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM))
        ours.connect(("127.0.0.1", made["host_port"]))
        ours.send(b"subscribe")
        _, peer = server.recvfrom(100)
        for number in range(200):
            server.sendto(b"%d" % number, peer)
        assert [int(ours.recv(100)) for _ in range(200)] == list(range(200))
        assert describe(net, made)["bytes_from_guest"] > 200


def test_a_range_leads_each_port_to_its_own(net: Net, guest: TapNamespace) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(datagrams(guest, GUEST4, 7001))
        second = stack.enter_context(datagrams(guest, GUEST4, 7002))
        stack.enter_context(forward(net, f"127.0.0.1:9001-9002:{GUEST4}:7001-7002/udp"))
        ours = stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM))
        ours.sendto(b"to the second", ("127.0.0.1", 9002))
        ours.sendto(b"to the first", ("127.0.0.1", 9001))
        assert first.recv(100) == b"to the first"
        assert second.recv(100) == b"to the second"


@pytest.mark.parametrize(("called", "address"), (("127.0.0.1", GUEST4), ("::1", GUEST6), ("127.0.0.1", GUEST6)))
def test_a_closed_port_of_the_guest_is_one_of_the_host_to_the_caller(
    net: Net, guest: TapNamespace, called: str, address: str
) -> None:
    """netstack runs as root here, so it may send the ICMP error that the kernel would."""
    with datagrams(guest, address) as server:
        closed = port_of(server)
    with (
        forward(net, host_spec(called, address, closed)) as made,
        open_socket(net.host, family_of(called), socket.SOCK_DGRAM) as ours,
    ):
        ours.connect((called, made["host_port"]))
        ours.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(1)
        assert f"refuses port {closed}" in describe(net, made)["last_error"]


def test_the_guest_hears_that_its_caller_is_gone(net: Net, guest: TapNamespace) -> None:
    with (
        datagrams(guest, GUEST4) as server,
        forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))) as made,
        open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM) as ours,
    ):
        ours.sendto(b"x", ("127.0.0.1", made["host_port"]))
        _, peer = server.recvfrom(100)
        ours.close()
        server.connect(peer)
        server.send(b"too late")
        with pytest.raises(ConnectionRefusedError):
            server.recv(1)


def test_an_answer_reaches_a_caller_that_the_guest_has_asked_before(net: Net, guest: TapNamespace) -> None:
    """The guest's own flow to that peer, from the same port, is in the way of nobody."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        peer = stack.enter_context(datagrams(net.world.far, FAR4))
        server.sendto(b"a question", (FAR4, port_of(peer)))
        _, mapped = peer.recvfrom(100)
        made = stack.enter_context(forward(net, host_spec(HOST4, GUEST4, port_of(server))))
        assert mapped[1] != made["host_port"]
        peer.sendto(b"a call", (HOST4, made["host_port"]))
        answer(server)
        assert peer.recvfrom(100) == (b"llac a", (HOST4, made["host_port"]))
        peer.sendto(b"an answer", mapped)
        assert server.recvfrom(100) == (b"an answer", (FAR4, port_of(peer)))


def test_a_guest_that_is_not_there_costs_the_caller_its_datagrams_only(net: Net, guest: TapNamespace) -> None:
    with (
        datagrams(guest, GUEST4) as server,
        forward(net, host_spec("127.0.0.1", address4_of(77), 7)) as nobody,
        forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))) as made,
        open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM) as ours,
    ):
        for _ in range(5):
            ours.sendto(b"lost", ("127.0.0.1", nobody["host_port"]))
        ours.sendto(b"hello", ("127.0.0.1", made["host_port"]))
        answer(server)
        assert ours.recv(100) == b"olleh"
        words = f"nobody answers at {address4_of(77)}"
        wait_until(lambda: describe(net, nobody)["last_error"] == words, words, 15)
        assert describe(net, nobody)["connections"]["refused"] == 5


def test_a_guest_that_comes_back_is_found_again(net: Net) -> None:
    """It loses its tap, as in a reboot: callers go on with the sockets that they have."""
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(net.guest(4))
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", address4_of(4), 7000)))
        ours = stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM))
        ours.connect(("127.0.0.1", made["host_port"]))
        for _ in range(2):
            with datagrams(guest, address4_of(4), 7000) as server:
                ours.send(b"hello")
                [(_, peer)] = answer(server)
                assert peer == (GATEWAY4, port_of(ours))
                assert ours.recv(100) == b"olleh"
            guest.unplug()
            guest.plug_in()
            guest.set_addresses(f"{address4_of(4)}/24", gateways=(GATEWAY4,))


def test_a_removed_forward_gives_its_port_back(net: Net, guest: TapNamespace) -> None:
    with (
        datagrams(guest, GUEST4) as server,
        open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM) as ours,
    ):
        for _ in range(3):
            with forward(net, host_spec("127.0.0.1", GUEST4, port_of(server), 9500)):
                ours.sendto(b"hello", ("127.0.0.1", 9500))
                answer(server)
                assert ours.recv(100) == b"olleh"
        ours.connect(("127.0.0.1", 9500))
        ours.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(1)
        with datagrams(net.host, "127.0.0.1", 9500):
            spec = host_spec("127.0.0.1", GUEST4, 1, 9500)
            status, refusal = net.netstack.ask("POST", "/v1/forwards", {"spec": spec})
        assert status == 409, refusal


@pytest.mark.parametrize("everywhere", (False, True), ids=("there", "everywhere"))
@pytest.mark.parametrize("merged", (False, True), ids=("one by one", "merged"))
def test_bursts_arrive_whole_in_order_and_at_their_own(
    net: Net, guest: TapNamespace, everywhere: bool, merged: bool
) -> None:
    """Two callers at once, by the dozen: what the kernel hands over in one call, or merged (UDP_GRO), is told apart."""
    bound = "0.0.0.0" if everywhere else "127.0.0.1"
    count, size, rounds = 40, 300, 12
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        made = stack.enter_context(forward(net, host_spec(bound, GUEST4, port_of(server))))
        callers = []
        for called in ("127.0.0.1", "127.0.7.7" if everywhere else "127.0.0.1"):
            sock = stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM))
            sock.connect((called, made["host_port"]))
            callers.append(sock)
        sent: dict[int, list[bytes]] = {port_of(sock): [] for sock in callers}
        got: dict[int, list[bytes]] = {port_of(sock): [] for sock in callers}
        for number in range(rounds):
            for sock in callers:
                burst = [b"%d %d " % (number, i) + bytes(size) for i in range(count)]
                burst = [payload[:size] for payload in burst]
                if merged:
                    cut = (socket.IPPROTO_UDP, UDP_SEGMENT, size.to_bytes(2, sys.byteorder))
                    sock.sendmsg([b"".join(burst), b"the last"], [cut])
                    burst.append(b"the last")
                else:
                    for payload in burst:
                        sock.send(payload)
                sent[port_of(sock)] += burst
            while sum(map(len, got.values())) < sum(map(len, sent.values())):
                payload, peer = server.recvfrom(2000)
                got[peer[1]].append(payload)
            for sock in callers:
                server.sendto(b"enough", (GATEWAY4, port_of(sock)))
                assert sock.recv(100) == b"enough"
        assert got == sent


def test_many_callers(net: Net, guest: TapNamespace) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))))
        callers = [stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(300)]
        for sock in callers:
            sock.connect(("127.0.0.1", made["host_port"]))
        for _ in range(2):
            for number, sock in enumerate(callers):
                sock.send(b"%03d" % number)
            assert len(answer(server, count=300)) == 300
            for number, sock in enumerate(callers):
                assert sock.recv(100) == (b"%03d" % number)[::-1]
        assert describe(net, made)["connections"]["open"] == 300


def send_or_hear_it_is_too_big(sock: socket.socket, payload: bytes) -> bool:
    """Send; True when the kernel says that this is too big for the way."""
    try:
        sock.send(payload)
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        return True
    return False


def test_large_answers_keep_to_what_the_way_takes(net: Net, guest: TapNamespace) -> None:
    """With DF set, the guest is told the MTU of the way to a caller behind a router."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        server.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        made = stack.enter_context(forward(net, host_spec(HOST4, GUEST4, port_of(server))))
        ours = stack.enter_context(open_socket(net.world.far, socket.AF_INET, socket.SOCK_DGRAM))
        ours.connect((HOST4, made["host_port"]))
        ours.send(b"how large?")
        _, peer = server.recvfrom(100)
        server.connect(peer)
        payload = pattern(1450)
        until = time.monotonic() + PATIENCE
        refused = 0
        while not select.select([ours], [], [], 0.05)[0]:
            assert time.monotonic() < until
            refused += send_or_hear_it_is_too_big(server, payload[: 1300 if refused else 1450])
        assert refused
        assert len(ours.recv(2000)) == 1300


def test_tcp_and_udp_of_one_port_are_two_forwards(net: Net, guest: TapNamespace) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagrams(guest, GUEST4))
        listener = stack.enter_context(open_socket(guest, socket.AF_INET))
        listener.bind((GUEST4, port_of(server)))
        listener.listen()
        made = stack.enter_context(forward(net, host_spec("127.0.0.1", GUEST4, port_of(server))))
        stack.enter_context(forward(net, f"127.0.0.1:{made['host_port']}:{GUEST4}:{port_of(server)}"))
        ours = stack.enter_context(open_socket(net.host, socket.AF_INET, socket.SOCK_DGRAM))
        ours.sendto(b"udp", ("127.0.0.1", made["host_port"]))
        assert answer(server)[0][0] == b"udp"
        with connect(net.host, "127.0.0.1", made["host_port"]) as stream:
            stream.sendall(b"tcp")
            with listener.accept()[0] as accepted:
                assert accepted.recv(10) == b"tcp"
