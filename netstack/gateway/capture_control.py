"""The pcap debug mode, turned on and off while guests are attached.

Links look at `capture` once for each batch, so that it can be set between two: with one, each frame takes the slow road
of `Stack.receive_frames`, without it nothing is left of the mode. The capture of `[pcap]` is the one that runs from the
start; it too can be stopped here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netstack.control.pcap_api import CaptureBusyError
from netstack.host.capture import Capture

if TYPE_CHECKING:
    import trio

    from netstack.gateway.network import Network


class CaptureControl:
    """`control.pcap_api.CaptureSource`."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self._network = network
        self._nursery = nursery
        self._scope: trio.CancelScope | None = None  # of the task that writes once a second

    def describe(self) -> dict[str, Any]:
        """Whether there is one."""
        capture = self._network.capture
        if capture is None or not capture.is_open:
            return {"active": False, "file": None, "frames": 0, "bytes": 0}
        return {"active": True, "file": capture.path, "frames": capture.frames, "bytes": capture.size}

    def start(self, file: str, max_size: int = 0) -> None:
        """Write what crosses the links from now on. Raises CaptureBusyError, OSError."""
        network = self._network
        if network.capture is not None and network.capture.is_open:
            raise CaptureBusyError(f"frames are written to {network.capture.path} already; stop that first")
        capture = Capture(file, max_size=max_size, on_warning=network.log.warning)
        self.run(capture)
        network.set_capture(capture)
        network.log.info("capture begins", file=file)

    def stop(self) -> None:
        """Write no more, and close the file. Raises CaptureBusyError."""
        network = self._network
        if network.capture is None:
            raise CaptureBusyError("no frames are being written")
        if self._scope is not None:
            self._scope.cancel()
        capture = network.capture
        network.set_capture(None)
        capture.close()
        network.log.info("capture ends", file=capture.path, frames=capture.frames)

    def run(self, capture: Capture) -> None:
        """Have it written once a second."""
        import trio

        if self._scope is not None:
            self._scope.cancel()  # of a capture that ended by itself: it was full, or the disk was
        self._scope = trio.CancelScope()

        async def flush(scope: trio.CancelScope) -> None:
            with scope:
                await capture.run()

        self._nursery.start_soon(flush, self._scope)
