"""Makes the links of a network and joins them to its stack; from a link's URI to its attachment."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from netstack.config import LinkSpec
from netstack.control.log import Log, RateLimiter
from netstack.core.stack import Stack
from netstack.host.poller import HostPoller
from netstack.vde.attachment import Attachment, StreamConnector, StreamDescriptor, StreamListener
from netstack.vde.datagram import DatagramLink
from netstack.vde.link import VIOLATION, BaseLink
from netstack.vde.stream import StreamLink
from netstack.vde.vde_switch import VdeSwitch

if TYPE_CHECKING:
    from netstack.host.capture import Capture
    from netstack.vde.tap import TapLink
    from netstack.vde.vhost_user import VhostUserLink


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
        self.on_change: Callable[[str, str, str], None] = lambda what, name, why: None  # "up" or "closed", for events
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
        if spec.scheme == "tap":
            return self._make_tap(spec)
        if spec.scheme == "vhost-user":
            from netstack.vde.vhost_user_attachment import VhostUserListener

            return VhostUserListener(spec.uri, self, path=spec.path)
        return VdeSwitch(spec.uri, self, directory=spec.path)

    def _make_tap(self, spec: LinkSpec) -> Attachment:
        # Its modules are Linux's alone, and not needed by most.
        from netstack.vde.tap_attachment import TapDescriptor, TapDevice

        if spec.fd >= 0:
            return TapDescriptor(spec.uri, self, fd=spec.fd)
        return TapDevice(spec.uri, self, device=spec.device, path=spec.path, pid=spec.pid)

    @property
    def mtu(self) -> int:
        """The MTU that guests are told."""
        return self._mtu

    def tap(self, name: str, fd: int) -> TapLink:
        """Make a link of a tap and join it to the stack."""
        from netstack.vde.tap import TapLink

        link = TapLink(name, fd, self._mtu, self._poller, self._stack.receive_frames)
        self._join(link)
        return link

    def vhost_user(self, name: str, sock: socket.socket) -> VhostUserLink:
        """Make a link of a connection to a vhost-user front-end and join it to the stack."""
        from netstack.vde.vhost_user import VhostUserLink

        link = VhostUserLink(name, sock, self._mtu, self._poller, self._stack)

        def on_up(now: float) -> None:
            # What was said when the front-end connected, no driver has heard.
            self._stack.greet(link, now)
            self._on_link(link, now)

        link.on_up = on_up
        link.on_unsealed = lambda: self._log.warning(
            "guest memory is in a file that may become shorter, which would end netstack; "
            "QEMU's memory-backend-memfd is safe",
            link=name,
        )
        self._join(link)
        return link

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
        self._tap_link(link)
        link.on_closed = lambda why: self._on_closed(link, why)
        now = time.monotonic()
        self._stack.add_link(link, now)
        self._on_link(link, now)
        self._stack.flush()
        self._log.info("link up", link=link.name, mtu=link.mtu)
        self.on_change("up", link.name, "")

    def set_capture(self, capture: Capture | None, links: Iterable[BaseLink]) -> None:
        """Write the frames of these links, and of those to come, there from now on; None: nowhere."""
        self._capture = capture
        for link in links:
            link.write_capture()
            self._tap_link(link)

    def _tap_link(self, link: BaseLink) -> None:
        if self._capture is not None:
            link.interface = self._capture.add_link(link.name)
        link.capture = self._capture

    def _on_closed(self, link: BaseLink, why: str) -> None:
        self._stack.remove_link(link, time.monotonic())
        self.on_change("closed", link.name, why)
        if why.startswith(VIOLATION):
            self._stack.counters.drop("link_violation")
            self._log.warning("link closed", link=link.name, why=why)
        else:
            self._log.info("link closed", link=link.name, why=why)
