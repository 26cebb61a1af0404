"""Proxies as texts and values: every form is read, and no form of them shows a password."""

import pickle
import traceback

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstack.config import Config, ConfigError
from netstack.proxy.exceptions import NoProxy
from netstack.proxy.layers import Layer, merge
from netstack.proxy.pac_script import parse_result
from netstack.proxy.settings import (
    PacSource,
    ProxyServer,
    ProxySettings,
    ProxySyntaxError,
    is_loopback,
    parse_server,
    redact_url,
)

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("localhost:8080", "http://localhost:8080"),
        ("LOCALHOST:8080", "http://localhost:8080"),
        ("proxy", "http://proxy:80"),
        ("https://proxy.test", "https://proxy.test:443"),
        ("socks5h://u:p%40s@localhost:1080/", "socks5h://u:p%40s@localhost:1080"),
        ("socks://s", "socks5://s:1080"),
        ("socks4a://s:9", "socks4://s:9"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("[fd00::1]", "http://[fd00::1]:80"),
        ("fd00::1", "http://[fd00::1]:80"),
        ("http://u:a/b#c@proxy.test:1", "http://u:a%2Fb%23c@proxy.test:1"),
        ("http://user@proxy.test:1", "http://user@proxy.test:1"),
        ("http://proxy.test:8080/path?q=1", "http://proxy.test:8080/path?q=1"),
        ("HTTP://Proxy.TEST:8080", "http://proxy.test:8080"),
        ("http://bücher.test:1", "http://xn--bcher-kva.test:1"),
        ("http://my_proxy.test:1", "http://my_proxy.test:1"),
    ),
)
def test_every_form_of_a_proxy_is_read(text: str, expected: str) -> None:
    assert parse_server(text).url(credentials=True) == expected


@pytest.mark.parametrize(
    "text",
    (
        "",
        " ",
        "ftp://proxy.test:21",
        f"http://u:{SECRET}@proxy.test:99999",
        f"http://u:{SECRET}@proxy.test:0",
        f"http://u:{SECRET}@",
        f"http://u:{SECRET}@pro xy:1",
        f"http://u:{SECRET}%0d%0aX: y@proxy.test:1",
        f"http://u:{SECRET}@[::zz]:1",
        f"gopher://u:{SECRET}@proxy.test",
        "http://-proxy.test:1",
        "http://" + "a" * 3000,
    ),
)
def test_what_is_no_proxy_is_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(ProxySyntaxError) as caught:
        parse_server(text)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_form_of_a_value_shows_a_password() -> None:
    server = parse_server(f"http://me:{SECRET}@proxy.test:8080")
    assert server.password == SECRET
    pac = PacSource(f"http://me:{SECRET}@pac.test/p.pac?token={SECRET}")
    settings = ProxySettings(http=server, all=server, pac=pac, domains=(("x", ProxySettings(https=server)),))
    merged = merge([Layer("environment", "", {"http": server}, pac=pac)])
    values = (server, settings, merged, Layer("a", servers={"http": server}).describe(), [server], {server: 1}, pac)
    for value in values:
        assert SECRET not in f"{value} {value!r}"
    assert str(server) == "http://***@proxy.test:8080"
    assert SECRET not in server.url()
    assert SECRET in server.url(credentials=True)
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError(server)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert pickle.loads(pickle.dumps(server)) == server


def test_the_configuration_shows_no_password() -> None:
    config = Config(proxy={"http": f"http://u:{SECRET}@p:1", "credentials": {"p:8080": f"u:{SECRET}"}})
    assert SECRET not in repr(config)
    assert SECRET not in str(config.proxy.model_dump())
    found = config.proxy.servers()["http"]
    assert isinstance(found, ProxyServer)
    assert found.password == SECRET


@pytest.mark.parametrize(
    ("table", "words"),
    (
        ({"http": f"ftp://u:{SECRET}@p"}, "proxy.http: has a scheme"),
        ({"https": f"http://u:{SECRET}@p:99999"}, "proxy.https: has no port"),
        ({"credentials": {"p": SECRET}}, 'proxy.credentials.p: must be "user:password"'),
        ({"pac": f"ftp://{SECRET}"}, "proxy.pac: must be a URL"),
        ({"pac": "/p.pac", "http": "p:1"}, "proxy.pac: a script decides for all requests"),
        ({"all": f"socks5h://ü:{SECRET}@p"}, "proxy.all: has a letter in its user that is not ASCII"),
        ({"socks": f"u:{SECRET}é@p"}, "proxy.socks: has a letter in its password that is not ASCII"),
        ({"http": f"socks5://u:{SECRET * 40}@p"}, "proxy.http: has a password of more than 255 characters"),
        ({"http_port": 80}, "proxy.http_port: 80 serves something else"),
        ({"http_port": 1080}, "proxy.socks_port: 1080 is proxy.http_port already"),
        ({"sources": ["elsewhere"]}, "proxy.sources[1]: elsewhere must be"),
        ({"htp": "x"}, "unknown key 'htp' in proxy; did you mean http?"),
    ),
)
def test_a_wrong_setting_is_named_and_not_quoted(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(proxy=table)
    assert str(caught.value).startswith(words)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_it"),
    (
        ("127.0.0.1", True),
        ("127.5.5.5", True),
        ("127.1", True),
        ("0x7f.0.0.1", True),
        ("2130706433", True),
        ("017700000001", True),
        ("0.0.0.0", True),
        ("0", True),
        ("::", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        ("app.localhost", True),
        ("10.0.0.1", False),
        ("128.0.0.1", False),
        ("localhost.test", False),
        ("notlocalhost", False),
        ("fd00::1", False),
        ("256.1", False),
        ("", False),
    ),
)
def test_every_form_of_loopback(host: str, is_it: bool) -> None:
    assert is_loopback(host) == is_it


def test_urls_are_shown_without_what_may_be_secret() -> None:
    assert redact_url("https://u:p@h.test:1/a/b.pac?token=x#y") == "https://h.test:1/a/b.pac"
    assert redact_url("data:text/plain,secret") == "data:..."
    for text in ("http://u:a/hunter2@h.test/p", "u:hunter2@h.test/p", "//u:hunter2@h.test/p", "http:/u:hunter2@h.test"):
        assert "hunter2" not in redact_url(text)  # no URLs, but what people write
    assert redact_url("/etc/proxy.pac") == "/etc/proxy.pac"


ODD = st.text(alphabet="aZ.:/[]@%?#,*<> 0129x-_\\\n\x00é٣", max_size=60) | st.text(max_size=40)


@given(ODD)
@example("[")
@example("http://[]")
@example("http://@:")
@example("::ffff:1.2.3.4%[")
@example("٣.٣.٣.٣")
@example("http://a:٣")
def test_no_text_breaks_what_reads_it(text: str) -> None:
    for form in (text, "http://" + text, "socks5://u:p@" + text):
        try:
            server = parse_server(form)
        except ProxySyntaxError:
            continue
        # What was read is written as it is read.
        assert parse_server(server.url(credentials=True)) == server
        assert 1 <= server.port <= 65535
        assert not any(ord(letter) <= 32 for letter in server.url(credentials=True))
    is_loopback(text)
    redact_url(text)
    parse_result(f"PROXY {text}; {text}")
    listed = NoProxy.parse(text)
    listed.match(text, 80)
    NoProxy.parse("a.test,10.0.0.0/8,::/0").match(text)
    assert NoProxy.parse(str(listed)) == listed
