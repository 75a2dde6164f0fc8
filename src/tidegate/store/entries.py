"""What the recorder writes: an end, a retry or a stream as JSON values, ready for the spill.

An entry has `op` (end | retry | stream), `row` (the request's columns), `attempt` (those of the
attempt, None where none was made), `files` (pictures, and a stream's uploads) and `bodies`.
"""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.store import bodies, rows
from tidegate.store.blobs import Blobs
from tidegate.store.records import AttemptResult, ClaimedJob, Failure, Json, StreamRecord
from tidegate.store.states import Status


async def of_end(job: ClaimedJob, status: Status, result: AttemptResult, blobs: Blobs) -> Json:
    attempt = rows.result_row(result)
    row = {
        **attempt,
        "id": job.request_id,
        "claim": job.claim,
        "status": status,
        "failure": rows.failure_row(result.failure),
    }
    return {
        "op": "end",
        "row": row,
        "attempt": attempt,
        "files": rows.output_rows(job.request_id, job.tenant_id, result.pictures),
        "bodies": [
            await bodies.row_of("request", bodies.body_of_job(job), blobs),
            await bodies.row_of("response", bodies.body_of_result(result), blobs),
        ],
    }


async def of_retry(
    job: ClaimedJob, result: AttemptResult, not_before: datetime, *, is_counted: bool
) -> Json:
    row = {
        "id": job.request_id,
        "claim": job.claim,
        "status": Status.QUEUED,
        "not_before": not_before,
        "uncounted": 0 if is_counted else 1,
        "upstream_ms": result.upstream_ms,
        "first_byte_ms": result.first_byte_ms,
        "failure": rows.failure_row(result.failure),
    }
    attempt = rows.result_row(result)
    return {"op": "retry", "row": row, "attempt": attempt, "files": [], "bodies": []}


async def of_unadmitted(job: ClaimedJob, status: Status, failure: Failure, blobs: Blobs) -> Json:
    row = {
        "id": job.request_id,
        "claim": job.claim,
        "status": status,
        "finished_at": datetime.now(UTC),
        "failure": rows.failure_row(failure),
    }
    body = await bodies.row_of("request", bodies.body_of_job(job), blobs)
    return {"op": "end", "row": row, "attempt": None, "files": [], "bodies": [body]}


async def of_stream(record: StreamRecord, blobs: Blobs) -> Json:
    job, result = record.job, record.result
    failure = record.failure or (result.failure if result else None)
    attempt = None if result is None else rows.result_row(result)
    row = {
        **(attempt or {}),
        "used_model": None if attempt is None else attempt["model"],
        **rows.job_row(job),
        "status": record.status,
        "finished_at": record.finished_at,
        "attempts": 0 if result is None else 1,
        "failure": rows.failure_row(failure),
        "claim": 0,
    }
    files = rows.input_rows(job)
    own_bodies = [await bodies.row_of("request", bodies.body_of_job(job), blobs)]
    if result is not None:
        files += rows.output_rows(job.request_id, job.tenant_id, result.pictures)
        own_bodies.append(await bodies.row_of("response", bodies.body_of_result(result), blobs))
    return {"op": "stream", "row": row, "attempt": attempt, "files": files, "bodies": own_bodies}
