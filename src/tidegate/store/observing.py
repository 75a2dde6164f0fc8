"""What the store records, as those see it who count calls: see `tidegate.observed`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tidegate.call import Answer, Charge, Usage
from tidegate.errors import UpstreamError, UpstreamThrottled
from tidegate.observed import JUDGE, Observed
from tidegate.store.records import AttemptResult, ClaimedJob, Failure, Json, StreamRecord

_THROTTLED = 429


def of_job(
    job: ClaimedJob, status: str, result: AttemptResult, failure: Failure | None
) -> Observed:
    """An attempt of a job that was made; `status` is `retried` where there will be another."""
    return Observed(
        source="job",
        status=status,
        tenant_id=job.tenant_id,
        finished_at=result.finished_at,
        pool=job.pool,
        kind=job.classification.kind,
        code=None if failure is None else failure.code,
        request_id=job.request_id,
        received_at=job.created_at,
        trail=result.trail,
        **_of_result(result, failure),
    )


def of_stream(record: StreamRecord) -> Observed:
    job, result = record.job, record.result
    failure = record.failure or (result.failure if result else None)
    return Observed(
        source="stream",
        status=record.status.value,
        tenant_id=job.tenant_id,
        finished_at=record.finished_at,
        pool=job.pool,
        kind=job.classification.kind,
        streamed=True,
        code=None if failure is None else failure.code,
        request_id=job.request_id,
        received_at=job.created_at,
        trail=job.trail,
        **({"model": job.model} if result is None else _of_result(result, failure)),
    )


def _of_result(result: AttemptResult, failure: Failure | None) -> dict[str, Any]:
    throttled = failure is not None and failure.upstream_status == _THROTTLED
    return {
        "model": result.model,
        "upstream": result.upstream,
        "dialect": result.dialect,
        "operation": result.operation,
        "queue_ms": result.queue_ms,
        "upstream_ms": result.upstream_ms,
        "first_byte_ms": result.first_byte_ms,
        "attempts": 1,
        "response_id": result.response_id,
        "finish_reason": result.finish_reason,
        "throttled": int(throttled),
        "model_version": result.model_version,
        **charged(result.charge),
    }


def charged(charge: Charge) -> dict[str, int | None]:
    """The LLM tokens and the money of a call."""
    usage: Usage = charge.usage
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "thoughts_tokens": usage.thoughts_tokens,
        "cost_micros": charge.cost_micros,
        "cache_write_tokens": usage.details.cache_write_tokens if usage.details else None,
    }


def of_unadmitted(job: ClaimedJob, status: str, failure: Failure) -> Observed:
    """A job that ended in a worker without a call."""
    return Observed(
        source="job",
        status=status,
        tenant_id=job.tenant_id,
        finished_at=datetime.now(UTC),
        pool=job.pool,
        kind=job.classification.kind,
        model=job.model,
        code=failure.code,
    )


def of_question(
    tenant_id: str,
    upstream: str,
    model: str,
    status: str,
    *,
    error: UpstreamError | None,
    answer: Answer,
    charge: Charge,
    queue_ms: float,
    upstream_ms: float,
) -> Observed:
    """What the classifier has asked a model, for a request of that tenant. `upstream` is its own
    pool."""
    usage = charge.usage
    return Observed(
        source=JUDGE,
        status=status,
        tenant_id=tenant_id,
        finished_at=datetime.now(UTC),
        pool=upstream,
        kind="classifier",
        model=model,
        upstream=upstream,
        code=None if error is None else error.code,
        queue_ms=queue_ms,
        upstream_ms=upstream_ms,
        attempts=1,
        throttled=int(isinstance(error, UpstreamThrottled)),
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        thoughts_tokens=usage.thoughts_tokens,
        cost_micros=charge.cost_micros,
        response_id=answer.response_id,
        finish_reason=answer.finish_reason,
    )


def of_row(row: Mapping[str, Any], failure: Json) -> Observed:
    """A job that ended in the database, from its row as it stands."""
    return Observed(
        source="job",
        status=row["status"],
        tenant_id=row["tenant_id"],
        finished_at=row["finished_at"],
        pool=row["pool"],
        kind=row["kind"],
        model=row["used_model"] or row["model"],
        code=failure["code"],
        queue_ms=row["queue_ms"],
    )
