"""`netstack connect`: targets, and the copying between a socket and two descriptors.

Guests are in tests/netns/test_api.py.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest

from netstack.cli.connect import parse_target, relay
from netstack.cli.faults import CommandError, InputError


@pytest.mark.parametrize(
    ("text", "target"),
    (
        ("22", ("", 22)),
        (":22", ("", 22)),
        ("debian:22", ("debian", 22)),
        ("192.168.5.15:65535", ("192.168.5.15", 65535)),
        ("[fd00::15]:22", ("fd00::15", 22)),
    ),
)
def test_targets(text: str, target: tuple[str, int]) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text", ("", "debian", "debian:", "debian:0", "debian:65536", "fd00::15:22", "[debian]:22", "a:b")
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="must be GUEST:PORT"):
        parse_target(text)


class Pipe:
    """relay() in a thread, its two descriptors, and the guest's end."""

    def __init__(self, early: bytes = b"") -> None:
        self.guest, sock = socket.socketpair()
        self.guest.settimeout(20)
        source, self.source = os.pipe()
        self.sink, sink = os.pipe()
        self.status: object = None

        def run() -> None:
            with sock:
                try:
                    self.status = relay(sock, early, source, sink)
                except CommandError as error:
                    self.status = str(error)
            os.close(source)
            os.close(sink)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self) -> object:
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.guest.close()
        os.close(self.sink)
        return self.status


def test_each_direction_ends_by_itself() -> None:
    pipe = Pipe(b"early, ")
    os.write(pipe.source, b"question")
    os.close(pipe.source)
    question = b""
    while data := pipe.guest.recv(100):
        question += data
    assert question == b"question"
    pipe.guest.sendall(b"answer")
    pipe.guest.close()
    assert pipe.end() == 0


def test_what_comes_early_and_late_is_written() -> None:
    pipe = Pipe(b"early ")
    pipe.guest.sendall(b"late")
    pipe.guest.shutdown(socket.SHUT_WR)
    got = b""
    while data := os.read(pipe.sink, 100):
        got += data
    assert got == b"early late"
    os.close(pipe.source)
    assert pipe.end() == 0


def test_much_goes_both_ways_at_once_without_a_reader_on_either_side_at_first() -> None:
    pipe = Pipe()
    much = os.urandom(1 << 20)
    writers = [
        threading.Thread(target=_write_all, args=(pipe.source, much)),
        threading.Thread(target=pipe.guest.sendall, args=(much,)),
    ]
    for writer in writers:
        writer.start()
    readers: tuple[Callable[[], bytes], ...] = (lambda: os.read(pipe.sink, 1 << 16), lambda: pipe.guest.recv(1 << 16))
    for read in readers:
        got = b""
        while len(got) < len(much):
            data = read()
            assert data
            got += data
        assert got == much
    for writer in writers:
        writer.join(20)
    pipe.guest.shutdown(socket.SHUT_WR)
    assert pipe.end() == 0
    os.close(pipe.source)


def test_when_nobody_wants_the_answer_it_ends() -> None:
    pipe = Pipe()
    os.close(pipe.sink)
    pipe.sink = os.open(os.devnull, os.O_RDONLY)
    pipe.guest.sendall(b"answer")
    assert pipe.end() == 0
    os.close(pipe.source)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
