"""Names that the user gives: `[dns.hosts]` in the settings, and those added over the API while netstack runs.

    app.test = "192.168.5.20"             one address, or a list of them
    "*.app.test" = "192.168.5.20"         all names below app.test, at any depth, but not app.test itself
    git.test = "git.corp.example"         an alias: the addresses of another name

A name itself goes before a wildcard, and a longer wildcard before a shorter one; an entry of the API before the same
one of the settings. A name that is here exists, so other types get NODATA.

An alias gives addresses, not a CNAME: the C library's resolvers in guests follow none by themselves. Its target may be
another name here, one of the gateway's or guests', or of /etc/hosts (`find_local`), and else it is asked for as the
guest would ask (`follow`). Aliases in a circle have no addresses.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from netstack.dns.answers import AnswerWriter, Labels, Records, address_records, to_labels
from netstack.dns.local import DOMAIN
from netstack.dns.message import (
    CLASS_IN,
    NOERROR,
    NXDOMAIN,
    RD,
    SERVFAIL,
    TYPE_A,
    TYPE_AAAA,
    TYPE_ANY,
    Question,
    parse_question,
    rcode_of,
    write_error,
)
from netstack.dns.records import read_answers
from netstack.dns.reverse import parse_reverse

# A program that adds names without end must not take all memory. Of one name as many as fit into an answer.
MAX_NAMES: Final = 10_000
MAX_ADDRESSES: Final = 64

# Further than this an alias of an alias is not followed: the circle is closed long before.
MAX_ALIASES: Final = 16

# How long the answer for an alias may be remembered, at most: its target may change in the settings.
_MAX_TTL: Final = 60

_LABEL = re.compile(rb"(?!-)[a-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands behind one name: addresses (packed), or the name that it is an alias of."""

    addresses: tuple[bytes, ...] = ()
    alias: Labels | None = None

    def describe(self) -> str | list[str]:
        """As it is written in the settings."""
        if self.alias is not None:
            return b".".join(self.alias).decode("ascii")
        texts = [str(ipaddress.ip_address(packed)) for packed in self.addresses]
        return texts[0] if len(texts) == 1 else texts


def parse_entry(name: str, value: str | Sequence[str]) -> tuple[Labels, Entry]:
    """Read one line of [dns.hosts]. Raises ValueError with words for the user."""
    labels = parse_host_name(name)
    texts = [value] if isinstance(value, str) else list(value)
    if not 1 <= len(texts) <= MAX_ADDRESSES:
        raise ValueError(f"needs an address, or several, {MAX_ADDRESSES} at most")
    addresses: list[bytes] = []
    for text in texts:
        try:
            if "%" in text:
                raise ValueError("an address with a scope says nothing beyond this host")
            addresses.append(ipaddress.ip_address(text).packed)
        except ValueError:
            if "%" in text or len(texts) > 1 or re.fullmatch(r"[0-9.]+", text):
                raise ValueError(f"{text} is no address such as 192.168.5.20 or fd00::20") from None
            return labels, Entry(alias=parse_host_name(text, f"{text} is no address and "))
    return labels, Entry(tuple(dict.fromkeys(addresses)))


def parse_host_name(text: str, prefix: str = "") -> Labels:
    """Read a name, perhaps a wildcard. Raises ValueError with words for the user."""
    try:
        labels = to_labels(text)
    except UnicodeEncodeError:
        raise ValueError(f"{prefix}must be in ASCII: write other letters as xn--...") from None
    plain = labels[1:] if labels[:1] == (b"*",) and not prefix else labels
    if not plain or sum(map(len, labels)) + len(labels) > 254 or not all(_LABEL.fullmatch(label) for label in plain):
        wildcard = "" if prefix else ", perhaps after '*.'"
        raise ValueError(f"{prefix}must be a host name: letters, digits and hyphens with dots between{wildcard}")
    if not prefix and labels[-2:] == to_labels(DOMAIN):
        raise ValueError(f"cannot be given: names in {DOMAIN} are the gateway's and the guests'")
    return labels


