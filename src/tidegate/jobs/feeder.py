"""Keeps a bounded window of claimed jobs in this process, one window for each kind.

Invariant: a kind whose limit is full never holds up another kind, since each has a window of its
own; no more than `window` jobs of a kind, as it is just then, are claimed here at any time, but for
the moment of a wide look past those whose model is out. While all upstreams are out only the next
probe is claimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from tidegate.call import DEFAULT_POOL, Kind
from tidegate.errors import StoreUnavailable
from tidegate.jobs.outages import Outages, look_again_s, look_at
from tidegate.store.bell import UNSURE
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

_IDLE_WAIT_MS = 1_000
_AWAY_WAIT_S = 0.25
_FULL_WAIT_S = 0.25
_OUT_WAIT_S = 0.25

log = get_logger()


class Feeder:
    """Claims jobs of one `kind` (None: those whose kind is unsure) and starts a task for each."""

    def __init__(
        self,
        store: Store,
        kind: Kind | None,
        window: Callable[[], int],
        work: Callable[[ClaimedJob], Awaitable[None]],
        outages: Outages,
        held_waits_ms: Callable[[Sequence[ClaimedJob], int], Mapping[UUID, int]],
        pool: str = DEFAULT_POOL,
    ) -> None:
        self._outages = outages
        self._held_waits_ms = held_waits_ms
        self._pool = pool
        self._store = store
        self._kind = kind
        self._lane = kind or UNSURE
        self._window = window
        self._work = work
        self._put_off = 0
        self._slot_freed = asyncio.Event()
        self._closing = asyncio.Event()
        self.tasks: dict[asyncio.Task[None], ClaimedJob] = {}

    def __repr__(self) -> str:
        return f"<Feeder {self._kind or 'unsure'}: {len(self.tasks)} of {self._window()}>"

    def close(self) -> None:
        """Claim no more. A claim that is under way still comes in, and its jobs are started."""
        self._closing.set()

    async def run(self) -> None:
        """Claim and start jobs until closed; jobs already started go on.

        Cancelled in the middle of a claim, it leaves that claim to the store's next heartbeat.
        """
        in_vain = 0
        while not self._closing.is_set():
            window = self._window()
            free = window - len(self.tasks)
            if free < max(1, window // 4):
                self._slot_freed.clear()
                # Or the window has grown: the limit was raised.
                await self._unless_closed(self._slot_freed.wait(), _FULL_WAIT_S)
                continue
            if not (free := self._outages.may_claim(free)):
                await self._unless_closed(asyncio.sleep(_OUT_WAIT_S))
                continue
            mark = self._store.work_mark(self._lane)
            claimed: list[ClaimedJob] = []
            try:
                most = look_at(free, in_vain)
                claimed = await self._store.claim(pool=self._pool, kind=self._kind, limit=most)
            except StoreUnavailable:
                # The store logs its change of state.
                await self._unless_closed(asyncio.sleep(_AWAY_WAIT_S))
                continue
            finally:
                if not claimed:
                    self._outages.unclaimed()
            if claimed and not await self._without_held_up(claimed):
                in_vain += 1
                await self._unless_closed(asyncio.sleep(look_again_s(in_vain)))
                continue
            is_last = len(claimed) < free
            in_vain = max(0, in_vain - 1)
            await self._keep(claimed, free)
            for job in claimed:
                self._start(job)
            if is_last:
                await self._unless_closed(self._store.wait_work(_IDLE_WAIT_MS, mark, self._lane))

    async def _without_held_up(self, claimed: list[ClaimedJob]) -> bool:
        """Return jobs to the queue that nothing can be called for; whether any are left."""
        waits_ms = self._held_waits_ms(claimed, self._put_off)
        self._put_off += len(waits_ms)
        if not waits_ms:
            self._put_off = 0
            return True
        held_up = [job for job in claimed if job.request_id in waits_ms]
        try:
            await self._store.hand_back(held_up, waits_ms)
        except StoreUnavailable:
            return True  # their tasks do it, as soon as PostgreSQL is there
        claimed[:] = [job for job in claimed if job.request_id not in waits_ms]
        return bool(claimed)

    async def _keep(self, claimed: list[ClaimedJob], most: int) -> None:
        """Return to the queue what a wide look has brought beyond the window."""
        if not (more := claimed[most:]):
            return
        with suppress(StoreUnavailable):  # or all are started: no job is lost by waiting here
            await self._store.hand_back(more)
            del claimed[most:]

    async def _unless_closed(
        self, wait: Coroutine[Any, Any, object], timeout_s: float | None = None
    ) -> None:
        tasks = [asyncio.ensure_future(wait), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _start(self, job: ClaimedJob) -> None:
        task = asyncio.ensure_future(self._work(job))
        self.tasks[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.pop(task)
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(Log.INTERNAL_ERROR, exc_info=error)
