"""The log: its two forms, what guests may not do to it, and how often a warning repeats."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from netstack.control.log import Events, Log, RateLimiter

if TYPE_CHECKING:
    import pytest


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_json_lines() -> None:
    stream = io.StringIO()
    log = Log("info", "json", stream=stream)
    log.debug("not this")
    log.info("link up", link="a", mtu=1500)
    log.warning("odd", where=sys)
    first, second = (json.loads(line) for line in lines_of(stream))
    assert (first["event"], first["level"], first["link"], first["mtu"]) == ("link up", "info", "a", 1500)
    assert first["timestamp"].endswith("Z")
    assert second["level"] == "warning"
    assert "module" in second["where"]


def test_console_lines() -> None:
    stream = io.StringIO()
    Log("debug", "console", stream=stream, colors=False).error("link closed", why="it went away", count=3)
    (line,) = lines_of(stream)
    assert "[error] link closed " in line
    assert "why='it went away'" in line
    assert "count=3" in line
    assert "\x1b" not in line


def test_colours_when_asked_for() -> None:
    stream = io.StringIO()
    Log("debug", "console", stream=stream, colors=True).info("x")
    assert "\x1b[" in stream.getvalue()


def test_a_guests_name_cannot_write_to_the_terminal() -> None:
    for form in ("console", "json"):
        stream = io.StringIO()
        Log("debug", form, stream=stream, colors=False).info("lease", guest="a\x1b[2Jb\r\nc\u202e\x9b")
        (line,) = lines_of(stream)
        assert line.isprintable()


def test_a_traceback_keeps_its_lines() -> None:
    stream = io.StringIO()
    Log("debug", "console", stream=stream, colors=False).warning("bug", traceback="Traceback:\n  line\nError: x")
    assert lines_of(stream)[1:] == ["Traceback:", "  line", "Error: x"]


@given(st.text(), st.text())
def test_no_text_is_too_odd(event: str, value: str) -> None:
    for form in ("console", "json"):
        Log("debug", form, stream=io.StringIO(), colors=False).info(event, value=value)


def test_the_level_changes_while_running() -> None:
    stream = io.StringIO()
    log = Log("error", "json", stream=stream)
    log.info("no")
    assert not Events(log).debug
    log.set_level("debug")
    events = Events(log)
    assert events.debug
    events.flow_opened("tcp", "192.168.5.15:1024", "192.0.2.1:80")
    events.flow_closed("tcp", "192.168.5.15:1024", "192.0.2.1:80", "reset by peer", 10, 20)
    opened, closed = (json.loads(line) for line in lines_of(stream))
    assert opened["guest"] == "192.168.5.15:1024"
    assert (closed["why"], closed["from_guest"], closed["to_guest"]) == ("reset by peer", 10, 20)


def test_a_log_that_cannot_be_written_is_given_up() -> None:
    with open("/dev/full", "w", buffering=1) as full:  # noqa: PTH123
        log = Log("debug", "json", stream=full)
        log.info("x" * 10_000)
        log.info("again")
    stream = io.StringIO()
    stream.close()
    Log("debug", "console", stream=stream).error("nobody hears this")


def test_there_may_be_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    Log("debug", "console").error("nobody hears this")
    Log("info", "console").warm_up()


def test_warnings_are_rate_limited_by_key() -> None:
    stream = io.StringIO()
    clock = iter([100.0] * 6 + [109.9, 110.0])
    events = Events(Log("info", "json", stream=stream), clock=lambda: next(clock))
    for _ in range(5):
        events.drop_warning("ipv4_header", "a")
    events.drop_warning("ipv4_header", "b")
    events.drop_warning("ipv4_header", "a")
    events.drop_warning("ipv4_header", "a")
    said = [json.loads(line) for line in lines_of(stream)]
    assert [(line["link"], line.get("suppressed")) for line in said] == [("a", None), ("b", None), ("a", 5)]
    assert said[0]["reason"] == "ipv4_header"


def test_the_limiter_remembers_a_bounded_number_of_keys() -> None:
    limiter = RateLimiter(10.0, max_keys=2)
    assert [limiter.admit(key, 0.0) for key in "aab"] == [0, None, 0]
    assert limiter.admit("c", 1.0) == 0  # the oldest is forgotten
    assert limiter.admit("a", 1.0) == 0
    assert limiter.admit("c", 1.0) is None


def test_importing_the_log_imports_neither_structlog_nor_rich() -> None:
    program = "import sys, netstack.control.log; print(sorted({'structlog', 'rich', 'asyncio'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stdout == "[]\n"


def test_a_traceback_cannot_write_to_the_terminal() -> None:
    stream = io.StringIO()
    Log("debug", "console", stream=stream, colors=False).warning("bug", traceback="Traceback:\nError: a\x1b[2Jb\r")
    assert lines_of(stream)[1:] == ["Traceback:", "Error: a\\x1b[2Jb\\r"]
