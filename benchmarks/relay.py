"""The relay between a guest's tap and a QEMU stream socket, and how to get the fast one.

relay.c is compiled into the run's directory when the machine has a C compiler. Where it has none, this file is the
relay: the same work with the same system calls, slower by what the interpreter adds to each frame. A run says which one
it used, because the figures of the two are not comparable.

    python benchmarks/relay.py TAP SOCKET|FD       (in the guest's network namespace)
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP_NO_PI = 0x0002 | 0x1000
MAX_FRAME = 65535 + 14
BUFFER = 1 << 20


def build_relay(directory: Path, *, compiled: bool = True) -> tuple[list[str], str]:
    """The relay's command without its arguments, and what to call it in a report."""
    source = Path(__file__).with_name("relay.c")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiled and compiler is not None:
        program = directory / "relay"
        done = subprocess.run([compiler, "-O2", "-o", str(program), str(source)], capture_output=True, check=False)
        if done.returncode == 0:
            return [str(program)], "C (relay.c)"
    return [sys.executable, "-I", str(Path(__file__))], "Python (relay.py); MTU 1500 suffers most"


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
    return fd


def open_stream(where: str) -> socket.socket:
    if not where.startswith("/"):
        return socket.socket(fileno=int(where))
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(where)
    return stream


def read_frames(tap: int) -> list[memoryview]:
    """All that the tap has, up to a buffer full, each frame behind its length."""
    frames: list[memoryview] = []
    size = 0
    while size < BUFFER:
        try:
            frame = os.read(tap, MAX_FRAME)
        except BlockingIOError:
            break
        frames.append(memoryview(len(frame).to_bytes(4, "big") + frame))
        size += len(frame)
    return frames


def send_frames(stream: socket.socket, frames: list[memoryview]) -> list[memoryview]:
    """One send for each frame, as QEMU does and relay.c explains; returns what the stream did not take."""
    for index, frame in enumerate(frames):
        try:
            sent = stream.send(frame)
        except BlockingIOError:
            return frames[index:]
        if sent < len(frame):
            return [frame[sent:], *frames[index + 1 :]]
    return []


def write_frames(tap: int, buffer: memoryview, end: int) -> int:
    """Give whole frames to the tap; returns how many bytes of an incomplete one are left at the start of the buffer."""
    at = lost = 0
    while end - at >= 4:
        length = int.from_bytes(buffer[at : at + 4], "big")
        if length > MAX_FRAME:
            raise SystemExit(f"relay: a frame of {length} bytes")
        if end - at - 4 < length:
            break
        try:
            os.write(tap, buffer[at + 4 : at + 4 + length])
        except OSError:
            lost += 1  # the tap is not up yet, or its queue is full: lost as on a wire
        at += 4 + length
    rest = bytes(buffer[at:end])
    buffer[: len(rest)] = rest
    return len(rest)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: relay.py TAP SOCKET|FD")
    tap, stream = open_tap(sys.argv[1]), open_stream(sys.argv[2])
    stream.setblocking(False)
    print("ready", flush=True)
    buffer = memoryview(bytearray(BUFFER))
    left = 0
    waiting: list[memoryview] = []
    while True:
        reading: list[socket.socket | int] = [stream] if waiting else [stream, tap]
        readable, _, _ = select.select(reading, [stream] if waiting else [], [])
        if stream in readable:
            try:
                count = stream.recv_into(buffer[left:])
            except BlockingIOError:
                count = -1
            if count == 0:
                return
            if count > 0:
                left = write_frames(tap, buffer, left + count)
        if tap in readable and not waiting:
            waiting = read_frames(tap)
        waiting = send_frames(stream, waiting)


if __name__ == "__main__":
    main()
