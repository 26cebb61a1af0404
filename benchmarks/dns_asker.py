"""Asks for names one at a time and prints what each took, in ms, as JSON: dns_asker.py ADDRESS PORT SECONDS FILE.

dnsperf does not serve for this: with one query in flight it sleeps between them. FILE is dnsperf's, a name and a type
a line; it is begun again at its end with "again" as a fifth argument. Answers that are no NOERROR end it. Run by itself
in a namespace: it imports nothing of netstack.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from itertools import cycle
from pathlib import Path


def main(address: str, port: str, seconds: str, file: str, again: str = "") -> None:
    names = [line.split()[0].split(".") for line in Path(file).read_text().splitlines()]
    tails = [
        b"\1\0\0\1\0\0\0\0\0\0" + b"".join(bytes([len(part)]) + part.encode() for part in name) + b"\0\0\1\0\1"
        for name in names
    ]
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5.0)
    sock.connect((address, int(port)))
    took: list[float] = []
    deadline = time.perf_counter() + float(seconds)
    for number, tail in enumerate(cycle(tails) if again else tails):
        ident = struct.pack("!H", number & 0xFFFF)
        began = time.perf_counter()
        sock.send(ident + tail)
        answer = sock.recv(4096)
        ended = time.perf_counter()
        if answer[:2] != ident or answer[3] & 15:
            sys.exit(f"answer {answer[:12].hex()} to query {number}")
        took.append((ended - began) * 1000)
        if ended > deadline:
            break
    print(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
