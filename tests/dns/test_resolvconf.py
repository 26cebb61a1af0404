"""resolv.conf: what it says, and when it says something else."""

import os
from pathlib import Path

import pytest

from netstack.dns.resolvconf import HostNameservers, ResolvConf, parse_resolv_conf

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

OWN = (bytes((192, 168, 5, 3)), bytes.fromhex("fd00c0a8000500000000000000000003"))


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_nameservers(text: str, expected: list[str]) -> None:
    assert [nameserver.address for nameserver in parse_resolv_conf(text, OWN).nameservers] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("search corp.example home.arpa.\n", ("corp.example", "home.arpa")),
        ("search a.test\nsearch b.test\n", ("b.test",)),
        ("domain old.example more\n", ("old.example",)),
        ("search .\n", ()),
        ("options ndots:5\n", ()),
    ),
)
def test_search_lists(text: str, expected: tuple[str, ...]) -> None:
    assert parse_resolv_conf(text).search == expected


class Watch:
    """A HostNameservers on a real file, with a clock by hand."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.changes: list[ResolvConf] = []
        self.host = HostNameservers(path, OWN, lambda: self.now, self.changes.append)

    def addresses(self) -> list[str]:
        return [nameserver.address for nameserver in self.host.current().nameservers]


def test_a_rewritten_file_is_noticed_within_a_second(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    watch = Watch(path)
    assert watch.addresses() == ["192.0.2.1"]
    path.write_text("nameserver 192.0.2.22\n")
    watch.now = 0.9
    assert watch.addresses() == ["192.0.2.1"]
    watch.now = 1.0
    assert watch.addresses() == ["192.0.2.22"]
    assert [change.nameservers[0].address for change in watch.changes] == ["192.0.2.22"]


def test_a_renamed_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    watch = Watch(path)
    assert watch.addresses() == ["192.0.2.1"]
    other = tmp_path / "new"
    other.write_text("nameserver 192.0.2.2\n")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)
    watch.now = 1.0
    assert watch.addresses() == ["192.0.2.2"]


def test_a_switched_symlink_is_noticed(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).write_text(f"nameserver 192.0.2.{number}\n")
    path = tmp_path / "resolv.conf"
    path.symlink_to("1")
    watch = Watch(path)
    assert watch.addresses() == ["192.0.2.1"]
    path.unlink()
    path.symlink_to("2")
    watch.now = 1.0
    assert watch.addresses() == ["192.0.2.2"]


def test_a_missing_file_is_survived_and_noticed_when_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    watch = Watch(path)
    assert watch.addresses() == ["127.0.0.1"]
    path.write_text("nameserver 192.0.2.1\n")
    watch.now = 1.0
    assert watch.addresses() == ["192.0.2.1"]
    path.unlink()
    watch.now = 2.0
    assert watch.addresses() == ["192.0.2.1"]
    path.write_text("nameserver 192.0.2.2\n")
    watch.now = 3.0
    assert watch.addresses() == ["192.0.2.2"]


def test_what_is_no_file_is_survived(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    assert Watch(tmp_path).addresses() == ["127.0.0.1"]
    assert Watch(tmp_path / "dangling").addresses() == ["127.0.0.1"]


def test_a_huge_file_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"nameserver 192.0.2.1\n" + b"\xff" * 10_000_000)
    assert Watch(path).addresses() == ["192.0.2.1"]
