"""Actions of operators on record: who changed what, from where, and what it was before and after.

    the guard of a route, or a command ── acting() ──► a change ── record_action() ──► one row

A change in PostgreSQL is recorded in its own transaction, any other before it takes effect. What a
process does by itself, such as putting its deployment's limits in force, is nobody's action.
Changes of limits and upstreams have a history: the row has its revision and no copy of it.

Invariants: a row is never changed, and goes by `OPERATOR_LOG_DAYS` alone, which the table enforces
by a trigger; no secret is in a row; work that outlives its request is not the operator's any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import new_id
from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections, Work, sql
from tidegate.store.records import clean, record_of
from tidegate.telemetry.logging import Log, get_logger

What = Literal[
    "alert.redeliver",
    "alert.test",
    "batch.cancel",
    "batch.pause",
    "batch.resume",
    "budget.remove",
    "budget.resume",
    "budget.set",
    "job.cancel",
    "job.discard",
    "job.requeue",
    "job.retry",
    "jobs.requeue",
    "key.create",
    "key.keep",
    "key.revoke",
    "limit.pause",
    "limit.resume",
    "limits.change",
    "permits.revoke",
    "sign_in",
    "subject.erase",
    "tenant.remove",
    "tenant.set",
    "upstream.test",
    "upstreams.change",
    "webhook.redeliver",
]
MOST_SHOWN = 1_000
_TIMEOUT_MS = 2_000
_LONGEST_TARGET = 500

log = get_logger()


@dataclass(slots=True)
class Acting:
    """The operator on whose behalf a request or a command runs."""

    operator: str
    role: str
    address: str
    action_id: UUID = field(default_factory=new_id)
    is_over: bool = False


ACTING: ContextVar[Acting | None] = ContextVar("acting", default=None)


@contextmanager
def acting(operator: str, role: str, address: str) -> Iterator[None]:
    """Have what is changed within the block recorded as this operator's."""
    now = Acting(operator, role, address)
    ACTING.set(now)
    try:
        yield
    finally:
        now.is_over = True  # also for tasks that were started within, which have a copy of it


async def record_action(
    connection: asyncpg.Connection,
    what: What,
    target: str,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    revision: int | None = None,
) -> None:
    """Put a change on record in its own transaction, where it is an operator's. A repeat of the
    transaction finds it there."""
    now = ACTING.get()
    if now is None or now.is_over:
        return
    await connection.execute(
        sql("add_action"),
        now.action_id,
        clean(now.operator),
        now.role,
        clean(now.address),
        what,
        clean(target)[:_LONGEST_TARGET],
        _json(before),
        _json(after),
        revision,
    )


def recorded(name: str, *values: Any, what: What, target: object) -> Work[asyncpg.Record | None]:
    """The work of one statement; where it returns a row, it has changed something."""

    async def work(connection: asyncpg.Connection) -> asyncpg.Record | None:
        row = await connection.fetchrow(sql(name), *values)
        if row is not None:
            await record_action(connection, what, str(target))
        return row

    return work


@dataclass(frozen=True, slots=True)
class OperatorAction:
    """A row. `number` grows with time; revision: of the history that has the change itself."""

    number: int
    at: datetime
    operator: str
    role: str
    address: str
    what: str
    target: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    revision: int | None


class OperatorActions:
    """The table. Every method raises StoreUnavailable, but for `note`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def write(
        self, what: What, target: str, *, after: Mapping[str, Any] | None = None
    ) -> None:
        """Put on record what is about to be done elsewhere than in this transaction."""
        await self._connections.run(
            lambda connection: record_action(connection, what, target, after=after),
            timeout_ms=_TIMEOUT_MS,
        )

    async def note(
        self, what: What, target: str, *, after: Mapping[str, Any] | None = None
    ) -> None:
        """The same for what must work while PostgreSQL is away: then the log alone has it."""
        try:
            await self.write(what, target, after=after)
        except StoreUnavailable as away:
            now = ACTING.get()
            by = None if now is None else now.operator
            told = {"what": what, "target": target, "after": after, "by": by}
            log.error(Log.ACTION_UNRECORDED, detail=away.message, **told)

    async def page(
        self,
        *,
        operator: str | None = None,
        what: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[OperatorAction]:
        """The newest first, those below the number `before`."""
        rows = await self._connections.rows(
            "list_actions",
            operator,
            what,
            target,
            since,
            until,
            before,
            min(limit, MOST_SHOWN),
            timeout_ms=_TIMEOUT_MS,
        )
        return [_action(row) for row in rows]


def _action(row: asyncpg.Record) -> OperatorAction:
    was, is_now = _of_json(row["was"]), _of_json(row["is_now"])
    return record_of(OperatorAction, row, before=was, after=is_now)


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else orjson.dumps(dict(value), default=str).decode()


def _of_json(text: str | None) -> Mapping[str, Any] | None:
    return None if text is None else dict(orjson.loads(text))
