"""What tests of the gateway's proxy with everything real stand on: a netstack, a guest, squid and a web server.

    guest (a namespace behind a tap)  --netstack-->  host: squid on the host's own loopback
                                                     far:  web.test, 203.0.113.1, ports 80 and 443

The host's settings are the `[proxy]` table, and change by SIGHUP while netstack runs.
"""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import trustme

from tests.lab.namespaces import FAR4, TapNamespace, World, wait_until
from tests.lab.netstack import Netstack
from tests.lab.proxies import Squid, Web
from tests.netns.net import GATEWAY4, GATEWAY6, address4_of, address6_of, connect, mac_of

if TYPE_CHECKING:
    import contextlib
    import socket
    from pathlib import Path

SECRET = "gEhe1m"
PROXY = f"http://{GATEWAY4}:3128"
NAMES = {"web.test": FAR4, "blocked.test": FAR4, "other.test": FAR4}
SQUID = f'http = "http://user:{SECRET}@127.0.0.1:8080"\nhttps = "http://user:{SECRET}@127.0.0.1:8080"\n'


class Lab:
    """A netstack, a guest, and what is around them."""

    def __init__(self, stack: contextlib.ExitStack, *arguments: str) -> None:
        self.world = stack.enter_context(World())
        self.world.check_isolation()
        self.folder: Path = self.world.folder
        self.config = self.folder / "netstack.toml"
        self._proxy = ""
        self._write("")
        # Who vouches for the host's proxies, in place of the system's authorities.
        self.authority = trustme.CA()
        trusted = self.folder / "authorities.pem"
        self.authority.cert_pem.write_to_path(trusted)
        link = self.folder / "qemu.sock"
        self.netstack = stack.enter_context(
            Netstack(
                self.world.host,
                self.folder / "n",
                links=[f"unix://{link}"],
                arguments=["-c", str(self.config), "--log-level", "debug", *arguments],
                environment={"SSL_CERT_FILE": str(trusted)},
            )
        )
        self.guest = stack.enter_context(TapNamespace(link, inside=self.world.host, mac=mac_of(0)))
        self.guest.set_addresses(f"{address4_of(0)}/24", f"{address6_of(0)}/64", gateways=(GATEWAY4, GATEWAY6))
        resolv_conf = self.folder / "guest-resolv.conf"
        resolv_conf.write_text("nameserver 192.168.5.3\n")
        self.guest.bind_file("/etc/resolv.conf", resolv_conf)
        self.web = stack.enter_context(Web(self.world.far, self.folder / "web", FAR4, *NAMES))
        host = self.world.host
        self.squid = stack.enter_context(
            Squid(host, self.folder / "s", "127.0.0.1", 8080, names=NAMES, credentials=f"user:{SECRET}")
        )

    def _write(self, proxy: str) -> None:
        hosts = "".join(f'"{name}" = "{address}"\n' for name, address in NAMES.items())
        self.config.write_text(
            f'[dns]\nsource = "none"\nmdns = false\n[dns.hosts]\n{hosts}\n[proxy]\nsources = ["settings"]\n{proxy}'
        )

    def set_proxy(self, proxy: str) -> None:
        """The host's settings are these from now on."""
        if proxy == self._proxy:
            return
        self._proxy = proxy
        self._write(proxy)
        before = self.netstack.log.count("settings read again")
        assert self.netstack.process is not None
        self.netstack.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: self.netstack.log.count("settings read again") > before,
            "netstack has read its configuration again",
        )

    def curl(self, *words: str | Path, check: bool = True) -> Any:
        """curl in the guest, which knows the web server's authority."""
        return self.guest.run(
            "curl", "--silent", "--show-error", "--max-time", "20", "--cacert", self.web.authority, *words, check=check
        )

    def ask(self, *words: str | Path) -> dict[str, Any]:
        """What the web server says that it was asked."""
        found: dict[str, Any] = json.loads(self.curl(*words).stdout)
        return found

    def server(self) -> dict[str, Any]:
        found: dict[str, Any] = self.netstack.get("/v1/proxy")["server"]
        return found

    def count(self, name: str) -> int:
        return int(self.server()["counters"].get(name, 0))

    def tunnel(self, place: str) -> socket.socket:
        """A tunnel that is open, from the guest."""
        sock = connect(self.guest, GATEWAY4, 3128)
        sock.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += sock.recv(1)
        assert b" 200 " in answer, answer
        return sock
