"""What a guest tries out for a test: a program that does one thing with the network and prints what it found as JSON.

It runs inside the guest, on the Python of the machine that runs the tests. `probe.py WHAT ARGUMENTS`; the names
below are the whats. An error of the network is a finding too: `{"error": "ECONNREFUSED", ...}`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import select
import shlex
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab.rootfs.pattern import pattern, pattern_blocks, pattern_digest

if TYPE_CHECKING:
    from collections.abc import Callable

NTP_EPOCH = 2208988800  # 1970 in seconds since 1900 (RFC 5905)
DNS_TYPES = {"A": 1, "NS": 2, "CNAME": 5, "PTR": 12, "TXT": 16, "AAAA": 28}


def open_tcp(host: str, port: str, timeout: float = 20.0) -> socket.socket:
    return socket.create_connection((host, int(port)), timeout)


def probe_connect(host: str, port: str) -> dict[str, Any]:
    """Connect; say from where."""
    with open_tcp(host, port) as connection:
        return {"local": connection.getsockname()[:2]}


def probe_read(host: str, port: str) -> dict[str, Any]:
    """Connect and read to the end."""
    with open_tcp(host, port) as connection:
        received = bytearray()
        while data := connection.recv(1 << 16):
            received += data
    return {"text": received.decode(errors="replace")}


def probe_reset(host: str, port: str) -> dict[str, Any]:
    """Connect, send something, and break the connection off with a RST."""
    connection = open_tcp(host, port)
    connection.sendall(b"goodbye")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return {"reset": True}


def ask(sender: socket.socket, payload: bytes) -> tuple[bytes, int]:
    """Send a datagram, receive one; and how often we were told that it is too big for some link of the path.

    Each time, the kernel has learned of a smaller MTU, and makes smaller fragments of the next one.
    """
    refused = 0
    while True:
        try:
            sender.send(payload)
            return sender.recv(1 << 16), refused
        except OSError as error:
            refused += 1
            if error.errno != errno.EMSGSIZE or refused > 4:
                raise


def probe_udp(
    host: str, port: str, length: str, count: str = "1", wait: str = "5", source_port: str = "0"
) -> dict[str, Any]:
    """Send datagrams of the pattern one after the other, each when the answer to the last has come."""
    payload = pattern(int(length))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    lost, times, text, too_big = 0, [], "", 0
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind(("", int(source_port)))
        sender.connect((host, int(port)))
        sender.settimeout(float(wait))
        for _ in range(int(count)):
            start = time.monotonic()
            try:
                answer, refused = ask(sender, payload)
            except TimeoutError:
                lost += 1
                continue
            too_big += refused
            times.append(time.monotonic() - start)
            text = answer[:200].decode(errors="replace")
            if answer != payload and port == "7":
                return {"error": "DIFFERENT", "length": len(answer)}
    return {"lost": lost, "answered": len(times), "best": min(times, default=None), "text": text, "too_big": too_big}


def probe_echo(host: str, port: str, length: str) -> dict[str, Any]:
    """Send the pattern over TCP, close our half, and read what comes back to its end."""
    total = int(length)
    digest, received = hashlib.sha256(), 0
    with open_tcp(host, port) as connection:

        def send() -> None:
            for block in pattern_blocks(total):
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        while data := connection.recv(1 << 16):
            digest.update(data)
            received += len(data)
        sender.join()
    return {"received": received, "same": digest.hexdigest() == pattern_digest(total)}


def probe_upload(host: str, port: str, length: str) -> dict[str, Any]:
    """PUT `length` bytes of the pattern to a web server; its answer tells their SHA-256."""
    start = time.monotonic()
    with open_tcp(host, port, 120.0) as connection:
        name = f"[{host}]" if ":" in host else host
        connection.sendall(f"PUT /upload HTTP/1.0\r\nHost: {name}\r\nContent-Length: {length}\r\n\r\n".encode())
        for block in pattern_blocks(int(length)):
            connection.sendall(block)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    seconds = time.monotonic() - start
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return {**found, "seconds": seconds}


def probe_download(host: str, port: str, length: str) -> dict[str, Any]:
    """GET `length` bytes of the pattern from a web server; tell their SHA-256."""
    digest, received = hashlib.sha256(), -1
    start = time.monotonic()
    with open_tcp(host, port, 120.0) as connection:
        name = f"[{host}]" if ":" in host else host
        connection.sendall(f"GET /bytes/{length} HTTP/1.0\r\nHost: {name}\r\n\r\n".encode())
        reader = connection.makefile("rb")
        status = reader.readline().split()[1].decode()
        while reader.readline() not in (b"\r\n", b""):
            pass
        received = 0
        while data := reader.read1(1 << 18):
            digest.update(data)
            received += len(data)
    return {"status": status, "length": received, "sha256": digest.hexdigest(), "seconds": time.monotonic() - start}


def probe_dns(server: str, name: str, kind: str, transport: str = "udp") -> dict[str, Any]:
    """Ask a DNS server; tell the code, the flags and the number of the answers, and the addresses and texts in them."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"
    query = struct.pack(">HHHHHH", 0x4C4A, 0x0100, 1, 0, 0, 0) + question + struct.pack(">HH", DNS_TYPES[kind], 1)
    start = time.monotonic()
    if transport == "tcp":
        with open_tcp(server, "53") as connection:
            connection.sendall(struct.pack(">H", len(query)) + query)
            stream = connection.makefile("rb")
            (length,) = struct.unpack(">H", stream.read(2))
            answer = stream.read(length)
    else:
        with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.connect((server, 53))
            asker.settimeout(5)
            asker.send(query)
            answer = asker.recv(1 << 16)
    ident, flags, _, answers, _, _ = struct.unpack_from(">HHHHHH", answer)
    found: list[str] = []
    at = 12 + len(question) + 4
    for _ in range(answers if not flags & 0x200 else 0):
        while answer[at] and answer[at] < 0xC0:
            at += 1 + answer[at]
        at += 2 if answer[at] else 1
        record_type, _, _, length = struct.unpack_from(">HHIH", answer, at)
        data = answer[at + 10 : at + 10 + length]
        at += 10 + length
        if record_type in (1, 28):
            found.append(socket.inet_ntop(socket.AF_INET if record_type == 1 else socket.AF_INET6, data))
        elif record_type == 16:
            while data:
                found.append(data[1 : 1 + data[0]].decode())
                data = data[1 + data[0] :]
    return {
        "same": ident == 0x4C4A,
        "code": flags & 15,
        "truncated": bool(flags & 0x200),
        "answers": found,
        "length": len(answer),
        "seconds": time.monotonic() - start,
    }


