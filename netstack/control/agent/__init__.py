"""The guest agent: the script that guests run, and what it reports."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path


def write_script(gateway: bytes) -> bytes:
    """The script for a guest that asked this address of the gateway for it."""
    address = ip_address(gateway)
    text = Path(__file__).with_name("agent.sh").read_text(encoding="utf-8")
    host = f"[{address}]" if address.version == 6 else str(address)
    return text.replace("@GATEWAY@", str(address)).replace("@HOST@", host).encode()
