"""Statistics: usage, history of calls, latencies, queue depth, past loads.

Each process counts its own calls and rewrites a span when it changes; readers add up the processes.
A histogram is one integer with a 64-bit count for each of `CLASSES` classes, a quarter of an octave
each, so that the error of a percentile is less than a tenth.

Invariants: totals of usage are written in the transaction of the audit rows that they sum up; the
history is bounded by `KEPT_S`, `MOST_NAMES` and the number of processes; reading queue depths costs
the database at most a fiftieth of one connection's time.
"""

from __future__ import annotations

import asyncio
import struct
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from operator import add, itemgetter
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import UsageState
from tidegate.errors import StoreUnavailable
from tidegate.store.database import COMMAND_TIMEOUT_MS, Connections, require_writes, sql
from tidegate.store.records import Json, dumps, record_of

CLASSES = 90  # from 1 ms to over an hour; the first is below 1 ms, the last everything above
_BITS = 64
_PER_OCTAVE = 4
_BYTES = CLASSES * _BITS // 8
_COUNTS = struct.Struct(f"<{CLASSES}Q")
_BOUNDS_MS = tuple(2 ** (place / _PER_OCTAVE) for place in range(CLASSES - 1))


def class_of(length_ms: float) -> int:
    """Return the class of a duration."""
    return bisect_right(_BOUNDS_MS, length_ms)


def histogram_of(counts_of_classes: Sequence[int]) -> int:
    """Return a histogram with these counts."""
    return int.from_bytes(_COUNTS.pack(*counts_of_classes), "little")


