"""The body of a native request as it arrives, bounded in size and in silence.

Invariant: it is bounded by a plain timer, since a timeout's context costs as much as all the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message, Receive

from tidegate.errors import PayloadTooLarge, RequestTimeout


class ClientGone(Exception):
    """The client left before its request was whole."""


class Incoming:
    """Read it in `task`, which is cancelled when the client is too slow; `is_slow` is true then,
    for where another task does the reading. Raises PayloadTooLarge, RequestTimeout or ClientGone.
    """

    __slots__ = ("_receive", "_silence_s", "_task", "is_slow")

    def __init__(self, receive: Receive, task: asyncio.Task[Any], silence_s: float) -> None:
        self._receive = receive
        self._task = task
        self._silence_s = silence_s
        self.is_slow = False

    async def whole(self, most_bytes: int) -> bytes:
        """All of it."""
        message = await self._next()
        piece: bytes = message.get("body", b"")
        if not message.get("more_body", False) and len(piece) <= most_bytes:
            return piece
        return b"".join([one async for one in self.pieces(most_bytes, message)])

    async def pieces(self, most_bytes: int, message: Message | None = None) -> AsyncIterator[bytes]:
        """Piece by piece, from `message` on where there is one."""
        size_bytes, more = 0, True
        while more:
            message = await self._next() if message is None else message
            piece, more = message.get("body", b""), message.get("more_body", False)
            message = None
            size_bytes += len(piece)
            check_size(size_bytes, most_bytes)
            if piece:
                yield piece

    async def _next(self) -> Message:
        timer = asyncio.get_running_loop().call_later(self._silence_s, self._too_slow)
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self.is_slow:
                raise
            self._task.uncancel()
            raise RequestTimeout("the request's body arrives too slowly") from None
        finally:
            timer.cancel()
        if message["type"] != "http.request":
            raise ClientGone
        return message

    def _too_slow(self) -> None:
        self.is_slow = True
        self._task.cancel()


def check_size(size_bytes: int, most_bytes: int) -> None:
    """Raises PayloadTooLarge."""
    if size_bytes > most_bytes:
        allowed = f"at most {most_bytes} bytes"
        raise PayloadTooLarge("body", "the body is too large", allowed=allowed)
