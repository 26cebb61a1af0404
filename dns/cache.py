"""What nameservers said lately, kept for as long as they allow (RFC 2308, RFC 8767, RFC 9520).

Theory of operation
-------------------
A key is the scopes that were asked (their keys), the name, type and class, and the DO and CD bits: another scope's
answer is another answer, so that what the world said of a company's name is not given when the VPN is up (rule 35). "No
such name" is kept for all types of the name at once (RFC 2308 5, RFC 8020 apart: names below are asked for).

    positive   the smallest TTL of the reply, a day at most
    negative   the SOA's TTL or MINIMUM, whichever is less, an hour at most; without an SOA not at all
    failure    1 s, then 2, 4, and 5 s for as long as it fails (RFC 9520 3.2); forgotten when the servers change
    stale      where it is wanted: `max_stale` seconds more, for when nobody answers

Only whole replies are kept, under the question that they answered: nothing that came along in one is ever an answer by
itself (RFC 5452 6). The least recently used ones go first when there are too many, in number or in bytes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from netstack.dns.message import CD, NXDOMAIN, Ede, Query, Question
from netstack.dns.replies import Reply

# systemd-resolved keeps 4,096, CoreDNS 9,984.
MAX_ENTRIES = 10_000
MAX_BYTES = 16 << 20
# A longer reply is not kept: some hundreds of them would push out everything else.
MAX_REPLY = 32 << 10

# What an entry costs besides the reply's bytes: objects and keys, measured with CPython 3.11.
_OVERHEAD = 900
_FAILURE_TTL, _FAILURE_TTL_MAX = 1.0, 5.0

# RFC 8767 4 and 5: what is given out late may be kept for 30 s, and so long nobody is asked again.
STALE_TTL = 30

Keys = tuple[str, ...]
"""The keys of the scopes that were asked."""
_Key = tuple[Keys, bytes, int, int]


@dataclass(slots=True, eq=False)
class Entry:
    """One reply, or the lack of one."""

    reply: Reply | None
    """None when nobody answered."""
    at: float
    until: float
    failures: int = 0
    """How often it failed, one after the other; 0 for what is an answer."""
    ede: tuple[Ede, ...] = ()
    stale_until: float = 0.0
    """Until then it is given out though it is too old: a refresh has failed just now."""
    size: int = _OVERHEAD

    def age(self, now: float) -> int:
        """In whole seconds; what a clock that went back would make less than 0 is 0."""
        return max(int(now - self.at), 0)


class Cache:
    """Replies by scope and question. `max_stale` is for how long replies are of use when nobody answers; 0: not."""

    def __init__(self, max_stale: float = 0.0, *, entries: int = MAX_ENTRIES, size: int = MAX_BYTES) -> None:
        self.max_stale = max_stale
        self.counters: Counter[str] = Counter()
        self.bytes = 0
        self._entries: OrderedDict[_Key, Entry] = OrderedDict()
        self._max_entries = entries
        self._max_bytes = size

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: Keys, query: Query, now: float) -> Entry | None:
        """What is known and still holds."""
        entry = self._find(keys, query)
        return entry if entry is not None and (now < entry.until or now < entry.stale_until) else None

    def find_stale(self, keys: Keys, query: Query, now: float) -> Entry | None:
        """What is known, though it may be too old; never a failure."""
        entry = self._find(keys, query) if self.max_stale else None
        if entry is None or entry.failures or now >= entry.until + self.max_stale:
            return None
        return entry

    def keep(self, keys: Keys, query: Query, reply: Reply, now: float) -> None:
        """Keep a reply, if it may be kept."""
        if not reply.lifetime or reply.size > MAX_REPLY:
            self._forget_failure(keys, query)
            return
        question = query.question
        # An alias to a name that is not there says so of that name, and of this type.
        whole_name = reply.rcode == NXDOMAIN and not reply.counts[0]
        if whole_name:
            self._remove((keys, question.name, -1, _bits(query)))
            self._remove(_key(keys, query))
        key = (keys, question.name, -1, _bits(query)) if whole_name else _key(keys, query)
        if not whole_name:
            self._remove((keys, question.name, -1, _bits(query)))
        self._put(key, Entry(reply, now, now + reply.lifetime, size=_OVERHEAD + reply.size + 6 * len(question.name)))

    def keep_failure(self, keys: Keys, query: Query, reply: Reply | None, ede: tuple[Ede, ...], now: float) -> None:
        """Remember that nobody could answer, for a moment."""
        key = _key(keys, query)
        was = self._entries.get(key)
        failures = was.failures + 1 if was is not None and now < was.until + 60 else 1
        ttl = min(_FAILURE_TTL * 2 ** min(failures - 1, 8), _FAILURE_TTL_MAX)
        if reply is not None and reply.size > MAX_REPLY:
            reply = None
        size = _OVERHEAD + (reply.size if reply is not None else 0) + sum(len(text) for _, text in ede)
        self._put(key, Entry(reply, now, now + ttl, failures, ede, size=size))

    def flush(self, *, scopes: frozenset[str] | None = None, name: bytes | None = None, failures: bool = False) -> int:
        """Forget entries, and give how many: all of them, or of what is said.

        That is any of: these scopes, this name (as on the wire, in lower case), failures.
        """
        if scopes is None and name is None and not failures:
            count = len(self._entries)
            self._entries.clear()
            self.bytes = 0
            return count
        going = [
            key
            for key, entry in self._entries.items()
            if (scopes is not None and not scopes.isdisjoint(key[0]))
            or (name is not None and key[1] == name)
            or (failures and entry.failures)
        ]
        for key in going:
            self._remove(key)
        return len(going)

    def describe(self) -> dict[str, int]:
        """Figures for people and programs."""
        return {
            "entries": len(self._entries),
            "bytes": self.bytes,
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            **self.counters,
        }

    def _find(self, keys: Keys, query: Query) -> Entry | None:
        entries = self._entries
        key = (keys, query.question.name, query.question.type, _bits(query))
        entry = entries.get(key)
        if entry is None:
            key = (keys, query.question.name, -1, key[3])
            entry = entries.get(key)
            if entry is None:
                return None
        entries.move_to_end(key)
        return entry

    def _forget_failure(self, keys: Keys, query: Query) -> None:
        entry = self._entries.get(_key(keys, query))
        if entry is not None and entry.failures:
            self._remove(_key(keys, query))

    def _put(self, key: _Key, entry: Entry) -> None:
        self._remove(key)
        self._entries[key] = entry
        self.bytes += entry.size
        while self._entries and (len(self._entries) > self._max_entries or self.bytes > self._max_bytes):
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.size
            self.counters["evicted"] += 1

    def _remove(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size


def _bits(query: Query) -> int:
    """The bits that make another question of it. The class is always IN."""
    opt = query.opt
    return query.flags & CD | (opt is not None and opt.dnssec_ok)


def _key(keys: Keys, query: Query) -> _Key:
    question: Question = query.question
    return keys, question.name, question.type, _bits(query)


def flight_key(keys: Keys, query: Query) -> _Key:
    """What makes two queries the same one, for who asks the servers (rule 27)."""
    return _key(keys, query)
