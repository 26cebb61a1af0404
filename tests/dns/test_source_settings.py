"""The user's own upstreams and routes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.routes import RoutingTable, Scope, Server
from netstack.dns.source_settings import parse_upstream, user_scopes


@pytest.mark.parametrize(
    ("text", "server"),
    (
        ("192.0.2.1", Server("192.0.2.1")),
        ("192.0.2.1:5353", Server("192.0.2.1", 5353)),
        ("2001:DB8::1", Server("2001:db8::1")),
        ("[2001:db8::1]", Server("2001:db8::1")),
        ("[2001:db8::1]:5353", Server("2001:db8::1", 5353)),
        ("fe80::1%eth0", Server("fe80::1%eth0")),
        ("[fe80::1%eth0]:54", Server("fe80::1%eth0", 54)),
        ("udp://192.0.2.1", Server("192.0.2.1")),
        ("tcp://192.0.2.1:54", Server("192.0.2.1", 54, "tcp")),
        ("tls://192.0.2.1", Server("192.0.2.1", 853, "tls")),
        ("tls://192.0.2.1#Dns.Example", Server("192.0.2.1", 853, "tls", "dns.example")),
        ("tls://[2001:db8::1]:8853#dns.example", Server("2001:db8::1", 8853, "tls", "dns.example")),
        ("https://192.0.2.1/q", Server("192.0.2.1", 443, "https", "https://192.0.2.1/q")),
        ("https://dns.example", Server("", 443, "https", "https://dns.example/dns-query")),
        ("https://dns.example:8443/x#192.0.2.1", Server("192.0.2.1", 8443, "https", "https://dns.example:8443/x")),
        ("https://[2001:db8::1]/q", Server("2001:db8::1", 443, "https", "https://[2001:db8::1]/q")),
    ),
)
def test_upstreams(text: str, server: Server) -> None:
    assert parse_upstream(text) == server


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("dns.example", "must be the address of a nameserver"),
        ("", "must be the address of a nameserver"),
        ("010.0.0.1", "must be the address of a nameserver"),
        ("192.0.2.1:0", "has the port 0"),
        ("192.0.2.1:70000", "has the port 70000"),
        ("192.0.2.1:", "must be the address"),
        ("quic://192.0.2.1", "must be the address"),
        ("http://192.0.2.1/", "must be the address"),
        ("tls://dns.example", "must be the address"),
        ("tls://192.0.2.1#", "no server's name behind the #"),
        ("tcp://192.0.2.1#x", "no server's name behind the #"),
        ("https://", "must be a URL"),
        ("https://user:pw@dns.example/", "must be a URL"),
        ("https://dns.example:x/", "must be a URL"),
        ("https://[::1/", "must be a URL"),
        ("https://dns.example/a b", "must be a URL"),
        ("https://dns.example/#x", "no address behind the #"),
    ),
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_upstream(text)


@given(st.text() | st.builds("{}://{}".format, st.sampled_from(["udp", "tcp", "tls", "https"]), st.text()))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    try:
        server = parse_upstream(text)
    except ValueError as error:
        reason = str(error)
    else:
        reason = "must be"
        assert parse_upstream(str(server)).address == server.address or server.transport == "https"
    assert reason.startswith(("must be", "has "))


def test_upstreams_take_what_no_route_of_the_user_or_the_host_claims() -> None:
    host = [
        Scope("wifi", (Server("192.0.2.1"),), ("home.arpa",), default=True),
        Scope("vpn", (Server("10.8.0.1"),), (".", "corp.example")),
    ]
    user = user_scopes(["192.0.2.9"], [(("corp.example",), ("10.9.0.1",), "tun9")], ["lab.example"])
    table = RoutingTable([*user, *host])
    assert {line["domain"]: line["servers"] for line in table.describe()} == {
        "corp.example": ["10.9.0.1"],
        "home.arpa": ["192.0.2.1"],
        ".": ["192.0.2.9"],
    }
    assert table.search == ("lab.example",)
    assert user[1].servers[0].interface == "tun9"


def test_without_settings_there_are_no_scopes() -> None:
    assert user_scopes([]) == []


def test_opportunistic_encryption_is_said_to_the_servers() -> None:
    (scope,) = user_scopes(["tls://192.0.2.1"], opportunistic=True)
    assert scope.servers[0].options == {"opportunistic"}
