"""PAC scripts that fail, loop, or take all memory; and where scripts come from."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio

from netstack.proxy import pac, pac_scripts
from netstack.proxy.pac import PacRunner
from netstack.proxy.pac_script import parse_result
from netstack.proxy.pac_scripts import FetchError, PacLibrary, PacScripts, fetch
from netstack.proxy.routes import DIRECT, Routes
from netstack.proxy.settings import PacSource, parse_server

SOURCE = PacSource("http://pac.test/p.pac")
PROXY = parse_server("a:1")

HOSTILE = """
function FindProxyForURL(url, host) {
  if (host == "loop") for (;;) {}
  if (host == "memory") { var all = []; for (;;) all.push(new Array(1000).fill(1)); }
  if (host == "text") { var s = "x"; for (;;) s += s; }
  if (host == "deep") { function deeper() { return deeper() + 1; } return deeper(); }
  if (host == "regex") return /^(a+)+$/.test("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!");
  if (host == "throw") throw new Error("on purpose");
  if (host == "null") return null;
  if (host == "object") return { toString: function () { return "PROXY a:1"; } };
  if (host == "slow") return "PROXY " + dnsResolve("never.test") + ":1";
  if (host == "url") return "PROXY n" + url.length + ":1";
  return "PROXY a:1";
}
"""


async def no_names(name: str) -> Sequence[str]:
    return []


async def hang(name: str) -> Sequence[str]:
    await trio.sleep_forever()
    return []


class Runner(PacRunner):
    """A runner of one script."""

    def __init__(self, script: str, resolve: Callable[[str], Awaitable[Sequence[str]]] = no_names) -> None:
        async def get(source: PacSource) -> str | None:
            return script

        self.problems: list[str] = []
        super().__init__(get, resolve, self.problems.append, lambda: ["192.0.2.7"])

    async def find(self, host: str, url: str = "") -> Routes | None:
        return await self.find_proxy(SOURCE, url or f"http://{host}/", host)


def children() -> set[int]:
    """The processes that this one has started and not reaped."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return set(map(int, text.split()))


@pytest.mark.parametrize(
    ("host", "words"),
    (
        ("memory", "out of memory"),
        ("text", "string too long"),
        ("deep", "Maximum call stack size exceeded"),
        ("throw", "on purpose"),
    ),
)
async def test_a_script_that_fails_has_no_answer_and_goes_on(host: str, words: str) -> None:
    runner = Runner(HOSTILE)
    assert await runner.find(host) is None
    assert words in runner.problems[0]
    assert await runner.find("good") == (PROXY,)
    assert runner.problem == ""
    await runner.aclose()


@pytest.mark.parametrize("host", ("loop", "regex"))
async def test_a_script_that_loops_is_killed_and_the_next_request_served(host: str) -> None:
    before = children()
    runner = Runner(HOSTILE)
    with trio.fail_after(pac.SILENCE + 5):
        assert await runner.find(host) is None
    assert "more time or memory than it may" in runner.problems[0]
    assert children() == before
    assert await runner.find("good") == (PROXY,)
    assert runner.counters == {"pac_evaluations": 2, "pac_failures": 1, "pac_killed": 1}
    await runner.aclose()
    assert children() == before


async def test_what_is_no_text_is_no_answer() -> None:
    runner = Runner(HOSTILE)
    assert await runner.find("null") is None
    assert await runner.find("object") is None
    assert runner.problems == []
    await runner.aclose()


async def test_a_script_that_kills_its_worker_again_and_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pac, "STRIKES", 2)
    runner = Runner(HOSTILE)
    for _ in range(2):
        assert await runner.find("loop") is None
    asked = runner.counters["pac_evaluations"]
    assert await runner.find("good") is None
    assert runner.counters["pac_evaluations"] == asked
    await runner.aclose()


async def test_a_lookup_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(HOSTILE, hang)
    assert await runner.find("good") == (PROXY,)
    monkeypatch.setattr(pac, "TOTAL", 0.3)
    with trio.fail_after(10):
        assert await runner.find("slow") is None
    assert "no answer after" in runner.problems[0]
    assert runner.counters["pac_killed"] == 0  # it is not the script's fault
    await runner.aclose()


