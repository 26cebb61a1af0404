"""`netstack publish`: the forwards of a running netstack: ports and sockets of the host that lead to its guests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from netstack.cli.client import ask_api
from netstack.cli.faults import CommandError, check_choice
from netstack.cli.output import human_bytes, print_json, print_lines, print_table, printable

if TYPE_CHECKING:
    from netstack.config import ForwardSpec

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

PATH = "/v1/forwards"

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


@app.callback(epilog="Example: netstack publish add 8080:80")
def _publish() -> None:
    """Forward ports of the host to guests of a running netstack."""


@app.command(epilog="Example: netstack publish add 127.0.0.1:8080:web:80 --on-conflict next")
def add(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="[HOST_IP:]HOST_PORT:[GUEST:]GUEST_PORT[/udp], with -LAST for ranges, or "
            "unix:PATH:[GUEST:]GUEST_PORT. Host port 0 takes a free one.",
        ),
    ],
    on_conflict: Annotated[
        str,
        typer.Option(
            metavar="error|next|loopback",
            help="Where the port is in use: fail, take the next free one, or a loopback address of the guest's own.",
        ),
    ] = "error",
    source: Annotated[
        str,
        typer.Option(metavar="caller|gateway", help="As whom the guest sees callers: themselves where it can be."),
    ] = "caller",
    description: Annotated[str, typer.Option(metavar="TEXT", help="To be shown by ls.")] = "",
    api: Api = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Open a forward, and print its SPEC with the port that it got."""
    from netstack.config import parse_forward

    check_choice("--on-conflict", on_conflict, ("error", "next", "loopback"))
    check_choice("--source", source, ("caller", "gateway"))
    wanted = {"spec": str(parse_forward(spec)), "on_conflict": on_conflict, "source": source}
    made = ask_api(PATH, api, token_file, post=wanted | ({"description": description} if description else {}))
    if as_json:
        print_json(made)
    else:
        print_lines([printable(made.get("spec", ""))])


@app.command(epilog="Example: netstack publish rm 127.0.0.1:8080:80")
def rm(
    which: Annotated[list[str], typer.Argument(metavar="ID|SPEC...", help="As ls shows it.")],
    api: Api = None,
    token_file: TokenFile = None,
) -> None:
    """Close forwards. Connections that are open go on."""
    listed = _list(api, token_file)
    found = [_find(text, listed) for text in which]
    for ident in dict.fromkeys(found):
        ask_api(f"{PATH}/{quote(ident, safe='')}", api, token_file, delete=True)


@app.command(epilog="Example: netstack publish ls --json")
def ls(api: Api = None, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List the forwards and what went through them."""
    listed = _list(api, token_file)
    if as_json:
        print_json({"forwards": listed})
        return
    try:
        print_table(
            "Forwards",
            ("id", "forward", "by", "open", "all", "refused", "to guest", "from guest", "about"),
            (
                (
                    each["id"],
                    each["spec"],
                    each["owner"],
                    each["connections"]["open"],
                    each["connections"]["total"],
                    each["connections"]["refused"],
                    human_bytes(each["bytes_to_guest"]),
                    human_bytes(each["bytes_from_guest"]),
                    each["last_error"] or each["description"] or "-",
                )
                for each in listed
            ),
        )
    except (KeyError, TypeError):
        raise CommandError("what answers is not netstack, or another version: see --json for its words") from None


def _list(api: str | None, token_file: str | None) -> list[dict[str, Any]]:
    listed = ask_api(PATH, api, token_file).get("forwards")
    if not isinstance(listed, list):
        raise CommandError("what answers is not netstack, or another version")
    return listed


def _find(text: str, listed: list[dict[str, Any]]) -> str:
    """The id of the one forward that is meant."""
    by_id = [str(each["id"]) for each in listed if each.get("id") == text]
    if by_id:
        return by_id[0]
    from netstack.config import ConfigError, parse_forward

    try:
        wanted: ForwardSpec | None = parse_forward(text)
    except ConfigError:
        wanted = None
    found = [str(each["id"]) for each in listed if wanted is not None and each.get("spec") == str(wanted)]
    if not found:
        raise CommandError(f"there is no forward {text}; netstack publish ls shows them")
    return found[0]
