"""resolv.conf: what it says, and when it says something else."""

import os
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.routes import RoutingTable, Server
from netstack.dns.source_resolvconf import ResolvConf, ResolvConfSource, parse_resolv_conf, scopes_of

OWN = (bytes((192, 168, 5, 3)), bytes.fromhex("fd00c0a8000500000000000000000003"))

CASES: list[tuple[str, str, list[str]]] = [
    ("plain", "nameserver 192.0.2.1\n", ["192.0.2.1"]),
    ("several, in order", "nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
    ("a fourth", "".join(f"nameserver 192.0.2.{n}\n" for n in range(1, 6)), ["192.0.2.1", "192.0.2.2", "192.0.2.3"]),
    ("twice", "nameserver 127.0.0.53\nnameserver 127.0.0.53\n", ["127.0.0.53"]),
    ("a scope", "nameserver fe80::1%eth0\n", ["fe80::1%eth0"]),
    ("comments", "# nameserver 192.0.2.9\n; nameserver 192.0.2.8\nnameserver 192.0.2.1 # mine\n", ["192.0.2.1"]),
    ("no final newline", "nameserver 192.0.2.1", ["192.0.2.1"]),
    ("CRLF", "nameserver 192.0.2.1\r\nnameserver 192.0.2.2\r\n", ["192.0.2.1", "192.0.2.2"]),
    ("tabs", "nameserver\t192.0.2.1\t\n", ["192.0.2.1"]),
    ("a BOM", "\ufeffnameserver 192.0.2.1\n", ["192.0.2.1"]),
    ("leading blank", " nameserver 192.0.2.9\n", ["127.0.0.1"]),
    ("upper case", "NAMESERVER 192.0.2.9\n", ["127.0.0.1"]),
    ("no value", "nameserver\nnameserver \n", ["127.0.0.1"]),
    ("nonsense", "nameserver 1.2.3\nnameserver x\nnameserver 010.0.0.1\nnameserver 192.0.2.1#\n", ["127.0.0.1"]),
    ("nonsense does not count", "nameserver x\n" * 5 + "nameserver 192.0.2.1\n", ["192.0.2.1"]),
    ("empty", "", ["127.0.0.1"]),
    ("NUL", "nameserver 192.0.2.1\0\nnameserver 192.0.2.2\n", ["192.0.2.2"]),
    ("our own", "nameserver 192.168.5.3\nnameserver 192.0.2.1\n", ["192.0.2.1"]),
    ("only our own", "nameserver 192.168.5.3\n", []),
    ("our own IPv6", "nameserver fd00:c0a8:5:0:0::3\n", []),
]


def addresses(found: ResolvConf) -> list[str]:
    """Who would be asked."""
    return [server.address for server in RoutingTable(scopes_of(found, "x"), own=OWN).servers()]


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_rule_46_nameservers(text: str, expected: list[str]) -> None:
    assert addresses(parse_resolv_conf(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("search corp.example home.arpa.\n", ("corp.example", "home.arpa")),
        ("search a.test\nsearch b.test\n", ("b.test",)),
        ("domain old.example more\n", ("old.example",)),
        ("search .\n", ()),
        ("options ndots:5\n", ()),
        ("search A.test a.test\tb.test  x..y\n", ("a.test", "b.test")),
    ),
)
def test_rule_46_search_lists(text: str, expected: tuple[str, ...]) -> None:
    assert parse_resolv_conf(text).search == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("", ResolvConf(ndots=1, timeout=5, attempts=2)),
        ("options ndots:5 timeout:3 attempts:4\n", ResolvConf(ndots=5, timeout=3, attempts=4)),
        ("options ndots:99 timeout:99 attempts:99\n", ResolvConf(ndots=15, timeout=30, attempts=5)),
        ("options timeout:x ndots: attempts:-1 unknown:1 :2\n", ResolvConf()),
        ("options edns0\noptions trust-ad\n", ResolvConf(options=frozenset(("edns0", "trust-ad")))),
        (
            "options rotate no-aaaa single-request use-vc Edns0\n",
            ResolvConf(options=frozenset(("rotate", "no-aaaa", "single-request", "use-vc"))),
        ),
        (
            "sortlist 130.155.160.0/255.255.240.0 130.155.0.0\n",
            ResolvConf(sortlist=("130.155.160.0/255.255.240.0", "130.155.0.0")),
        ),
    ),
)
def test_rule_46_options(text: str, expected: ResolvConf) -> None:
    assert parse_resolv_conf(text) == expected._replace(nameservers=("127.0.0.1",))


