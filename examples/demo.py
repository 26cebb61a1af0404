"""The demonstration: a real Linux guest, and what netstack gives it. `make demo` runs it.

    a Debian kernel in QEMU  --- Ethernet frames over a unix socket ---  netstack run  --- ordinary sockets ---  servers

It boots the kernel behind `netstack run`, lets the guest ask for addresses, ping, resolve a name, fetch files and move
as much as it can, and shows what the host sees of that. Each step says what is typed and what came back; one that does
not get what it expects says both, and the exit status is then 1. The servers are real ones, on the host's side
(examples/stage.py). The guest's land is made of this machine's own files (tests/lab/initramfs.py). Nothing is
downloaded, and nothing leaves this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.stage import NAME, ROOT, Host, Report, StepError, find_missing, shown, writable
from netstack.host.kvm import probe_kvm
from tests.lab.guest import Guest, GuestError, stream_nic
from tests.lab.initramfs import CACHE, LabUnavailableError, build_initramfs, find_kernel
from tests.lab.namespaces import wait_until
from tests.lab.netstack import Netstack
from tests.lab.rootfs.pattern import pattern_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MAC = "52:54:00:12:34:56"
FILE_SIZE = 16_000_000
SECONDS = 4  # of a measurement
# Measurements move gigabytes; so much of them is enough to look at.
CAPTURE_LIMIT = "64M"
SHOWN_FROM, SHOWN = 140, 8  # frames of the capture
INTERESTING = "BOOTP|DNS (Qry|Ans)"
SETTINGS_NAME = "netstack.toml"

# All that is not as usual. Everything has a default, and most users have no such file (docs/configuration.md).
SETTINGS = """\
[pcap]
file = {capture}
max_size = "{limit}"
"""
# Without a namespace of our own, the host's /etc/resolv.conf names the user's resolver, which is none of our business.
SETTINGS_ON_LOOPBACK = """
[dns]
nameservers = ["127.0.0.1:{dns_port}"]
search = ["example.test"]
"""


class Demo:
    """What the steps have in common."""

    def __init__(self, report: Report, folder: Path) -> None:
        """`folder` receives the capture and the logs."""
        self.report = report
        self.folder = folder
        self.capture = folder / "demo.pcapng"

    # ---- the stage ----

    def set_up(self, stack: contextlib.ExitStack) -> None:
        """Start the servers, netstack and the guest."""
        report = self.report
        # A unix socket's path is 107 bytes at most; the checkout's may be longer.
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netstack-")))

        report.heading("The host: servers, and netstack between them and the guest")
        host = self.host = stack.enter_context(Host(self.folder))
        if host.namespace is not None:
            report.fact("isolated", "in a network namespace of its own; no cable leaves it")
        else:
            report.leave_out("not isolated", "on this host's loopback; nothing is sent elsewhere all the same")
            report.leave_out("", f"reason: {host.no_namespace}")
        self.web_port, dns_port, self.iperf_port = host.port(80), host.port(53), host.port(5201)

        socket_path = short / "n.sock"
        settings = short / SETTINGS_NAME
        capture = json.dumps(str(self.capture))  # TOML's strings are JSON's
        text = SETTINGS if host.namespace is not None else SETTINGS + SETTINGS_ON_LOOPBACK
        settings.write_text(text.format(dns_port=dns_port, capture=capture, limit=CAPTURE_LIMIT))
        self.netstack = Netstack(
            host.namespace, short, links=[f"unix://{socket_path}"], arguments=["--config", str(settings)]
        )
        self.netstack.log_path = self.folder / "netstack.log"
        report.command("host", f"netstack run --link unix://{socket_path} --config {settings.name}")
        with report.wait("netstack starts"):
            stack.enter_context(self.netstack)
        self.network = self.netstack.status()["network"]
        report.fact(
            "netstack run", f"ready after {self.netstack.ready_after:.2f} s", f"network {self.network['subnet']}"
        )

        # Where the guest finds the servers: at the host's addresses, or at the gateway, which is the host's loopback.
        if host.namespace is not None:
            self.servers = host.addresses
        else:
            self.servers = [self.network["gateway"], self.network["gateway6"]][: len(host.addresses)]
        self.web = host.start_web(self.web_port)
        self.resolver = host.start_resolver(dns_port, self.servers)
        self.iperf = host.start_iperf(self.iperf_port)
        running = ["web", *(["dnsmasq"] if self.resolver else []), *(["iperf3"] if self.iperf else [])]
        report.fact("servers", ", ".join(running), f"on {' and '.join(host.addresses)}")

        kernel = find_kernel()
        report.heading("The guest: a Debian kernel in QEMU")
        kvm = probe_kvm()
        self.accelerator = "kvm" if kvm.usable else "tcg"
        how = "KVM, which works here" if kvm.usable else f"emulated (TCG), because {kvm.reason}"
        report.fact("processor", how)
        with report.wait("the guest's files are gathered"):
            initramfs = build_initramfs(kernel, writable(CACHE) or short)
        nic = stream_nic(socket_path, MAC)
        self.guest = Guest(
            [nic], self.folder, memory=512, capture=None, accelerator=self.accelerator, initramfs=initramfs
        )
        netdev = nic.netdev.replace("stream,", "stream,id=n0,").replace(str(short), "...")
        report.command("host", f"qemu-system-x86_64 ... -netdev {netdev}")
        start = time.monotonic()
        with report.wait("the guest boots"):
            stack.enter_context(self.guest)
        report.fact("booted", f"Linux {kernel.version} in {time.monotonic() - start:.1f} s")

    # ---- the steps ----

    def show_lease(self) -> None:
        """The guest gets its addresses: DHCP, router advertisement, DHCPv6."""
        self.report.command("guest", "udhcpc -i eth0")
        lease = self.guest.configure()
        expect(
            "ip" in lease and lease.get("router") == self.network["gateway"], f"a lease from the gateway, not {lease}"
        )
        self.report.fact(
            "IPv4 address", f"{lease['ip']}/{lease['mask']}", f"by DHCP, for {int(lease['lease']) // 3600} h"
        )
        self.report.fact("gateway, DNS", f"{lease['router']}, {lease['dns']}")
        self.report.fact("MTU, search", f"{lease['mtu']}, {lease.get('search', '')}")
        self.guest.wait_ipv6()
        advertised = [address for address in self.guest.addresses() if in_network6(address, self.network["subnet6"])]
        expect(bool(advertised), f"an address in {self.network['subnet6']} by router advertisement")
        self.report.fact("IPv6 address", advertised[0], "by router advertisement")
        if self.guest.run("command -v dhclient").status != 0:
            self.report.leave_out("DHCPv6", "no dhclient; sudo apt-get install isc-dhcp-client")
            return
        self.report.command("guest", "dhclient -6 eth0")
        self.guest.check("dhclient -6 -1 -sf /lab/dhclient6.sh -lf /run/leases6 -pf /run/pid6 eth0", 40)
        lease6 = self.guest.variables("/run/lease6")
        expect(in_network6(lease6.get("new_ip6_address", ""), self.network["subnet6"]), f"a DHCPv6 lease, not {lease6}")
        self.report.fact("IPv6 address", lease6["new_ip6_address"], "by DHCPv6")
        self.report.fact("IPv6 DNS", lease6.get("new_dhcp6_name_servers", "none"))

    def show_ping(self) -> None:
        """The gateway answers."""
        for address in (self.network["gateway"], self.network["gateway6"]):
            self.report.command("guest", f"ping -c 3 {address}")
            output = self.guest.check(f"ping -c 3 -i 0.2 {address}")
            received = re.search(r"(\d+) (?:packets )?received", output)
            expect(received is not None and received[1] == "3", f"3 answers from {address}:\n{output}")
            times = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)", output)
            note = f"round trip {times[1]} to {times[3]} ms" if times else ""
            self.report.fact("answers", f"3 of 3 from {address}", note)

    def show_name(self) -> None:
        """Names: the host's own, and what the host's resolver says."""
        self._look_up("host.netstack.internal", self.network["gateway"], "the host, by netstack itself")
        if self.resolver is None:
            self.report.leave_out("resolver", "no dnsmasq; sudo apt-get install dnsmasq-base")
            return
        self._look_up(NAME, self.servers[0], "by the resolver on the host")
        asked = f"query[A] {NAME} from 127.0.0.1"
        expect(asked in self.resolver.log, f"{asked!r} in dnsmasq's log:\n{self.resolver.log}")

    def _look_up(self, name: str, address: str, note: str) -> None:
        self.report.command("guest", f"nslookup {name}")
        output = self.guest.check(f"nslookup {name}")
        found = re.findall(r"Address:\s+(\S+)$", output.partition("Name:")[2], flags=re.MULTILINE)
        expect(address in found, f"{address} for {name}:\n{output}")
        self.report.fact("answer", ", ".join(found), note)

    def show_page(self) -> None:
        """A page from a server on the host, by name, by both families, and a file that must arrive whole."""
        port = "" if self.web_port == 80 else f":{self.web_port}"
        names = [NAME if self.resolver is not None else self.servers[0]]
        names += [f"[{address}]" for address in self.servers[1:]]
        for name in names:
            self.report.command("guest", f"wget -qO - http://{name}{port}/")
            page = self.guest.check(f"wget -qO - http://{name}{port}/")
            expect("Hello, guest." in page, f"the page of the web server, not {page!r}")
            self.report.fact("page", " ".join(page.split()))
        # The whole point: what the guest sends arrives as the host's own traffic.
        clients = {json.loads(line)["peer"] for web in self.web for line in web.log.splitlines() if line != "ready"}
        expect(
            clients <= set(self.host.addresses), f"only {self.host.addresses} as clients of the server, not {clients}"
        )
        self.report.fact("client", " and ".join(sorted(clients)), "says the server: the host itself")
        url = f"http://{names[0]}{port}/bytes/{FILE_SIZE}"
        self.report.command("guest", f"wget -qO - {url} | sha256sum")
        start = time.monotonic()
        digest = self.guest.check(f"wget -qO - {url} | sha256sum", 60).split()[0]
        seconds = time.monotonic() - start
        wanted = pattern_digest(FILE_SIZE)
        expect(digest == wanted, f"the SHA-256 {wanted}, not {digest}")
        self.report.fact("file", f"{megabytes(FILE_SIZE)} in {seconds:.1f} s", "SHA-256 as on the host")

    def show_traffic(self) -> None:
        """As much as the guest can, both ways; meanwhile, what the host sees of it."""
        if self.iperf is None or self.guest.run("command -v iperf3").status != 0:
            self.report.leave_out("throughput", "no iperf3; sudo apt-get install iperf3")
            return
        target = f"{self.servers[0]} -p {self.iperf_port}"
        before = self.netstack_cpu()
        self.report.command("guest", f"iperf3 -c {target} -t {SECONDS} &")
        self.guest.check(f"(iperf3 -c {target} -t {SECONDS} -J >/run/up; touch /run/up.done) >/dev/null 2>&1 &")
        wait_until(self._is_uploading, "a flow with a megabyte from the guest in GET /v1/status", 15)
        self.report.command("host", "netstack status --json     # GET /v1/status, while it runs")
        state = json.loads(run_netstack("status", "--json", "--api", f"unix://{self.netstack.api_path}"))
        self._show_flows(state)
        self.guest.wait_for("test -e /run/up.done", SECONDS + 20)
        self._show_rate("guest to host", self.guest.check("cat /run/up"), before)
        before = self.netstack_cpu()
        self.report.command("guest", f"iperf3 -c {target} -t {SECONDS} --reverse")
        output = self.guest.run(f"iperf3 -c {target} -t {SECONDS} -J --reverse", SECONDS + 20).output
        self._show_rate("host to guest", output, before)
        if self.accelerator == "tcg":
            self.report.remark("The emulated guest is the limit here; `make bench` measures netstack alone.")

    def _show_flows(self, state: dict[str, Any]) -> None:
        flows = state["flows"]["list"]
        expect(any(flow["bytes_from_guest"] > 1_000_000 for flow in flows), f"the transfer among the flows: {flows}")
        self.report.table(
            ("flow", "guest", "peer", "state", "from guest", "to guest"),
            (
                (
                    *(flow[name] for name in ("protocol", "guest", "peer", "state")),
                    *(megabytes(flow[name]) for name in ("bytes_from_guest", "bytes_to_guest")),
                )
                for flow in flows
            ),
        )
        link = state["links"][0]
        frames = f"{link['frames_from_guest']} from the guest, {link['frames_to_guest']} to it"
        self.report.fact("frames", frames, f"dropped: {sum(state['drops'].values())}")

    def _show_rate(self, label: str, output: str, before: float) -> None:
        """What iperf3's JSON says, beside the processor time that netstack took for it."""
        try:
            document: dict[str, Any] = json.loads(output)
            received = document["end"]["sum_received"]
        except (ValueError, KeyError):
            raise StepError(f"expected a result of iperf3, not {output[-400:]!r}") from None
        expect(received["bytes"] > 0, f"that bytes arrive: {document.get('error', received)}")
        text = f"{received['bits_per_second'] / 1e6:.0f} Mbit/s"
        spent = self.netstack_cpu() - before
        moved = f"{megabytes(received['bytes'])} in {received['seconds']:.1f} s"
        self.report.fact(label, text, f"{moved}, netstack's processor time {spent:.1f} s")

    def netstack_cpu(self) -> float:
        """Processor seconds that netstack has taken so far (proc(5), /proc/PID/stat: utime and stime)."""
        process = self.netstack.process
        expect(process is not None and process.poll() is None, "that netstack still runs")
        assert process is not None
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _is_uploading(self) -> bool:
        return any(flow["bytes_from_guest"] > 1_000_000 for flow in self.netstack.status()["flows"]["list"])

    def show_capture(self) -> None:
        """netstack ends, and leaves every frame in a file."""
        status = self.netstack.stop()
        expect(status == 0, f"that netstack ends with status 0 on SIGTERM, not {status}")
        path = shown(self.capture)
        self.report.command("host", f"netstack pcap show {path} | grep -E '{INTERESTING}'")
        lines = run_netstack("pcap", "show", "--limit", str(SHOWN_FROM), str(self.capture)).splitlines()
        chosen = [line for line in lines if re.search(INTERESTING, line)]
        expect(len(chosen) > 0, f"DHCP among the first {SHOWN_FROM} frames of the capture:\n{lines[:3]}")
        # Without the link's name and the fractions of a second, so that the lines fit.
        self.report.block([*(re.sub(r"\.\d{9} unix:\S*", "", line) for line in chosen[:SHOWN]), "..."])
        full = "has reached its limit" in self.netstack.log
        note = f", which is the limit in {SETTINGS_NAME}" if full else ""
        self.report.fact("capture", path, megabytes(self.capture.stat().st_size) + note)
        netstack = shown(Path(sys.executable).with_name("netstack"))
        self.report.fact("to look at it", f"{netstack} pcap show {path}")
        self.report.fact("", f"wireshark {path}")


