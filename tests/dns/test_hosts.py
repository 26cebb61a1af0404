"""/etc/hosts for guests: what its lines mean (reference C6, rules 54 to 57), and that changes are seen."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.hosts import MAX_EACH, HostsFile, HostsTable, parse_hosts
from tests.dns.local_answers import ask, texts

GATEWAY = ip_address("192.168.5.2").packed
GATEWAY6 = ip_address("fd00:c0a8:5::2").packed

TEXT = b"""\
127.0.0.1       localhost mylocal
255.255.255.255 broadcasthost
::1             localhost ip6-localhost other.local6
fe80::1%lo0     localhost scoped.example
127.0.1.1       debian.example debian
198.51.100.7    a.example a  # c
198.51.100.8    a.example
198.51.100.9    b.example#glued
198.51.100.10
1.2.3 short
1.2.3.4.5 long
1::2::3 x
0.0.0.0 deny.example
:: deny.example
0.0.0.0 half.example
198.51.100.20 half.example
198.51.100.11 -bad bad- under_score.example good.example
198.51.100.12   UPPER.Example
198.51.100.13 trailing.example.
198.51.100.14   foo.internal foo.local
010.0.0.1 octal
0x7f.1 hex
2001:db8::7\ttabs.example\t\ttabs\r
198.51.100.15 nul\0.example
198.51.100.16 caf\xc3\xa9.example
   198.51.100.17 indented.example
