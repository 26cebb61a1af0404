"""The names that the gateway knows by itself: its own, the peers' names for it, and the guests'.

    host.netstack.internal and such      the gateway (A, AAAA)
    NAME.netstack.internal               the guest NAME, while it holds a lease
    anything else below that domain      NXDOMAIN: nobody else may answer for it, and nobody should hear of it
    PTR of an address of our networks    the name of who has it, else NXDOMAIN

A name that exists without addresses of the family asked for gets an empty answer (NODATA), never NXDOMAIN: musl takes
that for the whole name (RFC 2308 2.1, RFC 8020).

dnslib builds the answers. It is kept away from what guests send: names come from netstack.dns.message, as labels.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

from netstack.dns.message import (
    CD,
    CLASS_IN,
    HEADER_LENGTH,
    MAX_UDP,
    NOERROR,
    NXDOMAIN,
    RD,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    TYPE_PTR,
    Question,
    find_opt,
    flags_of,
    message_id,
)

if TYPE_CHECKING:
    import dnslib

# What the gateway is called, in our own domain and in those of Lima, Docker and Podman.
HOST_NAMES = (
    "host.netstack.internal",
    "gateway.netstack.internal",
    "host.lima.internal",
    "host.docker.internal",
    "gateway.docker.internal",
    "host.containers.internal",
    "gateway.containers.internal",
)

# Guests come and go, so nobody should remember them for long; Lima's figure.
TTL = 5

_IN_ADDR_ARPA = (b"in-addr", b"arpa")
_IP6_ARPA = (b"ip6", b"arpa")


@dataclass(slots=True)
class LocalNames:
    """Answers for the gateway's own domain.

    names maps names in lower case to packed addresses. find_guest gives the addresses of the guest with that label,
    None when there is none. find_name gives a guest's label for a packed address. networks are those whose reverse
    names are ours.
    """

    domain: str
    names: Mapping[str, Sequence[bytes]]
    networks: Sequence[IPv4Network | IPv6Network]
    find_guest: Callable[[str], Sequence[bytes] | None] = lambda label: None
    find_name: Callable[[bytes], str | None] = lambda address: None

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer a query for a name of ours; None for all other names."""
        if question.class_ not in (CLASS_IN, TYPE_ANY):
            return None
        address = _parse_reverse(question.labels)
        if address is not None:
            return self._answer_reverse(query, question, address)
        try:
            name = b".".join(question.labels).decode("ascii")
        except UnicodeDecodeError:
            return None
        found = self._find(name)
        if found is None:
            if name != self.domain and not name.endswith("." + self.domain):
                return None
            return self._write(query, question, NXDOMAIN, ())
        records = [
            (kind, packed)
            for kind, size in ((TYPE_A, 4), (TYPE_AAAA, 16))
            for packed in found
            if len(packed) == size and question.type in (kind, TYPE_ANY)
        ]
        return self._write(query, question, NOERROR, records)

    def _find(self, name: str) -> Sequence[bytes] | None:
        """The addresses of a name, none of them when it only has names below it; None when it is no name of ours."""
        if name in self.names:
            return self.names[name]
        label, _, parent = name.partition(".")
        # "internal" alone is left to the host's nameservers: companies use it too.
        if name == self.domain or (parent and any(known.endswith("." + name) for known in self.names)):
            return ()
        return self.find_guest(label) if parent == self.domain else None

    def _answer_reverse(self, query: bytes, question: Question, packed: bytes) -> bytes | None:
        address = ipaddress.ip_address(packed)
        if not any(address in network for network in self.networks):
            return None
        name = next((name for name, addresses in self.names.items() if packed in addresses), None)
        if name is None:
            label = self.find_name(packed)
            name = f"{label}.{self.domain}" if label else None
        if name is None:
            return self._write(query, question, NXDOMAIN, ())
        target = tuple(part.encode("ascii") for part in name.split("."))
        return self._write(
            query, question, NOERROR, [(TYPE_PTR, target)] if question.type in (TYPE_PTR, TYPE_ANY) else ()
        )

    def _write(self, query: bytes, question: Question, rcode: int, records: Iterable[tuple[int, Any]]) -> bytes:
        # It takes 25 ms to import, and netstack starts without.
        import dnslib

        flags = flags_of(query)
        header = dnslib.DNSHeader(
            id=message_id(query), qr=1, aa=1, ra=1, rd=bool(flags & RD), cd=bool(flags & CD), rcode=rcode
        )
        # The name as the guest spelt it, and as labels: a str would go through the idna codec, which raises.
        owner = dnslib.DNSLabel(_spelt(query))
        answer = dnslib.DNSRecord(header, q=dnslib.DNSQuestion(owner, question.type, question.class_))
        for kind, data in records:
            answer.add_answer(dnslib.RR(owner, kind, rdata=_rdata(kind, data), ttl=TTL))
        if not answer.rr:
            # RFC 2308 3: the zone that says no, and for how long that may be remembered. A zone of its own for each
            # of the peers' names, since their domains are not ours.
            ours = tuple(part.encode("ascii") for part in self.domain.split("."))
            zone = dnslib.DNSLabel(ours if question.labels[-len(ours) :] == ours else question.labels[1:])
            soa = dnslib.SOA(zone, dnslib.DNSLabel((b"nobody", b"invalid")), (1, 3600, 600, 86400, TTL))
            answer.add_auth(dnslib.RR(zone, dnslib.QTYPE.SOA, rdata=soa, ttl=TTL))
        opt = find_opt(query, question)
        if opt is not None:
            answer.add_ar(dnslib.EDNS0(flags="do" if opt.dnssec_ok else "", udp_len=MAX_UDP))
        return bytes(answer.pack())


def _rdata(kind: int, data: Any) -> dnslib.RD:
    import dnslib

    if kind == TYPE_A:
        return dnslib.A(tuple(data))
    if kind == TYPE_AAAA:
        return dnslib.AAAA(tuple(data))
    return dnslib.PTR(dnslib.DNSLabel(data))


def _spelt(query: bytes) -> tuple[bytes, ...]:
    """The labels of the question's name as they were sent. The query was read by parse_question before."""
    labels = []
    position = HEADER_LENGTH
    while length := query[position]:
        labels.append(query[position + 1 : position + 1 + length])
        position += 1 + length
    return tuple(labels)


def _parse_reverse(labels: tuple[bytes, ...]) -> bytes | None:
    """The address of a whole reverse name (RFC 1035 3.5, RFC 3596 2.5), or None."""
    digits = [label.decode("latin-1") for label in reversed(labels[:-2])]
    if labels[-2:] == _IN_ADDR_ARPA and len(digits) == 4:
        if all(digit.isascii() and digit.isdecimal() and len(digit) <= 3 and int(digit) <= 255 for digit in digits):
            return bytes(map(int, digits))
    elif labels[-2:] == _IP6_ARPA and len(digits) == 32:
        if all(len(digit) == 1 and digit in "0123456789abcdef" for digit in digits):
            return bytes.fromhex("".join(digits))
    return None
