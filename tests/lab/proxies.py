"""Real proxies for tests: squid, tinyproxy, microsocks, proxy.py; and a web server with TLS.

The first three are Debian's, installed or unpacked into .cache/proxies (scripts/setup-debian.sh), because installed
they would start with the machine. proxy.py is PyPI's, and the one that speaks TLS with who asks it. Each runs in a
namespace, in the foreground, with files in a folder of its own.

Sources: squid.conf(5) of 5.7, tinyproxy.conf(5) of 1.11, microsocks(1), `proxy --help` of 2.4.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import trustme

from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import Namespace, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / ".cache" / "proxies"


def find_proxy(name: str) -> Path:
    """The program. Raises LabUnavailableError where there is none."""
    for folder in (UNPACKED / "usr/sbin", UNPACKED / "usr/bin"):
        if (folder / name).exists():
            return folder / name
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise LabUnavailableError(f"no {name}; unpack it with: sudo scripts/setup-debian.sh")
    return Path(found)


class Daemon:
    """A program in a namespace that listens at an address and port."""

    def __init__(self, namespace: Namespace, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.namespace = namespace
        self.folder = folder
        self.name = name
        self.process: subprocess.Popen[Any] | None = None
        self.address = ""
        self.port = 0

    def command(self) -> list[str | Path]:
        """What is run; writes its files."""
        raise NotImplementedError

    def start(self) -> None:
        """Run it, until it listens."""
        libraries = [str(path) for place in ("usr/lib", "lib") for path in UNPACKED.glob(f"{place}/*-linux-gnu*")]
        environment = os.environ | ({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})
        with (self.folder / "output").open("ab") as output:
            self.process = self.namespace.popen(
                *self.command(), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
            )
        wait_until(self._listens, f"{self.name} listens", 20)

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended: {(self.folder / 'output').read_text()[-2000:]}")
        return f"{self.address}:{self.port} " in self.namespace.run("ss", "-Htln").stdout

    def stop(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Squid(Daemon):
    """squid, which wants `credentials` ("user:password") where there are any, and refuses the name blocked.test."""

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        address: str,
        port: int,
        *,
        names: Mapping[str, str],
        credentials: str = "",
    ) -> None:
        super().__init__(namespace, folder, "squid")
        self._program = find_proxy("squid")
        self.address = address
        self.port = port
        self._names = names
        self._credentials = credentials

    @property
    def log(self) -> str:
        """Its access log: time, duration, client, result/status, bytes, method, URL, user, way."""
        path = self.folder / "access.log"
        return path.read_text() if path.exists() else ""

    def command(self) -> list[str | Path]:
        folder = self.folder
        share = UNPACKED / "usr/share/squid" if (UNPACKED / "usr/share/squid").exists() else Path("/usr/share/squid")
        mime = share / "mime.conf"
        helper = folder / "authenticate.sh"
        # squid sends "USER PASSWORD", percent-encoded, a line each (auth_param basic program).
        user, _, password = self._credentials.partition(":")
        helper.write_text(
            f'#!/bin/sh\nwhile read -r line; do [ "$line" = "{user} {password}" ] && echo OK || echo ERR; done\n'
        )
        (folder / "errors").mkdir(exist_ok=True)
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in self._names.items()))
        lines = [
            f"http_port {self.address}:{self.port}",
            *([f"auth_param basic program /bin/sh {helper}", "acl known proxy_auth REQUIRED"] if user else []),
            "acl blocked dstdomain blocked.test",
            "http_access deny blocked",
            "http_access allow known" if user else "http_access allow all",
            "http_access deny all",
            "cache deny all",
            "cache_mem 0",
            f"access_log stdio:{folder}/access.log",
            f"cache_log {folder}/cache.log",
            "netdb_filename none",
            "pid_filename none",
            "pinger_enable off",
            f"coredump_dir {folder}",
            f"hosts_file {folder}/hosts",
            "dns_nameservers 127.0.0.1",
            f"error_directory {folder}/errors",  # empty: its own words, in English
            f"icon_directory {share}/icons",
            f"mime_table {mime if mime.exists() else '/dev/null'}",
            f"unlinkd_program {UNPACKED if UNPACKED.exists() else ''}/usr/lib/squid/unlinkd",
            "shutdown_lifetime 0 seconds",
            "visible_hostname squid.test",
            "via off",
            "logfile_rotate 0",
        ]
        (folder / "squid.conf").write_text("\n".join(lines) + "\n")
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, "proxy", "proxy")
        for parent in folder.parents:
            if parent.stat().st_mode & 0o011 != 0o011 and parent.stat().st_uid == os.geteuid():
                parent.chmod(parent.stat().st_mode | 0o055)
        return [self._program, "-N", "-f", folder / "squid.conf", "-d", "1"]


class Tinyproxy(Daemon):
    """tinyproxy, which lets everybody through."""

    def __init__(self, namespace: Namespace, folder: Path, address: str, port: int) -> None:
        super().__init__(namespace, folder, "tinyproxy")
        self._program = find_proxy("tinyproxy")
        self.address = address
        self.port = port

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def command(self) -> list[str | Path]:
        (self.folder / "log").touch()
        (self.folder / "conf").write_text(
            f'Listen {self.address}\nPort {self.port}\nTimeout 60\nMaxClients 50\nLogFile "{self.folder}/log"\n'
            "LogLevel Connect\nDisableViaHeader Yes\n"
        )
        return [self._program, "-d", "-c", self.folder / "conf"]


class Microsocks(Daemon):
    """microsocks, with a user and a password."""

    def __init__(self, namespace: Namespace, folder: Path, address: str, port: int, user: str, password: str) -> None:
        super().__init__(namespace, folder, "microsocks")
        self._program = find_proxy("microsocks")
        self.address = address
        self.port = port
        self._credentials = (user, password)

    @property
    def log(self) -> str:
        return (self.folder / "output").read_text()

    def command(self) -> list[str | Path]:
        user, password = self._credentials
        return [self._program, "-i", self.address, "-p", str(self.port), "-u", user, "-P", password]


class ProxyPy(Daemon):
    """proxy.py, which wants `credentials` ("user:password"), and speaks TLS where it has got a certificate."""

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        address: str,
        port: int,
        *,
        credentials: str,
        certificate: trustme.LeafCert | None = None,
    ) -> None:
        super().__init__(namespace, folder, "proxy.py")
        self.address = address
        self.port = port
        self._credentials = credentials
        self._certificate = certificate

    @property
    def log(self) -> str:
        return (self.folder / "output").read_text()

    def command(self) -> list[str | Path]:
        words: list[str | Path] = []
        if self._certificate is not None:
            key, chain = self.folder / "key.pem", self.folder / "chain.pem"
            self._certificate.private_key_pem.write_to_path(key)
            chain.write_bytes(b"".join(part.bytes() for part in self._certificate.cert_chain_pems))
            words = ["--key-file", key, "--cert-file", chain]
        return [
            *("env", f"HOME={self.folder}"),  # where it makes a folder
            *(sys.executable, "-I", "-m", "proxy", "--hostname", self.address, "--port", str(self.port)),
            *("--num-acceptors", "1", "--basic-auth", self._credentials, *words),
        ]

    def stop(self) -> None:
        """Ask it to end, since it has processes of its own to end."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        super().stop()


