"""The internet that test guests talk to: HTTP, echo and a resolver, real ones, as programs in a namespace.

Run as a program it serves, on every address named, until its standard input ends:

    HTTP  port 80    GET /              a page
                     GET /bytes/N       N bytes of the pattern (tests/lab/rootfs/pattern.py)
                     GET /headers       the request's headers, as JSON
                     GET /boot.ipxe     a script for iPXE
                     PUT, POST          answers with the SHA-256 and the number of the bytes received, as JSON
    TCP   port 7     echo, until the sender has closed its half; then closes
          port 9     reads and says nothing
          port 13    says who asks, "ADDRESS PORT", and closes
          port 19    sends the pattern until the receiver has had enough
    UDP   port 7     echo
          port 13    says who asks

It writes a line of JSON for each request, connection and datagram to standard output, which class Servers gathers, so
that a test can say what arrived at the host, and not only what the guest believes. Threads and the standard library
only: what serves the tests should have nothing in common with what they test.

class Resolver runs dnsmasq with the names of the zone example.test.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, Namespace, output_of, wait_until
from tests.lab.rootfs.pattern import BLOCK, pattern_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
PAGE = b"<title>netstack lab</title>\nHello, guest.\n"
IPXE_SCRIPT = b"#!ipxe\necho The script from ${net0/dns} runs as ${net0/ip}\n"
_PRINTING = threading.Lock()


def report(event: str, peer: tuple[Any, ...], **facts: object) -> None:
    """Write one event to standard output."""
    line = json.dumps({"event": event, "peer": peer[0].removeprefix("::ffff:"), "port": peer[1], **facts})
    with _PRINTING:
        print(line, flush=True)


class HttpHandler(BaseHTTPRequestHandler):
    """The web server's answers. HTTP/1.1, so that connections are kept."""

    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def do_GET(self) -> None:
        report("http", self.client_address, method="GET", path=self.path, host=self.headers.get("Host", ""))
        kind, _, value = self.path.strip("/").partition("/")
        if kind == "bytes" and value.isdigit():
            self.send_headers("application/octet-stream", int(value))
            for block in pattern_blocks(int(value)):
                self.wfile.write(block)
        elif kind == "headers":
            self.send_body("application/json", json.dumps(dict(self.headers.items())).encode())
        elif kind == "boot.ipxe":
            self.send_body("text/plain", IPXE_SCRIPT)
        elif kind == "":
            self.send_body("text/html", PAGE)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_PUT(self) -> None:
        digest, length = hashlib.sha256(), 0
        for block in self.body_blocks():
            digest.update(block)
            length += len(block)
        report("http", self.client_address, method=self.command, path=self.path, length=length)
        self.send_body("application/json", json.dumps({"sha256": digest.hexdigest(), "length": length}).encode())

    do_POST = do_PUT  # noqa: N815

    def body_blocks(self) -> Any:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        remaining = int(self.headers.get("Content-Length", "0"))
        while remaining > 0 and (block := self.rfile.read1(min(remaining, BLOCK))):
            remaining -= len(block)
            yield block

    def send_headers(self, kind: str, length: int) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_body(self, kind: str, body: bytes) -> None:
        self.send_headers(kind, len(body))
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def on_echo(connection: socket.socket) -> int:
    total = 0
    while data := connection.recv(BLOCK):
        total += len(data)
        connection.sendall(data)
    return total


def on_discard(connection: socket.socket) -> int:
    total = 0
    while data := connection.recv(BLOCK):
        total += len(data)
    return total


def on_who(connection: socket.socket) -> int:
    peer = connection.getpeername()
    text = f"{peer[0]} {peer[1]}\n".encode()
    connection.sendall(text)
    return len(text)


def on_generate(connection: socket.socket) -> int:
    total = 0
    with contextlib.suppress(ConnectionError):
        for block in pattern_blocks(1 << 40):
            connection.sendall(block)
            total += len(block)
    return total


