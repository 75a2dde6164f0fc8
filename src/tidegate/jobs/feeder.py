"""Keeps a bounded window of claimed jobs in this process, one window for each kind.

Invariant: a kind whose limit is full never holds up another kind, since each has a window of its
own; no more than `window` jobs of a kind are claimed here at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tidegate.call import DEFAULT_POOL, Kind
from tidegate.errors import StoreUnavailable
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

_IDLE_WAIT_MS = 1_000
_AWAY_WAIT_S = 0.25

log = get_logger()


class Feeder:
    """Claims jobs of one `kind` (None: those whose kind is unsure) and starts a task for each."""

    def __init__(
        self,
        store: Store,
        kind: Kind | None,
        window: int,
        work: Callable[[ClaimedJob], Awaitable[None]],
    ) -> None:
        self._store = store
        self._kind = kind
        self._window = window
        self._work = work
        self._slot_freed = asyncio.Event()
        self.tasks: dict[asyncio.Task[None], ClaimedJob] = {}

    def __repr__(self) -> str:
        return f"<Feeder {self._kind or 'unsure'}: {len(self.tasks)} of {self._window}>"

    async def run(self) -> None:
        """Claim and start jobs until cancelled; jobs already started go on."""
        while True:
            free = self._window - len(self.tasks)
            if free < max(1, self._window // 4):
                self._slot_freed.clear()
                await self._slot_freed.wait()
                continue
            mark = self._store.work_mark
            try:
                claimed = await self._store.claim(pool=DEFAULT_POOL, kind=self._kind, limit=free)
            except StoreUnavailable:
                await asyncio.sleep(_AWAY_WAIT_S)  # the store logs its change of state
                continue
            for job in claimed:
                self._start(job)
            if len(claimed) < free:
                await self._store.wait_work(_IDLE_WAIT_MS, mark)

    def _start(self, job: ClaimedJob) -> None:
        task = asyncio.ensure_future(self._work(job))
        self.tasks[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.pop(task)
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(Log.INTERNAL_ERROR, exc_info=error)
