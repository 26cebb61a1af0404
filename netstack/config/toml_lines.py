"""On which line of a TOML text each key stands.

tomllib gives values without their places, and a message about a wrong value is of use only with its line. This small
scan runs on text that tomllib has accepted already, so it needs to know no more of TOML 1.0 than where a statement
begins, what its key is, and which table header it stands under. Keys inside an inline table or an array share the
line of their statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Path = tuple[str | int, ...]

# Multi-line strings first, since they begin like the short ones. Anything else is taken a run or a character at a time.
_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}" + r"""|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[^"'\#\[\]{}\n]+|.""",
    re.DOTALL,
)
_KEY_PART = re.compile(r"""\s*(?:"((?:\\.|[^"\\])*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.?)""")


def key_lines(text: str) -> dict[Path, int]:
    """Map each key's path to its line, counted from 1. ("link", 1, "uri") is the uri of the second [[link]]."""
    lines: dict[Path, int] = {}
    last_of_array: dict[Path, int] = {}
    table: Path = ()
    for number, statement in _statements(text):
        if statement.startswith("[["):
            path = _under_last(_split_key(statement[2:]), last_of_array)
            last_of_array[path] = last_of_array.get(path, -1) + 1
            lines.setdefault(path, number)
            table = (*path, last_of_array[path])
            lines[table] = number
        elif statement.startswith("["):
            table = _under_last(_split_key(statement[1:]), last_of_array)
            lines.setdefault(table, number)
        else:
            key = _split_key(statement)
            for end in range(1, len(key) + 1):
                lines.setdefault((*table, *key[:end]), number)
    return lines


def line_of(path: Path, lines: dict[Path, int]) -> int | None:
    """The line of `path`, or of the nearest table or key that holds it."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Every statement without comments, and the line it begins on. Brackets and strings may hold newlines."""
    number, begins, depth = 1, 1, 0
    parts: list[str] = []
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece == "\n" and depth == 0:
            if statement := "".join(parts).strip():
                yield begins, statement
            parts.clear()
            begins = number + 1
        elif not piece.startswith("#"):
            depth += (piece in "[{") - (piece in "]}")
            parts.append(piece)
        number += piece.count("\n")
    if statement := "".join(parts).strip():
        yield begins, statement


def _split_key(statement: str) -> Path:
    names: list[str | int] = []
    at = 0
    while match := _KEY_PART.match(statement, at):
        names.append(next(name for name in match.groups()[:3] if name is not None))
        at = match.end()
        if not match[4]:
            break
    return tuple(names)


def _under_last(names: Path, last_of_array: dict[Path, int]) -> Path:
    """[dns.route] below [[dns]] belongs to the last [[dns]] so far: put its index in."""
    path: Path = ()
    for name in names[:-1]:
        path = (*path, name)
        if path in last_of_array:
            path = (*path, last_of_array[path])
    return (*path, *names[-1:])
