"""Names that never go to the world: special-use domains (RFC 6761) and private reverse zones (RFC 6303).

    localhost, *.localhost                 127.0.0.1 and ::1, which in a guest is the guest (RFC 6761 6.3)
    1.0.0.127.in-addr.arpa and ::1's       localhost
    *.invalid, *.onion, *.alt              NXDOMAIN, whatever the routes say (RFC 6761 6.4, RFC 7686 2, RFC 9476)
    resolver.arpa                          NODATA or NXDOMAIN: what we know of ourselves, DHCP and RA say (RFC 9462 6.4)
    *.test, *.home.arpa, *.internal        only to a route for them, or to private servers, which may know them: home
                                           routers (RFC 8375), clouds; else NXDOMAIN
    *.local                                only to a route; else the names below are for netstack.dns.mdns, and local
                                           itself is NXDOMAIN (RFC 6762 22.1)
    reverse names of private addresses     only to a route; else NXDOMAIN with an SOA: asking the world tells it which
                                           networks we have, and takes time (RFC 6303; RFC 7793)

A route is one for that name or a part of it, not one for all names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from netstack.dns.answers import TTL, TYPE_NS, TYPE_SOA, AnswerWriter, Labels, to_labels
from netstack.dns.message import CLASS_IN, NOERROR, NXDOMAIN, TYPE_ANY, Question

# RFC 6303 4.1 to 4.6, RFC 7793, RFC 8880 apart. The last two are link-local addresses, which mDNS knows (RFC 6762 4).
_NIBBLES6 = ".".join("0" * 31)
PRIVATE_ZONES: Final = (
    "10.in-addr.arpa",
    *(f"{second}.172.in-addr.arpa" for second in range(16, 32)),
    "168.192.in-addr.arpa",
    "0.in-addr.arpa",
    "127.in-addr.arpa",
    "2.0.192.in-addr.arpa",
    "100.51.198.in-addr.arpa",
    "113.0.203.in-addr.arpa",
    "255.255.255.255.in-addr.arpa",
    *(f"{second}.100.in-addr.arpa" for second in range(64, 128)),
    f"0.{_NIBBLES6}.ip6.arpa",
    f"1.{_NIBBLES6}.ip6.arpa",
    "d.f.ip6.arpa",
    "8.b.d.0.1.0.0.2.ip6.arpa",
)
LINK_LOCAL_ZONES: Final = ("254.169.in-addr.arpa", *(f"{digit}.e.f.ip6.arpa" for digit in "89ab"))

_PRIVATE = frozenset(map(to_labels, PRIVATE_ZONES))
_LINK_LOCAL = frozenset(map(to_labels, LINK_LOCAL_ZONES))
_DEPTHS4 = range(3, 7)
_DEPTHS6 = (4, 5, 10, 34)

_NEVER = frozenset((b"invalid", b"onion", b"alt"))
_ONLY_PRIVATE: tuple[Labels, ...] = ((b"test",), (b"internal",), (b"home", b"arpa"))
_RESOLVER_ARPA = (b"resolver", b"arpa")
_LOCALHOST_REVERSE = {to_labels("1.0.0.127.in-addr.arpa"), to_labels(f"1.{_NIBBLES6}.ip6.arpa")}
_LOCALHOST = (b"\x7f\0\0\1", bytes(15) + b"\1")
_TLDS = _NEVER | {b"localhost", b"localdomain", b"test", b"internal", b"arpa", b"local"}

# Names that are never there stay so. What a VPN may claim a moment later must not be kept by guests until then.
_NEVER_TTL = 300


@dataclass(slots=True)
class SpecialNames:
    """Answers for special names.

    is_routed says whether a route claims a name or a part of it; is_private whether all servers that would be asked
    for it have private addresses. With mdns the reverse names of link-local addresses are left to it.
    """

    writer: AnswerWriter = field(default_factory=AnswerWriter)
    is_routed: Callable[[Labels], bool] = lambda labels: False
    is_private: Callable[[Labels], bool] = lambda labels: False
    mdns: bool = True

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer a query for a special name; None for all others."""
        labels = question.labels
        top = labels[-1:]
        if not top or top[0] not in _TLDS or question.class_ not in (CLASS_IN, TYPE_ANY):
            return None
        if top[0] in _NEVER:
            return self._deny(query, question, top)
        if top[0] == b"localhost" or labels == (b"localhost", b"localdomain"):
            return self.writer.addresses(query, question, _LOCALHOST, zone=top)
        if top[0] == b"local":
            # Never to the default servers, however private (RFC 6762 22.1): mDNS asks for the names below.
            left = self.is_routed(labels) or (self.mdns and len(labels) > 1)
            return None if left else self._deny(query, question, top)
        for suffix in _ONLY_PRIVATE:
            if labels[-len(suffix) :] == suffix:
                may_go = self.is_routed(labels) or self.is_private(labels)
                return None if may_go else self._deny(query, question, suffix)
        return self._answer_reverse(query, question) if top[0] == b"arpa" else None

    def _answer_reverse(self, query: bytes, question: Question) -> bytes | None:
        labels = question.labels
        if labels in _LOCALHOST_REVERSE:
            return self.writer.names(query, question, [(b"localhost",)], zone=labels)
        if labels[-2:] == _RESOLVER_ARPA:
            return self._deny(query, question, _RESOLVER_ARPA, exists=len(labels) <= 4)
        zone = _find_zone(labels, mdns=self.mdns)
        if zone is None or self.is_routed(labels):
            return None
        return self._deny(query, question, zone)

    def _deny(self, query: bytes, question: Question, zone: Labels, *, exists: bool = False) -> bytes:
        """Say that there is no such name, or at the zone's top no such record."""
        ttl = _NEVER_TTL if zone[-1] in _NEVER else TTL
        if question.labels != zone:
            rcode = NOERROR if exists else NXDOMAIN
            return self.writer.write(query, question, rcode, zone=zone, negative_ttl=ttl)
        records = [(kind, zone) for kind in (TYPE_SOA, TYPE_NS) if question.type in (kind, TYPE_ANY)]
        rcode = NXDOMAIN if zone == (b"local",) and not records else NOERROR
        return self.writer.write(query, question, rcode, tuple(records), zone=zone, ttl=ttl, negative_ttl=ttl)


def _find_zone(labels: Labels, *, mdns: bool) -> Labels | None:
    """The private zone of a reverse name, or None."""
    kind = labels[-2:-1]
    depths = _DEPTHS4 if kind == (b"in-addr",) else _DEPTHS6 if kind == (b"ip6",) else ()
    for depth in depths:
        zone = labels[-depth:]
        if len(labels) >= depth and (zone in _PRIVATE or (not mdns and zone in _LINK_LOCAL)):
            return zone
    return None


def is_link_local_reverse(labels: Labels) -> bool:
    """Whether a name is the reverse one of a link-local address: mDNS's, as .local is (RFC 6762 4)."""
    return labels[-4:] in _LINK_LOCAL or labels[-5:] in _LINK_LOCAL
