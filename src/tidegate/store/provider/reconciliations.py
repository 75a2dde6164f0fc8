"""Reconciliations: the record's side of a day at a provider, and findings of comparisons with it.

Invariant: a charge and the totals that contain it are corrected in one transaction, and only if the
charge is still the compared one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.prices.reconciliation import (
    Correction,
    DoubtfulCall,
    ModelDay,
    ModelFinding,
    UsageSum,
)
from tidegate.store.database import Connections, sql
from tidegate.store.provider.settlements import correct_holds
from tidegate.store.records import cleaned

MOST_DOUBTFUL = 100_000
MOST_FOUND = 10_000
# A day is read from the log of a month, since batch lines and jobs may end long after they came.
_READ_TIMEOUT_MS, _CORRECT_TIMEOUT_MS = 300_000, 60_000
_MOST_NAMED = 100  # calls per finding
# By tenant, day, model, upstream and pool: the additional cost, and how many calls had none before.
_Totals = defaultdict[tuple[Any, ...], list[int]]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The last comparison of an upstream, day and model. calls: the first hundred that explain a
    difference: id, state, and the cost before and after."""

    upstream: str
    day: date
    model: str
    provider: str
    ours_micros: int
    theirs_micros: int
    verdict: str
    reason: str
    calls: Sequence[Mapping[str, Any]]
    reconciled_at: datetime

    @property
    def difference_micros(self) -> int:
        return self.theirs_micros - self.ours_micros


class Reconciliations:
    """The record's side of a day, its corrections, and findings of comparisons with providers.
    Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def ours(self, upstream: str, day: date) -> dict[str, ModelDay]:
        """Return the record of a UTC day by the model that answered, else the one requested."""
        begin, end = _day_bounds(day)
        reported = await self._connections.rows(
            "get_told_usage", upstream, begin, end, timeout_ms=_READ_TIMEOUT_MS
        )
        rows = await self._connections.rows(
            "get_doubtful_calls",
            upstream,
            begin,
            end,
            MOST_DOUBTFUL + 1,
            timeout_ms=_READ_TIMEOUT_MS,
        )
        is_cut = len(rows) > MOST_DOUBTFUL
        doubtful: defaultdict[str, list[DoubtfulCall]] = defaultdict(list)
        for row in rows[:MOST_DOUBTFUL]:
            values = dict(row)
            doubtful[values.pop("model")].append(DoubtfulCall(**values))
        found: dict[str, ModelDay] = {}
        for row in reported:
            values = dict(row)
            model, unpriced = values.pop("model"), values.pop("unpriced")
            tiers = frozenset(values.pop("tiers"))
            calls = tuple(doubtful.pop(model, ()))
            found[model] = ModelDay(UsageSum(**values), calls, unpriced, tiers, is_cut)
        for model, calls_alone in doubtful.items():
            found[model] = ModelDay(doubtful=tuple(calls_alone), is_cut=is_cut)
        return found

    async def ours_of(self, upstreams: Iterable[str], day: date) -> dict[str, ModelDay]:
        """Return the record of several upstreams together."""
        found: dict[str, ModelDay] = {}
        for upstream in upstreams:
            for model, of_model in (await self.ours(upstream, day)).items():
                found[model] = found[model].plus(of_model) if model in found else of_model
        return found

    async def deleted(self, upstream: str, day: date) -> int:
        """Return how many calls of a UTC day have expired or were erased, and are in its totals
        alone."""
        row = await self._connections.row(
            "count_deleted_calls", upstream, *_day_bounds(day), timeout_ms=_READ_TIMEOUT_MS
        )
        assert row is not None
        deleted: int = row["deleted"]
        return max(0, deleted)

    async def keep(
        self, upstream: str, provider: str, day: date, findings: Sequence[ModelFinding]
    ) -> int:
        """Correct the charges that the findings explain, and store the findings; return the number
        of corrected charges."""

        async def work(connection: asyncpg.Connection) -> int:
            corrected, costs, totals = 0, dict[UUID, int](), _Totals(lambda: [0, 0])
            for finding in findings:
                corrected += await _correct_charges(connection, day, finding, costs, totals)
                calls = orjson.dumps(_explaining_calls(finding)).decode()
                await connection.execute(
                    sql("put_reconciliation"),
                    upstream,
                    day,
                    cleaned(finding.model),
                    provider,
                    finding.ours_micros,
                    finding.theirs.cost_micros,
                    finding.verdict,
                    finding.reason,
                    calls,
                )
            # Last, since records wait for these totals, and other calls for these books.
            if totals:
                rows = [(*key, *more) for key, more in totals.items()]
                await connection.execute(sql("correct_usage"), *zip(*rows, strict=True))
            await correct_holds(connection, costs)
            return corrected

        return await self._connections.run(work, timeout_ms=_CORRECT_TIMEOUT_MS)

    async def found(self, first: date, last: date) -> list[Reconciled]:
        """Return the findings for the days from `first` to `last`, both inclusive, newest first."""
        rows = await self._connections.rows("get_reconciliations", first, last, MOST_FOUND)
        return [Reconciled(**dict(row) | {"calls": orjson.loads(row["calls"])}) for row in rows]

    async def is_done(self, upstream: str, day: date, since: datetime) -> bool:
        """Whether a day was compared at `since` or later."""
        return await self._connections.row("reconciled_since", upstream, day, since) is not None


async def _correct_charges(
    connection: asyncpg.Connection,
    day: date,
    finding: ModelFinding,
    costs: dict[UUID, int],
    totals: _Totals,
) -> int:
    """Correct the charges that the finding explains; return how many. The costs of calls whose
    budgets may be charged otherwise are added to `costs`, the corrections to `totals`."""
    changed = [one for one in finding.corrections if one.delta_micros]
    rows = await connection.fetch(
        sql("correct_charges"),
        [one.call.request_id for one in changed],
        *_day_bounds(day),
        [one.delta_micros for one in changed],
        [_charged_before(one) for one in changed],
    )
    by_id = {one.call.request_id: one for one in changed}
    for row in rows:
        one = by_id[row["request_id"]]
        key = (row["tenant_id"], row["day"], row["model"], row["upstream"], row["pool"])
        totals[key][0] += one.delta_micros
        totals[key][1] += one.call.cost_micros is None and one.call.state != "unknown"
        costs[one.call.request_id] = one.cost_micros
    # These charges are right, but budgets may still be charged the bound.
    equal = finding.ours.doubtful if finding.verdict == "equal" else ()
    right = [one.call for one in finding.corrections if not one.delta_micros] or equal
    costs |= {one.request_id: one.cost_micros for one in right if one.cost_micros is not None}
    return len(rows)


def _charged_before(one: Correction) -> int:
    """Return the cost on record: a call that was repeated is charged for its last attempt."""
    return one.call.weight if one.call.state == "repeated" else one.call.charged_micros


def _explaining_calls(finding: ModelFinding) -> list[dict[str, Any]]:
    return [
        {
            "request_id": str(one.call.request_id),
            "state": one.call.state,
            "charged_micros": one.call.cost_micros,
            "cost_micros": one.cost_micros,
        }
        for one in finding.corrections[:_MOST_NAMED]
    ]


def _day_bounds(day: date) -> tuple[datetime, datetime]:
    begin = datetime.combine(day, time_of_day(), UTC)
    return begin, begin + timedelta(days=1)
