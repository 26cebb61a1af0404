"""gvproxy's endpoints, asked as its clients ask, in front of a real network."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import h11
import pytest
import trio

import netstack
from netstack.control.api import listen_tcp, listen_unix, serve_api
from netstack.control.gvproxy import GoError, split_host_port
from netstack.control.log import Log
from tests.control.gvproxy_exchanges import EXCHANGES, TEXT

# Tests open and close real ports of the loopback, and none of them leads anywhere.
SETTINGS = {"network": {"subnet": "192.168.5.0/24"}, "dns": {"source": "none", "mdns": False}}


@pytest.fixture
async def api(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[netstack.Network]:
    # Whatever the machine that runs the tests uses itself, the answers have these addresses.
    monkeypatch.setattr("netstack.host.subnets.list_taken", list)
    opened = netstack.open_network(netstack.Config(**SETTINGS), log=Log("error"))
    async with opened as network, trio.open_nursery() as serving:
        await serving.start(partial(serve_api, network.api, [listen_unix(str(tmp_path / "a"))], log=Log("error")))
        yield network
        serving.cancel_scope.cancel()


async def exchange(path: Path, request: bytes) -> tuple[h11.Response, bytes]:
    """Send bytes, read one answer, by an HTTP implementation that is neither the server's nor ours."""
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(request)
        return await read_answer(stream, b"POST" if request.startswith(b"POST") else b"GET")


async def read_answer(stream: trio.abc.ReceiveStream, method: bytes) -> tuple[h11.Response, bytes]:
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
    reader.send(h11.EndOfMessage())
    head, body = None, b""
    with trio.fail_after(20):
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(bytes(await stream.receive_some()))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                assert head is not None, event
                return head, body


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


async def test_recorded_exchanges_are_answered_byte_for_byte(api: netstack.Network, tmp_path: Path) -> None:
    first, second = free_ports(2)

    def fill(text: str) -> str:
        return text.replace("PORT1", str(first)).replace("PORT2", str(second)).replace("FOLDER", str(tmp_path))

    for each in EXCHANGES:
        asked = each._replace(body=fill(each.body))
        head, body = await exchange(tmp_path / "a", asked.request())
        got = (head.status_code, body.decode())
        wanted = fill(each.answer)
        if each.answer.startswith('[{"local"'):
            # The order is that of the texts, and this path's depends on the machine.
            assert sorted(got[1].strip("[]\n").split("},")) == sorted(wanted.strip("[]\n").split("},")), each
        else:
            assert got == (each.status, wanted), each
        headers = dict(head.headers)
        assert headers.get(b"content-length") == str(len(body)).encode()
        if body:
            assert headers[b"content-type"] == TEXT.encode(), each
            assert headers.get(b"x-content-type-options") == (None if each.status == 200 else b"nosniff"), each
        else:
            assert b"content-type" not in headers
    assert len(api.forwards) == 0


