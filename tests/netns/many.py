"""A guest's program that opens a great many connections and holds them, told what to do on standard input.

    open ADDRESS PORT COUNT     -> {"open": .., "ECONNREFUSED": .., "waiting": ..}
    close                       -> {"closed": ..}

Run in a guest's namespace: `python -m tests.netns.many`. It asks for as many descriptors as it may have.
"""

from __future__ import annotations

import errno
import json
import resource
import select
import socket
import sys
import time
from collections import Counter

AT_ONCE = 256  # connects under way
PATIENCE = 3.0  # without any progress; those that are not open by then are given up


def open_many(connections: list[socket.socket], address: str, port: int, count: int) -> dict[str, int]:
    """Open them; what became of each, by the name of its error."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    outcomes: Counter[str] = Counter(open=0)
    under_way: dict[int, socket.socket] = {}
    poll = select.epoll()
    deadline = time.monotonic() + PATIENCE
    begun = 0
    while begun < count or under_way:
        while begun < count and len(under_way) < AT_ONCE:
            sock = socket.socket(family)
            sock.setblocking(False)
            begun += 1
            error = sock.connect_ex((address, port))
            if error not in (0, errno.EINPROGRESS):
                outcomes[errno.errorcode[error]] += 1
                sock.close()
                continue
            under_way[sock.fileno()] = sock
            poll.register(sock, select.EPOLLOUT)
        for fd, _ in poll.poll(max(0.0, deadline - time.monotonic())):
            deadline = time.monotonic() + PATIENCE
            sock = under_way.pop(fd)
            poll.unregister(fd)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            outcomes["open" if not error else errno.errorcode[error]] += 1
            if error:
                sock.close()
            else:
                connections.append(sock)
        if time.monotonic() > deadline:
            outcomes["waiting"] += len(under_way) + count - begun
            break
    for sock in under_way.values():
        sock.close()
    poll.close()
    return dict(outcomes)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections: list[socket.socket] = []
    print(json.dumps({"files": hard}), flush=True)
    for line in sys.stdin:
        what, *words = line.split()
        if what == "open":
            answer = open_many(connections, words[0], int(words[1]), int(words[2]))
        else:
            answer = {"closed": len(connections)}
            for sock in connections:
                sock.close()
            connections.clear()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
