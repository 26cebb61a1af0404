"""`netstack dns`: the DNS of a running netstack: what a guest would be told, who is asked for what, a fresh start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.client import ask_api
from netstack.cli.faults import CommandError, InputError
from netstack.cli.output import print_json, print_lines, print_table, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

# A query may take as long as all upstreams together are given.
QUERY_SECONDS = 10.0

Api = Annotated[
    str | None, typer.Option("--api", metavar="URI", help="The API's address. Default: the socket of `netstack run`.")
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        "--token-file", metavar="FILE", help="Where the token of an API at tcp:// is. Default: where run put it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print what the API says.")]

EDE = "extended error"  # RFC 8914: why there is no better answer

NOT_OURS = "what answers is not netstack, or another version: see --json for its words"


@app.callback(epilog="Example: netstack dns query git.corp.example AAAA")
def _dns() -> None:
    """Look into the DNS of a running netstack."""


@app.command(epilog="Example: netstack dns query git.corp.example AAAA")
def query(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name to ask for.")],
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="A, AAAA, MX, TYPE65280 and so on.")] = "A",
    api: Api = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> int:
    """Ask as a guest would, and show the answer. Ends with 1 where there is none (SERVFAIL, REFUSED)."""
    found = ask_api("/v1/dns/query", api, token_file, timeout=QUERY_SECONDS, name=name, type=kind)
    try:
        answer = bytes.fromhex(found["answer"])
        failed = found["rcode"] not in ("NOERROR", "NXDOMAIN")
        if as_json:
            print_json({**found, "records": list(_records(answer))})
            return int(failed)
        print_lines([printable(f"{found['rcode']} for {found['name']} {found['type']} in {found['ms']} ms")])
        for section, owner, ttl, type_, data in _rows(answer):
            if section == EDE:
                print_lines([f"because: {printable(data) or 'the server does not say'} (extended error {ttl})"])
                continue
            words = (printable(part) for part in (owner, ttl, type_, data))
            print_lines([" ".join(words) + (f"  ({section})" if section != "answer" else "")])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(NOT_OURS) from None
    return int(failed)


@app.command(epilog="Example: netstack dns routes")
def routes(api: Api = None, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show which servers are asked for which names, and where each line came from."""
    state = ask_api("/v1/dns", api, token_file)
    if as_json:
        print_json({key: state.get(key) for key in ("source", "routes", "search", "servers", "version")})
        return
    try:
        source = state["source"]
        print_lines([f"the host is followed by {printable(source['name'])}: {printable(source['why'])}"])
        print_table(
            "Routes",
            ("names", "servers", "interface", "from"),
            (
                (
                    "all others" if route["domain"] == "." else f"{route['domain']} and below",
                    ", ".join(route["servers"]) or "nobody",
                    ", ".join(route["interfaces"]) or "-",
                    route["source"] or "-",
                )
                for route in state["routes"]
            ),
        )
        print_lines([f"guests search {printable(', '.join(state['search'])) or 'no domain of the host'}"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(NOT_OURS) from None


@app.command(epilog="Example: netstack dns flush git.corp.example")
def flush(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Forget this name only.")] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="SCOPE", help="Forget the answers of this scope: see routes --json.")
    ] = None,
    api: Api = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Empty the cache."""
    if name is not None and scope is not None:
        raise InputError(f"{name} and --scope {scope}: name one of them")
    wanted = {key: value for key, value in (("name", name), ("scope", scope)) if value is not None}
    found = ask_api("/v1/dns/flush", api, token_file, post=wanted)
    if as_json:
        print_json(found)
    else:
        print_lines([f"{found.get('flushed', 0)} answers forgotten"])


def _records(answer: bytes) -> Iterator[dict[str, Any]]:
    for section, owner, ttl, kind, data in _rows(answer):
        yield {"section": section, "name": owner, "ttl": ttl, "type": kind, "data": data}


def _rows(answer: bytes) -> Iterator[tuple[str, str, int, str, str]]:
    """The records of an answer: section, name, TTL, type, data. Untrusted: what cannot be read is shown in hex.

    It runs in a process of its own, so that a message made to keep dnslib busy keeps nobody else waiting.
    """
    import dnslib

    from netstack.dns.mnemonics import type_name

    try:
        message = dnslib.DNSRecord.parse(answer)
        for section, records in (("answer", message.rr), ("authority", message.auth), ("additional", message.ar)):
            for record in records:
                if record.rtype != dnslib.QTYPE.OPT:
                    yield section, str(record.rname), record.ttl, type_name(record.rtype), str(record.rdata)
                    continue
                for option in record.rdata:
                    if option.code == 15 and len(option.data) >= 2:
                        code, text = int.from_bytes(option.data[:2], "big"), option.data[2:].decode("utf-8", "replace")
                        yield EDE, "", code, "EDE", text
    except Exception:  # dnslib raises of all kinds on what a server made up
        yield "answer", "(unreadable)", 0, "", answer.hex()
