"""iPXE as a guest: a second TCP/IP stack, written by other people than Linux's, with its own ideas of every protocol.

QEMU's network card carries it as a ROM (Debian package ipxe-qemu), so it needs no disk and no kernel. SeaBIOS shows
its screen on the serial port (`graphics=off`), where it is driven as a person would drive it: Ctrl-B when it offers
its command line, then commands, typed no faster than the keyboard buffer of a PC takes them.

Sources: https://ipxe.org/cmd for the commands; SeaBIOS docs, "sercon".
"""

from __future__ import annotations

import re
import select
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.lab.guest import GuestError, find_accelerator, find_qemu
from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import LEASH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.guest import Nic

PROMPT = "iPXE> "
KEYBOARD = 12  # characters typed at once; a PC's keyboard buffer holds 15
ESCAPES = re.compile(r"\x1b\[[0-9;?=]*[A-Za-z]|\x1bc")


class Ipxe:
    """A virtual machine that has got no further than the command line of its network card."""

    def __init__(self, nic: Nic, folder: Path, *, prefix: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> None:
        """Prepare one; `folder` takes its screen (ipxe.log) and its frames (ipxe.pcap).

        `prefix`: the words before QEMU's command, to run it in a namespace; `pass_fds`: descriptors that its card uses.
        """
        self._nic = nic
        self._prefix = list(prefix)
        self._pass_fds = list(pass_fds)
        self._folder = folder
        self._text = ""

    def start(self) -> None:
        """Switch it on and wait for its command line."""
        if not any(Path(folder).glob("pxe-virtio.rom") for folder in ("/usr/lib/ipxe/qemu", "/usr/share/qemu")):
            raise LabUnavailableError("no iPXE ROM; install it with: sudo apt-get install ipxe-qemu")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._serial, serial = socket.socketpair()
        kind, _, rest = self._nic.netdev.partition(",")
        more = ["-object", f"filter-dump,id=f0,netdev=n0,file={self._folder / 'ipxe.pcap'}"]
        if self._nic.chardev:
            rest = "chardev=c0"
            more = ["-chardev", f"{self._nic.chardev},id=c0", "-machine", "memory-backend=ram"]
            more += ["-object", "memory-backend-memfd,id=ram,share=on,size=64M"]
        command = [
            *(*self._prefix, *LEASH, find_qemu(), "-machine", "pc,graphics=off", "-m", "64"),
            *("-accel", find_accelerator(), "-display", "none", "-nodefaults", "-no-user-config", "-boot", "n"),
            *("-chardev", f"socket,id=serial,fd={serial.fileno()}", "-serial", "chardev:serial"),
            *more,
            *("-netdev", f"{kind},id=n0,{rest}", "-device", f"{self._nic.device},netdev=n0,mac={self._nic.mac}"),
        ]
        self._log = (self._folder / "ipxe.log").open("ab")
        self._log.write(shlex.join(command).encode() + b"\n")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[serial.fileno(), *self._pass_fds],
        )
        serial.close()
        try:
            self.wait_text("Press Ctrl-B for the iPXE command line", 30)
            self._serial.sendall(b"\x02")
            self.wait_text(PROMPT, 30)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Pull the plug."""
        self._process.kill()
        self._process.wait()
        self._serial.close()
        self._log.close()

    def wait_text(self, wanted: str, timeout: float) -> str:
        """Wait until `wanted` stands on the screen; return what came before it, and forget both."""
        deadline = time.monotonic() + timeout
        while wanted not in self._text:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._serial], [], [], remaining)[0]:
                raise GuestError(f"iPXE did not show {wanted!r} in {timeout:.0f} s, but:\n{self._text[-2000:]}")
            data = self._serial.recv(1 << 16)
            if not data:
                raise GuestError(f"QEMU has ended; iPXE's screen:\n{self._text[-2000:]}")
            self._log.write(data)
            self._text = ESCAPES.sub("", self._text + data.decode(errors="replace"))
        before, _, self._text = self._text.partition(wanted)
        return before

    def run(self, command: str, timeout: float = 30.0) -> str:
        """Type a command; return what it wrote."""
        for start in range(0, len(command), KEYBOARD):
            piece = command[start : start + KEYBOARD]
            self._serial.sendall(piece.encode())
            for character in piece:  # one by one: the screen has lines of 80
                self.wait_text(character, 10)
        self._serial.sendall(b"\r")
        output = self.wait_text(PROMPT, timeout)
        return output.replace("\r", "").strip()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
