"""A guest is told of the host's proxies, and what it was told goes on being true: everything real but the desktop.

KDE's file of settings stands for the desktop, in a folder of the test's own; it is changed while netstack runs.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.namespaces import FAR4, TapNamespace, World, wait_until
from tests.lab.netstack import Netstack
from tests.lab.proxies import Tinyproxy, Web
from tests.netns.net import GATEWAY4, GATEWAY6, address4_of, address6_of, connect, mac_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs("root", "netns", "ip", "tun", "curl", "busybox"), pytest.mark.slow]

SECRET = "s3cr3t"
NAMES = ("web.test", "direct.test", "loop.test")
KDE = "[Proxy Settings]\nProxyType=1\nhttpProxy=http://{} 8888\nhttpsProxy=http://me:{}@{} 8888\n"


HOST_SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"the host"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", 80), Handler).serve_forever()
"""


class Lab:
    """A netstack, a guest, a proxy on the host's loopback and a web server far away."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.world = stack.enter_context(World())
        self.world.check_isolation()
        self.folder: Path = self.world.folder
        self.config = self.folder / "netstack.toml"
        self.write("")
        hosts = self.folder / "hosts"  # the host's, for its proxy
        hosts.write_text("127.0.0.1 localhost\n127.0.1.1 thishost\n" + "".join(f"{FAR4} {name}\n" for name in NAMES))
        self.world.host.bind_file("/etc/hosts", hosts)
        link = self.folder / "qemu.sock"
        self.desktop = self.folder / "n" / "kioslaverc"  # the lab's XDG_CONFIG_HOME
        self.netstack = stack.enter_context(
            Netstack(self.world.host, self.folder / "n", links=[f"unix://{link}"], arguments=["-c", str(self.config)])
        )
        self.guest = stack.enter_context(TapNamespace(link, inside=self.world.host, mac=mac_of(0)))
        self.guest.set_addresses(f"{address4_of(0)}/24", f"{address6_of(0)}/64", gateways=(GATEWAY4, GATEWAY6))
        resolv_conf = self.folder / "guest-resolv.conf"
        resolv_conf.write_text("nameserver 192.168.5.3\n")
        self.guest.bind_file("/etc/resolv.conf", resolv_conf)
        self.web = stack.enter_context(Web(self.world.far, self.folder / "web", FAR4, *NAMES))
        self.proxy = stack.enter_context(Tinyproxy(self.world.host, self.folder / "t", "127.0.0.1", 8888))

    def write(self, proxy: str) -> None:
        hosts = "".join(f'"{name}" = "{FAR4}"\n' for name in NAMES)
        self.config.write_text(f'[dns]\nsource = "none"\nmdns = false\n[dns.hosts]\n{hosts}\n[proxy]\n{proxy}\n')

    def reload(self, proxy: str) -> None:
        """The settings are these from now on."""
        self.write(proxy)
        before = self.netstack.log.count("settings read again")
        assert self.netstack.process is not None
        self.netstack.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.netstack.log.count("settings read again") > before, "the settings were read again")

    def get(self, path: str) -> str:
        """What the gateway's HTTP tells the guest."""
        text: str = self.guest.run("curl", "-sS", "--max-time", "20", f"http://{GATEWAY4}{path}").stdout
        return text

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.netstack.get("/v1/proxy")
        return found

    def variables(self) -> dict[str, str]:
        """What a shell of the guest has after it has read /proxy.env."""
        script = f"curl -sS --max-time 20 http://{GATEWAY4}/proxy.env > {self.folder}/env; . {self.folder}/env; env"
        done = self.guest.run("env", "-i", "PATH=/usr/bin:/bin", "sh", "-c", script)
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "proxy=" in line.lower())

    def curl(self, url: str, *words: str) -> dict[str, Any]:
        """What the web server says it was asked, by a curl that was told by /proxy.env."""
        script = f". {self.folder}/env; exec curl -sS --max-time 20 {' '.join(words)} {url}"
        found: dict[str, Any] = json.loads(self.guest.run("sh", "-c", script).stdout)
        return found


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


@pytest.fixture(autouse=True)
def healthy(lab: Lab) -> Iterator[None]:
    """Whatever a test did: netstack runs on, and has told nobody the password."""
    yield
    if lab.desktop.exists():
        lab.desktop.unlink()
        wait_until(lambda: lab.state()["effective"]["http"] is None, "KDE's proxy is gone")
    assert lab.netstack.process is not None
    assert lab.netstack.process.poll() is None, lab.netstack.log
    status = lab.netstack.status()
    assert "internal_error" not in status["drops"], lab.netstack.log
    assert "Traceback" not in lab.netstack.log
    for text in (lab.netstack.log, json.dumps(lab.state()), json.dumps(status), lab.get("/proxy.env")):
        assert SECRET not in text


