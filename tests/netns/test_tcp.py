"""TCP between two real kernels with netstack in the middle: every byte, both closes, resets, refusals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import HOST4, HOST6
from tests.lab.rootfs.pattern import pattern, pattern_blocks, pattern_digest
from tests.netns.net import (
    AT_ONCE,
    GATEWAY4,
    GATEWAY6,
    MEGABYTE,
    Echo,
    connect,
    listen,
    port_of,
    receive_all,
    reset,
)

if TYPE_CHECKING:
    from tests.lab.namespaces import TapNamespace
    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

BOTH_FAMILIES = pytest.mark.parametrize("address", (HOST4, HOST6), ids=("ipv4", "ipv6"))


def send_pattern(sock: socket.socket, length: int) -> threading.Thread:
    """Send the pattern and the end of the stream, in a thread."""

    def send() -> None:
        for block in pattern_blocks(length):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def digest_of(sock: socket.socket) -> str:
    """The SHA-256 of what comes, to its end."""
    digest = hashlib.sha256()
    while data := sock.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()


def send_until_error(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"more" * 1000)


# ---- data ----


@pytest.mark.slow
@BOTH_FAMILIES
@pytest.mark.parametrize("mtu", (65520, 1500))
def test_twenty_megabytes_each_way_and_both_at_once(
    net: Net, guest: TapNamespace, other: TapNamespace, address: str, mtu: int
) -> None:
    length = 20 * MEGABYTE
    expected = pattern_digest(length)
    sender = guest if mtu == 65520 else other
    for directions in ("up", "down", "up and down"):
        with net.pair(sender, address) as (ours, theirs), ThreadPoolExecutor(2) as readers:
            threads, digests = [], []
            for direction, source, sink in (("up", ours, theirs), ("down", theirs, ours)):
                if direction in directions:
                    threads.append(send_pattern(source, length))
                    digests.append(readers.submit(digest_of, sink))
            assert {digest.result() for digest in digests} == {expected}, directions
            for thread in threads:
                thread.join()


@BOTH_FAMILIES
def test_the_guest_closes_its_half_and_is_answered_afterwards(net: Net, guest: TapNamespace, address: str) -> None:
    with net.pair(guest, address) as (ours, theirs):
        ours.sendall(b"question")
        ours.shutdown(socket.SHUT_WR)
        assert receive_all(theirs) == b"question"
        answering = send_pattern(theirs, 3 * MEGABYTE)
        assert digest_of(ours) == pattern_digest(3 * MEGABYTE)
        answering.join()


@BOTH_FAMILIES
def test_the_host_closes_its_half_and_hears_the_guest_afterwards(net: Net, guest: TapNamespace, address: str) -> None:
    with net.pair(guest, address) as (ours, theirs):
        theirs.sendall(b"greeting")
        theirs.shutdown(socket.SHUT_WR)
        assert receive_all(ours) == b"greeting"
        answering = send_pattern(ours, 3 * MEGABYTE)
        assert digest_of(theirs) == pattern_digest(3 * MEGABYTE)
        answering.join()


@pytest.mark.slow
@BOTH_FAMILIES
def test_a_window_that_stays_closed_for_seconds_loses_nothing(
    net: Net, guest: TapNamespace, other: TapNamespace, address: str
) -> None:
    length = 8 * MEGABYTE
    with net.pair(guest, address, receive_buffer=8192) as (ours, theirs), Echo(net, other, address) as echo:
        before = net.netstack.memory()
        sending = send_pattern(theirs, length)
        # Not to wait for something: that time passes is the test, long enough for several probes of a zero window.
        until = time.monotonic() + 5.5
        while time.monotonic() < until:
            assert echo.median() < 0.1, "the others wait for the guest that does not read"
            time.sleep(0.1)
        assert net.netstack.memory() - before < 24 * MEGABYTE
        assert digest_of(ours) == pattern_digest(length)
        sending.join()


# ---- the end ----


@BOTH_FAMILIES
def test_a_reset_of_the_host_reaches_the_guest(net: Net, guest: TapNamespace, address: str) -> None:
    with net.pair(guest, address) as (ours, theirs):
        start = time.monotonic()
        reset(theirs)
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
        assert time.monotonic() - start < AT_ONCE


@BOTH_FAMILIES
def test_a_reset_of_the_guest_reaches_the_host(net: Net, guest: TapNamespace, address: str) -> None:
    with net.pair(guest, address) as (ours, theirs):
        start = time.monotonic()
        reset(ours)
        with pytest.raises(ConnectionResetError):
            theirs.recv(1)
        assert time.monotonic() - start < AT_ONCE


@BOTH_FAMILIES
def test_a_reset_amid_a_transfer_reaches_the_guest(net: Net, guest: TapNamespace, address: str) -> None:
    with net.pair(guest, address) as (ours, theirs):
        ours.sendall(pattern(100_000))
        theirs.recv(1)
        reset(theirs)  # with data of the guest unread, and more coming
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_until_error(ours)


# ---- no connection ----


@pytest.mark.parametrize("address", (GATEWAY4, GATEWAY6, HOST4, HOST6))
@pytest.mark.parametrize("mtu", (65520, 1500))
def test_a_refused_port_is_refused_at_once(guest: TapNamespace, other: TapNamespace, address: str, mtu: int) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        connect(guest if mtu == 65520 else other, address, 1)
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.parametrize(
    ("kind", "address", "expected"),
    (
        ("unreachable", "203.0.113.99", {errno.EHOSTUNREACH}),
        # Linux reports "administratively prohibited" as EHOSTUNREACH in IPv4 and EACCES in IPv6 (icmp_err_convert).
        ("prohibit", "203.0.113.98", {errno.EHOSTUNREACH, errno.EACCES}),
        ("unreachable", "2001:db8:2::99", {errno.EHOSTUNREACH, errno.ENETUNREACH}),
        ("prohibit", "2001:db8:2::98", {errno.EACCES}),
    ),
)
def test_an_unreachable_host_is_unreachable_at_once(
    net: Net, guest: TapNamespace, kind: str, address: str, expected: set[int]
) -> None:
    net.host.ip("route", "replace", kind, address)
    start = time.monotonic()
    with pytest.raises(OSError) as caught:
        connect(guest, address, 80)
    assert caught.value.errno in expected
    assert time.monotonic() - start < AT_ONCE


def test_the_gateway_is_the_hosts_loopback(net: Net, guest: TapNamespace) -> None:
    for loopback, gateway in (("127.0.0.1", GATEWAY4), ("::1", GATEWAY6)):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(net.host, loopback))
            ours = stack.enter_context(connect(guest, gateway, port_of(listener)))
            theirs = stack.enter_context(listener.accept()[0])
            assert theirs.getpeername()[0] == loopback
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
