"""What guests are told: the variables, and each program's own form of them, read back by that program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.handout import (
    FORMATS,
    Handout,
    Network,
    common_exceptions,
    is_loopback_by,
    make_handout,
    own_exceptions,
    rewrite,
    write_pac,
)
from netstack.proxy.settings import ProxySettings, is_loopback, parse_server
from tests.proxy.test_pac_corpus import Engine

OWN = ("192.168.5.2", "192.168.5.3", "fd00:c0a8:5::2", "fd00:c0a8:5::3")
NETWORK = Network("192.168.5.2", "192.168.5.0/24", OWN, ("host.lima.internal", "netstack.internal"))
GUESTS = ("192.168.5.15", "fd00:c0a8:5::15")
OURS = (
    "localhost,127.0.0.1,::1,192.168.5.2,192.168.5.3,fd00:c0a8:5::2,fd00:c0a8:5::3,192.168.5.15,fd00:c0a8:5::15,"
    "192.168.5.0/24,host.lima.internal,.host.lima.internal,netstack.internal,.netstack.internal"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("http://127.0.0.1:8080", "http://192.168.5.2:8080"),
        ("127.0.0.1:8080", "http://192.168.5.2:8080"),
        ("localhost:8080", "http://192.168.5.2:8080"),
        ("http://LOCALHOST:8080", "http://192.168.5.2:8080"),
        ("http://localhost.:8080", "http://192.168.5.2:8080"),
        ("http://[::1]:8080", "http://192.168.5.2:8080"),
        ("http://127.5.5.5:8080", "http://192.168.5.2:8080"),
        ("http://0.0.0.0:8080", "http://192.168.5.2:8080"),
        ("http://127.1:8080", "http://192.168.5.2:8080"),
        ("http://myhost:8080/", "http://192.168.5.2:8080"),
        ("socks5h://u:p%40s@localhost:1080/", "socks5h://u:p%40s@192.168.5.2:1080"),
        ("http://localhost:8080/path?q=1", "http://192.168.5.2:8080/path?q=1"),
        ("http://proxy.example:8080", "http://proxy.example:8080"),
        ("http://10.0.0.1:8080", "http://10.0.0.1:8080"),
    ),
)
def test_every_form_of_loopback_becomes_the_gateway(text: str, expected: str) -> None:
    def is_local(host: str) -> bool:
        return is_loopback(host) or host == "myhost"

    assert rewrite(parse_server(text), "192.168.5.2", is_local).url(credentials=True) == expected


def test_names_are_loopback_by_all_of_their_addresses() -> None:
    assert is_loopback_by(["127.0.1.1"])
    assert is_loopback_by(["127.0.0.1", "::1"])
    assert not is_loopback_by(["127.0.1.1", "10.0.0.1"])
    assert not is_loopback_by([])


def test_the_gateways_proxy_is_told_whatever_the_host_has() -> None:
    for settings in (ProxySettings(), ProxySettings(http=parse_server("a:1"), no_proxy=NoProxy(["x.test"]))):
        variables = make_handout("gateway", settings, NETWORK, GUESTS).variables()
        own = "http://192.168.5.2:3128"
        assert variables == {"http_proxy": own, "https_proxy": own, "all_proxy": own, "no_proxy": OURS}


def test_the_hosts_own_proxies_are_told_literally() -> None:
    settings = ProxySettings(
        http=parse_server("http://u:pw@127.0.0.1:8080"),
        https=parse_server("https://tls.example"),
        all=parse_server("socks5://localhost"),
        ftp=parse_server("ftp.example:2"),
        no_proxy=NoProxy.parse(
            "corp.example,*.star.example,.dot.example,10.0.0.0/8,10.1.2.3,[fd00::1],fd00::/8,<local>"
        ),
    )
    told = make_handout("literal", settings, NETWORK, GUESTS)
    assert told.proxies == {
        "http_proxy": "http://192.168.5.2:8080",
        "https_proxy": "https://tls.example:443",
        "ftp_proxy": "http://ftp.example:2",
        "all_proxy": "socks5://192.168.5.2:1080",
    }
    assert ",".join(told.no_proxy) == OURS + (
        ",corp.example,.corp.example,.star.example,dot.example,.dot.example,10.0.0.0/8,10.1.2.3,fd00::1"
    )
    shared = make_handout("literal", settings, NETWORK, GUESTS, credentials=True)
    assert shared.proxies["http_proxy"] == "http://u:pw@192.168.5.2:8080"


def test_what_variables_cannot_say_is_the_gateways_proxy() -> None:
    settings = ProxySettings(http=parse_server("a:1"), pac_schemes=frozenset(("https", "tcp", "ftp")))
    told = make_handout("literal", settings, NETWORK)
    own = "http://192.168.5.2:3128"
    assert told.proxies == {"http_proxy": "http://a:1", "https_proxy": own, "all_proxy": own}


def test_nothing_is_told_where_nothing_goes_to_a_proxy() -> None:
    everything = ProxySettings(http=parse_server("a:1"), no_proxy=NoProxy(["*"]))
    for told in (
        make_handout("none", everything, NETWORK),
        make_handout("literal", everything, NETWORK),
        make_handout("literal", ProxySettings(), NETWORK),
    ):
        assert told.variables() == {}
        assert FORMATS["shell"](told) == ""


def test_exceptions_are_written_as_all_programs_read_them() -> None:
    written = common_exceptions(NoProxy.parse("a.test:8080, *.b.test, <-loopback>, fd00::/8, *, we!rd, 10.0.0.9/8"))
    assert written == ["a.test:8080", ".a.test:8080", ".b.test", "10.0.0.0/8"]
    entries = own_exceptions(NETWORK, [f"10.0.0.{n}" for n in range(200)])
    assert len(entries) < 64
    assert not any(set(entry) & set(" *[]") for entry in entries)


# ---- formats, read back ----------------------------------------------------------------------------------------------

LITERAL = make_handout(
    "literal", ProxySettings(http=parse_server("http://us%er:p$w'd\"@h:1")), NETWORK, GUESTS, credentials=True
)
URL = "http://us%25er:p%24w%27d%22@h:1"


def test_a_shell_reads_it(tmp_path: Path) -> None:
    (tmp_path / "proxy.env").write_text(FORMATS["shell"](LITERAL))
    done = subprocess.run(
        ["/bin/sh", "-c", f". {tmp_path}/proxy.env; env"], capture_output=True, text=True, check=True, env={}
    )
    lines = done.stdout.splitlines()
    for name in ("http_proxy", "HTTP_PROXY"):
        assert f"{name}={URL}" in lines
    assert f"no_proxy={OURS}" in lines
    assert f"NO_PROXY={OURS}" in lines


@pytest.mark.needs("apt-config")
def test_apt_reads_it(tmp_path: Path) -> None:
    told = make_handout("gateway", ProxySettings(), NETWORK)
    (tmp_path / "apt.conf").write_text(FORMATS["apt"](told))
    done = subprocess.run(
        ["apt-config", "dump"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")},
    )
    assert 'Acquire::http::Proxy "http://192.168.5.2:3128";' in done.stdout
    assert 'Acquire::https::Proxy "http://192.168.5.2:3128";' in done.stdout
    assert 'Acquire::http::Proxy::host.lima.internal "DIRECT";' in done.stdout


def test_systemd_reads_it(tmp_path: Path) -> None:
    for form, section in (("systemd", "[Manager]"), ("containerd", "[Service]")):
        text = FORMATS[form](LITERAL)
        assert text.startswith(section + "\n")
        # % is systemd's, so that it is doubled; a quotation mark was percent-encoded already.
        assert f'"http_proxy={URL.replace("%", "%%")}"' in text
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "t.service"
        unit.write_text(f"{FORMATS['containerd'](LITERAL)}Type=oneshot\nExecStart=/bin/true\n")
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        assert "Invalid environment" not in done.stderr
        assert "Failed to" not in done.stderr.replace("Failed to create", "")


def test_programs_that_take_json_read_it() -> None:
    told = make_handout("gateway", ProxySettings(), NETWORK, GUESTS)
    own = "http://192.168.5.2:3128"
    default = {"httpProxy": own, "httpsProxy": own, "allProxy": own, "noProxy": OURS}
    assert json.loads(FORMATS["docker"](told)) == {"proxies": {"default": default}}
    daemon = {"http-proxy": own, "https-proxy": own, "no-proxy": OURS}
    assert json.loads(FORMATS["docker-daemon"](told)) == {"proxies": daemon}
    plain = json.loads(FORMATS["json"](told))
    assert (plain["http_proxy"], plain["NO_PROXY"]) == (own, OURS)
    assert json.loads(FORMATS["docker"](Handout())) == {"proxies": {}}


def test_cloud_init_reads_it() -> None:
    text = FORMATS["cloud-init"](LITERAL)
    lines = text.splitlines()
    assert lines[:2] == ["#cloud-config", "write_files:"]
    paths = [line.split(": ", 1)[1] for line in lines if line.startswith("  - path: ")]
    assert paths == [
        "/etc/profile.d/netstack-proxy.sh",
        "/etc/systemd/system.conf.d/netstack-proxy.conf",
        "/etc/apt/apt.conf.d/90netstack-proxy",
    ]
    assert all(line.startswith(("  - path: ", "    content: |", "      ")) for line in lines[2:])
    assert FORMATS["cloud-init"](Handout()).startswith("#cloud-config\n")


def test_env_files_have_neither_export_nor_quotes() -> None:
    lines = FORMATS["env"](make_handout("gateway", ProxySettings(), NETWORK)).splitlines()
    assert lines[0] == "http_proxy=http://192.168.5.2:3128"
    assert all("'" not in line and '"' not in line and not line.startswith("export") for line in lines)


# ---- wpad.dat --------------------------------------------------------------------------------------------------------


def test_wpad_dat_is_a_script_that_engines_run() -> None:
    settings = ProxySettings(
        http=parse_server("a.example:1"),
        https=parse_server("https://b.example"),
        all=parse_server("socks5://c.example"),
        no_proxy=NoProxy.parse("corp.example,10.0.0.0/8"),
    )
    script = write_pac(make_handout("literal", settings, NETWORK, GUESTS))
    engine = Engine()
    try:
        for url, host, expected in (
            ("http://x.test/", "x.test", "PROXY a.example:1"),
            ("https://x.test/", "x.test", "HTTPS b.example:443"),
            ("ftp://x.test/", "x.test", "SOCKS5 c.example:1080"),
            ("http://git.corp.example/", "git.corp.example", "DIRECT"),
            ("http://CORP.example/", "CORP.example", "DIRECT"),
            ("http://notcorp.example/", "notcorp.example", "PROXY a.example:1"),
            ("http://10.9.8.7/", "10.9.8.7", "DIRECT"),
            ("http://11.9.8.7/", "11.9.8.7", "PROXY a.example:1"),
            ("http://192.168.5.2/", "192.168.5.2", "DIRECT"),
            ("http://[fd00:c0a8:5::2]/", "fd00:c0a8:5::2", "DIRECT"),
            ("http://host.lima.internal/", "host.lima.internal", "DIRECT"),
            ("http://vm.netstack.internal/", "vm.netstack.internal", "DIRECT"),
            ("http://intranet/", "intranet", "DIRECT"),
            ("http://127.0.0.1/", "127.0.0.1", "DIRECT"),
        ):
            assert engine.answer(script, url, host) == {"result": expected}, url
        assert engine.answer(write_pac(Handout())) == {"result": "DIRECT"}
    finally:
        engine.close()
