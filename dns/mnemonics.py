"""What people call types and response codes (IANA, "Domain Name System (DNS) Parameters")."""

from __future__ import annotations

from typing import Final

_TYPES: Final[dict[int, str]] = {
    int(entry.partition(":")[0]): entry.partition(":")[2]
    for entry in (
        "1:A 2:NS 5:CNAME 6:SOA 12:PTR 13:HINFO 15:MX 16:TXT 17:RP 28:AAAA 29:LOC 33:SRV 35:NAPTR 37:CERT 39:DNAME "
        "43:DS 44:SSHFP 46:RRSIG 47:NSEC 48:DNSKEY 50:NSEC3 51:NSEC3PARAM 52:TLSA 53:SMIMEA 59:CDS 60:CDNSKEY "
        "61:OPENPGPKEY 63:ZONEMD 64:SVCB 65:HTTPS 99:SPF 108:EUI48 109:EUI64 251:IXFR 252:AXFR 255:ANY 256:URI 257:CAA"
    ).split()
}
_NUMBERS: Final = {name: number for number, name in _TYPES.items()}
_RCODES: Final = ("NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED")


def type_name(kind: int) -> str:
    """AAAA for 28, TYPE65280 for what has no name (RFC 3597 5)."""
    return _TYPES.get(kind, f"TYPE{kind}")


def parse_type(text: str) -> int | None:
    """28 for aaaa and for TYPE28; None for what is no type."""
    upper = text.upper()
    number = upper.removeprefix("TYPE")
    if number.isascii() and number.isdigit() and len(number) <= 5:
        return int(number) if int(number) < 1 << 16 else None
    return _NUMBERS.get(upper)


def rcode_name(rcode: int) -> str:
    """NXDOMAIN for 3."""
    return _RCODES[rcode] if rcode < len(_RCODES) else f"RCODE{rcode}"
