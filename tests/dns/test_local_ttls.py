"""Rule 36: what is known here is given for five seconds at most, so that an edit of it is seen at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.dns import test_hosts, test_local, test_names, test_special
from tests.dns.local_answers import ask

if TYPE_CHECKING:
    from tests.dns.local_answers import Answer

HOSTS = test_hosts.hosts().answer
BUILTIN = test_local.LOCAL.answer
NAMES = test_names.SOURCE.answer
SPECIAL = test_special.PLAIN.answer


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    (
        (BUILTIN, "host.lima.internal", "A"),
        (BUILTIN, "debian.netstack.internal", "AAAA"),
        (BUILTIN, "alpine.netstack.internal", "AAAA"),
        (BUILTIN, "nobody.netstack.internal", "A"),
        (BUILTIN, "15.5.168.192.in-addr.arpa", "PTR"),
        (BUILTIN, "99.5.168.192.in-addr.arpa", "PTR"),
        (HOSTS, "a.example", "A"),
        (HOSTS, "a.example", "AAAA"),
        (HOSTS, "a.example", "MX"),
        (HOSTS, "deny.example", "A"),
        (HOSTS, "7.100.51.198.in-addr.arpa", "PTR"),
        (NAMES, "app.test", "A"),
        (NAMES, "x.app.test", "AAAA"),
        (NAMES, "alias.test", "A"),
        (NAMES, "app.test", "HTTPS"),
        (SPECIAL, "localhost", "A"),
        # A VPN may claim these a moment later.
        (SPECIAL, "1.1.168.192.in-addr.arpa", "PTR"),
        (SPECIAL, "168.192.in-addr.arpa", "SOA"),
        (SPECIAL, "git.internal", "A"),
        (SPECIAL, "nas.home.arpa", "AAAA"),
    ),
)
def test_rule_36_what_is_known_here_lives_for_five_seconds(source: Answer, name: str, kind: str) -> None:
    answer = ask(source, name, kind)
    assert answer is not None
    records = [*answer.answer, *answer.authority]
    assert records
    assert max(rrset.ttl for rrset in records) <= 5
    # RFC 2308 5: a "no" lives as long as the lesser of the SOA's TTL and its last field.
    assert all(rrset[0].minimum <= 5 for rrset in answer.authority)
