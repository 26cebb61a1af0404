"""CONNECT and SOCKS: through proxies of each kind, and what their refusals become."""

from __future__ import annotations

import ssl

import pytest
import trio
import trustme

from netstack.proxy import socks, upstream
from tests.proxy.desk import REFUSED, VIA, Desk, Peer, Script, read_all, read_until

CONNECT = b"CONNECT web.test:443 HTTP/1.1\r\nHost: web.test:443\r\nUser-Agent: t/1\r\n\r\n"
OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


def echo(peers: list[Peer]) -> Script:
    async def script(stream: trio.SocketStream) -> None:
        while data := await stream.receive_some(65536):
            await stream.send_all(data.upper())
        await stream.send_all(b" BYE")

    return script


def proxy_script(answer: bytes, heads: list[bytes]) -> Script:
    """A proxy that answers CONNECT so, and then echoes."""

    async def script(stream: trio.SocketStream) -> None:
        heads.append(await Peer(script).head(stream))
        await stream.send_all(answer)
        if b" 200 " in answer:
            await echo([])(stream)

    return script


async def test_a_tunnel_carries_bytes_both_ways_and_its_ends(desk: Desk) -> None:
    await desk.peer("web.test", echo([]))
    guest = desk.guest()
    await guest.send_all(CONNECT + b"early")
    assert await read_until(guest, b"EARLY") == OPEN + b"EARLY"
    await guest.send_all(b"late")
    assert await read_until(guest, b"LATE") == b"LATE"
    await guest.send_eof()
    assert await read_all(guest) == b" BYE"
    assert desk.asked == [("https", "web.test", 443, "https://web.test:443/")]
    record = desk.proxy.records.recent()[0]
    assert (record["kind"], record["host"], record["route"], record["status"]) == ("connect", "web.test", "direct", 200)


async def test_connect_goes_on_to_the_proxy_by_name_with_the_hosts_credentials(desk: Desk) -> None:
    heads: list[bytes] = []
    await desk.peer("proxy.test", proxy_script(OPEN + b"greeting", heads))
    desk.via("http://user:geheim@proxy.test:3128")
    guest = desk.guest()
    await guest.send_all(CONNECT[:-2] + b"Proxy-Authorization: Basic Z3Vlc3Q=\r\nCookie: no\r\n\r\n")
    assert await read_until(guest, b"greeting") == OPEN + b"greeting"
    assert heads[0].startswith(b"CONNECT web.test:443 HTTP/1.1\r\nHost: web.test:443\r\n")
    assert b"User-Agent: t/1" in heads[0] and b"Via: " + VIA in heads[0]
    assert heads[0].count(b"Proxy-Authorization: Basic dXNlcjpnZWhlaW0=") == 1
    assert b"Z3Vlc3Q=" not in heads[0] and b"Cookie" not in heads[0]
    assert desk.dialled == [("proxy.test", 3128)]
    assert "geheim" not in str(desk.proxy.records.recent())


