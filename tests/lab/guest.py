"""A real virtual machine for tests: QEMU, Debian's kernel, and a shell that does what the test says.

Theory of operation. QEMU gets two serial ports. The kernel's messages go from the first one into a file; on the
second one a shell reads commands and writes their output, so that the two never mix. That port, and QEMU's monitor
(QMP), are socket pairs made before QEMU starts: there is no path to wait for and nothing that QEMU says is lost. A
command travels with a marker of its own, which the shell prints, with the exit status, after the command's output;
everything up to the marker is the output. Every wait has a deadline, and when one passes the error shows the
kernel's last messages.

The harness is plain synchronous code: the tests run netstack as a program of its own, as users do, and wait for one
thing at a time.

Sources: QEMU docs/interop/qmp-spec.rst, qemu(1) for the options; SeaBIOS loads a boot sector at 0x7C00 as a PC does.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.lab.initramfs import LabUnavailableError, build_initramfs, find_kernel
from tests.lab.namespaces import LEASH

if TYPE_CHECKING:
    from collections.abc import Sequence

BOOT_TIMEOUT = 60.0  # seconds; three under TCG on an idle machine, but test machines are seldom idle
# MiB for what TCG has translated. By default it takes 1 GiB and never starts afresh; then half a million translations,
# each in the way of a byte that a new kernel writes to where the old one was, make a reset take up to a minute. A
# smaller buffer is emptied when it is full: guests run no slower, and a reset takes as long as a boot.
TRANSLATIONS = 64
READY = b"LAB-READY\n"
# The kernel's tty layer holds 4,096 bytes that nobody has read yet; a longer line could lose its end.
LONGEST_COMMAND = 3500


class GuestError(Exception):
    """A guest did not do what it was told in the time given."""


class Result(NamedTuple):
    """What a command in the guest left: its exit status and its output, errors included."""

    status: int
    output: str


@functools.cache
def find_qemu() -> str:
    """The path of QEMU for this machine. Raises LabUnavailableError when there is none."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise LabUnavailableError("no qemu-system-x86_64; install it with: sudo apt-get install qemu-system-x86")
    return path


