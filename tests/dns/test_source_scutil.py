"""macOS' resolvers: recorded outputs of scutil, files of /etc/resolver, and a watcher on a program that prints them."""

import os
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.routes import RoutingTable, Scope, Server
from netstack.dns.source_scutil import (
    ScutilSource,
    merge_resolver_files,
    parse_flat_server,
    parse_resolver_files,
    parse_scutil,
)

RECORDED = Path(__file__).with_name("recorded")
SPLIT = (RECORDED / "scutil_split.txt").read_text()
FULL = (RECORDED / "scutil_full.txt").read_text()
NONE = "No DNS configuration available\n"


def routes_of(scopes: list[Scope]) -> dict[str, list[str]]:
    return {line["domain"]: line["servers"] for line in RoutingTable(scopes).describe()}


def test_a_split_vpn() -> None:
    scopes = parse_scutil(SPLIT)
    assert routes_of(scopes) == {
        "corp.example": ["10.8.0.1:5353", "10.8.0.3:5353"],
        ".": ["192.0.2.1", "fe80::1%en0"],
    }
    assert RoutingTable(scopes).search == ("corp.example", "home.example")
    assert [scope.key for scope in scopes] == ["scutil:corp.example:utun4", "scutil:default:en0"]


def test_rule_44_a_supplemental_resolver_without_a_domain_takes_everything() -> None:
    table = RoutingTable(parse_scutil(FULL))
    assert routes_of(list(table.scopes)) == {".": ["10.8.0.1"]}
    assert table.search == ("home.example",)


def test_rule_44_multicast_and_scoped_resolvers_are_no_routes() -> None:
    domains = {domain for scope in parse_scutil(SPLIT) + parse_scutil(FULL) for domain in scope.domains}
    assert domains == {"corp.example", "."}


def test_rule_44_resolvers_of_one_domain_stand_in_their_order() -> None:
    text = "DNS configuration\n" + "".join(
        f"\nresolver #{n}\n  domain   : corp.example\n  nameserver[0] : 10.0.0.{n}\n  order    : {order}\n"
        for n, order in ((1, 101600), (2, 101400), (3, 101500))
    )
    scopes = parse_scutil(text)
    assert routes_of(scopes)["corp.example"] == ["10.0.0.2", "10.0.0.3", "10.0.0.1"]
    assert len({scope.key for scope in scopes}) == 3


def test_rule_45_one_address_by_two_interfaces_is_bound() -> None:
    text = "DNS configuration\n" + "".join(
        f"\nresolver #{n}\n{domain}  nameserver[0] : 10.0.0.1\n  if_index : {n} ({name})\n"
        for n, domain, name in ((1, "", "en0"), (2, "  domain   : corp.example\n", "utun4"))
    )
    assert [scope.servers[0].interface for scope in parse_scutil(text)] == ["en0", "utun4"]


@pytest.mark.parametrize(
    "text",
    (NONE, "", "DNS configuration\n\nresolver #1\n", "DNS configuration\n\nresolver #1\n  nameserver[0] : x\n"),
)
def test_no_configuration_asks_nobody(text: str) -> None:
    assert RoutingTable(parse_scutil(text)).route((b"x",)) == ()


@given(st.text() | st.lists(st.sampled_from([*SPLIT.splitlines(), "  port : ", "order", " : "])).map("\n".join))
def test_no_text_makes_the_parsers_raise(text: str) -> None:
    RoutingTable(parse_scutil(text))
    RoutingTable(parse_resolver_files({"corp.example": text, text[:9]: text}))


@pytest.mark.parametrize(
    ("text", "server"),
    (
        ("192.0.2.1", Server("192.0.2.1", 99)),
        ("192.0.2.1.5353", Server("192.0.2.1", 5353)),
        ("::1.55", Server("::1", 55)),
        ("fe80::1%en0", Server("fe80::1%en0", 99)),
        ("192.0.2.1.70000", None),
        ("192.0.2.1.0", None),
        ("192.0.2", None),
        ("", None),
    ),
)
def test_servers_with_ports_behind_a_dot(text: str, server: Server | None) -> None:
    assert parse_flat_server(text, 99) == server


