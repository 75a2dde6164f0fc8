"""Jobs that wrap a native call, and the result of a job as the record takes it."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.call import Caller
from tidegate.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitPaused,
    LimitUsedUp,
    NotFound,
    TidegateError,
)
from tidegate.jobs.outages import Key
from tidegate.limiter import Permit
from tidegate.settings import Config
from tidegate.spine.native import Begun, Relay, collected, detached_call, endpoint_named
from tidegate.spine.prompt import Ask
from tidegate.spine.record import Attempt, CallFailed, Life
from tidegate.store.jobs import CANCELLED
from tidegate.store.records import AttemptResult, ClaimedJob, FailedTry, Failure
from tidegate.store.states import Status
from tidegate.store.store import Store
from tidegate.telemetry.logging import FrequentLog, Log, get_logger

log = get_logger()
_OTHER_ENDS = {
    CANCELLED.code: Status.CANCELLED,
    # When its turn was asked for again, after its mark.
    **dict.fromkeys(
        (DeadlineExceeded.code, LimitPaused.code, LimitUsedUp.code),
        Status.EXPIRED,
    ),
}
log_job = FrequentLog(Log.JOB_DONE)


def ask_of(job: ClaimedJob) -> Ask:
    kind = job.classification.kind
    return Ask(job.prompt, job.attachments, job.image_uri, kind, job.tenant_id)


async def payer_of(job: ClaimedJob, config: Config, store: Store) -> Caller:
    """Whose budget a job spends. Raises BudgetExceeded, and StoreUnavailable."""
    if not config.asks_for_keys:
        return Caller(job.tenant_id)
    caller = Caller(job.tenant_id, budgets=await store.budgets.budgets_of(job.tenant_id))
    await store.budgets.let_in(caller)
    return caller


def status_of(result: AttemptResult) -> Status:
    if result.failure is None:
        return Status.SUCCEEDED
    code = result.failure.code
    return _OTHER_ENDS.get(code, Status.FAILED)


def log_end(
    job: ClaimedJob, attempt: Attempt, failure: Failure | None, wait_ms: int | None
) -> None:
    fields = {
        "request_id": str(job.request_id),
        "tenant": job.tenant_id,
        **({"trace_id": attempt.trail.trace} if attempt.trail else {}),
        "type": job.classification.kind,
        "queue_ms": round(attempt.queue_ms, 1),
        "upstream_ms": round(attempt.upstream_ms, 1),
        **({"code": failure.code} if failure else {}),
    }
    if wait_ms is None:
        log_job(fields)
    else:
        log.info(Log.JOB_RETRY, retry_in_ms=wait_ms, **fields)


def internal() -> TidegateError:
    return TidegateError("an internal error; it has been logged")


def time_left_ms(job: ClaimedJob) -> int | None:
    """Until the job's deadline, negative when it has passed; None without one."""
    if job.deadline_at is None:
        return None
    return round((job.deadline_at - datetime.now(UTC)).total_seconds() * 1000)


def targets_of(relay: Relay, path: str, model: str) -> tuple[Key, ...]:
    """The upstreams and models that a call can go to; none where another version took it in."""
    try:
        endpoint = endpoint_named(path)
        found = relay.targets.of(endpoint.dialect, endpoint.model or model)
    except (InvalidRequest, NotFound):
        return ()
    return tuple((target.upstream.name, target.model) for target in found)


async def run_wrapped(
    relay: Relay,
    job: ClaimedJob,
    attempt: Attempt,
    admitted: Begun,
    *,
    body: bytes,
    caller: Caller,
    max_attempts: int,
) -> None:
    """Make the call that a job wraps, with its `body`, on the budget of its `caller`; `attempt` is
    filled as the pipeline would fill it."""
    assert job.endpoint is not None
    life, left_ms = Life(), time_left_ms(job)
    attempt.failed_try, attempt.counted_tries = None, 0

    async def begun(permit: Permit | None) -> None:
        now = datetime.now(UTC)
        if life.failed is not None:  # another upstream stands in
            attempt.failed_try = FailedTry(
                finished_at=life.finished_at or now,
                upstream_ms=life.upstream_ms,
                failure=Failure.of(life.failed),
                is_counted=not life.failed.of_upstream,
            )
            attempt.counted_tries += attempt.failed_try.is_counted
        attempt.admitted_at, attempt.fence = now, (0, 0) if permit is None else permit.fence
        attempt.queue_ms = max(0.0, (now - attempt.waiting_since).total_seconds() * 1000)
        await admitted(permit)

    call = detached_call(
        request_id=job.request_id,
        path=job.endpoint,
        body=body,
        caller=caller,
        priority=job.priority,
        deadline_ms=None if left_ms is None else max(1, left_ms),
        trail=attempt.trail,
        most_tries=max_attempts - job.attempts,
    )
    try:
        await collected(relay, call, life, begun)
    except CallFailed as failed:
        raise failed.error from None
    finally:
        attempt.finished_at, attempt.upstream_ms = life.finished_at, life.upstream_ms
        attempt.dialect, attempt.operation = call.endpoint.dialect, call.endpoint.name
        attempt.upstream = life.target.upstream.name if life.target else None
        attempt.answer.first_byte_ms = life.first_byte_ms
        attempt.charge = life.charge
        if life.pieces:
            answer = attempt.answer
            answer.text = [life.said.decode("utf-8", "replace")]
            answer.usage = life.told.usage
            answer.finish_reason = life.told.finish_reason
            answer.response_id = life.told.response_id
            answer.model_version = life.told.model_version
