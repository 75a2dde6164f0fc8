"""Outbox of webhooks: written in the transaction of the reported end, claimed by senders.

Invariant: a webhook is there exactly when its request's end is on record, and stays due until a
sender has settled it: a sender that dies is followed by another once its claim is over. So each is
delivered at least once, or given up; a receiver knows repeats by the webhook's id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import new_id
from tidegate.errors import NotFound
from tidegate.store.database import Connections, sql
from tidegate.store.records import WebhookRecord

WAITING = WebhookRecord("waiting")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One try, under way. `tries` counts it, and fences what is recorded of it."""

    webhook_id: UUID
    request_id: UUID
    tenant_id: str
    event: str
    url: str
    tries: int


class Outbox:
    """The sender's and the operator's side. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def claim(
        self, limit: int, lease_ms: int, *, but_of: Collection[str] = ()
    ) -> list[Delivery]:
        """At most `limit` due webhooks, none of the tenants `but_of`; one that is not settled
        within the lease is due again."""

        async def claim(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(
                sql("claim_webhooks"), limit, float(lease_ms), list(but_of)
            )
            return rows

        return [
            Delivery(
                webhook_id=UUID(int=row["id"].int),
                request_id=UUID(int=row["request_id"].int),
                tenant_id=row["tenant_id"],
                event=row["event"],
                url=row["url"],
                tries=row["tries"],
            )
            for row in await self._connections.run(claim)
        ]

    async def settle(
        self,
        delivery: Delivery,
        state: Literal["pending", "delivered", "given_up"],
        *,
        answer_status: int | None = None,
        problem: str | None = None,
        due_in_ms: int = 0,
    ) -> None:
        """Record how a try went; does nothing when another sender has the webhook by now."""
        given = (delivery.webhook_id, delivery.tries, state, answer_status, problem)

        async def settle(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("settle_webhook"), *given, float(due_in_ms))

        await self._connections.run(settle)

    async def redeliver(self, webhook_id: UUID) -> None:
        """Have a webhook delivered again, whatever became of it; raises NotFound."""

        async def redeliver(connection: asyncpg.Connection) -> UUID | None:
            found: UUID | None = await connection.fetchval(sql("redeliver_webhook"), webhook_id)
            return found

        if await self._connections.run(redeliver) is None:
            raise NotFound(f"no webhook {webhook_id}")


async def add_webhooks(connection: asyncpg.Connection, ended: Iterable[asyncpg.Record]) -> None:
    """For those of these requests, ended in this transaction, whose owners want to be told."""
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
    """What became of telling a request's owner; None where nobody is to be told."""
    if request["webhook_url"] is None:
        return None
    row = await connection.fetchrow(sql("get_webhook"), request["id"])
    if row is None:
        return WAITING
    return WebhookRecord(
        state=row["state"],
        webhook_id=UUID(int=row["id"].int),
        tries=row["tries"],
        due_at=row["due_at"] if row["state"] == "pending" else None,
        answer_status=row["answer_status"],
        problem=row["problem"],
    )
