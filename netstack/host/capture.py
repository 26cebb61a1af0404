"""pcap debug mode: what crosses every link, written as pcapng, with the reason beside each frame that was dropped.

Theory of operation. The stack calls `frame` for each frame it takes or sends, off by default and then costing nothing
but an `is not None`. A frame is packed into a list in memory; the list goes to the file when it holds 64 KiB, after a
second at most (`run`, a task of whoever opened the capture), and on close. The file is always whole blocks: when a
write fails half-way, the file is cut back to the last whole block, so that a full disk leaves a readable capture. Any
such error ends the capture with one warning and never the network. So does the reader of a FIFO (`wireshark -k -i`)
that is BEHIND_BYTES behind: nobody waits for it.

The format is pcapng (draft-ietf-opsawg-pcapng): a section header, one interface description for each link, written when
the link first appears, and one enhanced packet block for each frame, with its time in nanoseconds, its direction as
seen from netstack (from a guest: inbound) and, for a dropped frame, the comment "drop: REASON", where REASON is the
name of the counter that counted it. dpkt writes the header blocks; its packet blocks take 10 us each, so those are
packed here.

A capture holds all that the guests send: the file is made readable by its owner only.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from netstack.core.ports import Buffer

FLUSH_BYTES = 64 * 1024
FLUSH_SECONDS = 1.0
# How far the reader of a FIFO may be behind.
BEHIND_BYTES = 4 * 1024 * 1024
_PIPE_BYTES = 1024 * 1024  # what Linux gives to everybody: fs.pipe-max-size

# Enhanced packet block, little-endian: u32 block type 6, total length, interface id, timestamp high, timestamp low,
# captured length, original length; then the data padded to 4 bytes, the options, and the total length again.
_HEADER = struct.Struct("<7I")
_BLOCK_TYPE = 6
_HEADER_AND_TRAILER = 32
# Options: u16 code, u16 length, value padded to 4 bytes. epb_flags (2) is a u32 whose lowest two bits are the
# direction: 1 inbound, 2 outbound. A code of 0 ends the options.
_FLAGS = struct.Struct("<HHI")
_END_OF_OPTIONS = bytes(4)
_INBOUND = _FLAGS.pack(2, 4, 1) + _END_OF_OPTIONS
_OUTBOUND = _FLAGS.pack(2, 4, 2) + _END_OF_OPTIONS
_COMMENT_CODE = 1
_MAX_COMMENT = 1024
_LENGTH = struct.Struct("<I")
_PADDING = (b"", bytes(3), bytes(2), bytes(1))


class Capture:
    """One pcapng file. Not for frames at full speed: a frame costs some 1 us, its copy, and the disk."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        application: str = "netstack",
        max_size: int = 0,
        on_warning: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Create or overwrite the file. Raises OSError.

        `max_size`: bytes after which the capture ends, 0 for no limit. `on_warning` is called once, if the capture ends
        before `close`.
        """
        self.path = os.fspath(path)
        self.frames = 0
        self._max_size = max_size
        self._on_warning = on_warning
        self._interfaces: dict[str, int] = {}
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._flush_at = FLUSH_BYTES
        self._written = 0
        # O_NONBLOCK: opening a FIFO that nobody reads would wait for ever; so it fails with ENXIO. It stays so: a write
        # that waits for a reader would hold all guests up.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, 0o600)
        try:
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if self._regular:
                with contextlib.suppress(PermissionError):  # another's file, which we may write
                    os.fchmod(self._fd, 0o600)  # O_CREAT leaves a file that is there as readable as it was
                os.ftruncate(self._fd, 0)
            else:
                _widen_pipe(self._fd)
            self._add(_section_header(application))
        except OSError:
            os.close(self._fd)
            raise
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether frames are still written: no limit was reached, no disk was full."""
        return self._open

    @property
    def size(self) -> int:
        """How long the file is, with what is still to be written."""
        return self._written + self._pending_bytes

    def add_link(self, name: str) -> int:
        """The interface id of the link called `name`, described in the file when it is new."""
        if name not in self._interfaces:
            self._interfaces[name] = len(self._interfaces)
            self._add(_interface_description(name))
        return self._interfaces[name]

    def frame(
        self,
        interface: int,
        buffers: Sequence[Buffer] | Buffer,
        *,
        to_guest: bool,
        comment: str | None = None,
        wall_ns: int | None = None,
    ) -> None:
        """Record one Ethernet frame, whole or in pieces, at `wall_ns` (nanoseconds since 1970; None: now)."""
        if not self._open:
            return
        if wall_ns is None:
            wall_ns = time.time_ns()
        # The buffers are the link's and change after this call: they must be copied here.
        data = bytes(buffers) if isinstance(buffers, (bytes, bytearray, memoryview)) else b"".join(buffers)
        length = len(data)
        options = _OUTBOUND if to_guest else _INBOUND
        if comment is not None:
            options = _comment_option(comment) + options
        padding = _PADDING[length & 3]
        total = _HEADER_AND_TRAILER + length + len(padding) + len(options)
        header = _HEADER.pack(_BLOCK_TYPE, total, interface, wall_ns >> 32, wall_ns & 0xFFFFFFFF, length, length)
        self._pending += (header, data, padding, options, _LENGTH.pack(total))
        self._pending_bytes += total
        self.frames += 1
        if self._pending_bytes >= self._flush_at:
            self.flush()

    async def run(self) -> None:
        """Flush once a second, until cancelled."""
        while True:
            await trio.sleep(FLUSH_SECONDS)
            self.flush()

    def flush(self) -> None:
        """Hand what is pending to the kernel."""
        if not self._open or not self._pending_bytes:
            return
        data = memoryview(b"".join(self._pending))
        self._pending.clear()
        self._pending_bytes = 0
        self._flush_at = FLUSH_BYTES
        if self._max_size and self._written + len(data) > self._max_size:
            self._stop(f"{self.path} has reached its limit of {self._max_size} bytes: the capture ends here")
            return
        sent = 0
        try:
            while sent < len(data):
                sent += os.write(self._fd, data[sent:])
        except BlockingIOError:
            rest = len(data) - sent
            if rest > BEHIND_BYTES:
                self._stop(f"{self.path}: who reads it is too slow: the capture ends here, the network goes on")
                return
            self._pending.append(data[sent:])
            self._pending_bytes = rest
            self._flush_at = rest + FLUSH_BYTES
        except OSError as error:
            self._stop(f"{self.path}: {error.strerror}: the capture ends here, the network goes on")
            return
        self._written += sent

    def close(self) -> None:
        """Write what is pending and close the file. May be called twice."""
        self.flush()
        if self._open:
            self._open = False
            os.close(self._fd)

    def _add(self, block: bytes) -> None:
        self._pending.append(block)
        self._pending_bytes += len(block)

    def _stop(self, warning: str) -> None:
        self._open = False
        try:
            if self._regular:
                os.ftruncate(self._fd, self._written)
        except OSError:
            pass  # the warning below names the file; its last block may be a torn one
        finally:
            os.close(self._fd)
        self._on_warning(warning)


