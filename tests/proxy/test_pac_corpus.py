"""PAC scripts answer as they do in browsers: recorded/pac_answers.json, made by recorded/record_pac.sh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.proxy import pac_worker
from netstack.proxy.pac_script import HELPERS, parse_result
from netstack.proxy.routes import DIRECT
from netstack.proxy.settings import parse_server
from tests.proxy.pac_cases import HOSTS, NOW, Case, cases, with_clock

RECORDED: dict[str, str] = json.loads((Path(__file__).parent / "recorded" / "pac_answers.json").read_text())

# What we do otherwise. Browsers set the month of a 31st, so that their November has one: the first of December.
OURS = {'first dateRange("OCT", "NOV")': "false"}


class Engine:
    """The process in which scripts run, asked over its own two pipes."""

    def __init__(self, timezone: str = "UTC") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", pac_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"TZ": timezone},
        )

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def answer(self, script: str, url: str = "http://x/", host: str = "x") -> dict[str, Any]:
        loaded = self.ask({"load": [HELPERS, script]})
        if "error" in loaded:
            return loaded
        answer = self.ask({"find": [url, host], "addresses": ["192.0.2.7", "2001:db8::7"]})
        while "resolve" in answer:
            name = answer["resolve"]
            answer = self.ask({"addresses": [HOSTS[name]] if name in HOSTS else []})
        return answer

    def close(self) -> None:
        self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def say(engine: Engine, expression: str, script: str = "") -> object:
    """What an expression is inside a script, as text."""
    answer = engine.answer(f"{script}\nfunction FindProxyForURL(url, host) {{ return String({expression}); }}")
    return answer.get("result", answer.get("error"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_corpus(engine: Engine, case: Case) -> None:
    expected = OURS.get(case.name, RECORDED[case.name])
    assert engine.answer(with_clock(case), case.url, case.host) == {"result": expected}


def test_every_exception_to_the_recording_is_still_one() -> None:
    assert all(RECORDED[name] != ours for name, ours in OURS.items())


@pytest.mark.parametrize(
    ("expression", "expected"),
    (
        ("myIpAddress()", "192.0.2.7"),
        ("myIpAddressEx()", "192.0.2.7;2001:db8::7"),
        ('dnsResolveEx("ten.test")', "10.1.2.3"),
        ('dnsResolveEx("unknown.test")', ""),
        ('isResolvableEx("ten.test")', "true"),
        ('isInNetEx("10.1.2.3", "10.0.0.0/8")', "true"),
        ('isInNetEx("11.1.2.3", "10.0.0.0/8")', "false"),
        ('isInNetEx("ten.test", "10.1.2.0/24")', "true"),
        ('isInNetEx("2001:db8::5", "2001:db8::/32")', "true"),
        ('isInNetEx("2001:db9::5", "2001:db8::/32")', "false"),
        ('isInNetEx("2001:db8::5", "2001:db8::4/126")', "true"),
        ('isInNetEx("2001:db8::5", "10.0.0.0/8")', "false"),
        ('isInNetEx("2001:db8::5", "junk")', "false"),
        (
            'sortIpAddressList("10.2.3.9;2001:4898:28:3:201:2ff:feea:fc14;::1;127.0.0.1;::9")',
            "::1;::9;2001:4898:28:3:201:2ff:feea:fc14;10.2.3.9;127.0.0.1",
        ),
        ('sortIpAddressList("10.2.3.9;junk")', ""),
        ("getClientVersion()", "1.0"),
        ("alert('x')", "undefined"),
        ('isPlainHostName("fd00::1")', "false"),
        ("typeof require + typeof process + typeof fetch + typeof std + typeof os", "undefined" * 5),
    ),
)
def test_what_only_some_browsers_have(engine: Engine, expression: str, expected: str) -> None:
    assert say(engine, expression) == expected


def test_the_calendar_is_that_of_the_host() -> None:
    there = Engine("Asia/Tokyo")  # 03:15:30 on Saturday, when it is 18:15:30 on Friday in UTC
    case = Case("", "")
    clock = with_clock(case)
    try:
        assert say(there, "timeRange(3)", clock) == "true"
        assert say(there, 'timeRange(18, "GMT")', clock) == "true"
        assert say(there, 'weekdayRange("SAT")', clock) == "true"
        assert say(there, 'weekdayRange("FRI", "GMT")', clock) == "true"
        assert say(there, "Date.length", "") != "error"
        assert case.now == NOW
    finally:
        there.close()


def test_errors_name_the_line_of_the_script(engine: Engine) -> None:
    script = "\n\nfunction FindProxyForURL(url, host) {\n  return nothing.here;\n}"
    words = engine.answer(script)["error"]
    assert "nothing" in words
    assert ":4:" in words
    assert "SyntaxError" in engine.answer("function FindProxyForURL( {")["error"]
    assert "FindProxyForURL" in engine.answer("var a = 1;")["error"]


def test_a_script_may_look_up_twenty_names(engine: Engine) -> None:
    script = """function FindProxyForURL(url, host) {
      var found = 0;
      for (var i = 0; i < 40; i++) if (dnsResolve("n" + i + ".test") !== null) found++;
      return "PROXY n" + found + ":1";
    }"""
    engine.ask({"load": [HELPERS, script]})
    answer, asked = engine.ask({"find": ["http://x/", "x"], "addresses": []}), []
    while "resolve" in answer:
        asked.append(answer["resolve"])
        answer = engine.ask({"addresses": ["10.0.0.1"]})
    assert len(asked) == pac_worker.MAX_LOOKUPS
    assert answer == {"result": f"PROXY n{pac_worker.MAX_LOOKUPS}:1"}


@pytest.mark.parametrize(
    ("text", "urls"),
    (
        ("DIRECT", ["direct"]),
        ("", ["direct"]),
        ("garbage", ["direct"]),
        ("PROXY a:8080; DIRECT", ["http://a:8080", "direct"]),
        ("proxy a:8080;direct;", ["http://a:8080", "direct"]),
        ("PROXY a", ["http://a:80"]),
        ("HTTPS a", ["https://a:443"]),
        ("SOCKS a; SOCKS5 b; SOCKS4 c:9", ["socks4://a:1080", "socks5h://b:1080", "socks4://c:9"]),
        ("PROXY [fd00::1]:3128", ["http://[fd00::1]:3128"]),
        ("PROXY u:p@a:1; PROXY b:1", ["http://b:1"]),
        ("PROXY a:1;PROXY a:1;PROXY a:99999; PROXY b/x:1", ["http://a:1"]),
        ("PROXY http://a:1", ["direct"]),
        (";".join(f"PROXY h{n}:1" for n in range(100)), [f"http://h{n}:1" for n in range(32)]),
    ),
)
def test_answers_of_scripts(text: str, urls: list[str]) -> None:
    assert parse_result(text) == tuple(DIRECT if url == "direct" else parse_server(url) for url in urls)
