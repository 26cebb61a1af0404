"""The same packets to netstack, dnsmasq and unbound, as forwarders to the same knot: who is alone with its opinion?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dns.differential import odd, ordinary

pytestmark = [pytest.mark.needs("netns", "knotd", "unbound", "dnsmasq", "unshare"), pytest.mark.slow]

ASPECTS = ("rcode", "tc", "opt", "question", "answer", "ra", "id")

# Where netstack says something else than both, and why that is so.
OUR_OWN = {
    "chaos": 5,  # rule 4: which version runs here is nobody's business; systemd-resolved refuses too
    "notify": 4,  # rule 3: as for all other opcodes; NOTIFY is for secondary servers
    "class any": 5,  # rule 4: forwarding it is of no use to anybody
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("differential")
    inside = f"ip link set lo up && exec {sys.executable} -m tests.dns.differential {folder}"
    command = ["unshare", "--net", "--mount", "--kill-child", "sh", "-c", inside]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2]
    )
    log = folder / "servers.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def aspects(answer: dict[str, Any] | None, *left_out: str) -> dict[str, Any] | None:
    return answer and {aspect: answer.get(aspect) for aspect in ASPECTS if aspect not in left_out}


@pytest.mark.parametrize("round_", ("ordinary", "again"))
@pytest.mark.parametrize("name", sorted(ordinary()))
def test_all_three_agree_about_ordinary_packets(found: dict[str, Any], round_: str, name: str) -> None:
    """The first time, and from the cache."""
    answers = found[round_][name]
    assert aspects(answers["netstack"]) == aspects(answers["unbound"]) == aspects(answers["dnsmasq"])
    assert answers["netstack"]["order"] == answers["unbound"]["order"]


@pytest.mark.parametrize("name", sorted(name for name in ordinary() if "trailing" not in name))
def test_all_three_agree_by_tcp_pipelined(found: dict[str, Any], name: str) -> None:
    answers = found["tcp"][name]
    assert aspects(answers["netstack"]) == aspects(answers["unbound"])
    # dnsmasq sends an OPT by TCP now and then where there was none.
    assert aspects(answers["netstack"], "opt") == aspects(answers["dnsmasq"], "opt")


@pytest.mark.parametrize("name", sorted(odd()))
def test_nobody_is_alone_about_odd_packets(found: dict[str, Any], name: str) -> None:
    answers = found["odd"][name]
    ours = answers["netstack"]
    others = [answer for server, answer in answers.items() if server != "netstack"]
    if name in OUR_OWN:
        assert ours["rcode"] == OUR_OWN[name]
        return
    if ours is None:
        assert None in others
        return
    assert ours["id"]
    assert "unreadable" not in ours
    assert ours["rcode"] in {answer["rcode"] for answer in others if answer is not None}
    assert ours["tc"] in {answer["tc"] for answer in others if answer is not None}


def test_truncated_answers_have_what_fits(found: dict[str, Any]) -> None:
    for name, limit in (("many A", 512), ("edns 0 bytes", 512), ("edns 600 bytes", 600)):
        answers = found["odd"][name]
        assert limit - 16 < answers["netstack"]["length"] <= limit
        assert len(answers["netstack"]["answer"]) >= len(answers["dnsmasq"]["answer"]) - 1  # it leaves out the OPT