async def test_slow_names_of_one_guest_hold_up_no_other(nursery: trio.Nursery) -> None:
    runner = Runner(HOSTILE, hang)
    assert await runner.find("good") == (PROXY,)
    for _ in range(10 * pac.WORKERS):
        nursery.start_soon(runner.find, "slow")
    with trio.fail_after(5):
        while runner.counters["pac_evaluations"] <= 10 * pac.WORKERS:
            await trio.lowlevel.checkpoint()
        assert await runner.find("good") == (PROXY,)
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await runner.aclose()


async def test_a_script_that_asks_for_ever_new_names_is_not_run_for_ever() -> None:
    runner = Runner("function FindProxyForURL() { dnsResolve(Math.random() + '.test'); return 'PROXY a:1'; }")
    with trio.fail_after(5):
        assert await runner.find("x") is None
    assert "asks for other names" in runner.problems[0]
    await runner.aclose()


async def test_a_request_that_is_given_up_takes_its_worker_with_it() -> None:
    before = children()
    runner = Runner(HOSTILE)
    with trio.move_on_after(0.3):
        await runner.find("loop")
    assert children() == before
    assert await runner.find("good") == (PROXY,)
    await runner.aclose()


async def test_requests_share_a_few_workers_which_end_with_the_runner(nursery: trio.Nursery) -> None:
    before = children()
    runner = Runner(HOSTILE)
    nursery.start_soon(runner.run)
    found: list[Routes | None] = []

    async def ask() -> None:
        found.append(await runner.find("good"))

    async with trio.open_nursery() as many:
        for _ in range(40):
            many.start_soon(ask)
    assert found == [(PROXY,)] * 40
    assert 0 < runner.workers <= pac.WORKERS
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True), trio.fail_after(10):
        while True:
            if children() == before:
                break
            await trio.sleep(0.01)


async def test_a_worker_is_ready_before_the_first_request() -> None:
    runner = Runner(HOSTILE)
    await runner.warm(SOURCE)
    assert runner.workers == 1
    assert await runner.find("good") == (PROXY,)
    assert runner.workers == 1
    await runner.aclose()
    broken = Runner("this is no script")
    await broken.warm(SOURCE)
    assert "SyntaxError" in broken.problem
    await broken.aclose()


async def test_a_long_url_is_cut_to_its_host() -> None:
    runner = Runner(HOSTILE)
    assert await runner.find("url", "http://url/" + "x" * 100) == (parse_server("n111:1"),)
    assert await runner.find("url", "http://url/" + "x" * 100_000) == (parse_server(f"n{len('http://url/')}:1"),)
    await runner.aclose()


@pytest.mark.parametrize(
    ("thrown", "shown"),
    (
        ("url", "http://web.test:81/..."),
        ("new Error('no way for <' + url + '>')", "no way for <http://web.test:81/..."),
        ("encodeURIComponent(url)", "http%3A%2F%2Fweb.test/..."),
        ("url.toUpperCase()", "HTTP://WEB.TEST:81/..."),
        ("'x http://me:hunter2@other.test/hunter2?hunter2 y'", "x http://other.test/... y"),
        ("url.split('/')[3]", "..."),
        ("'at ' + url.substring(url.indexOf('/', 8))", "at /..."),
        ("decodeURIComponent(url.split('=')[1])", "..."),
        ("JSON.parse('{' + url.split('/')[3])", "SyntaxError"),
        ("Array(2000).join(url.substring(7) + ' ')", "web.test"),
        ("new TypeError(host + ' is not wanted')", "TypeError: web.test is not wanted"),
    ),
)
async def test_what_a_script_throws_shows_no_more_of_a_guests_url_than_its_host(thrown: str, shown: str) -> None:
    runner = Runner(f"function FindProxyForURL(url, host) {{ throw {thrown}; }}")
    assert (
        await runner.find_proxy(SOURCE, "http://web.test:81/hunter2/p%61ss!hunter2?token=hunter2", "web.test") is None
    )
    for words in (runner.problem, *runner.problems):
        assert words.startswith(
            f"the script failed: {'Error: ' if 'Error(' in thrown and 'Type' not in thrown else ''}"
        )
        assert shown in words
        for secret in ("hunter2", "HUNTER2", "p%61ss", "pass!", "me:"):
            assert secret not in words
    await runner.aclose()