def expect(condition: bool, what: str) -> None:
    """Raise StepError unless `condition`."""
    if not condition:
        raise StepError(f"expected {what}")


def in_network6(address: str, network: str) -> bool:
    """Whether an address of the guest belongs to the network (a /64)."""
    import ipaddress

    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network)
    except ValueError:
        return False


def megabytes(count: float) -> str:
    """1.2 MB."""
    return f"{count / 1e6:.1f} MB"


def run_netstack(*arguments: str) -> str:
    """Run a `netstack` command to its end; return what it wrote to standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "netstack", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
    )
    expect(done.returncode == 0, f"status 0 of netstack {shlex.join(arguments)}, not {done.returncode}: {done.stderr}")
    return done.stdout


def on_terminate(number: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP clear everything away as Ctrl-C does."""
    raise SystemExit(128 + number)


def play(report: Report, folder: Path) -> None:
    """All steps, one after the other; one that fails does not end the others, unless nothing can go on."""
    demo = Demo(report, folder)
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("The lease: IPv4 and IPv6", demo.show_lease),
        ("A ping of the gateway", demo.show_ping),
        ("A name resolved", demo.show_name),
        ("A page fetched from a server on the host", demo.show_page),
        ("The flows as the host sees them, and the throughput both ways", demo.show_traffic),
        ("What is left behind", demo.show_capture),
    )
    with contextlib.ExitStack() as stack:
        try:
            demo.set_up(stack)
        except Exception as error:  # whatever it is, people want to read it with the rest
            report.fail("not set up", words_of(error))
            return
        for title, step in steps:
            report.heading(title)
            try:
                step()
            except Exception as error:  # as above
                report.fail("failed", words_of(error))


