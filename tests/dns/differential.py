"""The same packets to netstack, dnsmasq and unbound, all forwarding to knot: what each made of them, as JSON.

`python -m tests.dns.differential FOLDER` runs in a network namespace of its own, where only the loopback is; FOLDER is
for the servers' files. tests/dns/test_differential.py starts it, and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import trio

from netstack.core.ports import Datagram
from netstack.dns.resolver import Resolver
from netstack.dns.routes import RoutingTable, Scope, Server
from netstack.dns.server import DnsServer
from netstack.dns.upstream import Upstream
from tests.dns.nameserver import make_query
from tests.lab.daemons import find_daemon

KNOT, DNSMASQ, UNBOUND, OURS = 5300, 5301, 5302, 5303
NAMES = {"dnsmasq": DNSMASQ, "unbound": UNBOUND, "netstack": OURS}

ZONE = r"""
$ORIGIN example.com.
$TTL 300
@ SOA ns root 1 3600 600 86400 60
@ NS ns
@ MX 10 mx
@ MX 20 mx2
@ TXT "v=spf1 -all" "second \000\255"
@ CAA 0 issue "ca.example.com"
ns A 192.0.2.1
mx A 192.0.2.2
mx AAAA 2001:db8::2
mx2 A 192.0.2.3
www A 192.0.2.10
www A 192.0.2.11
www AAAA 2001:db8::10
v4 A 192.0.2.12
alias CNAME alias2
alias2 CNAME www
dangling CNAME gone
https HTTPS 1 . alpn=h2,h3 ipv4hint=192.0.2.1
_x._tcp SRV 0 5 5060 www
odd TYPE65280 \# 5 0102030405
*.wild A 192.0.2.20
under_score A 192.0.2.30
zero 0 A 192.0.2.40
""" + "\n".join(f"many A 10.0.{n // 200}.{n % 200}" for n in range(60))


def raw(query: bytes, **changes: Any) -> bytes:
    """A query with other bits."""
    message = bytearray(query)
    for what, value in changes.items():
        match what:
            case "set":
                message[2:4] = (int.from_bytes(message[2:4], "big") | value).to_bytes(2, "big")
            case "clear":
                message[2:4] = (int.from_bytes(message[2:4], "big") & ~value).to_bytes(2, "big")
            case "qdcount":
                message[4:6] = value.to_bytes(2, "big")
    return bytes(message)


OPT = b"\0\0\x29\4\xd0\0\0\0\0\0\0"


def ordinary() -> dict[str, bytes]:
    """What every client sends: all three agree about it."""
    packets = {
        f"{name} {kind}": make_query(f"{name}.example.com" if name != "@" else "example.com", kind)
        for name, kind in (
            *(("www", kind) for kind in ("A", "AAAA", "MX", "HTTPS")),
            *(("@", kind) for kind in ("SOA", "NS", "MX", "TXT", "CAA")),
            *(("alias", kind) for kind in ("A", "AAAA", "CNAME")),
            ("v4", "AAAA"), ("gone", "A"), ("gone", "AAAA"), ("dangling", "A"), ("https", "HTTPS"), ("_x._tcp", "SRV"),
            ("odd", "TYPE65280"), ("a.b.wild", "A"), ("under_score", "A"), ("zero", "A"),
        )
    }  # fmt: skip
    for size in (512, 1232, 4096):
        packets[f"www A edns {size}"] = make_query("www.example.com", "A", use_edns=0, payload=size)
        packets[f"gone A edns {size}"] = make_query("gone.example.com", "A", use_edns=0, payload=size)
    packets["many A edns"] = make_query("many.example.com", "A", use_edns=0, payload=1232)
    packets["WwW"] = make_query("WwW.eXaMpLe.CoM", "A")
    packets["trailing bytes"] = make_query("www.example.com") + b"xyz"
    packets["unknown option"] = make_query(
        "www.example.com", use_edns=0, options=[dns.edns.GenericOption("65001", b"?")]
    )
    packets["cookie"] = make_query("www.example.com", use_edns=0, options=[dns.edns.GenericOption("10", b"12345678")])
    packets["z bit"] = make_query("www.example.com", use_edns=0, ednsflags=0x4000)
    packets["cd"] = raw(make_query("www.example.com"), set=dns.flags.CD)
    packets["ad"] = raw(make_query("www.example.com"), set=dns.flags.AD)
    return packets


def odd() -> dict[str, bytes]:
    """What only few send: the servers do not agree."""
    query = make_query("www.example.com")
    head = query[:12]
    return {
        "short": query[:11],
        "empty": b"",
        "a response": raw(query, set=dns.flags.QR),
        "no question": raw(query, qdcount=0),
        "two questions": raw(query, qdcount=2) + query[12:],
        "header only": head,
        "header only without a question": raw(head, qdcount=0),
        "status": raw(query, set=2 << 11),
        "notify": raw(query, set=4 << 11),
        "update": raw(query, set=5 << 11),
        "opcode 15": raw(query, set=15 << 11),
        "chaos": make_query("version.bind", "TXT", rdclass="CH"),
        "class any": make_query("www.example.com", rdclass="ANY"),
        "label type 0x40": head + b"\x40a\0\0\1\0\1",
        "pointer to itself": head + b"\xc0\x0c\0\1\0\1",
        "too long a name": head + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
        "cut in the name": query[:20],
        "cut in the type": query[:-3],
        "no recursion": raw(make_query("mx2.example.com"), clear=dns.flags.RD),
        "axfr": make_query("example.com", "AXFR"),
        "ixfr": make_query("example.com", "IXFR"),
        "any": make_query("www.example.com", "ANY"),
        "many A": make_query("many.example.com", "A"),
        "edns 0 bytes": make_query("many.example.com", "A", use_edns=0, payload=0),
        "edns 600 bytes": make_query("many.example.com", "A", use_edns=0, payload=600),
        "edns version 1": make_query("www.example.com", use_edns=1),
        "two opts": query[:10] + b"\0\2" + query[12:] + OPT + OPT,
        "opt not last": query[:10] + b"\0\2" + query[12:] + OPT + b"\0\0\1\0\1\0\0\0\0\0\4\x0a\0\0\1",
        "opt cut short": make_query("www.example.com", use_edns=0)[:-3],
        "root ns": make_query(".", "NS"),
        "single label": make_query("nosuchhost", "A"),
        "dnssec ok": make_query("www.example.com", use_edns=0, want_dnssec=True),
        "tc in a query": raw(query, set=dns.flags.TC),
        "aa in a query": raw(query, set=dns.flags.AA),
        "rcode in a query": raw(query, set=5),
    }


def summary(wire: bytes | None, sent: bytes) -> Any:
    """What matters of an answer."""
    if wire is None:
        return None
    found: dict[str, Any] = {
        "id": wire[:2] == sent[:2],
        "rcode": wire[3] & 15,
        "tc": bool(wire[2] & 2),
        "length": len(wire),
    }
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True, continue_on_error=True)
    except dns.exception.DNSException as error:
        return found | {"unreadable": repr(error)}
    found["rcode"] = int(message.rcode())
    found["opt"] = message.edns
    found["question"] = message.question[0].name.to_text() if message.question else ""
    found["ra"] = bool(message.flags & dns.flags.RA)
    for section in ("answer", "authority"):
        found[section] = sorted(
            f"{rrset.name} {rrset.rdtype} {record.to_text()}" for rrset in getattr(message, section) for record in rrset
        )
    found["order"] = [int(rrset.rdtype) for rrset in message.answer]
    return found


class Ours:
    """netstack's DNS at a port of the loopback."""

    def __init__(self, nursery: trio.Nursery, udp: trio.socket.SocketType) -> None:
        self.udp = udp
        table = RoutingTable((Scope("host", (Server("127.0.0.1", KNOT),), default=True),))
        self.server = DnsServer(Resolver(Upstream(nursery), table=table), nursery, self._reply)
        self.nursery = nursery

    def _reply(self, datagram: Datagram, answer: bytes) -> None:
        self.nursery.start_soon(self.udp.sendto, answer, datagram.mac)

    async def serve(self) -> None:
        tcp = await trio.open_tcp_listeners(OURS, host="127.0.0.1")
        self.nursery.start_soon(trio.serve_listeners, lambda stream: self.server.serve_stream(stream, "guest"), tcp)
        while True:
            query, source = await self.udp.recvfrom(65535)
            # The source's address is where the MAC would be.
            self.server.on_datagram(Datagram(query, "guest", source, bytes(4), 1, bytes(4), 53), 0.0)  # type: ignore[arg-type]


