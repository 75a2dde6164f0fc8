"""What was erased for good: whose records are not written any more, however late they come.

Invariant: a record of a call that was received before its tenant or subject was erased is not
written after that, be it on its way, in a buffer, or on a disk. Of a subject only the digest is
kept.

Whoever marks takes the table for itself, and so waits for all who have looked into it in a
transaction that is not over: what they write is there to be found by whoever deletes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, NamedTuple

import asyncpg

from tidegate.call import new_id
from tidegate.errors import StoreUnavailable
from tidegate.store.queries import sql
from tidegate.store.records import Json
from tidegate.store.usage import moment_of


class Mark(NamedTuple):
    """Whose a record is, and when the call was received."""

    tenant_id: str
    subject: str | None
    received_at: datetime | str


def digest_of(subject: str) -> bytes:
    return sha256(subject.encode()).digest()


async def mark_erased(
    connection: asyncpg.Connection, tenant_id: str | None, subject: str | None
) -> None:
    """In a transaction of its own. Raises StoreUnavailable where somebody else, such as a backup,
    has the table for long: all who write records would wait behind us."""
    await connection.execute("SET LOCAL lock_timeout = '1500ms'")
    try:
        await connection.execute(sql("lock_erased"))
    except asyncpg.LockNotAvailableError:
        raise StoreUnavailable("the table `erased` is in use, perhaps by a backup") from None
    digest = None if subject is None else digest_of(subject)
    await connection.execute(sql("add_erased"), new_id(), tenant_id, digest)


async def erased_among(connection: asyncpg.Connection, marks: Sequence[Mark]) -> set[int]:
    """The places of those that are not to be written."""
    tenants = {mark.tenant_id for mark in marks}
    digests = {mark.subject: digest_of(mark.subject) for mark in marks if mark.subject is not None}
    found = await connection.fetch(sql("get_erased"), list(tenants), list(digests.values()))
    return set(_matching(marks, digests, found)) if found else set()


async def erased_entries(connection: asyncpg.Connection, entries: Sequence[Json]) -> list[Json]:
    """Of the recorder's entries those whose tenant or subject was erased; of a job its request is
    gone, which is enough."""
    whole = [entry for entry in entries if entry["op"] in ("stream", "relay", "answer")]
    if not whole:
        return []
    marks = []
    for entry in whole:
        row = entry["row"]
        received_at = row["created_at"] if entry["op"] == "stream" else row["submitted_at"]
        marks.append(Mark(row["tenant_id"], row.get("subject"), received_at))
    return [whole[place] for place in await erased_among(connection, marks)]


def _matching(
    marks: Sequence[Mark], digests: Mapping[str, bytes], found: Sequence[Mapping[str, Any]]
) -> Iterable[int]:
    for place, mark in enumerate(marks):
        digest = None if mark.subject is None else digests[mark.subject]
        for row in found:
            is_tenants = row["tenant_id"] in (None, mark.tenant_id)
            is_subjects = row["subject_digest"] in (None, digest)
            if is_tenants and is_subjects and moment_of(mark.received_at) <= row["erased_at"]:
                yield place
                break
