"""The two ends of what the gateway's proxy is measured with, with nothing but the standard library.

    proxy_caller.py serve PORT                  on the host: does what the first byte of a connection asks for
    proxy_caller.py stream WAY HOW SECONDS      in a guest: WAY up or down, HOW direct or connect; Gbit/s
    proxy_caller.py first HOW SECONDS           from connect() to the first byte of the server; microseconds
    proxy_caller.py many COUNT                  so many tunnels at once, all open: seconds until the last has answered
    proxy_caller.py get SECONDS                 one GET after another through the proxy and direct, 64 MiB each; Gbit/s

PROXY and SERVER are in the environment, as ADDRESS:PORT. The figures are printed as a line of JSON. Bytes count where
they arrive: of an upload the server tells them, once the caller has closed its half.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

CHUNK = 1 << 20
BODY = 64 << 20


def place(name: str) -> tuple[str, int]:
    address, _, port = os.environ[name].rpartition(":")
    return address, int(port)


def serve(port: int) -> None:
    """Serve until a signal ends the process."""
    with socket.create_server(("0.0.0.0", port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    with connection:
        try:
            asked = connection.recv(1)
            if asked == b"d":
                data = bytes(CHUNK)
                while True:
                    connection.sendall(data)
            elif asked == b"u":
                buffer, total, begun = bytearray(CHUNK), 0, time.perf_counter()
                while count := connection.recv_into(buffer):
                    total += count
                connection.sendall(json.dumps([total, time.perf_counter() - begun]).encode())
            elif asked == b"G":
                while b"\r\n\r\n" not in asked[-4:]:
                    asked += connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % BODY)
                for _ in range(BODY // CHUNK):
                    connection.sendall(bytes(CHUNK))
            else:
                connection.sendall(b"!")
                connection.recv(1)
        except OSError:
            pass


def dial(how: str) -> socket.socket:
    """A connection to the server."""
    host, port = place("SERVER")
    if how == "direct":
        return socket.create_connection((host, port), 30)
    sock = socket.create_connection(place("PROXY"), 30)
    sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(4096)
    if b" 200 " not in head:
        raise SystemExit(f"the proxy says {head!r}")
    return sock


def stream(way: str, how: str, seconds: float) -> float:
    """Gbit/s of one connection."""
    with dial(how) as sock:
        until = time.perf_counter() + seconds
        if way == "up":
            sock.sendall(b"u")
            data = bytes(CHUNK)
            while time.perf_counter() < until:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            total, taken = json.loads(sock.makefile().read())
        else:
            sock.sendall(b"d")
            buffer, total, begun = bytearray(CHUNK), 0, time.perf_counter()
            while time.perf_counter() < until:
                total += sock.recv_into(buffer)
            taken = time.perf_counter() - begun
    return float(total) * 8 / float(taken) / 1e9


def first(how: str, seconds: float) -> dict[str, float]:
    """Connections one after another."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        with dial(how) as sock:
            sock.sendall(b"?")
            if sock.recv(1) != b"!":
                raise SystemExit("no answer")
            found.append((time.perf_counter() - begun) * 1e6)
    found.sort()
    return {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100]}


def many(count: int) -> float:
    """Tunnels that are all asked for before any is waited for."""
    host, port = place("SERVER")
    request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n?".encode()
    begun = time.perf_counter()
    socks = []
    for _ in range(count):
        sock = socket.create_connection(place("PROXY"), 30)
        sock.sendall(request)
        socks.append(sock)
    for sock in socks:
        said = b""
        while not said.endswith(b"!"):
            piece = sock.recv(4096)
            if not piece:
                raise SystemExit(f"a tunnel ended behind {said!r}")
            said += piece
    return time.perf_counter() - begun


def get(seconds: float) -> dict[str, float]:
    """What a large body takes, by the proxy and without."""
    host, port = place("SERVER")
    found = {}
    for how in ("direct", "proxy"):
        total, begun = 0, time.perf_counter()
        buffer = bytearray(CHUNK)
        while time.perf_counter() < begun + seconds:
            target = place("PROXY") if how == "proxy" else (host, port)
            path = f"http://{host}:{port}/" if how == "proxy" else "/"
            with socket.create_connection(target, 30) as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                while count := sock.recv_into(buffer):
                    total += count
        found[how] = total * 8 / (time.perf_counter() - begun) / 1e9
    return found


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "serve":
        serve(int(words[0]))
    elif verb == "stream":
        print(json.dumps(stream(words[0], words[1], float(words[2]))))
    elif verb == "first":
        print(json.dumps(first(words[0], float(words[1]))))
    elif verb == "many":
        print(json.dumps(many(int(words[0]))))
    else:
        print(json.dumps(get(float(words[0]))))
