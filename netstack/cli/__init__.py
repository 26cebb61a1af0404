"""The command line. Each command is a module of its own, imported when it is used, so that none pays for the others.

Whatever goes wrong ends here: bad input as one line and exit status 2, a failure as one line and exit status 1. Only
a bug in netstack shows a traceback.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from netstack.cli.faults import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    INPUT_ERRNOS,
    CommandError,
    leaves,
    one_line,
    say,
    what_to_do,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# In the order of --help. The value is a module in this package, whose `app` is the command or the group of commands.
COMMANDS = {
    name: name
    for name in (
        "run",
        "qemu",
        "exec",
        "status",
        "top",
        "leases",
        "flows",
        "publish",
        "connect",
        "dns",
        "proxy",
        "pcap",
        "doctor",
    )
}


class LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"netstack.cli.{COMMANDS[cmd_name]}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


# Without markup typer does not import rich, which would cost every start 50 ms.
app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: netstack run --link unix:///tmp/netstack.sock",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from netstack.version import __version__

        print(f"netstack {__version__}")
        raise typer.Exit


@app.callback()
def _netstack(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A user-mode network for virtual machines: every packet of the guest leaves as ordinary traffic of the host."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None and given[:1] == ["run"]:
        # Until the network obeys signals itself, half a second from now, it has nothing to give up: a normal end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))
    lost: OSError | None = None
    try:
        status = _run(given)
    finally:
        lost = _give_up_closed_streams()
    if lost is None:
        return status
    say(f"netstack: standard output: {one_line(lost)}{what_to_do(lost)}")
    return status or EXIT_FAILURE


def _give_up_closed_streams() -> OSError | None:
    """Lines that nobody reads must not become the exit status: at its end Python flushes, and fails with 120.

    Returns why results could not be written, where somebody may have wanted them: a full disk.
    """
    lost = None
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed before we began
            continue
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                lost = error
            # What is left in the buffer goes nowhere, without an error.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except ValueError:  # closed by somebody
            continue
    return lost


def _run(given: Sequence[str]) -> int:
    try:
        status = typer.main.get_command(app).main(given, prog_name="netstack", standalone_mode=False)
    except SystemExit as error:  # typer's answer to a closed pipe
        return error.code if isinstance(error.code, int) else EXIT_FAILURE
    except typer.Abort:
        return EXIT_FAILURE
    except Exception as error:
        return _explain(error)
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> int:
    """Say in one line why a command ended, and return its exit status; raise what can only be a bug."""
    from netstack.config.problems import ConfigError
    from netstack.core.forwards import ForwardError

    first, *others = leaves(error)
    if isinstance(first, CommandError):
        say(f"netstack: {one_line(first)}")
        return first.exit_code
    if isinstance(first, ConfigError):
        say(f"netstack: {one_line(first)}")
        return EXIT_BAD_INPUT
    if isinstance(first, ForwardError):
        say(f"netstack: {one_line(first)}")
        return EXIT_BAD_INPUT if first.kind in ("invalid", "denied") else EXIT_FAILURE
    if isinstance(first, OSError):
        say(f"netstack: {one_line(first)}{what_to_do(first)}")
        return EXIT_BAD_INPUT if first.errno in INPUT_ERRNOS else EXIT_FAILURE
    # Usage errors: typer took click in with 0.26 and the class moved, but this method has always been theirs.
    explain = getattr(first, "format_message", None)
    if explain is not None:
        if explain().startswith("Usage:"):  # a group without a command
            say(explain())
            return EXIT_BAD_INPUT
        context = getattr(first, "ctx", None)
        command = context.command_path if context is not None else "netstack"
        say(f"netstack: {' '.join(explain().split()).rstrip('.')}; see {command} --help")
        return int(getattr(first, "exit_code", EXIT_BAD_INPUT))
    for other in others:
        say(f"netstack: {one_line(other)}")
    raise error
