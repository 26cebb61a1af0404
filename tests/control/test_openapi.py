"""The API against its own OpenAPI document: schemathesis makes requests of what the document allows, and does not.

It asks a netstack that runs in a namespace of its own, because forwards open ports there. Left out are the paths whose
answer is no answer (/tunnel, /v1/connect, /v1/events: test_front.py and test_events.py), and /v1/pcap, which would
write files wherever the document allows, which is everywhere: test_pcap_api.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from netstack.control.openapi import write_openapi
from tests.lab.namespaces import Namespace
from tests.lab.netstack import Netstack

pytestmark = [pytest.mark.needs("root", "netns", "ip"), pytest.mark.timeout(120)]

NO_ANSWER = "^(/tunnel|/v1/connect|/v1/events|/v1/pcap)$"
# What the document says in words, in a way that schemathesis can use. Port 0 is a free one.
SPECS = st.builds(
    "{}0:{}{}{}".format,
    st.sampled_from(("", "127.0.0.1:", "0.0.0.0:", "[::1]:", "*:", "localhost:")),
    st.sampled_from(("", "debian:", "192.168.5.15:", "[fd00:c0a8:5::15]:")),
    st.integers(1, 65535),
    st.sampled_from(("", "/tcp", "/udp")),
)
schemathesis.openapi.format("forward-spec", SPECS)

SCHEMA = schemathesis.openapi.from_dict(write_openapi(needs_token=False)).exclude(path_regex=NO_ANSWER)
OPERATIONS: dict[str, Any] = {
    result.ok().label: result.ok()  # type: ignore[union-attr] # a mistake in the document raises here, as it should
    for result in SCHEMA.get_all_operations()
}

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# gvproxy reads what others would refuse: any key in any letter case, and any name of a zone.
LENIENT = ("/services", "/leases", "/cam", "/stats")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("n")
    folder.joinpath("n.toml").write_text('[dns]\nsource = "none"\nmdns = false\n')
    arguments = ["-c", str(folder / "n.toml"), "--log-level", "error"]
    with Namespace("api") as host:
        netstack = Netstack(host, folder, links=[f"unix://{folder}/q"], arguments=arguments)
        transport = httpx.HTTPTransport(uds=str(netstack.api_path))
        with netstack, httpx.Client(transport=transport, base_url="http://n", timeout=20) as http:
            yield http
            assert "[error]" not in netstack.log, netstack.log


def ask(client: httpx.Client, case: schemathesis.Case[Any]) -> httpx.Response:
    """Send what schemathesis made. It would do so with requests, which does not know unix sockets."""
    made = case.as_transport_kwargs(base_url="http://n")
    body = made.get("data")
    if "json" in made:
        body = json.dumps(made["json"]).encode()
        made["headers"]["content-type"] = "application/json"
    if isinstance(body, str):
        body = body.encode("utf-8", "replace")
    return client.request(
        made["method"],
        made["url"],
        params=made.get("params"),
        headers={name: value for name, value in made["headers"].items() if value is not None},
        content=body if isinstance(body, bytes) else None,
    )


def opens_a_file(case: schemathesis.Case[Any]) -> bool:
    """Whether this would make a unix socket somewhere."""
    return "unix" in json.dumps(case.body, default=str)


@pytest.mark.parametrize("mode", (GenerationMode.POSITIVE, GenerationMode.NEGATIVE), ids=("allowed", "not allowed"))
@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_answers_are_what_the_document_says(client: httpx.Client, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and not operation.body and not list(operation.iter_parameters()):
        return  # there is nothing to do wrong
    lenient = operation.path.startswith(LENIENT)
    checks = [*CHECKS, *([] if lenient or mode is GenerationMode.POSITIVE else [negative_data_rejection])]

    @settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case[Any]) -> None:
        if opens_a_file(case):
            return
        response = ask(client, case)
        assert response.status_code != 500 or lenient or label == "POST /v1/forwards", response.text
        case.validate_response(response, checks=checks)

    run()


def test_every_path_is_in_the_document(client: httpx.Client) -> None:
    """And what is in it is there: with other words than "not found" and "no such method"."""
    paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if path in ("/v1/events", "/tunnel", "/v1/connect"):
            continue
        for method in methods:
            answer = client.request(method, path.replace("{id}", "f0"))
            assert answer.status_code != 405, path
            assert answer.status_code != 404 or "{id}" in path or path == "/v1/proxy", path


def test_of_forwards_made_here_all_are_gone_again(client: httpx.Client) -> None:
    for forward in client.get("/v1/forwards").json()["forwards"]:
        assert client.delete(f"/v1/forwards/{forward['id']}").status_code == 204
    assert client.get("/v1/forwards").json() == {"forwards": []}
