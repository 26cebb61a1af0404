"""A guest to play with: `python -m tests.lab` boots one behind netstack, in a world of its own, and takes commands.

    python -m tests.lab                             a Debian kernel on QEMU's stream socket
    python -m tests.lab --link vde --guests 2       two of them on a VDE switch
    python -m tests.lab --link vhost-user           one that shares its memory
    python -m tests.lab -- --mtu 1500 --pcap a.pcapng --log-level debug      what follows `--` is for `netstack run`

Nothing that happens in it leaves this machine. docs/lab.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.lab.guest import Guest, GuestError, Nic, stream_nic, vde_nic, vhost_user_nic
from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import FAR4, FAR6, HOST4, World
from tests.lab.netstack import Netstack
from tests.lab.servers import Resolver, Servers

KINDS: dict[str, tuple[str, Callable[[Path, str], Nic]]] = {
    "stream": ("unix", stream_nic),
    "vde": ("vde", vde_nic),
    "vhost-user": ("vhost-user", vhost_user_nic),
}

HELP = f"""\
A line is a command for the first guest; `2 COMMAND` goes to the second one; `!COMMAND` runs on the host's side.
  wget -q -O - http://www.example.test/    ping {FAR4}    traceroute -n {FAR6}    iperf3 -c {HOST4}
  !iperf3 -s -D    !netstack status    !ss -tnp    reset    log    help    quit (or Ctrl-D)
"""


def main() -> None:
    """Build it all, take commands, clear it all away."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="boot guests behind netstack and use them")
    parser.add_argument("--link", choices=tuple(KINDS), default="stream", help="default: stream")
    parser.add_argument("--guests", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--folder", type=Path, help="where logs and pcaps go (default: a new one under /tmp)")
    parser.add_argument("run", nargs="*", metavar="OPTION", help="after --: options of `netstack run`")
    options = parser.parse_args()
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="netstack-lab-"))
    try:
        with contextlib.ExitStack() as stack:
            play(stack, folder, options.link, options.guests, options.run)
    except (LabUnavailableError, GuestError, RuntimeError) as error:
        sys.exit(f"lab: {error}")
    print(f"logs and pcaps: {folder}")


def play(stack: contextlib.ExitStack, folder: Path, kind: str, count: int, run: list[str]) -> None:
    """Build the world, boot `count` guests, and obey until the end of standard input."""
    world = stack.enter_context(World())
    stack.enter_context(Servers(world.host))
    stack.enter_context(Servers(world.far, FAR4, FAR6))
    stack.enter_context(Resolver(world.host, world.folder))
    place = world.folder / "link"
    scheme, make_nic = KINDS[kind]
    uri = f"{scheme}://{place}"
    netstack = stack.enter_context(Netstack(world.host, folder, links=[uri], arguments=run))
    guests = []
    for number in range(1, count + 1):
        mac = f"52:54:00:12:34:{number:02x}"
        guest = stack.enter_context(Guest([make_nic(place, mac)], folder / f"guest{number}", capture=65535))
        print(f"guest {number} has {guest.configure()['ip']}")
        guests.append(guest)
    print(HELP, end="")
    while True:
        try:
            line = input("guest> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in {"quit", "exit"}:
            return
        if line:
            obey(line, world, netstack, guests)


def obey(line: str, world: World, netstack: Netstack, guests: list[Guest]) -> None:
    """Do what one line says; show what comes of it."""
    if line == "help":
        print(HELP, end="")
    elif line == "log":
        print(netstack.log, end="")
    elif line.startswith("!"):
        # `netstack` is this checkout's, and asks this netstack.
        program = Path(sys.executable).with_name("netstack")
        function = f'netstack() {{ {program} "$@" --api unix://{netstack.api_path}; }}'
        subprocess.run([*world.host.words(), "sh", "-c", f"{function}; {line[1:]}"], check=False)
    else:
        first, _, rest = line.partition(" ")
        chosen = first.isdigit() and 1 <= int(first) <= len(guests)
        guest = guests[int(first) - 1] if chosen else guests[0]
        command = rest if chosen else line
        try:
            if command == "reset":
                guest.reset()
                print(f"again {guest.configure()['ip']}")
                return
            status, output = guest.run(command, timeout=600)
        except (GuestError, ValueError) as error:
            print(error)
            return
        print(output, end="" if output.endswith("\n") or not output else "\n")
        if status:
            print(f"[status {status}]")


if __name__ == "__main__":
    main()
