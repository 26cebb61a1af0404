"""DNS over TLS and HTTPS, against real TLS with certificates of a CA that the test made."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.trio
import pytest
import trio
import trustme

from netstack.dns.routes import Server
from netstack.dns.upstream import Upstream
from tests.dns.nameserver import TestNameserver, address_of, make_query
from tests.dns.relay import Relay, errors_of, framed, receive, scope


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, str]:
    """A CA and its certificate's file."""
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return ca, str(path)


@contextlib.asynccontextmanager
async def open_tls(ca: trustme.CA, *names: str, port: int = 0) -> AsyncIterator[TestNameserver]:
    """A nameserver with TLS at a free port of 127.0.0.1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*names).configure_cert(context)
    (plain,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    listener = trio.SSLListener(plain, context, https_compatible=True)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        await udp.bind(plain.socket.getsockname())
        server = TestNameserver(udp, None, lambda query: [address_of(query)])

        async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await server.serve_one(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_udp)
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            yield server
            nursery.cancel_scope.cancel()


def tls(server: TestNameserver, name: str = "", *options: str) -> Server:
    return Server("127.0.0.1", server.port, "tls", name, options=frozenset(options))


async def test_dns_over_tls(nursery: trio.Nursery, authority: tuple[trustme.CA, str]) -> None:
    ca, ca_file = authority
    async with open_tls(ca, "dns.example.test") as server:
        relay = Relay(nursery, scope(tls(server, "dns.example.test")), ca_file=ca_file)
        stream = relay.connect()
        for number in range(10):
            await stream.send_all(framed(make_query(f"n{number}.test", ident=number)))
        assert len(await receive(stream, 10)) == 10
        assert (await relay.ask(make_query("udp.test"))).answer
        assert (len(server.tcp_queries), server.connections) == (11, 1)
        assert not server.udp_queries


async def test_without_a_name_the_certificate_is_for_the_address(
    nursery: trio.Nursery, authority: tuple[trustme.CA, str]
) -> None:
    ca, ca_file = authority
    async with open_tls(ca, "127.0.0.1") as server:
        assert (await Relay(nursery, scope(tls(server)), ca_file=ca_file).ask(make_query())).answer
    async with open_tls(ca, "dns.example.test") as server:
        answer = await Relay(nursery, scope(tls(server)), ca_file=ca_file).ask(make_query(use_edns=0))
        assert answer.rcode() == 2


@pytest.mark.parametrize("fault", ("another name", "another authority"))
async def test_a_wrong_certificate_is_no_answer(
    nursery: trio.Nursery, authority: tuple[trustme.CA, str], fault: str
) -> None:
    ca, ca_file = authority
    maker = trustme.CA() if fault == "another authority" else ca
    async with open_tls(maker, "dns.example.test") as server:
        name = "other.example.test" if fault == "another name" else "dns.example.test"
        answer = await Relay(nursery, scope(tls(server, name)), ca_file=ca_file).ask(make_query(use_edns=0))
        assert answer.rcode() == 2
        ((code, text),) = errors_of(answer)
        assert (code, "certificate verify failed" in text) == (23, True)
        assert not server.tcp_queries
        assert not server.udp_queries


async def test_opportunistic_takes_any_certificate(nursery: trio.Nursery, authority: tuple[trustme.CA, str]) -> None:
    async with open_tls(trustme.CA(), "else.test") as server:
        relay = Relay(nursery, scope(tls(server, "dns.example.test", "opportunistic")), ca_file=authority[1])
        assert (await relay.ask(make_query())).answer
        assert len(server.tcp_queries) == 1


async def test_opportunistic_without_tls_is_in_the_clear(
    nursery: trio.Nursery, authority: tuple[trustme.CA, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_tls(trustme.CA(), "else.test") as server:
        # Where the clear one is: port 53 of the same address, which a test cannot have.
        clear = Server("127.0.0.1", server.port)
        monkeypatch.setattr("netstack.dns.race._in_the_clear", lambda _: clear)
        closed = Server("127.0.0.1", 1, "tls", options=frozenset({"opportunistic"}))
        relay = Relay(nursery, scope(closed), ca_file=authority[1])
        assert (await relay.ask(make_query("a.test"))).answer
        assert (await relay.ask(make_query("b.test"))).answer
        assert len(server.udp_queries) == 2
        assert relay.upstream.health.of(closed).queries == 1  # for a while TLS is not tried again


async def test_strict_never_asks_in_the_clear(nursery: trio.Nursery, authority: tuple[trustme.CA, str]) -> None:
    async with open_tls(authority[0], "else.test") as server:
        relay = Relay(nursery, scope(tls(server, "dns.example.test")), ca_file=authority[1])
        assert (await relay.ask(make_query())).rcode() == 2
        assert not server.udp_queries


class Web:
    """An ASGI application that answers DNS queries."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.queries: list[bytes] = []
        self.status = 200
        self.long = False

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.requests.append(scope)
        self.queries.append(body)
        headers = [(b"content-type", b"application/dns-message")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(70000) if self.long else address_of(body)})


