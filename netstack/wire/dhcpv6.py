"""DHCPv6, bytes <-> fields (RFC 8415).

    message   type 1, transaction ID 3, options
    option    code 2, length 2, data
    IA_NA     IAID 4, T1 4, T2 4, options               (IA_PD alike; IA_TA: IAID 4, options)
    IAADDR    address 16, preferred lifetime 4, valid lifetime 4, options
    status    code 2, text

Messages between relay agents and servers (types 12 and 13) have another head and are not read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple

# RFC 8415 7.3.
SOLICIT: Final = 1
ADVERTISE: Final = 2
REQUEST: Final = 3
CONFIRM: Final = 4
RENEW: Final = 5
REBIND: Final = 6
REPLY: Final = 7
RELEASE: Final = 8
DECLINE: Final = 9
INFORMATION_REQUEST: Final = 11
RELAY_FORWARD: Final = 12
RELAY_REPLY: Final = 13

# RFC 8415 21 unless another source is named.
OPTION_CLIENT_ID: Final = 1
OPTION_SERVER_ID: Final = 2
OPTION_IA_NA: Final = 3
OPTION_IA_TA: Final = 4
OPTION_IA_ADDRESS: Final = 5
OPTION_REQUEST_LIST: Final = 6
OPTION_PREFERENCE: Final = 7
OPTION_STATUS: Final = 13
OPTION_RAPID_COMMIT: Final = 14
OPTION_DNS: Final = 23  # RFC 3646
OPTION_SEARCH: Final = 24  # RFC 3646
OPTION_IA_PD: Final = 25
OPTION_REFRESH_TIME: Final = 32
OPTION_CLIENT_FQDN: Final = 39  # RFC 4704

# RFC 8415 21.13.
SUCCESS: Final = 0
NO_ADDRESSES: Final = 2
NO_BINDING: Final = 3
NOT_ON_LINK: Final = 4
NO_PREFIX: Final = 6

_OPTION = Struct("!HH")
_IA = Struct("!4sII")
_IA_ADDRESS = Struct("!16sII")

# RFC 8415 11.1: a type of two bytes and at most 128 more.
MIN_DUID: Final = 3
MAX_DUID: Final = 130

# An honest message has some ten options, and an IA a few addresses.
_MAX_OPTIONS = 128

Options = list[tuple[int, bytes]]


class Dhcpv6Message(NamedTuple):
    """One message between a guest and a server."""

    kind: int
    transaction: bytes
    options: Sequence[tuple[int, bytes]]

    def option(self, code: int) -> bytes | None:
        """Give the data of the first option with this code; None when there is none."""
        return next((data for found, data in self.options if found == code), None)


class Association(NamedTuple):
    """An IA_NA, IA_TA or IA_PD of a guest: its identifier and the addresses in it (none for an IA_PD)."""

    code: int
    iaid: bytes
    addresses: tuple[bytes, ...]


def parse_dhcpv6(payload: bytes) -> Dhcpv6Message | None:
    """Read a message, the payload of UDP. Untrusted: None when its options do not add up, or it is a relay agent's."""
    if len(payload) < 4 or payload[0] in (RELAY_FORWARD, RELAY_REPLY):
        return None
    options = _parse_options(payload, 4)
    return None if options is None else Dhcpv6Message(payload[0], payload[1:4], options)


def _parse_options(data: bytes, position: int) -> Options | None:
    """Read a run of options. Untrusted."""
    options: Options = []
    while position < len(data):
        if position + _OPTION.size > len(data) or len(options) == _MAX_OPTIONS:
            return None
        code, length = _OPTION.unpack_from(data, position)
        position += _OPTION.size
        if position + length > len(data):
            return None
        options.append((code, data[position : position + length]))
        position += length
    return options


def parse_association(code: int, data: bytes) -> Association | None:
    """Read the data of an option IA_NA, IA_TA or IA_PD. Untrusted: None when it does not add up."""
    head = 4 if code == OPTION_IA_TA else _IA.size
    options = _parse_options(data, head)
    if len(data) < head or options is None:
        return None
    addresses = tuple(
        inner[:16] for found, inner in options if found == OPTION_IA_ADDRESS and len(inner) >= _IA_ADDRESS.size
    )
    return Association(code, data[:4], addresses)


def write_dhcpv6(kind: int, transaction: bytes, options: Iterable[tuple[int, bytes]]) -> bytes:
    """Give the bytes of a message."""
    return bytes((kind,)) + transaction + _write_options(options)


def _write_options(options: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(_OPTION.pack(code, len(data)) + data for code, data in options)


def write_association(code: int, iaid: bytes, options: Iterable[tuple[int, bytes]], t1: int = 0, t2: int = 0) -> bytes:
    """Give the data of an option IA_NA, IA_TA or IA_PD; t1 and t2 in seconds."""
    head = iaid if code == OPTION_IA_TA else _IA.pack(iaid, t1, t2)
    return head + _write_options(options)


def write_address(address: bytes, preferred: int, valid: int) -> tuple[int, bytes]:
    """Give an option IAADDR, to stand in an IA_NA; lifetimes in seconds."""
    return OPTION_IA_ADDRESS, _IA_ADDRESS.pack(address, preferred, valid)


def write_status(code: int, text: str) -> tuple[int, bytes]:
    """Give a status option."""
    return OPTION_STATUS, code.to_bytes(2, "big") + text.encode("utf-8")


def write_duid(mac: bytes) -> bytes:
    """Give a DUID made of a MAC (DUID-LL, RFC 8415 11.4): type 3, hardware type 1."""
    return b"\0\3\0\1" + mac