def probe_sntp(server: str) -> dict[str, Any]:
    """Ask a time server (SNTP, RFC 4330); tell its answer's fields and the seconds that its clock is ahead of ours."""
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.connect((server, 123))
        asker.settimeout(5)
        sent = time.time()
        cookie = int((sent + NTP_EPOCH) * 2**32)
        asker.send(struct.pack(">B39xQ", 4 << 3 | 3, cookie))
        answer = asker.recv(512)
        arrived = time.time()
    first, stratum = answer[0], answer[1]
    originate, received, transmitted = struct.unpack_from(">QQQ", answer, 24)
    clock = [stamp / 2**32 - NTP_EPOCH for stamp in (received, transmitted)]
    return {
        "leap": first >> 6,
        "version": first >> 3 & 7,
        "mode": first & 7,
        "stratum": stratum,
        "echoed": originate == cookie,
        "offset": ((clock[0] - sent) + (clock[1] - arrived)) / 2,
        "time": clock[1],
    }


def probe_router(device: str = "eth0") -> dict[str, Any]:
    """Solicit a router advertisement; tell what it says (RFC 4861 4.2, RFC 8106)."""
    index = socket.if_nametoindex(device)
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as asker:
        asker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        asker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        asker.settimeout(5)
        asker.sendto(struct.pack(">BBHI", 133, 0, 0, 0), ("ff02::2", 0, 0, index))  # the kernel sets the checksum
        while (message := asker.recv(2048))[0] != 134:
            pass
    found: dict[str, Any] = {"prefixes": [], "dns": [], "search": []}
    _, _, _, found["hops"], found["flags"], found["lifetime"] = struct.unpack_from(">BBHBBH", message)
    at = 16
    while at < len(message):
        kind, units = message[at], message[at + 1]
        option = message[at : at + units * 8]
        if kind == 3:
            found["prefixes"].append(f"{socket.inet_ntop(socket.AF_INET6, option[16:32])}/{option[2]}")
        elif kind == 5:
            (found["mtu"],) = struct.unpack_from(">I", option, 4)
        elif kind == 25:
            found["dns"] += [
                socket.inet_ntop(socket.AF_INET6, option[start : start + 16]) for start in range(8, len(option), 16)
            ]
        elif kind == 31:
            labels, start = [], 8
            while start < len(option) and (size := option[start]):
                labels.append(option[start + 1 : start + 1 + size].decode())
                start += 1 + size
                if not option[start]:
                    found["search"].append(".".join(labels))
                    labels, start = [], start + 1
        at += units * 8
    return found


def probe_many(host: str, port: str, count: str) -> dict[str, Any]:
    """Open `count` connections at once, and say hello on each of them when all are open."""
    connections = [open_tcp(host, port) for _ in range(int(count))]
    good = 0
    for number, connection in enumerate(connections):
        connection.sendall(b"%08d" % number)
    for number, connection in enumerate(connections):
        received = b""
        while len(received) < 8 and (data := connection.recv(8)):
            received += data
        good += received == b"%08d" % number
        connection.close()
    return {"good": good}


def probe_serve(port: str) -> dict[str, Any]:
    """Echo over TCP and UDP, both families, until killed: what another guest talks to."""
    listener = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", int(port)))

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    while True:
        for ready in select.select([listener, datagrams], [], [])[0]:
            if ready is listener:
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
            else:
                data, peer = datagrams.recvfrom(1 << 16)
                datagrams.sendto(data, peer)


def answer(what: str, words: list[str]) -> str:
    """What the probe finds, as JSON."""
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        name.removeprefix("probe_"): value for name, value in globals().items() if name.startswith("probe_")
    }
    start = time.monotonic()
    try:
        found = probes[what](*words)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        found = {"error": name, "seconds": time.monotonic() - start}
    return json.dumps(found)


def wait() -> None:
    """Read lines `FILE WHAT WORDS...` from the pipe that is standard input; run each probe, its answer goes to FILE."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    os.set_inheritable(os.open("/run/probe", os.O_RDWR), False)  # with a writer of our own the pipe never ends
    while line := sys.stdin.readline():
        path, what, *words = shlex.split(line)
        if os.fork() == 0:
            try:
                text = answer(what, words)
            except BaseException:
                text = traceback.format_exc()
            with Path(path).open("w") as file:
                file.write(text + "\n")
            os._exit(0)


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "wait":
        wait()
    else:
        print(answer(what, words))


if __name__ == "__main__":
    main()
