"""A tap's descriptor on its way to the link: nobody else gets it, and it is closed once."""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from netstack.core.ports import Handler, Offload
from netstack.vde import namespace, tap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (taps, namespaces)")


class _Watched(socket.socket):
    """Says whether what was received could be inherited at that instant."""

    inheritable: bool | None = None

    def recvmsg(self, *how: Any) -> Any:
        got = super().recvmsg(*how)
        for _, _, content in got[1]:
            self.inheritable = os.get_inheritable(int.from_bytes(content[:4], sys.byteorder))
        return got


def test_a_tap_that_is_received_can_at_no_time_be_inherited() -> None:
    """Another thread may be starting a program just then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, _Watched(fileno=ours.detach()) as watched, Path(os.devnull).open("rb") as file:
        namespace.send_tap(theirs, file.fileno())
        fd = namespace.receive_tap(watched)
        assert os.path.sameopenfile(fd, file.fileno())
        os.close(fd)
        assert watched.inheritable is False


class _Full:
    """A poller that takes no more."""

    def register(self, fd: int, handler: Handler, events: int) -> None:
        raise OSError(28, "no room")

    def modify(self, fd: int, events: int) -> None: ...

    def unregister(self, fd: int) -> None: ...


def test_a_link_that_could_not_be_made_leaves_the_descriptor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner closes it, and would close somebody else's if the number had been taken meanwhile."""
    monkeypatch.setattr(tap, "set_up", lambda fd: Offload(checksum=True, tso4=True, tso6=True, uso=True))
    monkeypatch.setattr(tap, "mac_of", lambda fd: bytes(6))
    fd = os.eventfd(0)
    try:
        with pytest.raises(OSError, match="no room"):
            tap.TapLink("tap", fd, 1500, _Full(), lambda *_: None)
        gc.collect()
        os.fstat(fd)
    finally:
        os.close(fd)
