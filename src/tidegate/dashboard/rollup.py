"""Rollup of the ended calls of this process, and of its queue, by time spans, for PostgreSQL.

Invariant: counting is a few additions in memory; PostgreSQL is written once every `FLUSH_EVERY_S`.
While it is unavailable, at most `MOST_SPANS` spans wait here. An end is counted in the span in
which it happened, or, if it is reported too late for that, in the oldest open span.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter
from tidegate.record import JUDGE, REFUSED, RETRIED, CallRecord
from tidegate.store.notifications import next_beat_s
from tidegate.store.statistics import KEPT_S, CallCounts, Dimension, History, TimeSpan, histogram_of
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger

FLUSH_EVERY_S = 5.0
FORGET_EVERY_S = 600.0
SAMPLE_EVERY_S = 10  # the shortest span: the queue is sampled once in each
MOST_SPANS = 2_000
# The number of spans that accept ends, including the current one.
OPEN_SPANS = {10: 30, 60: 6, 300: 2}
_SHORTEST_S = min(OPEN_SPANS)
_OTHER_MODEL = "(none)"

log = get_logger()


class Rollup:
    """The counts of a process: `note` listens to ended calls, `run` writes the counts.

    A call is counted in its shortest span; each flush adds new counts to the longer spans.
    """

    def __init__(self, history: History, clock: Callable[[], float] = time.time) -> None:
        self._history = history
        self._limiters: Mapping[str, Limiter] = {}
        self._sampled_at = 0
        self._clock = clock
        # By begin of the span and pool, since the last flush.
        self._fresh: dict[tuple[int, str], CallCounts] = {}
        self._tallies: dict[TimeSpan, CallCounts] = {}
        self._changed: set[TimeSpan] = set()
        self._forgot_at = clock()

    def __repr__(self) -> str:
        return f"<Rollup spans={len(self._tallies)} to_write={len(self._changed)}>"

    def watch(self, limiters: Mapping[str, Limiter]) -> None:
        """Sample the queues of these limiters from now on. The mapping may change."""
        self._limiters = limiters

    def note(self, batch: Sequence[CallRecord]) -> None:
        """Count ended calls."""
        now = self._clock()
        oldest = now - (OPEN_SPANS[_SHORTEST_S] - 1) * _SHORTEST_S
        for ended in batch:
            at = max(oldest, min(now, ended.ended_at.timestamp()))
            key = (int(at // _SHORTEST_S) * _SHORTEST_S, ended.pool)
            tally = self._fresh.get(key)
            if tally is None:
                tally = self._fresh[key] = CallCounts()
            count(tally, ended)

    async def sample(self) -> None:
        """Sample the waiting calls of this process by blocking limit, once per span.

        If nothing waits in this process, Valkey is not queried.
        """
        at = int(self._clock() // SAMPLE_EVERY_S) * SAMPLE_EVERY_S
        if at == self._sampled_at:
            return
        self._sampled_at = at
        for pool, limiter in list(self._limiters.items()):
            if not limiter.waiters:
                continue
            try:
                snapshot = await limiter.snapshot()
            except LimiterUnavailable as unavailable:
                log.debug(Log.SCRAPE_INCOMPLETE, missing="queues", detail=unavailable.message)
                continue
            tally = self._fresh.setdefault((at, pool), CallCounts())
            for queue in snapshot.queues:
                if queue.sid == limiter.session and queue.held_up_by is not None:
                    tally.count_by("limit", queue.held_up_by, [queue.waiting])

    async def run(self) -> None:
        """Write the counts until cancelled. What is not written by then is left to `flush`."""
        while True:
            await asyncio.sleep(next_beat_s(FLUSH_EVERY_S))
            try:
                await self.sample()
                await self.flush()
                now = self._clock()
                if now - self._forgot_at >= FORGET_EVERY_S:
                    self._forgot_at = now
                    await self._history.forget(now)
            except StoreUnavailable as unavailable:
                log.debug(Log.STORE_AWAY, detail=unavailable.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR)

    async def flush(self) -> None:
        """Write all changed spans. Raises StoreUnavailable; the next flush then writes them."""
        self._take_in()
        self._drop_old()
        changed, self._changed = self._changed, set()
        if not changed:
            return
        try:
            await self._history.write([(span, self._tallies[span]) for span in changed])
        except BaseException:  # on cancellation too, the next flush must write the spans
            self._changed |= changed & self._tallies.keys()
            raise

    def _take_in(self) -> None:
        """Add new counts to the spans of every length."""
        fresh, self._fresh = self._fresh, {}
        for (at, pool), tally in fresh.items():
            for step_s in OPEN_SPANS:
                span = TimeSpan(step_s, at // step_s * step_s, pool)
                self._tallies.setdefault(span, CallCounts()).merge(tally)
                self._changed.add(span)

    def _drop_old(self) -> None:
        now = self._clock()
        for span in [span for span in self._tallies if span not in self._changed]:
            if span.at < now - open_s(span.step_s) - FLUSH_EVERY_S:
                del self._tallies[span]
        for span in sorted(self._tallies, key=lambda one: one.at)[:-MOST_SPANS]:
            del self._tallies[span]
            self._changed.discard(span)


@asynccontextmanager
async def counting(store: Store) -> AsyncIterator[Rollup]:
    """Count the calls of this process for the duration of the block; write the rest at its end."""
    rollup = Rollup(store.history)
    store.listeners.listen(rollup.note)
    running = asyncio.create_task(rollup.run(), name="rollup")
    try:
        yield rollup
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        store.listeners.flush()
        with suppress(StoreUnavailable):
            await rollup.flush()


def open_s(step_s: int) -> float:
    """Return how long after its begin a span may still change."""
    return OPEN_SPANS[step_s] * step_s


def count(tally: CallCounts, ended: CallRecord) -> None:
    """Add one ended call.

    `counts`: calls that ended, of which succeeded and failed; calls refused before they were
    recorded; retried attempts; `throttled`, answers of providers with 429; `told_429`, answers to
    clients with 429; tokens and cost. `by_group`: by tenant, model and upstream (calls, failed,
    throttled, tokens, cost in millionths, ms upstream), and by error code. A 429 counts for the
    upstream that sent it, all else for the last upstream.

    Calls of the classifier are `judged`: they count for tokens, cost and 429s, and by model and
    upstream, but neither as calls nor for a tenant. judged_tokens and judged_cost_micros are their
    part of the tokens and the cost.
    """
    throttled = 0 if ended.throttled_by is None else ended.throttled
    if ended.source == JUDGE:
        tally.count("judged")
        tally.count("judged_tokens", _tokens_of(ended))
        tally.count("judged_cost_micros", ended.charge.cost_micros or 0)
        _count_spent(tally, ended, throttled)
        _count_by_dimension(tally, ended, throttled, ("model", "upstream"))
        return
    retried, refused = ended.status == RETRIED, ended.status == REFUSED
    if not retried and not refused:
        tally.count("calls")
    tally.count(ended.status)
    _count_spent(tally, ended, throttled)
    if ended.http_status == 429:
        tally.count("told_429")
    if ended.failure is not None:
        tally.count_by("code", ended.failure.code, [1])
    if not refused:
        _count_by_dimension(tally, ended, throttled, ("tenant", "model", "upstream"))
    if ended.queue_ms is not None and not refused:
        tally.waits += histogram_of(ended.queue_ms)
    if ended.upstream_ms is not None:
        tally.lengths += histogram_of(ended.upstream_ms)


def _count_spent(tally: CallCounts, ended: CallRecord, throttled: int) -> None:
    if throttled:
        tally.count("throttled", throttled)
    usage = ended.charge.usage
    if usage.input_tokens or usage.output_tokens:
        tally.count("input_tokens", usage.input_tokens or 0)
        tally.count("output_tokens", usage.output_tokens or 0)
    if ended.charge.cost_micros:
        tally.count("cost_micros", ended.charge.cost_micros)


def _tokens_of(ended: CallRecord) -> int:
    usage = ended.charge.usage
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def _count_by_dimension(
    tally: CallCounts, ended: CallRecord, throttled: int, dimensions: Sequence[Dimension]
) -> None:
    failed = ended.status in ("failed", "dead")
    ends = int(ended.status != RETRIED), int(failed)
    spent = _tokens_of(ended), ended.charge.cost_micros or 0, round(ended.upstream_ms or 0)
    if throttled and "upstream" in dimensions:
        for (upstream, _), count in (ended.throttled_by or {}).items():
            tally.count_by("upstream", upstream, (0, 0, count, 0, 0, 0))
    for dimension in dimensions:
        name: str | None
        if dimension == "tenant":
            name = ended.tenant_id
        elif dimension == "model":
            name = ended.model or _OTHER_MODEL
        else:
            name = ended.upstream
        if name is not None:
            throttles = 0 if dimension == "upstream" else throttled
            tally.count_by(dimension, name, (*ends, throttles, *spent))


assert set(OPEN_SPANS) == set(KEPT_S)
