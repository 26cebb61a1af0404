"""/v1/forwards in front of a real network: what is made, what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio

import netstack
from netstack.control.api import make_app
from netstack.control.log import Log

SETTINGS: dict[str, Any] = {"network": {"subnet": "10.98.8.0/24"}, "dns": {"source": "none", "mdns": False}}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with netstack.open_network(netstack.Config(**SETTINGS), log=Log("error")) as network:
        transport = httpx.ASGITransport(make_app(network.api, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://n") as http:
            yield http


async def listed(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get("/v1/forwards")).json()["forwards"]
    return found


async def test_a_forward_is_made_shown_and_ended(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/forwards", json={"spec": "0:web:80", "description": "the web site"})
    forward = made.json()
    assert made.status_code == 201
    assert forward["spec"] == f"127.0.0.1:{forward['host_port']}:web:80"
    assert (forward["owner"], forward["description"], forward["guest"]) == ("user", "the web site", "web")
    assert (await client.get(made.headers["location"])).json() == forward
    assert await listed(client) == [forward]
    # The port is open when the answer is there.
    socket.create_connection(("127.0.0.1", forward["host_port"])).close()
    ended = await client.delete(made.headers["location"])
    assert (ended.status_code, ended.content) == (204, b"")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", forward["host_port"]))
    for method in ("GET", "DELETE"):
        gone = await client.request(method, made.headers["location"])
        assert (gone.status_code, gone.json()) == (404, {"error": f"there is no forward {forward['id']!r}"})


async def test_a_port_that_is_taken_says_by_whom(client: httpx.AsyncClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = await client.post("/v1/forwards", json={"spec": f"{port}:80"})
        assert answer.status_code == 409
        if sys.platform == "linux":
            assert str(os.getpid()) in answer.json()["error"]
        another = await client.post("/v1/forwards", json={"spec": f"{port}:80", "on_conflict": "next"})
        assert another.status_code == 201
        assert another.json()["host_port"] > port
    assert len(await listed(client)) == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    (
        ({}, 400, "spec is missing"),
        ({"spec": None}, 400, "spec is missing"),
        ({"spec": 8080}, 400, "spec: must be text"),
        ({"spec": "8080"}, 400, "8080: which port of the host?"),
        ({"spec": "8080:80:90:100:110"}, 400, "8080:80"),
        ({"spec": "0:80/sctp"}, 400, "a forward is of /tcp or /udp"),
        ({"spec": "0:10.98.8.2:80"}, 400, "10.98.8.2 is the gateway's own address"),
        ({"spec": "0:8.8.8.8:53"}, 400, "8.8.8.8 is no guest's address"),
        ({"spec": "192.0.2.77:0:80"}, 400, "the host does not have this address"),
        ({"spec": "unix:/nowhere/at/all:80"}, 400, "its directory is not there"),
        ({"spec": "x" * 600}, 400, "at most 512 characters"),
        ({"spec": "0:80", "description": "x" * 300}, 400, "at most 256 characters"),
        ({"spec": "0:80", "on_conflict": "fight"}, 400, "on_conflict: must be one of error, next, loopback"),
        ({"spec": "0:80", "source": "mars"}, 400, "source: must be one of caller, gateway"),
        ({"spec": "0:80", "guest": "web"}, 400, "unknown key 'guest'; there are: spec"),
    ),
)
async def test_what_cannot_be_is_refused_with_words_and_leaves_nothing(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await client.post("/v1/forwards", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert await listed(client) == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    (
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b'"0:80"', "application/json", 400),
        (b'{"spec": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"spec": "0:80", "description": "\\ud800"}', "application/json", 400),  # half of a character, and the same
        (b'{"spec": "0:80", "description": "\xed\xa0\x80"}', "application/json", 400),  # in bytes that are no UTF-8
        (b'{"spec": "0:80"}', "text/plain", 415),  # what a page in a browser may send without asking
        (b'{"spec": "0:80"}', "application/x-www-form-urlencoded", 415),
        (b'{"spec": "0:80"}', "", 415),
    ),
)
async def test_only_json_that_says_so_is_read(
    client: httpx.AsyncClient, content: bytes, kind: str, status: int
) -> None:
    answer = await client.post("/v1/forwards", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert await listed(client) == []


async def test_a_body_that_does_not_come_is_not_waited_for(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netstack.control.bodies.BODY_SECONDS", 0.1)

    async def begun() -> AsyncIterator[bytes]:
        yield b'{"spec":'
        await trio.sleep_forever()

    with trio.fail_after(20):
        answer = await client.post("/v1/forwards", content=begun(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (408, {"error": "the body did not come within 0 seconds"})
    assert await listed(client) == []
