"""NO_PROXY is read as the union of what curl, wget, urllib, requests, httpx and Go take for an exception."""

import pytest

from netstack.proxy.exceptions import MAX_ENTRIES, NoProxy

# NO_PROXY, host, port, and who goes direct of curl 7.88, wget 1.21, urllib 3.11, requests, httpx and Go's httpproxy:
# "D" direct, "p" proxy, "-" an error.
TABLE = (
    ("example.test", "example.test", 80, "DDDDDD"),
    ("example.test", "a.example.test", 80, "DDDDDD"),
    (".example.test", "example.test", 80, "DpDDpp"),
    (".example.test", "a.example.test", 80, "DDDDDD"),
    ("*.example.test", "a.example.test", 80, "pppppD"),
    ("*.example.test", "example.test", 80, "pppppp"),
    ("example.test", "notexample.test", 80, "pppppp"),
    ("*", "anything.test", 80, "DpDDDD"),
    ("*", "203.0.113.1", 80, "DpDDDD"),
    ("*,foo", "x.test", 80, "ppppDD"),
    ("10.0.0.0/8", "10.1.2.3", 80, "DppDpD"),
    ("10.1.2.3", "10.1.2.3", 80, "DDDDDD"),
    ("10.", "10.1.2.3", 80, "pppppp"),
    ("10.*", "10.1.2.3", 80, "pppppp"),
    ("example.test:8080", "example.test", 8080, "ppDDDD"),
    ("example.test:8080", "example.test", 80, "pppppp"),
    ("example.test", "example.test", 8080, "DDDDDD"),
    ("a.test b.test", "b.test", 80, "Dppppp"),
    ("a.test, b.test", "b.test", 80, "DDDDDD"),
    ("", "localhost", 80, "pppppD"),
    ("", "127.0.0.1", 80, "pppppD"),
    ("::1", "[::1]", 80, "DDpDDD"),
    ("[::1]", "[::1]", 80, "ppDp-D"),
    ("fd00::/8", "[fd00::1]", 80, "ppp" + "p-D"),
    ("example.test.", "example.test", 80, "Dppppp"),
    ("203.0.113.0/24", "name.with.address.test", 80, "pppppp"),
)


@pytest.mark.parametrize(("text", "host", "port", "others"), TABLE)
def test_an_exception_of_any_client_is_one(text: str, host: str, port: int, others: str) -> None:
    matched = NoProxy.parse(text).match(host, port) is not None
    assert matched == ("D" in others)


@pytest.mark.parametrize(
    ("text", "host", "matches"),
    (
        ("EXAMPLE.test", "www.Example.TEST.", True),
        ("<local>", "intranet", True),
        ("<local>", "intranet.corp.test", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.5/8", "10.200.0.1", True),
        ("fd00::/8", "fd12::1%eth0", True),
        ("2.3", "10.1.2.3", False),
        ("10.1.2.3:80", "10.1.2.3", True),
        ("10.1.2.3:8080", "10.1.2.3", False),
        ("[fd00::1]:80", "fd00::1", True),
        ("[fd00::1]:8080", "fd00::1", False),
        ("fd00::1:80", "fd00::1", False),
        ("", "app.localhost", True),
        ("", "notlocalhost", False),
        ("bücher.test", "www.xn--bcher-kva.test", True),
        ("xn--bcher-kva.test", "bücher.test", True),
        ("a*b.test", "axb.test", False),
        ("<-loopback>", "loopback", False),
        (",, ,\t", "example.test", False),
        ("example.test", "", False),
        ("example.test:99999999", "example.test", False),
    ),
)
def test_forms_of_entries_and_hosts(text: str, host: str, matches: bool) -> None:
    assert (NoProxy.parse(text).match(host, 80) is not None) == matches


def test_what_matched_is_said() -> None:
    listed = NoProxy.parse("corp.test,10.0.0.0/8")
    assert listed.match("git.corp.test") == "corp.test"
    assert listed.match("10.9.9.9") == "10.0.0.0/8"
    assert "git.corp.test" in listed


def test_a_list_without_end_is_cut() -> None:
    assert len(NoProxy(f"h{n}.test" for n in range(MAX_ENTRIES * 2)).entries) == MAX_ENTRIES
