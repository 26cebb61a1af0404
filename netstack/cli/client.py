"""Asks a running netstack over its API, for the commands that show or change what is running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from netstack.cli.faults import CommandError, InputError, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx

TIMEOUT_SECONDS = 5.0


def ask_api(
    path: str,
    api: str | None = None,
    token_file: str | None = None,
    *,
    post: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    **parameters: str,
) -> dict[str, Any]:
    """GET `path` of a running netstack, with parameters, or POST an object to it. Raises CommandError or InputError."""
    from netstack.config import parse_api_uri, runtime_directory

    spec = parse_api_uri(api or f"unix://{runtime_directory() / 'api.sock'}")
    headers = {}
    base = "http://netstack"
    if not spec.path:
        place = Path(token_file) if token_file else runtime_directory() / f"api-{spec.port}.token"
        try:
            headers["authorization"] = f"Bearer {place.read_text().strip()}"
        except (OSError, ValueError) as error:  # ValueError: no text at all
            words = one_line(error) if isinstance(error, OSError) else f"{place} holds no token"
            raise InputError(f"{words}: name the API's token with --token-file") from None
        base = f"http://[{spec.host}]:{spec.port}" if ":" in spec.host else f"http://{spec.host}:{spec.port}"
    import httpx

    # trust_env=False: a proxy for the world is none for this host's loopback.
    transport = httpx.HTTPTransport(uds=spec.path or None, trust_env=False)
    try:
        with httpx.Client(transport=transport, timeout=timeout, headers=headers, trust_env=False) as client:
            if post is None:
                answer = client.get(base + path, params=parameters)
            else:
                answer = client.post(base + path, json=dict(post))
            answer.raise_for_status()
            document = answer.json()
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 401:
            raise CommandError(f"{spec.uri} refuses the token: it is another run's, look for the new one") from None
        if error.response.status_code == 400 and (words := _words_of(error.response)):
            raise InputError(words) from None
        raise CommandError(f"{spec.uri}{path} answers {error.response.status_code}") from None
    except httpx.ConnectError:
        raise CommandError(f"nobody answers at {spec.uri}: start `netstack run`, or name its API with --api") from None
    except (httpx.HTTPError, ValueError) as error:
        raise CommandError(f"{spec.uri}: {one_line(error)}") from None
    if not isinstance(document, dict):
        raise CommandError(f"{spec.uri} does not speak netstack's API")
    return document


def _words_of(response: httpx.Response) -> str:
    """What the API says was wrong, in one line."""
    try:
        words = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return " ".join(str(words).split())