async def test_what_a_guest_asks_for_does_not_hide_that_memory_ran_out() -> None:
    runner = Runner(HOSTILE)
    assert await runner.find("memory", "http://memory/out/memory") is None
    assert runner.counters["pac_killed"] == 1
    await runner.aclose()


async def test_a_script_that_is_none_says_why() -> None:
    runner = Runner("this is no script")
    assert await runner.find("x") is None
    assert "the script cannot be used: SyntaxError" in runner.problems[0]
    await runner.aclose()


# ---- where scripts come from -----------------------------------------------------------------------------------------

SCRIPT = 'function FindProxyForURL(url, host) { return "PROXY a:1"; }'


class Server:
    """An HTTP server on the loopback that answers what it is told to."""

    def __init__(self) -> None:
        self.answer = ok(SCRIPT)
        self.requests: list[bytes] = []
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async def serve(stream: trio.SocketStream) -> None:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await stream.receive_some(4096)
            self.requests.append(request)
            await stream.send_all(self.answer)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, serve, 0)
            self.port = listeners[0].socket.getsockname()[1]
            task_status.started()

    def url(self, path: str = "/p.pac", userinfo: str = "") -> str:
        return f"http://{userinfo}127.0.0.1:{self.port}{path}"


def ok(body: str | bytes, *headers: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(data)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


@pytest.fixture
async def server(nursery: trio.Nursery) -> Server:
    made = Server()
    await nursery.start(made.run)
    return made


async def test_scripts_are_fetched_directly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = await fetch(server.url(userinfo="me:hunter2@"))
    assert (found.script, found.age) == (SCRIPT, pac_scripts.DEFAULT_AGE)
    assert b"Basic " + base64.b64encode(b"me:hunter2") in server.requests[0].replace(b"basic", b"Basic")


@pytest.mark.parametrize(
    ("answer", "words"),
    (
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the answer is 404"),
        (ok("<html>Please log in</html>"), "there is no FindProxyForURL in it"),
        (ok(SCRIPT + "/" * (1 << 20)), "longer than a megabyte"),
        (ok(gzip.compress(gzip.compress(bytes(1 << 20))), "Content-Encoding: gzip, gzip"), "the answer is compressed"),
        (b"garbage\r\n\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
        (b"HTTP/1.1 302 Found\r\nLocation: /p.pac\r\nContent-Length: 0\r\n\r\n", "TooManyRedirects"),
    ),
)
async def test_what_is_no_script_is_not_taken(server: Server, answer: bytes, words: str) -> None:
    server.answer = answer
    with pytest.raises(FetchError) as caught:
        await fetch(server.url(path="/p.pac?token=hunter2", userinfo="me:hunter2@"))
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "age"),
    (
        (["Cache-Control: max-age=600"], 600),
        (["Cache-Control: private, max-age=5"], pac_scripts.MIN_AGE),
        (["Cache-Control: max-age=999999999"], pac_scripts.MAX_AGE),
        (["Cache-Control: no-store"], pac_scripts.MIN_AGE),
    ),
)
async def test_a_script_is_good_for_as_long_as_its_server_says(server: Server, headers: list[str], age: float) -> None:
    server.answer = ok(SCRIPT, *headers)
    assert (await fetch(server.url())).age == age


async def test_other_places_of_scripts(tmp_path: Path) -> None:
    file = tmp_path / "a b.pac"
    file.write_bytes(b"\xef\xbb\xbf// \xfc\n" + SCRIPT.encode())
    found = await fetch(f"file://{tmp_path}/a%20b.pac")
    assert found.script == "// ü\n" + SCRIPT
    assert (await fetch(str(file))).script == found.script
    assert (await fetch("data:," + SCRIPT.replace(" ", "%20"))).script == SCRIPT
    encoded = base64.b64encode(SCRIPT.encode()).decode().rstrip("=")
    assert (await fetch(f"data:application/x-ns-proxy-autoconfig;base64,{encoded}")).script == SCRIPT
    os.mkfifo(tmp_path / "fifo")
    for wrong in ("ftp://x/p.pac", "data:nothing", "file://elsewhere/p.pac", str(tmp_path), str(tmp_path / "fifo")):
        with pytest.raises(FetchError):
            await fetch(wrong)


