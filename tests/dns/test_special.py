"""Names that never go to the world, by the rules of section B6 and rule 43."""

from __future__ import annotations

import pytest

from netstack.dns.answers import Labels
from netstack.dns.special import LINK_LOCAL_ZONES, PRIVATE_ZONES, SpecialNames
from tests.dns.local_answers import ask, is_nxdomain, texts


def routed(*domains: str) -> SpecialNames:
    def claims(labels: Labels) -> bool:
        name = b".".join(labels).decode()
        return any(name == domain or name.endswith("." + domain) for domain in domains)

    return SpecialNames(is_routed=claims)


PLAIN = SpecialNames()
PRIVATE = SpecialNames(is_private=lambda labels: True)


@pytest.mark.parametrize("name", ("localhost", "LOCALHOST", "foo.localhost", "a.b.localhost", "localhost.localdomain"))
def test_rule_52_localhost_is_the_guest_itself(name: str) -> None:
    for source in (PLAIN, PRIVATE, routed("localhost")):
        assert texts(ask(source.answer, name, "A")) == ["127.0.0.1"]
        assert texts(ask(source.answer, name, "AAAA")) == ["::1"]
        assert texts(ask(source.answer, name, "MX")) == []


def test_rule_52_reverse() -> None:
    assert texts(ask(PLAIN.answer, "1.0.0.127.in-addr.arpa", "PTR")) == ["localhost."]
    assert texts(ask(PLAIN.answer, f"1.{'0.' * 31}ip6.arpa", "PTR")) == ["localhost."]
    assert is_nxdomain(ask(PLAIN.answer, "2.0.0.127.in-addr.arpa", "PTR"))


@pytest.mark.parametrize("name", ("x.invalid", "a.b.onion", "facebookcorewwwi.ONION", "x.alt"))
def test_rule_53_never(name: str) -> None:
    for source in (PLAIN, PRIVATE, routed("invalid", "onion", "alt")):
        assert is_nxdomain(ask(source.answer, name, "A"))
        assert is_nxdomain(ask(source.answer, name, "HTTPS"))


@pytest.mark.parametrize("domain", ("test", "home.arpa", "internal"))
def test_rule_53_only_to_a_route_or_to_private_servers(domain: str) -> None:
    assert is_nxdomain(ask(PLAIN.answer, f"nas.{domain}"))
    assert ask(PRIVATE.answer, f"nas.{domain}") is None
    assert ask(routed(f"nas.{domain}").answer, f"x.nas.{domain}") is None
    assert is_nxdomain(ask(routed(f"nas.{domain}").answer, f"other.{domain}"))
    # The top itself exists.
    assert texts(ask(PLAIN.answer, domain, "A")) == []
    assert len(texts(ask(PLAIN.answer, domain, "SOA"))) == 1


def test_resolver_arpa_is_answered_here() -> None:
    assert texts(ask(PLAIN.answer, "_dns.resolver.arpa", "SVCB")) == []


@pytest.mark.parametrize("zone", PRIVATE_ZONES)
def test_rule_43_private_reverse_names_stay_here_unless_routed(zone: str) -> None:
    for source in (PLAIN, PRIVATE):
        if zone.startswith("1.0.0.0."):
            assert texts(ask(source.answer, zone, "PTR")) == ["localhost."]
            continue
        # RFC 6303 3: the zone is there, and empty.
        assert texts(ask(source.answer, zone, "PTR")) == []
        assert [text.split()[0] for text in texts(ask(source.answer, zone, "SOA"))] == [f"{zone}."]
        assert texts(ask(source.answer, zone, "NS")) == [f"{zone}."]
        assert is_nxdomain(ask(source.answer, f"7.{zone}", "PTR"))
        assert ask(routed(zone).answer, f"7.{zone}", "PTR") is None


@pytest.mark.parametrize(
    ("name", "local"),
    (
        ("9.1.8.10.in-addr.arpa", True),
        ("1.0.16.172.in-addr.arpa", True),
        ("1.0.31.172.in-addr.arpa", True),
        ("1.0.15.172.in-addr.arpa", False),
        ("1.0.32.172.in-addr.arpa", False),
        ("1.1.168.192.in-addr.arpa", True),
        ("1.1.169.192.in-addr.arpa", False),
        ("1.0.64.100.in-addr.arpa", True),
        ("1.0.63.100.in-addr.arpa", False),
        ("8.8.8.8.in-addr.arpa", False),
        ("210.in-addr.arpa", False),
        ("in-addr.arpa", False),
        ("1.0.0.0.c.f.ip6.arpa", False),
        ("1.0.0.0.d.f.ip6.arpa", True),
        ("arpa", False),
        ("x.as112.arpa", False),
    ),
)
def test_rule_43_borders(name: str, local: bool) -> None:
    assert is_nxdomain(ask(PLAIN.answer, name, "PTR")) is local


def test_rule_43_a_route_for_a_part() -> None:
    source = routed("8.10.in-addr.arpa")
    assert ask(source.answer, "9.1.8.10.in-addr.arpa", "PTR") is None
    assert is_nxdomain(ask(source.answer, "9.1.9.10.in-addr.arpa", "PTR"))


def test_rule_42_local_goes_to_a_route_or_to_mdns_and_never_to_other_servers() -> None:
    assert ask(PLAIN.answer, "printer.local") is None  # mDNS is next
    assert is_nxdomain(ask(PLAIN.answer, "local", "A"))  # RFC 6762 22.1
    without = SpecialNames(mdns=False, is_private=lambda labels: True)
    assert is_nxdomain(ask(without.answer, "printer.local"))
    assert ask(routed("corp.local").answer, "git.corp.local") is None
    assert ask(routed("local").answer, "local") is None
    for zone in LINK_LOCAL_ZONES:
        assert ask(PLAIN.answer, f"7.{zone}", "PTR") is None
        assert is_nxdomain(ask(without.answer, f"7.{zone}", "PTR"))


@pytest.mark.parametrize(
    "name", (".", "com", "example.com", "test.example", "localhost.example", "xinternal", "arpa.example")
)
def test_other_names_are_left_to_others(name: str) -> None:
    assert ask(PLAIN.answer, name) is None


def test_another_class_is_not_ours() -> None:
    assert ask(PLAIN.answer, "localhost", "A", rdclass="CH") is None
