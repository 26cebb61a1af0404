"""Reverse names: in-addr.arpa (RFC 1035 3.5) and ip6.arpa (RFC 3596 2.5)."""

from __future__ import annotations

_IN_ADDR_ARPA = (b"in-addr", b"arpa")
_IP6_ARPA = (b"ip6", b"arpa")
_BYTES = {str(number).encode(): number for number in range(256)}
_DIGITS = frozenset(b"%x" % number for number in range(16))


def parse_reverse(labels: tuple[bytes, ...]) -> bytes | None:
    """The packed address of a whole reverse name, in lower case; None for all other names. Untrusted."""
    suffix = labels[-2:]
    if suffix == _IN_ADDR_ARPA and len(labels) == 6:
        digits = [_BYTES.get(label) for label in labels[3::-1]]
        return None if None in digits else bytes(digit for digit in digits if digit is not None)
    if suffix == _IP6_ARPA and len(labels) == 34 and _DIGITS.issuperset(labels[:32]):
        return bytes.fromhex(b"".join(labels[31::-1]).decode("ascii"))
    return None
