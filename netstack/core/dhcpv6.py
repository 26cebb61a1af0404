"""Placeholder of the lead until helper DHCP writes this file: overwrite it."""
from typing import Any
class Dhcpv6Server:
    search: Any = ()
    def __init__(self, *a: object, **k: object) -> None: ...
    def answer(self, *a: object) -> bytes | None: return None