def words_of(error: Exception) -> str:
    """What was expected and what came instead, for people."""
    if isinstance(error, GuestError):
        return f"expected this to succeed {error}"
    told = isinstance(error, StepError | LabUnavailableError)
    return str(error) if told else f"{type(error).__name__}: {error}"


def main() -> int:
    """Run the demonstration; the exit status."""
    report = Report()
    start = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_terminate)
    report.console.print("[bold]netstack[/]: a Linux guest and its network, on this machine alone")
    missing = find_missing()
    if missing:
        report.heading("This machine cannot show it yet")
        for what in missing:
            report.fail("missing", what)
        report.console.print("    All of it, on Debian and Ubuntu: sudo scripts/setup-debian.sh")
        return 1
    folder = writable(ROOT / "artifacts" / "demo") or Path(tempfile.mkdtemp(prefix="netstack-demo-artifacts-"))
    for old in folder.iterdir():
        old.unlink()
    try:
        play(report, folder)
    except KeyboardInterrupt:
        report.console.print("\nInterrupted; the guest, netstack and the servers are ended.")
        return 130
    report.fact("logs", shown(folder), "of netstack, QEMU, the guest and the servers")
    seconds = f"{time.monotonic() - start:.0f} s"
    if report.failed:
        report.console.print(f"\n[bold red]Failed: {report.failed}[/], after {seconds}.")
        return 1
    report.console.print(f"\n[bold green]All went well[/], {seconds}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
