"""The DNS part of the API, and the numbers for Prometheus: asked over HTTP, in front of a real network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dns.message
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import netstack
from netstack.control.api import listen_unix, make_app, serve_api
from netstack.control.bodies import MAX_BODY
from netstack.control.log import Log
from tests.dns.nameserver import TestNameserver, open_nameserver

if TYPE_CHECKING:
    import trio

SUBNET = {"subnet": "10.98.7.0/24"}


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, netstack.Network]]:
    """A network with the API in front of it, in this process."""
    tmp_path.joinpath("hosts").write_text("192.0.2.9 nas.example\n")
    table = {"source": "none", "hosts_file": tmp_path / "hosts", "mdns": False, **settings}
    config = netstack.Config(network=SUBNET, dns=table)
    async with netstack.open_network(config, log=Log("error")) as network:
        transport = httpx.ASGITransport(make_app(network.api, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://netstack") as client:
            yield client, network


async def ask(client: httpx.AsyncClient, name: str, kind: str = "A") -> tuple[str, list[str]]:
    found = (await client.get("/v1/dns/query", params={"name": name, "type": kind})).raise_for_status().json()
    answer = dns.message.from_wire(bytes.fromhex(found["answer"]))
    return found["rcode"], [record.to_text() for rrset in answer.answer for record in rrset]


@pytest.fixture
async def nameserver() -> AsyncIterator[TestNameserver]:
    async with open_nameserver() as server:
        yield server


async def test_a_query_is_answered_as_for_a_guest_and_logged(tmp_path: Path, nameserver: TestNameserver) -> None:
    upstream = f"127.0.0.1:{nameserver.port}"
    async with running(tmp_path, upstreams=[upstream], hosts={"git": "www.example.com"}) as (client, _):
        assert await ask(client, "host.docker.internal") == ("NOERROR", ["10.98.7.2"])
        assert await ask(client, "nas.example") == ("NOERROR", ["192.0.2.9"])
        assert await ask(client, "nas.example", "AAAA") == ("NOERROR", [])
        assert await ask(client, "x.onion", "TYPE65") == ("NXDOMAIN", [])
        assert await ask(client, "www.example.com") == ("NOERROR", ["192.0.2.1"])
        assert await ask(client, "www.example.com") == ("NOERROR", ["192.0.2.1"])
        assert await ask(client, "git") == ("NOERROR", ["192.0.2.1"])
        state = (await client.get("/v1/dns")).json()
        logged = [(q["guest"], q["name"], q["type"], q["route"], q["rcode"], q["cached"]) for q in state["queries"]]
        assert logged[::-1][:6] == [
            ("api", "host.docker.internal", "A", "local", "NOERROR", False),
            ("api", "nas.example", "A", "local", "NOERROR", False),
            ("api", "nas.example", "AAAA", "local", "NOERROR", False),
            ("api", "x.onion", "HTTPS", "local", "NXDOMAIN", False),
            ("api", "www.example.com", "A", "settings", "NOERROR", False),
            ("api", "www.example.com", "A", "settings", "NOERROR", True),
        ]
        assert state["routes"][-1]["servers"] == [upstream]
        assert state["cache"]["entries"] == 1
        assert state["counters"]["dns_cache_hits"] >= 1
        assert state["local"]["hosts_file"]["names"] == 1
        # And all of it can be forgotten.
        for body, count in (({"name": "other.example"}, 0), ({"name": "WWW.Example.com."}, 1), ({}, 0)):
            assert (await client.post("/v1/dns/flush", json=body)).json() == {"flushed": count}
        await ask(client, "www.example.com")
        assert (await client.post("/v1/dns/flush", json={"scope": "settings"})).json() == {"flushed": 1}
        await ask(client, "www.example.com")
        assert (await client.post("/v1/dns/flush")).json() == {"flushed": 1}


async def test_no_more_than_1000_queries_are_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as (client, network):
        for _ in range(1010):
            await network.dns_view.query("localhost")
        assert len((await client.get("/v1/dns")).json()["queries"]) == 1000


async def test_without_any_upstream_the_answer_says_why(tmp_path: Path) -> None:
    async with running(tmp_path) as (client, _):
        found = (await client.get("/v1/dns/query", params={"name": "www.example.com"})).json()
        assert found["rcode"] == "SERVFAIL"
        answer = dns.message.from_wire(bytes.fromhex(found["answer"]))
        assert [option.to_text() for option in answer.options] == [
            "EDE 23 (Network Error): no nameserver for this name"
        ]


async def test_names_come_and_go(tmp_path: Path) -> None:
    async with running(tmp_path, hosts={"old.test": "192.0.2.1"}) as (client, _):
        body = {"app.test": "192.0.2.2", "*.app.test": ["192.0.2.3", "2001:db8::3"], "alias.test": "app.test"}
        assert (await client.post("/v1/dns/hosts", json=body)).json() == {
            "hosts": [
                *({"name": name, "value": value, "source": "api"} for name, value in body.items()),
                {"name": "old.test", "value": "192.0.2.1", "source": "config"},
            ]
        }
        assert await ask(client, "alias.test") == ("NOERROR", ["192.0.2.2"])
        assert await ask(client, "x.app.test", "AAAA") == ("NOERROR", ["2001:db8::3"])
        await client.post("/v1/dns/hosts", json=dict.fromkeys(body))
        assert (await client.get("/v1/dns/hosts")).json()["hosts"] == [
            {"name": "old.test", "value": "192.0.2.1", "source": "config"}
        ]


@pytest.mark.parametrize(
    ("method", "path", "how", "status", "words"),
    (
        ("GET", "/v1/dns/query", {}, 400, "say which name"),
        ("GET", "/v1/dns/query", {"params": {"name": "a..b"}}, 400, "'a..b' is no domain name"),
        ("GET", "/v1/dns/query", {"params": {"name": "a", "type": "bogus"}}, 400, "'bogus' is no type"),
        ("POST", "/v1/dns/query", {}, 405, ""),
        ("GET", "/v1/dns/flush", {}, 405, ""),
        ("POST", "/v1/dns/flush", {"json": {"scope": "nope"}}, 400, "no scope 'nope'"),
        ("POST", "/v1/dns/flush", {"json": {"scope": 5}}, 400, "takes"),
        ("POST", "/v1/dns/flush", {"json": {"other": "x"}}, 400, "takes"),
        ("POST", "/v1/dns/flush", {"json": []}, 400, "must be a JSON object"),
        ("POST", "/v1/dns/hosts", {}, 415, "send JSON"),
        ("POST", "/v1/dns/hosts", {"content": b"{}"}, 415, "send JSON"),
        ("POST", "/v1/dns/hosts", {"json": {"a..b": "192.0.2.1"}}, 400, "a..b: must be a host name"),
        ("POST", "/v1/dns/hosts", {"json": {"a.test": "192.0.2"}}, 400, "a.test: 192.0.2 is no address"),
        ("POST", "/v1/dns/hosts", {"json": {"a.test": 5}}, 400, "a.test: must be an address"),
        ("POST", "/v1/dns/hosts", {"json": {"a.test": [None]}}, 400, "a.test: must be an address"),
        ("POST", "/v1/dns/hosts", {"json": {"x.netstack.internal": "192.0.2.1"}}, 400, "guests'"),
        ("POST", "/v1/dns/hosts", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        (
            "POST",
            "/v1/dns/hosts",
            {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
            400,
            "",
        ),
    ),
)
async def test_what_cannot_be_done_is_refused_with_words(
    tmp_path: Path, method: str, path: str, how: dict[str, Any], status: int, words: str
) -> None:
    async with running(tmp_path) as (client, network):
        answer = await client.request(method, path, **how)
        assert answer.status_code == status
        assert words in answer.json()["error"]
        assert network.dns_view.hosts() == []


async def test_a_long_body_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with running(tmp_path) as (_, network):
        path = str(tmp_path / "api.sock")
        await nursery.start(partial(serve_api, network.api, [listen_unix(path)]))
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://netstack") as client:
            answer = await client.post("/v1/dns/hosts", content=b" " * (MAX_BODY + 1))
            assert (answer.status_code, answer.json()) == (413, {"error": f"at most {MAX_BODY} bytes"})
        nursery.cancel_scope.cancel()


async def test_one_bad_name_adds_none(tmp_path: Path) -> None:
    async with running(tmp_path) as (client, network):
        body = {"good.test": "192.0.2.1", "bad..test": "192.0.2.1"}
        assert (await client.post("/v1/dns/hosts", json=body)).status_code == 400
        assert network.dns_view.hosts() == []


async def test_the_paths_are_in_the_openapi_document(tmp_path: Path) -> None:
    async with running(tmp_path) as (client, _):
        paths = (await client.get("/openapi.json")).json()["paths"]
        for path in ("/v1/dns", "/v1/dns/query", "/v1/dns/flush", "/v1/dns/hosts", "/metrics"):
            for method in paths[path]:
                answer = await client.request(method, path)
                assert answer.status_code not in (404, 405)


@pytest.mark.parametrize("accept", ("", "application/openmetrics-text; version=1.0.0"))
async def test_numbers_for_prometheus(tmp_path: Path, accept: str) -> None:
    async with running(tmp_path) as (client, network):
        await ask(client, "localhost")
        await ask(client, "www.example.com")
        network.stack.counters.drop("too_short")
        forward = network.forwards.add("127.0.0.1:0:web:80")
        answer = await client.get("/metrics", headers={"accept": accept})
        assert answer.headers["content-type"].startswith(
            "application/openmetrics" if accept else "text/plain; version=0.0.4"
        )
        if accept:
            assert answer.text.endswith("# EOF\n")
            return
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        assert found["netstack_dns_total", "local"] == 1
        assert found["netstack_dns_total", "servfail"] == 1
        assert found["netstack_drops_total", "too_short"] == 1
        assert found["netstack_flows", "tcp"] == 0
        assert found["netstack_dns_hosts_file_names",] == 1
        assert found["netstack_info", "10.98.7.0/24", "fd00:a62:7::/64", netstack.__version__] == 1
        assert found["netstack_uptime_seconds",] > 0
        assert found["netstack_forwards",] == 1
        assert found["netstack_forward_connections", "user", str(forward.spec)] == 0


async def test_settings_are_taken_over_while_it_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as (client, network):
        await client.post("/v1/dns/hosts", json={"api.test": "192.0.2.7"})
        table = {"source": "none", "hosts_file": tmp_path / "hosts", "mdns": False, "hosts": {"new.test": "192.0.2.8"}}
        assert network.reload(netstack.Config(network=SUBNET, dns=table)) == []
        assert await ask(client, "new.test") == ("NOERROR", ["192.0.2.8"])
        assert await ask(client, "api.test") == ("NOERROR", ["192.0.2.7"])
