"""Forwards to a real Debian guest: its web server and its sshd, real clients on the host, and reboots meanwhile."""

from __future__ import annotations

import hashlib
import socket
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import Lab, keep_if_failed, open_lab
from tests.lab.namespaces import FAR4, HOST4, wait_until
from tests.rim.inside import call_inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.netstack import Netstack

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq", "curl"),
    pytest.mark.timeout(180),
    pytest.mark.slow,
]

HTTP, FAR_HTTP, SSH, LATER = 8080, 8081, 2222, 8082
SPECS = (f"{HTTP}:80", f"0.0.0.0:{FAR_HTTP}:192.168.5.15:80", f"{SSH}:22", f"{LATER}:8000")
MB = 1_000_000


class Running(NamedTuple):
    """A lab with a netstack and a guest that serves."""

    lab: Lab
    netstack: Netstack
    guest: Guest


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, machine: None) -> Iterator[Running]:
    for folder in keep_if_failed(request, "forwards"):
        with open_lab(folder) as lab:
            options = [word for spec in SPECS for word in ("-p", spec)]
            netstack = lab.stack.enter_context(lab.netstack([lab.link("stream")], *options))
            guest = lab.stack.enter_context(lab.guest("stream", 0))
            serve(guest)
            yield Running(lab, netstack, guest)


def serve(guest: Guest) -> None:
    """Give the guest its addresses and start its web server, which says who asks."""
    guest.configure()
    guest.check("mkdir -p /www/cgi-bin && echo hello from the guest > /www/index.html")
    guest.check(r"printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' > /www/cgi-bin/who && chmod +x /www/cgi-bin/who")
    guest.check("httpd -p 0.0.0.0:80 -h /www")
    guest.wait_for("wget -q -O /dev/null http://127.0.0.1/")


def fetch(running: Running, path: str, *options: str) -> str:
    return running.lab.world.host.run("curl", "-sS", "-m", "30", *options, f"http://127.0.0.1:{HTTP}{path}").stdout


def test_curl_fetches_from_the_guests_web_server(running: Running) -> None:
    assert fetch(running, "/") == "hello from the guest\n"
    assert fetch(running, "/cgi-bin/who") == "192.168.5.2\n"
    running.guest.check(f"head -c {20 * MB} /dev/urandom > /www/large", 60)
    digest = running.guest.check("sha256sum /www/large", 60).split()[0]
    fetch(running, "/large", "-o", str(running.lab.folder / "large"))
    assert hashlib.sha256((running.lab.folder / "large").read_bytes()).hexdigest() == digest
    running.guest.check("rm /www/large")


def test_the_guest_sees_a_caller_from_elsewhere(running: Running) -> None:
    far = running.lab.world.far
    assert far.run("curl", "-sS", "-m", "30", f"http://{HOST4}:{FAR_HTTP}/cgi-bin/who").stdout == f"{FAR4}\n"


@pytest.mark.needs("dropbear", "ssh", "ssh-keygen")
def test_ssh_from_the_host(running: Running, tmp_path: Path) -> None:
    guest, host = running.guest, running.lab.world.host
    key = tmp_path / "key"
    host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    guest.check("mkdir -p /etc/dropbear /root/.ssh && chmod 700 /root /root/.ssh && chmod go-w /")
    guest.check(f"echo '{key.with_suffix('.pub').read_text().strip()}' > /root/.ssh/authorized_keys")
    guest.check("dropbear -R -s -E -p 22 2>/run/dropbear.log")
    options = (
        *("-F", "/dev/null", "-i", str(key), "-p", str(SSH), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"),
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
    )
    outcome = host.run("ssh", *options, "root@127.0.0.1", "/bin/busybox hostname", timeout=60, check=False)
    assert outcome.stdout == "guest\n", outcome.stderr + guest.run("cat /run/dropbear.log").output
    # Data in both directions, and the half close between them: wc is done when its input ends.
    text = "0123456789\n" * (2 * MB // 11)
    outcome = host.run("ssh", *options, "root@127.0.0.1", "/bin/busybox md5sum", stdin=text, timeout=60)
    assert outcome.stdout.split()[0] == hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    # And without any port of the host: over the API's socket, copied by netstack connect or passed on to ssh.
    api = f"--api unix://{running.netstack.api_path}"
    for more, fdpass in (("", "no"), ("--pass-fd", "yes")):
        command = f"{sys.executable} -m netstack connect {more} %h:%p {api}"
        through = ("-p", "22", "-o", f"ProxyCommand={command}", "-o", f"ProxyUseFdpass={fdpass}", *options)
        outcome = host.run(
            "ssh", *through, "root@192.168.5.15", "/bin/busybox md5sum", stdin=text, timeout=60, check=False
        )
        assert outcome.stdout.split()[:1] == [hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()], outcome


def test_a_port_opens_when_the_guest_listens(running: Running) -> None:
    host = running.lab.world.host
    refused = host.run("curl", "-sS", "-m", "10", f"http://127.0.0.1:{LATER}/", check=False)
    assert refused.returncode in (7, 52, 56), "not connected, nothing received, or reset"
    running.guest.check("httpd -p 0.0.0.0:8000 -h /www")
    assert host.run("curl", "-sS", "-m", "10", f"http://127.0.0.1:{LATER}/").stdout == "hello from the guest\n"


def test_the_guest_reboots_under_open_forwards(running: Running) -> None:
    """What was open is reset as soon as it is used; the forward leads to the guest again without being asked."""
    host, guest = running.lab.world.host, running.guest
    with call_inside(host, lambda: socket.create_connection(("127.0.0.1", HTTP), 30)) as old:
        old.sendall(b"GET / HTTP/1.1\r\n")
        wait_until(lambda: _open(running) >= 1, "the connection to be the guest's", 20)
        guest.reset()
        serve(guest)
        assert fetch(running, "/") == "hello from the guest\n"
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            _use(old)
        assert time.monotonic() - begun < 10
    forwards = {each["host_port"]: each for each in running.netstack.get("/v1/forwards")["forwards"]}
    assert set(forwards) == {HTTP, FAR_HTTP, SSH, LATER}


def _open(running: Running) -> int:
    forwards = running.netstack.get("/v1/forwards")["forwards"]
    return sum(each["connections"]["open"] for each in forwards if each["host_port"] == HTTP)


def _use(sock: socket.socket) -> None:
    """Send, and look what comes: until the connection breaks, or half a minute has gone by."""
    sock.settimeout(0.1)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        sock.sendall(b"X: more\r\n")
        try:
            assert sock.recv(100) != b"", "an end in good order would be a lie"
        except TimeoutError:
            continue
