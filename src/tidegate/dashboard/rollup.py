"""Rollup of the ended calls of this process, and of its queue, by time spans, for PostgreSQL.

Invariant: a call adds to the sums of those that differ from it in amounts alone; the sums are
distributed to names, and PostgreSQL is written, once every `FLUSH_EVERY_S`. While it is
unavailable, at most `MOST_SPANS` spans wait here. An end is counted in the span in which it
happened, or, if it is reported too late for that, in the oldest open span.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from tidegate import __version__
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter
from tidegate.record import JUDGE, REFUSED, RETRIED, CallRecord
from tidegate.store.notifications import next_beat_s
from tidegate.store.statistics import (
    CLASSES,
    KEPT_S,
    CallCounts,
    History,
    TimeSpan,
    class_of,
    histogram_of,
)
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger

FLUSH_EVERY_S = 5.0
FORGET_EVERY_S = 600.0
SAMPLE_EVERY_S = 10  # the shortest span: the queue is sampled once in each
MOST_SPANS = 2_000
# The number of spans that accept ends, including the current one.
OPEN_SPANS = {10: 30, 60: 6, 300: 2}
_SHORTEST_S = min(OPEN_SPANS)
EVERY_POOL = ""  # in place of a pool: what concerns all of them
_OTHER_MODEL = "(none)"
_THROTTLED = 429
# Source, status, tenant, model, upstream, code, and whether the client received a 429.
_Sort = tuple[tuple[str, str, str, str | None, str | None], tuple[str | None, bool]]

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
        self._fresh: dict[tuple[int, str], _Fresh] = {}
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
            fresh = self._fresh.get(key)
            if fresh is None:
                fresh = self._fresh[key] = _Fresh()
            fresh.add(ended)

    def note_start(self, version: str) -> None:
        """Count the start of this process, which the charts mark, whatever upstream they show."""
        at = int(self._clock() // _SHORTEST_S) * _SHORTEST_S
        fresh = self._fresh.setdefault((at, EVERY_POOL), _Fresh())
        fresh.counts.count_by("started", version, [1])

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
            fresh = self._fresh.setdefault((at, pool), _Fresh())
            for queue in snapshot.queues:
                if queue.sid == limiter.session and queue.held_up_by is not None:
                    fresh.counts.count_by("limit", queue.held_up_by, [queue.waiting])

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
        for (at, pool), added in fresh.items():
            tally = added.counted()
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
    rollup.note_start(__version__)
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


class _Sums:
    """The amounts of ended calls that are otherwise alike; ms: their time upstream."""

    __slots__ = ("calls", "cost_micros", "in_tokens", "ms", "out_tokens", "throttled")

    def __init__(self) -> None:
        self.calls = self.in_tokens = self.out_tokens = self.cost_micros = self.ms = 0
        self.throttled: dict[str, int] = {}  # answers with 429, by upstream


class _Fresh:
    """The ended calls of one span and pool since the last flush.

    counts: what is counted already. The sums are by source, status, tenant, model, upstream, code,
    and whether the client received a 429.
    """

    __slots__ = ("_sums", "counts", "lengths", "waits")

    def __init__(self) -> None:
        self.counts = CallCounts()
        self.waits = [0] * CLASSES
        self.lengths = [0] * CLASSES
        self._sums: dict[_Sort, _Sums] = {}

    def add(self, ended: CallRecord) -> None:
        """Add one ended call."""
        source, status, failure = ended.source, ended.status, ended.failure
        sort = (
            (source, status, ended.tenant_id, ended.model, ended.upstream),
            (None if failure is None else failure.code, ended.http_status == _THROTTLED),
        )
        sums = self._sums.get(sort)
        if sums is None:
            sums = self._sums[sort] = _Sums()
        sums.calls += 1
        charge = ended.charge
        usage = charge.usage
        if amount := usage.input_tokens:
            sums.in_tokens += amount
        if amount := usage.output_tokens:
            sums.out_tokens += amount
        if amount := charge.cost_micros:
            sums.cost_micros += amount
        if ended.throttled_by is not None:
            for (upstream, _), count in ended.throttled_by.items():
                sums.throttled[upstream] = sums.throttled.get(upstream, 0) + count
        if ended.queue_ms is not None and status != REFUSED and source != JUDGE:
            self.waits[class_of(ended.queue_ms)] += 1
        if (took_ms := ended.upstream_ms) is not None:
            sums.ms += round(took_ms)
            if source != JUDGE:
                self.lengths[class_of(took_ms)] += 1

    def counted(self) -> CallCounts:
        """Return the counts of all."""
        for sort, sums in self._sums.items():
            _count(self.counts, sort, sums)
        self._sums.clear()
        self.counts.waits += histogram_of(self.waits)
        self.counts.lengths += histogram_of(self.lengths)
        self.waits, self.lengths = [0] * CLASSES, [0] * CLASSES
        return self.counts


def count(*ended: CallRecord) -> CallCounts:
    """Return the counts of ended calls.

    `counts`: calls that ended, of which succeeded and failed; calls refused before they were
    recorded; retried attempts; `throttled`, answers of providers with 429; `told_429`, answers to
    clients with 429; tokens and cost. `by_group`: by tenant, model and upstream (calls, failed,
    throttled, tokens, cost in millionths, ms upstream), and by error code. A 429 counts for the
    upstream that sent it, all else for the last upstream.

    Calls of the classifier are `judged`: they count for tokens, cost and 429s, and by model and
    upstream, but neither as calls nor for a tenant. judged_tokens and judged_cost_micros are their
    part of the tokens and the cost.
    """
    fresh = _Fresh()
    for one in ended:
        fresh.add(one)
    return fresh.counted()


def _count(tally: CallCounts, sort: _Sort, sums: _Sums) -> None:
    """Add calls that are alike. For the names see `count`."""
    (source, status, tenant, model, upstream), (code, is_told_429) = sort
    calls, is_judge = sums.calls, source == JUDGE
    retried, refused = status == RETRIED, status == REFUSED
    throttled = sum(sums.throttled.values())
    tokens = sums.in_tokens + sums.out_tokens
    if is_judge:
        tally.count("judged", calls)
        tally.count("judged_tokens", tokens)
        tally.count("judged_cost_micros", sums.cost_micros)
    else:
        if not retried and not refused:
            tally.count("calls", calls)
        tally.count(status, calls)
        if is_told_429:
            tally.count("told_429", calls)
        if code is not None:
            tally.count_by("code", code, [calls])
    if throttled:
        tally.count("throttled", throttled)
    if tokens:
        tally.count("input_tokens", sums.in_tokens)
        tally.count("output_tokens", sums.out_tokens)
    if sums.cost_micros:
        tally.count("cost_micros", sums.cost_micros)
    if refused and not is_judge:
        return
    ends = 0 if retried else calls, calls if status in ("failed", "dead") else 0
    spent = tokens, sums.cost_micros, sums.ms
    for name, count in sums.throttled.items():
        tally.count_by("upstream", name, (0, 0, count, 0, 0, 0))
    if not is_judge:
        tally.count_by("tenant", tenant, (*ends, throttled, *spent))
    tally.count_by("model", model or _OTHER_MODEL, (*ends, throttled, *spent))
    if upstream is not None:
        tally.count_by("upstream", upstream, (*ends, 0, *spent))


assert set(OPEN_SPANS) == set(KEPT_S)
