"""The internet that test guests talk to: HTTP, echo and a resolver, real ones, as programs in a namespace.

Run as a program it serves, on every address named, until its standard input ends:

    HTTP  port 80    GET /              a page
                     GET /bytes/N       N bytes of the pattern (tests/lab/guest/pattern.py)
                     GET /digest/N      the SHA-256 of those bytes, in hexadecimal
                     PUT, POST /...     answers with the SHA-256 and the number of the bytes received, as JSON
                     GET /headers       the request's headers, as JSON
    TCP   port 7     echo, until the sender has closed its half; then closes
          port 9     reads and says nothing
          port 19    sends the pattern for ever
    UDP   port 7     echo

It writes a line of JSON for each event (request, connection) to standard output, which class Servers gathers, so that a test
can say what arrived at the host, and not only what the guest believes.  Threads and the standard library only: what serves
the tests should have nothing in common with what they test.

class Resolver runs dnsmasq with the names of the zone example.test.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

# Beside the module path as a package, for the program runs as a file of its own in a namespace.
sys.path.insert(0, str(Path(__file__).resolve().parent / "guest"))

from pattern import pattern_blocks, pattern_digest  # type: ignore[import-not-found]  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.lab.namespaces import Namespace

PAGE = b"<title>netstack lab</title>\nHello, guest.\n"
