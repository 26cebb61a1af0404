"""A guest that has the host's own address: a real kernel that runs services as Kubernetes does, and callers outside.

    far -- router -- host (198.51.100.1 and .2) == netstack == guest (198.51.100.1) -- pods (10.42.1.2, 10.42.2.2)

The guest's kernel has the rules that kube-proxy makes for a service with an external IP and externalTrafficPolicy
Local: what comes for that address and port goes to a pod, and the caller stays who it is.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.namespaces import (
    FAR4,
    FAR6,
    HOST4,
    HOST6,
    ROUTER4,
    Namespace,
    TapNamespace,
    World,
    connect_namespaces,
    wait_until,
)
from tests.lab.netstack import Netstack
from tests.netns.net import (
    GATEWAY4,
    connect,
    datagrams,
    family_of,
    is_readable,
    mac_of,
    open_socket,
    port_of,
    wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip", "busybox", "nft"), pytest.mark.timeout(90)]

ETH_P_ARP = 0x0806  # include/uapi/linux/if_ether.h
SECOND4 = "198.51.100.2"  # another address of the host, which no interface of the guest has
PODS = ("10.42.1.2", "10.42.2.2")

HOOK = """#!/bin/sh
case $1 in bound | renew)
    ip addr flush dev $interface scope global
    ip addr add $ip/$mask dev $interface
    ip route replace default via $router dev $interface ;;
