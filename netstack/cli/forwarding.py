"""What the commands that open a network have in common about forwards: the option -p, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from netstack.cli.faults import say

if TYPE_CHECKING:
    from netstack.gateway import Network

# More than these are not listed in a line for people.
_SHOWN = 8

PublishOption = Annotated[
    list[str] | None,
    typer.Option(
        "--publish",
        "-p",
        metavar="SPEC",
        help="Forward a port or socket of the host to a guest, may be repeated: "
        "[HOST_IP:]HOST_PORT:[GUEST:]GUEST_PORT[/udp], with -LAST for ranges, or unix:PATH:[GUEST:]GUEST_PORT.",
    ),
]


def describe_forwards(network: Network) -> str:
    """The forwards that are open, in few words; "" when there are none."""
    specs = [str(forward.spec) for forward in network.forwards]
    more = f" and {len(specs) - _SHOWN} more" if len(specs) > _SHOWN else ""
    return ", ".join(specs[:_SHOWN]) + more


def tell_chosen_ports(network: Network) -> None:
    """Say which ports were taken where the choice was left to us."""
    for forward in network.forwards:
        if forward.spec != forward.asked:
            say(f"netstack: {forward.asked} is forwarded at {forward.spec}")
