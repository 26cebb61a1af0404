"""The pcap debug mode over HTTP.

    GET  /v1/pcap    whether frames are written to a file, to which, and how many
    POST /v1/pcap    {"action": "start", "file": "/tmp/all.pcapng", "max_size": 100000000}, or {"action": "stop"}

The file is written by netstack's own process, as its user; it is made anew if it is there. One at a time: 409.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from netstack.control.bodies import FRESH, read_object, refuse_others, take_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MAX_SIZE = 1 << 50


class CaptureBusyError(Exception):
    """There is a capture already, or none to stop; str() is one line."""


class CaptureSource(Protocol):
    """The capture of a network. OSError: the file cannot be written."""

    def describe(self) -> dict[str, Any]: ...
    def start(self, file: str, max_size: int = 0) -> None: ...
    def stop(self) -> None: ...


def capture_routes(capture: CaptureSource) -> list[Route]:
    """What to serve."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def pcap(request: Request) -> Response:
        if request.method == "POST":
            body = await read_object(request)
            try:
                if take_text(body, "action", among=("start", "stop")) == "start":
                    file = take_text(body, "file")
                    if not file.startswith("/") or "\0" in file:
                        raise HTTPException(
                            400, "file: must be a path that begins with /: netstack's directory is its own"
                        )
                    size = body.pop("max_size", 0)
                    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_SIZE:
                        raise HTTPException(400, "max_size: must be a number of bytes; 0 for no limit")
                    refuse_others(body, "action, file, max_size")
                    capture.start(file, size)
                else:
                    refuse_others(body, "action")
                    capture.stop()
            except CaptureBusyError as error:
                raise HTTPException(409, str(error)) from None
            except OSError as error:
                raise HTTPException(400, f"file: {error.strerror or error}") from None
        return JSONResponse(capture.describe(), headers=FRESH)

    return [Route("/v1/pcap", pcap, methods=["GET", "POST"])]