def _widen_pipe(fd: int) -> None:
    """Have the kernel hold more for the reader of a FIFO, where it does that."""
    import fcntl

    with contextlib.suppress(OSError, AttributeError):  # it is no FIFO, or not Linux
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _comment_option(comment: str) -> bytes:
    text = comment.encode(errors="replace")[:_MAX_COMMENT]
    return struct.pack("<HH", _COMMENT_CODE, len(text)) + text + _PADDING[len(text) & 3]


def _section_header(application: str) -> bytes:
    from dpkt import pcapng

    options = [
        pcapng.PcapngOptionLE(code=pcapng.PCAPNG_OPT_SHB_USERAPPL, data=application.encode()),
        pcapng.PcapngOptionLE(),
    ]
    return bytes(pcapng.SectionHeaderBlockLE(opts=options))


def _interface_description(name: str) -> bytes:
    from dpkt import pcapng

    options = [
        pcapng.PcapngOptionLE(code=pcapng.PCAPNG_OPT_IF_NAME, data=name.encode()),
        # 9: times count in 10^-9 s, where the default is microseconds.
        pcapng.PcapngOptionLE(code=pcapng.PCAPNG_OPT_IF_TSRESOL, data=b"\x09"),
        pcapng.PcapngOptionLE(),
    ]
    return bytes(pcapng.InterfaceDescriptionBlockLE(linktype=pcapng.DLT_EN10MB, snaplen=0, opts=options))
