"""`netstack proxy`: what the host says about proxies, and what to tell a guest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.client import ask_api
from netstack.cli.faults import CommandError, check_choice
from netstack.cli.output import print_json, print_lines, print_table, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

Api = Annotated[
    str | None, typer.Option("--api", metavar="URI", help="The API's address. Default: the socket of `netstack run`.")
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        "--token-file", metavar="FILE", help="Where the token of an API at tcp:// is. Default: where run put it."
    ),
]

NOT_OURS = "what answers is not netstack, or another version: see --json for its words"

_SCHEMES = (("http", "http"), ("https", "https"), ("tcp", "all"))


@app.callback(epilog="Example: netstack proxy show")
def _proxy() -> None:
    """Look into the proxy settings of a running netstack, and hand them to guests."""


@app.command(epilog="Example: netstack proxy show")
def show(
    api: Api = None,
    token_file: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the API says.")] = False,
) -> None:
    """Show each source of proxy settings, what won and why. Passwords are not shown."""
    state = ask_api("/v1/proxy", api, token_file)
    if as_json:
        print_json(state)
        return
    try:
        if not state["enabled"]:
            print_lines(["proxies are turned off: proxy.enabled is false"])
            return
        effective, won = state["effective"], state["won"]
        print_table(
            "In use",
            ("for", "way", "from"),
            [
                *((name, _way(effective, name, key), won.get(name, "-")) for name, key in _SCHEMES),
                *(
                    (f"below {domain}", _way(one, "http", "http"), won["domains"])
                    for domain, one in _domains(effective)
                ),
                ("not through it", ", ".join(effective["no_proxy"]) or "-", won.get("no_proxy", "-")),
            ],
        )
        print_table("Sources, the highest rank first", ("source", "where", "says"), map(_source, state["sources"]))
        pac = state["pac"]
        if pac["source"]:
            where = pac["script"] or "not fetched"
            print_lines([printable(f"PAC: {where}; {pac['pac_evaluations']} asked, {pac['pac_failures']} failed")])
        told = state["guests"]
        print_lines([printable(f"guests are told ({told['mode']}): {told['env'] or 'nothing'}")])
        print_lines([printable(f"problem: {words}") for words in state["problems"]])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(NOT_OURS) from None


@app.command(epilog="Example: eval $(netstack proxy env)")
def env(
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="F",
            help="shell, env, docker, docker-daemon, containerd, systemd, apt, cloud-init or json.",
        ),
    ] = "shell",
    api: Api = None,
    token_file: TokenFile = None,
) -> None:
    """Print the proxy settings for a guest, as shell lines or as a program's configuration file."""
    from netstack.proxy.handout import FORMATS

    check_choice("--format", form, FORMATS)
    found = ask_api("/v1/proxy/env", api, token_file, format=form)
    text = found.get("text")
    if not isinstance(text, str):
        raise CommandError(NOT_OURS)
    sys.stdout.write(text)


def _way(settings: dict[str, Any], scheme: str, key: str) -> str:
    if scheme in settings["pac_schemes"]:
        return "PAC script"
    return settings[key] or "direct"


def _domains(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from settings["domains"].items()


def _source(layer: dict[str, Any]) -> tuple[str, str, str]:
    said = [f"{key} {server}" for key, server in layer["servers"].items()]
    if layer["pac"]:
        said.append(f"PAC {layer['pac']}")
    if layer["no_proxy"]:
        said.append(f"not for {', '.join(layer['no_proxy'])}")
    said += [f"below {domain}: {_source(one)[2]}" for domain, one in layer["domains"].items()]
    return layer["name"], layer["why"] or "-", "; ".join(said) or "nothing"