def files(**texts: str) -> dict[str, list[str]]:
    found = {name.replace("_", "."): text for name, text in texts.items()}
    return {domain: servers for domain, servers in routes_of(parse_resolver_files(found)).items() if domain != "."}


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("nameserver 10.0.0.1\n", {"corp.example": ["10.0.0.1"]}),
        ("nameserver 127.0.0.1.5353\n", {"corp.example": ["127.0.0.1:5353"]}),
        ("port 5353\nnameserver 127.0.0.1\nport 54\n", {"corp.example": ["127.0.0.1:5353"]}),
        ("DOMAIN other.example.\n  NameServer\t10.0.0.1", {"other.example": ["10.0.0.1"]}),
        ("# nameserver 10.0.0.9\n; x\nnameserver 10.0.0.1 # 2\n", {"corp.example": ["10.0.0.1"]}),
        ("".join(f"nameserver 10.0.0.{n}\n" for n in (1, 1, 2, 3)), {"corp.example": ["10.0.0.1", "10.0.0.2"]}),
        ("options mdns\nnameserver 10.0.0.1\n", {}),
        ("flags scoped\nnameserver 10.0.0.1\n", {}),
        ("", {}),
        ("domain x.example\n", {}),
    ),
)
def test_files_of_etc_resolver(text: str, expected: dict[str, list[str]]) -> None:
    assert files(corp_example=text) == expected


def test_a_file_stands_for_what_scutil_made_of_it() -> None:
    printed = [
        *parse_scutil("DNS configuration\n\nresolver #1\n  domain   : test\n  nameserver[0] : 127.0.0.1\n"),
        *parse_scutil(SPLIT),
    ]
    merged = merge_resolver_files(printed, parse_resolver_files({"test": "nameserver 127.0.0.1.5353\n"}))
    assert routes_of(merged)["test"] == ["127.0.0.1:5353"]
    assert routes_of(merged)["corp.example"] == ["10.8.0.1:5353", "10.8.0.3:5353"]


async def until(look: object, seconds: float = 5.0) -> None:
    assert callable(look)
    with trio.fail_after(seconds):
        while not look():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_the_watcher_sees_what_scutil_prints_anew(tmp_path: Path, nursery: trio.Nursery) -> None:
    """A scutil that prints a configuration, then half of the next, then the rest, and one more after that."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = tmp_path / "scutil"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-W --dns" ] || exit 64\nexec cat {pipe}\n')
    program.chmod(0o755)
    changes: list[dict[str, list[str]]] = []
    source = ScutilSource(str(program), tmp_path / "resolver")
    nursery.start_soon(source.run, lambda: changes.append(routes_of(source.current())))
    with await trio.to_thread.run_sync(lambda: pipe.open("w")) as out:

        def say(text: str) -> None:
            out.write(text)
            out.flush()

        say(f"*** 10:11:12.131\n\n{FULL}")
        await until(lambda: changes)
        assert changes == [{".": ["10.8.0.1"]}]
        say(f"\n*** 10:11:15.001\n\n{SPLIT[:400]}")
        await trio.sleep(0.3)
        say(SPLIT[400:])
        await until(lambda: changes[-1].get("corp.example") == ["10.8.0.1:5353", "10.8.0.3:5353"])
        say(f"\n*** 10:11:16.000\n\n{NONE}")
        await until(lambda: changes[-1] == {".": []})
    nursery.cancel_scope.cancel()


async def test_the_watcher_sees_files_and_survives_without_scutil(tmp_path: Path, nursery: trio.Nursery) -> None:
    folder = tmp_path / "resolver"
    source = ScutilSource(str(tmp_path / "gone"), folder)
    nursery.start_soon(source.run, lambda: None)
    await trio.sleep(0.05)
    assert source.current() == []
    assert "No such file" in source.problem
    folder.mkdir()
    (folder / "test").write_text("nameserver 127.0.0.1.5353\n")
    await until(lambda: routes_of(source.current()).get("test") == ["127.0.0.1:5353"])
    (folder / "test").unlink()
    await until(lambda: source.current() == [])
    nursery.cancel_scope.cancel()
