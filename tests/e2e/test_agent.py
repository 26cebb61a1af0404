"""The agent in a real guest that has nothing but busybox: a server there is on the host's loopback by itself."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import wait_until
from tests.netns.net import open_socket

if TYPE_CHECKING:
    from tests.e2e.conftest import Lab

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip"), pytest.mark.timeout(120), pytest.mark.slow]

SETTINGS = '[dns]\nsource = "none"\n[auto_publish]\nenabled = true\n'
GATEWAY = "192.168.5.2"
# busybox's own shell, which prefers its own applets: no bash, no curl, no mawk.
START = f"(wget -qO- http://{GATEWAY}/agent | exec busybox sh) >/tmp/agent.log 2>&1 &"


def test_a_busybox_guest_publishes_its_server_and_takes_it_along_when_it_crashes(lab: Lab) -> None:
    settings = lab.world.folder / "netstack.toml"
    settings.write_text(SETTINGS)
    netstack = lab.stack.enter_context(lab.netstack([lab.link("stream")], "-c", str(settings)))
    guest = lab.stack.enter_context(lab.guest("stream", 0))

    def is_open(port: int) -> bool:
        with open_socket(lab.world.host, socket.AF_INET) as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    def fetch(port: int) -> str:
        words = ("curl", "-sS", "-m", "5", f"http://127.0.0.1:{port}/hello")
        return lab.world.host.run(*words, check=False).stdout

    guest.configure()
    guest.check("mkdir -p /tmp/web && echo from the guest >/tmp/web/hello")
    guest.check(START)
    times = []
    for port in range(8080, 8090):
        guest.check(f"httpd -p {port} -h /tmp/web")
        began = time.monotonic()
        wait_until(lambda port=port: is_open(port), f"port {port} opens: {netstack.log}")
        times.append(time.monotonic() - began)
    assert sorted(times)[len(times) // 2] < 0.3, times
    assert fetch(8080) == "from the guest\n"
    guest.check("httpd -p 127.0.0.1:8099 -h /tmp/web")  # which only the agent reaches
    wait_until(lambda: is_open(8099), "a port of the guest's loopback opens")
    assert fetch(8099) == "from the guest\n"
    listed = guest.check("cat /proc/$(pidof awk)/stat").split()
    assert int(listed[13]) + int(listed[14]) < 500  # hundredths of a second: it has not been busy

    guest.check("kill $(pidof httpd)")
    wait_until(lambda: not any(is_open(port) for port in (*range(8080, 8090), 8099)), "all ports close")

    guest.check("httpd -p 8080 -h /tmp/web")
    wait_until(lambda: is_open(8080), "it opens again")
    guest.monitor("stop")  # no FIN, no word: the guest does not run, and its card is still there
    began = time.monotonic()
    wait_until(lambda: not is_open(8080), "the port closes")
    assert time.monotonic() - began < 2.0
    guest.monitor("cont")
    wait_until(lambda: is_open(8080), "and opens again with the guest")

    guest.reset()
    assert not is_open(8080)

    guest.configure()
    guest.check("mkdir -p /tmp/web && echo and again >/tmp/web/hello")
    guest.check("httpd -p 8080 -h /tmp/web")
    guest.check(START)
    wait_until(lambda: fetch(8080) == "and again\n", "the guest's server is back")
