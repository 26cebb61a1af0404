"""Refuses private addresses in answers from the outside: DNS rebinding (row 36), an option that is off by default.

A page of the world can have its own name lead to 192.168.1.1 a moment after it was loaded, and the browser of a guest
then sends that page's requests to the router at home. With `[dns] rebind_protection` an answer with such an address is
given up: REFUSED, with an extended error that names the address (RFC 8914, 15: Blocked).

Private answers are right where a name is somebody's own: for domains that a scope claims, a VPN's or those of a
[[dns.route]], and for those that `rebind_allow` lists (a router's own domain, block lists that answer 127.0.0.2). What
the hosts file, [dns.hosts] and mDNS say is not looked at: it is the host's.

Looked at are the addresses of A and AAAA records, IPv4 addresses within IPv6 ones, and the hints of SVCB and HTTPS
records (RFC 9460 7.3), which browsers may connect to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from netstack.dns.message import EDE_BLOCKED, REFUSED, TYPE_A, TYPE_AAAA, Ede, Question
from netstack.dns.prefixes import is_private
from netstack.dns.replies import Reply, walk
from netstack.dns.routes import ROOT, Labels, Scope, parse_name

if TYPE_CHECKING:
    from netstack.dns.race import Answer

_SVCB, _HTTPS = 64, 65
_HINTS = {4: 4, 6: 16}  # of SvcParams: ipv4hint and ipv6hint, and how long their addresses are


class RebindGuard:
    """The option, and the domains for which private answers are right."""

    def __init__(self) -> None:
        self.enabled = False
        self._allowed: tuple[Labels, ...] = ()

    def configure(self, enabled: bool, allowed: Sequence[str]) -> None:
        """Take the settings. Domains that are none are left out: the settings are checked where they are read."""
        self.enabled = enabled
        self._allowed = tuple(labels for name in allowed if (labels := parse_name(name)) is not None)

    def screen(self, question: Question, scopes: Sequence[Scope], answer: Answer) -> Answer:
        """The answer; or a refusal in its place, where it has a private address that it should not. Untrusted."""
        if not self.enabled or answer.reply is None or not answer.wire or self._is_allowed(question.labels, scopes):
            return answer
        found = find_private(answer.wire, question, answer.reply.counts[0])
        if found is None:
            return answer
        why: Ede = (EDE_BLOCKED, f"the answer has the private address {found}: dns.rebind_protection")
        refusal = Reply(b"", question.end, (0, 0, 0), 0, REFUSED)
        refusal.ede = (why,)
        return answer._replace(reply=refusal, ede=(why,))

    def _is_allowed(self, labels: Labels, scopes: Sequence[Scope]) -> bool:
        if any(labels[len(labels) - len(domain) :] == domain for domain in self._allowed):
            return True
        return any(_claims(scope, labels) for scope in scopes)


def _claims(scope: Scope, labels: Labels) -> bool:
    """Whether a domain of the scope's, but the root, is a suffix of the name."""
    for domain in scope.domains:
        suffix = parse_name(domain) if domain != ROOT else None
        if suffix and labels[len(labels) - len(suffix) :] == suffix:
            return True
    return False


def find_private(wire: bytes, question: Question, answers: int) -> IPv4Address | IPv6Address | None:
    """The first private address in the answer section of a reply that was read before. Untrusted."""
    for record in walk(wire, question.end, answers) or ():
        data = wire[record.data : record.end]
        if (record.type == TYPE_A and len(data) == 4) or (record.type == TYPE_AAAA and len(data) == 16):
            addresses = [data]
        elif record.type in (_SVCB, _HTTPS):
            addresses = _read_hints(data)
        else:
            continue
        for packed in addresses:
            address = ipaddress.ip_address(packed)
            if is_private(address):
                return address
    return None


def _read_hints(data: bytes) -> list[bytes]:
    """The addresses among the parameters of a SVCB record (RFC 9460 2.2). Untrusted: as far as they can be read."""
    position = 2
    while position < len(data) and data[position]:
        position += 1 + data[position]  # the target, never compressed
    position += 1
    found: list[bytes] = []
    while position + 4 <= len(data):
        key = data[position] << 8 | data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        value = data[position + 4 : position + 4 + length]
        size = _HINTS.get(key)
        if size is not None:
            found += [value[at : at + size] for at in range(0, len(value) - size + 1, size)]
        position += 4 + length
    return found