@contextlib.asynccontextmanager
async def open_https(ca: trustme.CA, tmp_path: Path, *names: str, http2: bool = True) -> AsyncIterator[tuple[Web, int]]:
    certificate = ca.issue_cert(*names)
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    config = hypercorn.config.Config()
    config.certfile, config.keyfile = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    config.alpn_protocols = ["h2", "http/1.1"] if http2 else ["http/1.1"]
    config.errorlog = None
    config.graceful_timeout = 0.1
    web = Web()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        config.bind = [f"fd://{sock.fileno()}"]
        async with trio.open_nursery() as nursery:
            stop = trio.Event()

            async def serve(task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
                await hypercorn.trio.serve(web, config, shutdown_trigger=stop.wait, task_status=task_status)  # type: ignore[arg-type]

            await nursery.start(serve)
            port = sock.getsockname()[1]
            sock.detach()  # hypercorn closes it
            yield web, port
            stop.set()


@pytest.mark.parametrize("http2", (True, False))
async def test_dns_over_https(
    nursery: trio.Nursery, authority: tuple[trustme.CA, str], tmp_path: Path, http2: bool
) -> None:
    ca, ca_file = authority
    async with open_https(ca, tmp_path, "dns.example.test", http2=http2) as (web, port):
        server = Server("127.0.0.1", port, "https", f"https://dns.example.test:{port}/q")
        relay = Relay(nursery, scope(server), ca_file=ca_file)
        for number in range(3):
            answer = await relay.ask(make_query(f"n{number}.test", ident=7))
            assert answer.answer[0][0].to_text() == "192.0.2.1"
        assert {query[:2] for query in web.queries} == {b"\0\0"}  # RFC 8484 4.1
        request = web.requests[0]
        assert (request["http_version"], request["method"], request["path"]) == ("2" if http2 else "1.1", "POST", "/q")
        headers = dict(request["headers"])
        assert headers[b"content-type"] == headers[b"accept"] == b"application/dns-message"
        assert len({request["client"] for request in web.requests}) == 1  # one connection
        await relay.upstream.https.retain(())


@pytest.mark.parametrize("fault", ("status", "length", "certificate"))
async def test_what_goes_wrong_with_https_is_servfail_and_says_why(
    nursery: trio.Nursery, authority: tuple[trustme.CA, str], tmp_path: Path, fault: str
) -> None:
    ca, ca_file = authority
    async with open_https(ca, tmp_path, "dns.example.test") as (web, port):
        web.status = 503 if fault == "status" else 200
        web.long = fault == "length"
        name = "other.test" if fault == "certificate" else "dns.example.test"
        relay = Relay(
            nursery, scope(Server("127.0.0.1", port, "https", f"https://{name}:{port}/dns-query")), ca_file=ca_file
        )
        answer = await relay.ask(make_query(use_edns=0))
        assert answer.rcode() == 2
        assert [code for code, _ in errors_of(answer)] == [23]
        assert bool(web.queries) == (fault != "certificate")
        await relay.upstream.https.retain(())


async def test_two_changes_of_the_network_close_a_connection_once(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    class Client:
        closed = 0

        def __init__(self, error: Exception | None, seconds: float) -> None:
            self.error = error
            self.seconds = seconds

        async def aclose(self) -> None:
            self.closed += 1
            await trio.sleep(self.seconds)
            if self.error is not None:
                raise self.error

    https = Upstream(nursery).https
    clients = [Client(None, 0.1), Client(OSError("a bug"), 0.1), Client(None, 1000), Client(None, 0)]
    https._clients = {Server(str(n), transport="https"): client for n, client in enumerate(clients)}  # type: ignore[misc]
    began = trio.current_time()
    async with trio.open_nursery() as changes:
        changes.start_soon(https.retain, ())
        changes.start_soon(https.retain, ())
    assert [client.closed for client in clients] == [1, 1, 1, 1]
    assert trio.current_time() - began < 2
