"""`netstack pcap`: the capture files of the pcap debug mode, for people's eyes.

scapy does the dissection. It takes a second to import and is imported nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.capture_file import NANOSECONDS, CaptureError, read_capture
from netstack.cli.faults import CommandError, InputError, what_to_do
from netstack.cli.output import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from netstack.cli.capture_file import CapturedFrame

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

DROPPED = "drop: "  # how netstack's comments on dropped frames begin; the counter's name follows
LINKTYPE_ETHERNET = 1


@app.callback(epilog="Example: netstack pcap show --drops guests.pcapng")
def _pcap() -> None:
    """Look into capture files, pcap or pcapng."""


@app.command(epilog="Example: netstack pcap show --limit 20 guests.pcapng")
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A pcap or pcapng file.")],
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Show so many frames at most. 0: all.")] = 0,
    drops: Annotated[bool, typer.Option("--drops", help="Show only frames that netstack dropped.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every field of every header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each frame, one on a line.")] = False,
) -> int:
    """Show the frames of a capture, one on a line, with the reason beside each that netstack dropped."""
    dissect = _load_scapy()
    shown = 0
    try:
        with Path(file).open("rb") as source:
            for number, frame in enumerate(read_capture(source), 1):
                if drops and not frame.comment.startswith(DROPPED):
                    continue
                if limit and shown >= limit:
                    break
                shown += 1
                packet = dissect(frame)
                _write(_as_json(number, frame, packet) if as_json else _as_line(number, frame, packet))
                if verbose and not as_json:
                    _write(_fields(packet))
        _write("", flush=True)
    except BrokenPipeError:
        _leave_output()  # the reader has seen enough (head, less)
    except CaptureError as error:
        sys.stdout.flush()
        raise InputError(f"{file}: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a pcap or pcapng file") from None
    return 0


def _write(text: str, *, flush: bool = False) -> None:
    """Write a result. That its disk is full is not the fault of the file that is read."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_output()
        raise CommandError(f"standard output: {error.strerror}{what_to_do(error)}") from None


def _leave_output() -> None:
    """What is still in the buffer goes nowhere. Python would complain once more when it flushes at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load_scapy() -> Callable[[CapturedFrame], Any]:
    """A function that dissects a frame; None from it for a kind of link that nobody knows. Never raises on bytes."""
    logging.getLogger("scapy").setLevel(logging.ERROR)  # it warns about this host's interfaces, which are not asked for
    from scapy.config import conf

    # What crosses netstack, and not the three hundred protocols of scapy.all.
    for layer in ("l2", "inet", "inet6", "dhcp", "dhcp6", "dns", "ntp"):
        __import__(f"scapy.layers.{layer}")
    from scapy.packet import Raw

    def dissect(frame: CapturedFrame) -> Any:
        kind = conf.l2types.num2layer.get(frame.linktype, Raw)
        try:
            return kind(frame.data)
        except Exception:
            return Raw(frame.data)

    return dissect


def _summary(packet: Any) -> str:
    try:
        summary = str(packet.summary()).removeprefix("Ether / ")
        # scapy leaves the addresses out where a layer above has words of its own, such as DNS.
        for layer in (packet, packet.payload):
            if layer.name in ("IP", "IPv6") and layer.src not in summary:
                summary = f"{layer.src} > {layer.dst} {summary.removeprefix(f'{layer.name} / ')}"
        return printable(summary)
    except Exception as error:
        return f"(scapy cannot read it: {type(error).__name__})"


def _fields(packet: Any) -> str:
    try:
        text = str(packet.show(dump=True))
    except Exception as error:
        text = f"(scapy cannot read it: {type(error).__name__})\n"
    return "".join(f"    {printable(line)}\n" for line in text.splitlines()) + "\n"


def _time(wall_ns: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(wall_ns // NANOSECONDS).astimezone()
    except (OverflowError, ValueError, OSError):
        return None


def _as_line(number: int, frame: CapturedFrame, packet: Any) -> str:
    when = _time(frame.wall_ns)
    clock = f"{when:%H:%M:%S}.{frame.wall_ns % NANOSECONDS:09d}" if when else str(frame.wall_ns)
    way = {None: "", False: " from guest", True: " to guest"}[frame.to_guest]
    link = f" {printable(frame.interface)}" if frame.interface else ""
    cut = f" (cut to {len(frame.data)})" if len(frame.data) < frame.length else ""
    comment = f"  [{printable(frame.comment)}]" if frame.comment else ""
    return f"{number} {clock}{link}{way} {frame.length} bytes{cut}: {_summary(packet)}{comment}\n"


def _as_json(number: int, frame: CapturedFrame, packet: Any) -> str:
    import json

    when = _time(frame.wall_ns)
    dropped = frame.comment.removeprefix(DROPPED) if frame.comment.startswith(DROPPED) else None
    return (
        json.dumps(
            {
                "number": number,
                "time": when.isoformat() if when else None,
                "time_ns": frame.wall_ns,
                "link": frame.interface or None,
                "to_guest": frame.to_guest,
                "length": frame.length,
                "captured": len(frame.data),
                "summary": _summary(packet),
                "layers": [layer.__name__ for layer in packet.layers()],
                "dropped": dropped,
                "comment": frame.comment or None,
            }
        )
        + "\n"
    )
