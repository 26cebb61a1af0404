"""A running netstack with Linux kernels as its guests, and sockets in any of the namespaces for a test to hold.

Theory of operation. A thread may enter a network namespace by itself, and a socket stays where it was made (see
tests/rim/inside.py), so a test has both ends of a connection in its hands: the guest's and the host's. What lies
between them is real: two kernels' TCP, a tap, QEMU's framing, netstack and the host's sockets.

    test:  socket in a guest  --  kernel  --  tap  --  relay  --  netstack  --  kernel  --  socket in the host

Guest `number` has the addresses 192.168.5.(20 + number) and fd00:c0a8:5::(20 + number).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Self

from tests.lab.namespaces import Namespace, TapNamespace, World, wait_until
from tests.lab.netstack import Netstack
from tests.rim.inside import call_inside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GATEWAY4, GATEWAY6 = "192.168.5.2", "fd00:c0a8:5::2"
GATEWAY_MAC = "52:55:c0:a8:05:02"

# Long enough for a machine that is busy with something else; what a test waits for comes in milliseconds.
PATIENCE = 20.0
AT_ONCE = 1.0  # what has to happen without waiting for any timer of TCP, of which the shortest is a second

MEGABYTE = 1 << 20


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def open_socket(namespace: Namespace, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A socket in a namespace, whose calls end after PATIENCE."""
    sock = call_inside(namespace, lambda: socket.socket(family, kind, protocol))
    sock.settimeout(PATIENCE)
    return sock


def connect(namespace: Namespace, address: str, port: int, *, receive_buffer: int = 0) -> socket.socket:
    """A TCP connection from a namespace; `receive_buffer`: its SO_RCVBUF, else the kernel's choice."""
    sock = open_socket(namespace, family_of(address))
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def listen(namespace: Namespace, address: str, port: int = 0, backlog: int = 64) -> socket.socket:
    """A listening TCP socket in a namespace."""
    sock = open_socket(namespace, family_of(address))
    sock.bind((address, port))
    sock.listen(backlog)
    return sock


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def datagrams(namespace: Namespace, address: str, port: int = 0) -> socket.socket:
    """A UDP socket in a namespace, bound to an address."""
    sock = open_socket(namespace, family_of(address), socket.SOCK_DGRAM)
    sock.bind((address, port))
    return sock


def wire(guest: TapNamespace) -> socket.socket:
    """A raw socket on a guest's tap: what is sent there is a frame from the guest."""
    sock = open_socket(guest, socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind((guest.tap, 0))
    return sock


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive_all(sock: socket.socket) -> bytes:
    """What comes, to the end of the stream."""
    received = bytearray()
    while data := sock.recv(1 << 18):
        received += data
    return bytes(received)


def frame(data: bytes) -> bytes:
    """A frame as it stands in QEMU's stream."""
    return struct.pack(">I", len(data)) + data


class Net:
    """A world, a netstack in it, and its guests."""

    def __init__(
        self, stack: contextlib.ExitStack, *, log_level: str = "info", taps: int = 0, arguments: Sequence[str] = ()
    ) -> None:
        """`taps`: so many further guests, whose taps netstack makes itself, with offload."""
        self.stack = stack
        self.world = stack.enter_context(World())
        self.world.check_isolation()
        self.socket: Path = self.world.folder / "qemu.sock"
        self.taps = [stack.enter_context(Namespace(f"tap{number}", inside=self.host)) for number in range(taps)]
        self.netstack = stack.enter_context(
            Netstack(
                self.world.host,
                self.world.folder / "n",
                links=[f"unix://{self.socket}", *(f"tap://tap0?netns={each.path}" for each in self.taps)],
                arguments=["--log-level", log_level, *arguments],
            )
        )

    @property
    def host(self) -> Namespace:
        return self.world.host

    def guest(self, number: int, *, mtu: int = 65520, addresses: bool = True) -> TapNamespace:
        """Plug in guest `number`; the caller closes it."""
        guest = TapNamespace(self.socket, inside=self.host, mtu=mtu, mac=mac_of(number))
        if addresses:
            guest.set_addresses(f"{address4_of(number)}/24", f"{address6_of(number)}/64", gateways=(GATEWAY4, GATEWAY6))
        return guest

    def plug(self) -> socket.socket:
        """Connect to the link's socket without being a guest: what is sent is the stream itself."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.socket))
        return sock

    @contextlib.contextmanager
    def pair(
        self, guest: Namespace, address: str, *, receive_buffer: int = 0
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The two ends of one connection of a guest: its own, and the host's."""
        with listen(self.host, address) as listener:
            ours = connect(guest, address, port_of(listener), receive_buffer=receive_buffer)
            theirs, _ = listener.accept()
        theirs.settimeout(PATIENCE)
        with ours, theirs:
            yield ours, theirs

    def status(self) -> dict[str, Any]:
        return self.netstack.status()

    def drops(self, reason: str) -> int:
        found: int = self.status()["drops"].get(reason, 0)
        return found

    def flows_of(self, address: str) -> list[dict[str, Any]]:
        """The flows of the guest with this address."""
        return [
            flow for flow in self.status()["flows"]["list"] if flow["guest"].rpartition(":")[0].strip("[]") == address
        ]

    def check_alive(self) -> None:
        """Assert that it runs, and that nothing went wrong inside."""
        assert self.netstack.process is not None
        assert self.netstack.process.poll() is None, self.netstack.log
        assert "internal_error" not in self.status()["drops"], self.netstack.log
        assert "Traceback" not in self.netstack.log, self.netstack.log


class Echo:
    """A conversation that must not suffer from what others do: a guest's connection to an echo on the host."""

    def __init__(self, net: Net, guest: TapNamespace, address: str) -> None:
        self._stack = contextlib.ExitStack()
        self._ours, self._theirs = self._stack.enter_context(net.pair(guest, address))
        for sock in (self._ours, self._theirs):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._count = 0

    def round_trip(self) -> float:
        """The seconds that one request and its answer took."""
        self._count += 1
        request = self._count.to_bytes(8, "big")
        start = time.monotonic()
        self._ours.sendall(request)
        self._theirs.sendall(self._theirs.recv(8, socket.MSG_WAITALL))
        assert self._ours.recv(8, socket.MSG_WAITALL) == request
        return time.monotonic() - start

    def median(self, count: int = 25) -> float:
        """The median of several."""
        return sorted(self.round_trip() for _ in range(count))[count // 2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def mac_of(number: int) -> str:
    return f"52:54:00:77:00:{number:02x}"


def address4_of(number: int) -> str:
    return f"192.168.5.{20 + number}"


def address6_of(number: int) -> str:
    return f"fd00:c0a8:5::{20 + number}"


def is_readable(sock: socket.socket, timeout: float = 0.0) -> bool:
    return bool(select.select([sock], [], [], timeout)[0])


def memory_settles(net: Net, limit: int, what: str) -> None:
    """Assert that netstack's memory is, or gets, below a limit in bytes."""
    wait_until(lambda: net.netstack.memory() < limit, f"{what}: netstack's memory below {limit >> 20} MiB", 10)


def errors_of(attempts: Sequence[socket.socket]) -> list[int]:
    """SO_ERROR of each."""
    return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for sock in attempts]