def pack(histogram: int) -> bytes:
    """Return a histogram in as few bytes as possible."""
    return histogram.to_bytes((histogram.bit_length() + 7) // 8, "little")


def unpack(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def counts(histogram: int) -> tuple[int, ...]:
    """Return the count of each class."""
    return _COUNTS.unpack(histogram.to_bytes(_BYTES, "little"))


def percentiles(histogram: int, shares: tuple[float, ...]) -> list[float | None]:
    """Return the durations, in ms, that these shares of all (0 to 1) do not exceed; None for an
    empty histogram.

    Within a class durations are assumed to be spread evenly.
    """
    in_class = counts(histogram)
    total = sum(in_class)
    if not total:
        return [None] * len(shares)
    return [_length_at(in_class, share * total) for share in shares]


def _length_at(in_class: tuple[int, ...], rank: float) -> float:
    before = 0
    place = 0
    while place < CLASSES - 1 and before + in_class[place] < max(rank, 1e-9):
        before += in_class[place]
        place += 1
    least = 0.0 if place == 0 else 2 ** ((place - 1) / _PER_OCTAVE)
    most = 2 ** (place / _PER_OCTAVE)
    inside = (rank - before) / in_class[place] if in_class[place] else 1.0
    return float(least + (most - least) * min(1.0, max(0.0, inside)))


Dimension = Literal["tenant", "model", "upstream", "code", "limit", "started"]

# The length of a span, and how long it is kept, in seconds.
KEPT_S = {10: 20 * 60, 60: 3 * 3600, 300: 48 * 3600}
MOST_NAMES = 50
MOST_ROWS = 100_000
OTHERS = ""  # the name that counts all names beyond `MOST_NAMES`
_LONGEST_NAME = 200
_TIMEOUT_MS = 3_000


@dataclass(slots=True)
class CallCounts:
    """Calls that ended in a span. For the names in `counts` and `by_group` see `dashboard.rollup`.

    waits, lengths: histograms of the time to admission, and of the time upstream.
    """

    counts: dict[str, int] = field(default_factory=dict)
    by_group: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    waits: int = 0
    lengths: int = 0

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def count_by(self, dimension: Dimension, name: str, amounts: Sequence[int]) -> None:
        names = self.by_group.get(dimension)
        if names is None:
            names = self.by_group[dimension] = {}
        known = names.get(name)
        if known is None:
            name = OTHERS if len(names) >= MOST_NAMES else name[:_LONGEST_NAME].replace("\0", "")
            _add(names, name, amounts)
        elif len(known) == len(amounts):  # the usual case
            known[:] = map(add, known, amounts)
        else:
            _add(names, name, amounts)

    def merge(self, other: CallCounts, most_names: int = MOST_NAMES) -> None:
        """Add the counts of another process or span; names beyond `most_names` are combined."""
        for name, amount in other.counts.items():
            self.count(name, amount)
        for dimension, added in other.by_group.items():
            own = self.by_group.setdefault(dimension, {})
            for name, amounts in added.items():
                _add(own, name if name in own or len(own) < most_names else OTHERS, amounts)
        self.waits += other.waits
        self.lengths += other.lengths


def _add(names: dict[str, list[int]], name: str, amounts: Sequence[int]) -> None:
    known = names.get(name)
    if known is None:
        names[name] = list(amounts)
        return
    if len(known) == len(amounts):
        known[:] = map(add, known, amounts)
        return
    for place, amount in enumerate(amounts):
        if place < len(known):
            known[place] += amount
        else:  # a later version counts more
            known.append(amount)


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A span of `step_s` seconds that begins at `at` (seconds since 1970), in one pool."""

    step_s: int
    at: int
    pool: str


class History:
    """Counts of calls by span. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections, instance_id: str) -> None:
        self._connections = connections
        self._instance_id = instance_id

    async def write(self, counted: Sequence[tuple[TimeSpan, CallCounts]]) -> None:
        """Write this process's counts so far for each of these spans."""
        columns = (
            [span.step_s for span, _ in counted],
            [float(span.at) for span, _ in counted],
            [span.pool for span, _ in counted],
            [orjson.dumps(tally.counts).decode() for _, tally in counted],
            [orjson.dumps(tally.by_group).decode() for _, tally in counted],
            [pack(tally.waits) for _, tally in counted],
            [pack(tally.lengths) for _, tally in counted],
        )

        await self._connections.execute(
            "write_history", self._instance_id, *columns, timeout_ms=_TIMEOUT_MS
        )

    async def read(self, step_s: int, since: float) -> list[tuple[TimeSpan, CallCounts]]:
        """Return every process's counts of every span from `since` on (seconds since 1970), by
        time."""
        rows = await self._connections.rows(
            "read_history", step_s, since, MOST_ROWS, timeout_ms=_TIMEOUT_MS
        )
        return [
            (
                TimeSpan(step_s, row["at"], row["pool"]),
                CallCounts(
                    orjson.loads(row["counts"]),
                    orjson.loads(row["apart"]),
                    unpack(row["waits"]),
                    unpack(row["lengths"]),
                ),
            )
            for row in rows
        ]

    async def forget(self, now: float) -> None:
        """Delete spans older than `KEPT_S`."""
        for step_s, kept_s in KEPT_S.items():
            await self._connections.execute(
                "forget_history", step_s, now - kept_s, timeout_ms=_TIMEOUT_MS
            )


MOST_COUNTED = 10_000
MOST_QUEUES = 200
MOST_BUDGETS_SHOWN = 100
_FRESH_S = 1.0
_SHARE = 50
_DEPTHS_TIMEOUT_MS = 1_000


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Ready jobs in one queue: at most `MOST_COUNTED` are counted."""

    pool: str
    lane: str
    tenant: str
    jobs: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """Use of a budget, spent and reserved, None for a budget with a book per scope; `paused`: the
    number of its paused books."""

    name: str
    used_ratio: float | None
    paused: int


@dataclass(frozen=True, slots=True)
class Depths:
    """Depths of all queues at the same moment. webhooks_oldest_s: for how long a webhook has been
    due."""

    queues: tuple[QueueDepth, ...]
    retrying: int
    claimed: int
    running: int
    dead: int
    webhooks: int
    webhooks_oldest_s: float
    workers: int
    budgets: tuple[BudgetUse, ...] = ()


class QueueDepths:
    """Depths of the queues, read as often as is cheap. One per process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._read: Depths | None = None
        self._next_at = float("-inf")

    async def depths(self) -> Depths:
        """Return the recent depths. Raises StoreUnavailable, also without writes at PostgreSQL."""
        is_fresh = time.monotonic() < self._next_at and not self._connections.unavailable
        if self._read is not None and is_fresh:
            return self._read
        began = time.monotonic()
        self._read = await self._connections.run(_read, timeout_ms=_DEPTHS_TIMEOUT_MS)
        ended = time.monotonic()
        self._next_at = ended + max(_FRESH_S, _SHARE * (ended - began))
        return self._read


async def _read(connection: asyncpg.Connection) -> Depths:
    queues = await connection.fetch(sql("depth_of_queues"), MOST_QUEUES, MOST_COUNTED)
    row = await connection.fetchrow(sql("depth_of_jobs"), MOST_COUNTED)
    budgets = await connection.fetch(sql("use_of_budgets"), MOST_BUDGETS_SHOWN)
    assert row is not None
    require_writes(connection)
    now = datetime.now(UTC)
    return record_of(
        Depths,
        row,
        queues=tuple(
            QueueDepth(
                one["pool"],
                one["lane"],
                one["tenant_id"],
                one["jobs"],
                0.0 if one["oldest"] is None else max(0.0, (now - one["oldest"]).total_seconds()),
            )
            for one in queues
        ),
        webhooks_oldest_s=float(row["webhooks_oldest_s"] or 0),
        budgets=tuple(record_of(BudgetUse, one) for one in budgets),
    )


_AHEAD_FRESH_S = 2.0
_MOST_AHEAD = 200_000


@dataclass(frozen=True, slots=True)
class _DueJobs:
    """Open jobs of one lane with about the same deadline, None without one. waiting: those that
    could be called now."""

    lane: str
    due_at: datetime | None
    jobs: int
    waiting: int


class OpenJobs:
    """Open jobs of a pool by deadline, and batch lines, read at most every 2 s. One per worker."""

    def __init__(self, connections: Connections, pool: str) -> None:
        self._connections = connections
        self._pool = pool
        self._read: list[_DueJobs] = []
        self._next_at = self._lines_next_at = float("-inf")
        self._lines: list[tuple[datetime, int]] = []

    async def lines(self, due: datetime | None) -> int:
        """Return how many batch lines have not ended whose batches expire until then. Raises
        StoreUnavailable."""
        now = time.monotonic()
        if now >= self._lines_next_at:
            found = await self._connections.rows("lines_ahead", timeout_ms=_DEPTHS_TIMEOUT_MS)
            self._lines = [(row["due_at"], row["lines"]) for row in found]
            self._lines_next_at = now + _AHEAD_FRESH_S
        return sum(lines for due_at, lines in self._lines if due is None or due_at <= due)

    async def of(self, lane: str, due: datetime | None) -> int:
        """Return how many jobs of a lane come before one with this deadline, including that job:
        jobs with an earlier deadline, and ready ones. Raises StoreUnavailable."""
        began = time.monotonic()
        if began >= self._next_at:
            found = await self._connections.rows(
                "jobs_ahead", self._pool, _MOST_AHEAD, timeout_ms=_DEPTHS_TIMEOUT_MS
            )
            self._read = [record_of(_DueJobs, row) for row in found]
            ended = time.monotonic()
            self._next_at = ended + max(_AHEAD_FRESH_S, _SHARE * (ended - began))
        return sum(
            one.jobs
            if due is not None and one.due_at is not None and one.due_at <= due
            else one.waiting
            for one in self._read
            if one.lane == lane
        )


_PAST_CALLS_TIMEOUT_MS = 30_000
MOST_CALLS = 200_000


@dataclass(frozen=True, slots=True)
class PastCall:
    """One admitted call. `kind`, `model`: None if not on record. `gives_way`: whether it is a job
    or a batch line, which can be preempted. Of a job, `tier`: the one that served it, `tiers`:
    those that were allowed, `due_ms`: from submission to deadline; None if its row is deleted or
    has none."""

    submitted_at: datetime
    tenant_id: str
    kind: str | None
    model: str | None
    priority: int
    upstream_ms: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    images: int
    cost_micros: int
    key_id: str | None
    subject: str | None
    waited_ms: float
    gives_way: bool
    tier: str | None = None
    tiers: Sequence[str] | None = None
    due_ms: float | None = None


async def past_calls(
    connections: Connections,
    pool: str,
    since: datetime,
    until: datetime,
    *,
    most: int = MOST_CALLS,
) -> list[PastCall]:
    """Return calls submitted from `since` on and before `until`, in order of time; only the newest
    `most`. Raises StoreUnavailable."""
    rows = await connections.rows(
        "past_calls", pool, since, until, most, timeout_ms=_PAST_CALLS_TIMEOUT_MS
    )
    return [PastCall(**row) for row in reversed(rows)]


@dataclass(frozen=True, slots=True)
class RecordedUse:
    """Usage of the admitted calls of one kind, model and tenant since a time. key_id, subject,
    conversation: set if these were requested separately."""

    kind: str
    model: str
    tenant_id: str
    key_id: str | None
    subject: str | None
    conversation: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    images: int
    audio_seconds: int
    cost_micros: int


async def used_since(
    connections: Connections,
    pool: str,
    since: datetime,
    *,
    keys: Sequence[str] = (),
    subjects: Sequence[str] = (),
    conversations: Sequence[str] = (),
) -> list[RecordedUse]:
    """Return the usage of calls of a pool that were admitted from `since` on, with separate entries
    for these keys, subjects and conversations. Raises StoreUnavailable."""
    named = list(keys), list(subjects), list(conversations)
    rows = await connections.rows(
        "day_uses", pool, since, *named, timeout_ms=_PAST_CALLS_TIMEOUT_MS
    )
    return [RecordedUse(**row) for row in rows]


MOST_PARTS = 5
MOST_PAGES = 1_000  # of the request log, 8 kB each: about 14,000 requests
_TIMES_FOR_ONE = 10  # factor for one tenant, which has few of the requests per page
_LATENCY_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class LatencyPart:
    """A share of an hour's requests: `of` is tenant, model, upstream, type or error."""

    of: str
    name: str
    requests: int
    waited_sum_ms: float
    called_sum_ms: float


@dataclass(frozen=True, slots=True)
class LatencyOfHour:
    """Latency of the requests that were submitted in the hour from `at` on. waited_ms, called_ms,
    took_ms: the 50th and 95th percentiles. between_sum_ms: neither waiting nor called, as before a
    retry. parts: the `MOST_PARTS` with the longest times for each dimension. sampled: the number of
    requests read. If one page in `one_in` was read, counts and sums are estimates."""

    at: datetime
    one_in: int
    sampled: int
    requests: int
    failed: int
    waited_ms: Sequence[float]
    called_ms: Sequence[float]
    took_ms: Sequence[float]
    waited_sum_ms: float
    called_sum_ms: float
    between_sum_ms: float
    parts: Sequence[LatencyPart]


async def latency_by_hour(
    connections: Connections,
    since: datetime,
    until: datetime,
    tenant_id: str | None,
    upstream: str | None = None,
    *,
    most_pages: int = MOST_PAGES,
) -> list[LatencyOfHour]:
    """Return latencies of requests that were submitted from `since` on and before `until` and ended
    within a day after that, without lines of batches; of one tenant or all, and of one upstream or
    all; without empty hours. Reads about `most_pages` pages of the request log, ten times as many
    for one tenant, or all if there are fewer. Raises StoreUnavailable."""
    hours = await connections.rows(
        "latency_of_hours",
        since,
        until,
        tenant_id,
        MOST_PARTS,
        most_pages if tenant_id is None else _TIMES_FOR_ONE * most_pages,
        upstream,
        timeout_ms=_LATENCY_TIMEOUT_MS,
    )
    return [
        LatencyOfHour(
            **dict(row) | {"parts": [LatencyPart(**part) for part in orjson.loads(row["parts"])]}
        )
        for row in hours
    ]


MOST_TOTALS = 10_000
_SUMMED = ("input_tokens", "output_tokens", "cached_tokens", "thoughts_tokens", "images")
_amounts_of = itemgetter(*_SUMMED, "cost_micros", "usage_state")
_UNKNOWN = UsageState.UNKNOWN.value
_DOUBTFUL = frozenset((UsageState.PARTIAL.value, UsageState.ESTIMATED.value, _UNKNOWN))
# Columns of an audit row that `summed` reads.
READ = (
    *("tenant_id", "pool", "model", "finished_at", *_SUMMED, "cost_micros", "usage_state"),
    *("usage_details", "upstream"),
)


@dataclass(frozen=True, slots=True)
class Total:
    """A total. Dimensions that were not requested are None. unpriced: requests with known tokens
    but no price, which add nothing to the cost. partial, estimated, unknown: requests with such a
    charge; the others are charged as the provider reported."""

    tenant: str | None
    model: str | None
    day: date | None
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    thoughts_tokens: int
    images: int
    cost_micros: int
    unpriced: int
    partial: int
    estimated: int
    unknown: int
    cache_write_tokens: int
    input_audio_tokens: int
    input_image_tokens: int
    input_video_tokens: int
    output_audio_tokens: int
    output_image_tokens: int
    output_video_tokens: int
    searches: int
    provider_cost_micros: int
    key: str | None = None
    upstream: str | None = None


_APART = ("tenant", "model", "day", "key", "upstream")
_LOGGED = frozenset(("key", "upstream"))
COUNTS = tuple(one.name for one in fields(Total) if one.name not in _APART)
_LOGGED_TIMEOUT_MS = 30_000
# Between the day on which a call came or was recorded and the one on which it ended, either way.
_FARTHEST = timedelta(days=31)
# Dimensions of each level of `usage_sums`, beside the day.
_LEVELS = {"model": {"model"}, "tenant": {"tenant"}}
_LEVELS_OF_LOG = {
    "key": {"tenant", "key"},
    "upstream": {"upstream"},
    "tenant_upstream": {"tenant", "key", "upstream"},
}
# Not while a process starts: answers do not wait for sums, and a start has other work.
_FIRST_SUM_S = 2.0
_SUM_EVERY_S = 300
_SUM_TIMEOUT_MS = 300_000
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class UsageTable:
    """Totals as JSON: `rows`, an array of objects with `COUNTS` and the requested dimensions, and
    the total of these rows."""

    rows: str
    total: Mapping[str, int]
    cut: bool


class UsageTotals:
    """Totals of usage on record. Every method raises StoreUnavailable.

    Invariant: an answer is what the record contains at one moment. The sums of a day are read while
    no change of it is marked, those of a week while its days have the sums that it was made of; the
    rest is read from the record, in the same snapshot.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def totals(
        self,
        by: Iterable[str],
        since: date,
        until: date,
        tenant_id: str | None = None,
        upstream: str | None = None,
    ) -> list[Total]:
        """Return totals as `table` does."""
        table = await self.table(by, since, until, tenant_id, upstream)
        found = [dict.fromkeys(_APART[:3]) | row for row in orjson.loads(table.rows)]
        days = [row["day"] and date.fromisoformat(row["day"]) for row in found]
        return [Total(**row | {"day": day}) for row, day in zip(found, days, strict=True)]

    async def table(
        self,
        by: Iterable[str],
        since: date,
        until: date,
        tenant_id: str | None = None,
        upstream: str | None = None,
        *,
        names_operators: bool = True,
    ) -> UsageTable:
        """Return totals of the days from `since` to `until`, both inclusive, grouped `by`
        tenant, model and day; of one tenant or all, and of one upstream or all; the first
        `MOST_TOTALS` in order. Grouped by key or upstream, they are read from the request log,
        as far back as it is kept. Days with stored sums are read from these, if the sums have
        the requested dimensions. Without `names_operators`, the calls that operators made as a
        tenant are one row, of the key `operator`."""
        dimensions = set(by)
        is_by_day, is_logged = "day" in dimensions, not _LOGGED.isdisjoint(dimensions)
        named = {"tenant": tenant_id, "upstream": upstream}
        known = dimensions | {name for name, one in named.items() if one is not None}
        level = _level_of(known, _LEVELS_OF_LOG if is_logged else _LEVELS)
        needs_keys = level == "tenant_upstream" and "key" in known
        first, last = _widened(since, until) if is_logged else (since, until)

        async def read(connection: asyncpg.Connection) -> UsageTable:
            await connection.execute(sql("as_of_one_moment"))
            state = await connection.fetchrow(sql("usage_state"), first, last, level, needs_keys)
            assert state is not None
            span, reach = (since, until), (first, last)
            row = await connection.fetchrow(
                sql("get_usage"),
                *[name in dimensions for name in _APART],
                *_spans_of(span, state, is_by_day=is_by_day, is_logged=is_logged),
                tenant_id,
                upstream,
                MOST_TOTALS,
                level,
                *_sources_of(span, reach, state, is_by_day=is_by_day, is_logged=is_logged),
                not names_operators,
            )
            assert row is not None
            total = {name: row[name] for name in COUNTS}
            return UsageTable(f"[{row['rows']}]", total, row["shown"] == MOST_TOTALS)

        timeout_ms = _LOGGED_TIMEOUT_MS if is_logged else COMMAND_TIMEOUT_MS
        return await self._connections.run(read, timeout_ms=timeout_ms)

    async def sum_days(self) -> int:
        """Sum up each past day whose sums are missing or out of date; return how many days. A day
        that another process sums up is skipped."""
        days = [row["day"] for row in await self._connections.rows("days_to_sum")]
        return sum([await self._sum_up(day) for day in days])

    async def sum_part(self) -> bool:
        """Sum up the hours of the current day that ended an hour ago, if that is due."""
        part = await self._connections.row("part_to_sum")
        return part is not None and await self._sum_up(part["day"], part["until"])

    async def sum_weeks(self) -> int:
        """Sum up each week whose days are summed up, unless it was since; return how many weeks."""
        weeks = [row["week"] for row in await self._connections.rows("weeks_to_sum")]
        return sum([await self._sum_week(week) for week in weeks])

    async def _sum_week(self, week: date) -> bool:
        """Sum up a week in one transaction. The times of its days are noted before their sums are
        read, so that a day that is summed up again meanwhile makes the week's sums invalid."""

        async def work(connection: asyncpg.Connection) -> bool:
            if not await connection.fetchval(sql("lock_summed_day"), week):
                return False
            for statement in ("note_summed_week", "forget_week", "sum_week"):
                await connection.execute(sql(statement), week)
            return True

        return await self._connections.run(work, timeout_ms=_SUM_TIMEOUT_MS)

    async def _sum_up(self, day: date, until: datetime | None = None) -> bool:
        """Sum up a day, or its calls that came before `until`, in one transaction. Calls written
        after its first statement mark the day as changed again."""

        async def work(connection: asyncpg.Connection) -> bool:
            if not await connection.fetchval(sql("lock_summed_day"), day):
                return False
            await connection.execute(sql("take_changes"), day)
            await connection.execute(sql("forget_sums"), day)
            await connection.execute(sql("sum_logged_day"), day, until or _start_of(day + _DAY))
            if until is None:
                await connection.execute(sql("sum_usage_day"), day)
                await connection.execute(sql("forget_partial_day"), day)
                await connection.execute(sql("note_summed_day"), day)
            else:
                await connection.execute(sql("forget_summed_day"), day)
                await connection.execute(sql("note_partial_day"), day, until)
            return True

        return await self._connections.run(work, timeout_ms=_SUM_TIMEOUT_MS)

    async def run(self) -> None:
        """Sum up until cancelled: past days and weeks, and the current day to a past hour."""
        await asyncio.sleep(_FIRST_SUM_S)
        while True:
            with suppress(StoreUnavailable):
                await self.sum_days()
                await self.sum_part()
                await self.sum_weeks()
            await asyncio.sleep(_SUM_EVERY_S)


def _spans_of(
    span: tuple[date, date], state: Mapping[str, Any], *, is_by_day: bool, is_logged: bool
) -> tuple[list[date], list[date]]:
    """Return the first and the last days of the spans to show: each day, or all days."""
    if not is_by_day:
        return [span[0]], [span[1]]
    days = _days(*span) if is_logged else _days_with_usage(span, state)
    return days, days


def _sources_of(
    span: tuple[date, date],
    reach: tuple[date, date],
    state: Mapping[str, Any],
    *,
    is_by_day: bool,
    is_logged: bool,
) -> tuple[Any, ...]:
    """Return the parameters $12 to $18 of `get_usage`. Days of which the request log is gone have
    no sums by key and upstream, although their deletion may still be due."""
    summed = set(state["summed"])
    logged = _logged_days(reach, state) if is_logged else []
    if is_logged:
        summed.intersection_update(logged)
    days, weeks = set(summed), []
    for week in [] if is_by_day else state["weeks"]:
        inside = _days(week, week + 6 * _DAY)
        if span[0] <= inside[0] and inside[-1] <= span[1] and days.issuperset(inside):
            weeks.append(week)
            days.difference_update(inside)
    untils = dict(zip(state["begun"], state["untils"], strict=True)) if is_logged else {}
    totalled = [] if is_logged else [d for d in _days_with_usage(reach, state) if d not in summed]
    begins, ends = list[datetime](), list[datetime]()
    for day in logged:
        if day in summed:
            continue
        begin, end = untils.get(day, _start_of(day)), _start_of(day + _DAY)
        if ends and ends[-1] == begin:
            ends[-1] = end
        else:
            begins.append(begin)
            ends.append(end)
    hull = (begins[0], ends[-1]) if begins else (_NEVER, _NEVER)
    return [*days, *untils], totalled, begins, ends, *hull, weeks


def _logged_days(reach: tuple[date, date], state: Mapping[str, Any]) -> list[date]:
    """Return the days of which the request log may have calls, in order."""
    parted, unparted_since = set(state["parted"]), state["unparted_since"] or date.max
    return [day for day in _days(*reach) if day in parted or day >= unparted_since]


_NEVER = datetime.max.replace(tzinfo=UTC)


def _days_with_usage(span: tuple[date, date], state: Mapping[str, Any]) -> list[date]:
    if state["first"] is None:
        return []
    return _days(max(span[0], state["first"]), min(span[1], state["last"]))


def _days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=ahead) for ahead in range((last - first).days + 1)]


