"""The sockets of UDP forwards on a real kernel: from where they answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.needs("root", "netns", "ip")]

PROGRAM = """
import select, socket, sys
from netstack.host.datagrams import AddressNames
from netstack.host.udp_listeners import open_udp_listeners
batches = sys.argv[1] == "batches"
listener, _ = open_udp_listeners(AddressNames(), "::", 0)
if batches:
    listener.expect_bursts()
caller = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
caller.settimeout(10)
device = socket.if_nametoindex("eth0")
buffer = memoryview(bytearray(1 << 17))
for to in (("2001:db8:7::5", listener.port), ("ff02::1", listener.port, 0, device)):
    caller.sendto(b"hello", to)
    assert select.select([listener.fileno()], (), (), 10)[0]
    if batches:
        found = []
        listener.receive_callers(buffer, lambda length, size, who: found.append(who))
        who = found[0]  # a group's comes by the other end of the cable, too
    else:
        _, _, who = listener.receive_caller(buffer)
    listener.reply_socket(who).send_to(b"here", who[0], who[1], 64, False)
    print(caller.recvfrom(100)[1][0])
"""


@pytest.mark.parametrize("how", ("one by one", "batches"))
def test_who_asks_a_group_is_answered_from_an_address_of_the_host(how: str) -> None:
    script = (
        "set -e; ip link set lo up; ip link add eth0 type veth peer name eth1; ip link set eth1 up;"
        'ip link set eth0 up; ip addr add 2001:db8:7::5/64 dev eth0 nodad; exec "$0" -c "$1" "$2"'
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, sys.executable, PROGRAM, how],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2001:db8:7::5"] * 2
