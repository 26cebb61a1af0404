"""What a run prints and leaves behind: tables for people, JSON for programs, one line of history, a picture."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import SECTIONS, Figures, Metric, format_figure, order_peers
from benchmarks.relay_cost import relay_microseconds
from benchmarks.targets import TARGETS, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
RATIOS_AGAINST = ("passt", "slirp4netns")
FIGURES_BEGIN, FIGURES_END = "<!-- figures: written by a whole run -->", "<!-- end of the figures -->"
WIDTH = 190  # columns when the output is no terminal


def describe_machine() -> dict[str, Any]:
    """What a reader must know to compare figures."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    system = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', system, re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 1024**2) if memory else None,
        "kernel": platform.release(),
        "system": name[1] if name else platform.system(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def describe_commit() -> str | None:
    """The commit that was measured, with a plus when the working tree differs from it."""
    try:
        git = ["git", "-C", str(HERE)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cell(figures: Figures, metric: Metric, peer: str) -> str:
    median = figures.median(metric.key, peer)
    if median is not None:
        return format_figure(median)
    return "failed" if peer in figures.failures.get(metric.key, {}) else ""


def _ratio(figures: Figures, metric: Metric, subject: str, peer: str) -> str:
    ratio = figures.ratio(metric.key, subject, peer)
    return f"{ratio:.2f}" if ratio is not None else ""


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """Whether the targets of one line are met: one word each, the bounds are in the table of targets."""
    return ", ".join("[green]met[/]" if verdict.met else "[red]MISSED[/]" for verdict in verdicts)


def print_targets(figures: Figures, verdicts: Sequence[Verdict], console: Console) -> None:
    """All targets in one place: the figure, what it is set against, the ratio, and whether it is met."""
    table = Table(title="Targets", title_justify="left", title_style="bold", header_style="bold")
    for name in ("set by", "", "link"):
        table.add_column(name, no_wrap=True)
    for name in ("figure", "against", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("target")
    table.add_column("")
    for verdict in verdicts:
        metric, other = figures.metrics[verdict.target.key], verdict.other
        colour, word = ("green", "met") if verdict.met else ("red", "MISSED")
        table.add_row(
            verdict.target.source,
            f"{SECTIONS[metric.section].split(':')[0].split(' (')[0]}: {metric.title}",
            verdict.target.subject,
            f"{format_figure(verdict.figure)} {metric.unit}",
            "" if other is None else format_figure(other),
            "" if other is None else f"{verdict.value:.2f}",
            verdict.target.describe(),
            f"[{colour}]{word}[/]",
        )
    console.print(table)
    met = sum(verdict.met for verdict in verdicts)
    console.print(f"[bold]Targets met: {met} of {len(verdicts)} judged; {len(TARGETS)} are set.[/]")


def print_tables(figures: Figures, console: Console, subject: str = "netstack") -> None:
    """One table a section, its columns the peers that have a figure in it."""
    verdicts = judge(figures)
    for section, title in SECTIONS.items():
        metrics = [metric for metric in figures.metrics.values() if metric.section == section]
        if not metrics:
            continue
        peers = [
            peer
            for peer in figures.peers() or [subject]
            if any(peer in figures.samples.get(metric.key, {}) for metric in metrics)
            or any(peer in figures.failures.get(metric.key, {}) for metric in metrics)
        ]
        against = [peer for peer in RATIOS_AGAINST if peer in peers and subject in peers and peer != subject]
        table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
        table.add_column("", no_wrap=True)
        table.add_column("unit")
        for peer in peers:
            table.add_column(peer, justify="right", style="bold" if peer == subject else "")
        for peer in against:
            table.add_column(f"÷ {peer}", justify="right", style="cyan")
        table.add_column("targets")
        for metric in metrics:
            table.add_row(
                metric.title,
                metric.unit,
                *(_cell(figures, metric, peer) for peer in peers),
                *(_ratio(figures, metric, subject, peer) for peer in against),
                _verdicts([verdict for verdict in verdicts if verdict.target.key == metric.key]),
            )
        console.print(table)
    for key, failed in figures.failures.items():
        for peer, reason in failed.items():
            console.print(f"[yellow]{figures.metrics[key].title}: {peer}: {reason}[/]", highlight=False)
    cost = relay_microseconds(figures)
    if cost is not None:
        console.print(
            f"One relay adds {cost:.0f} µs to a round trip: passt, qemu-user and netstack on a stream carry it."
        )
    if verdicts:
        print_targets(figures, verdicts, console)


def as_document(
    figures: Figures,
    *,
    started: datetime,
    command: str,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    notes: Sequence[str],
    rounds: int,
) -> dict[str, Any]:
    """Everything about a run, for latest.json."""
    return {
        "when": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": command,
        "commit": describe_commit(),
        "machine": dict(machine),
        "versions": dict(versions),
        "rounds": rounds,
        "notes": list(notes),
        "figures": {
            key: {
                "section": SECTIONS[metric.section],
                "title": metric.title,
                "unit": metric.unit,
                "peers": {
                    peer: {"median": figures.median(key, peer), "samples": samples}
                    for peer, samples in figures.samples.get(key, {}).items()
                },
                "failures": figures.failures.get(key, {}),
            }
            for key, metric in figures.metrics.items()
        },
        "ratios": {
            key: {
                f"{subject} / {peer}": ratio
                for subject in figures.peers()
                if subject.startswith("netstack")
                for peer in RATIOS_AGAINST
                if (ratio := figures.ratio(key, subject, peer)) is not None
            }
            for key in figures.metrics
        },
        "targets": [
            {
                "key": verdict.target.key,
                "subject": verdict.target.subject,
                "target": verdict.target.describe(),
                "source": verdict.target.source,
                "figure": verdict.figure,
                "against": verdict.other,
                "value": verdict.value,
                "met": verdict.met,
            }
            for verdict in judge(figures)
        ],
    }


def round_figures(value: Any) -> Any:
    """Six digits are more than any of these figures deserves, and keep the files readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: round_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_figures(item) for item in value]
    return value


def as_markdown(document: dict[str, Any]) -> str:
    """The figures as tables for a README: one a section, the peers as columns."""
    lines: list[str] = []
    judged: dict[str, list[str]] = {}
    for target in document["targets"]:
        word = "met" if target["met"] else "**missed**"
        whose = "" if target["subject"] == "netstack" else f"{target['subject']} "
        words = f"{whose}{target['target']}: {format_figure(target['value'])}, {word}"
        judged.setdefault(target["key"], []).append(words)
    for section in SECTIONS.values():
        figures = {key: figure for key, figure in document["figures"].items() if figure["section"] == section}
        peers = order_peers(peer for figure in figures.values() for peer in figure["peers"])
        if not peers:
            continue
        lines += ["", f"| {section} | {' | '.join(peers)} | targets |", f"|---|{'---:|' * len(peers)}---|"]
        for key, figure in figures.items():
            cells = [
                format_figure(figure["peers"][peer]["median"]) if peer in figure["peers"] else "" for peer in peers
            ]
            lines.append(
                f"| {figure['title']} [{figure['unit']}] | {' | '.join(cells)} | {'; '.join(judged.get(key, []))} |"
            )
    return "\n".join(lines).strip() + "\n"


def write_results(document: dict[str, Any], path: Path, history: Path | None) -> None:
    """The whole document as JSON, its tables as Markdown, and one line of medians at the end of the history."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = round_figures(document)
    path.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(as_markdown(document))
    if history is not None:
        line = {name: document[name] for name in ("when", "command", "commit", "machine", "rounds")}
        line["medians"] = {
            key: {peer: samples["median"] for peer, samples in figure["peers"].items()}
            for key, figure in document["figures"].items()
        }
        line["targets"] = {
            f"{target['key']} {target['subject']} {target['target']}": [target["value"], target["met"]]
            for target in document["targets"]
        }
        with history.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_readme(document: dict[str, Any], readme: Path) -> None:
    """Put the figures of a whole run where the README has its place for them."""
    machine = document["machine"]
    run = f"`{document['command']}`, {document['when'][:10]}, commit {document['commit']}, {document['rounds']} rounds"
    where = f"{machine['cpu']}, {machine['cores']} cores (shared), {machine['memory_gib']} GiB, {machine['system']}"
    kernel = f"Linux {machine['kernel']}, load {machine['load_at_start']} at the start"
    lines = [
        FIGURES_BEGIN,
        f"{run}, {document['seconds']} s. {where}, {kernel}.",
        f"Versions: {'; '.join(dict.fromkeys(document['versions'].values()))}.",
        *(f"{note[0].upper()}{note[1:]}." for note in document["notes"]),
        "",
        as_markdown(round_figures(document)),
        FIGURES_END,
    ]
    text = readme.read_text()
    head, begin, rest = text.partition(FIGURES_BEGIN)
    _, end, tail = rest.partition(FIGURES_END)
    if begin and end:
        readme.write_text(head + "\n".join(lines) + tail)


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
