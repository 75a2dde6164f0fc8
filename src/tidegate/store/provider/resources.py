"""Resources at providers on record: the tenant and the account of each.

A row is durable before its id reaches a client, outlives the record of the call that made it, and
is deleted with its tenant. While PostgreSQL is unavailable new rows wait on disk, and only
resources that this process has looked up within a minute are found.

Invariant: a resource has one owner until its provider has deleted it, whatever the provider answers
to others.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from tidegate.call import made_at, new_id
from tidegate.store.database import Connections, sql
from tidegate.store.records import Json, cleaned, dumps, entry_of, uuid_of

_TIMEOUT_MS = 2_000
_MOST_KNOWN = 20_000
_KNOWN_S = 60.0  # after this time another process's erasure is noticed
NOTED = "noted"  # an operation of the recorder's entries


@dataclass(frozen=True, slots=True)
class ResourceOwner:
    """The owner of a resource. account: a digest of the base URL and the key that made it.
    request_id, conversation: of the call that made it, if known."""

    tenant_id: str
    upstream: str
    account: bytes
    request_id: UUID | None = None
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class NewResource:
    """A resource that an answer names for the first time. expires_at: when the provider will have
    deleted it, None for never."""

    dialect: str
    kind: str
    resource_id: str
    owner: ResourceOwner
    subject: str | None = None
    expires_at: datetime | None = None


_Place = tuple[str, str, str]


class ProviderResources:
    """Owners of resources, with a cache of those used last. Every method raises
    StoreUnavailable."""

    def __init__(
        self,
        connections: Connections,
        keep: Callable[[Json], asyncio.Task[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keep` writes an entry, or keeps it on disk until it can be written."""
        self._connections = connections
        self._keep = keep
        self._clock = clock
        self._known: OrderedDict[_Place, tuple[float, ResourceOwner]] = OrderedDict()
        self._tokens: OrderedDict[UUID, int] = OrderedDict()  # of answered calls

    async def note(self, new: Sequence[NewResource]) -> None:
        """Return once all of these are durable; a resource that has an owner keeps it."""
        if new:
            await asyncio.shield(self._keep(_entry(new)))

    def note_soon(self, new: Sequence[NewResource]) -> None:
        """Note resources that any tenant may use while they have no owner."""
        if new:
            self._keep(_entry(new))

    async def is_of_jobs(self, dialect: str, resource_id: str) -> bool:
        """Whether a provider's batch, or its file, was made by the gateway for its jobs."""
        row = await self._connections.row(
            "provider_batch_named", dialect, resource_id, timeout_ms=_TIMEOUT_MS
        )
        return row is not None

    async def owners(self, dialect: str, kind: str, ids: Iterable[str]) -> dict[str, ResourceOwner]:
        """Return the owners of those that have one."""
        found, unknown = dict[str, ResourceOwner](), list[str]()
        for one in ids:
            place = (dialect, kind, one)
            known = self._known.get(place)
            if known is None or self._clock() > known[0]:
                unknown.append(one)
            else:
                found[one] = known[1]
        if unknown:
            rows = await self._connections.rows(
                "provider_resources_named", dialect, kind, unknown, timeout_ms=_TIMEOUT_MS
            )
            for row in rows:
                found[row["resource_id"]] = self._learn(dialect, kind, row)
        return found

    async def of_tenant(
        self,
        tenant_id: str,
        dialect: str,
        kind: str,
        *,
        newest_first: bool,
        after: str | None,
        limit: int,
    ) -> list[tuple[str, ResourceOwner]]:
        """Return a tenant's resources in the order of creation, after one of them; none after a
        resource of another tenant."""
        rows = await self._connections.rows(
            "provider_resources_of",
            tenant_id,
            dialect,
            kind,
            newest_first,
            after,
            limit,
            timeout_ms=_TIMEOUT_MS,
        )
        return [(row["resource_id"], self._learn(dialect, kind, row)) for row in rows]

    async def tokens(
        self, tenant_id: str, requests: Sequence[UUID], conversations: Sequence[str]
    ) -> int:
        """Return the recorded tokens of a tenant's calls: of these requests together, and of the
        last call of each conversation. Those of a request do not change, and are cached."""
        known = [self._tokens[one] for one in requests if one in self._tokens]
        unknown = [one for one in requests if one not in self._tokens]
        if not unknown and not conversations:
            return sum(known)
        rows = await self._connections.rows(
            "tokens_kept", tenant_id, unknown, conversations, timeout_ms=_TIMEOUT_MS
        )
        for row in rows:
            known.append(row["tokens"])
            if row["request_id"] is not None:
                self._tokens[uuid_of(row["request_id"])] = row["tokens"]
        while len(self._tokens) > _MOST_KNOWN:
            self._tokens.popitem(last=False)
        return sum(known)

    async def forget(self, tenant_id: str, dialect: str, kind: str, resource_id: str) -> None:
        """Delete the row of a resource that was deleted at its provider."""
        self._known.pop((dialect, kind, resource_id), None)
        await self._connections.execute(
            "forget_provider_resource",
            dialect,
            kind,
            resource_id,
            tenant_id,
            timeout_ms=_TIMEOUT_MS,
        )

    def _learn(self, dialect: str, kind: str, row: asyncpg.Record) -> ResourceOwner:
        made_by = row["request_id"]
        owner = ResourceOwner(
            row["tenant_id"],
            row["upstream"],
            bytes(row["account"]),
            None if made_by is None else uuid_of(made_by),
            row["conversation"],
        )
        known_s, expires_at = _KNOWN_S, row["expires_at"]
        if expires_at is not None:  # another tenant may have its name from then on
            known_s = min(known_s, (expires_at - datetime.now(UTC)).total_seconds())
        self._known[dialect, kind, row["resource_id"]] = self._clock() + known_s, owner
        self._known.move_to_end((dialect, kind, row["resource_id"]))
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return owner


def _entry(new: Sequence[NewResource]) -> Json:
    """Return the recorder's entry; all resources are of one call."""
    first = new[0]
    return entry_of(
        NOTED,
        {
            "id": first.owner.request_id,
            "tenant_id": first.owner.tenant_id,
            "subject": first.subject,
            # Of the call that made them: a resource made after an erasure belongs to the erased
            # call too.
            "submitted_at": made_at(first.owner.request_id or new_id()),
            "resources": [_row(one) for one in new],
        },
    )


def _row(one: NewResource) -> Json:
    return {
        "dialect": one.dialect,
        "kind": one.kind,
        "resource_id": one.resource_id,
        "tenant_id": one.owner.tenant_id,
        "upstream": one.owner.upstream,
        "account": one.owner.account.hex(),
        "request_id": one.owner.request_id,
        "conversation": cleaned(one.owner.conversation),
        "subject": one.subject,
        "expires_at": one.expires_at,
    }


async def add_resources(connection: asyncpg.Connection, new: Sequence[NewResource]) -> None:
    """Record the owners of resources, in the caller's transaction."""
    await connection.execute(sql("add_provider_resources"), dumps(map(_row, new)))


async def add_noted(connection: asyncpg.Connection, entries: Sequence[Json]) -> None:
    """Write entries of `ProviderResources`. Harmless to repeat."""
    found = [row for one in entries if one["op"] == NOTED for row in one["row"]["resources"]]
    if found:
        await connection.execute(sql("add_provider_resources"), dumps(found))
