"""Keeps a bounded window of claimed jobs in this process, one window for each kind.

Invariant: a kind whose limit is full never holds up another kind, since each has a window of its
own; no more than `window` jobs of a kind, as it is just then, are claimed here at any time, but for
the moment of a wide look past those whose model is out. While all upstreams are out only the next
probe is claimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from tidegate.call import Kind
from tidegate.errors import StoreUnavailable
from tidegate.jobs.held import Look
from tidegate.jobs.put_off import PutOff
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
        put_off: PutOff,
        pool: str,
        kind: Kind | None,
        window: Callable[[], int],
        work: Callable[[ClaimedJob], Awaitable[None]],
    ) -> None:
        self._held = put_off.held
        self._put_off = put_off
        self._pool = pool
        self._store = store
        self._kind = kind
        self._lane = kind or UNSURE
        self._window = window
        self._work = work
        self._look = Look()
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
        while not self._closing.is_set():
            window = self._window()
            free = window - len(self.tasks)
            if free < max(1, window // 4):
                self._slot_freed.clear()
                # Or the window has grown: the limit was raised.
                await self._unless_closed(self._slot_freed.wait(), _FULL_WAIT_S)
                continue
            if not (free := self._held.may_claim(free)):
                await self._unless_closed(asyncio.sleep(_OUT_WAIT_S))
                continue
            mark = self._store.work_mark(self._lane)
            most = self._look.at(free)
            try:
                claimed = await self._store.claim(pool=self._pool, kind=self._kind, limit=most)
            except StoreUnavailable:
                # The store logs its change of state.
                self._held.outages.unclaimed()
                await self._unless_closed(asyncio.sleep(_AWAY_WAIT_S))
                continue
            is_last = len(claimed) < most
            held = await self._without_held(claimed)
            if not claimed:
                self._held.outages.unclaimed()
            rest_s = self._look.found(held=held, free=len(claimed))
            await self._keep(claimed, free)
            for job in claimed:
                self._start(job)
            if rest_s:
                await self._unless_closed(asyncio.sleep(rest_s))
            elif is_last:
                await self._unless_closed(self._store.wait_work(_IDLE_WAIT_MS, mark, self._lane))

    async def _without_held(self, claimed: list[ClaimedJob]) -> int:
        """Return jobs to the queue that nothing can be called for; how many."""
        waits_ms = self._put_off.waits_ms(claimed)
        held = [job for job in claimed if job.request_id in waits_ms]
        if held:
            with suppress(StoreUnavailable):  # or their tasks do it, once PostgreSQL is there
                await self._put_off.hand_back(held, waits_ms)
                claimed[:] = [job for job in claimed if job.request_id not in waits_ms]
        return len(held)

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
