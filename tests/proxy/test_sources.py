"""What systems say about proxies: recorded outputs, odd ones, and the watchers on files and programs that change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netstack.proxy.follower import ProxyFollower
from netstack.proxy.layers import Layer, merge
from netstack.proxy.settings import PacSource, ProxySettings, parse_server
from netstack.proxy.source_gnome import parse_gsettings
from netstack.proxy.source_kde import kioslaverc_paths, parse_kioslaverc
from netstack.proxy.source_scutil import parse_scutil_proxy, translate_exception
from netstack.proxy.source_settings import settings_layer
from netstack.proxy.sources import (
    EnvironmentSource,
    FixedSource,
    GsettingsSource,
    KioslaveSource,
    ScutilSource,
    Source,
    system_sources,
)
from netstack.proxy.wpad import dns_urls, parse_nmcli

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def shown(layer: Layer) -> dict[str, str]:
    return {key: server.url() if server else "direct" for key, server in layer.servers.items()}


# ---- macOS -----------------------------------------------------------------------------------------------------------


def test_macos_proxies_and_their_exceptions() -> None:
    layer = parse_scutil_proxy(recorded("scutil_manual.txt"))
    assert shown(layer) == {"http": "http://127.0.0.1:8080", "https": "http://proxy.corp.example:443"}
    assert layer.no_proxy is not None
    entries = ("*.local", "169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "intranet.example", "<local>")
    assert layer.no_proxy.entries == entries
    assert layer.pac is None
    assert layer.problems == (
        "HTTPSProxy wants a user whose password is in the keychain; name both in [proxy.credentials]",
    )


def test_a_macos_script_stands_before_proxies_and_exceptions() -> None:
    layer = parse_scutil_proxy(recorded("scutil_pac.txt"))
    assert layer.pac == PacSource("http://wpad.corp.example/proxy.pac")
    assert (layer.servers, layer.no_proxy) == ({}, None)


def test_a_macos_script_of_several_lines_is_whole() -> None:
    layer = parse_scutil_proxy(recorded("scutil_script.txt"))
    assert layer.pac is not None
    lines = layer.pac.script.splitlines()
    assert lines[0] == "function FindProxyForURL(url, host) {"
    assert lines[1] == "  var direct = true ? 1 : 2;"
    assert lines[-1] == "}"
    last = recorded("scutil_script.txt").replace("  SOCKSEnable : 0\n", "")
    assert parse_scutil_proxy(last).pac == layer.pac


def test_proxies_of_a_macos_vpn_are_for_its_domain() -> None:
    layer = parse_scutil_proxy("scutil debug words\n" + recorded("scutil_vpn.txt"))
    assert shown(layer) == {"http": "http://[fd00::9]:3128"}
    domains = dict(layer.domains)
    assert shown(domains["corp.example"]) == {"http": "http://10.8.0.5:3128"}
    assert domains["lab.example"].pac == PacSource("http://10.8.0.5/p.pac")
    settings = merge([layer]).settings
    assert settings.http == parse_server("[fd00::9]:3128")
    assert dict(settings.domains)["lab.example"].pac_schemes == {"http", "https", "tcp", "ftp"}


@pytest.mark.parametrize(
    "text", ("", "No proxy configuration available\n", "<dictionary> {\n}\n", "<dictionary> {", "}\n}\n")
)
def test_macos_without_proxies(text: str) -> None:
    assert not parse_scutil_proxy(text).says_something


def test_macos_discovery() -> None:
    layer = parse_scutil_proxy("<dictionary> {\n  ProxyAutoDiscoveryEnable : 1\n}\n")
    assert layer.pac == PacSource(discover=True)


@pytest.mark.parametrize(
    ("entry", "expected"),
    (
        ("169.254/16", "169.254.0.0/16"),
        ("10/8", "10.0.0.0/8"),
        ("10.*", "10.0.0.0/8"),
        ("192.168.*.*", "192.168.0.0/16"),
        ("10.1.2.3", "10.1.2.3"),
        ("*.local", "*.local"),
    ),
)
def test_short_forms_of_networks(entry: str, expected: str) -> None:
    assert translate_exception(entry) == expected


@given(st.text(alphabet=" {}<>:\n0123ayHTPEnbleroxU_[]", max_size=400))
def test_no_output_of_a_program_raises(text: str) -> None:
    for form in (text, "<dictionary> {\n" + text, recorded("scutil_vpn.txt")[: len(text)] + text):
        parse_scutil_proxy(form)
    for form in (text, "org.gnome.system.proxy " + text, recorded("gsettings_manual.txt")[: len(text) * 3] + text):
        parse_gsettings(form)
    parse_kioslaverc(["[Proxy Settings]\nProxyType=1\nhttpProxy=" + text], {})
    parse_nmcli(text)


# ---- desktops --------------------------------------------------------------------------------------------------------


def test_gnome_proxies() -> None:
    layer = parse_gsettings(recorded("gsettings_manual.txt"))
    assert shown(layer) == {
        "http": "http://proxy.example:8080",
        "https": "http://tls.example:8443",
        "socks": "socks5://[fd00::5]:1080",
    }
    server = layer.servers["http"]
    assert server is not None
    assert (server.username, server.password) == ("me", "p@ss:word")
    assert layer.no_proxy is not None
    assert layer.no_proxy.entries == ("localhost", "127.0.0.0/8", "::1", "it's.example")
    assert layer.pac is None


def test_gnome_modes() -> None:
    text = recorded("gsettings_manual.txt")
    auto = parse_gsettings(text.replace("'manual'", "'auto'"))
    assert auto.pac == PacSource("http://ignored.example/p.pac")
    assert (auto.servers, auto.no_proxy) == ({}, None)
    wpad = parse_gsettings("org.gnome.system.proxy mode 'auto'\norg.gnome.system.proxy autoconfig-url ''\n")
    assert wpad.pac == PacSource(discover=True)
    assert not parse_gsettings(text.replace("'manual'", "'none'")).says_something
    assert not parse_gsettings("org.gnome.system.proxy ignore-hosts @as []\n").says_something


KDE = """[Other]
httpProxy=http://not.this:1
[Proxy Settings][$i]
[Proxy Settings]
NoProxyFor=localhost,.example
ProxyType=1
ReversedException=false
ftpProxy=
httpProxy[$e]=http://proxy.example 8080
httpsProxy=http://tls.example:8443
socksProxy=socks://127.0.0.1 1080
"""


def test_kde_proxies() -> None:
    layer = parse_kioslaverc([KDE], {})
    assert shown(layer) == {
        "http": "http://proxy.example:8080",
        "https": "http://tls.example:8443",
        "socks": "socks5://127.0.0.1:1080",
    }
    assert layer.no_proxy is not None
    assert layer.no_proxy.entries == ("localhost", ".example")


def test_kde_types() -> None:
    head = (
        "[Proxy Settings]\nProxy Config Script=http://p.example/p.pac\nhttpProxy=MY_PROXY\nNoProxyFor=MY_NO\nProxyType="
    )
    assert not parse_kioslaverc([head + "0"], {}).says_something
    assert parse_kioslaverc([head + "2"], {}).pac == PacSource("http://p.example/p.pac")
    assert parse_kioslaverc([head + "3"], {}).pac == PacSource(discover=True)
    layer = parse_kioslaverc([head + "4"], {"MY_PROXY": "http://env.example:1", "MY_NO": "x.example"})
    assert shown(layer) == {"http": "http://env.example:1"}
    assert layer.no_proxy is not None
    assert layer.no_proxy.entries == ("x.example",)


def test_kde_exceptions_the_other_way_round() -> None:
    layer = parse_kioslaverc([KDE.replace("=false", "=true").replace("localhost,", "only.test,")], {})
    assert layer.servers == {}
    assert [domain for domain, _ in layer.domains] == ["only.test", "example"]
    assert merge([layer]).settings.domains[0][1].http == parse_server("http://proxy.example:8080")


def test_kde_files_of_the_system_stand_below() -> None:
    layer = parse_kioslaverc(["[Proxy Settings]\nhttpProxy=http://mine.example:1\n", KDE], {})
    assert shown(layer)["http"] == "http://mine.example:1"
    assert shown(layer)["https"] == "http://tls.example:8443"
    paths = kioslaverc_paths({"XDG_CONFIG_DIRS": "/a:/b:relative"}, Path("/home/me"))
    assert [str(path) for path in paths] == ["/home/me/.config/kioslaverc", "/a/kioslaverc", "/b/kioslaverc"]


def test_which_sources_a_system_has() -> None:
    assert [source.name for source in system_sources({}, "darwin")] == ["macOS"]
    assert [source.name for source in system_sources({"HOME": "/nowhere"}, "linux")] == ["GNOME", "KDE"]
    kde = {"HOME": "/nowhere", "XDG_CURRENT_DESKTOP": "KDE"}
    assert [source.name for source in system_sources(kde, "linux")] == ["KDE", "GNOME"]


def test_settings_are_a_source() -> None:
    layer = settings_layer({"http": None, "all": parse_server("a:1")}, ("x.test",))
    assert merge([layer]).settings.all == parse_server("a:1")
    assert merge([layer]).settings.http is None
    assert settings_layer({}, discover=True).pac == PacSource(discover=True)
    assert settings_layer({}, pac="/p.pac", discover=True).pac == PacSource("/p.pac")
    assert not settings_layer({}).says_something


# ---- watching --------------------------------------------------------------------------------------------------------


async def follow(nursery: trio.Nursery, *sources: Source) -> ProxyFollower:
    follower = ProxyFollower(sources)
    nursery.start_soon(follower.run)
    return follower


async def wait_for(follower: ProxyFollower, wanted: str | None) -> None:
    """Until http goes to `wanted`."""
    with trio.fail_after(10):
        while (found := follower.settings.http) is None or found.url() != wanted:
            if wanted is None and found is None:
                return
            await trio.sleep(0.02)


async def test_kde_is_followed(nursery: trio.Nursery, tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "none")}
    file = tmp_path / "kioslaverc"
    follower = await follow(nursery, KioslaveSource(environment, Path("/nowhere")))
    changes: list[tuple[ProxySettings, ProxySettings]] = []
    follower.subscribe(lambda was, now: changes.append((was, now)))
    assert follower.settings.http is None
    file.write_text(KDE)
    await wait_for(follower, "http://proxy.example:8080")
    (tmp_path / "new").write_text(KDE.replace("proxy.example", "other.example"))
    (tmp_path / "new").replace(file)
    await wait_for(follower, "http://other.example:8080")
    file.unlink()
    await wait_for(follower, None)
    assert len(changes) == 3


@pytest.mark.needs("gsettings")
async def test_gnome_is_followed_by_its_own_program(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The schema itself, so that it need not be installed, and settings in a file of this test's.
    schemas = tmp_path / "schemas"
    schemas.mkdir()
    keys = "".join(f'<key name="{name}" type="s"><default>""</default></key>' for name in ("host",))
    port = '<key name="port" type="i"><default>0</default></key>'
    http = f'<schema id="org.gnome.system.proxy.http" path="/system/proxy/http/">{keys}{port}</schema>'
    main = (
        '<schema id="org.gnome.system.proxy" path="/system/proxy/"><child name="http" '
        'schema="org.gnome.system.proxy.http"/><key name="mode" type="s"><default>"none"</default></key>'
        '<key name="ignore-hosts" type="as"><default>["localhost"]</default></key></schema>'
    )
    (schemas / "org.gnome.system.proxy.gschema.xml").write_text(f"<schemalist>{main}{http}</schemalist>")
    compiler = shutil.which("glib-compile-schemas") or "/usr/lib/x86_64-linux-gnu/glib-2.0/glib-compile-schemas"
    await trio.run_process([compiler, schemas])
    monkeypatch.setenv("GSETTINGS_SCHEMA_DIR", str(schemas))
    monkeypatch.setenv("GSETTINGS_BACKEND", "keyfile")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    async def write(schema: str, key: str, value: str) -> None:
        await trio.run_process(["gsettings", "set", schema, key, value])

    await write("org.gnome.system.proxy", "mode", "manual")
    await write("org.gnome.system.proxy.http", "host", "gnome.example")
    await write("org.gnome.system.proxy.http", "port", "8080")
    # The keyfile backend's file stands in for dconf's database, which it takes a session bus to write.
    databases = tmp_path / "glib-2.0" / "settings"
    source = GsettingsSource({"XDG_CONFIG_HOME": str(tmp_path / "none")}, Path("/nowhere"), databases=databases)
    follower = await follow(nursery, source)
    await wait_for(follower, "http://gnome.example:8080")
    assert follower.settings.no_proxy.entries == ("localhost",)
    await write("org.gnome.system.proxy.http", "host", "other.example")
    await wait_for(follower, "http://other.example:8080")


async def test_a_program_that_is_missing_says_nothing(nursery: trio.Nursery) -> None:
    source = GsettingsSource({"XDG_CURRENT_DESKTOP": "GNOME"}, Path("/nowhere"), command=["/nowhere/gsettings"])
    follower = await follow(nursery, source)
    with trio.fail_after(10):
        while True:
            if source.current().why == "/nowhere/gsettings has no answer":
                break
            await trio.sleep(0.01)
    assert not follower.layers[0].says_something


async def test_macos_is_followed_by_a_scutil_that_watches(nursery: trio.Nursery, tmp_path: Path) -> None:
    # A stand-in: prints a file for `-d --proxy`; without arguments it says something whenever the file is another one.
    file, program = tmp_path / "now.txt", tmp_path / "scutil"
    shutil.copy(RECORDED / "scutil_manual.txt", file)
    program.write_text(
        f"""#!/bin/sh
