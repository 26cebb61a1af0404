"""`netstack publish` against a netstack that runs, and -p of the commands that open a network."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from netstack.cli import main
from tests.cli.programs import netstack
from tests.lab.netstack import Netstack

pytestmark = pytest.mark.timeout(60)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


class Running:
    def __init__(self, netstack: Netstack) -> None:
        self.netstack = netstack

    def publish(self, *words: str) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["publish", *words, "--api", f"unix://{self.netstack.api_path}"])
        return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("n")
    config = folder / "n.toml"
    config.write_text('[network]\nsubnet = "10.98.9.0/24"\n[dns]\nsource = "none"\n[[publish]]\nspec = "0:80"\n')
    with Netstack(None, folder, links=[f"unix://{folder}/q.sock"], arguments=["-c", str(config)]) as started:
        yield Running(started)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_add_prints_the_spec_with_its_port_and_rm_closes_it(running: Running) -> None:
    added = running.publish("add", "0:web:80")
    found = re.fullmatch(r"127\.0\.0\.1:(\d+):web:80\n", added.out)
    assert found, added
    # Somebody listens; what ends it at once is that no guest is called web.
    with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", int(found[1])), 5):
        pass
    assert running.publish("rm", added.out.strip()) == (0, "", "")
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(found[1])), 5):
        pass


def test_ls_shows_where_each_came_from(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    ident = json.loads(running.publish("add", f"unix:{path}:80", "--description", "the site", "--json").out)["id"]
    listed = json.loads(running.publish("ls", "--json").out)["forwards"]
    assert {each["owner"] for each in listed} == {"config", "user"}
    table = running.publish("ls").out
    assert f"unix:{path}:80" in table
    assert "the site" in table
    assert running.publish("rm", ident).status == 0
    assert not path.exists()


def test_a_port_in_use(running: Running, taken: int) -> None:
    refused = running.publish("add", f"{taken}:80")
    assert refused.status == 1
    assert re.fullmatch(rf"netstack: 127\.0\.0\.1:{taken}:80: the port is in use: .* has it; .*\n", refused.err)
    added = running.publish("add", f"{taken}:80", "--on-conflict", "next", "--json")
    assert json.loads(added.out)["host_port"] > taken
    assert running.publish("rm", json.loads(added.out)["spec"]).status == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    (
        (("add", "80"), 2, "80: which port of the host?"),
        (("add", "80:10.0.0.1:80"), 2, "10.0.0.1 is no guest's address in 10.98.9.0/24"),
        (("add", "0:80", "--on-conflict", "later"), 2, "--on-conflict later: must be one of error, next, loopback"),
        (("add", "0:80", "--source", "me"), 2, "--source me: must be one of caller, gateway"),
        (("rm", "f999"), 1, "there is no forward f999; netstack publish ls shows them"),
    ),
)
def test_mistakes_cost_one_line(running: Running, words: tuple[str, ...], status: int, said: str) -> None:
    outcome = running.publish(*words)
    assert outcome.status == status
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_run_says_which_port_it_took(running: Running) -> None:
    ready = next(line for line in running.netstack.log.splitlines() if line.startswith("ready"))
    assert re.search(r"; forwards 127\.0\.0\.1:\d+:80$", ready)


@pytest.mark.parametrize("command", ("run", "exec", "qemu"))
def test_a_mistake_in_p_names_the_flag(command: str, tmp_path: Path) -> None:
    behind = {"run": (), "exec": ("--", "true"), "qemu": ("--", "true")}[command]
    outcome = netstack(tmp_path, command, "-p", "8080:80:90:100", *behind)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("netstack: -p 8080:80:90:100: '8080' is no address of this host")


def test_a_port_of_p_that_is_in_use(taken: int, tmp_path: Path) -> None:
    outcome = netstack(tmp_path, "run", "--link", f"unix://{tmp_path}/q.sock", "-p", f"{taken}:80")
    assert outcome.returncode == 1
    assert f"127.0.0.1:{taken}:80: the port is in use" in outcome.stderr
    assert "Traceback" not in outcome.stderr