SERVER = """
import http.server, json, pathlib, ssl, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"")
    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def answer(self, body):
        facts = {"path": self.path, "headers": dict(self.headers), "received": len(body)}
        facts["peer"] = self.client_address[0]
        text = json.dumps(facts).encode()
        file = pathlib.Path(folder) / self.path.lstrip("/")
        if self.path.startswith("/debian/"):
            if not file.is_file():
                return self.send_error(404)
            text = file.read_bytes()
        if self.path.startswith("/bytes/"):
            text = bytes(int(self.path[7:]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *arguments): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
address, certificate, folder = sys.argv[1:]
plain, secure = Server((address, 80), Handler), Server((address, 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate)
secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
threading.Thread(target=plain.serve_forever, daemon=True).start()
secure.serve_forever()
"""


class Web(Daemon):
    """A web server at ports 80 and 443 whose answers say what it was asked; its certificates are for these names.

    Below /debian/ it has files.
    """

    def __init__(self, namespace: Namespace, folder: Path, address: str, *names: str) -> None:
        super().__init__(namespace, folder, "web server")
        self.address = address
        self.port = 443
        authority = trustme.CA()
        self.authority = folder / "authority.pem"
        authority.cert_pem.write_to_path(self.authority)
        self._certificate = folder / "server.pem"
        authority.issue_cert(*names, address).private_key_and_cert_chain_pem.write_to_path(self._certificate)

    def command(self) -> list[str | Path]:
        return [sys.executable, "-c", SERVER, self.address, self._certificate, self.folder]
