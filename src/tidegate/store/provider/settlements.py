"""Settlements of reservations in budgets: after a call, and once a provider tells its cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import asyncpg

from tidegate.prices.budgets import Binding
from tidegate.store.database import sql
from tidegate.store.records import Json, dumps, uuid_of


@dataclass(eq=False, slots=True)
class Reservation:
    """A reservation to be written."""

    hold: UUID
    request_id: UUID
    needs: tuple[tuple[Binding, int], ...]


class Settlement(NamedTuple):
    """The charge of a reservation. micros, tokens: None if unknown."""

    hold: UUID
    request_id: UUID | None
    micros: int | None
    tokens: int | None
    doubt: bool

    @property
    def row(self) -> Json:
        return self._asdict() | {"id": self.hold}


async def settle_holds(connection: asyncpg.Connection, settlements: Sequence[Settlement]) -> None:
    """Charge reservations in the caller's transaction."""
    if settlements:
        await connection.execute(sql("settle_budgets"), dumps(one.row for one in settlements))


async def correct_holds(
    connection: asyncpg.Connection, costs: Mapping[UUID, int], *, tokens: int | None = None
) -> int:
    """Charge requests their known costs in micro-dollars instead of an estimate, in the caller's
    transaction; return the number of changed books. tokens: of each; None if unknown."""
    rows = await connection.fetch(sql("estimated_holds_of"), list(costs))
    if not rows:
        return 0
    holds: defaultdict[UUID, set[UUID]] = defaultdict(set)
    for row in rows:
        holds[uuid_of(row["request_id"])].add(uuid_of(row["id"]))
    settlements = list[Settlement]()
    # The cost of earlier attempts is part of the whole; unknown tokens stay charged as reserved.
    of_before = None if tokens is None else 0
    for request_id, ids in holds.items():
        last, *before = sorted(ids, reverse=True)
        settlements.append(Settlement(last, request_id, costs[request_id], tokens, False))
        settlements += [Settlement(one, request_id, 0, of_before, False) for one in before]
    await settle_holds(connection, settlements)
    await connection.execute(sql("count_budget_change"))
    return len(rows)
