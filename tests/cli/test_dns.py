"""`netstack dns` against a netstack that runs, in a namespace of its own with a nameserver."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from netstack.cli import main
from netstack.cli.dns import _rows
from tests.cli.programs import netstack
from tests.dns.nameserver import make_answer, make_query
from tests.lab.namespaces import Namespace, wait_until
from tests.lab.netstack import Netstack

pytestmark = pytest.mark.timeout(90)

SETTINGS = """\
[dns]
upstreams = ["127.0.0.1"]
hosts_file = "hosts"
mdns = false
log_queries = true
[dns.hosts]
"*.app.test" = "192.168.5.20"
git = "www.corp.example"
[[dns.route]]
domains = ["quiet.example"]
upstreams = ["127.0.0.1:9"]
"""
DNSMASQ = (
    *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"),
    *("--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file=", "--local-ttl=300"),
    *("--address=/corp.example/10.8.0.9", "--mx-host=corp.example,mail.corp.example,10", "--local=/example/"),
)


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Host:
    """netstack in a namespace with dnsmasq; the commands run here, since its API's socket is a file."""

    def __init__(self, netstack: Netstack) -> None:
        self.netstack = netstack

    def run(self, *words: str) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["dns", *words, "--api", f"unix://{self.netstack.api_path}"])
        return Outcome(status, out.getvalue(), err.getvalue())

    def json(self, *words: str) -> Any:
        outcome = self.run(*words, "--json")
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("dns")
    (folder / "hosts").write_text("192.0.2.9 nas.example\n")
    (folder / "netstack.toml").write_text(SETTINGS)
    with Namespace("host") as namespace:
        nameserver = namespace.popen(*DNSMASQ, stderr=subprocess.DEVNULL)
        try:
            links = [f"unix://{folder}/g.sock"]
            with Netstack(namespace, folder, links=links, arguments=("-c", str(folder / "netstack.toml"))) as process:
                found = Host(process)
                wait_until(lambda: found.run("query", "corp.example").returncode == 0, "dnsmasq is up")
                yield found
        finally:
            nameserver.terminate()
            nameserver.wait(timeout=10)


@pytest.mark.needs("netns", "dnsmasq")
@pytest.mark.parametrize(
    ("words", "status", "lines"),
    (
        (("host.lima.internal",), 0, ["host.lima.internal. 5 A 192.168.5.2"]),
        (("host.lima.internal", "AAAA"), 0, ["host.lima.internal. 5 AAAA fd00:c0a8:5::2"]),
        (("x.app.test",), 0, ["x.app.test. 5 A 192.168.5.20"]),
        (("NAS.example",), 0, ["nas.example. 5 A 192.0.2.9"]),
        (("corp.example", "mx"), 0, ["corp.example. 300 MX 10 mail.corp.example."]),
        (("git",), 0, ["git. 60 A 10.8.0.9"]),
        (("x.onion",), 0, ["(authority)"]),
        (("x.quiet.example",), 1, ["because: ", "because: "]),
    ),
)
def test_query(host: Host, words: tuple[str, ...], status: int, lines: list[str]) -> None:
    outcome = host.run("query", *words)
    assert outcome.returncode == status, outcome.stderr
    assert outcome.stderr == ""
    said, *records = outcome.stdout.splitlines()
    assert said.split()[0] == ("SERVFAIL" if status else "NXDOMAIN" if "onion" in words[0] else "NOERROR")
    assert len(records) == len(lines)
    assert all(line in record for line, record in zip(lines, records)), records


@pytest.mark.needs("netns", "dnsmasq")
def test_query_as_json(host: Host) -> None:
    found = host.json("query", "corp.example", "MX")
    assert (found["name"], found["type"], found["rcode"]) == ("corp.example", "MX", "NOERROR")
    assert found["records"][0] == {
        "section": "answer", "name": "corp.example.", "ttl": found["records"][0]["ttl"], "type": "MX",
        "data": "10 mail.corp.example.",
    }  # fmt: skip


