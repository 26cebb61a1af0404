"""The routing table: the rules of reference B5 by their numbers, pure."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.dns.routes import (
    FALLBACK_RANK,
    USER_RANK,
    RoutingTable,
    Scope,
    Server,
    format_name,
    parse_name,
)


def scope(key: str, *domains: str, default: bool = False, servers: int = 1, **more: Any) -> Scope:
    """A scope with some servers of its own."""
    number = sum(key.encode()) % 200
    return Scope(key, tuple(Server(f"192.0.{n}.{number}") for n in range(servers)), domains, default=default, **more)


def asked(table: RoutingTable, name: str) -> list[str]:
    """The keys of the scopes that would be asked for a name."""
    labels = parse_name(name)
    assert labels is not None
    return [scope.key for scope in table.route(labels)]


CORP = RoutingTable([scope("wifi", default=True), scope("vpn", "corp.example")])


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        ("corp.example", "vpn"),
        ("a.corp.example", "vpn"),
        ("A.CORP.EXAMPLE.", "vpn"),
        ("a.b.c.d.corp.example", "vpn"),
        ("notcorp.example", "wifi"),
        ("corp.example.net", "wifi"),
        ("example", "wifi"),
        (".", "wifi"),
        ("corp", "wifi"),
    ),
)
def test_rule_37_suffixes_match_on_label_borders_in_any_case(name: str, expected: str) -> None:
    assert asked(CORP, name) == [expected]


def test_rule_37_the_domain_may_be_in_any_case_and_with_a_dot() -> None:
    assert asked(RoutingTable([scope("vpn", "CoRp.Example.")]), "x.corp.example") == ["vpn"]


def test_rule_38_the_longest_suffix_wins_and_nobody_else_is_asked() -> None:
    table = RoutingTable(
        [scope("wifi", default=True), scope("a", "example"), scope("b", "corp.example"), scope("c", "git.corp.example")]
    )
    assert asked(table, "x.git.corp.example") == ["c"]
    assert asked(table, "git.corp.example") == ["c"]
    assert asked(table, "x.corp.example") == ["b"]
    assert asked(table, "x.example") == ["a"]
    assert asked(table, "x.test") == ["wifi"]


def test_rule_38_equal_suffixes_are_asked_together() -> None:
    table = RoutingTable([scope("wifi", default=True), scope("one", "corp.example"), scope("two", "corp.example")])
    assert asked(table, "x.corp.example") == ["one", "two"]


def test_rule_38_defaults_are_asked_together() -> None:
    table = RoutingTable([scope("wifi", default=True), scope("wire", default=True), scope("vpn", "corp.example")])
    assert asked(table, "x.test") == ["wifi", "wire"]


def test_rule_39_the_root_of_a_vpn_takes_everything_that_no_search_domain_claims() -> None:
    table = RoutingTable([scope("wifi", "fritz.box", default=True), scope("vpn", ".", default=True)])
    assert asked(table, "x.fritz.box") == ["wifi"]
    assert asked(table, "www.example") == ["vpn"]
    assert asked(table, ".") == ["vpn"]


def test_rule_39_a_root_alone_does_not_claim_names() -> None:
    """Or .local and private reverse zones would go to every full VPN."""
    table = RoutingTable([scope("vpn", ".")])
    assert table.claim((b"x", b"local")) is None
    assert asked(table, "x.local") == ["vpn"]


def test_rule_40_links_without_default_route_get_nothing_unmatched() -> None:
    table = RoutingTable([scope("vpn", "corp.example")])
    assert asked(table, "www.example") == []
    assert asked(table, "x.corp.example") == ["vpn"]


def test_rule_40_fallback_servers_are_asked_when_there_is_no_default() -> None:
    fallback = scope("fallback", default=True, rank=FALLBACK_RANK)
    assert asked(RoutingTable([scope("vpn", "corp.example"), fallback]), "www.example") == ["fallback"]
    assert asked(RoutingTable([scope("wifi", default=True), fallback]), "www.example") == ["wifi"]


def test_rule_41_domains_without_servers_have_no_effect() -> None:
    table = RoutingTable([scope("wifi", default=True), scope("tun", "corp.example", ".", servers=0)])
    assert asked(table, "x.corp.example") == ["wifi"]
    assert table.claim((b"corp", b"example")) is None


def test_rule_41_defaults_without_servers_have_no_effect() -> None:
    assert asked(RoutingTable([scope("wifi", default=True, servers=0)]), "www.example") == []


@pytest.mark.parametrize(
    ("domain", "name", "claimed"),
    (
        ("local", "printer.local", True),
        ("corp.local", "git.corp.local", True),
        ("corp.local", "printer.local", False),
        ("localhost", "printer.local", False),
    ),
)
def test_rule_42_a_unicast_route_claims_local_names(domain: str, name: str, claimed: bool) -> None:
    labels = parse_name(name)
    assert labels is not None
    assert (RoutingTable([scope("vpn", domain)]).claim(labels) is not None) == claimed


def test_rule_43_reverse_names_follow_reverse_domains() -> None:
    table = RoutingTable([scope("wifi", default=True), scope("vpn", "8.10.in-addr.arpa", "d.f.ip6.arpa")])
    assert asked(table, "9.1.8.10.in-addr.arpa") == ["vpn"]
    assert asked(table, "1.18.10.in-addr.arpa") == ["wifi"]
    assert asked(table, "1.0.0.0.d.f.ip6.arpa") == ["vpn"]
    assert table.claim((b"1", b"168", b"192", b"in-addr", b"arpa")) is None  # answered locally, RFC 6303


def test_rule_45_the_same_server_by_two_interfaces_is_two_servers() -> None:
    one, two = (Scope(f"l:{i}", (Server("10.0.0.1", interface=i),), default=True) for i in ("eth0", "tun0"))
    table = RoutingTable([one, two])
    assert [server.interface for server in table.servers()] == ["eth0", "tun0"]


def test_rule_46_the_search_list_is_handed_on_and_not_used() -> None:
    table = RoutingTable(
        [
            Scope("a", (Server("192.0.2.1"),), search=("corp.example.", "Home.Arpa"), default=True),
            Scope("b", search=("home.arpa", ".")),
        ]
    )
    assert table.search == ("corp.example", "home.arpa")
    assert table.claim((b"x", b"corp", b"example")) is None


def test_rule_48_the_gateway_is_never_its_own_server() -> None:
    own = {bytes([192, 168, 5, 3]), bytes.fromhex("fd00c0a80005000000000000") + bytes(3) + b"\x03"}
    servers = tuple(map(Server, ("192.168.5.3", "192.0.2.1", "fd00:c0a8:5::3", "fd00:c0a8:5::3%eth0")))
    table = RoutingTable([Scope("a", servers, default=True), Scope("b", servers[:1], ("corp",))], own=own)
    assert [server.address for server in table.servers()] == ["192.0.2.1"]
    assert asked(table, "x.corp") == ["a"]


def test_rule_49_an_empty_table_routes_to_nobody() -> None:
    assert RoutingTable().route((b"www", b"example")) == ()
    assert RoutingTable().route(()) == ()
    assert RoutingTable().describe()[0]["servers"] == []


def test_rule_50_a_change_names_the_scopes_whose_answers_no_longer_hold() -> None:
    wifi, vpn = scope("wifi", default=True), scope("vpn", "corp.example")
    before, after = RoutingTable([wifi]), RoutingTable([wifi, vpn])
    assert before.changed_keys(after) == {"vpn"}
    assert after.changed_keys(before) == {"vpn"}
    moved = Scope("wifi", (Server("192.0.2.77"),), default=True)
    assert before.changed_keys(RoutingTable([moved])) == {"wifi"}
    # Other domains alone change where names go, not what a server said.
    assert after.changed_keys(RoutingTable([wifi, scope("vpn", "other.example")])) == set()


def test_what_the_user_says_stands_before_what_the_host_says() -> None:
    host = [scope("wifi", default=True), scope("vpn", ".", "corp.example")]
    user = [scope("user", ".", rank=USER_RANK), scope("user1", "corp.example", rank=USER_RANK)]
    table = RoutingTable([*host, *user])
    assert asked(table, "www.example") == ["user"]
    assert asked(table, "x.corp.example") == ["user1"]
    # A longer suffix of the host's is still followed.
    assert asked(RoutingTable([*user, scope("lab", "lab.corp.example")]), "x.lab.corp.example") == ["lab"]


def test_description_puts_the_longest_suffix_first_and_says_where_it_came_from() -> None:
    table = RoutingTable(
        [
            scope("wifi", "home.arpa", default=True, source="link wlan0"),
            Scope("vpn", (Server("10.8.0.1", 5353, interface="tun0"),), ("git.corp.example",), source="link tun0"),
        ]
    )
    lines = table.describe()
    assert [line["domain"] for line in lines] == ["git.corp.example", "home.arpa", "."]
    assert lines[0] == {
        "domain": "git.corp.example",
        "default": False,
        "scopes": ["vpn"],
        "servers": ["10.8.0.1:5353"],
        "interfaces": ["tun0"],
        "source": "link tun0",
    }
    assert lines[-1]["default"]


@pytest.mark.parametrize(
    ("server", "text"),
    (
        (Server("192.0.2.1"), "192.0.2.1"),
        (Server("192.0.2.1", 5353), "192.0.2.1:5353"),
        (Server("2001:db8::1"), "2001:db8::1"),
        (Server("2001:db8::1", 54), "[2001:db8::1]:54"),
        (Server("192.0.2.1", 53, "tcp"), "tcp://192.0.2.1"),
        (Server("2001:db8::1", 853, "tls", "dns.example"), "tls://[2001:db8::1]#dns.example"),
        (Server("192.0.2.1", 443, "https", "https://192.0.2.1/dns-query"), "https://192.0.2.1/dns-query"),
    ),
)
def test_a_server_as_text(server: Server, text: str) -> None:
    assert str(server) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("", "."),
        (".", "."),
        ("Corp.Example.", "corp.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("_tcp.example", "_tcp.example"),
        ("a..b", None),
        (".example", None),
        ("x" * 64 + ".example", None),
        (".".join(["x" * 63] * 4), None),
        (".".join(["x" * 63] * 3 + ["y" * 61]), ".".join(["x" * 63] * 3 + ["y" * 61])),
    ),
)
def test_names(text: str, expected: str | None) -> None:
    labels = parse_name(text)
    assert (None if labels is None else format_name(labels)) == expected


LABEL = st.sampled_from([b"a", b"b", b"corp", b"example"])
NAME = st.lists(LABEL, max_size=5).map(tuple)


@given(st.lists(st.tuples(st.lists(NAME, max_size=3), st.booleans()), max_size=5), NAME)
def test_routing_equals_the_definition(
    described: list[tuple[list[tuple[bytes, ...]], bool]], name: tuple[bytes, ...]
) -> None:
    scopes = [
        scope(f"s{number}", *map(format_name, domains), default=default)
        for number, (domains, default) in enumerate(described)
    ]
    best = -1
    expected: list[str] = []
    for number, (domains, _) in enumerate(described):
        lengths = [len(d) for d in domains if not d or name[-len(d) :] == d]
        longest = max(lengths, default=-1)
        if longest > best:
            best, expected = longest, []
        if longest == best and longest >= 0:
            expected.append(f"s{number}")
    if best < 0:
        expected = [f"s{number}" for number, (_, default) in enumerate(described) if default]
    assert [scope.key for scope in RoutingTable(scopes).route(name)] == expected


@pytest.mark.parametrize("text", ("a\x1b[31mx.example", "a.\x07", "a\0b.example", "a\x7f.example", "a\x9b.example"))
def test_names_with_control_characters_are_none(text: str) -> None:
    assert parse_name(text) is None
    assert RoutingTable((Scope("host", search=(text, "good.example")),)).search == ("good.example",)


def test_a_dot_within_a_label_is_written_as_one() -> None:
    assert format_name((b"app.dev", b"x")) == "app\\.dev.x"
    assert format_name((b"app", b"dev")) == "app.dev"
