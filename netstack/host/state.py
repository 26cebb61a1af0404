"""Placeholder of the lead until helper DHCP writes this file: overwrite it."""
from typing import Any
def read_json(path: Any) -> Any: return None
def write_json(path: Any, data: Any) -> None: ...