@pytest.mark.needs("netns", "dnsmasq")
def test_routes(host: Host) -> None:
    found = host.json("routes")
    assert [(route["domain"], route["servers"]) for route in found["routes"]] == [
        ("quiet.example", ["127.0.0.1:9"]),
        (".", ["127.0.0.1"]),
    ]
    shown = host.run("routes").stdout
    assert "quiet.example and below" in shown
    assert "settings, [[dns.route]] 1" in shown


@pytest.mark.needs("netns", "dnsmasq")
def test_flush(host: Host) -> None:
    host.run("flush")
    for name in ("a.corp.example", "b.corp.example", "c.corp.example"):
        host.run("query", name)
    assert host.run("flush", "a.corp.example").stdout == "1 answers forgotten\n"
    assert host.json("flush", "--scope", "settings") == {"flushed": 2}
    assert host.json("flush") == {"flushed": 0}


@pytest.mark.needs("netns", "dnsmasq")
@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("query", "a..b"), "'a..b' is no domain name"),
        (("query", "a", "bogus"), "'bogus' is no type of record"),
        (("flush", "--scope", "nope"), "there is no scope 'nope'; there are: settings"),
        (("flush", "a.example", "--scope", "x"), "name one of them"),
        (("flush", "a b"), ""),
    ),
)
def test_bad_input_is_one_line_and_status_2(host: Host, words: tuple[str, ...], said: str) -> None:
    outcome = host.run(*words)
    if said:
        assert outcome.returncode == 2
        assert outcome.stderr.startswith("netstack: ")
        assert outcome.stderr.count("\n") == 1
    assert said in outcome.stderr


@pytest.mark.needs("netns", "dnsmasq")
def test_queries_are_in_the_log_where_that_is_asked_for(host: Host) -> None:
    host.run("query", "logged.corp.example", "TYPE65280")
    lines = [line for line in host.netstack.log_path.read_text().splitlines() if "logged.corp.example" in line]
    assert len(lines) == 1
    for words in ("DNS query", "guest=api", "TYPE65280", "route=settings"):
        assert words in lines[0]


@pytest.mark.parametrize("words", (["dns"], ["dns", "query"], ["dns", "nonsense"]))
def test_what_is_missing_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().out == "" or words == ["dns"]


@pytest.mark.parametrize("command", (["query", "a"], ["routes"], ["flush"]))
def test_nobody_runs(command: list[str], tmp_path: Path) -> None:
    outcome = netstack(tmp_path, "dns", *command)
    assert outcome.returncode == 1
    assert "start `netstack run`" in outcome.stderr


@pytest.mark.parametrize("answer", ({}, {"answer": "zz"}, {"answer": 5, "rcode": 1}, {"source": [], "routes": {}}))
@pytest.mark.parametrize("command", (["query", "a"], ["routes"]))
def test_an_api_that_is_not_ours_is_one_line(
    command: list[str], answer: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("netstack.cli.dns.ask_api", lambda *given, **more: answer)
    assert main(["dns", *command]) == 1
    assert capsys.readouterr().err.startswith("netstack: what answers is not netstack")


def test_an_answer_that_cannot_be_read_is_shown_in_hex() -> None:
    answer = make_answer(make_query(), "www.example.test. 60 IN A 192.0.2.1")
    assert [row[4] for row in _rows(answer)] == ["192.0.2.1"]
    assert [row[1] for row in _rows(answer[:-1])] == ["(unreadable)"]
    assert next(iter(_rows(b"")))[1] == "(unreadable)"


def test_what_the_host_says_does_not_reach_the_terminal_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"source": {"name": "x", "why": "\x1b[2J"}, "routes": [], "search": ["a\x1b]0;x\x07.example"]}
    monkeypatch.setattr("netstack.cli.dns.ask_api", lambda *args, **kwargs: state)
    assert main(["dns", "routes"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown
    assert "\\x07.example" in shown
    assert "\x1b" not in shown