async def test_the_last_good_script_stays_until_there_is_another(server: Server, nursery: trio.Nursery) -> None:
    events: list[tuple[str, str]] = []
    scripts = PacScripts(on_event=lambda what, words: events.append((what, words)))
    source = PacSource(server.url())
    scripts.use(source)
    nursery.start_soon(scripts.run)
    assert await scripts.get(source) == SCRIPT

    server.answer = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
    scripts.refresh()
    with trio.fail_after(10):
        while True:
            if scripts.problem:
                break
            await trio.sleep(0.01)
    assert await scripts.get(source) == SCRIPT
    server.answer = ok(SCRIPT + "// new")
    scripts.refresh()
    with trio.fail_after(10):
        while True:
            if scripts.script == SCRIPT + "// new":
                break
            await trio.sleep(0.01)
    assert [what for what, _ in events] == ["fetched", "failed", "fetched"]
    assert scripts.problem == ""


async def test_a_file_is_read_again_when_it_changes(nursery: trio.Nursery, tmp_path: Path) -> None:
    file = tmp_path / "p.pac"
    scripts = PacScripts()
    source = PacSource(str(file))
    scripts.use(source)
    nursery.start_soon(scripts.run)
    assert await scripts.get(source) is None
    assert "No such file" in scripts.problem
    for text in (SCRIPT, SCRIPT + "// two"):
        file.write_text(text)
        with trio.fail_after(10):
            while True:
                if await scripts.get(source) == text:
                    break
                await trio.sleep(0.02)


async def test_wpad_takes_the_first_url_that_has_a_script(server: Server, nursery: trio.Nursery) -> None:
    async def discover() -> list[str]:
        return ["http://127.0.0.1:1/wpad.dat", server.url("/wpad.dat")]

    scripts = PacScripts(discover)
    scripts.use(PacSource(discover=True))
    nursery.start_soon(scripts.run)
    assert await scripts.get(PacSource(discover=True)) == SCRIPT
    assert scripts.url == server.url("/wpad.dat")


async def test_without_a_place_to_look_wpad_says_so(nursery: trio.Nursery) -> None:
    async def discover() -> list[str]:
        return []

    scripts = PacScripts(discover)
    source = PacSource(discover=True)
    scripts.use(source)
    nursery.start_soon(scripts.run)
    assert await scripts.get(source) is None
    assert scripts.problem == "WPAD found nothing: the host knows no domain to look in"


async def test_a_script_in_the_settings_needs_no_fetch() -> None:
    scripts = PacScripts()
    source = PacSource(script=SCRIPT)
    scripts.use(source)
    assert await scripts.get(source) == SCRIPT
    assert await scripts.get(PacSource("http://other/")) is None
    scripts.use(None)
    assert scripts.script is None


async def test_each_domain_may_have_a_script_of_its_own(nursery: trio.Nursery, tmp_path: Path) -> None:
    sources = []
    for name in ("one", "two"):
        file = tmp_path / name
        file.write_text(SCRIPT.replace("a:1", f"{name}:1"))
        sources.append(PacSource(str(file)))
    library = PacLibrary(PacScripts)
    library.use(sources[:1])
    nursery.start_soon(library.run)
    runner = PacRunner(library.get, no_names)
    assert await runner.find_proxy(sources[0], "http://x/", "x") == (parse_server("one:1"),)
    assert await runner.find_proxy(sources[1], "http://x/", "x") is None
    library.use(sources)
    for _ in range(2):
        assert await runner.find_proxy(sources[1], "http://x/", "x") == (parse_server("two:1"),)
        assert await runner.find_proxy(sources[0], "http://x/", "x") == (parse_server("one:1"),)
    library.use(sources[1:])
    assert await library.get(sources[0]) is None
    assert library.problems == []
    await runner.aclose()


def test_a_script_means_direct_where_its_list_is_empty() -> None:
    assert parse_result(" ; ") == (DIRECT,)
