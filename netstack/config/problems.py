"""What can be wrong with a setting, in one line of plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]


class ConfigError(ValueError):
    """A setting cannot be used. str() is one line: where it stands, what is wrong, what to do.

    `at` is the path of the setting, ("link", 0, "uri"), for whoever knows where that was written; `reason` is the line
    without the setting's name, for whoever can name it better.
    """

    def __init__(self, message: str, *, at: Path = (), reason: str = "") -> None:
        super().__init__(message)
        self.at = at
        self.reason = reason or message


# pydantic's wording is for programmers. {...} are the fields of the error's context.
_WORDS: Mapping[str, str] = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than_equal": "must be {ge} or more",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than_equal": "must be {le} or less",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_attributes_type": "must be a table",
    "model_type": "must be a table",
    "path_type": "must be a path, in quotes",
    "string_type": "must be text, in quotes",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
}
# Of [proxy].
_MAY_HOLD_PASSWORDS = {(key,) for key in ("http", "https", "ftp", "all", "socks", "pac", "credentials")}
_ARRAYS_OF_TABLES = {("link",), ("guest",), ("publish",), ("dns", "route"), ("auto_publish", "rule")}
# Tables of the documented file that this version does not read yet. A plain "unknown key" would send people looking
# for a typo.
_LATER: set[Path] = set()


def problem_of(error: ErrorDetails, known_keys: Sequence[str]) -> ConfigError:
    """One problem that pydantic found. `known_keys` are those of the table it stands in."""
    # "[key]": a key that is wrong in itself, in a table where users choose the keys.
    kind, path = error["type"], tuple(part for part in error["loc"] if part != "[key]")
    if kind == "extra_forbidden":
        if path in _LATER:
            return ConfigError(
                f"{path_name(path)} comes with a later version of netstack; take it out for now", at=path
            )
        from difflib import get_close_matches

        close = get_close_matches(str(path[-1]), known_keys, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known_keys)}"
        return ConfigError(f"unknown key {path[-1]!r} in {path_name(path[:-1]) or 'the file'}; {hint}", at=path)
    if kind == "missing":
        return ConfigError(f"{path_name(path)} is missing", at=path)
    context: Mapping[str, Any] = error.get("ctx", {})
    reason = str(context["error"]) if kind == "value_error" else _WORDS.get(kind, error["msg"]).format(**context)
    if kind == "tuple_type" and path in _ARRAYS_OF_TABLES:
        reason = f"must be a list of tables; write [[{path_name(path)}]]"
    value = str(error["input"])
    # A URI's problem names the URI; what stands in [proxy] may be a password.
    is_secret = path[:1] == ("proxy",) and (kind == "value_error" or path[1:2] in _MAY_HOLD_PASSWORDS)
    if not reason.startswith(value) and not is_secret:
        reason = f"{value if len(value) <= 60 else value[:57] + '...'} {reason}"
    shown = path
    if path[:2] == ("proxy", "credentials"):
        # Whoever writes the password into the key, too.
        shown = tuple(part.rpartition("@")[2] if isinstance(part, str) else part for part in path)
    return ConfigError(f"{path_name(shown)}: {reason}", at=path, reason=reason)


def path_name(path: Path) -> str:
    """link[1].uri, with the entries of a list counted from 1 as people do."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part + 1}]"
        else:
            name += f".{part}" if name else part
    return name
