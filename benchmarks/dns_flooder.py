"""Asks for names without waiting for answers, at a steady rate: dns_flooder.py ADDRESS PORT RATE FILE.

dnsperf does not serve for this: where no answer comes it sends some 1,700 queries a second, whatever it is told. FILE
is dnsperf's, a name and a type a line. Waits for the answers, and prints how many came with which response code, as
JSON. Run by itself in a namespace: it imports nothing of netstack.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

SOCKETS = 20
PATIENCE = 6.0  # seconds after the last query; the gateway gives up after 4.5


def main(address: str, port: str, rate: str, file: str) -> None:
    names = [line.split()[0].split(".") for line in Path(file).read_text().splitlines()]
    queries = [
        b"\1\0\0\1\0\0\0\0\0\0" + b"".join(bytes([len(part)]) + part.encode() for part in name) + b"\0\0\1\0\1"
        for name in names
    ]
    sockets = []
    for _ in range(SOCKETS):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.connect((address, int(port)))
        sock.setblocking(False)
        sockets.append(sock)
    codes: Counter[int] = Counter()
    began = time.monotonic()
    sent = 0
    while sent < len(queries):
        due = min(len(queries), int((time.monotonic() - began) * float(rate)))
        for number in range(sent, due):
            sockets[number % SOCKETS].send(struct.pack("!H", number // SOCKETS) + queries[number])
        sent = max(sent, due)
        receive(sockets, codes, 0.002)
    took = time.monotonic() - began
    while codes.total() < sent and time.monotonic() < began + took + PATIENCE:
        receive(sockets, codes, 0.1)
    print(json.dumps({"sent": sent, "seconds": took, "answered": codes.total(), "codes": codes}))


def receive(sockets: list[socket.socket], codes: Counter[int], seconds: float) -> None:
    for sock in select.select(sockets, (), (), seconds)[0]:
        try:
            while True:
                codes[sock.recv(4096)[3] & 15] += 1
        except BlockingIOError:
            continue


if __name__ == "__main__":
    main(*sys.argv[1:])