@functools.cache
def find_accelerator() -> str:
    """`kvm` where a virtual machine truly runs under it, else `tcg`.

    That /dev/kvm is there, and even that it answers, says little: inside another virtual machine it may be unable to
    run a guest, or run it far slower than TCG.  So a 512-byte guest is run: a boot sector that tells QEMU to end with
    a status that nothing else gives.
    """
    if not Path("/dev/kvm").exists():
        return "tcg"
    #          mov dx, 0xf4; mov al, 42; out dx, al; jmp $
    program = bytes.fromhex("ba f4 00  b0 2a  ee  eb fe").ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(prefix="boot-sector-") as image:
        image.write(program)
        image.flush()
        command = [
            *(find_qemu(), "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "32", "-nodefaults"),
            *("-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            *("-drive", f"file={image.name},format=raw,readonly=on"),
        ]
        try:
            status = subprocess.run(command, capture_output=True, check=False, timeout=3).returncode
        except subprocess.TimeoutExpired:
            return "tcg"
    return "kvm" if status == 42 * 2 + 1 else "tcg"


class Nic(NamedTuple):
    """One network card of a guest: the back-end's arguments without its id, and the MAC address."""

    netdev: str  # such as "stream,server=off,addr.type=unix,addr.path=/run/n.sock"
    mac: str
    device: str = "virtio-net-pci"
    chardev: str = (
        ""  # what `netdev` speaks through, without its id; the guest's memory is shared with whoever is there
    )


def stream_nic(path: str | Path, mac: str, *, server: bool = False) -> Nic:
    """A card on QEMU's stream socket at `path`: QEMU connects to it, or with `server` listens there."""
    return Nic(f"stream,server={'on' if server else 'off'},addr.type=unix,addr.path={path}", mac)


def vde_nic(folder: str | Path, mac: str) -> Nic:
    """A card plugged into the VDE switch whose directory is `folder`."""
    return Nic(f"vde,sock={folder}", mac)


def vhost_user_nic(path: str | Path, mac: str, *, device: str = "") -> Nic:
    """A card whose back-end serves the socket at `path`; QEMU looks for it every second when it goes away.

    Without KVM QEMU 7.2 ends with a failed assertion when a guest starts such a card with MSI-X, hence no vectors.
    """
    return Nic("vhost-user", mac, f"virtio-net-pci,vectors=0{device}", f"socket,path={path},reconnect=1")


class Guest:
    """A booted virtual machine.

    `folder` receives its files: console.log (the kernel), shell.log (every command and its output), qemu.log, and a
    pcap of each card. Use it as a context manager; on entry it has booted and the shell answers.
    """

    def __init__(
        self,
        nics: Sequence[Nic],
        folder: Path,
        *,
        memory: int = 512,
        capture: int | None = 256,
        prefix: Sequence[str] = (),
        append: str = "",
        accelerator: str | None = None,
        initramfs: Path | None = None,
    ) -> None:
        """Prepare a guest with `memory` MiB.

        `capture`: bytes of each frame for the pcap, None for no pcap. `prefix`: the words before QEMU's command, to run
        it in a namespace. `accelerator` and `initramfs`: where the caller has found or built them already.
        """
        self.folder = folder
        self._accelerator = accelerator
        self._append = append
        self._initramfs = initramfs
        self._prefix = list(prefix)
        self._memory = memory
        self._nics = list(nics)
        self._capture = capture
        self._counter = 0
        self._probing = False
        self._buffer = bytearray()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start QEMU and wait until the shell answers."""
        kernel = find_kernel()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shell, shell = socket.socketpair()
        self._qmp, qmp = socket.socketpair()
        accelerator = self._accelerator or find_accelerator()
        command = [
            *(*self._prefix, *LEASH, find_qemu()),
            *("-machine", "pc", "-smp", "1", "-m", str(self._memory)),
            *("-accel", "kvm" if accelerator == "kvm" else f"tcg,tb-size={TRANSLATIONS}"),
            # The guest's libraries choose their fastest code by what the processor can; la57 only makes TCG slower.
            *("-cpu", "host" if accelerator == "kvm" else "max,la57=off"),
            *("-display", "none", "-nodefaults", "-no-user-config"),
            *("-kernel", str(kernel.image), "-initrd", str(self._initramfs or build_initramfs(kernel))),
            *("-append", f"console=ttyS0 quiet panic=-1 mitigations=off {self._append}".strip()),
            *("-serial", f"file:{self.folder / 'console.log'}"),
            *("-chardev", f"socket,id=shell,fd={shell.fileno()}", "-serial", "chardev:shell"),
            *("-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
        ]
        if any(nic.chardev for nic in self._nics):
            command += ["-object", f"memory-backend-memfd,id=ram,share=on,size={self._memory}M"]
            command += ["-machine", "memory-backend=ram"]
        for number, nic in enumerate(self._nics):
            kind, comma, rest = nic.netdev.partition(",")
            if nic.chardev:
                command += ["-chardev", f"{nic.chardev},id=c{number}"]
                comma, rest = ",", f"chardev=c{number}"
            command += ["-netdev", f"{kind},id=n{number}{comma}{rest}"]
            command += ["-device", f"{nic.device},netdev=n{number},mac={nic.mac},romfile="]
            # QEMU does not see the frames of a card whose memory is shared.
            if self._capture is not None and not nic.chardev:
                file = self.folder / f"guest-n{number}.pcap"
                command += ["-object", f"filter-dump,id=f{number},netdev=n{number},file={file},maxlen={self._capture}"]
        with (self.folder / "qemu.log").open("ab") as log:
            log.write(shlex.join(command).encode() + b"\n")
            log.flush()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(shell.fileno(), qmp.fileno())
            )
        shell.close()
        qmp.close()
        self._buffer.clear()
        try:
            self._greet_monitor()
            self._wait_ready(BOOT_TIMEOUT)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End QEMU at once, as pulling the plug would."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._shell.close()
        self._qmp.close()

    def reset(self) -> None:
        """Press the machine's reset button and wait until it has booted again."""
        self._buffer.clear()
        self.monitor("system_reset")
        self._wait_ready(BOOT_TIMEOUT)

    def run(self, command: str, timeout: float = 30.0) -> Result:
        """Run a shell command in the guest, for `timeout` seconds at most; return its status and output.

        A command that takes longer is ended in the guest, with status 143 (SIGTERM); a guest that does not answer at
        all raises GuestError.
        """
        self._counter += 1
        marker = f"LAB-END-{self._counter}-"
        line = f"timeout {max(1, round(timeout))} /bin/sh -c {shlex.quote(command)} </dev/null 2>&1; echo {marker}$?\n"
        if "\n" in command:
            raise ValueError("a command is one line: the guest's shell reads line by line")
        if len(line) > LONGEST_COMMAND:
            raise ValueError(f"a command of {len(line)} bytes is longer than the serial line takes; use write_file()")
        self._log(f"$ {command}\n")
        self._shell.sendall(line.encode())
        # The guest ends the command itself; the difference is for a busy machine.
        output, status = self._read_until(re.compile(re.escape(marker).encode() + rb"(\d+)\n"), timeout + 15, command)
        text = output.decode(errors="replace")
        self._log(text if status == 0 else f"{text}[status {status}]\n")
        return Result(status, text)

    def check(self, command: str, timeout: float = 30.0) -> str:
        """Run a command that has to succeed; return its output. Raises GuestError with the output when it does not."""
        status, output = self.run(command, timeout)
        if status != 0:
            raise GuestError(f"in the guest: {command!r} ended with status {status}:\n{output}")
        return output

    def probe(self, *words: str | int, timeout: float = 30.0) -> dict[str, Any]:
        """Run one of the guest's own test programs (tests/lab/rootfs/probe.py); return what it found out.

        Under TCG, to start Python takes longer than what most of them do. So one Python is started, and waits; for each
        program it makes a copy of itself.
        """
        if not self._probing:
            self.check("mkfifo /run/probe && (setsid python3 /lab/probe.py wait </run/probe >/run/probe.log 2>&1 &)")
            self._probing = True
        answer = f"/run/answer-{self._counter}"
        line = shlex.join([answer, *(str(word) for word in words)])
        output = self.check(
            f"mkfifo {answer}; echo {shlex.quote(line)} >/run/probe; cat {answer}; rm {answer}", timeout
        )
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    def write_file(self, path: str, content: bytes) -> None:
        """Make a file in the guest, in pieces that the serial line takes."""
        self.check(f": >{shlex.quote(path)}")
        for start in range(0, len(content), 1500):
            piece = base64.b64encode(content[start : start + 1500]).decode()
            self.check(f"echo {piece} | base64 -d >>{shlex.quote(path)}")

    def wait_for(self, command: str, timeout: float = 20.0) -> str:
        """Run a command again and again until it succeeds; return its output. Raises GuestError after `timeout`."""
        deadline = time.monotonic() + timeout
        while True:
            status, output = self.run(command, timeout)
            if status == 0:
                return output
            if time.monotonic() > deadline:
                raise GuestError(f"in the guest: {command!r} did not succeed in {timeout} s; at last:\n{output}")
            time.sleep(0.1)

    def monitor(self, command: str, **arguments: object) -> Any:
        """Give QEMU's monitor (QMP) a command; return its answer. Raises GuestError when it refuses."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._qmp.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._read_monitor()
            if "error" in answer:
                raise GuestError(f"QEMU's monitor refuses {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            # Anything else is an event that nobody waits for.

    # ---- addresses, as most tests want them ----

    def configure(self, device: str = "eth0", *, timeout: float = 20.0) -> dict[str, str]:
        """Get an IPv4 lease; return udhcpc's variables (ip, router, dns, mtu, lease, opt119...)."""
        self.check(f"ip link set {device} up")
        options = "-O 26 -O 28 -O 42 -O 58 -O 59 -O 119 -O 121"
        self.check(f"udhcpc -i {device} -f -n -q -t 8 -T 1 {options} -s /lab/udhcpc.sh", timeout)
        return self.variables("/run/lease")

    def wait_ipv6(self, device: str = "eth0") -> None:
        """Wait for a global IPv6 address, and until none is tentative (RFC 4862 5.4): till then none is a source."""
        self.wait_for(f"ip -6 addr show dev {device} scope global | grep -q inet6")
        self.wait_for(f"! ip -6 addr show dev {device} | grep -q tentative")

    def variables(self, path: str) -> dict[str, str]:
        """The NAME=VALUE lines of a file in the guest."""
        lines = self.check(f"cat {path}").splitlines()
        return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}

    def addresses(self, device: str = "eth0") -> list[str]:
        """The addresses of an interface that are ready for use (not tentative), without their prefix lengths."""
        output = self.check(f"ip -o addr show dev {device}")
        return [
            found[1]
            for line in output.splitlines()
            if "tentative" not in line and (found := re.search(r"inet6? ([0-9a-f.:]+)/", line))
        ]

    # ---- the wires to QEMU ----

    def _wait_ready(self, timeout: float) -> None:
        self._probing = False
        try:
            self._read_until(re.compile(re.escape(READY)), timeout, "boot")
        except GuestError as error:
            # A guest that has halted, one that runs in circles, and a QEMU that hangs look different here.
            error.add_note(f"QEMU: {self.monitor('query-status')}")
            error.add_note(str(self.monitor("human-monitor-command", command_line="info registers")))
            raise

    def _read_until(self, pattern: re.Pattern[bytes], timeout: float, what: str) -> tuple[bytes, int]:
        """What the shell writes up to `pattern`, and the number that the pattern's group names."""
        deadline = time.monotonic() + timeout
        searched = 0
        while not (found := pattern.search(self._buffer, searched)):
            searched = max(0, len(self._buffer) - 64)  # a marker may have come half
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._shell], [], [], remaining)[0]:
                raise GuestError(f"the guest did not answer in {timeout:.0f} s: {what}\n{self._last_words()}")
            data = self._shell.recv(1 << 16)
            if not data:
                raise GuestError(f"QEMU has ended: {what}\n{self._last_words()}")
            self._buffer += data
        output = bytes(self._buffer[: found.start()])
        status = int(found[1]) if pattern.groups else 0
        del self._buffer[: found.end()]
        return output, status

    def _greet_monitor(self) -> None:
        self._monitor_buffer = b""
        self._read_monitor()  # the greeting
        self.monitor("qmp_capabilities")

    def _read_monitor(self, timeout: float = 20.0) -> dict[str, Any]:
        self._qmp.settimeout(timeout)
        while b"\n" not in self._monitor_buffer:
            try:
                data = self._qmp.recv(1 << 16)
            except TimeoutError:
                raise GuestError(f"QEMU's monitor did not answer in {timeout:.0f} s") from None
            if not data:
                raise GuestError(f"QEMU has ended\n{self._last_words()}")
            self._monitor_buffer += data
        line, _, self._monitor_buffer = self._monitor_buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """The ends of the logs: what a failure's reader wants to see first."""
        parts = [f"the shell: {bytes(self._buffer[-500:])!r}"]
        for name in ("qemu.log", "console.log"):
            path = self.folder / name
            text = path.read_text(errors="replace") if path.exists() else ""
            parts.append(f"{path}: ...{text[-1500:]}")
        return "\n".join(parts)

    def _log(self, text: str) -> None:
        with (self.folder / "shell.log").open("a") as log:
            log.write(text)