def _widened(since: date, until: date) -> tuple[date, date]:
    """Return the first and the last day on which calls that ended on these days may have come."""
    before, after = min(_FARTHEST, since - date.min), min(_FARTHEST, date.max - _DAY - until)
    return since - before, until + after


def _start_of(day: date) -> datetime:
    return datetime.combine(day, time_of_day(), UTC)


def _level_of(dimensions: set[str], levels: Mapping[str, set[str]]) -> str | None:
    """Return the level of sums with these dimensions; None if only the unsummed rows have them."""
    return next(
        (level for level, columns in levels.items() if dimensions <= columns | {"day"}), None
    )


async def add_usage(connection: asyncpg.Connection, audit: Iterable[Mapping[str, Any]]) -> None:
    """Add the totals of audit rows that this transaction inserts, given with the columns `READ`.
    Must be the transaction's last statement, since it locks the totals of a day."""
    sums = summed(audit)
    if sums:
        await connection.execute(sql("add_usage"), dumps(sums))


def summed(audit: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Return the rows of totals for these audit rows."""
    sums: dict[tuple[str, date, str, str], dict[str, int]] = {}
    for row in audit:
        # For a call that reached no upstream, the pool in whose queue it was.
        called = row.get("upstream") or row["pool"]
        key = (row["tenant_id"], day_of(row["finished_at"]), row["model"] or "", called)
        total = sums.get(key)
        if total is None:
            total = sums[key] = dict.fromkeys(COUNTS, 0)
        total["requests"] += 1
        *amounts, cost, state = _amounts_of(row)
        for name, amount in zip(_SUMMED, amounts, strict=True):
            if amount:
                total[name] += amount
        if cost:
            total["cost_micros"] += cost
        # Missing in entries that an earlier version has spilled.
        if details := row.get("usage_details"):
            _add_details(total, details)
        if state in _DOUBTFUL:
            total[state] += 1
        if cost is None and state != _UNKNOWN:
            total["unpriced"] += 1
    names = ("tenant_id", "day", "model", "pool")
    return [dict(zip(names, key, strict=True)) | total for key, total in sums.items()]


def _add_details(total: dict[str, int], details: str | Json) -> None:
    found = orjson.loads(details) if isinstance(details, str) else details
    for name, amount in found.items():
        if name in total:  # the two parts of cache writes have no totals of their own
            total[name] += amount


def day_of(at: datetime | str) -> date:
    """Return the UTC day of a time; spilled entries have text."""
    moment = moment_of(at)
    return moment.date() if moment.tzinfo is UTC else moment.astimezone(UTC).date()


def moment_of(at: datetime | str) -> datetime:
    return datetime.fromisoformat(at) if isinstance(at, str) else at


async def newest_ids(connections: Connections, most: int) -> list[UUID]:
    """Return the ids of the last requests of all tenants, newest first. Raises StoreUnavailable."""
    return [row["id"] for row in await connections.rows("list_newest_ids", most)]


async def newest_batches(connections: Connections, most: int) -> list[UUID]:
    """Return the ids of the last batches of all tenants, newest first. Raises StoreUnavailable."""
    rows = await connections.rows("list_all_batches", None, None, False, most)
    return [row["id"] for row in rows]
