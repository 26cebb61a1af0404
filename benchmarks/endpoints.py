"""The two ends of the latency and connection measurements: an echo server for the host and its clients for the guest.

One file with nothing but the standard library, so that it starts quickly and is the same for every peer:

    endpoints.py serve ADDRESS PORT                TCP and UDP echo at PORT; TCP with one answer at PORT+1
    endpoints.py rr tcp|udp ADDRESS PORT SIZE SECONDS   round trips one after another; prints their distribution
    endpoints.py crr ADDRESS PORT CONCURRENCY SECONDS   connect, request, response, close; prints how many a second
    endpoints.py pace ADDRESS PORT RATE SECONDS    the same, RATE of them a second; prints how long they took
    endpoints.py hold ADDRESS PORT COUNT           opens COUNT connections, says "ready", waits for its input to end

The clients print one line of JSON. Times are microseconds. The cost of Python on both ends (some 10 us a round trip) is
part of each figure and the same for all, so it makes ratios milder than the network processes alone would be.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import sys
import time

REQUEST = b"?"
TIMEOUT = 1.0


def allow_many_files() -> None:
    import resource  # not in the library of the virtual machine, which holds few

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def serve(address: str, port: int) -> None:
    """Serve until a signal ends the process."""
    allow_many_files()
    echo, once = listen(address, port), listen(address, port + 1)
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind((address, port))
    epoll = select.epoll()
    for waiting in (echo, once, datagrams):
        epoll.register(waiting, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    answer_once: set[int] = set()
    print("ready", flush=True)
    while True:
        for fd, _ in epoll.poll():
            connection = connections.get(fd)
            if connection is not None:
                try:
                    data = connection.recv(65536)
                    if data:
                        connection.send(data)
                except OSError:
                    data = b""
                if not data or fd in answer_once:
                    answer_once.discard(fd)
                    del connections[fd]
                    connection.close()
            elif fd == datagrams.fileno():
                data, sender = datagrams.recvfrom(65536)
                datagrams.sendto(data, sender)
            else:
                listener = echo if fd == echo.fileno() else once
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    continue
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[connection.fileno()] = connection
                if listener is once:
                    answer_once.add(connection.fileno())
                epoll.register(connection, select.EPOLLIN)


def measure_round_trips(protocol: str, address: str, port: int, size: int, seconds: float) -> dict[str, float]:
    """Send `size` bytes, wait for as many, again until the time is over; the first tenth is not counted."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    message = b"x" * size
    taken: list[int] = []
    lost = 0
    clock = time.perf_counter_ns
    with socket.socket(type=kind) as client:
        client.settimeout(5.0)
        client.connect((address, port))
        if protocol == "tcp":
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.settimeout(None)  # a timeout would cost a poll(2) for every receive
        else:
            client.settimeout(None)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, int(TIMEOUT).to_bytes(8, "little") + bytes(8))
        start = clock()
        count_from, end = start + int(seconds * 1e8), start + int(seconds * 1e9)
        now = start
        while now < end:
            before = now
            client.send(message)
            try:
                received = len(client.recv(65536))
                while received < size and protocol == "tcp":
                    received += len(client.recv(65536)) or size
            except BlockingIOError:  # SO_RCVTIMEO
                lost += 1
                now = clock()
                continue
            now = clock()
            if before >= count_from:
                taken.append(now - before)
    if not taken:
        raise SystemExit(f"no round trip in {seconds:g} s, {lost} lost")
    taken.sort()
    return {
        "count": len(taken),
        "lost": lost,
        "p50": taken[len(taken) // 2] / 1000,
        "p99": taken[len(taken) * 99 // 100] / 1000,
        "mean": sum(taken) / len(taken) / 1000,
    }


def connect_soon(address: str, port: int) -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    code = client.connect_ex((address, port))
    if code not in (0, errno.EINPROGRESS):
        raise OSError(code, "connect")
    return client


def measure_connections(address: str, port: int, concurrency: int, seconds: float) -> dict[str, float]:
    """Keep `concurrency` connections going, each: connect, one byte there, one byte back, the server closes, close."""
    epoll = select.epoll()
    clients: dict[int, socket.socket] = {}
    done = failed = 0

    def open_one() -> None:
        client = connect_soon(address, port)
        clients[client.fileno()] = client
        epoll.register(client, select.EPOLLOUT)

    for _ in range(concurrency):
        open_one()
    start = time.perf_counter()
    end = start + seconds
    while (now := time.perf_counter()) < end:
        for fd, events in epoll.poll(max(0.0, end - now)):
            client = clients[fd]
            try:
                if events & select.EPOLLOUT:
                    client.send(REQUEST)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                if client.recv(16):
                    continue
                done += 1
            except BlockingIOError:
                continue
            except OSError:
                failed += 1
            del clients[fd]
            client.close()
            open_one()
    return {"per_second": done / (time.perf_counter() - start), "failed": failed}


MOST_IN_FLIGHT = 2000


def pace_connections(address: str, port: int, rate: int, seconds: float) -> dict[str, float]:
    """Begin `rate` connections a second, each: connect, one byte there, one byte back, the server closes, close.

    What they took is given for the second sixth of the time, when all is warm, and for the last. A network that does
    not keep up sees `MOST_IN_FLIGHT` at most. When this process itself had to wait for the processor, it does not make
    up for more than a twentieth of a second: that would be a burst that a tap's queue of 1,000 frames does not hold.
    Those that did not begin are in no figure but the rate.
    """
    allow_many_files()
    epoll = select.epoll()
    clients: dict[int, tuple[socket.socket, float]] = {}
    early: list[float] = []
    late: list[float] = []
    begun = done = failed = 0
    start = time.perf_counter()
    end = start + seconds
    while (now := time.perf_counter()) < end or (clients and now < end + TIMEOUT):
        due = int((min(now, end) - start) * rate)
        begun = max(begun, due - max(1, rate // 20))
        for _ in range(min(due - begun, MOST_IN_FLIGHT - len(clients))):
            begun += 1
            try:
                client = connect_soon(address, port)
            except OSError:
                failed += 1
                continue
            clients[client.fileno()] = client, time.perf_counter()
            epoll.register(client, select.EPOLLOUT)
        for fd, events in epoll.poll(0.001):
            client, since = clients[fd]
            try:
                if events & select.EPOLLOUT:
                    client.send(REQUEST)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                if client.recv(16):
                    continue
                done += 1
            except BlockingIOError:
                continue
            except OSError:
                failed += 1
            del clients[fd]
            client.close()
            now = time.perf_counter()
            if seconds / 6 <= now - start < seconds / 3:
                early.append(now - since)
            elif seconds * 5 / 6 <= now - start < seconds:
                late.append(now - since)
    if not early or not late:
        raise SystemExit(f"{done} connections done, {failed} failed")
    early.sort()
    late.sort()
    return {
        "per_second": done / seconds,
        "failed": failed + len(clients),
        "early_p50": early[len(early) // 2] * 1e6,
        "late_p50": late[len(late) // 2] * 1e6,
        "late_p99": late[len(late) * 99 // 100] * 1e6,
    }


def hold(address: str, port: int, count: int) -> None:
    """Open `count` connections, each used once, and keep them until standard input ends."""
    allow_many_files()
    held: list[socket.socket] = []
    for _ in range(count):
        client = socket.create_connection((address, port), timeout=10)
        client.send(REQUEST)
        if not client.recv(16):
            raise SystemExit(f"connection {len(held)} was closed")
        held.append(client)
    print("ready", flush=True)
    sys.stdin.read()


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "serve":
        serve(rest[0], int(rest[1]))
    elif verb == "rr":
        print(json.dumps(measure_round_trips(rest[0], rest[1], int(rest[2]), int(rest[3]), float(rest[4]))))
    elif verb == "crr":
        print(json.dumps(measure_connections(rest[0], int(rest[1]), int(rest[2]), float(rest[3]))))
    elif verb == "pace":
        print(json.dumps(pace_connections(rest[0], int(rest[1]), int(rest[2]), float(rest[3]))))
    elif verb == "hold":
        hold(rest[0], int(rest[1]), int(rest[2]))
    else:
        raise SystemExit(f"no such verb: {verb}")


if __name__ == "__main__":
    main()
