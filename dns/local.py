"""The names that the gateway knows by itself: its own, the peers' names for it, and the guests'.

    host.netstack.internal and such      the gateway (A, AAAA)
    NAME.netstack.internal               the guest NAME, while it holds a lease
    anything else below that domain      NXDOMAIN: nobody else may answer for it, and nobody should hear of it
    PTR of an address of our networks    the name of who has it, else NXDOMAIN

A name that exists without addresses of the family asked for gets an empty answer (NODATA), never NXDOMAIN: musl takes
that for the whole name (RFC 2308 2.1, RFC 8020).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from netstack.dns.answers import TTL, AnswerWriter, Labels, to_labels
from netstack.dns.message import CLASS_IN, NXDOMAIN, TYPE_ANY, Question
from netstack.dns.reverse import parse_reverse

__all__ = ["DOMAIN", "HOST_NAMES", "TTL", "LocalNames"]

# Guests are NAME.netstack.internal.
DOMAIN = "netstack.internal"

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
    writer: AnswerWriter = field(default_factory=AnswerWriter)

    _addresses: dict[Labels, Sequence[bytes]] = field(init=False)
    _labels: Labels = field(init=False)
    _tops: frozenset[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._labels = to_labels(self.domain)
        self._addresses = {self._labels: ()}
        for name in self.names:
            labels = to_labels(name)
            # What only has names below it exists, too. "internal" alone is left to the host's nameservers: companies
            # use it too.
            for start in range(1, len(labels) - 1):
                self._addresses.setdefault(labels[start:], ())
        self._addresses |= {to_labels(name): found for name, found in self.names.items()}
        self._tops = frozenset(labels[-1] for labels in self._addresses)

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer a query for a name of ours; None for all other names."""
        labels = question.labels
        if not labels or question.class_ not in (CLASS_IN, TYPE_ANY):
            return None
        top = labels[-1]
        if top not in self._tops:  # nearly all names
            address = parse_reverse(labels) if top == b"arpa" else None
            return self._answer_reverse(query, question, address) if address is not None else None
        found = self.find(labels)
        if found is not None:
            return self.writer.addresses(query, question, found, zone=self._zone(labels))
        if labels[-len(self._labels) :] != self._labels:
            return None
        return self.writer.write(query, question, NXDOMAIN, zone=self._labels)

    def find(self, labels: Labels) -> Sequence[bytes] | None:
        """The addresses of a name, none of them when it only has names below it; None when it is no name of ours."""
        found = self._addresses.get(labels)
        if found is None and labels[1:] == self._labels:
            return self.find_guest(labels[0].decode("latin-1"))
        return found

    def _zone(self, labels: Labels) -> Labels:
        """Who says no: a zone of its own for each of the peers' names, since their domains are not ours."""
        return self._labels if labels[-len(self._labels) :] == self._labels else labels[1:]

    def _answer_reverse(self, query: bytes, question: Question, packed: bytes) -> bytes | None:
        address = ipaddress.ip_address(packed)
        if not any(address in network for network in self.networks):
            return None
        name = next((name for name, addresses in self.names.items() if packed in addresses), None)
        if name is None:
            label = self.find_name(packed)
            name = f"{label}.{self.domain}" if label else None
        if name is None:
            return self.writer.write(query, question, NXDOMAIN)
        return self.writer.names(query, question, [to_labels(name)])