TCP_SERVICES: dict[int, Callable[[socket.socket], int]] = {7: on_echo, 9: on_discard, 13: on_who, 19: on_generate}


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class TcpServer(socketserver.ThreadingTCPServer):
    """Accepts connections and hands each to a service in a thread of its own."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096

    def __init__(self, address: str, port: int, service: Callable[[socket.socket], int]) -> None:
        self.address_family = family_of(address)
        self._service = service
        super().__init__((address, port), socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        report("tcp-open", client_address, local=self.server_address[1])
        try:
            total = self._service(request)
        except OSError as error:
            report("tcp-error", client_address, local=self.server_address[1], error=type(error).__name__)
        else:
            report("tcp-close", client_address, local=self.server_address[1], length=total)


class HttpServer(ThreadingHTTPServer):
    """The web server on one address."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: str, port: int) -> None:
        self.address_family = family_of(address)
        super().__init__((address, port), HttpHandler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the resolver for our name
        self.server_name, self.server_port = "lab", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        report("http-error", client_address, error=f"{type(error).__name__}: {error}")


def serve_udp(address: str, port: int, answer: Callable[[bytes, tuple[Any, ...]], bytes]) -> None:
    """Answer datagrams, for ever."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        while True:
            data, peer = server.recvfrom(1 << 16)
            report("udp", peer, local=port, length=len(data))
            with contextlib.suppress(OSError):
                server.sendto(answer(data, peer), peer)


def serve(addresses: Sequence[str]) -> None:
    """Serve on all of `addresses` until standard input ends."""
    servers: list[socketserver.BaseServer] = []
    for address in addresses:
        servers.append(HttpServer(address, 80))
        servers += [TcpServer(address, port, service) for port, service in TCP_SERVICES.items()]
        for port, answer in (
            (7, lambda data, _: data),
            (13, lambda _, peer: f"{peer[0]} {peer[1]}\n".encode()),
        ):
            threading.Thread(target=serve_udp, args=(address, port, answer), daemon=True).start()
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)  # whatever is still being served has no one left to look at it


class Servers:
    """The servers of this file as a process in a namespace."""

    def __init__(self, namespace: Namespace, *addresses: str) -> None:
        """Start them on `addresses`, by default the host's own and its loopback."""
        self.events: list[dict[str, Any]] = []
        self._process = namespace.popen(
            sys.executable, "-m", "tests.lab.servers", *(addresses or (HOST4, HOST6, "127.0.0.1", "::1")),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._output = output_of(self._process)
        if self._output.readline() != "ready\n":
            raise RuntimeError("the test servers did not start")
        self._reader = threading.Thread(target=self._gather, daemon=True)
        self._reader.start()

    def _gather(self) -> None:
        for line in self._output:
            self.events.append(json.loads(line))

    def wait_event(self, timeout: float = 10.0, **facts: object) -> dict[str, Any]:
        """The first event in which all `facts` are so, now or within `timeout` seconds."""

        def find() -> dict[str, Any] | None:
            return next((event for event in list(self.events) if facts.items() <= event.items()), None)

        found: dict[str, Any] = wait_until(find, f"an event at the servers with {facts}", timeout)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._reader.join(timeout=10)
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# 40 strings of 100 bytes: far more than a datagram of DNS carries, so that the answer has to come over TCP.
BIG_TXT = tuple(f"{number:03}".ljust(100, ".") for number in range(40))


class Resolver:
    """A real resolver, dnsmasq, on the address 127.0.0.53 of a namespace: what the host's /etc/resolv.conf names.

    It knows www.example.test (both families), v4only, v6only, big (a TXT record that needs TCP) and alias (a CNAME),
    says NXDOMAIN to everything else in example.test, and refuses all other names.
    """

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        *,
        address: str = "127.0.0.53",
        www: str = HOST4,
        options: Sequence[str] = (),
    ) -> None:
        """`options`: further ones of dnsmasq's."""
        program = shutil.which("dnsmasq") or shutil.which("dnsmasq", path="/usr/sbin:/sbin")
        if program is None:
            raise LabUnavailableError("no dnsmasq; install it with: sudo apt-get install dnsmasq-base")
        self._log = (folder / f"dnsmasq-{address}.log").open("w")
        # It stays the user that it is, as in a user namespace of one user it must. Not by --no-daemon: that serves TCP
        # without a process for each connection, and nobody else is answered while one that we keep is open.
        self._process = namespace.popen(
            program, "--keep-in-foreground", "--user=", "--conf-file=/dev/null", "--pid-file=",
            "--bind-interfaces", f"--listen-address={address}", "--no-resolv", "--no-hosts", "--log-facility=-",
            "--log-queries", "--local=/example.test/", "--local-ttl=60",
            f"--host-record=www.example.test,{www},{HOST6}", f"--host-record=v4only.example.test,{HOST4}",
            f"--host-record=v6only.example.test,{HOST6}", f"--host-record=far.example.test,{FAR4},{FAR6}",
            "--cname=alias.example.test,www.example.test", "--txt-record=small.example.test,a small text",
            "--txt-record=big.example.test," + ",".join(BIG_TXT), *options,
            stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self._namespace, self._address = namespace, address
        wait_until(self._is_listening, "dnsmasq to listen")

    def _is_listening(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"dnsmasq has ended: {Path(self._log.name).read_text()}")
        sockets = self._namespace.run("cat", "/proc/net/tcp").stdout
        hexadecimal = socket.inet_aton(self._address)[::-1].hex().upper()
        return f"{hexadecimal}:0035" in sockets

    def queries(self) -> list[str]:
        """The lines of its log that tell of a query."""
        return [line for line in Path(self._log.name).read_text().splitlines() if "query[" in line]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=10)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="servers for test guests")
    parser.add_argument("address", nargs="+")
    serve(parser.parse_args().address)
