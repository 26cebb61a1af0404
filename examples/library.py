r"""netstack as a library: a network inside a Python program, and what it knows about its guests.

    python -m examples.library /tmp/n.sock

and beside it a guest, or several:

    qemu-system-x86_64 ... -device virtio-net-pci,netdev=n \
        -netdev stream,id=n,server=off,addr.type=unix,addr.path=/tmp/n.sock

It says when a guest comes, when it has its address, and what it has moved, until Ctrl-C. Settings are the tables of the
configuration file (docs/configuration.md); a Config that is built here keeps nothing on the disk and serves no API.
"""

from __future__ import annotations

import sys

import trio

import netstack


async def watch(network: netstack.Network) -> None:
    """Say what changes, every second."""
    known: dict[str, list[str]] = {}
    moved = -1
    while True:
        state = network.statistics()
        for guest in state["guests"]:
            if known.get(guest["mac"]) != guest["addresses"]:
                known[guest["mac"]] = guest["addresses"]
                print(f"guest {guest['mac']}: {', '.join(guest['addresses']) or 'no address yet'}", flush=True)
        # A link that waits for its first guest has no counters yet.
        total = sum(link.get("bytes_from_guest", 0) + link.get("bytes_to_guest", 0) for link in state["links"])
        if total != moved:
            moved = total
            print(f"{state['flows']['tcp']} TCP flows, {moved} bytes moved, dropped: {state['drops']}", flush=True)
        await trio.sleep(1)


async def main(path: str) -> None:
    """A network with one listening link."""
    config = netstack.Config(network={"subnet": "192.168.7.0/24"}, dns={"search": ["example.test"]})
    async with netstack.open_network(config) as network:
        await network.attach(f"unix://{path}")
        addresses = network.statistics()["network"]
        print(f"network {addresses['subnet']}, gateway {addresses['gateway']}; guests attach at {path}", flush=True)
        await watch(network)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.library SOCKET")
    # What happens inside a trio nursery, and a network is one, comes out as a group of errors.
    try:
        trio.run(main, sys.argv[1])
    except* KeyboardInterrupt:
        pass
    except* (netstack.ConfigError, OSError) as group:
        sys.exit(f"library: {group.exceptions[0]}")
