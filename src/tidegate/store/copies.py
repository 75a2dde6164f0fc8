"""A job handed in anew: a copy of one that has ended, with files of its own.

Invariant: a copy shares nothing with the first one, so that neither goes with the other when it is
old. What was asked is the same; the deadline is as far from the copy's submission as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tidegate.call import Attachment, new_id
from tidegate.errors import InvalidRequest, NotEnded
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.dossier import Dossier
from tidegate.store.records import FileRecord, NewJob


async def copy_of(dossier: Dossier, blobs: Blobs) -> NewJob:
    """A new job that is not submitted yet; the blobs of its files are there.

    Raises InvalidRequest for what was no job, NotEnded, NotFound where the bytes of a file are
    gone, and StoreUnavailable. What is left behind by a failure goes with the other orphans.
    """
    record, row = dossier.record, dossier.request
    if record.source != "job":
        said = f"this is no job, but of the source {record.source}: its caller has had the answer"
        raise InvalidRequest("request_id", said, allowed="a job")
    if not record.status.is_end:
        raise NotEnded(f"the request has not ended yet: {record.status}")
    now = datetime.now(UTC)
    inputs = [file for file in record.files if file.role == "input"]
    return NewJob(
        request_id=new_id(),
        created_at=now,
        prompt=row["prompt"],
        classification=record.classification,
        attachments=tuple([await _copied(file, blobs, now) for file in inputs]),
        image_uri=row["image_uri"],
        model=row["model"],
        priority=record.priority,
        deadline_at=_deadline(row, now),
        tenant_id=record.tenant_id,
        pool=dossier.pool,
        webhook_url=row["webhook_url"],
        subject=row["subject"],
        endpoint=record.endpoint,
    )


async def _copied(file: FileRecord, blobs: Blobs, now: datetime) -> Attachment:
    key = new_key(now)
    await blobs.put(key, await blobs.get(file.blob_key))
    return Attachment(
        file_id=new_id(),
        name=file.name,
        mime_type=file.mime_type,
        size_bytes=file.size_bytes,
        blob_key=key,
    )


def _deadline(row: Mapping[str, Any], now: datetime) -> datetime | None:
    if row["deadline_at"] is None:
        return None
    within = row["deadline_at"] - row["created_at"]
    return now + within if within.total_seconds() > 0 else None
