"""A request's body as it arrives, bounded in size, in silence and in slowness.

Invariant: nothing is read once a bound is passed. Only time spent waiting for the client counts
against it, never our own.
"""

from __future__ import annotations

import asyncio
import re

from starlette.requests import ClientDisconnect, Request

from tidegate.config import Config
from tidegate.errors import InvalidRequest, PayloadTooLarge, RequestTimeout
from tidegate.http.incoming import WITH_ITS_HEAD_BYTES, Hold, Pace, Patience

_NUMBER = re.compile(r"[0-9]{1,18}")


class Body:
    """Pieces of the body by `next()`; None at its end.

    `next` raises PayloadTooLarge, RequestTimeout, or starlette's ClientDisconnect when the client
    has gone. Cancelling it is safe; the body cannot be read on afterwards.
    """

    def __init__(
        self,
        request: Request,
        config: Config,
        *,
        pace: Pace | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Raises PayloadTooLarge at once when the announced length is over the limit."""
        self.received_bytes = 0
        self._max_bytes = config.max_body_bytes if max_bytes is None else max_bytes
        self._pace = pace or Pace(silence_ms=config.receive_timeout_ms)
        self._patience = Patience(self._pace, in_memory=False)
        self._receive = request.receive
        self._more = True
        announced = request.headers.get("content-length", "0")
        if not _NUMBER.fullmatch(announced):
            raise InvalidRequest("Content-Length", "Content-Length is not a number of bytes")
        if int(announced) > self._max_bytes:
            raise self._too_large()

    async def next(self) -> bytes | None:
        loop = asyncio.get_running_loop()
        while self._more:
            begun = loop.time()
            try:
                async with asyncio.timeout(self._patience.left_s()):
                    message = await self._receive()
            except TimeoutError:
                raise RequestTimeout("the request's body arrives too slowly") from None
            waited_s = loop.time() - begun
            if message["type"] != "http.request":
                self._more = False
                raise ClientDisconnect
            self._more = message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            self._patience.waited(waited_s, len(piece))
            self.received_bytes += len(piece)
            if self.received_bytes > self._max_bytes:
                raise self._too_large()
            if piece:
                return piece
        return None

    async def read(self, max_bytes: int, *, field: str, hold: Hold | None = None) -> bytes:
        """The whole body, counted in `hold` once it is more than comes with a head. Raises
        PayloadTooLarge, naming `field`, at the first piece over, and QueueFull for the hold."""
        whole = bytearray()
        self._patience = Patience(self._pace, in_memory=True)
        while (piece := await self.next()) is not None:
            whole += piece
            if len(whole) > max_bytes:
                raise too_long(field, max_bytes)
            count_in(hold, len(whole))
        return bytes(whole)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            "body",
            f"the request is larger than {self._max_bytes} bytes",
            allowed=f"at most {self._max_bytes} bytes in all",
        )


def count_in(hold: Hold | None, held_bytes: int) -> None:
    """Count what a body holds of memory, once it is more than comes with a head. Raises
    QueueFull."""
    if hold is not None and held_bytes > max(WITH_ITS_HEAD_BYTES, hold.held_bytes):
        hold.reach(held_bytes)


def too_long(field: str, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        field,
        f"the body is longer than {max_bytes} bytes",
        allowed=f"at most {max_bytes} bytes of this content type",
    )
