"""Delivery of answers to clients, and what happens to a call whose client disconnects.

Most servers stop when a connection is closed. Some continue to compute, as llama.cpp does with a
call that does not stream: there the answer is read to its end and the permit is kept, so that no
call is admitted to a slot that is not free. A stream is closed once it has begun, since such a
server then notices. Cancelling a job counts as a disconnected client.

What a provider's own tools make during a call is noted before its client gets it (`NotingOut`):

    provider ──► answer or event with an id ──► owner noted (durable) ──► client

Invariants: a call is only completed after its client left, and for at most its upstream's own
timeouts; a second cancellation, such as at shutdown, closes it. No answer, and no event of a
stream, is complete at the client before the resources in it have an owner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import orjson

from tidegate.dialects.answers import object_of
from tidegate.dialects.resources import MadeByTools
from tidegate.dialects.spec import Headers
from tidegate.record import KEPT_BYTES, CallRecord, Failure
from tidegate.spine.bodies import aside


class Out(Protocol):
    """The response to the client. `started`: the head of an answer was sent."""

    started: bool

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of an answer, with header names in lower case."""

    def body(self, piece: bytes, more: bool) -> Awaitable[None]:
        """Send a piece of the body; without `more` it is the last."""

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a complete answer."""


class NothingOut:
    """Discards the answer, which stays in the call's `CallRecord`."""

    started = False

    async def start(self, status: int, headers: Headers) -> None:
        pass

    async def body(self, piece: bytes, more: bool) -> None:
        pass

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        pass


class AttendedOut:
    """Relays an answer until its client has left, and discards the rest.

    left: whether the client has disconnected or cancelled. record: stores how long the call
    continued afterwards. ended_alone: the answer was completed without the client.
    """

    def __init__(self, out: Out, left: Callable[[], bool], record: CallRecord) -> None:
        self._out = out
        self._left = left
        self._record = record
        self._making: asyncio.Task[None] | None = None
        self._streams = False
        self.ended_alone = False

    @property
    def is_alone(self) -> bool:
        return self._record.went_on_ms is not None

    @property
    def started(self) -> bool:
        """Also true once the client has left: then there is no retry either."""
        return self._out.started or self.is_alone

    @started.setter
    def started(self, value: bool) -> None:
        self._out.started = value

    async def start(self, status: int, headers: Headers) -> None:
        if not self.is_alone:
            await self._out.start(status, headers)
        elif self._streams and self._making is not None:
            self._making.cancel()

    async def body(self, piece: bytes, more: bool) -> None:
        if not self.is_alone:
            await self._out.body(piece, more)

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        if not self.is_alone:
            await self._out.whole(status, headers, body)

    async def see_through(self, make: Callable[[], Awaitable[None]], *, streams: bool) -> None:
        """Make a call, and complete it if its client leaves; a stream only until it begins. Raises
        what `make` raises, and finally the cancellation."""
        self._streams = streams
        making = self._making = asyncio.ensure_future(_task_of(make))
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            if self._left() and not (streams and self._out.started):
                self._record.went_on_ms, began = 0.0, time.monotonic()
                try:
                    await asyncio.wait({making})
                finally:
                    self._record.went_on_ms = (time.monotonic() - began) * 1000
                    await ended(making)
                if not making.cancelled():
                    making.result()
                    self.ended_alone = True
            else:
                await ended(making)
            raise


async def _task_of(make: Callable[[], Awaitable[None]]) -> None:
    await make()


async def ended(making: asyncio.Future[None]) -> None:
    """Cancel a task unless it has ended, and wait until its connection is closed."""
    if not making.done():
        making.cancel()
        await asyncio.wait({making})


async def undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Complete `work` however often the caller is cancelled, and then raise the cancellation."""
    doing, cancelled = asyncio.ensure_future(work), None
    while not doing.done():
        try:
            await asyncio.wait({doing})
        except asyncio.CancelledError as late:
            cancelled = late
    if cancelled is not None:
        raise cancelled from (None if doing.cancelled() else doing.exception())
    doing.result()


def client_left(record: CallRecord) -> Failure:
    """Return the failure of a call whose client left."""
    message = "the client disconnected"
    if record.went_on_ms is not None:
        message += f"; its upstream's work was over {record.went_on_ms:.0f} ms later"
    return Failure("client_left", message)


# What a provider's own tools make during a call: files, containers, environments

Named = Sequence[tuple[str, str]]  # kinds and ids
_EVENT = b"data:"


class NotingOut:
    """Relays an answer, and notes the resources in it first. An answer without events, or one
    event, is searched if it has at most `KEPT_BYTES`; a compressed one is not."""

    def __init__(
        self,
        out: Out,
        made: MadeByTools,
        note: Callable[[Named], Awaitable[None]],
    ) -> None:
        self._out = out
        self._made = made
        self._note = note
        self._noted: set[tuple[str, str]] = set()
        self._held: list[bytes] = []  # of an answer or an event that is not complete
        self._held_bytes = 0
        self._streams = False

    @property
    def started(self) -> bool:
        return self._out.started

    @started.setter
    def started(self, value: bool) -> None:
        self._out.started = value

    async def start(self, status: int, headers: Headers) -> None:
        self._streams = any(value.lower().startswith(b"text/event-stream") for _, value in headers)
        await self._out.start(status, headers)

    async def body(self, piece: bytes, more: bool) -> None:
        if self._streams and b"\n" in piece:
            whole, _, rest = piece.rpartition(b"\n")
            self._hold(whole)
            await self._search()
            self._hold(rest)
        else:
            self._hold(piece)
        if not more:
            await self._search()
        await self._out.body(piece, more)

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        self._hold(body)
        await self._search()
        await self._out.whole(status, headers, body)

    def _hold(self, piece: bytes) -> None:
        self._held_bytes += len(piece)
        if self._held_bytes <= KEPT_BYTES:
            self._held.append(piece)

    async def _search(self) -> None:
        """Note the resources in what is held, which is complete."""
        held = b"".join(self._held) if self._held_bytes <= KEPT_BYTES else b""
        self._held, self._held_bytes = [], 0
        if any(one in held for one in self._made.marks):
            found = await aside(len(held), partial(_named_in, held, self._made))
            if new := [one for one in found if one not in self._noted]:
                await self._note(new)
                self._noted.update(new)


def _named_in(held: bytes, made: MadeByTools) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    lines = [held] if held.lstrip()[:1] == b"{" else held.splitlines()
    for line in lines:
        if any(one in line for one in made.marks):
            try:
                found += made.named_in(object_of(orjson.loads(line.removeprefix(_EVENT))))
            except orjson.JSONDecodeError:  # not an answer of this dialect
                continue
    return list(dict.fromkeys(found))
