"""WPAD: where a network's own PAC script would be.

Theory of operation. Whoever controls the network controls the answer, so nothing here happens unless the system's own
settings, or ours, say so. In this order (draft-ietf-wrec-wpad-01, 4.4):

    DHCP option 252     what the host was told: NetworkManager keeps it, macOS' ipconfig prints it
    DNS                 http://wpad.DOMAIN/wpad.dat for each search domain of the host

The draft goes up from wpad.a.corp.example to wpad.corp.example and so on. That needs to know where a public suffix
begins, and was abused wherever it did not (wpad.co.uk); so only the search domains themselves are asked, and those of
one label (`local`, `home`) not at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Final

import trio

_MAX_OUTPUT: Final = 1 << 20
_SECONDS: Final = 3.0

NMCLI: Final = ("nmcli", "-t", "-f", "DHCP4", "device", "show")
IPCONFIG: Final = ("ipconfig", "getoption", "", "252")

# RFC 1123 2.1, a label of a host's name; option 252 ends with a NUL or a line feed on some servers.
_DOMAIN: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+")
_URL: Final = re.compile(r"https?://[!-~]{1,1000}", re.IGNORECASE)


def dns_urls(search: Sequence[str]) -> list[str]:
    """The URLs to try for these search domains."""
    domains = (domain.strip(".").lower() for domain in search)
    return [f"http://wpad.{domain}/wpad.dat" for domain in dict.fromkeys(domains) if _DOMAIN.fullmatch(domain)][:4]


def parse_nmcli(text: str) -> str | None:
    r"""Option 252 in `nmcli -t -f DHCP4 device show`: DHCP4.OPTION[7]:wpad = http\\://wpad.example/wpad.dat."""
    for line in text.splitlines():
        found = re.fullmatch(r"DHCP4\.OPTION\[[0-9]+\]:\s*(?:wpad|private_252|unknown_252)\s*=\s*(.*)", line.strip())
        if found is not None:
            return _clean(found[1].replace("\\:", ":"))
    return None


def _clean(text: str) -> str | None:
    text = text.strip(" \t\r\n\0\"'")
    return text if _URL.fullmatch(text) else None


async def dhcp_url() -> str | None:
    """What the host's DHCP client was told, where it tells us."""
    output = await run_program(IPCONFIG if sys.platform == "darwin" else NMCLI)
    if output is None:
        return None
    return _clean(output) if sys.platform == "darwin" else parse_nmcli(output)


async def run_program(command: Sequence[str]) -> str | None:
    """The output of one of the system's programs; None where there is none, it fails, or takes too long."""
    try:
        with trio.move_on_after(_SECONDS):
            done = await trio.run_process(list(command), capture_stdout=True, capture_stderr=True, check=False)
            return done.stdout[:_MAX_OUTPUT].decode("utf-8", "replace") if done.returncode == 0 else None
    except OSError:
        return None
    return None


async def discover(search: Sequence[str]) -> list[str]:
    """All URLs to try, in order."""
    told = await dhcp_url()
    return [*([told] if told else []), *dns_urls(search)]
