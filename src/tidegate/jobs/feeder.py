"""Feeder: claims from one queue within a window, and starts a task for each claim.

Invariants: a claim for which nothing can be called returns to its queue and takes no slot of the
window; none is lost while PostgreSQL is unavailable, as what can't be returned is started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

from tidegate.errors import StoreUnavailable
from tidegate.jobs.outages import Held, Look
from tidegate.store.notifications import PULSED_MS, Notifications
from tidegate.telemetry.logging import Log, get_logger

_AWAY_WAIT_S = 0.25
_FULL_WAIT_S = 0.25
_OUT_WAIT_S = 0.25
# A claim costs PostgreSQL the same for one as for a hundred, and planning it the most: where they
# come one upon another, it is made for more of them, and takes at most a quarter of the time.
_REST_OF_CLAIM, _LONGEST_REST_S = 3, 0.02

log = get_logger()


class Claimed(Protocol):
    """A job or a line of a batch that this process has claimed."""

    @property
    def request_id(self) -> UUID: ...


ClaimedT = TypeVar("ClaimedT", bound=Claimed)


@dataclass(eq=False, repr=False)
class Feeder(Generic[ClaimedT]):
    """Claims of one lane, at most `window` at a time; `tasks` are those that work on them.

    claim: at most so many. waits_ms: of those that nothing can be called for, when each is to be
    looked at again; release: return claims to the queue, those in its second argument for so long.
    idle_ms: the longest wait for a notification.
    """

    notifications: Notifications
    lane: str
    held: Held
    look: Look
    window: Callable[[], int]
    claim: Callable[[int], Awaitable[list[ClaimedT]]]
    waits_ms: Callable[[Sequence[ClaimedT]], Mapping[UUID, int]]
    release: Callable[[Sequence[ClaimedT], Mapping[UUID, int]], Awaitable[None]]
    work: Callable[[ClaimedT], Coroutine[Any, Any, None]]
    idle_ms: int
    tasks: dict[asyncio.Task[None], ClaimedT] = field(default_factory=dict)
    _slot_freed: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    def __repr__(self) -> str:
        return f"<Feeder {self.lane}: {len(self.tasks)} of {self.window()}>"

    def close(self) -> None:
        """Claim no more. A claim that is under way still comes in, and its tasks are started."""
        self._closing.set()

    async def run(self) -> None:
        """Claim and start tasks until closed; those already started go on.

        Cancelled in the middle of a claim, it leaves that claim to what releases strays.
        """
        while not self._closing.is_set():
            window = self.window()
            free = window - len(self.tasks)
            if free < max(1, window // 4):
                self._slot_freed.clear()
                # Or the window has grown: the limit was raised.
                await self._unless_closed(self._slot_freed.wait(), _FULL_WAIT_S)
                continue
            if not (free := self.held.may_claim(free)):
                await self._unless_closed(asyncio.sleep(_OUT_WAIT_S))
                continue
            mark = self.notifications.work_mark(self.lane)
            most, began = self.look.at(free), time.monotonic()
            try:
                claimed = await self.claim(most)
            except StoreUnavailable:
                # The store logs its change of state.
                self.held.outages.unclaimed()
                await self._unless_closed(asyncio.sleep(_AWAY_WAIT_S))
                continue
            waits_ms = self.waits_ms(claimed)
            ready = [one for one in claimed if one.request_id not in waits_ms]
            if not ready:
                self.held.outages.unclaimed()
            rest_s = self.look.found(held=len(waits_ms), free=len(ready))
            for one in await self._kept(claimed, ready[:free], waits_ms):
                self._start(one)
            if rest_s:
                await self._unless_closed(asyncio.sleep(rest_s))
            # A claim is bounded in bytes too: one that is nearly full may have left some.
            elif len(claimed) < max(1, most // 2):
                if len(claimed) > 1:
                    took_s = time.monotonic() - began
                    rest_s = min(_REST_OF_CLAIM * took_s, _LONGEST_REST_S)
                    await self._unless_closed(asyncio.sleep(rest_s))
                idle_ms = self.idle_ms if claimed else PULSED_MS
                await self._unless_closed(self.notifications.wait_work(idle_ms, mark, self.lane))

    async def _kept(
        self, claimed: list[ClaimedT], chosen: list[ClaimedT], waits_ms: Mapping[UUID, int]
    ) -> list[ClaimedT]:
        """Return to the queue what is held, and what a wide look has brought beyond the window."""
        if len(chosen) < len(claimed):
            ids = {one.request_id for one in chosen}
            try:
                await self.release([one for one in claimed if one.request_id not in ids], waits_ms)
            except StoreUnavailable:
                return claimed  # none is lost: their tasks wait until PostgreSQL is there
        return chosen

    async def _unless_closed(
        self, wait: Coroutine[Any, Any, object], timeout_s: float | None = None
    ) -> None:
        tasks = [asyncio.ensure_future(wait), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _start(self, one: ClaimedT) -> None:
        task = asyncio.create_task(self.work(one))
        self.tasks[task] = one
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.pop(task)
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(Log.INTERNAL_ERROR, exc_info=error)