@dataclass(slots=True)
class ExtraNames:
    """The names of the settings and of the API.

    find_local gives the packed addresses of a name that netstack knows by itself, None for others.
    """

    writer: AnswerWriter = field(default_factory=AnswerWriter)
    find_local: Callable[[Labels], Sequence[bytes] | None] = lambda labels: None
    configured: dict[Labels, Entry] = field(init=False, default_factory=dict)
    added: dict[Labels, Entry] = field(init=False, default_factory=dict)
    version: int = field(init=False, default=0)
    """Counts the changes."""
    _depth: int = field(init=False, default=0)
    _names: dict[bytes, list[Labels]] = field(init=False, default_factory=dict)

    def configure(self, entries: Mapping[Labels, Entry]) -> None:
        """Take the names of the settings; those of the API stay."""
        self.configured = dict(entries)
        self._index()

    def add(self, entries: Mapping[Labels, Entry | None]) -> None:
        """Add names, or with None take away names that were added. Raises ValueError when there are too many."""
        fresh = dict(self.added)
        for labels, entry in entries.items():
            if entry is None:
                fresh.pop(labels, None)
            else:
                fresh[labels] = entry
        if len(fresh) > MAX_NAMES:
            raise ValueError(f"there would be more than {MAX_NAMES} names")
        self.added = fresh
        self._index()

    def describe(self) -> list[dict[str, object]]:
        """Every name, where it came from, and what it stands for."""
        return [
            {"name": b".".join(labels).decode("ascii"), "value": entry.describe(), "source": source}
            for source, entries in (("api", self.added), ("config", self.configured))
            for labels, entry in entries.items()
        ]

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer a query for one of these names; None for others, and for aliases of names that are not local."""
        if not self._depth or question.class_ not in (CLASS_IN, TYPE_ANY):
            return None
        labels = question.labels
        entry = self._find(labels)
        if entry is None:
            if labels[-1:] == (b"arpa",):
                address = parse_reverse(labels)
                names = self._names.get(address) if address is not None else None
                if names:
                    return self.writer.names(query, question, names)
            return None
        found = self._addresses(entry)
        if found is None and question.type in (TYPE_A, TYPE_AAAA):
            return None
        return self.writer.addresses(query, question, found or ())

    def target(self, question: Question) -> Labels | None:
        """The name to ask others for when a query is for the addresses of an alias, else None."""
        if not self._depth or question.class_ != CLASS_IN or question.type not in (TYPE_A, TYPE_AAAA):
            return None
        target = None
        entry = self._find(question.labels)
        for _ in range(MAX_ALIASES):
            if entry is None or entry.alias is None:
                return target if entry is None else None
            target = entry.alias
            entry = self._find(target)
        return None

    async def follow(self, query: bytes, question: Question, ask: Callable[[bytes], Awaitable[bytes]]) -> bytes:
        """Answer a query that has a target with the addresses that `ask` finds for it."""
        target = self.target(question)
        if target is None:
            return write_error(query, SERVFAIL)
        name = b"".join(bytes([len(label)]) + label for label in target) + b"\0"
        head = query[:2] + RD.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\0"
        answer = await ask(head + name + question.type.to_bytes(2, "big") + b"\0\1")
        rcode = rcode_of(answer)
        if rcode not in (NOERROR, NXDOMAIN):
            return write_error(query, rcode)
        # Whatever the chain of CNAMEs was: the addresses at its end are all that is asked for.
        asked = parse_question(answer)
        found = read_answers(answer, asked.end) if asked is not None else None
        if found is None:
            return write_error(query, SERVFAIL)
        kept = [record for record in found if record.type == question.type]
        ttl = min((record.ttl for record in kept), default=0)
        records: Records = address_records(question, [record.data for record in kept[:MAX_ADDRESSES]])
        return self.writer.write(query, question, rcode, records, ttl=min(ttl, _MAX_TTL))

    def _find(self, labels: Labels) -> Entry | None:
        entry = self.added.get(labels) or self.configured.get(labels)
        if entry is not None:
            return entry
        # The longest wildcard first. There are no more of them to look for than the longest one has labels.
        for start in range(max(1, len(labels) - self._depth + 1), len(labels)):
            wildcard = (b"*", *labels[start:])
            entry = self.added.get(wildcard) or self.configured.get(wildcard)
            if entry is not None:
                return entry
        return None

    def _addresses(self, entry: Entry) -> Sequence[bytes] | None:
        """The addresses at the end of an alias; none of them for a circle, None when the end is not local."""
        for _ in range(MAX_ALIASES):
            if entry.alias is None:
                return entry.addresses
            following = self._find(entry.alias)
            if following is None:
                return self.find_local(entry.alias)
            entry = following
        return ()

    def _index(self) -> None:
        self.version += 1
        self._depth = max((len(labels) for labels in (*self.added, *self.configured)), default=0)
        self._names = {}
        for labels, entry in (*self.added.items(), *self.configured.items()):
            if labels[0] != b"*":
                for packed in entry.addresses:
                    names = self._names.setdefault(packed, [])
                    if len(names) < MAX_ADDRESSES and labels not in names:
                        names.append(labels)


def merge_entries(pairs: Iterable[tuple[Labels, Entry]]) -> dict[Labels, Entry]:
    """The entries by name. What is there twice in other letters counts once, with all addresses."""
    merged: dict[Labels, Entry] = {}
    for labels, entry in pairs:
        known = merged.get(labels)
        if known is not None and known.alias is None and entry.alias is None:
            entry = Entry(tuple(dict.fromkeys((*known.addresses, *entry.addresses))))
        merged[labels] = entry
    return merged
