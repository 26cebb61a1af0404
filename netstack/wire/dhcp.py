"""DHCP for IPv4 and BOOTP, bytes <-> fields (RFC 2131, RFC 2132, RFC 951).

A message is 236 fixed bytes, a magic cookie, and options:

    0    op 1, htype 1, hlen 1, hops 1
    4    xid 4
    8    secs 2, flags 2                 (flags: 0x8000 = answer by broadcast)
    12   ciaddr 4, yiaddr 4, siaddr 4, giaddr 4
    28   chaddr 16
    44   sname 64
    108  file 128
    236  cookie 63 82 53 63, then options: code 1, length 1, data; 0 pads, 255 ends

Three rules of the options are easily missed, and each was a bug in some server:
- an option that comes twice is one long option, cut in pieces (RFC 3396);
- option 52 says that `file` or `sname` hold options too, read in that order (RFC 2132 9.3, RFC 3396 5);
- a length may point past the end (libslirp: CVE-2017-11434). What was read before it stands, the rest is ignored.

A message without the cookie is plain BOOTP: it has no options.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

BOOTREQUEST: Final = 1
BOOTREPLY: Final = 2

DISCOVER: Final = 1
OFFER: Final = 2
REQUEST: Final = 3
DECLINE: Final = 4
ACK: Final = 5
NAK: Final = 6
RELEASE: Final = 7
INFORM: Final = 8

# RFC 2132 unless another source is named.
OPTION_PAD: Final = 0
OPTION_SUBNET_MASK: Final = 1
OPTION_ROUTER: Final = 3
OPTION_DNS: Final = 6
OPTION_HOST_NAME: Final = 12
OPTION_DOMAIN_NAME: Final = 15
OPTION_MTU: Final = 26
OPTION_BROADCAST: Final = 28
OPTION_NTP: Final = 42
OPTION_REQUESTED_ADDRESS: Final = 50
OPTION_LEASE_TIME: Final = 51
OPTION_OVERLOAD: Final = 52
OPTION_MESSAGE_TYPE: Final = 53
OPTION_SERVER_ID: Final = 54
OPTION_PARAMETER_LIST: Final = 55
OPTION_MESSAGE: Final = 56
OPTION_MAX_MESSAGE_SIZE: Final = 57
OPTION_T1: Final = 58
OPTION_T2: Final = 59
OPTION_CLIENT_ID: Final = 61
OPTION_RAPID_COMMIT: Final = 80  # RFC 4039
OPTION_CLIENT_FQDN: Final = 81  # RFC 4702
OPTION_SEARCH: Final = 119  # RFC 3397
OPTION_ROUTES: Final = 121  # RFC 3442
OPTION_WPAD: Final = 252  # draft-ietf-wrec-wpad-01 4.4.1: the URL of a proxy auto-config script, for private use
OPTION_END: Final = 255

FLAG_BROADCAST: Final = 0x8000

_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
_COOKIE = b"\x63\x82\x53\x63"
_OPTIONS_AT = _FIXED.size + len(_COOKIE)

# RFC 951 3: BOOTP messages are 300 bytes, and clients are known that drop shorter ones.
MIN_LENGTH = 300

# RFC 2131 2: every client takes an IP datagram of 576 bytes; without the IP and UDP headers that leaves 548.
DEFAULT_MAX_LENGTH = 576 - 28

_NO_ADDRESS = bytes(4)


class DhcpMessage(NamedTuple):
    """One BOOTP or DHCP message. `options` is empty and `is_dhcp` false when the magic cookie is missing."""

    op: int
    xid: int
    chaddr: bytes
    """The hardware address, hlen bytes of it."""
    htype: int = 1
    hops: int = 0
    secs: int = 0
    flags: int = 0
    ciaddr: bytes = _NO_ADDRESS
    yiaddr: bytes = _NO_ADDRESS
    siaddr: bytes = _NO_ADDRESS
    giaddr: bytes = _NO_ADDRESS
    options: Mapping[int, bytes] = {}
    is_dhcp: bool = True

    def byte(self, code: int) -> int | None:
        """Give the value of an option of one byte; None when it is absent or of another length."""
        data = self.options.get(code, b"")
        return data[0] if len(data) == 1 else None

    def number(self, code: int) -> int | None:
        """Give the value of an option of two or four bytes; None when it is absent or of another length."""
        data = self.options.get(code, b"")
        return int.from_bytes(data, "big") if len(data) in (2, 4) else None

    def address(self, code: int) -> bytes | None:
        """Give the value of an option that holds one IPv4 address; None when it is absent or of another length."""
        data = self.options.get(code, b"")
        return data if len(data) == 4 else None


class Route(NamedTuple):
    """A classless static route (RFC 3442)."""

    network: bytes
    prefix_length: int
    router: bytes


def parse_dhcp(payload: bytes) -> DhcpMessage | None:
    """Read a BOOTP or DHCP message, the payload of UDP. Untrusted: None when it is too short or its hlen is over 16."""
    if len(payload) < _FIXED.size:
        return None
    op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file = _FIXED.unpack_from(
        payload
    )
    if hlen > len(chaddr):
        return None
    is_dhcp = payload[_FIXED.size : _OPTIONS_AT] == _COOKIE
    options: dict[int, bytearray] = {}
    if is_dhcp:
        _collect_options(options, payload, _OPTIONS_AT)
        overload = options.get(OPTION_OVERLOAD, b"")
        # Read once and from the options field only: an option 52 inside file or sname must not start another round.
        if overload[:1] in (b"\x01", b"\x03"):
            _collect_options(options, file, 0)
        if overload[:1] in (b"\x02", b"\x03"):
            _collect_options(options, sname, 0)
    return DhcpMessage(
        op=op,
        xid=xid,
        chaddr=chaddr[:hlen],
        htype=htype,
        hops=hops,
        secs=secs,
        flags=flags,
        ciaddr=ciaddr,
        yiaddr=yiaddr,
        siaddr=siaddr,
        giaddr=giaddr,
        options={code: bytes(data) for code, data in options.items()},
        is_dhcp=is_dhcp,
    )


def _collect_options(options: dict[int, bytearray], area: bytes, position: int) -> None:
    """Add the options found in area. Untrusted: stops at the first one whose length points past the end."""
    end = len(area)
    while position < end:
        code = area[position]
        if code == OPTION_END:
            return
        if code == OPTION_PAD:
            position += 1
            continue
        if position + 1 >= end:
            return
        after = position + 2 + area[position + 1]
        if after > end:
            return
        options.setdefault(code, bytearray()).extend(area[position + 2 : after])
        position = after


def write_dhcp(message: DhcpMessage, *, max_length: int = DEFAULT_MAX_LENGTH) -> bytes:
    """Give the bytes of a message, at least 300 and at most max_length (which counts as 300 when it is smaller).

    The options are written in the order of the mapping, so the ones that matter come first. What the options field
    cannot hold goes to `file` and `sname` (option 52); what fits nowhere is left out.
    """
    room = max(max_length, MIN_LENGTH) - _OPTIONS_AT
    # Three bytes for option 52, one for the end, kept free until it is clear whether they are needed.
    main, rest = _fit_options(message.options.items(), room - 4)
    file, sname = b"", b""
    # Plain BOOTP has no option 52: there `file` is always the name of a boot file.
    if rest and OPTION_MESSAGE_TYPE in message.options:
        file, rest = _fit_options(rest, 127)
        sname, rest = _fit_options(rest, 63)
    overload = bool(file) | bool(sname) << 1
    if overload:
        main += bytes((OPTION_OVERLOAD, 1, overload))
    fixed = _FIXED.pack(
        message.op,
        message.htype,
        len(message.chaddr),
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        message.ciaddr,
        message.yiaddr,
        message.siaddr,
        message.giaddr,
        message.chaddr,
        sname + b"\xff" if sname else b"",
        file + b"\xff" if file else b"",
    )
    if not message.is_dhcp:
        return fixed.ljust(MIN_LENGTH, b"\0")
    return (fixed + _COOKIE + main + b"\xff").ljust(MIN_LENGTH, b"\0")


def _fit_options(options: Iterable[tuple[int, bytes]], room: int) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Write the options that fit into room bytes: those bytes, and the options that are left."""
    out = bytearray()
    left: list[tuple[int, bytes]] = []
    for code, data in options:
        # RFC 3396: what is longer than 255 bytes is cut in pieces with the same code.
        pieces = [data[at : at + 255] for at in range(0, len(data), 255)] or [b""]
        if len(out) + len(data) + 2 * len(pieces) > room:
            left.append((code, data))
            continue
        for piece in pieces:
            out += bytes((code, len(piece)))
            out += piece
    return bytes(out), left


def write_routes(routes: Sequence[Route]) -> bytes:
    """Give the data of option 121 (RFC 3442): for each route its prefix length, the bytes of the prefix, the router."""
    out = bytearray()
    for network, prefix_length, router in routes:
        out.append(prefix_length)
        out += network[: (prefix_length + 7) // 8]
        out += router
    return bytes(out)


def parse_routes(data: bytes) -> list[Route] | None:
    """Read the data of option 121. Untrusted: None when it does not add up."""
    routes: list[Route] = []
    position = 0
    while position < len(data):
        prefix_length = data[position]
        size = (prefix_length + 7) // 8
        after = position + 1 + size + 4
        if prefix_length > 32 or after > len(data):
            return None
        network = data[position + 1 : position + 1 + size].ljust(4, b"\0")
        routes.append(Route(network, prefix_length, data[after - 4 : after]))
        position = after
    return routes
