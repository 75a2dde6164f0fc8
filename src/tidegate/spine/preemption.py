"""Preemption: calls of jobs and batch lines without an answer give way to higher bands.

    call without an answer ──► snapshot: a higher band waits ──► claim of the ticket ──► cancelled
                                     too long, at a full limit                          ──► queued

Only for upstreams with `preempt`. While a worker has preemptible calls in a pool, it reads the
pool's snapshot four times within `after_ms`. For the first ticket of a higher band's queue that has
waited that long, one process claims the right to cancel a call: its newest, which loses the least
work. The call ends as any cancelled one: its connection is closed, it is charged by estimate if it
was sent, then its permit is released.

Invariants: at most one call is preempted for a waiting ticket within the time of a claim, over all
processes; never a call whose answer has begun, nor one whose permit does not help the ticket. A
simultaneous cancellation for another reason takes precedence.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import Protocol
from uuid import UUID

from tidegate.errors import CallPreempted, LimiterUnavailable
from tidegate.limiter import (
    HigherWaits,
    Limiter,
    Permit,
    QueueView,
    Snapshot,
    newest_to_give_way,
)
from tidegate.policy.deployment import Preempt
from tidegate.telemetry.logging import Log, get_logger

_TICK_S = 0.05

log = get_logger()


class Hearing(Protocol):
    """An exchange that shows whether the answer may have begun."""

    @property
    def has_response(self) -> bool: ...


class PreemptibleCall:
    """A call that can be preempted within the `with` block, which then raises CallPreempted."""

    def __init__(
        self, watch: PoolWatch, exchange: Hearing, permit: Permit, request_id: UUID
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.permit = permit
        self._watch = watch
        self._exchange = exchange
        self._request_id = request_id
        self._task = task
        self._cancelling = task.cancelling()
        self._gave_way_at: str | None = None

    @property
    def limits(self) -> tuple[str, ...]:
        return self.permit.limits

    def may_give_way(self, limit: str, band: int) -> bool:
        """Whether the call can be preempted for a waiter of `band` at `limit`."""
        return (
            self._gave_way_at is None
            and band < self.permit.band
            and limit in self.permit.limits
            and not self._exchange.has_response
        )

    def give_way(self, limit: str, band: int) -> None:
        """Cancel the call, which waits for its answer."""
        self._gave_way_at = limit
        log.info(
            Log.CALL_PREEMPTED,
            request_id=str(self._request_id),
            tenant=self.permit.tenant,
            pool=self._watch.limiter.pool,
            limit=limit,
            band=self.permit.band,
            for_band=band,
        )
        self._task.cancel()

    def __enter__(self) -> None:
        self._watch.calls[self] = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._watch.calls[self]
        if (limit := self._gave_way_at) is None:
            return
        is_own = self._task.uncancel() <= self._cancelling
        if is_own and isinstance(error, asyncio.CancelledError):
            raise CallPreempted(f"the call gave way to one of a higher band at {limit}") from None


class PoolWatch:
    """The preemptible calls of this process in one pool, oldest first."""

    def __init__(self, limiter: Limiter, rule: Preempt) -> None:
        self.limiter = limiter
        self.calls: dict[PreemptibleCall, None] = {}
        self._waits = HigherWaits(rule.after_ms)
        self._due_ms = 0.0

    async def read(self, now_ms: float) -> None:
        """Preempt calls, if the pool is due to be read. Raises LimiterUnavailable."""
        if now_ms < self._due_ms:
            return
        self._due_ms = now_ms + self._waits.every_ms
        snapshot = await self.limiter.snapshot()
        preempted = 0
        for queue in self._waits.overdue(snapshot, now_ms):
            if self._newest(snapshot, queue) is None or preempted >= self._waits.MOST_PER_READ:
                continue
            ticket = f"{queue.sid}|{queue.first_ticket}"
            is_claimed = await self.limiter.claim(ticket, self._waits.claim_ms)
            # Its answer may have begun meanwhile.
            if is_claimed and (call := self._newest(snapshot, queue)) is not None:
                call.give_way(str(queue.held_up_by), queue.band)
                preempted += 1

    def _newest(self, snapshot: Snapshot, queue: QueueView) -> PreemptibleCall | None:
        return newest_to_give_way(self.calls, snapshot, queue, self.limiter.policy)


class Preemption:
    """All preemptible calls of one process."""

    def __init__(self) -> None:
        self._watches: dict[tuple[Limiter, Preempt], PoolWatch] = {}
        self._entered = asyncio.Event()

    def of(
        self, limiter: Limiter, rule: Preempt, exchange: Hearing, permit: Permit, request_id: UUID
    ) -> PreemptibleCall:
        """Return a context for a call of the current task under `permit`. Calls are only preempted
        while `run` runs."""
        watch = self._watches.get((limiter, rule))
        if watch is None:  # both can be changed live; calls keep the rule they began with
            watch = PoolWatch(limiter, rule)
            used = {key: one for key, one in self._watches.items() if one.calls}
            self._watches = {**used, (limiter, rule): watch}
        self._entered.set()
        return PreemptibleCall(watch, exchange, permit, request_id)

    async def run(self) -> None:
        """Preempt calls, until cancelled."""
        while True:
            await self._entered.wait()
            self._entered.clear()
            while any(watch.calls for watch in self._watches.values()):
                for watch in self._watches.values():
                    if watch.calls:
                        with suppress(LimiterUnavailable):  # which the limiter logs
                            await watch.read(time.monotonic() * 1000)
                await asyncio.sleep(_TICK_S)
