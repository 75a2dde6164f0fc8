"""Calls that have ended, counted by spans of time: the past of the dashboard's charts.

Each process counts its own and writes each span whole, as often as it changes; who reads adds the
processes up. So a write may be repeated, nothing is locked by two, and percentiles are right over
all of them. Invariant: what is kept is bounded by `KEPT_S` and by the number of processes, whatever
the traffic: names are counted apart only up to `MOST_NAMES` in a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Literal

import asyncpg
import orjson

from tidegate.store.connection import Connections
from tidegate.store.histogram import pack, unpack
from tidegate.store.queries import sql

Dimension = Literal["tenant", "model", "upstream", "code"]

# The length of a span, and how long it is kept, in seconds.
KEPT_S = {10: 20 * 60, 60: 3 * 3600, 300: 48 * 3600}
MOST_NAMES = 50
MOST_ROWS = 100_000
OTHERS = ""  # the name under which those beyond `MOST_NAMES` are counted together
_LONGEST_NAME = 200
_TIMEOUT_MS = 3_000


@dataclass(slots=True)
class Tally:
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

    def merge(self, other: Tally, most_names: int = MOST_NAMES) -> None:
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
class Span:
    """A span of `step_s` seconds that begins at `at` (seconds since 1970), in one pool."""

    step_s: int
    at: int
    pool: str


class History:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections, instance_id: str) -> None:
        self._connections = connections
        self._instance_id = instance_id

    async def write(self, counted: Sequence[tuple[Span, Tally]]) -> None:
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

        async def write(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("write_history"), self._instance_id, *columns)

        await self._connections.run(write, timeout_ms=_TIMEOUT_MS)

    async def read(self, step_s: int, since: float) -> list[tuple[Span, Tally]]:
        """Every process's count of every span from `since` on (seconds since 1970), by time."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                sql("read_history"), step_s, since, MOST_ROWS
            )
            return found

        rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        return [
            (
                Span(step_s, row["at"], row["pool"]),
                Tally(
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

        async def forget(connection: asyncpg.Connection) -> None:
            for step_s, kept_s in KEPT_S.items():
                await connection.execute(sql("forget_history"), step_s, now - kept_s)

        await self._connections.run(forget, timeout_ms=_TIMEOUT_MS)
