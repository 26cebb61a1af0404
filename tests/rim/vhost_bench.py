"""A vhost-user link without a stack, and the front-end at its other end."""

from __future__ import annotations

import socket
import struct

from netstack.vde import vhost_user_messages as wire
from netstack.vde.vhost_user import VhostUserLink
from netstack.vde.vhost_user_device import FEATURES
from netstack.vde.vhost_user_messages import Request
from tests.rim.vhost_front import FrontEnd, Poller, Receiver

# What Linux' driver takes of ours; what iPXE does; and a driver from before virtio 1.0.
LINUX = FEATURES
PLAIN = wire.VERSION_1 | wire.PROTOCOL_FEATURES
LEGACY = wire.PROTOCOL_FEATURES


class Bench:
    """A link, its front-end, and what stands for the stack."""

    def __init__(self, size: int = 16, *, sealed: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.poller = Poller()
        self.stack = Receiver()
        self.front = FrontEnd(theirs, size=size, sealed=sealed)
        self.link = VhostUserLink("guest", ours, 65520, self.poller, self.stack)
        self.closed: list[str] = []
        self.ups: list[float] = []
        self.link.on_closed = self.closed.append
        self.link.on_up = self.ups.append

    def run(self) -> None:
        self.poller.run(self.link.flush)

    def start(self, features: int = LINUX, *, base: int = 0) -> None:
        self.front.start(features, base=base)
        self.run()
        assert not self.closed
        assert self.link.up

    def stop(self) -> list[int]:
        """As QEMU does when the driver lets go; the bases of both rings."""
        bases = []
        for index in (0, 1):
            self.front.send_state(Request.GET_VRING_BASE, index, 0)
            self.run()
            answered, base = struct.unpack("=II", self.front.reply(Request.GET_VRING_BASE))
            assert answered == index
            bases.append(base)
        return bases

    def why_closed(self) -> str:
        """The link has been closed, for this reason; nothing is left of it."""
        self.run()
        assert len(self.closed) == 1, self.closed
        assert self.link.closed
        assert self.front.is_closed
        assert not self.poller.handlers
        return self.closed[0]

    def close(self) -> None:
        self.link.close("end of test")
        self.front.close()
        self.poller.close()
