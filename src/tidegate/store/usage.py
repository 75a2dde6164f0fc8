"""Usage and cost by tenant, model and day: added up with the rows that they come from.

Invariant: a row of the audit is in the totals exactly once, since both are written in one
transaction: a batch that is repeated adds nothing, unless it is really inserted. Unknown figures
add nothing, and are counted as what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from typing import Any

import asyncpg
import orjson

from tidegate.call import UsageState
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.records import Json
from tidegate.store.rows import dumps

MOST_ROWS = 10_000
_TIMEOUT_MS = 5_000
_SUMMED = ("input_tokens", "output_tokens", "cached_tokens", "thoughts_tokens", "images")
_UNKNOWN = UsageState.UNKNOWN.value
_DOUBTFUL = frozenset((UsageState.PARTIAL.value, UsageState.ESTIMATED.value, _UNKNOWN))
# What `summed` reads of a row of the audit.
READ = (
    *("tenant_id", "pool", "model", "finished_at", *_SUMMED, "cost_micros", "usage_state"),
    "usage_details",
)


@dataclass(frozen=True, slots=True)
class Total:
    """A sum. What is None was not asked apart. unpriced: requests whose LLM tokens are known, but
    no price for them; they add nothing to the cost. partial, estimated, unknown: how many requests
    are charged so; the rest is as the provider told it."""

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


COUNTS = tuple(one.name for one in fields(Total) if one.name not in ("tenant", "model", "day"))


@dataclass(frozen=True, slots=True)
class Spent:
    """By one tenant, in a day and in the month that it is in."""

    day_micros: int = 0
    month_micros: int = 0
    day_tokens: int = 0
    month_tokens: int = 0


class UsageTotals:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def totals(
        self, by: Iterable[str], since: date, until: date, tenant_id: str | None = None
    ) -> list[Total]:
        """Sums of the days from `since` to `until`, both included, apart `by` tenant, model, day;
        the first `MOST_ROWS` in their order."""
        apart = set(by)
        wanted = [name in apart for name in ("tenant", "model", "day")]

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                sql("get_usage"), *wanted, since, until, tenant_id, MOST_ROWS
            )
            return found

        rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        return [Total(**dict(row)) for row in rows]

    async def spent(self, tenants: Sequence[str], today: date) -> dict[str, Spent]:
        """What each has spent so far; nothing of those that have not."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                sql("get_spent"), list(tenants), today.replace(day=1), today
            )
            return found

        rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        values = [{name: row[name] for name in Spent.__dataclass_fields__} for row in rows]
        return {row["tenant_id"]: Spent(**one) for row, one in zip(rows, values, strict=True)}


async def add_usage(connection: asyncpg.Connection, audit: Iterable[Mapping[str, Any]]) -> None:
    """Add rows of the audit that this transaction inserts, `READ` of each. The last thing that it
    does: the totals of a day are locked by it."""
    sums = summed(audit)
    if sums:
        await connection.execute(sql("add_usage"), dumps(sums))


def summed(audit: Iterable[Mapping[str, Any]]) -> list[Json]:
    """The rows of the totals that rows of the audit come to."""
    sums: dict[tuple[str, date, str, str], dict[str, int]] = {}
    for row in audit:
        key = (row["tenant_id"], day_of(row["finished_at"]), row["model"] or "", row["pool"])
        total = sums.get(key)
        if total is None:
            total = sums[key] = dict.fromkeys(COUNTS, 0)
        total["requests"] += 1
        for name in _SUMMED:
            if amount := row[name]:
                total[name] += amount
        cost, state = row["cost_micros"], row["usage_state"]
        if cost:
            total["cost_micros"] += cost
        # Not there in what an earlier version has spilled.
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
        if name in total:  # the two parts of what was written to a cache are not summed apart
            total[name] += amount


def day_of(at: datetime | str) -> date:
    """The day of UTC of a time; a text is as it was spilled."""
    moment = moment_of(at)
    return moment.date() if moment.tzinfo is UTC else moment.astimezone(UTC).date()


def moment_of(at: datetime | str) -> datetime:
    return datetime.fromisoformat(at) if isinstance(at, str) else at