async def ask(port: int, packet: bytes) -> bytes | None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.connect(("127.0.0.1", port))
        await sock.send(packet)
        with trio.move_on_after(1.0):
            answer = await sock.recv(65535)
            return bytes(answer)
    return None


async def ask_tcp(port: int, packets: list[bytes]) -> list[bytes]:
    """Pipelined, and half closed behind the last one."""
    answers: list[bytes] = []
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"".join(len(packet).to_bytes(2, "big") + packet for packet in packets))
        data = b""
        with trio.move_on_after(3.0):
            while len(answers) < len(packets):
                chunk = await stream.receive_some()
                if not chunk:
                    break
                data += chunk
                while len(data) >= 2 and len(data) >= (end := 2 + int.from_bytes(data[:2], "big")):
                    answers.append(data[2:end])
                    data = data[end:]
    return answers


def start_servers(folder: Path) -> list[subprocess.Popen[bytes]]:
    (folder / "example.com.zone").write_text(ZONE)
    (folder / "knot.conf").write_text(f"""
server:
    listen: 127.0.0.1@{KNOT}
    rundir: {folder}
    user: root
database:
    storage: {folder}
log:
  - target: stderr
    any: warning
zone:
  - domain: example.com
    file: {folder}/example.com.zone
""")
    (folder / "unbound.conf").write_text(f"""
server:
    interface: 127.0.0.1@{UNBOUND}
    username: ""
    chroot: ""
    directory: "{folder}"
    pidfile: "{folder}/unbound.pid"
    use-syslog: no
    do-daemonize: no
    do-not-query-localhost: no
    module-config: "iterator"
    minimal-responses: no
forward-zone:
    name: "."
    forward-addr: 127.0.0.1@{KNOT}
remote-control:
    control-enable: no
""")
    log = (folder / "servers.log").open("wb")
    commands = (
        [*find_daemon("knotd"), "-c", f"{folder}/knot.conf"],
        [*find_daemon("unbound"), "-d", "-c", f"{folder}/unbound.conf"],
        ["/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
         "--pid-file=", "--listen-address=127.0.0.1", "--bind-interfaces", f"--port={DNSMASQ}", "--user=root",
         f"--server=127.0.0.1#{KNOT}"],
    )  # fmt: skip
    # They end with this process: `unshare --kill-child` is how it is started.
    return [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]


