"""What the proxy itself answers: short texts that say what is wrong and who says so."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from netstack.proxy.heads import Fields

_MAX_WORDS: Final = 500

ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"


def write_page(
    status: int,
    words: str,
    *,
    error: str = "",
    fields: Fields | None = None,
    body: bytes | None = None,
    head_only: bool = False,
    keep: bool = False,
) -> bytes:
    """A complete answer. `error`: of RFC 9209 2.3; `body`: somebody else's text in place of ours."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = "Error"
    # `words` may quote a name that the guest sent; those are letters, digits, dots and brackets (heads.parse_place).
    text = f"{status} {reason}: {words[:_MAX_WORDS]} (netstack's proxy)\n".encode("utf-8", "replace")
    content = text if body is None else body
    lines = [f"HTTP/1.1 {status} {reason}".encode()]
    for name, value in fields or ():
        lines.append(name + b": " + value)
    if body is None:
        lines.append(b"Content-Type: text/plain; charset=utf-8")
    lines.append(b"Content-Length: %d" % len(content))
    lines.append(b"Cache-Control: no-store")
    if error:
        lines.append(b"Proxy-Status: netstack; error=" + error.encode())
    lines.append(b"Connection: keep-alive" if keep else b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if head_only else content)