def test_a_guest_is_told_of_the_gateways_proxy(lab: Lab) -> None:
    found = lab.variables()
    assert found["http_proxy"] == found["HTTPS_PROXY"] == found["all_proxy"] == f"http://{GATEWAY4}:3128"
    entries = found["no_proxy"].split(",")
    # The gateway, the guest that asked, its network, and our names.
    for entry in ("localhost", "127.0.0.1", GATEWAY4, GATEWAY6, address4_of(0), "192.168.5.0/24", "host.lima.internal"):
        assert entry in entries
    assert found["NO_PROXY"] == found["no_proxy"]
    assert json.loads(lab.get("/proxy.env?format=docker"))["proxies"]["default"]["httpProxy"].endswith(":3128")
    assert lab.get("/proxy.env?format=apt").startswith("Acquire::http::Proxy ")
    assert "shell, env, docker" in lab.get("/proxy.env?format=nonsense")


@pytest.mark.needs("wget")
def test_clients_take_what_they_were_told(lab: Lab) -> None:
    lab.variables()
    before = lab.proxy.log.count("web.test")
    assert lab.curl("http://web.test/")
    assert lab.proxy.log.count("web.test") == before  # the host has no proxy now: direct, by the gateway's
    lab.desktop.write_text(KDE.format("127.0.0.1", SECRET, "127.0.0.1"))
    wait_until(lambda: lab.state()["effective"]["http"], "KDE's proxy is in use")
    assert lab.curl("http://web.test/")
    wait_until(lambda: lab.proxy.log.count("web.test") > before, "the request went to the host's proxy")
    done = lab.guest.run("sh", "-c", f". {lab.folder}/env; wget -q -O - http://web.test/")
    assert json.loads(done.stdout)
    # The gateway itself is not asked for through a proxy.
    asked = lab.proxy.log.count(GATEWAY4)
    lab.guest.run("sh", "-c", f". {lab.folder}/env; curl -sS http://{GATEWAY4}/proxy.env")
    assert lab.proxy.log.count(GATEWAY4) == asked


def test_a_change_of_the_desktop_is_in_use_within_3_s_and_ends_no_connection(lab: Lab) -> None:
    with connect(lab.guest, GATEWAY4, 3128) as tunnel:
        tunnel.sendall(b"CONNECT web.test:80 HTTP/1.1\r\nHost: web.test:80\r\n\r\n")
        assert b" 200 " in tunnel.recv(4096)
        changed_at = time.monotonic()
        lab.desktop.write_text(KDE.format("127.0.0.1", SECRET, "127.0.0.1"))
        wait_until(lambda: lab.state()["effective"]["http"], "KDE's proxy is in use")
        assert time.monotonic() - changed_at < 3
        state = lab.state()
        assert state["effective"]["https"] == "http://***@127.0.0.1:8888"
        assert state["won"] == {"http": "KDE", "https": "KDE", "no_proxy": "KDE"}
        assert "proxy settings changed" in lab.netstack.log
        tunnel.sendall(b"GET / HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n")
        assert tunnel.recv(4096).startswith(b"HTTP/1.")
    lab.desktop.unlink()
    wait_until(lambda: lab.state()["effective"]["http"] is None, "the proxy is gone")


def test_a_proxy_on_the_hosts_loopback_is_told_as_the_gateway_and_is_found_there(lab: Lab) -> None:
    lab.reload('guests = "literal"\nhttp = "http://127.0.0.1:8888"\nhttps = "http://proxy.example:1"')
    found = lab.variables()
    assert found["http_proxy"] == f"http://{GATEWAY4}:8888"
    assert found["https_proxy"] == "http://proxy.example:1"
    assert "all_proxy" not in found
    before = lab.proxy.log.count("web.test")
    assert lab.curl("http://web.test/")
    wait_until(lambda: lab.proxy.log.count("web.test") > before, "the request went to the host's proxy")
    lab.reload("")


def test_a_name_that_is_the_hosts_loopback_is_told_as_the_gateway(lab: Lab) -> None:
    lab.reload('guests = "literal"\nhttp = "http://thishost:8888"\nhttps = "http://web.test:8888"')
    wait_until(lambda: lab.variables()["http_proxy"] == f"http://{GATEWAY4}:8888", "the name was looked up")
    assert lab.variables()["https_proxy"] == "http://web.test:8888"
    assert lab.curl("http://web.test/")
    lab.reload("")


