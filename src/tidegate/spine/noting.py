"""Notes of what a provider's own tools make during a call: files, containers, environments.

    provider ──► answer or event with an id ──► owner noted (durable) ──► client

Invariant: no answer, and no event of a stream, is complete at the client before the resources in it
have an owner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import orjson

from tidegate.dialects.answers import object_of
from tidegate.dialects.resources import MadeByTools
from tidegate.dialects.sandboxes import CONTAINER
from tidegate.dialects.spec import Headers
from tidegate.record import KEPT_BYTES, CallRecord
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.out import Out
from tidegate.spine.resources import MadeBy, Resources
from tidegate.spine.routing import Target, Targets

# No provider keeps a container for more than 30 days after its last use.
_CONTAINER_LASTS = timedelta(days=90)
Named = Sequence[tuple[str, str]]  # kinds and ids


def noting(
    resources: Resources,
    targets: Targets,
    out: Out,
    made: MadeByTools,
    call: NativeCall,
    body: Mapping[str, Any],
    record: CallRecord,
) -> Out:
    """Return the `out` of a call, which notes what the provider's tools make."""
    use, dialect, terms = call.endpoint.resource, call.endpoint.dialect, call.terms
    if not made.may_be_made(body) if use is None else use.kind != made.of:
        return out

    async def note(named: Named) -> None:
        target = Target(targets.upstreams[record.upstream or ""], "")
        by = MadeBy(terms.caller, dialect, terms.request_id, terms.subject)
        for kind, one in named:
            ends_at = resources.now() + _CONTAINER_LASTS if kind == CONTAINER else None
            await resources.note(resources.made(by, target, kind, [one], ends_at))

    return NotingOut(out, made, note)


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
        self._streams = any(value.startswith(b"text/event-stream") for _, value in headers)
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
