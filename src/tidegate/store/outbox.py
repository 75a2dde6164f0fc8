"""Outbox of webhooks and alerts: written with what they report, claimed by senders.

Invariant: a webhook exists exactly if its request's end is on record, and stays due until a sender
has settled it: if a sender dies, another one claims the webhook after the lease. So each is
delivered at least once, or given up; a receiver recognises repeats by the webhook's id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import UNKNOWN_USAGE, Status, new_id
from tidegate.errors import NotFound
from tidegate.store.database import Connections, sql
from tidegate.store.records import (
    RequestRecord,
    WebhookRecord,
    failure_of,
    record_of,
    recorded,
    usage_of,
)

WAITING = WebhookRecord("waiting")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt to deliver, in progress. `tries` counts it, and fences its result. created_at:
    when the reported end was recorded."""

    webhook_id: UUID
    request_id: UUID
    tenant_id: str
    event: str
    url: str
    tries: int
    created_at: datetime

    @property
    def status(self) -> str:
        """The status with which the request ended."""
        return self.event.partition(".")[2]


class WebhookOutbox:
    """Webhooks, for senders and operators. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def claim(
        self, limit: int, lease_ms: int, *, but_of: Collection[str] = ()
    ) -> list[Delivery]:
        """Claim at most `limit` due webhooks, none of the tenants `but_of`; a webhook that is not
        settled within the lease is due again."""
        rows = await self._connections.rows("claim_webhooks", limit, float(lease_ms), list(but_of))
        return [record_of(Delivery, row) for row in rows]

    async def end_of(self, delivery: Delivery, now: RequestRecord) -> RequestRecord:
        """Return a request that was queued again, as it had ended before; only its status if that
        end is no longer on record."""
        row = await self._connections.row(
            "get_webhook_end", delivery.request_id, delivery.status, delivery.created_at
        )
        end = replace(
            now, status=Status(delivery.status), text=None, failure=None, finished_at=None
        )
        if row is None:
            return replace(end, usage=UNKNOWN_USAGE, finish_reason=None)
        return replace(
            end,
            attempts=row["attempts"],
            finished_at=row["finished_at"],
            model=row["model"],
            finish_reason=row["finish_reason"],
            failure=failure_of(row["failure"]),
            usage=usage_of(row),
        )

    async def settle(
        self,
        delivery: Delivery,
        state: Literal["pending", "delivered", "given_up"],
        *,
        answer_status: int | None = None,
        problem: str | None = None,
        due_in_ms: int = 0,
    ) -> None:
        """Record an attempt's result; does nothing if another sender has claimed the webhook."""
        fence = (delivery.webhook_id, delivery.tries)
        await self._connections.execute(
            "settle_webhook", *fence, state, answer_status, problem, float(due_in_ms)
        )

    async def redeliver(self, webhook_id: UUID) -> None:
        """Deliver a webhook again, whatever its state; raises NotFound."""
        work = recorded(
            "redeliver_webhook", webhook_id, what="webhook.redeliver", target=webhook_id
        )
        if await self._connections.run(work) is None:
            raise NotFound(f"no webhook {webhook_id}")


@dataclass(frozen=True, slots=True)
class AlertDelivery:
    """One attempt to post an alert, in progress. `tries` counts it, and fences its result. unit: of
    the amounts in a budget's alert; the budget may be deleted. fallback: its cheaper model."""

    alert_id: UUID
    kind: str
    data: str
    created_at: datetime
    tries: int
    unit: Literal["usd", "tokens"] | None
    fallback: str | None


@dataclass(frozen=True, slots=True)
class AlertRecord:
    """An alert and its state; `due_at`: the next attempt of a pending one."""

    alert_id: UUID
    kind: str
    data: str
    created_at: datetime
    state: Literal["pending", "delivered", "given_up"]
    tries: int
    due_at: datetime
    problem: str | None
    unit: Literal["usd", "tokens"] | None
    fallback: str | None


class AlertOutbox:
    """Alerts for operators. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Add an alert; `data` has the key `text`, one sentence that describes it."""
        await self._connections.execute("add_alert", kind, orjson.dumps(data).decode())

    async def hold(self, causes: Iterable[tuple[str, Mapping[str, Any]]], absent_s: float) -> None:
        """Add an alert for each cause, a kind with its `subject` and `pool`, unless its last alert
        still holds: until the cause was absent for `absent_s`."""
        payload = orjson.dumps([{"kind": kind, "data": data} for kind, data in causes]).decode()

        async def write(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("lock_causes"))
            await connection.execute(sql("raise_causes"), payload, absent_s)

        await self._connections.run(write)

    async def claim(self, limit: int, lease_ms: int) -> list[AlertDelivery]:
        """Claim at most `limit` due alerts; an alert that is not settled within the lease is due
        again."""
        rows = await self._connections.rows("claim_alerts", limit, float(lease_ms))
        return [record_of(AlertDelivery, row) for row in rows]

    async def newest(self, limit: int) -> list[AlertRecord]:
        """Return the last alerts, newest first."""
        found = await self._connections.rows("list_alerts", limit)
        return [record_of(AlertRecord, row) for row in found]

    async def redeliver(self, alert_id: UUID) -> bool:
        """Post an alert again; False if there is none, or it is pending anyway."""
        work = recorded("redeliver_alert", alert_id, what="alert.redeliver", target=alert_id)
        return await self._connections.run(work) is not None

    async def settle(
        self,
        delivery: AlertDelivery,
        state: Literal["pending", "delivered", "given_up"],
        *,
        problem: str | None = None,
        due_in_ms: int = 0,
    ) -> None:
        """Record an attempt's result; does nothing if another sender has claimed the alert."""
        await self._connections.execute(
            "settle_alert",
            delivery.alert_id,
            delivery.tries,
            state,
            problem,
            float(due_in_ms),
        )


async def add_webhooks(connection: asyncpg.Connection, ended: Iterable[asyncpg.Record]) -> None:
    """Add the webhooks of requests that ended in this transaction."""
    rows = [
        {
            "id": str(new_id()),
            "request_id": str(row["id"]),
            "tenant_id": row["tenant_id"],
            "pool": row["pool"],
            "event": f"request.{row['status']}",
            "url": row["webhook_url"],
        }
        for row in ended
        if row["webhook_url"] is not None
    ]
    if rows:
        await connection.execute(sql("add_webhooks"), orjson.dumps(rows).decode())


async def webhook_of(
    connection: asyncpg.Connection, request: asyncpg.Record
) -> WebhookRecord | None:
    """Return the state of a request's webhook; None if it has none."""
    if request["webhook_url"] is None:
        return None
    row = await connection.fetchrow(sql("get_webhook"), request["id"])
    if row is None:
        return WAITING
    due_at = row["due_at"] if row["state"] == "pending" else None
    return record_of(WebhookRecord, row, due_at=due_at)
