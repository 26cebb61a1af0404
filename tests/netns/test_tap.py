"""tap:// links: kernels as guests whose segmentation and checksums are left to netstack, and the other way round."""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import HOST4, HOST6, Namespace, wait_until
from tests.lab.netstack import Netstack
from tests.lab.rootfs.pattern import pattern_digest
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    MEGABYTE,
    PATIENCE,
    Net,
    connect,
    datagrams,
    is_readable,
    listen,
    port_of,
)
from tests.netns.test_tcp import digest_of, send_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.namespaces import TapNamespace

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

BOTH_FAMILIES = pytest.mark.parametrize("address", (HOST4, HOST6), ids=("ipv4", "ipv6"))

TAP4, TAP6 = "192.168.5.{}", "fd00:c0a8:5::{}"
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """Guest 100, whose tap has an MTU of 1500, guest 101, 65520, and room for those of other kinds."""
    with contextlib.ExitStack() as stack:
        net = Net(stack, taps=2)
        for number, tap in enumerate(net.taps):
            if not number:
                tap.ip("link", "set", "tap0", "mtu", 1500)
            tap.add_address("tap0", f"{TAP4.format(100 + number)}/24", f"{TAP6.format(100 + number)}/64")
            for gateway in (GATEWAY4, GATEWAY6):
                tap.ip("route", "add", "default", "via", gateway, "dev", "tap0", "metric", 100)
        yield net


def counts(net: Net, number: int) -> dict[str, int]:
    """The link's counters."""
    uri = f"tap://tap0?netns={net.taps[number].path}"
    (found,) = (link for link in net.status()["links"] if link["uri"] == uri)
    counters: dict[str, int] = found
    return counters


def exchange(ours: socket.socket, theirs: socket.socket, length: int) -> None:
    """The pattern in both directions at once."""
    with ThreadPoolExecutor(2) as readers:
        digests = [readers.submit(digest_of, sock) for sock in (ours, theirs)]
        threads = [send_pattern(sock, length) for sock in (ours, theirs)]
        assert {digest.result() for digest in digests} == {pattern_digest(length)}
        for thread in threads:
            thread.join()


@BOTH_FAMILIES
@pytest.mark.parametrize("number", (0, 1), ids=("mtu 1500", "mtu 65520"))
def test_ten_megabytes_each_way_in_large_frames(net: Net, number: int, address: str) -> None:
    length = 10 * MEGABYTE
    before = counts(net, number)
    with net.pair(net.taps[number], address) as (ours, theirs):
        exchange(ours, theirs, length)
    after = counts(net, number)
    spent = {name: after[name] - before[name] for name in ("frames_from_guest", "frames_to_guest")}
    # 14,000 frames of 1,500 bytes, and as many acknowledgements, would it be without offload.
    assert all(count < 4000 for count in spent.values()), spent
    assert after["drops_to_guest"] == before["drops_to_guest"]


@BOTH_FAMILIES
def test_datagrams_sent_as_one_reach_the_host_one_by_one(net: Net, address: str) -> None:
    payloads = [bytes((i,)) * 1200 for i in range(30)] + [b"the last"]
    before = counts(net, 0)["frames_from_guest"]
    bind = TAP6.format(100) if ":" in address else TAP4.format(100)
    with datagrams(net.taps[0], bind) as ours, datagrams(net.host, address) as theirs:
        ours.setsockopt(SOL_UDP, UDP_SEGMENT, 1200)
        for _ in range(2):  # the second time by the fast path, were it not for the run
            ours.sendto(b"".join(payloads), (address, port_of(theirs)))
            assert [theirs.recv(2000) for _ in payloads] == payloads
    assert counts(net, 0)["frames_from_guest"] - before < 20


@BOTH_FAMILIES
def test_datagrams_of_the_host_arrive_one_by_one(net: Net, address: str) -> None:
    payloads = [bytes((i,)) * 1200 for i in range(30)] + [b"the last"]
    bind = TAP6.format(100) if ":" in address else TAP4.format(100)
    with datagrams(net.taps[0], bind) as ours, datagrams(net.host, address) as theirs:
        ours.sendto(b"ask", (address, port_of(theirs)))
        _, source = theirs.recvfrom(100)
        for size in (0, 1200):
            theirs.setsockopt(SOL_UDP, UDP_SEGMENT, size)
            for round_ in range(3):
                if size:
                    theirs.sendto(b"".join(payloads), source)
                else:
                    for payload in payloads:
                        theirs.sendto(payload, source)
                assert [ours.recv(2000) for _ in payloads] == payloads, (size, round_)


@pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))
def test_two_taps_pass_large_frames_to_each_other(net: Net, ipv6: bool) -> None:
    address = TAP6.format(101) if ipv6 else TAP4.format(101)
    switched = net.status()["counters"]["frames_switched"]
    with listen(net.taps[1], address) as listener:
        ours = connect(net.taps[0], address, port_of(listener))
        theirs, _ = listener.accept()
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        exchange(ours, theirs, 5 * MEGABYTE)
    assert net.status()["counters"]["frames_switched"] - switched < 3000


@pytest.mark.parametrize("ipv6", (False, True), ids=("ipv4", "ipv6"))
def test_for_a_guest_without_offload_frames_are_cut(net: Net, other: TapNamespace, ipv6: bool) -> None:
    address = "fd00:c0a8:5::21" if ipv6 else "192.168.5.21"
    with listen(other, address) as listener:
        ours = connect(net.taps[1], address, port_of(listener))
        theirs, _ = listener.accept()
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        exchange(ours, theirs, 5 * MEGABYTE)
    bind = TAP6.format(101) if ipv6 else TAP4.format(101)
    with datagrams(net.taps[1], bind) as sender, datagrams(other, address) as receiver:
        sender.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
        sender.sendto(b"a" * 1000 + b"b" * 1000 + b"c", (address, port_of(receiver)))
        assert [receiver.recv(2000) for _ in range(3)] == [b"a" * 1000, b"b" * 1000, b"c"]
    assert "offload_malformed" not in net.status()["drops"]


def test_a_device_that_was_deleted_is_made_again(net: Net) -> None:
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(Namespace("guest", inside=net.host))
        own = stack.enter_context(run_behind(net, guest, f"tap://tap0?netns={guest.pid}"))
        macs = set()
        for _ in range(2):
            wait_until(lambda: "tap0" in guest.ip("link"), "the tap")
            macs.add(guest.ip("-o", "link", "show", "tap0").partition("link/ether ")[2][:17])
            guest.add_address("tap0", "192.168.5.30/24")
            wait_until(lambda: own.status()["links"][0]["connected"], "the link")
            with datagrams(guest, "192.168.5.30") as sock:
                ask_for_a_name(sock)
            guest.ip("link", "del", "tap0")
        assert len(macs) == 1
        assert own.process is not None
        assert own.process.poll() is None


def test_a_guest_at_a_path_has_the_same_card_after_a_restart(net: Net) -> None:
    """Or its address would be another one each time."""
    with Namespace("guest", inside=net.host) as guest:
        macs = []
        for _ in range(2):
            with run_behind(net, guest, f"tap://tap0?netns={guest.path}"):
                wait_until(lambda: "tap0" in guest.ip("link"), "the tap")
                macs.append(guest.ip("-o", "link", "show", "tap0").partition("link/ether ")[2][:17])
        assert macs[0] == macs[1]
        assert macs[0].startswith("52:56:")


def test_the_link_ends_with_its_process_and_the_name_comes_free(net: Net) -> None:
    guest = Namespace("guest", inside=net.host)
    with run_behind(net, guest, f"tap://tap0?netns={guest.pid}") as own:
        assert own.status()["links"][0]["connected"]
        start = time.monotonic()
        guest.close()
        wait_until(lambda: not own.status()["links"][0]["connected"], "the link's end")
        assert time.monotonic() - start < 5
        assert f"process {guest.pid} ended" in own.log


def test_one_name_cannot_be_had_twice(net: Net) -> None:
    with pytest.raises(RuntimeError, match="another process has this device; take another name"):
        run_behind(net, net.taps[0], f"tap://tap0?netns={net.taps[0].pid}").start()


def run_behind(net: Net, guest: Namespace, link: str) -> Netstack:
    """A netstack of its own, in the same host."""
    folder: Path = net.world.folder / f"t{guest.pid}"
    return Netstack(net.host, folder, links=[link])


def ask_for_a_name(sock: socket.socket) -> None:
    """Whether the gateway answers: a DNS query for its own name."""
    query = b"\0\7\1\0\0\1\0\0\0\0\0\0\4host\10netstack\10internal\0\0\1\0\1"
    for _ in range(20):
        sock.sendto(query, ("192.168.5.3", 53))
        if is_readable(sock, 1.0):
            assert sock.recv(1000)[:2] == b"\0\7"
            return
    raise AssertionError("no answer")
