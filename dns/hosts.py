"""The host's /etc/hosts, for guests: A, AAAA and PTR, as live as the file is (hosts(5)).

Theory of operation
-------------------
`parse_hosts` turns the file's bytes into a HostsTable, two dicts; it is pure. `HostsFile` holds the table that counts
now, and its task looks at the file twice a second: a stat, and a read only when it is another file (inode) or changed
(mtime, ctime, size). That notices a rewrite, a rename over it, a switched symlink, and works on every file system, so
there is no second way (inotify) to go wrong. Since two writes can fall within one tick of the file system's clock, a
file that changed is read once more at the next look. A file that is gone is believed at the second look: editors
remove and write anew.

Reading and parsing happen in a thread: lists of blocked names have 100,000 lines, which take a third of a second. The
thread lets the event loop have the interpreter every few hundred lines. Until a long file has been read for the first
time its names are not known; a short one is read before the first query.

What the lines mean:
- Several lines for a name, several addresses. Names are compared without case, and a dot at the end does not count.
- A name in the file exists: other types get NODATA and are not forwarded, or the answer could be NXDOMAIN and take the
  name away from guests with musl.
- 0.0.0.0 and :: stand for "blocked" and give NODATA, as with systemd-resolved.
- 127.0.0.1 means this host, but in a guest it would mean the guest. So loopback addresses become the gateway's, which
  leads to the host's loopback (unless the settings say `verbatim`).
- localhost and its kin in the file are left out: in a guest they are the guest (RFC 6761 6.3; netstack.dns.special).
- Lines whose address cannot be read count for nothing, and so do octal and shortened ones (010.0.0.1, 127.1), and
  addresses with a scope, which say nothing beyond this host. Names that are no host names are left out one by one.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import trio

from netstack.dns.answers import AnswerWriter, to_labels
from netstack.dns.files import open_plain
from netstack.dns.message import CLASS_IN, TYPE_ANY, Question
from netstack.dns.reverse import parse_reverse

PATH: Final = Path("/etc/hosts")

# Ten times the largest list of blocked names that people have. What lies beyond is not read.
MAX_SIZE = 32 << 20

# Of one name, and names of one address: as many as fit into an answer that guests take. Also what keeps the time to
# parse a file in proportion to its length.
MAX_EACH = 64

# Shorter files are read and parsed at once, in some milliseconds.
SMALL = 64 << 10

INTERVAL = 0.5

_LINES_AT_ONCE = 256

# RFC 1123 2.1, and the underscore, which systemd takes too and service names have.
_NAME = re.compile(rb"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_MAX_NAME = 253

_NOT_TAKEN = frozenset(
    b"localhost localhost.localdomain localhost4 localhost6 localhost4.localdomain4 localhost6.localdomain6 "
    b"ip6-localhost ip6-loopback".split()
)

_NULL = (bytes(4), bytes(16))
_LOOPBACK6 = bytes(15) + b"\1"
_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class HostsTable:
    """One version of the file. Names are dotted, in lower case; addresses are packed, and as the file has them."""

    addresses: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    names: dict[bytes, list[bytes]] = field(default_factory=dict)
    """The names of an address, the canonical one first: the first on its first line."""


def parse_hosts(data: bytes, pause: Callable[[], object] = lambda: None) -> HostsTable:
    """Read the text of a hosts file, of any bytes. pause is called every few hundred lines."""
    addresses: dict[bytes, tuple[bytes, ...]] = {}
    names: dict[bytes, list[bytes]] = {}
    read: dict[bytes, bytes | None] = {}  # lists of blocked names have one address over and over
    # One line at a time: splitlines() would keep everybody else waiting while it makes 100,000 objects.
    for number, line in enumerate(BytesIO(data.removeprefix(b"\xef\xbb\xbf"))):
        if not number % _LINES_AT_ONCE:
            pause()
        words = line.partition(b"#")[0].split()
        if len(words) < 2:
            continue
        text = words[0]
        packed = read.get(text)
        if packed is None and text not in read:
            packed = _parse_address(text)
            if len(read) < MAX_EACH:
                read[text] = packed
        if packed is None:
            continue
        for word in words[1:]:
            name = word.lower().removesuffix(b".")
            if name in _NOT_TAKEN or len(name) > _MAX_NAME or not _NAME.fullmatch(name) or name.endswith(b".localhost"):
                continue
            known = addresses.get(name, ())
            if packed in _NULL:
                addresses[name] = known
                continue
            if packed not in known and len(known) < MAX_EACH:
                addresses[name] = (*known, packed)
            if not _is_loopback(packed):
                of_address = names.setdefault(packed, [])
                if len(of_address) < MAX_EACH and name not in of_address:
                    of_address.append(name)
    return HostsTable(addresses, names)


def _parse_address(text: bytes) -> bytes | None:
    """The packed address, or None for what is none of use to a guest. inet_pton takes no octal and no short forms."""
    try:
        if b":" not in text:
            return socket.inet_pton(socket.AF_INET, text.decode("ascii"))
        packed = socket.inet_pton(socket.AF_INET6, text.decode("ascii"))
    except (OSError, ValueError):  # ValueError: not ASCII, or a NUL
        return None
    return None if packed.startswith(_MAPPED) else packed


def _is_loopback(packed: bytes) -> bool:
    return packed[0] == 127 if len(packed) == 4 else packed == _LOOPBACK6


@dataclass(slots=True)
class HostsFile:
    """The names of a hosts file.

    loopback are the packed addresses that guests get for loopback ones, IPv4 and IPv6; None gives those as they are.
    on_problem is told in words why the file cannot be used.
    """

    path: Path = PATH
    loopback: tuple[bytes, bytes] | None = None
    writer: AnswerWriter = field(default_factory=AnswerWriter)
    on_problem: Callable[[str], None] = lambda words: None
    table: HostsTable = field(init=False, default_factory=HostsTable)
    version: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    """How long the last one took to read and parse."""
    _identity: tuple[int, ...] | None = field(init=False, default=None)
    _digest: bytes = field(init=False, default=b"")
    _settled: bool = field(init=False, default=True)
    _missing: bool = field(init=False, default=False)

    def answer(self, query: bytes, question: Question) -> bytes | None:
        """Answer a query for a name or an address of the file; None for all others."""
        if question.class_ not in (CLASS_IN, TYPE_ANY):
            return None
        found = self.find(question.labels)
        if found is not None:
            return self.writer.addresses(query, question, found)
        if question.labels[-1:] == (b"arpa",):
            address = parse_reverse(question.labels)
            names = self.table.names.get(address) if address is not None else None
            if names:
                return self.writer.names(query, question, [to_labels(name) for name in names])
        return None

    def find(self, labels: tuple[bytes, ...]) -> Sequence[bytes] | None:
        """The packed addresses of a name as guests see them, maybe none; None when it is not in the file."""
        name = b".".join(labels)
        found = self.table.addresses.get(name)
        if found is not None and name.count(b".") >= len(labels):
            return None  # a dot within a label is none between two
        loopback = self.loopback
        if not found or loopback is None:
            return found
        seen = (loopback[len(packed) == 16] if _is_loopback(packed) else packed for packed in found)
        return tuple(dict.fromkeys(seen))

    def load(self) -> None:
        """Read the file here and now if it is short."""
        try:
            if self.path.stat().st_size > SMALL:
                return
        except OSError:
            return
        self._take(self._identify(), self._read(b""))

    async def run(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await self.check()
            await trio.sleep(INTERVAL)

    async def check(self) -> None:
        """Look at the file once, and read it where that is due."""
        identity = self._identify()
        if identity is None:
            if self._missing and self._identity is not None:
                self._digest, self._identity = b"", None
                self._set(HostsTable())
            self._missing = True
            return
        self._missing = False
        if identity == self._identity and self._settled:
            return
        read = await trio.to_thread.run_sync(self._read, self._digest)
        self._take(identity, read)

    def _identify(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def _read(self, known: bytes) -> tuple[bytes, HostsTable | None, float] | str:
        """Read and parse, in a thread; no table for the bytes with this digest; words when it cannot be done."""
        began = time.monotonic()
        try:
            with open_plain(self.path) as file:
                data = file.read(MAX_SIZE)
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        digest = hashlib.blake2b(data).digest()
        if digest == known:
            return digest, None, 0.0
        # sleep(0) gives the interpreter's lock away; otherwise the event loop would wait 5 ms for each turn.
        table = parse_hosts(data, lambda: time.sleep(0))
        return digest, table, time.monotonic() - began

    def _take(self, identity: tuple[int, ...] | None, read: Any) -> None:
        if isinstance(read, str):
            if self._identity != identity:
                self.on_problem(read)
            # What was known stays in use; the file is tried again when it changes.
            self._identity, self._settled = identity, True
            return
        digest, table, seconds = read
        self._settled = identity == self._identity
        self._identity, self._digest = identity, digest
        if table is not None:
            self.seconds = seconds
            self._set(table)

    def _set(self, table: HostsTable) -> None:
        self.table = table
        self.version += 1