async def test_a_proxy_behind_tls_is_checked_and_used(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("proxy.test").configure_cert(server)
    plain = proxy_script(OPEN, [])

    async def script(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, server, server_side=True, https_compatible=True)
        await plain(secured)  # type: ignore[arg-type]

    await desk.peer("proxy.test", script)
    desk.names["other.test"] = desk.names["proxy.test"]
    with authority.cert_pem.tempfile() as path:
        monkeypatch.setenv("SSL_CERT_FILE", path)
        desk.via("https://proxy.test")
        guest = desk.guest()
        await guest.send_all(CONNECT + b"hello")
        assert await read_until(guest, b"HELLO") == OPEN + b"HELLO"
        desk.via("https://other.test")
        answer = await desk.ask(CONNECT)
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"no TLS with the proxy https://other.test:443" in answer
    assert b"ostname mismatch" in answer
    assert desk.counters["proxy_relayed"] == 1


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    (
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\n<html>", 403, b"refused the connection with status 403"),
        (b"HTTP/1.1 503 Nope\r\n\r\n", 503, b"refused the connection with status 503"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login.test/\r\nContent-Length: 0\r\n\r\n", 502, b"with status 302"),
        (b"SSH-2.0-x\r\n", 502, b"does not speak HTTP"),
        (b"", 502, b"does not speak HTTP"),
        (b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\nFFFFF\r\n" + b"x" * 300_000, 403, b"403"),
    ),
)
async def test_a_refusal_of_the_proxy_is_told_without_its_page(
    desk: Desk, answer: bytes, status: int, words: bytes
) -> None:
    await desk.peer("proxy.test", proxy_script(answer, []))
    desk.via("http://proxy.test")
    told = await desk.ask(CONNECT)
    assert told.startswith(b"HTTP/1.1 %d " % status)
    assert words in told
    assert b"<html>" not in told


async def test_a_refusal_is_an_answer_and_no_other_way_is_tried(desk: Desk) -> None:
    await desk.peer("proxy.test", proxy_script(b"HTTP/1.1 403 No\r\n\r\n", []))
    web = await desk.peer("web.test", echo([]))
    desk.via("http://proxy.test", "")
    assert (await desk.ask(CONNECT)).startswith(b"HTTP/1.1 403")
    assert web.connections == 0


async def test_a_proxy_that_is_down_gives_way_to_going_direct(desk: Desk) -> None:
    desk.names["proxy.test"] = REFUSED
    await desk.peer("web.test", echo([]))
    desk.via("http://proxy.test", "")
    guest = desk.guest()
    await guest.send_all(CONNECT + b"x")
    await read_until(guest, b"X")


async def test_a_proxy_that_says_nothing_is_a_504(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "TUNNEL_TIMEOUT", 0.05)

    async def script(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    await desk.peer("proxy.test", script)
    desk.via("http://proxy.test")
    assert b"504 Gateway Timeout: the proxy http://proxy.test:80 does not answer" in await desk.ask(CONNECT)


async def test_a_407_goes_to_the_guest_only_where_the_host_has_no_credentials(desk: Desk) -> None:
    heads: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        heads.append(await Peer(script).head(stream))
        await stream.send_all(
            b"HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nX-Secret: 1\r\nContent-Length: 4\r\n\r\nfour"
        )
        heads.append(await Peer(script).head(stream))
        await stream.send_all(OPEN)
        await echo([])(stream)

    proxy = await desk.peer("proxy.test", script)
    desk.via("http://proxy.test")
    guest = desk.guest()
    await guest.send_all(CONNECT)
    answer = await read_until(guest, b"four")
    assert b"407" in answer and b"Proxy-Authenticate: NTLM\r\n" in answer and b"X-Secret" not in answer
    await guest.send_all(CONNECT[:-2] + b"Proxy-Authorization: NTLM abc\r\n\r\n")
    await read_until(guest, OPEN)
    await guest.send_all(b"in")
    await read_until(guest, b"IN")
    assert b"Proxy-Authorization: NTLM abc" in heads[1]
    assert proxy.connections == 1  # NTLM belongs to the connection
    desk.via("http://user:geheim@proxy.test")
    answer = await desk.ask(CONNECT)
    assert answer.startswith(b"HTTP/1.1 502") and b"Proxy-Authenticate" not in answer and b"geheim" not in answer


# ---- SOCKS -----------------------------------------------------------------------------------------------------------

HELLO = b"\5\1\0"
BY_NAME = b"\5\1\0\3\10web.test\1\xbb"


@pytest.mark.parametrize(
    ("url", "words"),
    (
        (
            "socks5h://%C3%BCser:geheim@proxy.test",
            "has a letter in its user that is not ASCII, which SOCKS cannot send",
        ),
        ("socks5://user:geheim%E2%82%AC@proxy.test", "has a letter in its password that is not ASCII"),
        ("socks4://%C3%BCser@proxy.test", "has a letter in its user that is not ASCII"),
        (f"socks5h://user:{'geheim' * 50}@proxy.test", "has a password of more than 255 characters"),
    ),
)
async def test_credentials_that_socks_cannot_send_are_told_in_words(desk: Desk, url: str, words: str) -> None:
    desk.via(url)
    answer = (await desk.ask(CONNECT)).decode()
    assert answer.startswith("HTTP/1.1 502") and words in answer
    assert f"the proxy {url.partition(':')[0]}://***@proxy.test:1080 has" in answer
    for text in (answer, str(desk.proxy.records.recent())):
        assert not any(secret in text for secret in ("Unicode", "geheim", "ü", "€"))
    assert desk.dialled == []  # nobody was asked


async def test_socks_connects_by_name_and_never_resolves_it(desk: Desk) -> None:
    heads: list[bytes] = []
    await desk.peer("proxy.test", proxy_script(OPEN, heads))
    desk.via("http://proxy.test")
    guest = desk.guest("socks")
    await guest.send_all(HELLO + BY_NAME + b"early")
    assert await read_until(guest, b"EARLY") == b"\5\0" + socks.write_reply(0) + b"EARLY"
    assert heads[0].startswith(b"CONNECT web.test:443 ")
    assert desk.dialled == [("proxy.test", 80)]


@pytest.mark.parametrize(
    ("address", "host"),
    ((b"\1\xcb\0\x71\7", "203.0.113.7"), (b"\4" + bytes(15) + b"\7", "::7")),
)
async def test_socks_connects_by_address(desk: Desk, address: bytes, host: str) -> None:
    await desk.peer(host, echo([]))
    guest = desk.guest("socks")
    await guest.send_all(HELLO + b"\5\1\0" + address + b"\0\x16")
    await guest.send_all(b"x")
    await read_until(guest, b"X")
    assert desk.asked == [("tcp", host, 22, desk.asked[0][3])]


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    (
        (b"\5\1\2", b"\5\xff", "proxy_socks_method"),
        (HELLO + b"\5\3\0\1\0\0\0\0\0\0", b"\5\0" + socks.write_reply(7), "proxy_socks_command"),  # UDP ASSOCIATE
        (HELLO + b"\5\2\0\1\0\0\0\0\0\1", b"\5\0" + socks.write_reply(7), "proxy_socks_command"),  # BIND
        (HELLO + b"\5\1\0\5\0\0\0\0\0\1", b"\5\0" + socks.write_reply(8), "proxy_socks_type"),
        (HELLO + b"\5\1\0\3\3a b\0\1", b"\5\0" + socks.write_reply(1), "proxy_bad_target"),
        (HELLO + b"\5\1\0\1\1\1\1\1\0\0", b"\5\0" + socks.write_reply(1), "proxy_bad_target"),
        (b"\4\1\0\x50\1\1\1\1\0", b"\0\x5b\0\0\0\0\0\0", "proxy_socks4"),
        (b"\x16\3\1", b"", "proxy_socks_malformed"),
    ),
)
async def test_what_is_no_socks_connect_gets_a_clean_no(
    desk: Desk, request_: bytes, answer: bytes, reason: str
) -> None:
    assert await desk.ask(request_, "socks") == answer
    assert desk.counters[reason] == 1
    assert desk.dialled == []


async def test_http_at_the_socks_port_is_told_where_it_is(desk: Desk) -> None:
    assert b"this is a SOCKS 5 proxy" in await desk.ask(b"GET http://web.test/ HTTP/1.1\r\n\r\n", "socks")


@pytest.mark.parametrize(("failure", "code"), ((None, 4), (REFUSED, 5)))
async def test_socks_says_why_it_failed(desk: Desk, failure: OSError | None, code: int) -> None:
    if failure is not None:
        desk.names["web.test"] = failure
    assert await desk.ask(HELLO + BY_NAME, "socks") == b"\5\0" + socks.write_reply(code)


def socks_script(log: list[bytes], *, reply: int = 0, method: int = 0) -> Script:
    """A SOCKS 5 server: keeps the request, and then echoes."""

    async def take(stream: trio.SocketStream, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += await stream.receive_some(count - len(data)) or b"!"
        return data

    async def script(stream: trio.SocketStream) -> None:
        await take(stream, (await take(stream, 2))[1])
        await stream.send_all(bytes((5, method)))
        if method == 2:
            _, length = await take(stream, 2)
            user = await take(stream, length)
            log.append(user + b":" + await take(stream, (await take(stream, 1))[0]))
            await stream.send_all(b"\1\0")
        head = await take(stream, 4)
        log.append(head[3:] + await take(stream, 6 if head[3] == 1 else 11))
        await stream.send_all(socks.write_reply(reply))
        await echo([])(stream)

    return script


async def test_an_upstream_of_socks5h_gets_the_name_and_one_of_socks5_an_address(desk: Desk) -> None:
    log: list[bytes] = []
    await desk.peer("proxy.test", socks_script(log))
    for scheme in ("socks5h", "socks5"):
        desk.via(f"{scheme}://proxy.test:1080")
        guest = desk.guest()
        await guest.send_all(CONNECT + b"x")
        await read_until(guest, b"X")
    assert log == [b"\3\10web.test\1\xbb", b"\1\xcb\0\x71\t\1\xbb"]


async def test_an_upstream_of_socks_gets_the_hosts_credentials(desk: Desk) -> None:
    log: list[bytes] = []
    await desk.peer("proxy.test", socks_script(log, method=2))
    desk.via("socks5h://user:geheim@proxy.test")
    guest = desk.guest()
    await guest.send_all(CONNECT + b"x")
    await read_until(guest, b"X")
    assert log[0] == b"user:geheim"
    assert "geheim" not in str(desk.proxy.records.recent())


@pytest.mark.parametrize(("reply", "status", "words"), ((5, 502, b"was refused"), (2, 403, b"does not allow it")))
async def test_a_refusal_of_a_socks_upstream_is_told(desk: Desk, reply: int, status: int, words: bytes) -> None:
    await desk.peer("proxy.test", socks_script([], reply=reply))
    desk.via("socks5h://proxy.test")
    answer = await desk.ask(CONNECT)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and words in answer


async def test_a_plain_request_goes_through_socks_in_origin_form(desk: Desk) -> None:
    desk.via("socks5h://proxy.test")
    log: list[bytes] = []
    await desk.peer("proxy.test", socks_script(log))
    guest = desk.guest()
    await guest.send_all(b"GET http://web.test/a HTTP/1.1\r\nHost: web.test\r\n\r\n")
    answer = await read_all(guest)  # the echo of the request is no HTTP
    assert b"502" in answer
    assert log == [b"\3\10web.test\0P"]


async def test_garbage_of_a_socks_upstream_is_a_502(desk: Desk) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    await desk.peer("proxy.test", script)
    desk.via("socks5h://user:geheim@proxy.test")
    answer = await desk.ask(CONNECT)
    assert answer.startswith(b"HTTP/1.1 502") and b"geheim" not in answer
    assert desk.counters["proxy_internal_error"] == 0
