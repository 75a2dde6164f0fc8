"""Statistics: history of calls, latency histograms, queue depth, past loads.

Each process counts its own calls and rewrites a span when it changes; readers add the processes
up. A histogram is one whole number with a 64-bit count for each of `LANES` classes, a quarter of
an octave each, so that a percentile is off by less than a tenth.

Invariants: what is kept is bounded by `KEPT_S`, `MOST_NAMES` and the number of processes; queue
depth costs the database at most a fiftieth of one connection's time.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import add
from typing import Literal

import asyncpg
import orjson

from tidegate.store.database import Connections, sql
from tidegate.store.records import record_of

LANES = 90  # from 1 ms to over an hour; the first is below 1 ms, the last all that is above
_BITS = 64
_PER_OCTAVE = 4
_BYTES = LANES * _BITS // 8
_COUNTS = struct.Struct(f"<{LANES}Q")
_ONES = tuple(1 << (_BITS * lane) for lane in range(LANES))


def one(length_ms: float) -> int:
    """The histogram of a single length."""
    return _ONES[lane_of(length_ms)]


def lane_of(length_ms: float) -> int:
    """The class of a length."""
    if length_ms < 1:
        return 0
    return min(LANES - 1, 1 + int(math.log2(length_ms) * _PER_OCTAVE))


def pack(histogram: int) -> bytes:
    """As few bytes as it takes."""
    return histogram.to_bytes((histogram.bit_length() + 7) // 8, "little")


def unpack(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def counts(histogram: int) -> tuple[int, ...]:
    """How many are in each class."""
    return _COUNTS.unpack(histogram.to_bytes(_BYTES, "little"))


def percentiles(histogram: int, shares: tuple[float, ...]) -> list[float | None]:
    """The lengths, in ms, that these shares of all (0 to 1) do not exceed; None for an empty one.

    Within a class they are taken to lie evenly.
    """
    in_class = counts(histogram)
    total = sum(in_class)
    if not total:
        return [None] * len(shares)
    return [_length_at(in_class, share * total) for share in shares]


def _length_at(in_class: tuple[int, ...], rank: float) -> float:
    before = 0
    lane = 0
    while lane < LANES - 1 and before + in_class[lane] < max(rank, 1e-9):
        before += in_class[lane]
        lane += 1
    least = 0.0 if lane == 0 else 2 ** ((lane - 1) / _PER_OCTAVE)
    most = 2 ** (lane / _PER_OCTAVE)
    inside = (rank - before) / in_class[lane] if in_class[lane] else 1.0
    return float(least + (most - least) * min(1.0, max(0.0, inside)))


Dimension = Literal["tenant", "model", "upstream", "code"]

# The length of a span, and how long it is kept, in seconds.
KEPT_S = {10: 20 * 60, 60: 3 * 3600, 300: 48 * 3600}
MOST_NAMES = 50
MOST_ROWS = 100_000
OTHERS = ""  # the name under which those beyond `MOST_NAMES` are counted together
_LONGEST_NAME = 200
_TIMEOUT_MS = 3_000


@dataclass(slots=True)
class CallCounts:
    """What ended in a span. For the names in `counts` and `apart` see `dashboard.rollup`.

    waits and lengths are histograms: of the time to admission, and of calls upstream.
    """

    counts: dict[str, int] = field(default_factory=dict)
    apart: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    waits: int = 0
    lengths: int = 0

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def count_apart(self, dimension: Dimension, name: str, amounts: Sequence[int]) -> None:
        names = self.apart.get(dimension)
        if names is None:
            names = self.apart[dimension] = {}
        if name not in names:
            name = OTHERS if len(names) >= MOST_NAMES else name[:_LONGEST_NAME].replace("\0", "")
        _add(names, name, amounts)

    def merge(self, other: CallCounts, most_names: int = MOST_NAMES) -> None:
        """Add what another process, or another span, has counted; names beyond so many together."""
        for name, amount in other.counts.items():
            self.count(name, amount)
        for dimension, theirs in other.apart.items():
            ours = self.apart.setdefault(dimension, {})
            for name, amounts in theirs.items():
                _add(ours, name if name in ours or len(ours) < most_names else OTHERS, amounts)
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
        else:  # of a later version, which counts more
            known.append(amount)


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A span of `step_s` seconds that begins at `at` (seconds since 1970), in one pool."""

    step_s: int
    at: int
    pool: str


class History:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections, instance_id: str) -> None:
        self._connections = connections
        self._instance_id = instance_id

    async def write(self, counted: Sequence[tuple[TimeSpan, CallCounts]]) -> None:
        """What this process has counted so far in each of these spans."""
        columns = (
            [span.step_s for span, _ in counted],
            [float(span.at) for span, _ in counted],
            [span.pool for span, _ in counted],
            [orjson.dumps(tally.counts).decode() for _, tally in counted],
            [orjson.dumps(tally.apart).decode() for _, tally in counted],
            [pack(tally.waits) for _, tally in counted],
            [pack(tally.lengths) for _, tally in counted],
        )

        await self._connections.execute(
            "write_history", self._instance_id, *columns, timeout_ms=_TIMEOUT_MS
        )

    async def read(self, step_s: int, since: float) -> list[tuple[TimeSpan, CallCounts]]:
        """Every process's count of every span from `since` on (seconds since 1970), by time."""
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
        """Delete what is older than `KEPT_S`."""
        for step_s, kept_s in KEPT_S.items():
            await self._connections.execute(
                "forget_history", step_s, now - kept_s, timeout_ms=_TIMEOUT_MS
            )


MOST_COUNTED = 10_000
MOST_QUEUES = 200
_FRESH_S = 1.0
_SHARE = 50
_DEPTHS_TIMEOUT_MS = 1_000


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Jobs that are ready in one queue: at most `MOST_COUNTED` are counted."""

    pool: str
    lane: str
    tenant: str
    jobs: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Depths:
    """All figures are of the same moment. webhooks_oldest_s: for how long one has been due."""

    queues: tuple[QueueDepth, ...]
    retrying: int
    claimed: int
    running: int
    dead: int
    webhooks: int
    webhooks_oldest_s: float
    workers: int


class QueueDepths:
    """Depths of the queues, read as often as is cheap. One per process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._read: Depths | None = None
        self._next_at = float("-inf")

    async def depths(self) -> Depths:
        """As they stood a moment ago. Raises StoreUnavailable."""
        is_fresh = time.monotonic() < self._next_at and not self._connections.away
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
    assert row is not None
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
    )


_PAST_CALLS_TIMEOUT_MS = 30_000
MOST_CALLS = 200_000


@dataclass(frozen=True, slots=True)
class PastCall:
    """One admitted call. `kind` and `model` are None where the record does not have them."""

    submitted_at: datetime
    tenant_id: str
    kind: str | None
    model: str | None
    priority: int
    upstream_ms: float
    input_tokens: int
    output_tokens: int
    images: int


async def past_calls(connections: Connections, pool: str, last_s: float) -> list[PastCall]:
    """What was submitted during the last seconds, in order of time; the newest `MOST_CALLS` where
    there was more. Raises StoreUnavailable."""

    rows = await connections.rows(
        "past_calls", pool, last_s, MOST_CALLS, timeout_ms=_PAST_CALLS_TIMEOUT_MS
    )
    return [PastCall(**row) for row in reversed(rows)]