def test_passwords_are_told_only_where_the_settings_say_so_and_never_by_the_api(lab: Lab) -> None:
    proxy = f'guests = "literal"\nhttp = "http://me:{SECRET}@10.0.0.1:1"'
    lab.reload(proxy)
    assert lab.variables()["http_proxy"] == "http://10.0.0.1:1"
    lab.reload(proxy + "\nshare_credentials = true")
    assert lab.variables()["http_proxy"] == f"http://me:{SECRET}@10.0.0.1:1"
    assert SECRET not in json.dumps(lab.netstack.get("/v1/proxy/env?format=shell"))
    lab.reload("")


def test_dhcp_tells_of_the_script_and_the_script_follows_the_host(lab: Lab) -> None:
    hook = lab.folder / "hook"
    hook.write_text(f'#!/bin/sh\n[ "$1" = bound ] && echo "wpad=$wpad" > {lab.folder}/told\nexit 0\n')
    hook.chmod(0o755)
    lab.guest.run("busybox", "udhcpc", "-i", "tap0", "-n", "-q", "-f", "-O", "wpad", "-s", hook, timeout=60)
    assert (lab.folder / "told").read_text() == f"wpad=http://{GATEWAY4}/wpad.dat\n"
    assert lab.get("/wpad.dat") == 'function FindProxyForURL(url, host) { return "DIRECT"; }\n'
    lab.desktop.write_text(KDE.format("127.0.0.1", SECRET, "127.0.0.1"))
    wait_until(lambda: lab.state()["effective"]["http"], "KDE's proxy is in use")
    headers = lab.guest.run("curl", "-sS", "-D", "-", f"http://{GATEWAY4}/wpad.dat").stdout
    assert "application/x-ns-proxy-autoconfig" in headers
    assert f"PROXY {GATEWAY4}:3128" in headers


def test_a_script_of_the_host_decides_and_one_that_loops_holds_nobody_up(lab: Lab) -> None:
    script = lab.folder / "p.pac"
    script.write_text(
        """function FindProxyForURL(url, host) {
          if (host == "loop.test") for (;;) {}
          if (host == "direct.test") return "DIRECT";
          return isInNet(host, "203.0.113.0", "255.255.255.0") ? "PROXY 127.0.0.1:8888" : "DIRECT";
        }"""
    )
    lab.reload(f'pac = "{script}"')
    lab.variables()
    wait_until(lambda: lab.state()["pac"]["characters"], "the script is in use")
    before = lab.proxy.log.count("web.test")
    assert lab.curl("http://web.test/")
    wait_until(lambda: lab.proxy.log.count("web.test") > before, "the script sent it to the proxy")
    assert lab.curl("http://direct.test/")
    assert "direct.test" not in lab.proxy.log
    assert lab.state()["pac"]["pac_evaluations"] >= 2
    # A loop takes its second, goes direct, and others are served meanwhile.
    slow = lab.guest.popen(
        *("sh", "-c", f". {lab.folder}/env; exec curl -sS --max-time 20 http://loop.test/"),
        stdout=subprocess.PIPE,
        text=True,
    )
    began_at = time.monotonic()
    assert lab.curl("http://direct.test/")
    assert time.monotonic() - began_at < 1
    assert json.loads(slow.communicate(timeout=30)[0])
    assert lab.state()["pac"]["pac_killed"] == 1
    assert "the PAC script has no answer; going direct" in lab.netstack.log
    lab.reload("")


def test_the_commands_show_what_won_and_why(lab: Lab) -> None:
    lab.desktop.write_text(KDE.format("localhost", SECRET, "proxy.example"))
    wait_until(lambda: lab.state()["effective"]["http"], "KDE's proxy is in use")

    def netstack(*words: str) -> str:
        command = [sys.executable, "-m", "netstack", *words, "--api", f"unix://{lab.netstack.api_path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    shown = netstack("proxy", "show")
    for words in ("http://***@proxy.example:8888", "KDE", "kioslaverc", f"http://{GATEWAY4}/proxy.env"):
        assert words in shown
    assert SECRET not in shown
    assert json.loads(netstack("proxy", "show", "--json"))["won"]["http"] == "KDE"
    for form in ("shell", "env", "docker", "docker-daemon", "containerd", "systemd", "apt", "cloud-init", "json"):
        text = lab.netstack.get(f"/v1/proxy/env?format={form}")["text"]
        assert f"{GATEWAY4}:3128" in text
        if form == "docker":
            assert netstack("proxy", "env", "--format", form) == text


def test_the_hosts_own_server_at_port_80_is_still_there(lab: Lab) -> None:
    server = lab.world.host.popen(sys.executable, "-c", HOST_SERVER)
    try:
        wait_until(lambda: lab.get("/index.html") == "the host", "the host's own page")
        assert "http_proxy" in lab.get("/proxy.env")
    finally:
        server.terminate()
        server.wait(10)
