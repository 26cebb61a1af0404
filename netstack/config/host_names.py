"""`[dns.hosts]`: names for guests, checked line by line, so that a mistake is named with its line."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from netstack.dns.names import parse_entry, parse_host_name


def _check_name(text: str) -> str:
    parse_host_name(text)
    return text


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_value(value: tuple[str, ...]) -> tuple[str, ...]:
    parse_entry("name.test", value)
    return value


HostNames = dict[
    Annotated[str, AfterValidator(_check_name)],
    Annotated[tuple[str, ...], BeforeValidator(_as_list), AfterValidator(_check_value)],
]
"""What the names mean: netstack.dns.names."""