async def test_what_is_refused_leaves_no_port_open(api: netstack.Network, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for remote in ("192.168.9.9:80", "192.168.5.2:80", "8.8.8.8:53", ":80", "no name:80"):
        body = f'{{"local":"127.0.0.1:{port}","remote":"{remote}"}}'
        head, _ = await exchange(tmp_path / "a", post("/services/forwarder/expose", body))
        assert head.status_code in (400, 500), remote
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert list(api.forwards) == []


@pytest.mark.parametrize(
    ("body", "words"),
    (
        ('{"local":' + "9" * 5000 + "}", "json: cannot unmarshal number into Go struct field ExposeRequest.local"),
        (r'{"local":":1","remote":"1.2.3.4:80","protocol":"\ud800"}', "unknown protocol \ufffd"),
        ('{"local":"/x","remote":"tcp://[x","protocol":"unix"}', "address [x: missing port in address"),
        (r'{"local":"/x","remote":"tcp://a\u2100:80","protocol":"unix"}', "unix:/x:a\u2100:80: "),
        (
            '{"local":":0","remote":"192.168.9.9:' + "0" * 5000 + '80"}',
            "[::]:0:192.168.9.9:80: 192.168.9.9 is no guest's",
        ),
        ('{"local":":' + "0" * 5000 + '80","remote":"192.168.9.9:80"}', "[::]:80:192.168.9.9:80: 192.168.9.9 is no"),
    ),
)
async def test_what_only_python_trips_over_is_answered_too(
    api: netstack.Network, tmp_path: Path, body: str, words: str
) -> None:
    _, answer = await exchange(tmp_path / "a", post("/services/forwarder/expose", body))
    assert answer.decode().startswith(words)
    assert list(api.forwards) == []


async def test_names_that_were_added_are_answered_to_guests(api: netstack.Network, tmp_path: Path) -> None:
    zone = '{"Name":"crc.testing.","Records":[{"Name":"api","IP":"192.168.5.15"},{"Name":"api","IP":"1.1.1.1"}],'
    await exchange(tmp_path / "a", post("/services/dns/add", zone + '"DefaultIP":"192.168.5.16"}'))
    for name, address in (("api.crc.testing", "c0a8050f"), ("other.crc.testing", "c0a80510")):
        assert address in (await api.dns_view.query(name))["answer"]
    await exchange(tmp_path / "a", post("/services/dns/add", '{"Name":"crc.testing.","Records":[]}'))
    assert "c0a80510" not in (await api.dns_view.query("other.crc.testing"))["answer"]


async def test_over_tcp_a_remote_without_address_is_the_callers(
    api: netstack.Network, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """As podman in a guest does it; here the caller is no guest, and so it is told."""
    listener = listen_tcp("127.0.0.1", 0)
    await nursery.start(partial(serve_api, api.api, [listener]))
    (port,) = free_ports(1)
    stream = await trio.open_tcp_stream("127.0.0.1", listener.port)
    async with stream:
        request = post("/services/forwarder/expose", f'{{"local":":{port}","remote":":80"}}', listener.token)
        await stream.send_all(request)
        head, body = await read_answer(stream, b"POST")
    assert head.status_code == 500
    assert b"127.0.0.1" in body
    nursery.cancel_scope.cancel()


async def test_a_forward_of_others_is_listed_and_can_be_removed(api: netstack.Network, tmp_path: Path) -> None:
    forward = api.forwards.add("127.0.0.1:0:192.168.5.15:80")
    local = f"127.0.0.1:{forward.spec.host_port}"
    _, body = await exchange(tmp_path / "a", b"GET /services/forwarder/all HTTP/1.1\r\nHost: base\r\n\r\n")
    assert body.decode() == f'[{{"local":"{local}","remote":"192.168.5.15:80","protocol":"tcp"}}]\n'
    head, _ = await exchange(tmp_path / "a", post("/services/forwarder/unexpose", f'{{"local":"{local}"}}'))
    assert head.status_code == 200
    assert forward.closed
    # And one that went away by another door is not found any more.
    (port,) = free_ports(1)
    body_text = f'{{"local":":{port}","remote":"192.168.5.15:80"}}'
    await exchange(tmp_path / "a", post("/services/forwarder/expose", body_text))
    next(iter(api.forwards)).close()
    head, body = await exchange(tmp_path / "a", post("/services/forwarder/unexpose", body_text))
    assert (head.status_code, body) == (500, b"proxy not found\n")
    head, _ = await exchange(tmp_path / "a", post("/services/forwarder/expose", body_text))
    assert head.status_code == 200


async def test_a_long_body_is_refused(api: netstack.Network, tmp_path: Path) -> None:
    head, body = await exchange(tmp_path / "a", post("/services/forwarder/expose", " " * 100_000))
    assert (head.status_code, body) == (400, b"http: request body too large\n")


@pytest.mark.parametrize(
    ("text", "parts"),
    (
        ("127.0.0.1:80", ("127.0.0.1", "80")),
        (":80", ("", "80")),
        ("[::1]:80", ("::1", "80")),
        ("[]:", ("", "")),
        ("", "missing port in address"),
        ("a", "address a: missing port in address"),
        ("[::1]", "address [::1]: missing port in address"),
        ("[::1", "address [::1: missing ']' in address"),
        ("::1:80", "address ::1:80: too many colons in address"),
        ("[::1]:80:90", "address [::1]:80:90: too many colons in address"),
        ("a[:80", "address a[:80: unexpected '[' in address"),
        ("a]:80", "address a]:80: unexpected ']' in address"),
        ("[a[]:80", "address [a[]:80: unexpected '[' in address"),
    ),
)
def test_hosts_and_ports_are_split_as_go_does(text: str, parts: tuple[str, str] | str) -> None:
    def split() -> object:
        try:
            return split_host_port(text)
        except GoError as error:
            return str(error)

    assert split() == parts


def post(path: str, body: str, token: str | None = None) -> bytes:
    auth = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"POST {path} HTTP/1.1\r\nHost: base\r\n{auth}Content-Length: {len(body)}\r\n\r\n{body}".encode()
