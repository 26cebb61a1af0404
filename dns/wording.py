"""What is said to guests: of what the cache has, and of what could not be found out (rules 13, 14, 33, 34)."""

from __future__ import annotations

from collections import Counter

from netstack.dns.cache import STALE_TTL, Cache, Entry, Keys
from netstack.dns.message import (
    EDE_CACHED,
    EDE_STALE,
    EDE_STALE_NXDOMAIN,
    NOERROR,
    NXDOMAIN,
    SERVFAIL,
    TYPE_A,
    TYPE_AAAA,
    Ede,
    Query,
    write_error,
)
from netstack.dns.replies import Reply


class Wording:
    """Writes answers. With `lenient_aaaa`, a AAAA that nobody answers is "no such type" where the A is known."""

    def __init__(self, cache: Cache, counters: Counter[str], *, lenient_aaaa: bool) -> None:
        self.lenient_aaaa = lenient_aaaa
        self._cache = cache
        self._counters = counters

    def entry(self, query: Query, entry: Entry, now: float) -> bytes:
        """The answer that the cache has."""
        if entry.failures:
            return self.refusal(query, entry.reply, (*entry.ede, (EDE_CACHED, f"failed {entry.age(now)} s ago")))
        assert entry.reply is not None  # only failures have none
        if now < entry.until:
            return entry.reply.write(query, entry.age(now))
        self._counters["dns_stale"] += 1
        code = EDE_STALE_NXDOMAIN if entry.reply.rcode == NXDOMAIN else EDE_STALE
        return entry.reply.write(query, stale_ttl=STALE_TTL, ede=((code, ""),))

    def failure(self, query: Query, reply: Reply | None, ede: tuple[Ede, ...], keys: Keys, now: float) -> bytes:
        """The answer where no server had one, or only one that is none."""
        question = query.question
        if self.lenient_aaaa and reply is None and question.type == TYPE_AAAA:
            twin = query._replace(question=question._replace(type=TYPE_A))
            entry = self._cache.find(keys, twin, now)
            if entry is not None and entry.reply is not None and entry.reply.positive:
                return write_error(query.wire, NOERROR, ede)
        return self.refusal(query, reply, ede)

    def refusal(self, query: Query, reply: Reply | None, ede: tuple[Ede, ...]) -> bytes:
        """Say that it failed: in the server's words, where it had some."""
        self._counters["dns_servfail"] += 1
        if reply is not None:
            return reply.write(query, ede=ede)
        return write_error(query.wire, SERVFAIL, ede)