esac
"""

RULES = f"""
table ip kube {{
    chain services {{
        type nat hook prerouting priority dstnat
        ip daddr {HOST4} tcp dport 80 dnat to {PODS[0]}:8080
        ip daddr {SECOND4} tcp dport 80 dnat to {PODS[1]}:8080
        ip daddr {HOST4} udp dport 53 dnat to {PODS[0]}:5353
        ip daddr {SECOND4} udp dport 53 dnat to {PODS[1]}:5353
    }}
}}
"""


class Cluster:
    """The world, netstack in it, the guest that is the host, its pods, and another guest."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.world = stack.enter_context(World())
        self.world.check_isolation()
        self.host.add_address("eth0", f"{SECOND4}/24")
        self.config = config = self.world.folder / "n.toml"
        self.configure('address = "host"')
        path = self.world.folder / "qemu.sock"
        self.netstack = stack.enter_context(
            Netstack(self.host, self.world.folder / "n", links=[f"unix://{path}"], arguments=["-c", str(config)])
        )
        self.guest = stack.enter_context(TapNamespace(path, inside=self.host, mac=mac_of(0)))
        self.other = stack.enter_context(TapNamespace(path, inside=self.host, mac=mac_of(1)))
        self.other.set_addresses("192.168.5.21/24", gateways=[GATEWAY4])
        self._hook = self.world.folder / "hook"
        self._hook.write_text(HOOK)
        self._hook.chmod(0o755)
        self.ask_for_address()
        self.guest.set_sysctl("net/ipv4/ip_forward", 1)
        self.pods = [stack.enter_context(Namespace(f"pod{i}", inside=self.host)) for i in range(2)]
        for i, (pod, address) in enumerate(zip(self.pods, PODS, strict=True)):
            router = address[:-1] + "1"
            connect_namespaces(self.guest, f"pod{i}", pod, "eth0")
            self.guest.add_address(f"pod{i}", f"{router}/24")
            pod.add_address("eth0", f"{address}/24")
            pod.ip("route", "add", "default", "via", router)
        self.guest.run("nft", "-f", "-", stdin=RULES)

    @property
    def host(self) -> Namespace:
        return self.world.host

    def configure(self, address: str) -> None:
        """Write the settings, with what they say about the guest's address."""
        self.config.write_text(f'dns.source = "none"\n[[guest]]\nname = "k3s"\nmac = "{mac_of(0)}"\n{address}\n')

    def ask_for_address(self) -> None:
        """Run a real DHCP client in the guest to its end."""
        self.guest.run("busybox", "udhcpc", "-i", self.guest.tap, "-n", "-q", "-f", "-s", str(self._hook))

    def addresses(self) -> list[str]:
        """The IPv4 addresses of the guest's network card."""
        found = json.loads(self.guest.ip("-j", "-4", "addr", "show", "dev", self.guest.tap))
        return [f"{entry['local']}/{entry['prefixlen']}" for entry in found[0]["addr_info"]]

    @contextlib.contextmanager
    def forward(self, spec: str) -> Iterator[dict[str, Any]]:
        status, made = self.netstack.ask("POST", "/v1/forwards", {"spec": spec})
        assert status == 201, made
        try:
            yield made
        finally:
            self.netstack.ask("DELETE", f"/v1/forwards/{made['id']}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        found = Cluster(stack)
        yield found
        assert "internal_error" not in found.netstack.status()["drops"], found.netstack.log
        assert "Traceback" not in found.netstack.log, found.netstack.log


def serve(namespace: Namespace, address: str, port: int, banner: bytes) -> socket.socket:
    """A listening socket that has a banner to give; see call()."""
    listener = open_socket(namespace, family_of(address))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    SERVERS[listener.fileno()] = banner
    return listener


SERVERS: dict[int, bytes] = {}


def call(caller: Namespace, address: str, port: int, server: socket.socket) -> tuple[bytes, str]:
    """Connect, take the server's banner; which one, and whom the server saw."""
    with connect(caller, address, port) as ours:
        theirs, peer = server.accept()
        with theirs:
            theirs.sendall(SERVERS[server.fileno()])
        return ours.recv(100), peer[0]


def test_the_guest_has_the_hosts_address_and_router(cluster: Cluster) -> None:
    assert cluster.addresses() == [f"{HOST4}/24"]
    assert f"default via {ROUTER4} " in cluster.guest.ip("-4", "route")
    [guest] = [entry for entry in cluster.netstack.status()["guests"] if entry["mac"] == mac_of(0)]
    assert guest["addresses"][0] == HOST4


@pytest.mark.parametrize("where", ("far", "router"))
def test_it_reaches_what_the_host_reaches_and_is_seen_as_the_host(cluster: Cluster, where: str) -> None:
    """The router is on the host's own wire, so the guest asks for it by ARP."""
    namespace, address = (cluster.world.far, FAR4) if where == "far" else (cluster.world.router, ROUTER4)
    with serve(namespace, address, 0, b"hello") as server:
        assert call(cluster.guest, address, port_of(server), server) == (b"hello", HOST4)
    with datagrams(namespace, address) as server, open_socket(cluster.guest, socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.connect((address, port_of(server)))
        ours.send(b"question")
        payload, peer = server.recvfrom(100)
        assert (payload, peer[0]) == (b"question", HOST4)
        server.sendto(b"answer", peer)
        assert ours.recv(100) == b"answer"


def test_the_host_is_where_every_guest_finds_it(cluster: Cluster) -> None:
    with serve(cluster.host, "127.0.0.1", 0, b"the host") as server:
        assert call(cluster.guest, GATEWAY4, port_of(server), server) == (b"the host", "127.0.0.1")
    cluster.guest.run("ping", "-c1", "-W5", GATEWAY4)


def test_services_with_external_addresses_are_reached_at_both(cluster: Cluster) -> None:
    """One port, two addresses, two services: only the destination address tells them apart."""
    with contextlib.ExitStack() as stack:
        for address in (HOST4, SECOND4):
            stack.enter_context(cluster.forward(f"{address}:80:{address}:80"))
        first = stack.enter_context(serve(cluster.pods[0], PODS[0], 8080, b"first"))
        second = stack.enter_context(serve(cluster.pods[1], PODS[1], 8080, b"second"))
        for caller, seen in ((cluster.world.far, FAR4), (cluster.world.router, ROUTER4), (cluster.host, GATEWAY4)):
            assert call(caller, HOST4, 80, first) == (b"first", seen)
            assert call(caller, SECOND4, 80, second) == (b"second", seen)


def test_so_are_services_over_udp(cluster: Cluster) -> None:
    with contextlib.ExitStack() as stack:
        for address in (HOST4, SECOND4):
            stack.enter_context(cluster.forward(f"{address}:53:{address}:53/udp"))
        pods = [stack.enter_context(datagrams(cluster.pods[i], PODS[i], 5353)) for i in range(2)]
        for caller, seen in ((cluster.world.far, FAR4), (cluster.world.router, ROUTER4), (cluster.host, GATEWAY4)):
            for address, pod in zip((HOST4, SECOND4), pods, strict=True):
                with open_socket(caller, socket.AF_INET, socket.SOCK_DGRAM) as ours:
                    ours.connect((address, 53))
                    ours.send(b"query")
                    payload, peer = pod.recvfrom(100)
                    assert (payload, peer[0]) == (b"query", seen)
                    pod.sendto(b"answer", peer)
                    assert ours.recv(100) == b"answer"


def test_a_forward_to_the_first_guest_or_its_name_arrives_at_the_hosts_address(cluster: Cluster) -> None:
    for guest in ("", "k3s:"):
        with cluster.forward(f"{HOST4}:80:{guest}80"), serve(cluster.pods[0], PODS[0], 8080, b"first") as server:
            assert call(cluster.world.far, HOST4, 80, server) == (b"first", FAR4)


def test_another_guest_cannot_take_the_hosts_address_nor_stand_for_its_network(cluster: Cluster) -> None:
    def count() -> int:
        found: int = cluster.netstack.status()["drops"].get("source_not_its_own", 0)
        return found

    theirs = bytes.fromhex(mac_of(1).replace(":", ""))
    victim = bytes.fromhex(mac_of(0).replace(":", ""))
    gateway = bytes.fromhex("5255c0a80502")
    packet = bytes.fromhex("450000240001000040010000") + socket.inet_aton(HOST4) + socket.inet_aton(FAR4)
    packet += bytes.fromhex("0800f7ff00000000") + bytes(8)
    claim = bytes.fromhex("0001080006040002") + theirs + socket.inet_aton(ROUTER4) + victim + socket.inet_aton(HOST4)
    with wire(cluster.other) as sock:
        for words in (gateway + theirs + b"\x08\x00" + packet, victim + theirs + b"\x08\x06" + claim):
            before = count()
            sock.send(words)
            wait_until(lambda before=before: count() > before, "the frame is counted as dropped")
    assert "52:54:00:77:00:01" not in cluster.guest.ip("neigh", "show", ROUTER4)


def test_the_guest_does_not_find_its_own_address_taken(cluster: Cluster) -> None:
    """A probe (RFC 5227) for its address gets no answer from the proxy, one for a neighbor's address does."""
    mac = bytes.fromhex(mac_of(0).replace(":", ""))

    def ask(sender: str, target: str) -> bool:
        head = b"\xff" * 6 + mac + b"\x08\x06" + bytes.fromhex("0001080006040001")
        with open_socket(cluster.guest, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as sock:
            sock.bind((cluster.guest.tap, ETH_P_ARP))
            sock.send(head + mac + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target))
            until = time.monotonic() + 0.5
            while time.monotonic() < until and is_readable(sock, max(0.0, until - time.monotonic())):
                frame = sock.recv(2000)
                if frame[12:14] == b"\x08\x06" and frame[21] == 2 and frame[28:32] == socket.inet_aton(target):
                    return True
        return False

    assert not ask("0.0.0.0", HOST4)
    assert not ask(HOST4, HOST4)
    assert not ask(HOST4, SECOND4)
    assert ask(HOST4, ROUTER4)
    assert ask(HOST4, "198.51.100.77")


@pytest.mark.needs("dhclient")
def test_over_ipv6_too(cluster: Cluster, tmp_path: Path) -> None:
    hook = tmp_path / "hook6"
    hook.write_text(
        '#!/bin/sh\n[ "$reason" = BOUND6 ] && ip addr add $new_ip6_address/128 dev $interface nodad\nexit 0\n'
    )
    hook.chmod(0o755)
    tap = cluster.guest.tap
    wait_until(lambda: "via" in cluster.guest.ip("-6", "route", "show", "default"), "a router advertisement", 20)
    words = ("dhclient", "-6", "-1", "-d", "--no-pid", "-sf", str(hook), "-lf", str(tmp_path / "leases"), tap)
    client = cluster.guest.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: HOST6 in cluster.guest.ip("-6", "addr", "show", "dev", tap), "the host's address", 20)
    finally:
        client.kill()
        client.wait()
    with serve(cluster.world.far, FAR6, 0, b"hello") as server:
        assert call(cluster.guest, FAR6, port_of(server), server) == (b"hello", HOST6)
    with cluster.forward(f"[{HOST6}]:8080:[{HOST6}]:80"), serve(cluster.guest, HOST6, 80, b"six") as server:
        assert call(cluster.world.far, HOST6, 8080, server) == (b"six", FAR6)


def test_it_follows_when_the_host_gets_another_address(cluster: Cluster) -> None:
    """The former address serves the guest until it renews its lease; then it has the new one."""
    moved = "198.51.100.9"
    host = cluster.host
    with contextlib.ExitStack() as stack:
        host.ip("-4", "addr", "flush", "dev", "eth0")
        host.add_address("eth0", f"{moved}/24")
        host.ip("route", "replace", "default", "via", ROUTER4)
        wait_until(lambda: moved in cluster.netstack.log, "the look", 15)
        server = stack.enter_context(serve(cluster.world.far, FAR4, 0, b"hello"))
        assert call(cluster.guest, FAR4, port_of(server), server) == (b"hello", moved)
        cluster.ask_for_address()
        assert cluster.addresses() == [f"{moved}/24"]
        assert call(cluster.guest, FAR4, port_of(server), server) == (b"hello", moved)
        with cluster.forward(f"{moved}:8080:81"), serve(cluster.guest, moved, 81, b"moved") as here:
            assert call(cluster.world.far, moved, 8080, here) == (b"moved", FAR4)


def test_a_reload_makes_it_a_guest_like_others_and_the_host_again(cluster: Cluster) -> None:
    process = cluster.netstack.process
    assert process is not None
    for address, expected in (("", "192.168.5."), ('address = "host"', "198.51.100.")):
        cluster.configure(address)
        process.send_signal(signal.SIGHUP)

        def has_it(expected: str = expected) -> bool:
            cluster.ask_for_address()
            [found] = cluster.addresses()
            return found.startswith(expected)

        wait_until(has_it, f"an address of {expected}")