def wait_ready(port: int) -> None:
    give_up = time.monotonic() + 20
    while True:
        try:
            dns.query.udp(dns.message.make_query("ns.example.com", "A"), "127.0.0.1", port=port, timeout=0.5)
            return
        except (OSError, dns.exception.DNSException):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


async def compare(folder: Path) -> dict[str, Any]:
    servers = start_servers(folder)
    try:
        for port in (KNOT, DNSMASQ, UNBOUND):
            await trio.to_thread.run_sync(wait_ready, port)
        found: dict[str, Any] = {"ordinary": {}, "odd": {}, "tcp": {}, "again": {}}
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
            await udp.bind(("127.0.0.1", OURS))
            async with trio.open_nursery() as nursery:
                ours = Ours(nursery, udp)
                nursery.start_soon(ours.serve)
                await run_all(found)
                nursery.cancel_scope.cancel()
        return found
    finally:
        for server in servers:
            server.kill()
            server.wait()


async def run_all(found: dict[str, Any]) -> None:
    async def one(kind: str, name: str, server: str, packet: bytes) -> None:
        found[kind].setdefault(name, {})[server] = summary(await ask(NAMES[server], packet), packet)

    sets: tuple[tuple[str, Callable[[], dict[str, bytes]]], ...] = (
        ("ordinary", ordinary),
        ("again", ordinary),
        ("odd", odd),
    )
    for kind, packets in sets:
        for server in NAMES:
            # One after the other, so that the cache does what it does, but the silent ones together.
            async with trio.open_nursery() as nursery:
                for name, packet in packets().items():
                    if kind == "odd":
                        nursery.start_soon(one, kind, name, server, packet)
                    else:
                        await one(kind, name, server, packet)
    packets_ = ordinary()
    for server, port in NAMES.items():
        names = [name for name in packets_ if "trailing" not in name]
        sent = [n.to_bytes(2, "big") + packets_[name][2:] for n, name in enumerate(names)]
        for answer in await ask_tcp(port, sent):
            number = int.from_bytes(answer[:2], "big")
            found["tcp"].setdefault(names[number], {})[server] = summary(answer, sent[number])


if __name__ == "__main__":
    json.dump(trio.run(compare, Path(sys.argv[1])), sys.stdout)
