"""`netstack connect GUEST:PORT`: a connection into a guest on standard input and output, for ssh and the like.

Theory of operation
-------------------
`POST /v1/connect` makes the API's socket the connection to the guest: it is answered with 101 when the guest has
accepted, and what follows are the guest's bytes. Here they are copied between that socket and our standard input and
output by one poll loop; each direction ends for itself, as ssh's ProxyCommand and `nc` have it, and the command ends
when the guest's side has. A reset, by which a guest's program died, is status 1.

With --pass-fd (ssh: ProxyUseFdpass=yes) standard output is a socket of ssh's: the connection itself is passed over it,
and nothing is copied here.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import sys
from typing import Annotated, Final
from urllib.parse import urlencode

import typer

from netstack.cli.client import ApiOption, TokenFileOption, open_api
from netstack.cli.faults import CommandError, InputError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# A guest that is not there is asked for during 4 s; one that drops what it does not know is given up by TCP.
ANSWER_SECONDS: Final = 30.0
_MAX_HEAD: Final = 16 * 1024
_CHUNK: Final = 1 << 18


@app.command(epilog="Example: netstack connect debian:22")
def connect(
    where: Annotated[
        str,
        typer.Argument(metavar="GUEST:PORT", help="A guest's name or address and a port; PORT: the first guest's."),
    ],
    pass_fd: Annotated[
        bool, typer.Option("--pass-fd", help="Pass the connection over standard output (ssh: ProxyUseFdpass=yes).")
    ] = False,
    api: ApiOption = None,
    token_file: TokenFileOption = None,
) -> int:
    """Connect standard input and output to a port of a guest.

    For ssh: ssh -o ProxyCommand='netstack connect %h:%p' root@debian
    """
    guest, port = parse_target(where)
    sock, early = open_tunnel(guest, port, api, token_file)
    with sock:
        if not pass_fd:
            return relay(sock, early)
        if early:
            raise CommandError("the guest spoke before the connection could be passed on; leave --pass-fd out")
        try:
            with socket.socket(fileno=os.dup(sys.stdout.fileno())) as out:
                socket.send_fds(out, [b"\0"], [sock.fileno()])
        except OSError:
            raise InputError("--pass-fd: standard output is no unix socket; ssh makes it one") from None
    return 0


def parse_target(text: str) -> tuple[str, int]:
    """A guest and a port: debian:22, [fd00::15]:22, or 22 alone for the first guest. Raises InputError."""
    match = re.fullmatch(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]*)):)?([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) <= 65535:
        raise InputError(f"{text}: must be GUEST:PORT, such as debian:22, 192.168.5.15:22 or [fd00::15]:22")
    return match[1] or match[2] or "", int(match[3])


def open_tunnel(
    guest: str, port: int, api: str | None = None, token_file: str | None = None
) -> tuple[socket.socket, bytes]:
    """A connection to a guest, and what it has said already. Raises CommandError."""
    sock, headers, uri = open_api(api, token_file, timeout=ANSWER_SECONDS)
    try:
        query = urlencode({"guest": guest, "port": port} if guest else {"port": port})
        lines = [f"POST /v1/connect?{query} HTTP/1.1", "Host: netstack", "Connection: Upgrade", "Upgrade: tcp"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        head = bytearray()
        while b"\r\n\r\n" not in head:
            chunk = sock.recv(_MAX_HEAD - len(head))
            if not chunk:
                break
            head += chunk
        first, _, rest = bytes(head).partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 ([0-9]{3})", first)
        if status is None:
            raise CommandError(f"{uri} does not speak netstack's API")
        if status[1] != b"101":
            while len(rest) < _MAX_HEAD and (chunk := sock.recv(_MAX_HEAD)):
                rest += chunk
            words = " ".join(rest.decode("utf-8", "replace").split())
            raise CommandError(words or f"{uri} answers {status[1].decode()}")
    except TimeoutError:
        sock.close()
        raise CommandError(f"no answer from {guest or 'the first guest'} port {port}") from None
    except OSError as error:
        sock.close()
        raise CommandError(f"{uri}: {error.strerror or error}") from None
    except CommandError:
        sock.close()
        raise
    return sock, rest


def relay(sock: socket.socket, early: bytes = b"", source: int = 0, sink: int = 1) -> int:
    """Copy until the guest's side ends; what is read from `source` goes there, what comes goes to `sink`."""
    sock.setblocking(False)
    to_guest, to_sink = b"", early
    source_open = guest_open = True
    while guest_open or to_sink:
        readers: list[int | socket.socket] = []
        writers: list[int | socket.socket] = []
        if source_open and not to_guest:
            readers.append(source)
        if guest_open and not to_sink:
            readers.append(sock)
        if to_guest:
            writers.append(sock)
        if to_sink:
            writers.append(sink)
        ready, writable, _ = select.select(readers, writers, [])
        try:
            if sock in ready:
                to_sink = sock.recv(_CHUNK)
                guest_open = bool(to_sink)
            if sock in writable:
                to_guest = to_guest[sock.send(to_guest) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise CommandError(f"the guest's side of the connection broke: {error.strerror}") from None
        if source in ready:
            to_guest = os.read(source, _CHUNK)
            if not to_guest:
                source_open = False
        if sink in writable:
            try:
                to_sink = to_sink[os.write(sink, to_sink) :]
            except BrokenPipeError:
                return 0  # whoever wanted it is gone
        if not source_open and not to_guest and guest_open and source >= 0:
            source = -1
            with contextlib.suppress(OSError):  # a guest that has reset the connection: the next recv() says so
                sock.shutdown(socket.SHUT_WR)
    return 0
