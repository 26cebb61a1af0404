"""`netstack top`: what a running network does now, a picture a second.

Theory of operation
-------------------
Each picture is `GET /v1/status`, and rates are what changed since the one before over the time between them
(`Sampler`, which knows nothing of terminals). What came new in between counts from nothing; what is gone is gone.

On a terminal the picture replaces the one before (rich's Live, on the alternate screen, so that the shell's lines are
there again afterwards). Elsewhere each picture is printed below the last, and with --json each is a line of JSON, for
programs. SIGINT and SIGTERM are the normal end.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from netstack.cli.client import NOT_OURS, ApiOption, TokenFileOption, api_client
from netstack.cli.faults import CommandError
from netstack.cli.output import human_bytes, human_seconds, printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# Rows of a table, where the terminal has no height to go by.
ROWS: Final = 20

# What of the counters is about DNS queries, in the order in which it is shown.
_DNS: Final = {
    "dns_udp_queries": "queries",
    "dns_tcp_queries": "over TCP",
    "dns_cache_hits": "from cache",
    "dns_upstream_queries": "upstream",
    "dns_servfail": "failed",
}


@app.command(epilog="Example: netstack top --interval 2")
def top(
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", min=0.1, max=3600, help="Between two pictures.")
    ] = 1.0,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", min=0, help="So many pictures; 0: no end.")] = 0,
    api: ApiOption = None,
    token_file: TokenFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each picture.")] = False,
) -> None:
    """Show what is going on, live: guests, rates, flows, DNS and drops."""
    told: list[int] = []

    def stop(number: int, frame: object) -> None:
        # An exception alone may get lost: what is raised while an object is being finalised is not passed on.
        told.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        with api_client(api, token_file) as ask, _screen(as_json) as show:
            sampler = Sampler()
            shown = 0
            while not told:
                try:
                    show(sampler.sample(ask("/v1/status"), time.monotonic()))
                except (AttributeError, KeyError, TypeError, ValueError):
                    raise CommandError(NOT_OURS) from None
                shown += 1
                if shown == count or told:
                    return
                time.sleep(interval)
    except (KeyboardInterrupt, BrokenPipeError):
        return


class Sampler:
    """From what is counted to rates. Each entry of a picture has `rate_from_guest` and `rate_to_guest`, bytes/s."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._before: dict[object, float] = {}

    def sample(self, state: Mapping[str, Any], now: float) -> dict[str, Any]:
        """A picture: what is running, with rates since the last call; those of the first are 0."""
        seconds = now - self._at if self._at is not None else 0.0
        self._at = now
        counted: dict[object, float] = {}

        def rate(key: object, value: float, *, fresh: float = 0.0) -> float:
            counted[key] = value
            if seconds <= 0:
                return 0.0
            return max(0.0, round((value - self._before.get(key, fresh)) / seconds, 3))

        def with_rates(kind: str, entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
            key = (kind, *(entry.get(name) for name in names))
            rates = {
                f"rate_{way}": rate((*key, way), entry.get(f"bytes_{way}", 0)) for way in ("from_guest", "to_guest")
            }
            return {**entry, **rates}

        flows = [with_rates("flow", flow, "protocol", "guest", "peer") for flow in state["flows"]["list"]]
        flows.sort(key=_busiest)
        links = [with_rates("link", link, "name") for link in state["links"]]
        by_link = {link["name"]: link for link in links}
        guests = []
        for guest in state["guests"]:
            mine = {f"{address}:" for address in guest["addresses"]} | {f"[{a}]:" for a in guest["addresses"]}
            own = [flow for flow in flows if flow["guest"].rpartition(":")[0] + ":" in mine]
            rates = {f"rate_{way}": round(sum(f[f"rate_{way}"] for f in own), 3) for way in ("from_guest", "to_guest")}
            guests.append({**guest, **rates, "flows": len(own), "connected": guest["link"] in by_link})
        drops = {
            reason: {"total": total, "rate": rate(("drop", reason), total)} for reason, total in state["drops"].items()
        }
        dns = {
            words: {"total": state["counters"][name], "rate": rate(("dns", name), state["counters"][name])}
            for name, words in _DNS.items()
            if name in state["counters"]
        }
        forwards = [with_rates("forward", forward, "id") for forward in state.get("forwards", ())]
        self._before = counted
        return {
            "version": state["version"],
            "uptime": state["uptime"],
            "network": state["network"],
            "flows": {**{key: state["flows"][key] for key in ("tcp", "udp", "icmp", "limit")}, "list": flows},
            "links": links,
            "guests": guests,
            "forwards": forwards,
            "dns": dns,
            "drops": drops,
        }


def _busiest(flow: Mapping[str, Any]) -> tuple[float, float]:
    return -(flow["rate_from_guest"] + flow["rate_to_guest"]), -(flow["bytes_from_guest"] + flow["bytes_to_guest"])


# ---- showing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that shows a picture."""
    if as_json:
        yield _print_json
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        yield lambda picture: console.print(draw(picture, ROWS))
        return
    from rich.live import Live

    # Its own refresh would take a thread; we know when there is something new.
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:

        def show(picture: Mapping[str, Any]) -> None:
            live.update(draw(picture, max(3, (console.height - 16) // 3)), refresh=True)

        yield show


def _print_json(picture: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(picture, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def draw(picture: Mapping[str, Any], rows: int = ROWS) -> Group:
    """A picture for a terminal, with so many rows a table."""
    from rich.console import Group
    from rich.text import Text

    network, flows = picture["network"], picture["flows"]
    parts: list[Any] = [
        Text(
            f"netstack {picture['version']}, up {human_seconds(picture['uptime'])}, {network['subnet']} and "
            f"{network['subnet6']}: {len(picture['guests'])} guests, {flows['tcp']} TCP, {flows['udp']} UDP, "
            f"{flows['icmp']} ICMP flows",
            style="bold",
        )
    ]
    parts.append(
        _table(
            "Guests",
            ("name", "MAC", "addresses", "flows", "from guest/s", "to guest/s", "seen"),
            [
                (
                    guest["name"] or "-",
                    guest["mac"],
                    ", ".join(guest["addresses"]),
                    guest["flows"],
                    human_bytes(guest["rate_from_guest"]),
                    human_bytes(guest["rate_to_guest"]),
                    f"{human_seconds(guest['seen'])} ago",
                )
                for guest in picture["guests"]
            ],
            rows,
        )
    )
    parts.append(
        _table(
            "Links",
            ("name", "up", "from guest/s", "to guest/s", "backlog", "drops"),
            [
                (
                    link["name"],
                    "yes" if link["connected"] else "no",
                    human_bytes(link["rate_from_guest"]),
                    human_bytes(link["rate_to_guest"]),
                    human_bytes(link.get("backlog", 0)),
                    link.get("drops_to_guest", 0),
                )
                for link in picture["links"]
            ],
            rows,
        )
    )
    parts.append(
        _table(
            "Busiest flows",
            ("protocol", "guest", "peer", "state", "from guest/s", "to guest/s", "in all"),
            [
                (
                    flow["protocol"],
                    flow["guest"],
                    flow["peer"],
                    flow["state"] or "-",
                    human_bytes(flow["rate_from_guest"]),
                    human_bytes(flow["rate_to_guest"]),
                    human_bytes(flow["bytes_from_guest"] + flow["bytes_to_guest"]),
                )
                for flow in flows["list"]
            ],
            rows,
        )
    )
    if picture["forwards"]:
        parts.append(
            _table(
                "Forwards",
                ("forward", "by", "open", "from guest/s", "to guest/s"),
                [
                    (
                        forward["spec"],
                        forward["owner"],
                        forward["connections"]["open"],
                        human_bytes(forward["rate_from_guest"]),
                        human_bytes(forward["rate_to_guest"]),
                    )
                    for forward in picture["forwards"]
                ],
                rows,
            )
        )
    parts.append(Text("DNS: " + (_counts(picture["dns"]) or "no queries yet")))
    drops = dict(sorted(picture["drops"].items(), key=lambda item: (-item[1]["rate"], -item[1]["total"])))
    parts.append(Text("Drops: " + (_counts(drops) or "none")))
    return Group(*parts)


def _counts(counts: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {c['total']:.0f} ({c['rate']:.1f}/s)" for name, c in counts.items())


def _table(title: str, columns: Sequence[str], cells: list[tuple[object, ...]], rows: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    more = f" ({len(cells) - rows} more)" if len(cells) > rows else ""
    table = Table(title=f"{title}{more}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numbers = column.endswith("/s") or column in ("flows", "open", "drops", "backlog", "in all")
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True, overflow="ellipsis")
    for row in cells[:rows]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
