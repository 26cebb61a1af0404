"""The dashboard: one page without anything from elsewhere, which shows what `GET /v1/events?status=1` tells it.

The page holds no data, so that it can be given to anybody: over TCP it asks for the token, or takes it from the part of
its address behind the `#`, which browsers do not send. Its one script and one style are named by their hash in the
content security policy, and nothing else may run, be loaded or frame it. All text is set as text, never as HTML,
because guests choose their names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re


@functools.cache
def dashboard_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    from importlib.resources import files

    page = files("netstack.control").joinpath("dashboard.html").read_bytes()
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        f"script-src {_hash_of('script', page)}",
        f"style-src {_hash_of('style', page)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash_of(tag: str, page: bytes) -> str:
    """The source expression of the page's one element of this kind (CSP level 3, 6.7.2.4)."""
    found = re.search(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"
