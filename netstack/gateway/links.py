"""Makes the links of a network and joins them to its stack; from a link's URI to its attachment."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from netstack.config import LinkSpec
from netstack.control.log import Log, RateLimiter
from netstack.core.stack import Stack
from netstack.host.poller import HostPoller
from netstack.vde.attachment import Attachment, StreamConnector, StreamDescriptor, StreamListener
from netstack.vde.datagram import DatagramLink
from netstack.vde.link import BaseLink
from netstack.vde.stream import StreamLink
from netstack.vde.vde_switch import VdeSwitch

if TYPE_CHECKING:
    from netstack.host.capture import Capture


class Links:
    """The factory that attachments call (`vde.attachment.LinkFactory`)."""

    def __init__(
        self,
        stack: Stack,
        poller: HostPoller,
        log: Log,
        *,
        mtu: int,
        capture: Capture | None,
        on_link: Callable[[BaseLink, float], None],
    ) -> None:
        """`on_link(link, now)` is called when a link has joined the stack."""
        self._stack = stack
        self._poller = poller
        self._log = log
        self._mtu = mtu
        self._capture = capture
        self._on_link = on_link
        self._limiter = RateLimiter()

    def make_attachment(self, spec: LinkSpec) -> Attachment:
        """What this URI stands for; to be opened and run."""
        where: dict[str, Any] = {"path": spec.path} if spec.path else {"host": spec.host, "port": spec.port}
        if spec.scheme in ("unix", "tcp"):
            return StreamListener(spec.uri, self, **where)
        if spec.scheme in ("connect+unix", "connect+tcp"):
            return StreamConnector(spec.uri, self, **where)
        if spec.scheme == "fd":
            return StreamDescriptor(spec.uri, self, fd=spec.fd)
        return VdeSwitch(spec.uri, self, directory=spec.path)

    def stream(self, name: str, sock: socket.socket) -> StreamLink:
        """Make a stream link and join it to the stack."""
        link = StreamLink(name, sock, self._mtu, self._poller, self._stack.receive_frames)
        self._join(link)
        return link

    def datagram(self, name: str, sock: socket.socket, mtu: int) -> DatagramLink:
        """Make a datagram link and join it to the stack."""
        link = DatagramLink(name, sock, min(mtu, self._mtu), self._poller, self._stack.receive_frames)
        self._join(link)
        return link

    def tell(self, message: str, **fields: object) -> None:
        """Log what happened to an attachment; what happens again and again, as without descriptors, now and then."""
        suppressed = self._limiter.admit(f"{message} {fields}", time.monotonic())
        if suppressed is not None:
            if suppressed:
                fields["suppressed"] = suppressed
            self._log.info(message, **fields)

    def _join(self, link: BaseLink) -> None:
        if self._capture is not None:
            link.interface = self._capture.add_link(link.name)
            link.capture = self._capture
        link.on_closed = lambda why: self._on_closed(link, why)
        now = time.monotonic()
        self._stack.add_link(link, now)
        self._on_link(link, now)
        self._stack.flush()
        self._log.info("link up", link=link.name, mtu=link.mtu)

    def _on_closed(self, link: BaseLink, why: str) -> None:
        self._stack.remove_link(link, time.monotonic())
        self._log.info("link closed", link=link.name, why=why)
