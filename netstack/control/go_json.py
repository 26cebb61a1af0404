"""JSON as a Go program reads and writes it: which mistakes it finds, in what words, and how its answers look.

gvproxy's clients match on its answers' texts, and those are, for a body that cannot be read, the words of Go's
encoding/json (go1.24, scanner.go and decode.go). What differs from Python's json, and is observable:

- Only the first value is read; what follows it is ignored. No body is "EOF", half a value "unexpected EOF".
- A mistake is named by its character and by what was expected there.
- Keys are matched in any letter case, unknown ones are ignored, null leaves a field as it is, and a value of a wrong
  type is named by the field's Go type.
- `<`, `>` and `&` are escaped in answers, the keys of a map are sorted, and a line end follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

MAX_DEPTH: Final = 10_000  # maxNestingDepth of scanner.go

_SPACE: Final = b" \t\r\n"
_LITERALS: Final = {ord("t"): b"true", ord("f"): b"false", ord("n"): b"null"}
_DIGITS: Final = b"0123456789"
_HEX: Final = b"0123456789abcdefABCDEF"

_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE: Final = re.compile("[\ud800-\udfff]")
_INTEGER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)?")

# Go's names of what a value is.
_KINDS: Final = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}


class GoJsonError(ValueError):
    """What Go would say."""


def dumps(value: Any) -> bytes:
    """What json.NewEncoder(w).Encode(value) writes, a dict being a Go struct: its keys stay in order."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"{text}\n".encode("utf-8", "replace")


