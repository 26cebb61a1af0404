"""`netstack flows`: the open connections of guests, asked over the API."""

from __future__ import annotations

from typing import Annotated

import typer

from netstack.cli.client import NOT_OURS, ApiOption, JsonOption, TokenFileOption, api_client
from netstack.cli.faults import CommandError, check_choice
from netstack.cli.output import human_bytes, human_seconds, print_json, print_lines, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(epilog="Example: netstack flows --guest debian --protocol tcp")
def flows(
    guest: Annotated[str | None, typer.Option(metavar="GUEST", help="Only of this guest: name or address.")] = None,
    protocol: Annotated[str | None, typer.Option(metavar="PROTOCOL", help="Only tcp, udp or icmp.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=0, max=10_000, help="So many at most.")] = 1000,
    api: ApiOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the open connections of guests: who with whom, for how long, and how much."""
    asked = {"limit": str(limit)}
    if guest is not None:
        asked["guest"] = guest
    if protocol is not None:
        check_choice("--protocol", protocol, ("tcp", "udp", "icmp"))
        asked["protocol"] = protocol
    with api_client(api, token_file) as ask:
        found = ask("/v1/flows", parameters=asked)
    if as_json:
        print_json(found)
        return
    try:
        print_table(
            "Flows",
            ("protocol", "guest", "peer", "state", "age", "from guest", "to guest"),
            (
                (
                    flow["protocol"],
                    flow["guest"],
                    flow["peer"],
                    flow["state"] or "-",
                    human_seconds(flow["age"]),
                    human_bytes(flow["bytes_from_guest"]),
                    human_bytes(flow["bytes_to_guest"]),
                )
                for flow in found["list"]
            ),
        )
        print_lines([f"of {found['tcp']} TCP, {found['udp']} UDP and {found['icmp']} ICMP flows in all"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(NOT_OURS) from None
