"""The parsing path without sockets or a guest, in nanoseconds for each frame: what the interpreter itself costs.

A real stack with a link that throws frames away and host sockets that take and give bytes without the kernel. Frames
are made beforehand; only the calls that the rim would make are timed, best of several repeats, so that the noise of a
busy machine mostly stays out. `python -m benchmarks --only micro`.
"""

from __future__ import annotations

import struct
import time
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Metric
from netstack.core.addresses import Addresses
from netstack.core.ports import READABLE, WRITABLE, Buffer, DatagramListener, DatagramSocket, Handler, HostSocket
from netstack.core.stack import Stack
from netstack.vde.link import BaseLink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy import uint8
    from numpy.typing import NDArray

    from benchmarks.figures import Figures

SECONDS = 0.7  # for each figure
BATCH = 90  # frames of 1,500 bytes that a socket with Linux' default buffer holds

GUEST_MAC, GATEWAY_MAC = bytes.fromhex("525400123456"), bytes.fromhex("5255c0a80502")
GUEST, GATEWAY = ip_address("192.168.5.15").packed, ip_address("192.168.5.2").packed
GUEST6, GATEWAY6 = ip_address("fd00:c0a8:5::15").packed, ip_address("fd00:c0a8:5::2").packed
SYN, ACK, PSH_ACK = 2, 16, 24
ISS = 1000

_ETHERNET_IPV4 = struct.Struct("!6s6sHBBHHHBBH4s4s")
_ETHERNET_IPV6 = struct.Struct("!6s6sHIHBB16s16s")
_TCP = struct.Struct("!HHIIBBHHH")


def write_frame(
    port: int, seq: int, ack: int, flags: int, payload: bytes, *, options: bytes = b"", v6: bool = False
) -> bytes:
    """A guest's TCP segment to port 80 of the gateway. Checksums are 0: the stack trusts frames of a local socket."""
    length = 20 + len(options) + len(payload)
    if v6:
        head = _ETHERNET_IPV6.pack(GATEWAY_MAC, GUEST_MAC, 0x86DD, 6 << 28, length, 6, 64, GUEST6, GATEWAY6)
    else:
        head = _ETHERNET_IPV4.pack(
            GATEWAY_MAC, GUEST_MAC, 0x0800, 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0, GUEST, GATEWAY
        )
    tcp = _TCP.pack(port, 80, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, (20 + len(options)) << 2, flags, 65535, 0, 0)
    return (head + tcp + options + payload).ljust(60, b"\0")


class NullLink(BaseLink):
    """A link whose kernel takes everything at once."""

    prefix = 4

    def write_prefix(self, buffer: bytearray, frame_length: int) -> None:
        buffer[:4] = frame_length.to_bytes(4, "big")

    def _put_frame(self, head: Buffer, payload: Buffer | None) -> None:
        self.last: Buffer = head

    def _put_burst(self, frames: NDArray[uint8]) -> None:
        self.last = memoryview(frames[-1])

    def flush(self) -> None:
        self.backlog = 0

    def _close(self) -> None: ...


