"""Asks for names by mDNS, all at once: `python -m tests.lab.mdns NAME TYPE [NAME TYPE ...]`; a line of JSON each.

Run in a namespace it is netstack's mDNS as netstack has it, and nothing else of netstack.
"""

from __future__ import annotations

import json
import sys
import time

import dns.message
import dns.rcode
import trio

from netstack.dns.mdns import Mdns
from netstack.dns.message import parse_question


async def main(words: list[str]) -> None:
    """Ask, and print what came."""
    async with trio.open_nursery() as nursery:
        mdns = Mdns(nursery)
        async with trio.open_nursery() as asking:
            for name, kind in zip(words[::2], words[1::2]):
                asking.start_soon(ask, mdns, name, kind)
        nursery.cancel_scope.cancel()


async def ask(mdns: Mdns, name: str, kind: str) -> None:
    query = dns.message.make_query(name, kind).to_wire()
    question = parse_question(query)
    assert question is not None
    assert mdns.claims(question)
    began = time.monotonic()
    answer = dns.message.from_wire(await mdns.answer(query, question))
    line = {
        "name": name,
        "type": kind,
        "rcode": dns.rcode.to_text(answer.rcode()),
        "data": sorted(record.to_text() for rrset in answer.answer for record in rrset),
        "ttls": [rrset.ttl for rrset in answer.answer],
        "seconds": round(time.monotonic() - began, 3),
        "queries": mdns.counters["mdns_queries"],
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
