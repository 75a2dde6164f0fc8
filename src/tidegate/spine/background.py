"""Background calls: handed over from the process that makes one to the workers.

    permit ──► on record, counted under a name ──► request ──► id on record ──► permit returned
                                                      │
                                                      └── refused: not counted, not on record

From before its request goes out until the provider says that it has ended, a call is counted in the
limiter under a name of its own, which no process holds: whatever dies, it stays counted, for its
longest time at most. While its request is under way it counts twice, never less than once.

Invariant: a client that leaves does not end the hand-over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from tidegate.admission.demand import CallDemand
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, Permit
from tidegate.record import CallRecord
from tidegate.spine.routing import Target
from tidegate.spine.run import CallFailed, Lane
from tidegate.store.provider.background import BackgroundCalls
from tidegate.store.provider.resources import NewResource
from tidegate.store.spill import CallJournal

# How long it stays counted after its longest time: until a worker has cancelled it.
GRACE_MS = 300_000
FIRST_LOOK_MS = 1_000
_START_TRIES = 20
_RETRY_S = 0.5


class BackgroundHandOver:
    """Of one call."""

    def __init__(
        self,
        calls: BackgroundCalls,
        record: CallRecord,
        journal: CallJournal,
        kind: str,
        longest_ms: int,
    ) -> None:
        """longest_ms: how long it may go on, where that is longer than any other call may."""
        self._calls = calls
        self._record = record
        self._journal = journal
        self._kind = kind
        self._longest_ms = longest_ms
        self._permit: Permit | None = None
        self._held: tuple[Limiter, str] | None = None
        self._decided = asyncio.Event()

    async def admitted(self, permit: Permit | None) -> None:
        """The permit of the try that follows."""
        self._permit = permit

    async def make(
        self, target: Target, lane: Lane, demand: CallDemand, call: Callable[[], Awaitable[None]]
    ) -> None:
        """Make the call, and see it to its hand-over if the client leaves. Raises what it raises,
        StoreUnavailable and LimiterUnavailable."""
        self._decided.clear()
        try:
            await self._begin(lane, demand)
        except BaseException:  # cancellation too: nothing was sent
            await asyncio.shield(self.not_taken())
            raise
        making = asyncio.ensure_future(call())
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            deciding = asyncio.ensure_future(self._decided.wait())
            await asyncio.wait({making, deciding}, return_when=asyncio.FIRST_COMPLETED)
            deciding.cancel()
            if not making.done():
                making.cancel()
                await asyncio.wait({making})
            raise
        finally:
            if self._is_not_taken(making):
                await self.not_taken()

    def _is_not_taken(self, making: asyncio.Future[None]) -> bool:
        """Whether the provider has refused it, or never heard of it. Without an answer it may go
        on: then it stays counted."""
        if self._decided.is_set() or not making.done() or making.cancelled():
            return False
        error = making.exception()
        refused = isinstance(error, CallFailed) and error.status > 0
        return refused or not self._record.sent

    async def _begin(self, lane: Lane, demand: CallDemand) -> None:
        record, within_ms = self._record, max(lane.hard_ms, self._longest_ms)
        name = f"background-{record.id}-{record.attempts}"
        self._held = (lane.limiter, name) if demand.limits else None
        await self._calls.begin(record, self._kind, demand.limits, name, within_ms)
        if demand.limits:
            await lane.limiter.hold(name, demand.limits, within_ms + GRACE_MS)

    async def taken(self, made: Sequence[NewResource]) -> None:
        """Raises StoreUnavailable where that can't be written within some seconds: the call stays
        counted, for its longest time."""
        for left in reversed(range(_START_TRIES)):
            try:
                await self._calls.start(self._record, made, FIRST_LOOK_MS)
                break
            except StoreUnavailable:
                if not left:
                    raise
            await asyncio.sleep(_RETRY_S)
        self._record.handed_over = True
        self._journal.leave(self._record)
        if self._permit is not None:
            self._permit.hand_over()
        self._decided.set()

    async def not_taken(self) -> None:
        """What can't be withdrawn now ends with its longest time."""
        self._decided.set()
        with suppress(StoreUnavailable):
            await self._calls.drop(self._record.id)
        if self._held is not None:
            limiter, name = self._held
            with suppress(LimiterUnavailable):
                await limiter.revoke(name)