class NullSocket:
    """A host socket that takes everything, and gives `ready` bytes before it would block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.ready = 0

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def send(self, data: Any, /) -> int:
        return len(data)

    def sendmsg(self, buffers: Sequence[Any], /) -> int:
        return sum(map(len, buffers))

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        n = min(self.ready, nbytes or len(buffer))
        if not n:
            raise BlockingIOError
        self.ready -= n
        return n

    def recvmsg_into(self, buffers: Sequence[Any], /) -> tuple[int, Any, int, Any]:
        return self.recv_into(None, sum(map(len, buffers))), [], 0, None


class NullHost:
    """Every connect() succeeds."""

    def __init__(self) -> None:
        self.opened: list[NullSocket] = []

    def open_tcp(self, address: bytes, port: int) -> HostSocket:
        self.opened.append(NullSocket(1000 + len(self.opened)))
        return self.opened[-1]

    def connect_error(self, sock: HostSocket) -> int:
        return 0

    def is_connected(self, sock: HostSocket) -> bool:
        return False

    def reset(self, sock: HostSocket) -> None: ...
    def open_udp(self, address: bytes, port: int) -> DatagramSocket:
        raise PermissionError

    def listen_udp(self, host: str, port: int) -> list[DatagramListener]:
        raise PermissionError

    def open_ping(self, address: bytes) -> DatagramSocket:
        raise PermissionError


class NullPoller:
    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}

    def register(self, fd: int, handler: Handler, events: int) -> None:
        self.handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None: ...
    def unregister(self, fd: int) -> None:
        self.handlers.pop(fd, None)


class Conversation:
    """One guest's end of a flow: its sequence numbers."""

    def __init__(self, bench: Bench, port: int, *, v6: bool) -> None:
        self.port, self.v6 = port, v6
        options = struct.pack("!BBHBBB", 2, 4, bench.mtu - (60 if v6 else 40), 3, 3, 7) + b"\1"
        bench.give([write_frame(port, ISS, 0, SYN, b"", options=options, v6=v6)])
        self.sock = bench.host.opened[-1]
        self.flow = bench.poller.handlers[self.sock.fileno()]
        self.flow.on_ready(WRITABLE, bench.now)
        # SYN-ACK: SEG.SEQ is at offset 4 of the TCP header.
        at = bench.link.prefix + 14 + (40 if v6 else 20) + 4
        self.ack = int.from_bytes(bytes(bench.link.last[at : at + 4]), "big") + 1
        self.seq = ISS + 1
        bench.give([self.write(b"")])

    def write(self, payload: bytes) -> bytes:
        frame = write_frame(self.port, self.seq, self.ack, PSH_ACK if payload else ACK, payload, v6=self.v6)
        self.seq += len(payload)
        return frame


class Bench:
    """A stack with one link and some conversations."""

    def __init__(self, mtu: int, conversations: int = 1, *, v6: bool = False) -> None:
        self.mtu = mtu
        self.now = 1000.0
        self.host, self.poller = NullHost(), NullPoller()
        addresses = Addresses(
            GATEWAY_MAC, IPv4Network("192.168.5.0/24"), GATEWAY, ip_address("192.168.5.3").packed,
            IPv6Network("fd00:c0a8:5::/64"), GATEWAY6, ip_address("fd00:c0a8:5::3").packed,
        )  # fmt: skip
        self.stack = Stack(addresses, self.host, self.poller, secret=bytes(16))
        self.link = NullLink("bench", mtu, self.poller, self.stack.receive_frames)
        self.stack.add_link(self.link, 0.0)
        self.conversations = [Conversation(self, 10000 + i, v6=v6) for i in range(conversations)]

    def lay_out(self, frames: Sequence[bytes]) -> tuple[memoryview, list[int]]:
        """Frames as a link's buffer holds them, and their spans."""
        spans: list[int] = []
        at = 0
        for frame in frames:
            spans += (at + 4, at + 4 + len(frame))
            at += 4 + len(frame)
        return memoryview(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)), spans

    def give(self, frames: Sequence[bytes]) -> None:
        buffer, spans = self.lay_out(frames)
        self.stack.receive_frames(self.link, buffer, spans, self.now)
        self.stack.end_round(self.now)

    def give_all(self, batches: Sequence[tuple[memoryview, list[int]]]) -> float:
        """Seconds that the batches take."""
        receive, end, link, now = self.stack.receive_frames, self.stack.end_round, self.link, self.now
        start = time.perf_counter()
        for buffer, spans in batches:
            receive(link, buffer, spans, now)
            end(now)
        return time.perf_counter() - start


def best(run: Callable[[], tuple[float, int]]) -> float:
    """Nanoseconds for each unit: the best of many runs, each giving its seconds and its units."""
    found = float("inf")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        seconds, units = run()
        found = min(found, seconds * 1e9 / units)
    return found