if [ $# -gt 0 ]; then cat {file}; exit; fi
read add; read watch
was=$(cat {file})
while sleep 0.1; do
    now=$(cat {file})
    [ "$now" = "$was" ] || echo "notification: State:/Network/Global/Proxies"
    was=$now
done
"""
    )
    program.chmod(0o755)
    follower = await follow(nursery, ScutilSource([str(program), "-d", "--proxy"]))
    await wait_for(follower, "http://127.0.0.1:8080")
    shutil.copy(RECORDED / "scutil_vpn.txt", tmp_path / "new")
    (tmp_path / "new").replace(file)
    await wait_for(follower, "http://[fd00::9]:3128")


async def test_other_settings_hold_at_once(nursery: trio.Nursery) -> None:
    follower = await follow(nursery, EnvironmentSource({"http_proxy": "env:1"}))
    assert follower.settings.http == parse_server("env:1")
    follower.set_sources([FixedSource(settings_layer({"http": parse_server("set:1")})), EnvironmentSource({})])
    assert follower.settings.http == parse_server("set:1")
    described = follower.describe()
    assert described["won"] == {"http": "settings"}
    assert [source["name"] for source in described["sources"]] == ["settings", "environment"]


async def test_a_source_with_a_bug_does_not_stop_the_others(nursery: trio.Nursery, tmp_path: Path) -> None:
    class Broken(FixedSource):
        async def run(self, changed: object) -> None:
            raise RuntimeError("a bug")

    told: list[Exception] = []
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""}
    follower = ProxyFollower([Broken(Layer("x")), KioslaveSource(environment, Path("/nowhere"))], told.append)
    nursery.start_soon(follower.run)
    (tmp_path / "kioslaverc").write_text(KDE)
    await wait_for(follower, "http://proxy.example:8080")
    assert [str(error) for error in told] == ["a bug"]


# ---- WPAD ------------------------------------------------------------------------------------------------------------


def test_wpad_asks_the_search_domains_and_nothing_above_them() -> None:
    assert dns_urls(["A.corp.example.", "a.corp.example", "local", "co.uk", "-bad.example", ""]) == [
        "http://wpad.a.corp.example/wpad.dat",
        "http://wpad.co.uk/wpad.dat",
    ]


def test_networkmanager_tells_of_option_252() -> None:
    text = "DHCP4.OPTION[3]:ip_address = 10.0.0.5\nDHCP4.OPTION[7]:wpad = http\\://wpad.example/wpad.dat\n"
    assert parse_nmcli(text) == "http://wpad.example/wpad.dat"
    assert parse_nmcli("DHCP4.OPTION[1]:wpad = ftp://x\n") is None
    assert parse_nmcli("") is None
