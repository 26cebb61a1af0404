"""Asks a running netstack over its API, for the commands that show or change what is running."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netstack.cli.faults import CommandError, InputError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import httpx

    from netstack.config import ApiSpec

TIMEOUT_SECONDS = 5.0

NOT_OURS = "what answers is not netstack, or another version: see --json for its words"

ApiOption = Annotated[
    str | None, typer.Option("--api", metavar="URI", help="The API's address. Default: the socket of `netstack run`.")
]
TokenFileOption = Annotated[
    str | None,
    typer.Option(
        "--token-file", metavar="FILE", help="Where the token of an API at tcp:// is. Default: where run put it."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print what the API says.")]


def ask_api(
    path: str,
    api: str | None = None,
    token_file: str | None = None,
    *,
    post: Mapping[str, Any] | None = None,
    delete: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    **parameters: str,
) -> dict[str, Any]:
    """GET `path` of a running netstack, with parameters, or POST an object to it, or DELETE it.

    {} for an answer without a body. Raises CommandError, or InputError for what the API says cannot be.
    """
    with api_client(api, token_file, timeout=timeout) as ask:
        return ask(path, post=post, delete=delete, parameters=parameters)


@contextmanager
def api_client(
    api: str | None = None, token_file: str | None = None, *, timeout: float = TIMEOUT_SECONDS
) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function like ask_api() for several questions over one connection."""
    spec, headers = find_api(api, token_file)
    base = "http://netstack"
    if not spec.path:
        base = f"http://[{spec.host}]:{spec.port}" if ":" in spec.host else f"http://{spec.host}:{spec.port}"
    import httpx

    # trust_env=False: a proxy for the world is none for this host's loopback.
    transport = httpx.HTTPTransport(uds=spec.path or None, trust_env=False)
    with httpx.Client(transport=transport, base_url=base, timeout=timeout, headers=headers, trust_env=False) as client:

        def ask(
            path: str,
            *,
            post: Mapping[str, Any] | None = None,
            delete: bool = False,
            parameters: Mapping[str, str] | None = None,
        ) -> dict[str, Any]:
            method = "DELETE" if delete else "GET" if post is None else "POST"
            body = dict(post) if post is not None else None
            try:
                answer = client.request(method, path, params=parameters, json=body)
                answer.raise_for_status()
                document = answer.json() if answer.content else {}
            except httpx.HTTPStatusError as error:
                raise _problem_of(error.response, spec, path) from None
            except httpx.ConnectError:
                raise _nobody(spec) from None
            except (httpx.HTTPError, ValueError) as error:
                raise CommandError(f"{spec.uri}: {one_line(error)}") from None
            if not isinstance(document, dict):
                raise CommandError(f"{spec.uri} does not speak netstack's API")
            return document

        yield ask


def open_api(
    api: str | None = None, token_file: str | None = None, *, timeout: float = TIMEOUT_SECONDS
) -> tuple[socket.socket, dict[str, str], str]:
    """A connection to the API for what is no question and answer; the headers that it wants; its address for people."""
    spec, headers = find_api(api, token_file)
    family = socket.AF_UNIX if spec.path else socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(spec.path or (spec.host, spec.port))
    except OSError:
        sock.close()
        raise _nobody(spec) from None
    return sock, headers, spec.uri


def find_api(api: str | None, token_file: str | None) -> tuple[ApiSpec, dict[str, str]]:
    """Where the API is, and the headers that it wants. Raises InputError."""
    from netstack.config import parse_api_uri, runtime_directory

    spec = parse_api_uri(api or f"unix://{runtime_directory() / 'api.sock'}")
    if spec.path:
        return spec, {}
    place = Path(token_file) if token_file else runtime_directory() / f"api-{spec.port}.token"
    try:
        token = place.read_text().strip()
        if not (token.isascii() and token.isprintable() and token):
            raise ValueError("no token")
        return spec, {"authorization": f"Bearer {token}"}
    except (OSError, ValueError) as error:  # ValueError: no text at all
        words = one_line(error) if isinstance(error, OSError) else f"{place} holds no token"
        raise InputError(f"{words}: name the API's token with --token-file") from None


def _nobody(spec: ApiSpec) -> CommandError:
    return CommandError(f"nobody answers at {spec.uri}: start `netstack run`, or name its API with --api")


def _problem_of(response: httpx.Response, spec: ApiSpec, path: str) -> CommandError:
    """What the API says was wrong, in one line."""
    if response.status_code == 401:
        return CommandError(f"{spec.uri} refuses the token: it is another run's, look for the new one")
    try:
        words = " ".join(str(response.json()["error"]).split())
    except (ValueError, KeyError, TypeError):
        words = ""
    if not words or response.status_code >= 500:
        return CommandError(words or f"{spec.uri}{path} answers {response.status_code}")
    return InputError(words) if response.status_code in (400, 404) else CommandError(words)