def upload(mtu: int, flows: int, *, v6: bool = False) -> float:
    """Full frames from the guest, taken in turns from `flows` conversations."""
    bench = Bench(mtu, flows, v6=v6)
    payload = bytes(mtu - (60 if v6 else 40))
    count = BATCH if mtu <= 1500 else 4
    turns = 0

    def run() -> tuple[float, int]:
        nonlocal turns
        batches = []
        for _ in range(20):
            frames = []
            for _ in range(count):
                frames.append(bench.conversations[turns % flows].write(payload))
                turns += 1
            batches.append(bench.lay_out(frames))
        return bench.give_all(batches), 20 * count

    return best(run)


def download(mtu: int) -> tuple[float, float]:
    """Segments of one flow toward the guest: building them, and taking the guest's pure ACKs, one for every two."""
    bench = Bench(mtu)
    talk = bench.conversations[0]
    mss = bench.mtu - 40
    built = acked = float("inf")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        before = talk.ack
        talk.sock.ready = 1 << 19
        start = time.perf_counter()
        for _ in range(2):
            talk.flow.on_ready(READABLE, bench.now)
            bench.stack.end_round(bench.now)
        seconds = time.perf_counter() - start
        sent = (1 << 19) - talk.sock.ready
        talk.sock.ready = 0
        segments = -(-sent // mss)
        built = min(built, seconds * 1e9 / segments)
        frames = []
        for first in range(0, sent, 2 * mss):
            talk.ack = before + min(first + 2 * mss, sent)
            frames.append(talk.write(b""))
        acked = min(acked, bench.give_all([bench.lay_out(frames)]) * 1e9 / len(frames))
    return built, acked


def round_trip() -> float:
    """One byte from the guest to the host's socket, one byte back, and its ACK with the next one's data."""
    bench = Bench(1500)
    talk = bench.conversations[0]

    def run() -> tuple[float, int]:
        frames = []
        for _ in range(500):
            frames.append(bench.lay_out([talk.write(b"x")]))
            talk.ack += 1
        receive, end, link, now, flow = (
            bench.stack.receive_frames,
            bench.stack.end_round,
            bench.link,
            bench.now,
            talk.flow,
        )
        start = time.perf_counter()
        for buffer, spans in frames:
            receive(link, buffer, spans, now)
            end(now)
            talk.sock.ready = 1
            flow.on_ready(READABLE, now)
            end(now)
        return time.perf_counter() - start, len(frames)

    return best(run)


def connections() -> float:
    """SYN, the host's connect(), SYN-ACK, ACK: a connection opened by the guest; ended by its RST, not counted."""
    bench = Bench(1500)
    port = 20000

    def run() -> tuple[float, int]:
        nonlocal port
        start = time.perf_counter()
        made = [Conversation(bench, port + i, v6=False) for i in range(100)]
        seconds = time.perf_counter() - start
        port += 100
        bench.give([write_frame(talk.port, talk.seq, talk.ack, 4, b"") for talk in made])
        return seconds, len(made)

    return best(run)


def measure_micro(figures: Figures) -> None:
    """All of the above into the figures."""

    def add(key: str, title: str, value: float) -> None:
        figures.add(Metric(f"micro.{key}", "micro", title, "ns"), "netstack", value)

    add("up.1500.1", "guest → host, frame of 1,500 bytes, 1 flow", upload(1500, 1))
    add("up.1500.100", "guest → host, frame of 1,500 bytes, 100 flows in turns", upload(1500, 100))
    add("up6.1500.1", "guest → host, frame of 1,500 bytes, 1 flow, IPv6", upload(1500, 1, v6=True))
    add("up.65520.1", "guest → host, frame of 65,520 bytes, 1 flow", upload(65520, 1))
    built, acked = download(1500)
    add("down.1500", "host → guest, segment built at MTU 1500", built)
    add("ack.1500", "pure ACK for two segments", acked)
    built, acked = download(65520)
    add("down.65520", "host → guest, segment built at MTU 65520", built)
    add("round_trip", "round trip of one byte", round_trip())
    add("connection", "connection opened by a guest, its frames made here", connections())
