"""Which source wins: for each scheme the first one that says anything."""

import pytest

from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer, merge
from netstack.proxy.routes import DIRECT, ProxyRouter
from netstack.proxy.settings import Credentials, PacSource, ProxyServer, parse_server
from netstack.proxy.source_environment import parse_environment

A, B, C = (parse_server(f"{name}.test:1") for name in "abc")
SOCKS = parse_server("socks5://s.test:1")
PAC = PacSource("http://pac.test/p.pac")


def env(**variables: str) -> Layer:
    return parse_environment(variables)


def test_a_variable_leaves_the_other_scheme_to_the_system() -> None:
    merged = merge([env(https_proxy="a.test:1"), Layer("GNOME", servers={"http": B, "https": B})])
    assert (merged.settings.http, merged.settings.https) == (B, A)
    assert merged.won == {"http": "GNOME", "https": "environment"}
    assert merged.settings.source == "GNOME, environment"


def test_all_proxy_replaces_what_stands_below() -> None:
    merged = merge([env(all_proxy="a.test:1"), Layer("GNOME", servers={"http": B, "https": B, "socks": SOCKS})])
    assert (merged.settings.http, merged.settings.https, merged.settings.all) == (A, A, A)


def test_a_set_and_empty_variable_means_none() -> None:
    merged = merge([env(http_proxy=""), Layer("GNOME", servers={"all": B})])
    assert (merged.settings.http, merged.settings.https) == (None, B)


def test_a_script_below_decides_what_nobody_above_does() -> None:
    merged = merge([env(http_proxy="a.test:1"), Layer("macOS", pac=PAC)])
    assert merged.settings.http == A
    assert merged.settings.pac == PAC
    assert merged.settings.pac_schemes == {"https", "tcp", "ftp"}


def test_exceptions_below_a_script_are_not_for_it() -> None:
    below = Layer("GNOME", servers={"http": B}, no_proxy=NoProxy(["x.test"]))
    assert not merge([Layer("settings", pac=PAC), below]).settings.no_proxy
    assert merge([env(no_proxy="y.test"), Layer("settings", pac=PAC), below]).settings.no_proxy.entries == ("y.test",)
    assert merge([env(http_proxy="a:1"), below]).settings.no_proxy.entries == ("x.test",)


def test_lower_case_wins_and_a_cgi_header_is_not_read() -> None:
    assert env(http_proxy="a.test:1", HTTP_PROXY="b.test:1").servers == {"http": A}
    assert env(HTTP_PROXY="b.test:1").servers == {"http": B}
    assert env(HTTP_PROXY="b.test:1", HTTPS_PROXY="b.test:1", REQUEST_METHOD="GET").servers == {"https": B}


def test_a_variable_that_cannot_be_read_is_told_without_its_value() -> None:
    layer = env(https_proxy="http://u:hunter2@p:99999", http_proxy="a.test:1")
    assert layer.servers == {"http": A}
    assert layer.problems == ("https_proxy has no port from 1 to 65535 after the colon",)


def test_the_environment_says_where_it_was_found() -> None:
    layer = env(HTTPS_PROXY="a:1", no_proxy="x", socks_proxy="s.test:1", FTP_PROXY="c.test:1")
    assert layer.why == "HTTPS_PROXY, FTP_PROXY, socks_proxy, no_proxy"
    assert layer.servers["socks"] == parse_server("socks5://s.test:1")
    odd = env(all_proxy="socks5://%C3%BCser:hunter2@s.test:1")
    assert odd.server_for("tcp") is not None
    assert "all_proxy has a letter in its user that is not ASCII" in odd.problems[0] and "hunter2" not in str(odd)


# ---- routes ----------------------------------------------------------------------------------------------------------


class Script:
    """A PAC script that always says the same."""

    def __init__(self, *routes: object) -> None:
        self.routes = routes
        self.asked: list[tuple[str, str]] = []

    async def find_proxy(self, source: PacSource, url: str, host: str) -> tuple[object, ...] | None:
        self.asked.append((url, host))
        return self.routes or None