def test_rule_25_options_that_say_how_to_ask_reach_the_servers() -> None:
    scope = scopes_of(parse_resolv_conf("nameserver 192.0.2.1\noptions edns0 trust-ad use-vc rotate\n"), "x")[0]
    assert scope.servers == (Server("192.0.2.1", options=frozenset(("edns0", "trust-ad", "use-vc"))),)
    assert scope.default
    assert scope.domains == ()


@pytest.mark.parametrize(
    ("text", "stub"),
    (
        ("nameserver 127.0.0.53\n", True),
        ("nameserver 127.0.0.54\nnameserver 127.0.0.53\n", True),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", False),
        ("nameserver 127.0.0.1\n", False),
        ("", False),
    ),
)
def test_rule_47_resolveds_stub_is_known(text: str, stub: bool) -> None:
    assert parse_resolv_conf(text).is_resolved_stub() == stub


@given(
    st.text() | st.lists(st.sampled_from(["nameserver", "options", "search", " ", "\n", "::1", "x" * 70])).map("".join)
)
def test_no_text_makes_the_parser_raise(text: str) -> None:
    RoutingTable(scopes_of(parse_resolv_conf(text), "x"))


# ---- the file ------------------------------------------------------------------------------------------------------


def asked(source: ResolvConfSource) -> list[str]:
    return addresses(source.found)


def test_rule_57_a_rewritten_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    source = ResolvConfSource(path)
    assert asked(source) == ["192.0.2.1"]
    assert not source.look()
    path.write_text("nameserver 192.0.2.22\n")
    assert source.look()
    assert asked(source) == ["192.0.2.22"]
    path.write_text("nameserver 192.0.2.22\n# and nothing else\n")
    assert not source.look()


def test_rule_57_a_renamed_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    source = ResolvConfSource(path)
    other = tmp_path / "new"
    other.write_text("nameserver 192.0.2.2\n")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)
    assert source.look()
    assert asked(source) == ["192.0.2.2"]


def test_rule_57_a_switched_symlink_is_noticed(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).write_text(f"nameserver 192.0.2.{number}\n")
    path = tmp_path / "resolv.conf"
    path.symlink_to("1")
    source = ResolvConfSource(path)
    assert asked(source) == ["192.0.2.1"]
    path.unlink()
    path.symlink_to("2")
    assert source.look()
    assert asked(source) == ["192.0.2.2"]


def test_rule_57_a_missing_file_is_survived_and_noticed_when_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    source = ResolvConfSource(path)
    assert asked(source) == ["127.0.0.1"]
    path.write_text("nameserver 192.0.2.1\n")
    assert source.look()
    path.unlink()
    assert not source.look()
    assert asked(source) == ["192.0.2.1"]
    path.write_text("nameserver 192.0.2.2\n")
    assert source.look()
    assert asked(source) == ["192.0.2.2"]


def test_what_is_no_file_is_survived(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    assert asked(ResolvConfSource(tmp_path)) == ["127.0.0.1"]
    assert asked(ResolvConfSource(tmp_path / "dangling")) == ["127.0.0.1"]


def test_a_huge_file_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"nameserver 192.0.2.1\n" + b"\xff" * 10_000_000)
    assert asked(ResolvConfSource(path)) == ["192.0.2.1"]


async def test_a_change_is_told_within_a_second(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    source = ResolvConfSource(path)
    told: list[float] = []
    nursery.start_soon(source.run, lambda: told.append(trio.current_time()))
    await trio.sleep(3.5)
    assert not told
    path.write_text("nameserver 192.0.2.9\n")
    written_at = trio.current_time()
    await trio.sleep(3)
    assert len(told) == 1
    assert told[0] - written_at <= 1.0
    nursery.cancel_scope.cancel()