198.51.100.18 last.example"""


def hosts(text: bytes = TEXT, loopback: tuple[bytes, bytes] | None = (GATEWAY, GATEWAY6)) -> HostsFile:
    source = HostsFile(loopback=loopback)
    source.table = parse_hosts(text)
    return source


SOURCE = hosts()


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    (
        ("a.example", "A", ["198.51.100.7", "198.51.100.8"]),  # two lines, both addresses
        ("A.eXample", "A", ["198.51.100.7", "198.51.100.8"]),
        ("a", "A", ["198.51.100.7"]),
        ("b.example", "A", ["198.51.100.9"]),
        ("upper.example", "A", ["198.51.100.12"]),
        ("trailing.example", "A", ["198.51.100.13"]),
        ("foo.internal", "A", ["198.51.100.14"]),
        ("foo.local", "A", ["198.51.100.14"]),  # without waiting for mDNS (lima#524)
        ("under_score.example", "A", ["198.51.100.11"]),
        ("good.example", "A", ["198.51.100.11"]),
        ("tabs.example", "AAAA", ["2001:db8::7"]),
        ("tabs", "AAAA", ["2001:db8::7"]),
        ("indented.example", "A", ["198.51.100.17"]),
        ("last.example", "A", ["198.51.100.18"]),
        ("broadcasthost", "A", ["255.255.255.255"]),
        ("half.example", "A", ["198.51.100.20"]),
        # Rule 56: the other family, and any other type, is NODATA: musl would take NXDOMAIN for the whole name.
        ("a.example", "AAAA", []),
        ("a.example", "MX", []),
        ("a.example", "HTTPS", []),
        ("a.example", "SOA", []),
        ("tabs.example", "A", []),
        # Rule 55: blocked.
        ("deny.example", "A", []),
        ("deny.example", "AAAA", []),
        # Rule 54: the host's loopback is the gateway for guests.
        ("mylocal", "A", ["192.168.5.2"]),
        ("mylocal", "AAAA", []),
        ("debian.example", "A", ["192.168.5.2"]),
        ("other.local6", "AAAA", ["fd00:c0a8:5::2"]),
    ),
)
def test_rule_54_55_56_lines_mean_what_they_say(name: str, kind: str, expected: list[str]) -> None:
    assert texts(ask(SOURCE.answer, name, kind)) == expected


@pytest.mark.parametrize(
    "name",
    (
        *("localhost", "ip6-localhost", "short", "long", "x", "octal", "hex", "scoped.example", "-bad", "bad-"),
        *("glued", "b.example\\035glued", "example", "not.a.example", "nul", "127.0.0.1"),
    ),
)
def test_rule_54_what_is_no_name_here_is_left_to_others(name: str) -> None:
    assert ask(SOURCE.answer, name) is None


def test_any_gives_all_addresses() -> None:
    source = hosts(b"192.0.2.1 both\n2001:db8::1 both\n")
    assert texts(ask(source.answer, "both", "ANY")) == ["192.0.2.1", "2001:db8::1"]


def test_another_class_is_not_ours() -> None:
    assert ask(SOURCE.answer, "a.example", "A", rdclass="CH") is None


def test_loopback_may_be_given_as_it_is() -> None:
    assert texts(ask(hosts(loopback=None).answer, "mylocal")) == ["127.0.0.1"]
    assert texts(ask(hosts(loopback=None).answer, "debian")) == ["127.0.1.1"]


def test_reverse_gives_all_names_the_canonical_first() -> None:
    assert texts(ask(SOURCE.answer, "7.100.51.198.in-addr.arpa", "PTR")) == ["a.example.", "a."]
    assert texts(ask(SOURCE.answer, "7.100.51.198.IN-ADDR.arpa", "A")) == []
    name = "7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa"
    assert texts(ask(SOURCE.answer, name, "PTR")) == ["tabs.example.", "tabs."]
    for other in (
        "99.100.51.198.in-addr.arpa",
        "1.0.0.127.in-addr.arpa",
        "0.0.0.0.in-addr.arpa",
        "7.100.51.in-addr.arpa",
    ):
        assert ask(SOURCE.answer, other, "PTR") is None


def test_bounds_hold_for_one_name_and_one_address() -> None:
    lines = b"".join(b"10.0.%d.%d many\n" % (n >> 8, n & 255) for n in range(2000))
    assert len(parse_hosts(lines).addresses[b"many"]) == MAX_EACH
    table = parse_hosts(b"192.0.2.1 " + b" ".join(b"n%d" % n for n in range(2000)))
    assert len(table.addresses) == 2000
    assert len(table.names[ip_address("192.0.2.1").packed]) == MAX_EACH


@given(st.binary(max_size=400) | st.lists(st.sampled_from(TEXT.split()), max_size=30).map(b" ".join))
def test_any_bytes_can_be_read(data: bytes) -> None:
    table = parse_hosts(data)
    assert all(len(packed) in (4, 16) for found in table.addresses.values() for packed in found)


def test_a_list_of_100_000_names_is_parsed_in_under_a_second() -> None:
    text = b"".join(b"0.0.0.0 ads%d.example.test tracker%d.example.test\n" % (n, n) for n in range(50_000))
    text += b"".join(b"10.%d.%d.%d host%d.test\n" % (n >> 16, n >> 8 & 255, n & 255, n) for n in range(50_000))
    pauses: list[float] = []
    gc.disable()  # what the other tests have left behind is not looked through here
    began = time.thread_time()
    table = parse_hosts(text, lambda: pauses.append(time.thread_time()))
    took = time.thread_time() - began
    gc.enable()
    assert took < 1.0
    assert len(table.addresses) == 150_000
    # The event loop gets its turn all the time.
    assert max(b - a for a, b in itertools.pairwise(pauses)) < 0.05


# ---- following the file ----------------------------------------------------------------------------------------------


async def wait_until(done: Callable[[], bool], seconds: float = 2.0) -> None:
    """Rule 57: within two seconds."""
    with trio.fail_after(seconds):
        while not done():  # noqa: ASYNC110 - nobody can tell us
            await trio.sleep(0.02)


def replace(path: Path, text: str) -> None:
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    fresh.replace(path)


def swap_link(path: Path, text: str) -> None:
    target = path.with_name(f"target-{text.split()[0]}")
    target.write_text(text)
    link = path.with_name("link")
    link.symlink_to(target)
    link.replace(path)


def delete_and_create(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize("change", (Path.write_text, replace, swap_link, delete_and_create))
async def test_rule_57_a_change_is_seen(
    tmp_path: Path, nursery: trio.Nursery, change: Callable[[Path, str], object]
) -> None:
    path = tmp_path / "hosts"
    path.write_text("192.0.2.1 name.test\n")
    source = HostsFile(path)
    source.load()
    assert texts(ask(source.answer, "name.test")) == ["192.0.2.1"]
    nursery.start_soon(source.run)
    for text in ("192.0.2.2 name.test\n", "192.0.2.3 name.test\n"):
        change(path, text)
        fresh = (ip_address(text.split()[0]).packed,)
        await wait_until(partial(lambda fresh: source.find((b"name", b"test")) == fresh, fresh))


async def test_rule_57_a_file_that_goes_takes_its_names_along_and_brings_them_back(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "hosts"
    source = HostsFile(path)
    source.load()
    nursery.start_soon(source.run)
    for _ in range(2):
        path.write_text("192.0.2.1 name.test\n")
        await wait_until(lambda: ask(source.answer, "name.test") is not None)
        path.unlink()
        await wait_until(lambda: ask(source.answer, "name.test") is None)


async def test_two_writes_within_one_tick_of_the_file_systems_clock(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("192.0.2.1 name.test\n")
    source = HostsFile(path)
    await source.check()
    status = path.stat()
    # Written while it was being read, in place, with the same length: nothing that stat() tells has changed.
    path.write_text("192.0.2.2 name.test\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    source._identity = source._identify()
    await source.check()
    assert texts(ask(source.answer, "name.test")) == ["192.0.2.2"]


async def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_text("192.0.2.1 name.test\n")
    source = HostsFile(path)
    for _ in range(3):
        await source.check()
    monkeypatch.setattr(HostsFile, "_read", lambda *_: pytest.fail("read"))
    await source.check()
    assert source.version == 1


async def test_a_file_that_cannot_be_read_is_told_of_once_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("192.0.2.1 name.test\n")
    problems: list[str] = []
    source = HostsFile(path, on_problem=problems.append)
    await source.check()
    path.unlink()
    path.mkdir()
    for _ in range(3):
        await source.check()
    assert problems == [f"{path}: Is a directory"]
    assert texts(ask(source.answer, "name.test")) == ["192.0.2.1"]


async def test_a_long_file_is_read_while_the_event_loop_runs(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "hosts"
    path.write_text("".join(f"0.0.0.0 ads{n}.test\n" for n in range(100_000)))
    source = HostsFile(path)
    source.load()
    assert source.table == HostsTable()
    nursery.start_soon(source.run)
    turns = 0
    while not source.table.addresses:
        await trio.sleep(0.001)
        turns += 1
    assert turns > 5
    assert texts(ask(source.answer, "ads99999.test")) == []


def test_a_dot_within_a_label_is_none_between_two() -> None:
    file = HostsFile()
    file.table = parse_hosts(b"198.51.100.1 app.dev")
    assert file.find((b"app", b"dev")) == (bytes((198, 51, 100, 1)),)
    assert file.find((b"app.dev",)) is None
