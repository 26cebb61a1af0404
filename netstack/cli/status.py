"""`netstack status`: what a running network does, asked over its API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.client import ask_api
from netstack.cli.faults import CommandError
from netstack.cli.output import human_bytes, human_seconds, print_json, print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(rich_markup_mode=None, add_completion=False)

SHOWN_FLOWS = 20


@app.command(epilog="Example: netstack status --json")
def status(
    api: Annotated[
        str | None,
        typer.Option(metavar="URI", help="The API's address. Default: the socket of `netstack run`."),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where the token of an API at tcp:// is. Default: where run put it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the API says.")] = False,
) -> None:
    """Show what is running: links, guests, flows and what was dropped."""
    state = ask_api("/v1/status", api, token_file)
    if as_json:
        print_json(state)
    else:
        try:
            show(state)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CommandError("what answers is not netstack, or another version: see --json for its words") from None


def show(state: Mapping[str, Any]) -> None:
    """Tables for people."""
    network, flows = state["network"], state["flows"]
    print_lines(
        [
            f"netstack {state['version']}, process {state['pid']}, up {human_seconds(state['uptime'])}",
            f"network {network['subnet']} and {network['subnet6']}, MTU {network['mtu']}",
            f"gateway {network['gateway']} and {network['gateway6']}, DNS {network['dns']} and {network['dns6']}",
        ]
    )
    print_table(
        "Links",
        ("name", "guests", "up", "from guest", "to guest", "frames from", "frames to", "drops to"),
        (
            (
                link["name"],
                link["guests"],
                "yes" if link["connected"] else "no",
                human_bytes(link.get("bytes_from_guest", 0)),
                human_bytes(link.get("bytes_to_guest", 0)),
                link.get("frames_from_guest", 0),
                link.get("frames_to_guest", 0),
                link.get("drops_to_guest", 0),
            )
            for link in state["links"]
        ),
    )
    print_table(
        "Guests",
        ("name", "MAC", "addresses", "link", "seen"),
        (
            (g["name"] or "-", g["mac"], ", ".join(g["addresses"]), g["link"], f"{human_seconds(g['seen'])} ago")
            for g in state["guests"]
        ),
    )
    if state["forwards"]:
        print_table(
            "Forwards",
            ("forward", "by", "open", "all", "refused", "last error"),
            (
                (
                    forward["spec"],
                    forward["owner"],
                    forward["connections"]["open"],
                    forward["connections"]["total"],
                    forward["connections"]["refused"],
                    forward["last_error"] or "-",
                )
                for forward in state["forwards"]
            ),
        )
    shown = flows["list"][:SHOWN_FLOWS]
    print_lines([f"{flows['tcp']} TCP, {flows['udp']} UDP and {flows['icmp']} ICMP flows, at most {flows['limit']}"])
    print_table(
        "Flows",
        ("protocol", "guest", "peer", "state", "age", "from guest", "to guest"),
        (
            (
                flow["protocol"],
                flow["guest"],
                flow["peer"],
                flow["state"],
                human_seconds(flow["age"]),
                human_bytes(flow["bytes_from_guest"]),
                human_bytes(flow["bytes_to_guest"]),
            )
            for flow in shown
        ),
    )
    if len(flows["list"]) > len(shown):
        print_lines([f"and {len(flows['list']) - len(shown)} more: netstack status --json"])
    if state["drops"]:
        drops: list[tuple[str, int]] = sorted(state["drops"].items(), key=lambda item: -int(item[1]))
        print_table("Dropped", ("reason", "frames"), drops)
