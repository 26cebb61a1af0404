"""The host's proxy settings in a network that runs: what counts, what is told, and what a reload changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

import netstack
from netstack.proxy.routes import DIRECT
from netstack.proxy.settings import ProxyServer, parse_server

SCRIPT = 'function FindProxyForURL(url, host) { return host == "a.test" ? "PROXY pac:1" : "DIRECT"; }'


def settings(tmp_path: Path, **proxy: Any) -> netstack.Config:
    dns = {"source": "none", "hosts_file": tmp_path / "hosts", "mdns": False}
    table = {"sources": ["settings"], **proxy}
    return netstack.Config(network={"subnet": "10.98.9.0/24"}, dns=dns, proxy=table)


async def test_a_reload_changes_the_way_of_the_next_request(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path)) as network:
        router = network.proxy.router
        assert await router.choose("http", "x.test", 80, "http://x.test/") == (DIRECT,)
        assert network.reload(settings(tmp_path, http="a:1", credentials={"a:1": "me:pw"})) == []
        (found,) = await router.choose("http", "x.test", 80, "http://x.test/")
        assert isinstance(found, ProxyServer)
        assert (found.authority, found.username) == ("a:1", "me")
        assert network.reload(settings(tmp_path, http="a:1", no_proxy="x.test")) == []
        assert await router.choose("http", "x.test", 80, "http://x.test/") == (DIRECT,)
        assert network.reload(settings(tmp_path, http_port=3129)) == ["proxy.http_port"]
        assert ":3128" in network.proxy.env("shell")


async def test_a_script_in_the_settings_is_run_and_ends_with_the_network(tmp_path: Path) -> None:
    (tmp_path / "p.pac").write_text(SCRIPT)
    async with netstack.open_network(settings(tmp_path, pac=str(tmp_path / "p.pac"))) as network:
        router = network.proxy.router
        assert await router.choose("http", "a.test", 80, "http://a.test/") == (parse_server("pac:1"),)
        assert await router.choose("tcp", "b.test", 22, "") == (DIRECT,)
        assert network.proxy.describe()["pac"]["pac_evaluations"] == 2
        runner = network.proxy.runner
        assert runner.workers >= 1
    assert runner.workers == 0


@pytest.mark.parametrize(
    "host", ("127.1", "0.0.0.0", "::", "::127.0.0.1", "::ffff:0:1", "0.1.2.3", "224.0.0.1", "ff02::1", "fe80::1")
)
async def test_where_a_guest_may_not_go_no_proxy_goes_for_it(tmp_path: Path, host: str) -> None:
    async with netstack.open_network(settings(tmp_path, all="127.0.0.1:1")) as network:
        router = network.proxy.router
        assert await router.choose("http", host, 80, "http://x/") == (DIRECT,)  # which is refused when it is dialled


@pytest.mark.parametrize(
    "host",
    ("10.98.9.2", "10.98.9.77", "fd00:a62:9::2", "host.docker.internal", "HOST.lima.internal.", "vm.netstack.internal"),
)
async def test_the_gateway_guests_and_their_names_never_go_to_a_proxy(tmp_path: Path, host: str) -> None:
    async with netstack.open_network(settings(tmp_path, all="a:1")) as network:
        assert await network.proxy.router.choose("http", host, 80, f"http://{host}/") == (DIRECT,)


async def test_a_proxy_that_is_the_gateways_own_is_left_out(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path, http="http://10.98.9.2:3128", https="b:1")) as network:
        assert network.proxy.router.current.http is None
        assert network.proxy.router.current.https == parse_server("b:1")
        assert "the gateway's own proxy" in network.proxy.describe()["problems"][0]


async def test_turned_off_it_reads_and_tells_nothing(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path, enabled=False, http="a:1")) as network:
        assert not network.proxy.router.may_proxy("http")
        assert network.proxy.env("shell") == ""
        assert network.services.dhcp.wpad == ""
        assert network.guest_http.is_ours(b"GET /proxy.env HTTP/1.1\r\n") is False


async def test_guests_are_told_no_more_when_the_settings_say_so(tmp_path: Path) -> None:
    async with netstack.open_network(settings(tmp_path)) as network:
        assert network.services.dhcp.wpad == "http://10.98.9.2/wpad.dat"
        assert network.guest_http.is_ours(b"GET /proxy.env HTTP/1.1\r\n") is True
        assert network.reload(settings(tmp_path, announce=False)) == []
        assert network.services.dhcp.wpad == ""
        assert network.reload(settings(tmp_path, guests="none")) == []
        assert network.guest_http.is_ours(b"GET /proxy.env HTTP/1.1\r\n") is False
        assert network.reload(settings(tmp_path)) == []
        assert network.guest_http.is_ours(b"GET /wpad.dat HTTP/1.1\r\n") is True
        with pytest.raises(ValueError, match="take one of shell, env"):
            network.proxy.env("nonsense")


async def test_the_variables_of_netstack_itself_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:hunter2@env.test:1")
    monkeypatch.setenv("no_proxy", "corp.test")
    config = settings(tmp_path, sources=["settings", "environment"], http="set.test:1")
    async with netstack.open_network(config) as network:
        described = network.proxy.describe()
        assert described["won"] == {"http": "settings", "https": "environment", "no_proxy": "environment"}
        assert described["effective"]["https"] == "http://***@env.test:1"
        assert "hunter2" not in str(described)
        assert await network.proxy.router.choose("https", "git.corp.test", 443, "") == (DIRECT,)
        await trio.lowlevel.checkpoint()