def router(*layers: Layer, pac: object = None, now: list[float] | None = None) -> ProxyRouter:
    made = ProxyRouter(pac, clock=lambda: (now or [0.0])[0])  # type: ignore[arg-type]
    made.current = merge(layers).settings
    return made


async def test_without_settings_everything_is_direct() -> None:
    assert await router().choose("http", "x.test", 80, "http://x.test/") == (DIRECT,)
    assert not router().may_proxy("http")


@pytest.mark.parametrize("host", ("localhost", "127.3.4.5", "[::1]", "0.0.0.0"))
async def test_loopback_is_never_sent_to_a_proxy(host: str) -> None:
    assert await router(env(all_proxy="a:1")).choose("http", host, 80, f"http://{host}/") == (DIRECT,)


async def test_exceptions_hold_with_their_port() -> None:
    made = router(env(http_proxy="a.test:1", no_proxy="x.test:8080"))
    assert await made.choose("http", "x.test", 8080, "http://x.test:8080/") == (DIRECT,)
    assert await made.choose("http", "x.test", 80, "http://x.test/") == (A,)


async def test_a_vpn_has_proxies_for_its_own_names() -> None:
    vpn = Layer("macOS", servers={"http": B, "https": B})
    made = router(Layer("macOS", servers={"http": A}, domains=(("corp.test", vpn), ("deep.corp.test", Layer("macOS")))))
    assert await made.choose("https", "git.CORP.test.", 443, "") == (B,)
    assert await made.choose("https", "notcorp.test", 443, "") == (DIRECT,)
    assert await made.choose("http", "x.deep.corp.test", 80, "") == (DIRECT,)
    assert made.may_proxy("https")


async def test_a_script_is_told_no_more_of_https_than_the_host() -> None:
    script = Script(A, DIRECT)
    made = router(Layer("x", pac=PAC), pac=script)
    assert await made.choose("https", "x.test", 443, "https://u:p@x.test/secret?q") == (A, DIRECT)
    assert await made.choose("http", "x.test", 80, "http://u:p@x.test/path?q#f") == (A, DIRECT)
    assert await made.choose("https", "x.test", 443, "x.test:443") == (A, DIRECT)
    assert script.asked == [
        ("https://x.test/", "x.test"),
        ("http://x.test/path?q", "x.test"),
        ("https://x.test/", "x.test"),
    ]


async def test_a_script_that_fails_means_direct() -> None:
    assert await router(Layer("x", pac=PAC), pac=Script()).choose("http", "x.test", 80, "") == (DIRECT,)


async def test_a_proxy_that_failed_is_asked_last_for_a_while() -> None:
    now = [1000.0]
    made = router(Layer("x", pac=PAC), pac=Script(A, B, DIRECT), now=now)
    made.note_failure(A)
    assert await made.choose("http", "x.test", 80, "") == (B, DIRECT, A)
    assert made.describe()["failed"] == {"http://a.test:1": 0.0}
    now[0] += 301
    assert await made.choose("http", "x.test", 80, "") == (A, B, DIRECT)
    made.note_failure(B)
    made.note_success(B)
    assert await made.choose("http", "x.test", 80, "") == (A, B, DIRECT)


async def test_credentials_of_the_settings_go_with_a_proxy_that_was_named_without() -> None:
    made = router(env(http_proxy="a.test:1", https_proxy="u:p@b.test:1", all_proxy="c.test:1"))
    made.credentials = {
        "a.test:1": Credentials("me", "pw"),
        "b.test": Credentials("x", "y"),
        "c.test:2": Credentials("z", ""),
    }
    (found,) = await made.choose("http", "x.test", 80, "")
    assert isinstance(found, ProxyServer)
    assert (found.username, found.password) == ("me", "pw")
    (found,) = await made.choose("https", "x.test", 443, "")
    assert isinstance(found, ProxyServer)
    assert found.username == "u"
    assert await made.choose("tcp", "x.test", 22, "") == (C,)
