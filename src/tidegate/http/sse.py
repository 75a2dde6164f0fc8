"""Server-sent events: their wire format, and a writer that a stalled client cannot block.

Events are `delta`, `image`, `usage`, `done` and `error`; clients that request `text/plain` get
plain text instead.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from tidegate.errors import TidegateError
from tidegate.http.problems import problem

ABORT_EXTENSION = "tidegate.abort"
DISCONNECT_EXTENSION = "tidegate.gone"


class ClientStalled(Exception):
    """The client has read nothing for so long that its stream is cut."""


class EventWriter:
    """Writes a stream to a client. `started` is true once the response's head is sent.

    A write that takes longer than `stalled_ms` raises ClientStalled. After the client has
    disconnected, writes do nothing.
    """

    def __init__(self, send: Send, *, plain_text: bool, stalled_ms: int) -> None:
        self.started = False
        self._send = send
        self._plain_text = plain_text
        self._stalled_s = stalled_ms / 1000

    async def start(self, headers: Mapping[str, str]) -> None:
        """Send the response's head."""
        media_type = "text/plain" if self._plain_text else "text/event-stream"
        whole = {
            "content-type": f"{media_type}; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            "x-content-type-options": "nosniff",
            **headers,
        }
        raw = [(name.encode(), value.encode()) for name, value in whole.items()]
        self.started = True
        await self._bounded({"type": "http.response.start", "status": 200, "headers": raw})

    async def delta(self, text: str) -> None:
        await self._emit("delta", {"text": text}, text)

    async def image(self, url: str, mime_type: str, size_bytes: int) -> None:
        data = {"url": url, "mime_type": mime_type, "size_bytes": size_bytes}
        await self._emit("image", data, f"\n![{mime_type}]({url})\n")

    async def usage(self, data: Mapping[str, Any]) -> None:
        await self._emit("usage", data, "")

    async def done(self, data: Mapping[str, Any]) -> None:
        """Send the last event of a successful stream, and end the response."""
        await self._emit("done", data, "")
        await self._body(b"", more=False)

    async def error(self, error: TidegateError, request_id: str) -> None:
        """Send the last event of a failed stream; the caller ends the response.

        In plain text only the message and the cut connection mark an error.
        """
        data = problem(error).model_dump(exclude_none=True) | {"request_id": request_id}
        await self._emit("error", data, f"\n\n[{error.code}: {error.client_message}]\n")

    async def status(self, event: str, data: bytes, event_id: str) -> None:
        """Send an event of a request's life cycle; a client that reconnects with its id gets later
        ones."""
        named = b"id: %b\nevent: %b\n" % (event_id.encode(), event.encode())
        await self._body(b"%bdata: %b\n\n" % (named, data), more=True)

    async def send_retry(self, after_ms: int) -> None:
        """Send how long the client should wait before it reconnects."""
        await self._body(b"retry: %d\n\n" % after_ms, more=True)

    async def keep_alive(self) -> None:
        """Send a comment, for proxies that close silent connections."""
        await self._body(b": keep-alive\n\n", more=True)

    async def comment(self, text: bytes) -> None:
        """Send a comment, which clients ignore unless they look for it."""
        await self._body(text, more=True)

    async def encoded(self, events: bytes) -> None:
        """Send events that are encoded already, for several clients that get the same."""
        await self._body(events, more=True)

    async def end(self) -> None:
        await self._body(b"", more=False)

    async def _emit(self, event: str, data: Mapping[str, Any], plain: str) -> None:
        if self._plain_text:
            chunk = plain.encode("utf-8", "replace")
        else:
            chunk = b"event: %b\ndata: %b\n\n" % (event.encode(), _json(data))
        if chunk:
            await self._body(chunk, more=True)

    async def _body(self, chunk: bytes, *, more: bool) -> None:
        await self._bounded({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _bounded(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._stalled_s):
                await self._send(message)
        except TimeoutError:
            raise ClientStalled from None


def _json(data: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(data)
    except TypeError:
        # Half of a surrogate pair from the provider, which UTF-8 cannot represent.
        return json.dumps(data).encode()


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def abort(scope: Scope) -> None:
    """Cut the client's connection immediately, if the server supports that."""
    offered = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if offered is not None:
        offered["call"]()


class Presence:
    """Cancels a task when its client disconnects; `is_disconnected` is then true.

    The request's body must have been read. With a server that notifies of a disconnect this costs
    nothing until then; with any other a task listens for it. Call `end` when the answer is sent.
    """

    __slots__ = ("_listening", "_over", "_task", "is_disconnected")

    def __init__(self, scope: Scope, receive: Receive, task: asyncio.Task[Any]) -> None:
        self.is_disconnected = False
        self._over = False
        self._task = task
        self._listening: asyncio.Task[None] | None = None
        offered = scope.get("extensions", {}).get(DISCONNECT_EXTENSION)
        if offered is not None:
            offered["call"](self._on_disconnect)
        else:
            self._listening = asyncio.create_task(disconnected(receive))
            self._listening.add_done_callback(
                lambda done: None if done.cancelled() else self._on_disconnect()
            )

    def _on_disconnect(self) -> None:
        if not self.is_disconnected and not self._over:
            self.is_disconnected = True
            self._task.cancel("the client has gone")

    async def end(self) -> None:
        """Stop: nothing is cancelled from now on, and a pending cancellation is absorbed."""
        self._over = True
        if self._listening is not None:
            self._listening.cancel()
        if self.is_disconnected and self._task.cancelling():
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._task.uncancel()
