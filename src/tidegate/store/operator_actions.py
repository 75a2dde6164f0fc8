"""Actions of operators on record: who changed what, from where, before and after.

    the guard of a route, or a command ── acting() ──► a change ── record_action() ──► one row

`acting` and `record_action` are in `records`, for all writers; this module reads the rows, and
writes those for changes outside of PostgreSQL.

A change in PostgreSQL is recorded in its own transaction, any other before it takes effect. Changes
that a process makes by itself, such as putting its deployment's limits in force, are not recorded.
Limits and upstreams have a history of changes: the row has the revision and no copy of the change.

Invariants: a row is never changed, and only deleted after `OPERATOR_LOG_DAYS`, which a trigger of
the table enforces; no secret is in a row; work that outlives its request is not attributed to the
operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections
from tidegate.store.records import ACTING, LONGEST_TARGET, What, clean, record_action, record_of
from tidegate.telemetry.logging import Log, get_logger

MOST_SHOWN = 1_000
_TIMEOUT_MS = 2_000

log = get_logger()


@dataclass(frozen=True, slots=True)
class OperatorAction:
    """A recorded action. `number` grows with time; revision: in the history that has the change
    itself."""

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


@dataclass(frozen=True, slots=True)
class RequestedPause:
    """A pause of a limit, or the end of its pauses, as an operator requested it. for_ms: None until
    it is resumed."""

    at: datetime
    by: str
    pool: str
    limit: str
    is_end: bool
    for_ms: float | None
    reason: str


class OperatorActions:
    """The recorded actions. Every method raises StoreUnavailable, except `note`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def write(
        self, what: What, target: str, *, after: Mapping[str, Any] | None = None
    ) -> None:
        """Record an action before it takes effect outside of this transaction."""
        await self._connections.run(
            lambda connection: record_action(connection, what, target, after=after),
            timeout_ms=_TIMEOUT_MS,
        )

    async def note(
        self, what: What, target: str, *, after: Mapping[str, Any] | None = None
    ) -> None:
        """Record an action that must work while PostgreSQL is unavailable: then only the log has
        it."""
        try:
            await self.write(what, target, after=after)
        except StoreUnavailable as error:
            now = ACTING.get()
            by = None if now is None else now.operator
            details = {"what": what, "target": target, "after": after, "by": by}
            log.error(Log.ACTION_UNRECORDED, detail=error.message, **details)

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
        """Return actions, the newest first, below the number `before`."""
        rows = await self._connections.rows(
            "list_actions",
            operator and clean(operator),
            what and clean(what),
            target and clean(target)[:LONGEST_TARGET],
            since,
            until,
            before,
            min(limit, MOST_SHOWN),
            timeout_ms=_TIMEOUT_MS,
        )
        return [_action(row) for row in rows]

    async def pauses(self, since: datetime, most: int) -> list[RequestedPause]:
        """Return the newest pauses and resumptions of limits since a time, the newest first."""
        rows = await self._connections.rows("recent_pauses", since, most, timeout_ms=_TIMEOUT_MS)
        return [_pause(row) for row in rows]


def _pause(row: asyncpg.Record) -> RequestedPause:
    stated = _of_json(row["is_now"]) or {}
    return RequestedPause(
        row["at"],
        str(stated.get("by") or row["operator"]),
        str(stated.get("pool") or ""),
        row["target"],
        row["what"] == "limit.resume",
        stated.get("for_ms"),
        str(stated.get("reason") or ""),
    )


def _action(row: asyncpg.Record) -> OperatorAction:
    was, is_now = _of_json(row["was"]), _of_json(row["is_now"])
    return record_of(OperatorAction, row, before=was, after=is_now)


def _of_json(text: str | None) -> Mapping[str, Any] | None:
    return None if text is None else dict(orjson.loads(text))
