"""TCP segments (RFC 9293) and their options (RFC 9293 3.2, RFC 7323, RFC 2018), and arithmetic on sequence numbers.

The flows have their own fast path, one unpack for a whole frame; this is the slow road, and the words that both share.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from netstack.wire import Buffer
from netstack.wire.checksum import finish, pseudo_sum, sum_words
from netstack.wire.ipv4 import PROTOCOL_TCP

# RFC 9293 3.1:
#   u16  source port
#   u16  destination port
#   u32  sequence number
#   u32  acknowledgment number
#   u8   header length in 32-bit words (4 bits), reserved (4 bits)
#   u8   CWR, ECE, URG, ACK, PSH, RST, SYN, FIN
#   u16  window
#   u16  checksum
#   u16  urgent pointer
_HEADER = Struct("!HHIIBBHHH")
_PARSED = Struct("!HHIIBBH4x")

HEADER_LENGTH = 20

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
URG = 0x20
ECE = 0x40
CWR = 0x80

# RFC 9293 3.7.1: what an end has to assume that was told nothing; the IPv6 value is 1280 - 40 - 20.
DEFAULT_MSS = 536
DEFAULT_MSS_IPV6 = 1220

_OPTION_END = 0
_OPTION_NOP = 1
_OPTION_MSS = 2
_OPTION_WINDOW_SCALE = 3
_OPTION_SACK_PERMITTED = 4
_OPTION_TIMESTAMP = 8

# RFC 7323 2.3: a greater shift is to be taken as 14.
MAX_WINDOW_SCALE = 14

# RFC 9293 3.2: u8 kind, u8 length (4), u16 maximum segment size.
_MSS = Struct("!BBH")
# RFC 7323 3.2: u8 kind, u8 length (10), u32 value, u32 echo reply.
_TIMESTAMP = Struct("!2xII")


class Tcp(NamedTuple):
    """Offsets count from the beginning of the buffer; the options reach from options_start to payload_start."""

    src_port: int
    dst_port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload_start: int
    options_start: int


class TcpOptions(NamedTuple):
    """What a segment's options say; None and False where they say nothing."""

    mss: int | None
    window_scale: int | None  # 0..14
    sack_permitted: bool
    timestamp: tuple[int, int] | None  # TSval, TSecr


def parse_tcp(buffer: Buffer, start: int, end: int) -> Tcp | None:
    """Untrusted. None when the header is cut short or its length lies."""
    available = end - start
    if available < HEADER_LENGTH:
        return None
    src_port, dst_port, seq, ack, offset, flags, window = _PARSED.unpack_from(buffer, start)
    header = offset >> 4 << 2
    if header < HEADER_LENGTH or header > available:
        return None
    return Tcp(src_port, dst_port, seq, ack, flags, window, start + header, start + HEADER_LENGTH)


def parse_options(buffer: Buffer, start: int, end: int) -> TcpOptions:
    """Untrusted. Reads up to the first option whose length cannot be; what came before it counts.

    A known option of a wrong length is skipped like an unknown one, and so is an MSS of 0, which names no segment at
    all.
    """
    mss: int | None = None
    window_scale: int | None = None
    sack_permitted = False
    timestamp: tuple[int, int] | None = None
    at = start
    while at < end:
        kind = buffer[at]
        if kind == _OPTION_END:
            break
        if kind == _OPTION_NOP:
            at += 1
            continue
        if at + 1 >= end:
            break
        length = buffer[at + 1]
        # RFC 9293 3.2: the length counts the two bytes of kind and length (MUST-7: a bad one must be survived).
        if length < 2 or at + length > end:
            break
        if kind == _OPTION_MSS and length == 4:
            mss = (buffer[at + 2] << 8 | buffer[at + 3]) or None
        elif kind == _OPTION_WINDOW_SCALE and length == 3:
            window_scale = min(buffer[at + 2], MAX_WINDOW_SCALE)
        elif kind == _OPTION_SACK_PERMITTED and length == 2:
            sack_permitted = True
        elif kind == _OPTION_TIMESTAMP and length == 10:
            value, echo = _TIMESTAMP.unpack_from(buffer, at)
            timestamp = (value, echo)
        at += length
    return TcpOptions(mss, window_scale, sack_permitted, timestamp)


def write_syn_options(mss: int, window_scale: int | None, sack_permitted: bool = False) -> bytes:
    """The options of a SYN, a multiple of 4 bytes. A window_scale of None: no scaling, either way (RFC 7323 2.2)."""
    options = _MSS.pack(_OPTION_MSS, 4, mss)
    if sack_permitted:
        options += bytes((_OPTION_NOP, _OPTION_NOP, _OPTION_SACK_PERMITTED, 2))
    if window_scale is not None:
        options += bytes((_OPTION_NOP, _OPTION_WINDOW_SCALE, 3, window_scale))
    return options


def write_tcp(
    src: bytes,
    dst: bytes,
    src_port: int,
    dst_port: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    payload: Buffer = b"",
    options: bytes = b"",
) -> bytes:
    """A whole segment with its checksum. `options` must be a multiple of 4 bytes, at most 40."""
    length = HEADER_LENGTH + len(options)
    offset = length << 2
    header = _HEADER.pack(src_port, dst_port, seq, ack, offset, flags, window, 0, 0) + options
    total = pseudo_sum(src, dst, PROTOCOL_TCP, length + len(payload)) + sum_words(header) + sum_words(payload)
    return b"".join((header[:16], finish(total).to_bytes(2, "big"), header[18:], payload))


# RFC 9293 3.4: sequence numbers are compared modulo 2**32. Of any two, exactly one of <, == and > holds; at the
# distance of 2**31, where the RFC leaves it open, it is <.


def seq_lt(a: int, b: int) -> bool:
    """Whether `a` lies before `b`."""
    return (a - b) & 0xFFFFFFFF >= 0x80000000


def seq_le(a: int, b: int) -> bool:
    """Whether `a` is `b` or lies before it."""
    return not 0 < (a - b) & 0xFFFFFFFF < 0x80000000


def seq_gt(a: int, b: int) -> bool:
    """Whether `a` lies behind `b`."""
    return 0 < (a - b) & 0xFFFFFFFF < 0x80000000


def seq_ge(a: int, b: int) -> bool:
    """Whether `a` is `b` or lies behind it."""
    return (a - b) & 0xFFFFFFFF < 0x80000000


def seq_diff(a: int, b: int) -> int:
    """How far `a` lies beyond `b`: -2**31 .. 2**31 - 1."""
    return ((a - b + 0x80000000) & 0xFFFFFFFF) - 0x80000000
