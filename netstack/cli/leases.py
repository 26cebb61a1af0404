"""`netstack leases`: which addresses guests have, asked over the API."""

from __future__ import annotations

import typer

from netstack.cli.client import NOT_OURS, ApiOption, JsonOption, TokenFileOption, ask_api
from netstack.cli.faults import CommandError
from netstack.cli.output import human_seconds, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(epilog="Example: netstack leases --json")
def leases(api: ApiOption = None, token_file: TokenFileOption = None, as_json: JsonOption = False) -> None:
    """Show the addresses that guests have, and those that they had."""
    found = ask_api("/v1/leases", api, token_file)
    if as_json:
        print_json(found)
        return
    try:
        print_table(
            "Leases",
            ("name", "MAC", "IPv4", "IPv6", "ends", "link"),
            (
                (
                    lease["name"] or "-",
                    lease["mac"],
                    lease["address"],
                    lease["address6"] or "-",
                    _end(lease["live"], lease["static"], lease["expires_in"] or lease["expires6_in"]),
                    lease["link"] or "-",
                )
                for lease in found["leases"]
            ),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(NOT_OURS) from None


def _end(live: bool, static: bool, seconds: float | None) -> str:
    if not live:
        return "has ended"
    return ("static, " if static else "") + (f"in {human_seconds(seconds)}" if seconds else "never")
