"""The two ends of the forwards' connect latency, with nothing but the standard library.

    forward_caller.py greet ADDRESS PORT            tells whoever connects when accept() returned, and closes
    forward_caller.py call ADDRESS PORT SECONDS     connects and waits for that, one after another

The second prints one line of JSON, in microseconds: from connect() to the guest's accept(), and from connect() to the
greeting. That connect() has returned says nothing about a forward, because the host's kernel completes it before the
guest has been asked. Both ends are processes of one machine and read one clock.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

GREETING = struct.Struct("d")


def greet(address: str, port: int) -> None:
    """Serve until a signal ends the process."""
    with socket.create_server((address, port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.send(GREETING.pack(time.monotonic()))


def call(address: str, port: int, seconds: float) -> dict[str, float]:
    """Connections one after another."""
    connected: list[float] = []
    greeted: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as connection:
            connection.settimeout(1.0)
            begun = time.monotonic()
            connection.connect((address, port))
            greeting = connection.recv(GREETING.size, socket.MSG_WAITALL)
            greeted.append((time.monotonic() - begun) * 1e6)
            if len(greeting) != GREETING.size:
                raise SystemExit("no greeting")
            connected.append((GREETING.unpack(greeting)[0] - begun) * 1e6)
    found = {"count": float(len(greeted))}
    for name, taken in (("connect", connected), ("greeting", greeted)):
        taken.sort()
        found |= {f"{name}.p50": taken[len(taken) // 2], f"{name}.p99": taken[len(taken) * 99 // 100]}
    return found


if __name__ == "__main__":
    verb, where, number, *more = sys.argv[1:]
    if verb == "greet":
        greet(where, int(number))
    else:
        print(json.dumps(call(where, int(number), float(more[0]))))