def loads(data: bytes) -> Any:
    """The first value in `data`. Raises GoJsonError. Untrusted."""
    start, end = _Scanner(data).scan()
    try:
        value = json.loads(data[start:end].decode("utf-8", "replace"), parse_int=_number_of)
        if _HALF.search(data, start, end):
            # Half of a surrogate pair: unquote() of decode.go makes it U+FFFD.
            value = json.loads(_LONE.sub("\ufffd", json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise GoJsonError("exceeded max depth") from None
    return value


def _number_of(text: str) -> int | float:
    """int() refuses thousands of digits, of which a caller can send as many."""
    return int(text) if len(text) < 20 else float(text)


def take_struct(value: Any, struct: str, fields: Mapping[str, tuple[type, str]], path: str = "") -> dict[str, Any]:
    """The fields of a Go struct in a value. Raises GoJsonError.

    `struct` is the type's name with its package; `fields` maps the field's name to Python's and Go's type of it. What
    is not in the value is not in the result.
    """
    name = struct.rpartition(".")[2]
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise GoJsonError(f"json: cannot unmarshal {_KINDS[type(value)]} into Go value of type {struct}")
    folded = {field.lower(): field for field in fields}
    found: dict[str, Any] = {}
    first: GoJsonError | None = None
    for key, item in value.items():
        field = key if key in fields else folded.get(key.lower())
        if field is None or item is None:
            continue
        kind, go_type = fields[field]
        if type(item) is kind:
            found[field] = item
        elif first is None:  # Go reads on, and tells of the first
            where = f"{name}.{path}{field}"
            first = GoJsonError(
                f"json: cannot unmarshal {_KINDS[type(item)]} into Go struct field {where} of type {go_type}"
            )
    if first is not None:
        raise first
    return found


def kind_of(value: object) -> str:
    """What Go calls a value of this type."""
    return _KINDS[type(value)]


def quote_character(byte: int) -> str:
    """One byte as Go quotes it in its messages."""
    if byte == ord("'"):
        return r"'\''"
    escapes = {7: r"\a", 8: r"\b", 12: r"\f", 10: r"\n", 13: r"\r", 9: r"\t", 11: r"\v", 0x5C: r"\\"}
    character = chr(byte)
    if byte in escapes:
        character = escapes[byte]
    elif byte < 0x20 or byte == 0x7F:
        character = f"\\x{byte:02x}"
    elif 0x80 <= byte < 0xA1 or byte == 0xAD:  # no graphic characters
        character = f"\\u{byte:04x}"
    return f"'{character}'"


class _Scanner:
    """Finds the first value, or the first mistake."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def scan(self) -> tuple[int, int]:
        """Where the value begins and ends. Raises GoJsonError."""
        start = self._skip_space()
        if start == len(self._data):
            raise GoJsonError("EOF")
        stack: list[int] = []  # the brackets that are open
        expected = "value"
        while True:
            if expected == "after" and not stack:
                return start, self._at
            byte = self._peek_token()
            if expected == "after":
                self._at += 1
                if byte == ord(","):
                    expected = "key" if stack[-1] == ord("{") else "value"
                elif byte == stack[-1] + 2:  # in ASCII } is { + 2, and ] is [ + 2
                    stack.pop()
                else:
                    where = "after object key:value pair" if stack[-1] == ord("{") else "after array element"
                    self._fail(byte, where)
            elif expected in ("key", "key or end"):
                if byte == ord("}") and expected == "key or end":
                    self._at += 1
                    stack.pop()
                    expected = "after"
                    continue
                if byte != ord('"'):
                    self._fail(byte, "looking for beginning of object key string")
                self._string()
                byte = self._peek_token()
                if byte != ord(":"):
                    self._fail(byte, "after object key")
                self._at += 1
                expected = "value"
            elif byte == ord("]") and expected == "value or end":
                self._at += 1
                stack.pop()
                expected = "after"
            elif byte in b"{[":
                self._at += 1
                stack.append(byte)
                if len(stack) > MAX_DEPTH:
                    raise GoJsonError("exceeded max depth")
                expected = "key or end" if byte == ord("{") else "value or end"
            else:
                self._scalar(byte)
                expected = "after"

    def _peek_token(self) -> int:
        """The next byte that is no space."""
        if self._skip_space() == len(self._data):
            raise GoJsonError("unexpected EOF")
        return self._data[self._at]

    def _skip_space(self) -> int:
        while self._at < len(self._data) and self._data[self._at] in _SPACE:
            self._at += 1
        return self._at

    def _next(self) -> int:
        if self._at >= len(self._data):
            raise GoJsonError("unexpected EOF")
        self._at += 1
        return self._data[self._at - 1]

    def _scalar(self, byte: int) -> None:
        if byte == ord('"'):
            self._string()
        elif byte in _LITERALS:
            self._literal(_LITERALS[byte])
        elif byte in b"-0123456789":
            self._number()
        else:
            self._fail(byte, "looking for beginning of value")

    def _string(self) -> None:
        self._at += 1
        while (byte := self._next()) != ord('"'):
            if byte < 0x20:
                self._fail(byte, "in string literal")
            if byte == ord("\\"):
                byte = self._next()
                if byte == ord("u"):
                    for _ in range(4):
                        byte = self._next()
                        if byte not in _HEX:
                            self._fail(byte, r"in \u hexadecimal character escape")
                elif byte not in b'"\\/bfnrt':
                    self._fail(byte, "in string escape code")

    def _literal(self, word: bytes) -> None:
        self._at += 1
        for wanted in word[1:]:
            byte = self._next()
            if byte != wanted:
                self._fail(byte, f"in literal {word.decode()} (expecting {quote_character(wanted)})")

    def _number(self) -> None:
        match = _INTEGER.match(self._data, self._at)
        assert match is not None
        self._at = match.end()
        if match[0] in (b"-", b""):
            byte = self._next()
            self._fail(byte, "in numeric literal")
        if self._data[self._at : self._at + 1] == b".":
            self._at += 1
            self._digits("after decimal point in numeric literal")
        if self._data[self._at : self._at + 1] in (b"e", b"E"):
            self._at += 1
            if self._data[self._at : self._at + 1] in (b"+", b"-"):
                self._at += 1
            self._digits("in exponent of numeric literal")

    def _digits(self, where: str) -> None:
        byte = self._next()
        if byte not in _DIGITS:
            self._fail(byte, where)
        while self._at < len(self._data) and self._data[self._at] in _DIGITS:
            self._at += 1

    def _fail(self, byte: int, where: str) -> NoReturn:
        raise GoJsonError(f"invalid character {quote_character(byte)} {where}")
