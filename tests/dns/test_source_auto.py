"""Which source is the true one, and following it through a host's changes of mind."""

from pathlib import Path

import pytest
import trio

from netstack.dns.routes import Scope, Server
from netstack.dns.source_auto import HostSource, asks_resolved, choose
from netstack.dns.source_networkmanager import NetworkManager
from netstack.dns.source_resolvconf import parse_resolv_conf
from netstack.dns.source_resolved import Resolved

WIFI = Scope("resolved:wifi", (Server("192.0.2.1", interface="wifi"),), default=True)
RESOLVED = Resolved((WIFI, Scope("resolved:tun0", (Server("10.8.0.1", 54),), ("corp.example",))), mode="stub")
MANAGER = NetworkManager("default", "symlink", (Scope("networkmanager:wifi", (Server("192.0.2.1"),), default=True),))
STUB = "nameserver 127.0.0.53\nsearch home.arpa\n"
PLAIN = "nameserver 192.0.2.1\n"
OTHER = "nameserver 198.51.100.1\n"


@pytest.mark.parametrize(
    ("resolv", "resolved", "manager", "nss", "expected", "why"),
    (
        (STUB, RESOLVED, None, False, "resolved:wifi", "systemd-resolved over D-Bus"),
        (STUB, RESOLVED, MANAGER, False, "resolved:wifi", "systemd-resolved over D-Bus"),
        (STUB, None, None, False, "resolv.conf", "stub, because D-Bus does not say more"),
        (STUB, RESOLVED._replace(policy="DNSSEC=yes"), None, False, "resolv.conf", "because of DNSSEC=yes"),
        (PLAIN, RESOLVED._replace(mode="uplink"), None, False, "resolved:wifi", "over D-Bus"),
        (PLAIN, RESOLVED._replace(mode="foreign"), None, True, "resolved:wifi", "over D-Bus"),
        (PLAIN, RESOLVED._replace(mode="foreign"), None, False, "resolv.conf", "/etc/resolv.conf"),
        (PLAIN, None, None, True, "resolv.conf", "/etc/resolv.conf"),
        # A container's own resolv.conf, while it sees the host's bus.
        (OTHER, RESOLVED._replace(mode="foreign"), MANAGER, True, "resolv.conf", "/etc/resolv.conf"),
        (PLAIN, None, MANAGER, False, "networkmanager:wifi", "NetworkManager over D-Bus"),
        (PLAIN, None, MANAGER._replace(mode="dnsmasq"), False, "resolv.conf", "/etc/resolv.conf"),
        (PLAIN, None, MANAGER._replace(rc_manager="unmanaged"), False, "resolv.conf", "/etc/resolv.conf"),
        ("nameserver 127.0.0.1\n", None, MANAGER, False, "resolv.conf", "/etc/resolv.conf"),
        ("", None, MANAGER, False, "resolv.conf", "/etc/resolv.conf"),
    ),
)
def test_auto_takes_what_the_hosts_programs_would_ask(
    resolv: str, resolved: Resolved | None, manager: NetworkManager | None, nss: bool, expected: str, why: str
) -> None:
    scopes, reason = choose(parse_resolv_conf(resolv), "/etc/resolv.conf", resolved, manager, nss_resolve=nss)
    assert scopes[0].key == expected
    assert why in reason


def test_a_policy_without_a_stub_in_resolv_conf_leads_to_the_stub_all_the_same() -> None:
    resolved = RESOLVED._replace(mode="uplink", policy="DNSOverTLS=yes")
    scopes, _ = choose(parse_resolv_conf(PLAIN), "x", resolved, None, nss_resolve=False)
    assert scopes[0].servers == (Server("127.0.0.53"),)
    scopes, _ = choose(parse_resolv_conf(PLAIN), "x", resolved._replace(stub=False), None, nss_resolve=False)
    assert scopes[0].servers == (Server("192.0.2.1"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("hosts: files mymachines resolve [!UNAVAIL=return] dns\n", True),
        ("hosts: files dns resolve\n", False),
        ("hosts: files dns\n", False),
        ("hosts:\tfiles resolve\n", True),
        ("# hosts: resolve\npasswd: resolve\n", False),
        ("", False),
    ),
)
def test_nsswitch(text: str, expected: bool) -> None:
    assert asks_resolved(text) == expected


def servers(source: HostSource) -> list[str]:
    return [str(server) for scope in source.current() for server in scope.servers]


def test_what_the_settings_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(PLAIN)
    assert servers(HostSource("resolv.conf", path)) == ["192.0.2.1"]
    assert servers(HostSource("auto", path)) == ["192.0.2.1"]
    assert servers(HostSource("none", path)) == []
    assert servers(HostSource("stub", path)) == ["127.0.0.53"]


def test_a_named_source_that_says_nothing_leaves_resolv_conf_in_charge(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(PLAIN)
    for kind in ("resolved", "networkmanager", "scutil"):
        source = HostSource(kind, path)
        assert servers(source) == ["192.0.2.1"]
        assert "says nothing: not read yet" in source.why


async def test_another_resolv_conf_is_noticed(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(PLAIN)
    source = HostSource("resolv.conf", path)
    told: list[list[str]] = []
    nursery.start_soon(source.run, lambda: told.append(servers(source)))
    await trio.sleep(2)
    path.write_text(OTHER)
    await trio.sleep(2)
    assert told == [["198.51.100.1"]]
    nursery.cancel_scope.cancel()


async def test_a_source_that_fails_is_started_again_and_the_others_go_on(
    tmp_path: Path,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(PLAIN)
    source = HostSource("networkmanager", path)
    began: list[float] = []

    async def fail(self: object, changed: object) -> None:
        began.append(trio.current_time())
        await trio.sleep(1)
        raise ExceptionGroup("of trio", [KeyError("nobody thought of this")])

    monkeypatch.setattr("netstack.dns.source_networkmanager.NetworkManagerSource.run", fail)
    told: list[list[str]] = []
    nursery.start_soon(source.run, lambda: told.append(servers(source)))
    await trio.sleep(8)
    assert len(began) == 2
    assert "nobody thought of this" in source.failures["NetworkManager"]
    path.write_text(OTHER)
    await trio.sleep(2)
    assert told[-1] == ["198.51.100.1"]
    nursery.cancel_scope.cancel()
